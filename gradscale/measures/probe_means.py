"""Sums over examples of a quantity that probes estimate for each example, and the two errors of its mean.

Shapes: B examples, N probes, D digits of an exact sum.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.measures.exact_sum import add_totals, total_of, value_of, zero_total


class ProbeMeans(NamedTuple):
    """Exact sums over examples of x, x^2 and w: their bits depend on neither order nor grouping.

    x is the mean over an example's N probes, w = s^2 / N its variance, s^2 that of the probes (0 of a single one).
    """

    totals: Tensor  # [3, D] int64, see `exact_sum`
    examples: Tensor  # [] int64


class Means(NamedTuple):
    """The mean over n examples with two standard errors, NaN where they cannot be told."""

    value: float
    over_examples: float  # for the examples as a sample of a population; the probes' noise is in it
    over_probes: float  # for these examples
    n: int


def no_means() -> ProbeMeans:
    return ProbeMeans(zero_total(3), torch.tensor(0))


def means_of(values: Tensor) -> ProbeMeans:
    """Of [B, N] values, one for every example and probe; examples with one that is not finite are left out."""
    kept = values[values.isfinite().all(dim=1)].cpu().double()
    if not len(kept):
        return no_means()
    probes = kept.shape[1]
    x = _sum_by_row(kept) / probes
    w = _sum_by_row((kept - x[:, None]).square()) / (max(probes - 1, 1) * probes)
    return ProbeMeans(total_of(torch.stack([x, x.square(), w], dim=1)), torch.tensor(len(kept)))


def _sum_by_row(values: Tensor) -> Tensor:
    """[B]: one column after another, so that the bits of a row do not depend on how many there are."""
    total = torch.zeros_like(values[:, 0])
    for column in values.unbind(dim=1):
        total += column
    return total


def add_means(left: ProbeMeans, right: ProbeMeans) -> ProbeMeans:
    return ProbeMeans(add_totals(left.totals, right.totals), left.examples + right.examples)


def means(state: ProbeMeans, probes: int) -> Means:
    n = int(state.examples)
    if not n:
        return Means(math.nan, math.nan, math.nan, 0)
    x, squares, w = value_of(state.totals).tolist()
    return Means(x / n, error_of_mean(x, squares, n), math.sqrt(w) / n if probes > 1 else math.nan, n)


def error_of_mean(total: float, squares: float, n: int) -> float:
    """The standard error s / sqrt(n) of the mean of n numbers, from their sum and that of their squares; NaN of one."""
    return math.sqrt(max(0.0, squares - total * total / n) / (n - 1) / n) if n > 1 else math.nan
