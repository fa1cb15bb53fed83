"""Cosine stiffness: how far a step along one example's gradient lowers the loss of another.

Shapes: J jackknife blocks, C classes, P entries of all parameters, V values (see `pairs`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.measures.jackknife import jackknife_errors
from gradscale.measures.measure import Estimates
from gradscale.measures.pairs import (
    ALL,
    Found,
    PairMeans,
    class_estimates,
    pair_values,
    pairs_within,
    sizes_of_columns,
    sizes_of_rows,
    sizes_within,
    whole_estimate,
    zeros_estimate,
)
from gradscale.measures.unit_sums import (
    UnitState,
    UnitSumsStatistic,
    classes_of,
    products,
    rows_of,
    zero_gradients,
)

_TOLERANCE = 1e-4  # of the length of a sum of unit gradients: float32 sums of a shard's examples differ by far less


@dataclass(frozen=True)
class Stiffness:
    """The mean cosine of the gradients of two examples, in [-1, 1], over all pairs of different examples.

    `cos` is over all pairs i != j; with `by_class`, for which the task must have labels, `cos` with scope
    `class:<a>,<b>` is the class matrix C(a, b), over pairs of an example of class a with another of class b,
    `cos_within` the mean of its diagonal and `cos_between` that of the rest; entries without a pair are NaN and have no
    part in these means. Exact for the n examples, without forming pairs: with u_a = sum_{i in a} g_i / |g_i|,
    C(a, b) = <u_a, u_b> / (n_a n_b) and C(a, a) = (|u_a|^2 - n_a) / (n_a (n_a - 1)).

    A zero gradient has no cosine: such examples are left out, n does not count them, and `zero_gradients` does. There
    is no estimate by parameter: its cosines would need unit gradients of that parameter's own. Where `by_class`, the
    cosine over all pairs as the class sums have it is held to that of the sum over all examples, an identity.

    Standard errors: delete-one-block jackknife over blocks of shards, for the n examples as a sample of a population,
    never over pairs. Cost: two backward passes; state J (C + 1) P float64, J (C + 1) P / 2^27 GiB.
    Source: Fort, Nowak, Jastrzebski and Narayanan (2019), arXiv 1901.09491, section 2: their equation for S_cos; the
    class matrix is theirs.
    """

    by_class: bool = False

    name = "stiffness"
    summary = "mean cos(g_i, g_j) over i != j, within and between classes; two backward passes; Fort et al., 1901.09491"

    @property
    def statistic(self) -> UnitSumsStatistic:
        return UnitSumsStatistic(self.by_class)

    def compute(self, state: UnitState) -> Estimates:
        return cosines_within(state, self.by_class)


def cosines_within(state: UnitState, by_class: bool) -> Found:
    """The estimates of `Stiffness`.

    Raises: GradscaleError if the class sums do not add up to the sum over all examples.
    """
    everyone, zeros = _gram(state, [None]), zero_gradients(state)
    means = _within(everyone)
    found = {**whole_estimate("cos", means, "stiffness"), **zeros_estimate(zeros, int(means.sizes[ALL]))}
    if by_class:
        classes = classes_of(state)
        of_classes = _gram(state, classes)
        _check_identity(everyone, of_classes)
        found |= class_estimates("cos", classes, _within(of_classes), "stiffness", symmetric=True)
    return found


def cosines_between(left: UnitState, right: UnitState, by_class: bool) -> Found:
    """The same of the pairs of an example of `left` with one of `right`, two sets that have none in common.

    The rows of the class matrix are of `left`, its columns of `right`. Standard errors: the jackknife over the blocks
    of either set while the other is held, their squares added. n is the number of examples of both.
    """
    means = _between(left, right, [None])
    zeros = zero_gradients(left) + zero_gradients(right)
    found = {**whole_estimate("cos", means, "stiffness"), **zeros_estimate(zeros, int(means.sizes[ALL]))}
    if by_class:
        classes = sorted({*classes_of(left), *classes_of(right)})
        found |= class_estimates("cos", classes, _between(left, right, classes), "stiffness", symmetric=False)
    return found


class _Gram(NamedTuple):
    counts: Tensor  # [J, C] float64
    products: Tensor  # [J, C, J, C] float64: of the sums of unit gradients


def _gram(state: UnitState, groups: Sequence[int | None]) -> _Gram:
    rows = rows_of(state, groups)
    return _Gram(rows.counts, products(state, rows, state, rows))


def _check_identity(everyone: _Gram, by_class: _Gram) -> None:
    """Hold the sum over all examples to the class sums: n = sum n_a, and |u|^2 = sum_ab <u_a, u_b>.

    Raises: GradscaleError naming the identity.
    """
    n, parts = int(everyone.counts.sum()), int(by_class.counts.sum())
    squares = [float(gram.products.sum()) for gram in (everyone, by_class)]
    whole, recovered = (math.sqrt(max(0.0, square)) for square in squares)
    if n == parts and abs(whole - recovered) <= _TOLERANCE * (whole + math.sqrt(n)):
        return
    cosines = [(square - n) / (n * (n - 1)) if n > 1 else math.nan for square in squares]
    raise GradscaleError(
        "stiffness must satisfy the identity that the cosine of all pairs recovered from the class sums is that of the "
        f"sum over all examples, got {cosines[1]:.9g} of {parts} examples and {cosines[0]:.9g} of {n}; the state is "
        "damaged: measure into a new folder"
    )


def _within(gram: _Gram) -> PairMeans:
    """Of the pairs within one set."""
    counts = gram.counts.sum(dim=0)
    total, of_block = gram.products.sum(dim=(0, 2)), gram.products.sum(dim=2)  # [C, C], [J, C, C]
    own = torch.einsum("jajb->jab", gram.products)
    rest = counts - gram.counts
    without = total - of_block - of_block.mT + own - torch.diag_embed(rest)
    full = pair_values(total - torch.diag_embed(counts), pairs_within(counts))
    sizes = sizes_within(counts)
    left_out = (pair_values(without, pairs_within(rest)), sizes_within(gram.counts))
    return PairMeans(full, jackknife_errors(full, [left_out], sizes), sizes)


def _between(left: UnitState, right: UnitState, groups: Sequence[int | None]) -> PairMeans:
    """Of the pairs between two sets."""
    rows, columns = rows_of(left, groups), rows_of(right, groups)
    gram = products(left, rows, right, columns)
    n, m = rows.counts.sum(dim=0), columns.counts.sum(dim=0)
    total = gram.sum(dim=(0, 2))
    full = pair_values(total, n[:, None] * m)
    by_row = pair_values(total - gram.sum(dim=2), (n - rows.counts)[:, :, None] * m)
    by_column = pair_values(total - gram.sum(dim=0).transpose(0, 1), n[:, None] * (m - columns.counts)[:, None, :])
    first = jackknife_errors(full, [(by_row, sizes_of_rows(rows.counts))], sizes_of_rows(n))
    second = jackknife_errors(full, [(by_column, sizes_of_columns(columns.counts))], sizes_of_columns(m))
    return PairMeans(full, first.hypot(second), sizes_of_rows(n) + sizes_of_columns(m))
