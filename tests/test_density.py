"""Promise: stochastic Lanczos quadrature is the Gauss quadrature of its probes, and sums over it have honest errors.

Shapes: P entries, N probes, m nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from krylov_problems import GOLDEN, Drawn, Spoilt, dense, rotated
from test_measure_laws import assert_honest
from torch import Tensor

from gradscale.curvature.density import (
    Quadrature,
    density,
    effective_dimension,
    log_determinant,
    merge_quadratures,
    moment,
    outliers,
    quadrature_of_table,
    spectrum_table,
    trace_of_function,
)
from gradscale.curvature.operator import DenseOperator
from gradscale.curvature.probes import FlatProbes
from gradscale.curvature.quadrature import check_second_moment, quadratures
from gradscale.errors import GradscaleError

SEEDS = 240
POSITIVE = [20.0, 9.0, *np.linspace(0.1, 2, 58).tolist()]
MIXED = np.linspace(-2, 5, 60).tolist()


def powers(matrix: Tensor, vector: Tensor, order: int) -> float:
    """v^T A^order v / |v|^2"""
    image = vector
    for _ in range(order):
        image = matrix @ image
    return float(vector @ image / (vector @ vector))


@pytest.mark.parametrize("reorthogonalize", [False, True])
@pytest.mark.parametrize("together", [1, 4])
def test_a_quadrature_is_exact_for_polynomials(reorthogonalize: bool, together: int) -> None:
    """Of degree 2 m - 1, of every probe: the definition of Gauss quadrature."""
    operator = dense(MIXED)
    probes, m = FlatProbes(operator.here, 1, dtype=torch.float64), 6
    found = quadratures(operator, probes, range(3, 8), m, together, reorthogonalize)
    assert found.probe.tolist() == [probe for probe in range(3, 8) for _ in range(m)]
    for probe in range(3, 8):
        nodes, weights = found.value[found.probe == probe], found.weight[found.probe == probe]
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        vector = probes(range(probe, probe + 1))[0]
        for order in range(2 * m):
            expected = powers(operator.matrix, vector, order)
            assert (weights * nodes**order).sum() == pytest.approx(expected, rel=1e-10, abs=1e-10)
        beyond = powers(operator.matrix, vector, 2 * m)
        assert (weights * nodes ** (2 * m)).sum() != pytest.approx(beyond, rel=1e-6)


def test_residuals_bound_the_way_to_an_eigenvalue() -> None:
    operator = dense(MIXED)
    found = quadratures(operator, FlatProbes(operator.here, dtype=torch.float64), range(3), 40, reorthogonalize=True)
    away = np.abs(found.value[:, None] - np.array(MIXED)).min(axis=1)
    assert (away <= found.residual + 1e-12).all()
    assert found.residual.min() < 1e-4 < 1e-2 < found.residual.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ghosts_split_weights_and_leave_moments_as_they_are(dtype: torch.dtype) -> None:
    """30 steps on the golden spectrum, where the plain recurrence has copies of 30."""
    operator = dense(GOLDEN)
    probes = FlatProbes(operator.here, 2, dtype=dtype)
    plain, full = (quadratures(operator, probes, range(4), 30, 4, again) for again in (False, True))
    copies = [((q.probe == 0) & (np.abs(q.value - 30) < 1e-3)).sum() for q in (plain, full)]
    assert copies[0] > 1
    assert copies[1] == 1
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for order in range(6):
        a, b = moment(plain, order), moment(full, order)
        assert a.value == pytest.approx(b.value, rel=tolerance)
    for f in (np.exp, np.cos, lambda theta: 1 / (1 + theta)):
        a, b = trace_of_function(plain, f), trace_of_function(full, f)
        assert a.value == pytest.approx(b.value, rel=1e3 * tolerance)


@pytest.mark.parametrize("reorthogonalize", [False, True])
def test_exhausted_probes_are_exact(reorthogonalize: bool) -> None:
    """Low rank: fewer nodes than steps, and only some of the probes, which go on without the others."""
    operator = DenseOperator(torch.diag(torch.tensor([9.0, 4.0, *[0.0] * 10, *range(1, 9)])).double())

    class Mixed:
        kind = "gaussian"

        def __call__(self, ids: range) -> Tensor:
            vectors = Drawn(20, 0)(ids)
            vectors[1, 12:] = 0  # in the span of the eigenvalues 9, 4, 0
            return vectors

    found = quadratures(operator, Mixed(), range(3), 15, 3, reorthogonalize)
    own = found.probe == 1
    np.testing.assert_allclose(found.value[own], [0, 4, 9], atol=1e-12)
    np.testing.assert_allclose(found.residual[own], 0, atol=1e-12)
    for probe, vector in enumerate(Mixed()(range(3))):
        for order in range(8):
            nodes, weights = found.value[found.probe == probe], found.weight[found.probe == probe]
            expected = powers(operator.matrix, vector, order)
            assert (weights * nodes**order).sum() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_multiples_of_the_identity_have_one_node(value: float) -> None:
    operator = DenseOperator(value * torch.eye(12, dtype=torch.float64))
    found = quadratures(operator, FlatProbes(operator.here), range(5), 8)
    np.testing.assert_allclose(found.value, [value] * 5, rtol=1e-6)
    assert found.weight.tolist() == pytest.approx([1.0] * 5)
    assert effective_dimension(found, 1.0).value == pytest.approx(12 * value / (value + 1), rel=1e-6)


# --- what is read from them -------------------------------------------------------------------------------------------


def test_errors_over_probes_are_honest() -> None:
    operator, values = dense(POSITIVE), np.array(POSITIVE)
    truths = {
        "moment": (values**2).mean(),
        "log_determinant": np.log(values + 0.5).sum(),
        "effective_dimension": (values / (values + 0.7)).sum(),
        "outliers": 2.0,
        "exp": np.exp(-values).sum(),
    }
    scores: dict[str, list[float]] = {name: [] for name in truths}
    for seed in range(SEEDS):
        found = quadratures(operator, Drawn(60, seed), range(16), 20, 16)
        estimates = {
            "moment": moment(found, 2),
            "log_determinant": log_determinant(found, 0.5),
            "effective_dimension": effective_dimension(found, 0.7),
            "outliers": outliers(found, 5.0),
            "exp": trace_of_function(found, lambda theta: np.exp(-theta)),
        }
        for name, estimate in estimates.items():
            assert estimate.n == 16
            assert estimate.status == ("estimator" if name == "moment" else "conditional")
            scores[name].append((estimate.value - truths[name]) / estimate.stderr)
    for parts in scores.values():
        assert_honest(parts, 15)


def test_bands_of_the_density_are_honest() -> None:
    """In the bulk, for the density smoothed by the same width. At an outlier samples are skewed, as is said there."""
    operator, width, grid = dense(POSITIVE), 0.5, np.array([0.0, 0.5, 1.5, 20.0])
    exact = smoothed(np.array(POSITIVE), grid, width)
    scores: list[list[float]] = [[] for _ in grid]
    for seed in range(SEEDS):
        found = density(quadratures(operator, Drawn(60, seed), range(12), 25, 12), grid, width)
        for parts, value, truth, error in zip(scores, found.value, exact, found.stderr, strict=True):
            parts.append((value - truth) / error)
    for parts in scores[:-1]:
        assert_honest(parts, 11)
    assert 0.75 < (np.abs(scores[-1]) < 2).mean() < 0.92


def smoothed(values: np.ndarray, grid: np.ndarray, width: float) -> np.ndarray:
    return np.exp(-(((grid[:, None] - values) / width) ** 2) / 2).mean(axis=1) / (width * math.sqrt(2 * math.pi))


def test_a_density_integrates_to_one_and_has_the_moments() -> None:
    operator = dense(POSITIVE)
    found = quadratures(operator, FlatProbes(operator.here, 1, dtype=torch.float64), range(20), 30)
    grid = np.linspace(-5, 26, 4001)
    curve = density(found, grid)
    assert curve.width == pytest.approx((found.value.max() - found.value.min()) / 100)
    step = grid[1] - grid[0]
    assert curve.value.sum() * step == pytest.approx(1, abs=1e-9)
    assert (curve.value * grid).sum() * step == pytest.approx(moment(found, 1).value, rel=1e-9)
    second = (curve.value * grid**2).sum() * step - curve.width**2
    assert second == pytest.approx(moment(found, 2).value, rel=1e-9)
    one = quadratures(operator, FlatProbes(operator.here, 1, dtype=torch.float64), range(1), 5)
    assert np.isnan(density(one, grid).stderr).all()
    assert math.isnan(moment(one, 1).stderr)


def test_merging_and_tables() -> None:
    operator = dense(MIXED)
    probes = FlatProbes(operator.here, 1, dtype=torch.float64)
    whole = quadratures(operator, probes, range(6), 8, 2)
    parts = [quadratures(operator, probes, ids, 8, 2) for ids in (range(4, 6), range(2), range(2, 4))]
    merged = merge_quadratures(parts)
    for a, b in zip(merged, whole, strict=True):
        np.testing.assert_array_equal(a, b)
    table = spectrum_table(whole, 100, "hessian")
    assert list(table) == ["step", "operator", "probe", "value", "weight", "residual"]
    assert {len(column) for column in table.values()} == {48}
    assert set(table["operator"]) == {"hessian"}
    again = quadrature_of_table(table, 60)
    assert log_determinant(again, 3.0) == log_determinant(whole, 3.0)


# --- bad input --------------------------------------------------------------------------------------------------------


def some(count: int = 2, steps: int = 4, first: int = 0) -> Quadrature:
    operator = dense(MIXED)
    return quadratures(operator, Drawn(60, 0), range(first, first + count), steps)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: some(0), "probes must be at least 1, got 0; 10 are usual"),
        (lambda: some(2, 0), "steps and together must be at least 1, got 0 and 8; 50 and 8 are usual"),
        (lambda: merge_quadratures([]), r"quadratures to be merged must be of one operator, got sizes \[\]; merge"),
        (lambda: merge_quadratures([some(2), some(2, 4, 1)]), r"probes of quadratures must differ, got \[1\] twice"),
        (
            lambda: merge_quadratures([some(1), some(1, 4, 1)._replace(size=7)]),
            r"must be of one operator, got sizes \[60, 7\]; merge those of one step",
        ),
        (lambda: moment(some(), 8), "order of a moment must be at most 7 with 4 nodes a probe, got 8; take more"),
        (lambda: log_determinant(some(), 1.0), "eigenvalues above -1 for a log-determinant, got a node at -.*; raise"),
        (
            lambda: effective_dimension(some(), 0.5),
            "eigenvalues above -0.5 for an effective dimension, got a node at -",
        ),
        (lambda: trace_of_function(some(), np.log), "f must be finite on the spectrum, got nan of node -.*; shift the"),
        (lambda: density(some(), np.zeros(3), 0.0), "width of a density must be positive, got 0.0; a hundredth"),
        (
            lambda: check_second_moment(3, torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5]), 2.6, 1e-3),
            r"quadrature of probe 3 must have sum tau theta\^2 = .* = 2.6, got 2.5; use float64 probes",
        ),
        (
            lambda: quadratures(dense(MIXED), lambda ids: torch.zeros(len(ids), 60), range(2), 4),
            r"probes must be finite vectors of positive length, got lengths \[0.0, 0.0\]",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_cannot_be_asked_for(ask: Callable[[], Any], message: str) -> None:
    with pytest.raises(GradscaleError, match=message):
        ask()


def test_a_product_that_is_not_finite() -> None:
    operator = Spoilt(dense(MIXED), 2, torch.nan)
    with pytest.raises(GradscaleError, match=r"product 2 of probe 5 must be finite, got squared length nan; look for"):
        quadratures(operator, Drawn(60, 0), range(5, 8), 6)


def test_an_operator_that_is_not_symmetric() -> None:
    class Skew(DenseOperator):
        def products(self, vectors: Tensor) -> Tensor:
            return vectors @ rotated(MIXED).triu()

    with pytest.raises(
        GradscaleError, match=r"operator must be symmetric, got <u, A v> = .* in the recurrence of probe"
    ):
        quadratures(Skew(rotated(MIXED)), Drawn(60, 0), range(3), 6)


def test_an_operator_that_changes_is_not_symmetric_either() -> None:
    """As with weights that move between products: the third is twice what it was."""
    operator = Spoilt(dense([*MIXED, 40.0]), 1, -2.0)
    with pytest.raises(GradscaleError, match="operator must be symmetric"):
        quadratures(operator, Drawn(61, 0), range(3), 6)
