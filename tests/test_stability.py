"""Promise: stability criteria are those of the literature, to the goldens, and SGD leaves and stays where they say.

Shapes: n examples, d parameters, B a batch.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gradscale.curvature.leading import leading_eigenpair
from gradscale.curvature.mean_square import (
    batch_factor,
    bound_along,
    bound_of_traces,
    rows_of_gram,
    threshold_of_gram,
    threshold_of_matrices,
)
from gradscale.curvature.non_uniformity import (
    ExampleHessians,
    HessianSpread,
    MeanHessian,
    along,
    dense_hessians,
    non_uniformity,
    rank_one_hessians,
)
from gradscale.curvature.operator import DenseOperator, dots, norms
from gradscale.curvature.stability import (
    Curvatures,
    Preconditioned,
    SecondMoment,
    descent_threshold,
    report_of_gram,
    report_of_matrices,
    stability_report,
)
from gradscale.errors import GradscaleError

Array = np.ndarray[Any, np.dtype[np.float64]]
TOY_Y = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
FIVE = torch.tensor(
    [(1.0, 0.0, 0.0), (0.0, 2.0, 0.0), (1.0, 1.0, 0.0), (0.0, 1.0, 1.0), (0.5, -1.0, 2.0)], dtype=torch.float64
)


def toy(kind: str) -> Tensor:
    """Rows x_i = (e_i, z_i) of math.md, section 12: H_i = x_i x_i^T."""
    z = TOY_Y if kind == "real" else torch.zeros(4, dtype=torch.float64)
    return torch.cat([torch.eye(5, dtype=torch.float64)[:4], z[:, None]], dim=1)


def outer(rows: Tensor) -> Tensor:
    return rows[:, :, None] * rows[:, None]


def random_matrices(seed: int, n: int, d: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(n, d, rank, dtype=torch.float64, generator=generator)
    return factors @ factors.mT


def dense_threshold(matrices: Tensor, batch_size: int) -> float:
    """2 / lambda_max(C^+ D) with the d^2 x d^2 matrices written out."""
    H, n, eye = matrices.mean(dim=0).numpy(), len(matrices), np.eye(matrices.shape[1])
    p = (n - batch_size) / (batch_size * (n - 1)) if n > 1 else 0.0
    C = (np.kron(H, eye) + np.kron(eye, H)) / 2
    D = (1 - p) * np.kron(H, H) + p * np.mean([np.kron(h, h) for h in matrices.numpy()], axis=0)
    return float(2 / np.linalg.eigvals(np.linalg.pinv(C, rcond=1e-10, hermitian=True) @ D).real.max())


def dense_spread(matrices: Tensor) -> Tensor:
    mean = matrices.mean(dim=0)
    return (matrices @ matrices).mean(dim=0) - mean @ mean


# --- goldens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "top", "trace", "frobenius", "s", "thresholds"),
    [
        ("real", 1.25, 2.0, 1.322876, 0.968246, (1.0, 1.470178, 1.6)),
        ("random", 0.25, 1.0, 0.5, 0.433013, (2.0, 4.0, 8.0)),
    ],
)
def test_the_toys(
    kind: str, top: float, trace: float, frobenius: float, s: float, thresholds: tuple[float, ...]
) -> None:
    rows = toy(kind)
    hessians = rank_one_hessians(rows)
    H = outer(rows).mean(dim=0)
    assert float(leading_eigenpair(MeanHessian(hessians)).values[0]) == pytest.approx(top, rel=1e-12)
    assert (float(H.trace()), float(H.norm())) == pytest.approx((trace, frobenius), abs=1e-6)
    assert non_uniformity(hessians).value == pytest.approx(s, abs=1e-6)
    assert non_uniformity(rank_one_hessians(rows_of_gram(rows @ rows.mT)[0])).value == pytest.approx(s, abs=1e-6)
    for B, exact in zip((1, 2, 4), thresholds, strict=True):
        assert threshold_of_matrices(outer(rows), B).value == pytest.approx(exact, abs=1e-6)
        assert threshold_of_gram(rows @ rows.mT, B).value == pytest.approx(exact, abs=1e-6)


def test_five_rows_and_that_the_condition_for_the_sufficient_one_is_not_necessary() -> None:
    exact, conditions = (0.434554, 0.795237, 1.260370, 1.348519), (0.461720, 0.753986, 1.348519, 1.348519)
    top = float(leading_eigenpair(MeanHessian(rank_one_hessians(FIVE))).values[0])
    s = non_uniformity(rank_one_hessians(FIVE))
    for B, threshold, condition in zip((1, 2, 4, 5), exact, conditions, strict=True):
        found = threshold_of_gram(FIVE @ FIVE.mT, B).value
        assert found == pytest.approx(threshold, abs=1e-6)
        p = batch_factor(5, B)
        both = min(2 / top, 1 / (s.value * math.sqrt(p)) if p else math.inf)
        assert both == pytest.approx(condition, abs=1e-6)
        inside, outside = (report_of_gram(FIVE @ FIVE.mT, factor * found, B) for factor in (0.999, 1.001))
        assert (inside.verdict, outside.verdict) == ("stable", "unstable")
    named = {each.name: each for each in report_of_gram(FIVE @ FIVE.mT, 0.79, 2).criteria}
    assert named["mean_square"].met
    assert not named["non_uniformity"].met


def test_two_examples() -> None:
    one = torch.tensor([[[0.0]], [[2.0]]], dtype=torch.float64)
    assert threshold_of_matrices(one, 1).value == pytest.approx(1.0, rel=1e-12)
    assert threshold_of_matrices(one, 2).value == pytest.approx(2.0, rel=1e-12)
    two = torch.diag_embed(torch.eye(2, dtype=torch.float64))
    assert threshold_of_matrices(two, 1).value == pytest.approx(2.0, rel=1e-12)


# --- against dense matrices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d", "rank"), [(2, 3, 1), (6, 4, 2), (5, 6, 1), (1, 3, 2)])
def test_thresholds_are_those_of_the_matrices_written_out(n: int, d: int, rank: int) -> None:
    for seed in range(5):
        matrices = random_matrices(seed, n, d, rank)
        for B in {1, max(1, n // 2), n}:
            found = threshold_of_matrices(matrices, B)
            assert found.value == pytest.approx(dense_threshold(matrices, B), rel=1e-9)
            assert found.error < 1e-9 * found.value
            if rank == 1:
                rows = torch.linalg.eigh(matrices)
                j = rows.eigenvectors[:, :, -1] * rows.eigenvalues[:, -1:].sqrt()
                assert threshold_of_gram(j @ j.mT, B).value == pytest.approx(found.value, rel=1e-9)
    assert threshold_of_matrices(torch.zeros(3, 2, 2, dtype=torch.float64), 1).value == math.inf


def test_bounds_are_bounds() -> None:
    """(15) along v_1 and along any other direction, and (16)."""
    for seed in range(30):
        matrices = random_matrices(seed, 5, 4, 1 + seed % 3)
        hessians, H = dense_hessians(matrices), matrices.mean(dim=0)
        top = torch.linalg.eigh(H).eigenvectors[:, -1]
        other = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for B in (1, 2, 4, 5):
            p, exact = batch_factor(5, B), threshold_of_matrices(matrices, B).value
            traces = float(H.trace()), float(H.square().sum()), float(matrices.square().sum()) / 5
            bounds = [bound_along(*along(hessians, v)[:2], p) for v in (top, other)] + [bound_of_traces(*traces, p)]
            assert min(bounds) >= exact * (1 - 1e-9)
            if B == 5:
                assert bounds[0] == pytest.approx(exact, rel=1e-9)


def test_bounds_by_hand() -> None:
    assert bound_along(2.0, 3.0, 0.5) == pytest.approx(4 / 5.5)
    assert bound_of_traces(3.0, 5.0, 9.0, 0.25) == pytest.approx(6 / (0.75 * 5 + 0.25 * 9))
    assert bound_along(0.0, 1.0, 1.0) == bound_of_traces(0.0, 0.0, 0.0, 0.5) == math.inf


@pytest.mark.parametrize("spread", [1.0, 1e-6])
def test_non_uniformity_is_that_of_the_dense_covariance(spread: float) -> None:
    """Of Hessians that are nearly equal, too, where (1/n) sum H_i^2 - H^2 would have lost all digits."""
    for seed in range(4):
        apart = random_matrices(seed, 7, 5, 2)
        matrices = 3 * torch.eye(5, dtype=torch.float64) + spread * apart
        exact = spread * math.sqrt(float(torch.linalg.eigvalsh(dense_spread(apart))[-1]))
        hessians = ExampleHessians(7, 5, dense_hessians(matrices).products, batch=3)
        found = non_uniformity(hessians)
        assert found.value == pytest.approx(exact, rel=1e-7)
        assert found.error < 1e-6 * found.value
        there = along(hessians, found.vector)
        assert math.sqrt(there.spread) == pytest.approx(found.value, rel=1e-7)
        top = along(hessians, leading_eigenpair(MeanHessian(hessians)).vectors[0])
        assert math.sqrt(top.spread) <= found.value * (1 + 1e-9)


def test_what_one_pass_finds_along_a_direction() -> None:
    matrices = random_matrices(3, 9, 4, 2)
    v = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    unit = v / v.norm()
    products = matrices @ unit
    curvatures = products @ unit
    found = along(ExampleHessians(9, 4, dense_hessians(matrices).products, batch=4), v)
    assert found.curvature == pytest.approx(float(curvatures.mean()), rel=1e-12)
    assert found.variance == pytest.approx(float(curvatures.var(correction=0)), rel=1e-12)
    assert found.spread == pytest.approx(float(unit @ dense_spread(matrices) @ unit), rel=1e-10)
    assert found.length == pytest.approx(float(products.mean(dim=0).norm()), rel=1e-12)


@pytest.mark.parametrize("kind", ["random", "clustered", "indefinite", "zero", "one"])
def test_the_leading_eigenpair(kind: str) -> None:
    spectra = {
        "random": torch.linspace(-3, 5, 40),
        "clustered": torch.cat([torch.full((3,), 7.0), torch.full((37,), 1.0)]),
        "indefinite": torch.cat([torch.tensor([-9.0, 2.0]), torch.zeros(38)]),
        "zero": torch.zeros(4),
        "one": torch.tensor([-2.0]),
    }
    values = spectra[kind].double()
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator)).Q
    A = Q @ torch.diag(values) @ Q.mT
    found = leading_eigenpair(DenseOperator((A + A.mT) / 2))
    (value,), (vector,), (residual,) = found.values, found.vectors, found.residuals
    assert float(value) == pytest.approx(float(values.max()), rel=1e-9, abs=1e-12)
    assert float((A @ vector - value * vector).norm()) <= float(residual) + 1e-12
    early = leading_eigenpair(DenseOperator((A + A.mT) / 2), max_steps=3)
    assert early.products <= 3
    assert float((values - early.values).abs().min()) <= float(early.residuals[0]) + 1e-12
    assert float(early.values[0]) <= float(values.max()) + 1e-12


def test_dots_are_those_of_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(k, 300_001, generator=generator) + 1 for k in (2, 3))
    operator = DenseOperator(torch.eye(1, dtype=torch.float64))
    exact = left.double() @ right.double().mT
    assert torch.allclose(dots(operator, left, right), exact, rtol=1e-13)
    assert torch.allclose(norms(operator, left), left.double().norm(dim=1), rtol=1e-13)
    kept = DenseOperator(torch.eye(3, dtype=torch.float64)).products(torch.ones(2, 3))
    assert kept.dtype == torch.float32


def test_operators_are_the_matrices_that_they_stand_for() -> None:
    matrices, eye = random_matrices(5, 6, 4, 2), torch.eye(4, dtype=torch.float64)
    H, Sigma = MeanHessian(dense_hessians(matrices)), HessianSpread(dense_hessians(matrices))
    mean, spread = matrices.mean(dim=0), dense_spread(matrices)
    assert torch.allclose(H.products(eye), mean)
    assert torch.allclose(Sigma.products(eye), spread)
    moment = SecondMoment(H, Sigma, 0.3, 0.4).products(eye)
    assert torch.allclose(moment, (eye - 0.3 * mean) @ (eye - 0.3 * mean) + 0.09 * 0.4 * spread)
    D = torch.tensor([1.0, 4.0, 0.25, 9.0], dtype=torch.float64)
    assert torch.allclose(Preconditioned(H, D).products(eye), mean / (D[:, None] * D).sqrt())


# --- what training does -----------------------------------------------------------------------------------------------


def growth(matrices: Tensor, eta: float, batch_size: int) -> float:
    """By what X -> E (I - eta H_B) X (I - eta H_B) grows on the range of H: batches one by one, no formula."""
    H = matrices.mean(dim=0)
    values, vectors = torch.linalg.eigh(H)
    V = vectors[:, values > 1e-10]
    within = V.mT @ matrices @ V
    eye = torch.eye(V.shape[1], dtype=torch.float64)
    batches = list(itertools.combinations(range(len(matrices)), batch_size))
    steps = torch.stack([eye - eta * within[list(batch)].mean(dim=0) for batch in batches])
    moved = sum(torch.kron(step, step) for step in steps) / len(steps)
    return float(torch.linalg.eigvals(moved).abs().max())


@pytest.mark.parametrize("B", [1, 2, 4])
def test_sgd_grows_above_the_threshold_and_shrinks_below(B: int) -> None:
    """Interpolating least squares with more parameters than examples, and with fewer."""
    for seed, (n, d) in itertools.product(range(3), ((5, 8), (7, 3))):
        rows = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        exact = threshold_of_gram(rows @ rows.mT, B).value
        assert growth(outer(rows), 0.999 * exact, B) < 1 < growth(outer(rows), 1.001 * exact, B)


def test_sgd_run_many_times() -> None:
    """The mean of |w|^2 over runs with batches of 2, started at random, falls and rises as the threshold says."""
    rows = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact, runs, steps = threshold_of_gram(rows @ rows.mT, 2).value, 20_000, 30
    generator, sizes = torch.Generator().manual_seed(2), {}
    for factor in (0.7, 1.4):
        w = torch.randn(runs, 4, dtype=torch.float64, generator=generator)
        start = w.square().sum(dim=1)
        for _ in range(steps):
            batch = rows[torch.rand(runs, 6, generator=generator).argsort(dim=1)[:, :2]]  # [runs, 2, d]
            w = w - factor * exact * torch.einsum("rbd,rb->rd", batch, torch.einsum("rbd,rd->rb", batch, w)) / 2
        sizes[factor] = w.square().sum(dim=1).mean() / start.mean()
    assert sizes[0.7] < 0.9
    assert sizes[1.4] > 10


def test_wus_inequality_is_sufficient() -> None:
    """Where lambda_max of the second moment is at most 1, SGD does not grow; and it bounds the growth of a step."""
    for seed in range(20):
        matrices = random_matrices(seed, 5, 3, 2)
        for factor in (0.3, 0.8, 1.2):
            eta = factor * threshold_of_matrices(matrices, 2).value
            named = {each.name: each for each in report_of_matrices(matrices, eta, 2).criteria}
            assert growth(matrices, eta, 2) <= named["second_moment"].value + 1e-9
            if named["second_moment"].met:
                assert named["mean_square"].met


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_momentum(beta: float, averaged: bool) -> None:
    """The spectral radius of (w, m) -> (w - eta m', m'), m' = beta m + (1 - beta or 1) h w, at the threshold."""
    eta = 0.07
    limit = descent_threshold(eta, beta, averaged)
    for factor, stays in ((0.999, True), (1.001, False)):
        pull = factor * limit * ((1 - beta) if averaged else 1)
        step = np.array([[1 - eta * pull, -eta * beta], [pull, beta]])
        assert (np.abs(np.linalg.eigvals(step)).max() <= 1 + 1e-12) == stays
    assert descent_threshold(0.1, 0.9, averaged=True) == pytest.approx(380)  # 38 / eta


