"""Coherence of per-example gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gradscale.measures.measure import Estimate, Estimates
from gradscale.measures.moments import Moments, MomentsState, MomentsStatistic, classes, jackknife, moments


@dataclass(frozen=True)
class Coherence:
    """alpha = |mean g|^2 / mean |g|^2 in [0, 1]: 1 if all gradients are equal, 1/n if they are orthogonal.

    `alpha` is the plug-in value over the n examples measured, `alpha_unbiased` has the unbiased numerator
    (|S|^2 - Q) / (n (n - 1)), with S = sum g and Q = sum |g|^2, and may be negative; `m_coherence` is
    n alpha = |S|^2 / Q. Standard errors: delete-one-block jackknife over blocks of shards, for the n
    examples as a sample of a population. NaN where all gradients are zero.

    Exact per parameter and, with `by_class`, per class. Cost: one backward pass; state J (C + 1) P numbers.
    Source: Chatterjee and Zielinski (2022), arXiv 2203.10036; alpha is their definition of coherence. The
    name alpha_m of arXiv 2008.01217 is m_coherence here.
    """

    by_class: bool = False

    name = "coherence"
    summary = "|mean g|^2 / mean |g|^2 and its m-fold; one backward pass; Chatterjee & Zielinski, arXiv 2203.10036"

    @property
    def statistic(self) -> MomentsStatistic:
        return MomentsStatistic(self.by_class)

    def compute(self, state: MomentsState) -> Estimates:
        found = {(name, scope): e for scope, parts in moments(state).items() for name, e in _estimates(parts)}
        for group in classes(state):
            parts = moments(state, group)["all"]
            found |= {(name, f"class:{group}"): estimate for name, estimate in _estimates(parts)}
        return found


def alpha(n: float, q: float, norm: float) -> float:
    """|S|^2 / (n Q)."""
    return norm / (n * q) if n and q else math.nan


def alpha_unbiased(n: float, q: float, norm: float) -> float:
    """(|S|^2 - Q) / ((n - 1) Q)."""
    return (norm - q) / ((n - 1) * q) if n > 1 and q else math.nan


def _estimates(parts: Moments) -> Iterator[tuple[str, Estimate]]:
    n = parts.n
    value, error = jackknife(parts, alpha)
    yield "alpha", Estimate(value, error, n, "estimator", "coherence/alpha/v1", "1")
    yield "m_coherence", Estimate(n * value, n * error, n, "estimator", "coherence/m_coherence/v1", "1")
    value, error = jackknife(parts, alpha_unbiased)
    yield "alpha_unbiased", Estimate(value, error, n, "estimator", "coherence/alpha_unbiased/v1", "1")
