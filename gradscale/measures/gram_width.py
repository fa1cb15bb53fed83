"""Gaussian widths from a Gram matrix alone, and how far a sketch may change them.

The products (<t_i, v>)_i of a set with a standard normal v are N(0, K) with K_ij = <t_i, t_j>. So the width depends on
K only, and since E <c, v> = 0 on the pairwise distances only.

Shapes: n points, M draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.measures.gaussian_width import GRADIENT_UNIT, mean_and_error
from gradscale.measures.measure import Estimate
from gradscale.sketches.philox import key_of, normals

_VERSION = 1
_BLOCK = 1 << 22  # entries of the draws held at a time
_CLIPPED = 0.5  # the largest share of a Gram matrix's spectrum that may be clipped
_ASYMMETRY = 1e-5  # by the largest entry: float32 inner products differ by less


class GramWidth(NamedTuple):
    """Widths of one set, with bounds on `width` that hold without any draw."""

    width: Estimate
    symmetrized: Estimate
    lower: float  # diam / sqrt(2 pi), of the matrix as given
    upper: float  # max |t_i - mean t| sqrt(2 log n)
    clipped: float  # the negative eigenvalues' share of the sum of magnitudes; 0 of a Gram matrix of vectors


def width_of_gram(
    gram: Tensor, draws: int = 10_000, seed: int = 0, set_name: str = "examples@theta", unit: str = GRADIENT_UNIT
) -> GramWidth:
    """w = E max_i x_i and E max_i |x_i| for x ~ N(0, gram [n, n]), by `draws` draws.

    x = R z with the symmetric square root R, which changes little if the Gram matrix does, and z_i keyed by
    (seed, draw, i): Gram matrices of the same examples in the same order share their random numbers, and differences
    of their widths have small errors. The width's x is recentred by its mean, which leaves w unchanged. Eigenvalues
    below zero, which a sketched Gram matrix with an exact diagonal has, are set to zero; `clipped` is their share, of
    the recentred matrix or the given one, whichever is larger. Standard errors: over draws; at most
    max |t_i| / sqrt(draws), since Var(max) <= max |t_i|^2.

    One point has width 0, exactly. Cost: n^3 for two eigendecompositions, 2 n^2 a draw; memory 6 n^2 numbers.
    Raises: GradscaleError if the matrix is empty, not square, not finite, not symmetric, or far from positive
    semi-definite: a diagonal entry below zero, or more than half of the spectrum to be clipped.
    Source: the bounds are diam / sqrt(2 pi), the width of the two farthest points, and the maximal inequality for n
    Gaussians (Boucheron, Lugosi and Massart 2013, theorem 2.5); Var(max) is the Gaussian Poincare inequality.
    """
    exact = _checked(gram)
    n = len(exact)
    if draws < 1:
        raise GradscaleError(f"draws must be at least 1, got {draws}")
    recentred = _recentred(exact)
    rounding = n * torch.finfo(exact.dtype).eps * float(exact.abs().max())  # of an eigenvalue
    (root, clipped), (plain_root, plain_clipped) = _root(recentred, rounding), _root(exact, rounding)
    largest, magnitudes = [], []
    for z in _draws(n, draws, seed):
        largest.append((z @ root).amax(dim=1))
        magnitudes.append((z @ plain_root).abs().amax(dim=1))

    def estimate(name: str, values: list[Tensor]) -> Estimate:
        value, error = mean_and_error(torch.cat(values))
        return Estimate(value, error, n, "estimator", f"gaussian_width/{name}/{set_name}/gram/v1", unit)

    return GramWidth(
        estimate("width", largest) if n > 1 else estimate("width", [torch.zeros(draws)]),
        estimate("symmetrized", magnitudes),
        _diameter(exact) / math.sqrt(2 * math.pi),
        math.sqrt(max(0.0, float(recentred.diagonal().max()))) * math.sqrt(2 * math.log(n)),
        max(clipped, plain_clipped),
    )


class Distortion(NamedTuple):
    """A map multiplies every pairwise distance of a set by a factor between `low` and `high`."""

    low: float
    high: float


def distortion_of_epsilon(epsilon: float) -> Distortion:
    """Squared distances kept to (1 - epsilon, 1 + epsilon): factors sqrt(1 - epsilon) and sqrt(1 + epsilon).

    Raises: GradscaleError if epsilon is negative or not a number.
    """
    if not epsilon >= 0:
        raise GradscaleError(f"epsilon must be at least 0, got {epsilon}")
    return Distortion(math.sqrt(max(0.0, 1 - epsilon)), math.sqrt(1 + epsilon))


def distortion_of_gaussian_sketch(points: int, dim: int, failure: float = 0.05) -> Distortion:
    """What a dense Gaussian sketch to R^dim does to the distances of `points` points, but for probability `failure`.

    |S x|^2 / |x|^2 is chi^2_dim / dim, which exceeds 1 + 2 sqrt(t / dim) + 2 t / dim, and falls below
    1 - 2 sqrt(t / dim), with probability at most e^-t each; t = log(points (points - 1) / failure) serves all pairs.
    Loose: the factors measured on the pairs themselves lie within.
    Source: Laurent and Massart (2000), lemma 1.
    """
    if points < 2:
        return Distortion(1.0, 1.0)
    t = math.log(points * (points - 1) / failure)
    return Distortion(
        math.sqrt(max(0.0, 1 - 2 * math.sqrt(t / dim))), math.sqrt(1 + 2 * math.sqrt(t / dim) + 2 * t / dim)
    )


def distortion_of_sign_sketch(points: int, dim: int, failure: float = 0.05) -> Distortion:
    """The same of a dense map to R^dim of independent entries +-1 / sqrt(dim): below, a little looser.

    dim |S x|^2 / |x|^2 is a sum of dim independent r^2 with r = <signs, x> / |x|. Even moments of r are at most a
    normal's, so that above 1 its tail is chi^2's. Since E r^4 <= 3, it falls below 1 - sqrt(6 t / dim) with probability
    at most e^-t.
    Source: Achlioptas (2003), lemma 5.1, for the moments; Maurer (2003), theorem 2.1, for sums of nonnegative numbers.
    """
    if points < 2:
        return Distortion(1.0, 1.0)
    t = math.log(points * (points - 1) / failure)
    high = distortion_of_gaussian_sketch(points, dim, failure).high
    return Distortion(math.sqrt(max(0.0, 1 - math.sqrt(6 * t / dim))), high)


def distortion_of_variance(points: int, dim: int, failure: float = 0.05) -> Distortion:
    """The same of any unbiased map for which |S x|^2 has a variance of at most 2 |x|^4 / dim, a dense Gaussian's.

    By Chebyshev's inequality for each pair: epsilon^2 = points (points - 1) / (dim failure). With dim 4096 epsilon is
    below 1 for 14 points or fewer; beyond, the lower factor is 0. Nothing better follows from variances alone: of a
    count sketch, distances between gradients of two entries are lost with probability 1 / (2 dim).
    """
    return distortion_of_epsilon(math.sqrt(points * (points - 1) / (dim * failure)))


def measured_distortion(exact: Tensor, sketched: Tensor) -> Distortion:
    """The extreme factors by which a sketch changed the distances, from the Gram matrices of the same n points.

    `sketched` is <S t_i, S t_j> with its own diagonal, not the exact one. Of a subsample of the points the factors are
    those of its pairs; of the whole set, those of all. Pairs of equal points, at distance 0 up to rounding, are left
    out: no linear map moves them apart.
    Raises: GradscaleError as `width_of_gram`, or if the sizes differ or no pair of points differs.
    """
    before, after = _sq_distances(_checked(exact)), _sq_distances(_checked(sketched))
    if before.shape != after.shape:
        raise GradscaleError(
            f"Gram matrices must be of the same points, got {len(before)} and {len(after)}; choose the same ids"
        )
    apart = before > 1e-12 * float(before.max())
    if not apart.any():
        raise GradscaleError(f"a distortion needs two different points, got {len(before)} equal ones; choose others")
    factors = (after[apart].clamp(min=0) / before[apart]).sqrt()
    return Distortion(float(factors.min()), float(factors.max()))


def sudakov_fernique(width_of_sketch: float, distortion: Distortion) -> tuple[float, float]:
    """The interval of widths of a set whose sketch has this width: [w / high, w / low], infinite if low is 0.

    Conditional on the sketch: exact if the distortion holds for all pairs of the set. A width that was itself
    estimated widens both ends by its relative error.
    Source: Fernique (1975); Sudakov (1971): factors within [a, b] give a w <= w(sketch) <= b w. Vershynin (2018),
    theorem 7.2.8.
    """
    low, high = distortion
    return width_of_sketch / high, width_of_sketch / low if low > 0 else math.inf


def _checked(gram: Tensor) -> Tensor:
    """[n, n] float64, symmetric to the bit."""
    wide = torch.as_tensor(gram).detach().cpu().double()
    if wide.dim() != 2 or wide.shape[0] != wide.shape[1] or not len(wide):
        raise GradscaleError(f"gram must be a square matrix of at least one point, got shape {tuple(wide.shape)}")
    if not wide.isfinite().all():
        raise GradscaleError("gram must be finite, got entries that are not; leave out examples that are not finite")
    lowest = float(wide.diagonal().min())
    if lowest < 0:
        raise GradscaleError(
            f"gram must have squared norms on its diagonal, got {lowest:.6g}; pass inner products of vectors"
        )
    scale = float(wide.abs().max())
    if float((wide - wide.mT).abs().max()) > _ASYMMETRY * scale:
        raise GradscaleError(
            f"gram must be symmetric, got entries that differ by {float((wide - wide.mT).abs().max()):.6g}; pass "
            "inner products of one set with itself"
        )
    return (wide + wide.mT) / 2


def _recentred(gram: Tensor) -> Tensor:
    """The inner products of t_i - mean t."""
    rows = gram.mean(dim=1)
    return gram - rows[:, None] - rows + rows.mean()


def _root(gram: Tensor, rounding: float) -> tuple[Tensor, float]:
    """The symmetric square root of the positive part, and the share of the eigenvalues below -`rounding`."""
    values, vectors = torch.linalg.eigh(gram)
    negative = float((-values[values < -rounding]).sum())
    clipped = negative / float(values.abs().sum()) if negative else 0.0
    if clipped > _CLIPPED:
        raise GradscaleError(
            f"gram must be nearly positive semi-definite, got {clipped:.0%} of its spectrum below zero; pass inner "
            "products of vectors, or sketches of a larger dimension"
        )
    return vectors * values.clamp(min=0).sqrt() @ vectors.mT, clipped


def _draws(n: int, draws: int, seed: int) -> Iterator[Tensor]:
    """Blocks of rows of the [draws, n] standard normals: entry (m, i) is the same whatever n and `draws` are."""
    key = key_of("gram width", _VERSION, seed)
    rows = max(1, _BLOCK // n)
    for start in range(0, draws, rows):
        yield normals(key, start, min(start + rows, draws), n, torch.device("cpu")).double()


def _sq_distances(gram: Tensor) -> Tensor:
    sq_norms = gram.diagonal()
    return sq_norms[:, None] + sq_norms - 2 * gram


def _diameter(gram: Tensor) -> float:
    return math.sqrt(max(0.0, float(_sq_distances(gram).max())))