def test_adam_with_its_preconditioner_held_grows_above_the_threshold() -> None:
    matrix = random_matrices(0, 1, 4, 4)[0]
    D = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
    top = float(leading_eigenpair(Preconditioned(DenseOperator(matrix), D)).values[0])
    for factor, stays in ((0.98, True), (1.02, False)):
        eta = factor * descent_threshold(1.0, 0.9, averaged=True) / top
        w, m = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        for _ in range(6000):
            m = 0.9 * m + 0.1 * matrix @ w
            w = w - eta * m / D
            if w.norm() > 1e6:
                break
        assert bool(w.norm() < 10) == stays
        known = Curvatures(8, preconditioned_sharpness=top)
        (found,) = stability_report(known, eta, 2, momentum=0.9).criteria
        assert (found.met, found.role, found.status) == (stays, "neither", "conditional")


# --- the report -------------------------------------------------------------------------------------------------------


def test_a_report_of_all_and_of_little() -> None:
    found = report_of_matrices(outer(FIVE), 0.5, 1)
    assert (found.eta, found.batch_size, found.verdict) == (0.5, 1, "unstable")
    roles = {each.name: (each.role, each.status) for each in found.criteria}
    assert roles == {
        "sharpness": ("necessary", "identity"),
        "mean_square": ("exact", "identity"),
        "bound_along": ("necessary", "upper bound"),
        "bound_of_traces": ("necessary", "upper bound"),
        "second_moment": ("sufficient", "conditional"),
        "non_uniformity": ("neither", "conditional"),
    }
    named = {each.name: each for each in found.criteria}
    assert (named["sharpness"].met, named["mean_square"].met) == (True, False)
    assert named["sharpness"].threshold == 4.0
    assert stability_report(Curvatures(5, sharpness=3.0), 0.5, 1).verdict == "undecided"
    assert stability_report(Curvatures(5, sharpness=3.0), 0.5, 5).verdict == "stable"
    assert stability_report(Curvatures(5, sharpness=5.0), 0.5, 1).verdict == "unstable"
    with_momentum = stability_report(Curvatures(5, sharpness=5.0, non_uniformity=1.0), 0.5, 5, momentum=0.9)
    assert [each.name for each in with_momentum.criteria] == ["sharpness_momentum"]
    assert with_momentum.verdict == "stable"


