"""Spectral densities and traces of functions of an operator, by stochastic Lanczos quadrature.

For a random v with E v v^T = I and uniform |v|, P sum_m tau_m f(theta_m) over the nodes theta and weights tau of the
Gauss quadrature of v's spectral measure estimates tr f(A). The recurrence holds three vectors a probe; without
reorthogonalization a node may come up several times, each with a part of the weight, and sums over them stay right.
Source: Golub and Meurant (2010), Matrices, Moments and Quadrature; Ubaru, Chen and Saad (2017), SIAM J. Matrix Anal.
Appl. 38; Ghorbani, Krishnan and Xiao (2019), arXiv 1901.10159.

Shapes: P entries in all, N probes, m nodes of each, r nodes of all, x points of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gradscale.curvature.trace import TraceEstimate, mean_of_samples
from gradscale.errors import GradscaleError

Array = np.ndarray


class Quadrature(NamedTuple):
    """Nodes of N probes, those of one after those of another. Merged by `merge_quadratures`."""

    size: int  # P
    probe: Array  # [r] int64
    value: Array  # [r] float64, theta
    weight: Array  # [r], tau: they sum to 1 over the nodes of a probe
    residual: Array  # [r]: an eigenvalue lies within that of theta


class Density(NamedTuple):
    """Of eigenvalues, by Gaussians of standard deviation `width`: its integral is 1."""

    grid: Array  # [x]
    value: Array  # [x], by the unit of eigenvalues
    stderr: Array  # [x]: over probes; NaN of one
    width: float


def merge_quadratures(parts: Sequence[Quadrature]) -> Quadrature:
    """All nodes, by the numbers of their probes.

    Raises: GradscaleError if there are none, or a probe is in two parts, or they are of different P.
    """
    if not parts or len({part.size for part in parts}) > 1:
        raise GradscaleError(
            f"quadratures to be merged must be of one operator, got sizes {[part.size for part in parts]}; merge those "
            "of one step"
        )
    numbers = [number for part in parts for number in np.unique(part.probe).tolist()]
    if len(set(numbers)) < len(numbers):
        twice = sorted({number for number in numbers if numbers.count(number) > 1})
        raise GradscaleError(f"probes of quadratures must differ, got {twice} twice; merge each part once")
    probe = np.concatenate([part.probe for part in parts])
    order = np.argsort(probe, kind="stable")
    columns = ([getattr(part, name) for part in parts] for name in ("value", "weight", "residual"))
    return Quadrature(parts[0].size, probe[order], *(np.concatenate(column)[order] for column in columns))


def spectrum_table(quadrature: Quadrature, step: int, operator: str) -> dict[str, Array]:
    """The columns of spectra.parquet: step, operator, probe, value, weight, residual, a row for each node."""
    rows = len(quadrature.probe)
    return {
        "step": np.full(rows, step, dtype=np.int64),
        "operator": np.array([operator] * rows),
        "probe": quadrature.probe,
        "value": quadrature.value,
        "weight": quadrature.weight,
        "residual": quadrature.residual,
    }


def quadrature_of_table(table: Mapping[str, Array], size: int) -> Quadrature:
    """What `spectrum_table` has written of one step and operator of `size` P."""
    return Quadrature(size, table["probe"], table["value"], table["weight"], table["residual"])


def trace_of_function(quadrature: Quadrature, f: Callable[[Array], Array]) -> TraceEstimate:
    """tr f(A), from f of an array of eigenvalues; the standard error is over probes.

    `conditional`: the quadrature must resolve f, as it does polynomials of degree 2 m - 1, exactly, and smooth
    functions on the spectrum with an error that falls geometrically in m. That error is not in the standard error:
    compare with other numbers of nodes.

    Raises: GradscaleError if f of a node of positive weight is not finite.
    """
    values = np.asarray(f(quadrature.value), dtype=np.float64)
    weighted = np.where(quadrature.weight > 0, quadrature.weight * values, 0.0)
    if not np.isfinite(weighted).all():
        node = quadrature.value[~np.isfinite(weighted)][0]
        raise GradscaleError(f"f must be finite on the spectrum, got {f(node)} of node {node:.6g}; shift the operator")
    return mean_of_samples(quadrature.size * _by_probe(quadrature, weighted), "conditional")


def moment(quadrature: Quadrature, order: int) -> TraceEstimate:
    """The mean of eigenvalues to the power `order`, tr A^order / P: unbiased up to order 2 m - 1.

    Raises: GradscaleError if there are too few nodes for that.
    """
    fewest = int(np.unique(quadrature.probe, return_counts=True)[1].min())
    exhausted = fewest * np.finfo(np.float64).eps * np.abs(quadrature.value).max(initial=0.0) * 100
    if order > 2 * fewest - 1 and quadrature.residual.max() > exhausted:
        raise GradscaleError(
            f"order of a moment must be at most {2 * fewest - 1} with {fewest} nodes a probe, got {order}; take more"
        )
    return mean_of_samples(_by_probe(quadrature, quadrature.weight * quadrature.value**order), "estimator")


def log_determinant(quadrature: Quadrature, shift: float = 0.0) -> TraceEstimate:
    """log det(A + shift I).

    Raises: GradscaleError if a node shows that A + shift I is not positive definite.
    """
    _check_above(quadrature, -shift, "a log-determinant")
    return trace_of_function(quadrature, lambda theta: np.log(theta + shift))


def effective_dimension(quadrature: Quadrature, shift: float) -> TraceEstimate:
    """tr A (A + shift I)^-1: of a positive semi-definite A, how many eigenvalues stand out of `shift`.

    Raises: GradscaleError if a node shows that A + shift I is not positive definite.
    """
    _check_above(quadrature, -shift, "an effective dimension")
    return trace_of_function(quadrature, lambda theta: theta / (theta + shift))


def outliers(quadrature: Quadrature, edge: float) -> TraceEstimate:
    """How many eigenvalues lie above `edge`: a step, which a quadrature resolves where there is a gap at the edge."""
    return trace_of_function(quadrature, lambda theta: (theta > edge).astype(np.float64))


def density(quadrature: Quadrature, grid: Array, width: float | None = None) -> Density:
    """The density of eigenvalues on `grid` [x], mean over probes, with its standard error.

    It is that of the eigenvalues convolved with a Gaussian of standard deviation `width`, by default a hundredth of
    the range of nodes; a node's own error is its residual, so a smaller width shows the quadrature's nodes. At an
    isolated eigenvalue a sample is chi-square of one degree of freedom: with a dozen probes two standard errors cover
    the truth there in five of six cases, in the bulk as often as they say.

    Raises: GradscaleError if the width is not positive.
    """
    if width is None:
        width = float(np.ptp(quadrature.value)) / 100 or 1e-2 * max(1.0, float(np.abs(quadrature.value).max()))
    if not 0 < width < math.inf:
        raise GradscaleError(f"width of a density must be positive, got {width}; a hundredth of the range is usual")
    points = np.asarray(grid, dtype=np.float64)
    probes, starts = np.unique(quadrature.probe, return_index=True)
    samples = np.empty((len(probes), len(points)))
    for row, (start, stop) in zip(samples, zip(starts, [*starts[1:], None], strict=True), strict=True):
        away = (points[:, None] - quadrature.value[start:stop]) / width
        row[:] = np.exp(-(away**2) / 2) @ quadrature.weight[start:stop] / (width * math.sqrt(2 * math.pi))
    errors = np.full(len(points), math.nan)
    if len(probes) > 1:
        errors = samples.std(axis=0, ddof=1) / math.sqrt(len(probes))
    return Density(points, samples.mean(axis=0), errors, width)


def _by_probe(quadrature: Quadrature, weighted: Array) -> Array:
    """[N]: sums over the nodes of each probe."""
    _, inverse = np.unique(quadrature.probe, return_inverse=True)
    return np.bincount(inverse, weights=weighted)


def _check_above(quadrature: Quadrature, least: float, what: str) -> None:
    lowest = float(quadrature.value.min())
    if lowest <= least:
        raise GradscaleError(
            f"operator must have eigenvalues above {least:.6g} for {what}, got a node at {lowest:.6g}; raise shift"
        )
