"""Coherence of per-example gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gradscale.errors import GradscaleError
from gradscale.measures.measure import Estimate, Estimates
from gradscale.measures.moments import ABOVE, Moments, MomentsState, MomentsStatistic, classes, jackknife, moments


@dataclass(frozen=True)
class Coherence:
    """alpha = |mean g|^2 / mean |g|^2 in [0, 1]: 1 if all gradients are equal, 1/n if they are orthogonal.

    `alpha` is the plug-in value over the n examples measured, `alpha_unbiased` has the unbiased numerator
    (|S|^2 - Q) / (n (n - 1)), with S = sum g and Q = sum |g|^2, and may be negative; `m_coherence` is
    n alpha = |S|^2 / Q. Standard errors: delete-one-block jackknife over blocks of shards, for the n
    examples as a sample of a population. NaN where all gradients are zero.

    With `min_norm`, also `alpha_above`: alpha of the examples with |g_i| > min_norm alone, |g_i| over all measured
    parameters, in every layer the same examples; its n is how many there are. Late in training most gradients vanish,
    and dilute alpha: with a share p of nonzero ones, alpha = p alpha_above of min_norm=0.

    Exact per parameter and, with `by_class`, per class. Cost: one backward pass, two with `min_norm`; state
    J (C + 1) P numbers, J P more with `min_norm`.
    Source: Chatterjee and Zielinski (2022), arXiv 2203.10036; alpha is their definition of coherence. The
    name alpha_m of arXiv 2008.01217 is m_coherence here.
    """

    by_class: bool = False
    min_norm: float | None = None

    name = "coherence"
    summary = "|mean g|^2 / mean |g|^2 and its m-fold; one backward pass; Chatterjee & Zielinski, arXiv 2203.10036"

    def __post_init__(self) -> None:
        given = self.min_norm
        numeric = isinstance(given, int | float) and not isinstance(given, bool)
        if given is not None and not (numeric and 0 <= given < math.inf):
            raise GradscaleError(
                f"min_norm must be a finite number of at least 0, got {given!r}; take 0 for all nonzero "
                "gradients, as in coherence:min_norm=0"
            )

    @property
    def statistic(self) -> MomentsStatistic:
        return MomentsStatistic(self.by_class, None if self.min_norm is None else float(self.min_norm))

    def compute(self, state: MomentsState) -> Estimates:
        found = {(name, scope): e for scope, parts in moments(state).items() for name, e in _estimates(parts)}
        for group in classes(state):
            parts = moments(state, group)["all"]
            found |= {(name, f"class:{group}"): estimate for name, estimate in _estimates(parts)}
        if self.min_norm is not None:
            definition = f"coherence/alpha_above/min_norm={float(self.min_norm)!r}/v1"
            for scope, parts in moments(state, ABOVE).items():
                value, error = jackknife(parts, alpha)
                found["alpha_above", scope] = Estimate(value, error, parts.n, "estimator", definition, "1")
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
