"""Means over pairs of examples, by class: of all pairs, within classes, between them, and of every pair of classes.

Whatever is averaged (a cosine, a sign) comes as its sums over the ordered pairs of examples in each pair of classes,
and as the same sums without each jackknife block of examples. Errors are over examples, never over pairs, which are
not independent of one another.

Shapes: C classes, J blocks, m of them at a time, V = 3 + C^2 values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.measures.jackknife import jackknife_errors
from gradscale.measures.measure import Estimate

ALL, WITHIN, BETWEEN, MATRIX = 0, 1, 2, 3  # where the values are; the class matrix goes row by row from MATRIX on
_ENTRIES = 1 << 19  # of class matrices without one example that are held at a time: 4 MiB
Found = dict[tuple[str, str], Estimate]


class PairMeans(NamedTuple):
    """Means over pairs, their standard errors, and how many examples each is of."""

    values: Tensor  # [V] float64
    errors: Tensor  # [V] float64
    sizes: Tensor  # [V] float64


def means_within(sums: Tensor, own: Tensor, C: int) -> PairMeans:
    """Of the pairs within one set, from every example's sums [n, C] over the others by class; `own` [n] is its class.

    Standard errors: delete-one-example jackknife. Memory: 4 MiB, or the C^2 numbers of a class matrix a few times.
    """
    total, counts = _totals(sums, own, C)
    full = pair_values(total, pairs_within(counts))

    def left_out() -> Iterator[tuple[Tensor, Tensor]]:
        for rows, taken in _examples(sums, own, C):
            rest = counts - taken
            yield pair_values(total - rows - rows.mT, pairs_within(rest)), sizes_within(taken)

    return PairMeans(full, jackknife_errors(full, left_out(), sizes_within(counts)), sizes_within(counts))


def means_between(sums: Tensor, own: Tensor, back: Tensor, other: Tensor, C: int) -> PairMeans:
    """Of the pairs between two sets, whose sums over one another are `sums` [n, C] and `back` [m, C].

    The class matrix has the first set in its rows. Standard errors: delete-one-example jackknife over either set while
    the other is held, their squares added.
    """
    (total, n), (_, m) = _totals(sums, own, C), _totals(back, other, C)
    full = pair_values(total, n[:, None] * m)

    def first() -> Iterator[tuple[Tensor, Tensor]]:
        for rows, taken in _examples(sums, own, C):
            yield pair_values(total - rows, (n - taken)[:, :, None] * m), sizes_of_rows(taken)

    def second() -> Iterator[tuple[Tensor, Tensor]]:
        for rows, taken in _examples(back, other, C):
            yield pair_values(total - rows.mT, n[:, None] * (m - taken)[:, None, :]), sizes_of_columns(taken)

    sizes = sizes_of_rows(n), sizes_of_columns(m)
    errors = jackknife_errors(full, first(), sizes[0]).hypot(jackknife_errors(full, second(), sizes[1]))
    return PairMeans(full, errors, sizes[0] + sizes[1])


def pair_values(sums: Tensor, pairs: Tensor) -> Tensor:
    """[..., V] from sums over pairs and their numbers, both [..., C, C].

    The mean over all pairs; the mean of the class matrix's defined diagonal entries, of the others, and the matrix. NaN
    where there is no pair.
    """
    matrix = torch.where(pairs > 0, sums / pairs, torch.nan)
    same = torch.eye(matrix.shape[-1], dtype=torch.bool, device=matrix.device)
    whole = sums.sum(dim=(-2, -1)) / pairs.sum(dim=(-2, -1))
    within, between = (torch.where(part, matrix, torch.nan).flatten(-2).nanmean(dim=-1) for part in (same, ~same))
    return torch.cat([torch.stack([whole, within, between], dim=-1), matrix.flatten(-2)], dim=-1)


def pairs_within(counts: Tensor) -> Tensor:
    """[..., C, C]: the ordered pairs of different examples of one set, from its counts [..., C]."""
    return counts[..., :, None] * counts[..., None, :] - torch.diag_embed(counts)


def sizes_within(counts: Tensor) -> Tensor:
    """[..., V]: how many examples each value is of, from the counts [..., C] of one set."""
    either = counts[..., :, None] + counts[..., None, :] - torch.diag_embed(counts)
    return _sizes(counts, either)


def sizes_of_rows(counts: Tensor) -> Tensor:
    """[..., V]: how many examples of the set that counts the matrix's rows each value is of."""
    return _sizes(counts, counts[..., :, None].expand(*counts.shape, counts.shape[-1]))


def sizes_of_columns(counts: Tensor) -> Tensor:
    """[..., V]: the same of the set that counts the matrix's columns."""
    return _sizes(counts, counts[..., None, :].expand(*counts.shape, counts.shape[-1]))


def whole_estimate(name: str, means: PairMeans, definition: str) -> Found:
    """`name` over all pairs, with scope `all`."""
    return {(name, "all"): _estimate(means, ALL, f"{definition}/{name}/v1")}


def class_estimates(name: str, classes: Sequence[int], means: PairMeans, definition: str, symmetric: bool) -> Found:
    """`name`_within and `name`_between with scope `all`, and `name` with scope `class:<a>,<b>`, a <= b if symmetric."""
    found = {
        (f"{name}_within", "all"): _estimate(means, WITHIN, f"{definition}/{name}_within/v1"),
        (f"{name}_between", "all"): _estimate(means, BETWEEN, f"{definition}/{name}_between/v1"),
    }
    for i, a in enumerate(classes):
        for k, b in enumerate(classes):
            if not symmetric or i <= k:
                entry = MATRIX + i * len(classes) + k
                found[name, f"class:{a},{b}"] = _estimate(means, entry, f"{definition}/{name}/v1")
    return found


def zeros_estimate(zeros: int, n: int) -> Found:
    """How many examples of zero gradient there are beside n others."""
    return {
        ("zero_gradients", "all"): Estimate(
            float(zeros), None, n + zeros, "identity", "stiffness/zero_gradients/v1", "examples"
        )
    }


def _estimate(means: PairMeans, v: int, definition: str) -> Estimate:
    values, errors, sizes = means
    return Estimate(float(values[v]), float(errors[v]), int(sizes[v]), "estimator", definition, "1")


def _totals(sums: Tensor, own: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """The sums over pairs of classes [C, C], rows by `own`, and the counts [C]."""
    total = torch.zeros(C, sums.shape[1], dtype=torch.float64).index_add_(0, own, sums)
    return total, torch.bincount(own, minlength=C).double()


def _examples(sums: Tensor, own: Tensor, C: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What each of m examples, as the first of its pairs, adds to the sums [m, C, C], and to the counts [m, C]."""
    size = max(1, _ENTRIES // (C * C))
    for part, group in zip(sums.split(size), own.split(size), strict=True):
        taken = torch.nn.functional.one_hot(group, C).double()
        yield taken[:, :, None] * part[:, None, :], taken


def _sizes(counts: Tensor, matrix: Tensor) -> Tensor:
    whole = counts.sum(dim=-1, keepdim=True)
    return torch.cat([whole, whole, whole, matrix.flatten(-2)], dim=-1)
