"""Dispersion of per-example gradients around their mean."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gradscale.measures.measure import Estimate, Estimates
from gradscale.measures.moments import Moments, MomentsState, MomentsStatistic, jackknife, moments


@dataclass(frozen=True)
class Dispersion:
    """The trace of the gradients' covariance and the noise scale.

    `trace_covariance` is tr Sigma = (Q - |S|^2 / n) / (n - 1), unbiased, with S = sum g and Q = sum |g|^2.
    `noise_scale` is tr Sigma / |g|^2 in examples, with the unbiased |g|^2 = (|S|^2 - Q) / (n (n - 1)); NaN
    where that is not positive: the mean gradient cannot be told from zero. Standard errors: delete-one-block
    jackknife over blocks of shards.

    Exact per parameter. Cost: none beside coherence, with which it shares its state.
    Source: McCandlish et al. (2018), arXiv 1812.06162, equation 2.8 and appendix A.1 (the "simple" noise scale).
    """

    name = "dispersion"
    summary = "trace of the gradient covariance, noise scale; one backward pass; McCandlish et al., arXiv 1812.06162"

    @property
    def statistic(self) -> MomentsStatistic:
        return MomentsStatistic()

    def compute(self, state: MomentsState) -> Estimates:
        return {(name, scope): e for scope, parts in moments(state).items() for name, e in _estimates(parts)}


def trace_covariance(n: float, q: float, norm: float) -> float:
    """(Q - |S|^2 / n) / (n - 1)."""
    return (q - norm / n) / (n - 1) if n > 1 else math.nan


def noise_scale(n: float, q: float, norm: float) -> float:
    """tr Sigma / |g|^2, both unbiased."""
    signal = (norm - q) / (n * (n - 1)) if n > 1 else math.nan
    return trace_covariance(n, q, norm) / signal if signal > 0 else math.nan


def _estimates(parts: Moments) -> Iterator[tuple[str, Estimate]]:
    value, error = jackknife(parts, trace_covariance)
    unit = "(loss units / parameter unit)^2"
    yield "trace_covariance", Estimate(value, error, parts.n, "estimator", "dispersion/trace_covariance/v1", unit)
    value, error = jackknife(parts, noise_scale)
    yield "noise_scale", Estimate(value, error, parts.n, "estimator", "dispersion/noise_scale/v1", "examples")
