"""Promise: spectra of the gradients' covariance from sketches are those of the dense gradients, within stated errors.

Shapes: n examples, P entries of a gradient, K sketch.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_problems import Regression
from test_measure_laws import assert_honest
from test_stored_sketches import SCHEME, write_run
from torch import Tensor

import gradscale as gs
from gradscale.errors import GradscaleError
from gradscale.measures.covariance_moments import (
    add_points,
    entropy_rank,
    frobenius_sq,
    invariants_of_gram,
    invariants_of_moments,
    no_points,
    scatter,
    subtract,
    trace_sq,
    without_sketch_noise,
)
from gradscale.run import covariance_spectrum as module
from gradscale.sketches import parse_sketch
from gradscale.store.results import Run

IDENTITY = {"name": "identity", "version": 1, "seed": 0, "dim": 0}


def points_of(n: int, dim: int, seed: int = 0) -> Tensor:
    """[n, dim] float64 that float32 holds exactly; their mean is not zero and their variances differ."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(0.5, 3.0, dim)
    return (scales * (0.7 + torch.randn(n, dim, generator=generator))).double()


def stored(folder: Path, points: Tensor, scheme: dict[str, Any], sq_norms: Tensor | None = None, **more: Any) -> Run:
    norms = points.square().sum(dim=1) if sq_norms is None else sq_norms
    named = {**scheme, "dim": points.shape[1]}
    return write_run(folder, {0: points.numpy().astype(np.float32)}, scheme=named, sq_norms=norms.numpy(), **more)


def gaussian(dim: int, K: int, generator: torch.Generator) -> Tensor:
    """[P, K]"""
    return torch.randn(dim, K, dtype=torch.float64, generator=generator) / math.sqrt(K)


# --- U-statistics -----------------------------------------------------------------------------------------------------


def over_quadruples(x: Tensor) -> tuple[float, float]:
    """|Sigma|_F^2 and (tr Sigma)^2 by their definitions: means over all quadruples of different points."""
    squares, traces = [], []
    for a, b, c, d in itertools.permutations(x, 4):
        u, v = a - b, c - d
        squares.append(float(u @ v) ** 2 / 4)
        traces.append(float(u @ u) * float(v @ v) / 4)
    return float(np.mean(squares)), float(np.mean(traces))


@pytest.mark.parametrize("n", [4, 5, 8])
def test_u_statistics_are_means_over_quadruples(n: int) -> None:
    x = points_of(n, 3, n)
    square, trace = over_quadruples(x)
    found = invariants_of_gram(x @ x.mT)
    assert frobenius_sq(found) == pytest.approx(square, rel=1e-10)
    assert trace_sq(found) == pytest.approx(trace, rel=1e-10)


def test_fewer_than_four_points_have_none() -> None:
    found = invariants_of_gram(torch.eye(3, dtype=torch.float64))
    assert math.isnan(frobenius_sq(found))
    assert math.isnan(trace_sq(found))


def test_moments_of_a_part_are_subtracted_about_any_point() -> None:
    x, origin = points_of(30, 5), torch.full((5,), 2.5, dtype=torch.float64)
    whole, part = no_points(5), no_points(5)
    for rows in (x[:13], x[13:]):
        add_points(whole, rows - origin)
    add_points(part, x[7:19] - origin)
    rest = torch.cat([x[:7], x[19:]])
    left = subtract(whole, part)
    assert invariants_of_moments(left) == pytest.approx(invariants_of_gram(rest @ rest.mT), rel=1e-10)
    torch.testing.assert_close(scatter(left), torch.cov(rest.mT) * (len(rest) - 1))


def test_entropy_ranks_by_hand() -> None:
    assert entropy_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert entropy_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1)
    assert math.isnan(entropy_rank(torch.zeros(3)))


def test_frobenius_is_unbiased_over_gaussian_sketches_of_the_same_points() -> None:
    """And without the correction it is not: the sketch adds (tr Sigma)^2 / K."""
    K, generator = 12, torch.Generator().manual_seed(0)
    x = points_of(20, 30)
    exact = frobenius_sq(invariants_of_gram(x @ x.mT))
    corrected, plain = [], []
    for _ in range(2000):
        z = x @ gaussian(30, K, generator)
        found = invariants_of_gram(z @ z.mT)
        plain.append(frobenius_sq(found))
        corrected.append(without_sketch_noise(plain[-1], trace_sq(found), K))
    error = float(np.std(corrected) / math.sqrt(len(corrected)))
    assert error < 0.02 * exact
    assert abs(np.mean(corrected) - exact) < 4 * error
    assert np.mean(plain) > exact + 20 * error


