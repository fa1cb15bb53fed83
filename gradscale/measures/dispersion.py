"""Dispersion of per-example gradients around their mean."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gradscale.errors import GradscaleError
from gradscale.measures.measure import Estimate, Estimates
from gradscale.measures.moments import Moments, MomentsState, MomentsStatistic, jackknife, moments

SQUARED = "(loss units / parameter unit)^2"


@dataclass(frozen=True)
class Dispersion:
    """The trace of the gradients' covariance and the noise scale.

    `trace_covariance` is tr Sigma = (Q - |S|^2 / n) / (n - 1), unbiased, with S = sum g and Q = sum |g|^2.
    `noise_scale` is tr Sigma / |g|^2 in examples, with the unbiased |g|^2 = (|S|^2 - Q) / (n (n - 1)); NaN
    where that is not positive: the mean gradient cannot be told from zero. Standard errors: delete-one-block
    jackknife over blocks of shards.

    With `batch_size` B, also `v_within` = tr Sigma / B, unbiased: V_t = E[|g(w, B_t) - g(w)|^2 | W_t = w], the variance
    of the mean gradient of B fresh examples around that of their population, at this checkpoint. It is not V_t of
    batches that were drawn from examples which w has seen, nor the V of arXiv 2110.03128, around E g(W) over trainings:
    the latter's share across seeds no single run can tell. NaN of fewer than two examples, which have no variance.

    Exact per parameter. Cost: none beside coherence, with which it shares its state.
    Source: McCandlish et al. (2018), arXiv 1812.06162, equation 2.8 and appendix A.1 (the "simple" noise scale). V_t:
    Neu et al. (2021), COLT, theorem 1; Wang and Mao (2021), arXiv 2110.03128.
    """

    batch_size: int | None = None

    name = "dispersion"
    summary = "trace of the gradient covariance, noise scale; one backward pass; McCandlish et al., arXiv 1812.06162"

    def __post_init__(self) -> None:
        given = self.batch_size
        if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
            raise GradscaleError(
                f"batch_size must be a whole number of at least 1, got {given!r}; give the examples of a training "
                "batch, as in dispersion:batch_size=32"
            )

    @property
    def statistic(self) -> MomentsStatistic:
        return MomentsStatistic()

    def compute(self, state: MomentsState) -> Estimates:
        return {
            (name, scope): estimate
            for scope, parts in moments(state).items()
            for name, estimate in _estimates(parts, self.batch_size)
        }


def trace_covariance(n: float, q: float, norm: float) -> float:
    """(Q - |S|^2 / n) / (n - 1)."""
    return (q - norm / n) / (n - 1) if n > 1 else math.nan


def noise_scale(n: float, q: float, norm: float) -> float:
    """tr Sigma / |g|^2, both unbiased."""
    signal = (norm - q) / (n * (n - 1)) if n > 1 else math.nan
    return trace_covariance(n, q, norm) / signal if signal > 0 else math.nan


def _estimates(parts: Moments, batch_size: int | None) -> Iterator[tuple[str, Estimate]]:
    value, error = jackknife(parts, trace_covariance)
    yield "trace_covariance", Estimate(value, error, parts.n, "estimator", "dispersion/trace_covariance/v1", SQUARED)
    if batch_size is not None:
        definition = f"dispersion/v_within/batch_size={batch_size}/v1"
        yield "v_within", Estimate(value / batch_size, error / batch_size, parts.n, "estimator", definition, SQUARED)
    value, error = jackknife(parts, noise_scale)
    yield "noise_scale", Estimate(value, error, parts.n, "estimator", "dispersion/noise_scale/v1", "examples")
