"""The covariance of gradients from their sketches: moments that add up, and estimates without bias from pairs.

With independent x1, ..., x4 of covariance Sigma, |Sigma|_F^2 = E <x1 - x2, x3 - x4>^2 / 4 and (tr Sigma)^2 =
E |x1 - x2|^2 |x3 - x4|^2 / 4. Their means over all quadruples of different examples, U-statistics, take three sums
over the centred points alone, `Invariants`: no pair is ever formed where there are more points than dimensions.

Shapes: n points, K their dimension, m = min(n, K).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Invariants(NamedTuple):
    """Of n points z less their mean."""

    n: int
    norm: float  # sum_i |z_i|^2
    fourth: float  # sum_i |z_i|^4
    square: float  # |sum_i z_i z_i^T|_F^2 = sum_ij <z_i, z_j>^2


class Spectrum(NamedTuple):
    """Of one set of examples."""

    invariants: Invariants  # of the sketches as they are
    eigenvalues: Tensor  # [min(n - 1, K)] float64, descending: of the covariance of sketches as long as their gradients


class PointMoments(NamedTuple):
    """Sums over points z less a fixed one: a commutative monoid, and a difference of two is that of the sets."""

    points: Tensor  # [] float64: how many
    total: Tensor  # [K], sum z
    second: Tensor  # [K, K], sum z z^T
    third: Tensor  # [K], sum |z|^2 z
    norm: Tensor  # [], sum |z|^2
    fourth: Tensor  # [], sum |z|^4


def no_points(dim: int) -> PointMoments:
    shapes: tuple[tuple[int, ...], ...] = ((), (dim,), (dim, dim), (dim,), (), ())
    return PointMoments(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))


def add_points(moments: PointMoments, points: Tensor) -> None:
    """Add `points` [n, K] float64 to the tensors of `moments`, in place."""
    sq_norms = points.square().sum(dim=1)
    moments.points.add_(len(points))
    moments.total.add_(points.sum(dim=0))
    moments.second.addmm_(points.mT, points)
    moments.third.add_(sq_norms @ points)
    moments.norm.add_(sq_norms.sum())
    moments.fourth.add_(sq_norms.square().sum())


def subtract(whole: PointMoments, part: PointMoments) -> PointMoments:
    """The moments of the points of `whole` that are not in `part`."""
    return PointMoments(*(a - b for a, b in zip(whole, part, strict=True)))


def scatter(moments: PointMoments) -> Tensor:
    """[K, K]: sum_i (z_i - mean) (z_i - mean)^T."""
    return moments.second.addr(moments.total, moments.total, alpha=-1 / float(moments.points))


def invariants_of_moments(moments: PointMoments) -> Invariants:
    """With mean d: |z - d|^2 = a - 2 b + c for a = |z|^2, b = <z, d>, c = |d|^2, whose squares are added up."""
    n, mean = float(moments.points), moments.total / moments.points
    c = float(mean @ mean)
    fourth = float(moments.fourth + 4 * mean @ moments.second @ mean - 4 * mean @ moments.third)
    fourth += 2 * c * float(moments.norm) - 4 * c * n * c + n * c**2
    return Invariants(round(n), float(moments.norm) - n * c, fourth, float(scatter(moments).square().sum()))


def centred_gram(gram: Tensor) -> Tensor:
    """[n, n]: the inner products of points less their mean, from those of the points."""
    rows = gram.mean(dim=1)
    return gram - rows[:, None] - rows + rows.mean()


def invariants_of_gram(gram: Tensor) -> Invariants:
    """Of the Gram matrix [n, n] of points, not centred."""
    centred = centred_gram(gram)
    norms = centred.diagonal()
    return Invariants(len(gram), float(norms.sum()), float(norms.square().sum()), float(centred.square().sum()))


def eigenvalues(matrix: Tensor, n: int) -> Tensor:
    """[min(n - 1, K)] descending: of a scatter matrix [K, K], or a centred Gram matrix [n, n], by n - 1."""
    found: Tensor = torch.linalg.eigvalsh(matrix)
    return found.flip(0).clamp(min=0)[: n - 1] / (n - 1)


def frobenius_sq(moments: Invariants) -> float:
    """|Sigma|_F^2 without bias: the mean of <z_i - z_j, z_k - z_l>^2 / 4 over different i, j, k, l; NaN for n < 4.

    Y1 - 2 Y2 + Y3 in the notation of Chen, Zhang and Zhong (2010), J. Am. Stat. Assoc. 105, section 2; of centred
    points the sums over pairs, triples and quadruples are those of the three invariants.
    """
    n, norm, fourth, square = moments
    if n < 4:
        return math.nan
    pairs, triples = n * (n - 1), n * (n - 1) * (n - 2)
    quadruples = triples * (n - 3)
    one = (square - fourth) / pairs
    two = (2 * fourth - square) / triples
    three = (norm**2 - 6 * fourth + 2 * square) / quadruples
    return one - 2 * two + three


def trace_sq(moments: Invariants) -> float:
    """(tr Sigma)^2 without bias: the mean of |z_i - z_j|^2 |z_k - z_l|^2 / 4 over different i, j, k, l; NaN for n < 4.

    From the matrix D of half the squared distances, sum over quadruples = (1'D1)^2 - 4 |D1|^2 + 2 |D|_F^2.
    """
    n, norm, fourth, square = moments
    if n < 4:
        return math.nan
    total = (n * n - 3 * n + 1) * norm**2 - n * (n - 1) * fourth + 2 * square
    return total / (n * (n - 1) * (n - 2) * (n - 3))


def without_sketch_noise(frobenius: float, trace: float, dim: int) -> float:
    """|Sigma|_F^2 from the two U-statistics of points S x, without the bias of a dense Gaussian sketch S of K = `dim`.

    E <Su, Sv>^2 = <u, v>^2 (1 + 1/K) + |u|^2 |v|^2 / K and E |Su|^2 |Sv|^2 = |u|^2 |v|^2 + 2 <u, v>^2 / K, exactly, so
    that the pair (|Sigma|_F^2, (tr Sigma)^2) comes back from two linear equations. Signs, dense or sparse, have
    2 sum_p u_p^2 v_p^2 / K less: the value is low by at most 2 / K of itself, to first order. Maps which leave more
    products exact than that, as `count` those within a small parameter, are corrected by too much.
    """
    return (frobenius - trace / dim) / (1 + 1 / dim - 2 / dim**2)


def entropy_rank(values: Tensor) -> float:
    """exp(-sum p log p), p = values / sum; NaN if they are all zero. Roy and Vetterli (2007), EUSIPCO, definition 1."""
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else math.nan


def jackknife_error(values: Tensor) -> Tensor:
    """[...]: the delete-one-block error from the values [J, ...] without each block; NaN of none."""
    J = len(values)
    return ((J - 1) / J * (values - values.mean(dim=0)).square().sum(dim=0)).sqrt() if J else torch.tensor(math.nan)