def test_at_the_threshold_a_criterion_is_met() -> None:
    report = report_of_gram(FIVE @ FIVE.mT, threshold_of_gram(FIVE @ FIVE.mT, 5).value, 5)
    assert all(each.met for each in report.criteria if each.role in ("exact", "necessary"))


def test_what_is_refused() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    with pytest.raises(GradscaleError, match="eta must be a positive number, got 0"):
        descent_threshold(0.0)
    with pytest.raises(GradscaleError, match="momentum must be at least 0 and less than 1, got 1"):
        descent_threshold(0.1, 1.0)
    with pytest.raises(GradscaleError, match="batch_size must be from 1 to the number of examples 4, got 5"):
        batch_factor(4, 5)
    with pytest.raises(GradscaleError, match="matrices must be square and symmetric, got shape"):
        threshold_of_matrices(torch.tensor([[[1.0, 2.0], [0.0, 1.0]]], dtype=torch.float64), 1)
    with pytest.raises(GradscaleError, match=r"Hessians must have no negative eigenvalue.*got -1"):
        threshold_of_matrices(torch.stack([eye, -eye]), 1)
    with pytest.raises(GradscaleError, match="matrices must be at least one, got none"):
        threshold_of_matrices(torch.zeros(0, 2, 2, dtype=torch.float64), 1)
    with pytest.raises(GradscaleError, match="matrix must be square and float64, got"):
        DenseOperator(torch.ones(2, 3))
    with pytest.raises(GradscaleError, match="diagonal must be 2 positive numbers, got 2 from 0"):
        Preconditioned(DenseOperator(eye), torch.tensor([0.0, 1.0]))
    with pytest.raises(GradscaleError, match="max_steps must be at least 1, got 0"):
        leading_eigenpair(DenseOperator(eye), max_steps=0)
    with pytest.raises(GradscaleError, match="product 0 of the operator must be finite, got a vector"):
        leading_eigenpair(MeanHessian(dense_hessians(eye[None] * math.nan)))
    with pytest.raises(GradscaleError, match="examples and batch must be at least 1, got 0"):
        rank_one_hessians(torch.zeros(0, 3))
    with pytest.raises(GradscaleError, match="vector must be finite and not zero, got length 0"):
        along(dense_hessians(eye[None]), torch.zeros(2))