def test_sign_sketches_are_low_by_no_more_than_is_said() -> None:
    K, generator = 12, torch.Generator().manual_seed(0)
    x = points_of(20, 30)
    exact = frobenius_sq(invariants_of_gram(x @ x.mT))
    values = []
    for _ in range(2000):
        signs = torch.randint(0, 2, (30, K), generator=generator).double() * 2 - 1
        z = x @ signs / math.sqrt(K)
        found = invariants_of_gram(z @ z.mT)
        values.append(without_sketch_noise(frobenius_sq(found), trace_sq(found), K))
    error = float(np.std(values) / math.sqrt(len(values)))
    assert exact * (1 - 2 / K) - 4 * error < np.mean(values) < exact + 4 * error


@pytest.mark.parametrize("name", ["gaussian", "rademacher", "sjlt", "srht", "count"])
def test_the_truth_lies_between_corrected_and_uncorrected(name: str) -> None:
    """On the average over seeds of the package's own maps; with the Gaussian one the corrected value is unbiased."""
    K, x = 32, points_of(16, 96)
    exact = frobenius_sq(invariants_of_gram(x @ x.mT))
    values = []
    for seed in range(200):
        bound = parse_sketch(f"{name}:{K}", seed).bind({"a": 64, "b": 32})
        matrix = torch.cat([bound.materialize("a", (64, 1)), bound.materialize("b", (8, 4))]).double()
        z = x @ matrix
        found = invariants_of_gram(z @ z.mT)
        plain = frobenius_sq(found)
        values.append((without_sketch_noise(plain, trace_sq(found), K), plain))
    means, errors = np.mean(values, axis=0), np.std(values, axis=0) / math.sqrt(len(values))
    assert means[0] < exact + 4 * errors[0]
    assert means[1] > exact - 4 * errors[1]
    assert errors[0] < 0.05 * exact
    if name == "gaussian":
        assert means[0] > exact - 4 * errors[0]


# --- from runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [25, 150], ids=["by the Gram matrix", "by moments"])
def test_the_identity_gives_the_dense_eigenvalues(n: int, tmp_path: Path) -> None:
    x = points_of(n, 40)
    found = gs.covariance_spectrum(stored(tmp_path, x, IDENTITY, shard=37), 0, ids=range(n), blocks=5)
    covariance = torch.cov(x.mT)
    exact = torch.linalg.eigvalsh(covariance).flip(0)[: n - 1]
    assert len(found.eigenvalues) == min(n - 1, 40)
    np.testing.assert_allclose(found.eigenvalues, exact.numpy(), rtol=1e-10, atol=1e-10)
    trace, square = float(covariance.trace()), frobenius_sq(invariants_of_gram(x @ x.mT))
    shares = exact / exact.sum()
    expected = {
        "trace_covariance": trace,
        "trace_sketched": trace,
        "frobenius_sq": square,
        "frobenius_sq_uncorrected": square,
        "participation_ratio": trace**2 / square,
        "entropy_rank": math.exp(-float((shares * shares.log()).nan_to_num(0.0).sum())),
        "stable_rank": trace / float(exact[0]),
        "lambda_max": float(exact[0]),
    }
    assert {name: estimate.value for name, estimate in found.estimates.items()} == pytest.approx(expected, rel=1e-10)
    assert found.resolution == 0
    assert {estimate.n for estimate in found.estimates.values()} == {n}


@pytest.mark.parametrize("n", [25, 150], ids=["by the Gram matrix", "by moments"])
def test_errors_are_those_of_leaving_out_blocks_by_hand(n: int, tmp_path: Path) -> None:
    x = points_of(n, 40)
    found = gs.covariance_spectrum(stored(tmp_path, x, IDENTITY), 0, ids=range(n), blocks=5)
    largest, squares, ranks = [], [], []
    for j in range(5):
        rest = torch.cat([x[: j * n // 5], x[(j + 1) * n // 5 :]])
        values = torch.linalg.eigvalsh(torch.cov(rest.mT))
        largest.append(float(values[-1]))
        squares.append(frobenius_sq(invariants_of_gram(rest @ rest.mT)))
        ranks.append(float(values.sum() ** 2 / squares[-1]))
    for name, values in {"lambda_max": largest, "frobenius_sq": squares, "participation_ratio": ranks}.items():
        assert found.estimates[name].stderr == pytest.approx(2 * np.std(values), rel=1e-8)
    assert found.stderr[0] == pytest.approx(2 * np.std(largest), rel=1e-8)
    assert np.isnan(found.stderr).sum() == max(0, (n - 1 if n < 40 else 40) - min(40, n - n // 5 - 1))


def test_both_ways_agree_on_sketches_beside_exact_norms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are as many examples as dimensions, either may be taken."""
    x = points_of(20, 60)
    z = (x @ gaussian(60, 20, torch.Generator().manual_seed(3))).float().double()
    run = stored(tmp_path, z, SCHEME, x.square().sum(dim=1))
    one = gs.covariance_spectrum(run, 0, ids=range(20), blocks=4)
    monkeypatch.setattr(module, "by_gram", module.by_moments)
    other = gs.covariance_spectrum(run, 0, ids=range(20), blocks=4)
    np.testing.assert_allclose(one.eigenvalues, other.eigenvalues, rtol=1e-9, atol=1e-9)
    for name, estimate in one.estimates.items():
        assert other.estimates[name][:2] == pytest.approx(estimate[:2], rel=1e-7), name


def test_sketches_are_as_long_as_their_gradients(tmp_path: Path) -> None:
    """So that gradients along one direction have their eigenvalue exactly, whatever the sketch does to it."""
    lengths = torch.randn(30, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    z = (lengths * torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 2).float().double()
    run = stored(tmp_path, z, SCHEME, lengths[:, 0].square())
    found = gs.covariance_spectrum(run, 0, ids=range(30))
    assert found.eigenvalues[0] == pytest.approx(float(lengths.var()), rel=1e-5)
    assert found.eigenvalues[1:].max() < 1e-6
    assert found.estimates["stable_rank"].value == pytest.approx(1, rel=1e-5)


def test_a_zero_gradient_stays_one(tmp_path: Path) -> None:
    x = points_of(12, 5)
    x[3] = 0
    found = gs.covariance_spectrum(stored(tmp_path, x, IDENTITY), 0, ids=range(12))
    np.testing.assert_allclose(found.eigenvalues, torch.linalg.eigvalsh(torch.cov(x.mT)).flip(0).numpy(), rtol=1e-10)


def test_gradients_that_are_all_equal_have_no_spectrum(tmp_path: Path) -> None:
    found = gs.covariance_spectrum(stored(tmp_path, points_of(1, 5).expand(6, 5), IDENTITY), 0, ids=range(6), blocks=2)
    assert found.estimates["lambda_max"].value == pytest.approx(0, abs=1e-12)
    assert found.estimates["frobenius_sq"].value == pytest.approx(0, abs=1e-12)


RUNS, VARIANCES = 220, torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
TRUTHS = {
    "frobenius_sq": float(VARIANCES.square().sum()),
    "participation_ratio": float(VARIANCES.sum() ** 2 / VARIANCES.square().sum()),
    "stable_rank": float(VARIANCES.sum() / 4),
    "lambda_max": 4.0,
    "trace_sketched": float(VARIANCES.sum()),
    "entropy_rank": entropy_rank(VARIANCES),
}


@pytest.fixture(scope="module")
def found_by_seed(tmp_path_factory: pytest.TempPathFactory) -> list[module.CovarianceSpectrum]:
    """Of one run whose every 600 examples are another sample of normal points."""
    x = torch.randn(RUNS * 600, 4, generator=torch.Generator().manual_seed(0)) * VARIANCES.sqrt() + 1
    run = stored(tmp_path_factory.mktemp("samples") / "run", x.float().double(), IDENTITY, shard=6000)
    return [gs.covariance_spectrum(run, 0, ids=range(600 * k, 600 * (k + 1)), blocks=10) for k in range(RUNS)]


@pytest.mark.parametrize("name", TRUTHS)
def test_errors_over_examples_are_honest(name: str, found_by_seed: list[module.CovarianceSpectrum]) -> None:
    scores = []
    for found in found_by_seed:
        estimate = found.estimates[name]
        assert estimate.stderr is not None
        scores.append((estimate.value - TRUTHS[name]) / estimate.stderr)
    assert_honest(scores, 9)


# --- with an exact trace ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("local_ray")
def test_the_trace_is_the_runs_own(tmp_path: Path) -> None:
    run = gs.measure(
        Regression(), str(tmp_path / "run"), measures=[gs.Dispersion()], workers=1, shard_size=8, sketch="identity"
    )
    found = gs.covariance_spectrum(run, 0)
    frame = run.estimates()
    (row,) = frame[(frame["name"] == "trace_covariance") & (frame["scope"] == "all")].to_dict("records")
    assert found.estimates["trace_covariance"][:2] == (row["value"], row["stderr"])
    assert found.estimates["trace_covariance"].definition == "dispersion/trace_covariance/v1"
    assert found.estimates["trace_sketched"].value == pytest.approx(row["value"], rel=1e-6)  # float32 sketches
    by_ids = gs.covariance_spectrum(run, 0, ids=range(24))
    np.testing.assert_array_equal(by_ids.eigenvalues, found.eigenvalues)
    assert by_ids.estimates["trace_covariance"].definition == "covariance_spectrum/trace_covariance/sketched/v1"


def test_the_table_has_the_columns_of_spectra(tmp_path: Path) -> None:
    found = gs.covariance_spectrum(stored(tmp_path, points_of(12, 5), IDENTITY), 0, ids=range(12))
    frame = found.to_frame()
    assert list(frame) == ["step", "operator", "index", "value", "stderr", "weight", "residual"]
    assert frame["value"].tolist() == found.eigenvalues.tolist()
    assert frame["index"].tolist() == [0, 1, 2, 3, 4]
    assert set(frame["operator"]) == {"gradient_covariance"}


@pytest.mark.parametrize(
    ("name", "status", "known"),
    [
        ("gaussian", "estimator", True),
        ("rademacher", "estimator", True),
        ("count", "conditional", True),
        ("sjlt", "conditional", True),
        ("srht", "conditional", True),
        ("kronecker", "estimator", False),
        ("identity", "estimator", True),
    ],
)
def test_what_is_claimed_depends_on_the_scheme(name: str, status: str, known: bool, tmp_path: Path) -> None:
    run = stored(tmp_path, points_of(12, 8), {**SCHEME, "name": name})
    found = gs.covariance_spectrum(run, 0, ids=range(12)).estimates
    assert found["frobenius_sq"].status == status
    assert math.isfinite(found["frobenius_sq"].value) == known
    assert (found["frobenius_sq"].value == found["frobenius_sq_uncorrected"].value) == (name == "identity")
    assert found["entropy_rank"].status == "heuristic"
    assert gs.covariance_spectrum(run, 0, ids=range(12)).resolution == pytest.approx(
        0 if name == "identity" else found["trace_covariance"].value / 8
    )


def test_what_cannot_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stored(tmp_path, points_of(12, 5), IDENTITY, nonfinite=(2,))
    with pytest.raises(GradscaleError, match=r"ids must name at least 4 finite examples at step 0 .* got 3; name more"):
        gs.covariance_spectrum(run, 0, ids=[0, 1, 4])
    with pytest.raises(GradscaleError, match=r"example 2 must have a finite loss"):
        gs.covariance_spectrum(run, 0, ids=range(12))
    with pytest.raises(GradscaleError, match="blocks must be a whole number of at least 1, got 0"):
        gs.covariance_spectrum(run, 0, ids=range(3, 12), blocks=0)
    monkeypatch.setattr(module, "MATRIX_BYTES", 8 * 4 * 4)
    with pytest.raises(GradscaleError, match=r"smaller of n and K must be at most 4 .*got 9 examples and K = 5; pass"):
        gs.covariance_spectrum(run, 0, ids=range(3, 12))


@pytest.mark.usefixtures("local_ray")
def test_a_run_without_dispersion_has_no_exact_trace(tmp_path: Path) -> None:
    run = gs.measure(
        Regression(), str(tmp_path / "run"), measures=[gs.Coherence()], workers=1, shard_size=24, sketch="identity"
    )
    with pytest.raises(
        GradscaleError, match=r"measured with dispersion .* got coherence; .* --measures dispersion, or"
    ):
        gs.covariance_spectrum(run, 0)
