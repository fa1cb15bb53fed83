"""Promise: traces and norms from probes are unbiased, with standard errors that say what they are.

Shapes: P entries, N probes, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from krylov_problems import GOLDEN, Drawn, Spoilt, dense, rotated
from test_measure_laws import assert_honest

from gradscale.curvature.deflated import (
    GIVEN_BASIS,
    LEAVE_ONE_OUT,
    DeflatedTrace,
    hutch_plus_plus,
    mean_of_runs,
    xnystrace,
    xtrace,
)
from gradscale.curvature.operator import DenseOperator
from gradscale.curvature.probes import FlatProbes
from gradscale.curvature.trace import (
    expected_norm,
    frobenius,
    frobenius_sq,
    group_traces,
    hutchinson,
    merge_samples,
    trace,
    trace_samples,
)
from gradscale.errors import GradscaleError

Method = Callable[..., DeflatedTrace]

METHODS = [hutch_plus_plus, xtrace, xnystrace]
KINDS = ["gaussian", "rademacher"]
LAYERS = {"first": range(25), "second": range(25, 31), "last": range(31, 60)}
MANY = np.linspace(-1, 3, 60).tolist()
SEEDS = 240


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_are_those_of_the_matrix(kind: str, dtype: torch.dtype) -> None:
    operator = dense(MANY)
    probes = FlatProbes(operator.here, 7, kind, dtype)
    found = trace_samples(operator, probes, range(3, 14), LAYERS, together=4)
    v = probes(range(3, 14)).double().numpy()
    images = v @ operator.matrix.numpy()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(found.quadratic, (v * images).sum(axis=1), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(found.square, (images**2).sum(axis=1), rtol=tolerance)
    for g, entries in enumerate(LAYERS.values()):
        part = slice(entries.start, entries.stop)
        expected = (v[:, part] * images[:, part]).sum(axis=1)
        np.testing.assert_allclose(found.by_group[:, g], expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(found.by_group.sum(axis=1), found.quadratic, rtol=1e-12)
    assert found.probe.tolist() == list(range(3, 14))


def test_merged_samples_are_those_of_one_run() -> None:
    operator = dense(MANY)
    probes = FlatProbes(operator.here, 7, dtype=torch.float64)
    whole = trace_samples(operator, probes, range(12), LAYERS, together=12)
    parts = [trace_samples(operator, probes, ids, LAYERS, 3) for ids in (range(5, 12), range(2), range(2, 5))]
    merged = merge_samples(parts)
    assert merged.probe.tolist() == list(range(12))
    np.testing.assert_allclose(merged.by_group, whole.by_group, rtol=1e-12, atol=1e-12)
    assert trace(merged).value == pytest.approx(trace(whole).value, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_over_probes_are_honest(kind: str) -> None:
    """Of every quantity, in 240 runs of 24 probes."""
    operator = dense(MANY)
    matrix, N = operator.matrix.numpy(), 24
    truths = {"trace": matrix.trace(), "frobenius_sq": (matrix**2).sum(), "frobenius": np.linalg.norm(matrix)}
    for name, entries in LAYERS.items():
        truths[name] = matrix[entries.start : entries.stop, entries.start : entries.stop].trace()
    if kind == "gaussian":
        draws = Drawn(60, 10**4)(range(10**5)).numpy() @ matrix
        truths["expected_norm"] = float(np.linalg.norm(draws, axis=1).mean())
        assert np.sqrt(2 / np.pi) * truths["frobenius"] < truths["expected_norm"] < truths["frobenius"]
    scores: dict[str, list[float]] = {name: [] for name in truths}
    for seed in range(SEEDS):
        samples = trace_samples(operator, Drawn(60, seed, kind), range(N), LAYERS, N)
        found = {"trace": trace(samples), "frobenius_sq": frobenius_sq(samples), "frobenius": frobenius(samples)}
        found |= group_traces(samples)
        if kind == "gaussian":
            found["expected_norm"] = expected_norm(samples)
        for name, truth in truths.items():
            scores[name].append((found[name].value - truth) / found[name].stderr)
            assert found[name].n == N
    for parts in scores.values():
        assert_honest(parts, N - 1)


def test_the_variance_of_a_sample_is_that_of_the_books() -> None:
    operator = dense(GOLDEN)
    squares, diagonal = operator.matrix.square().sum(), operator.matrix.diagonal().square().sum()
    for kind, variance in (("gaussian", 2 * squares), ("rademacher", 2 * (squares - diagonal))):
        samples = trace_samples(operator, Drawn(40, 1, kind), range(20_000), together=20_000)
        assert np.var(samples.quadratic) == pytest.approx(float(variance), rel=0.1)


def test_signs_on_a_diagonal_are_exact() -> None:
    operator = DenseOperator(torch.diag(torch.arange(5.0)).double())
    found = trace(hutchinson(operator, FlatProbes(operator.here, 0, "rademacher"), 100, stderr=1e-6))
    assert (found.value, found.stderr, found.n) == (10.0, 0.0, 16)


# --- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{"stderr": 1.5}, {"relative": 0.03}])
def test_a_run_stops_at_the_requested_error_and_it_is_honest(asked: dict[str, float]) -> None:
    """Not before the error is reached, and the truth is within it as often as it says: no early exit by luck."""
    operator = dense(MANY)
    truth, scores, taken = float(operator.matrix.trace()), [], []
    for seed in range(SEEDS):
        samples = hutchinson(operator, Drawn(60, seed), 2000, **asked, together=4)
        found = trace(samples)
        assert found.stderr <= (asked.get("stderr") or asked["relative"] * abs(found.value))
        assert found.n >= 16
        scores.append((found.value - truth) / found.stderr)
        taken.append(found.n)
    assert_honest(scores, int(np.median(taken)) - 1)
    variance = 2 * float(operator.matrix.square().sum())
    target = asked.get("stderr") or asked["relative"] * truth
    assert np.median(taken) == pytest.approx(variance / target**2, rel=0.25)


def test_a_run_that_cannot_reach_it_ends() -> None:
    operator, seen = dense(MANY), []
    samples = hutchinson(operator, Drawn(60, 0), 30, stderr=1e-9, groups=LAYERS, on_samples=seen.append)
    assert len(samples.probe) == 30
    assert [len(part.probe) for part in seen] == [8, 8, 8, 6]
    assert len(hutchinson(operator, Drawn(60, 0), 20).probe) == 20


# --- deflated traces --------------------------------------------------------------------------------------------------

# rmse by tr A: the table of the golden spectrum, n = 40, over 400 seeds
TABLE = {
    (12, hutch_plus_plus, "rademacher"): 0.038,
    (12, xtrace, "gaussian"): 0.024,
    (12, xnystrace, "gaussian"): 0.029,
    (24, hutch_plus_plus, "rademacher"): 0.016,
    (24, xtrace, "gaussian"): 0.0105,
    (24, xnystrace, "gaussian"): 0.0097,
}


@pytest.fixture(scope="module")
def golden_runs() -> dict[tuple[int, Method, str], list[DeflatedTrace]]:
    operator = dense(GOLDEN)
    return {case: [case[1](operator, Drawn(40, seed, case[2]), case[0]) for seed in range(SEEDS)] for case in TABLE}


def test_root_mean_squares_are_those_of_the_table(golden_runs: Any) -> None:
    tr = sum(GOLDEN)
    for case, runs in golden_runs.items():
        values = np.array([run.estimate.value for run in runs])
        assert np.sqrt(np.mean((values - tr) ** 2)) / tr == pytest.approx(TABLE[case], rel=0.2), case
        assert abs(values.mean() - tr) < 4 * values.std() / np.sqrt(SEEDS), case  # unbiased
        assert {run.products for run in runs} == {case[0]}, case


def test_hutchinson_is_five_times_worse_there() -> None:
    operator, tr = dense(GOLDEN), sum(GOLDEN)
    for m, expected in ((12, 0.194), (24, 0.133)):
        values = [
            trace(trace_samples(operator, Drawn(40, s, "rademacher"), range(m), together=m)).value for s in range(SEEDS)
        ]
        assert np.sqrt(np.mean((np.array(values) - tr) ** 2)) / tr == pytest.approx(expected, rel=0.15)


def test_errors_given_the_basis_are_honest() -> None:
    """Of Hutch++, whose samples are independent given Q."""
    operator = dense([10.0, 8.0, 6.0, *np.linspace(-1, 2, 77).tolist()])
    tr = float(operator.matrix.trace())
    for kind in KINDS:
        runs = [hutch_plus_plus(operator, Drawn(80, seed, kind), 48) for seed in range(SEEDS)]
        assert runs[0].estimate.error == GIVEN_BASIS
        assert_honest([(run.estimate.value - tr) / run.estimate.stderr for run in runs], len(runs[0].samples) - 1)


def test_errors_of_leave_one_out_are_too_small_by_what_is_said(golden_runs: Any) -> None:
    """Down to half of the truth where the probes are many against P: they are no more than a guide, and labelled so."""
    for case, runs in golden_runs.items():
        if case[1] is hutch_plus_plus:
            continue
        stated = np.sqrt(np.mean([run.estimate.stderr**2 for run in runs]))
        ratio = stated / np.std([run.estimate.value for run in runs])
        assert 0.4 < ratio < 1.1, (case, ratio)
        assert {run.estimate.error for run in runs} == {LEAVE_ONE_OUT}


@pytest.mark.parametrize("method", [xtrace, xnystrace])
def test_errors_between_independent_runs_are_honest(method: Method) -> None:
    operator, tr, scores = dense(GOLDEN), sum(GOLDEN), []
    for seed in range(200):
        found = mean_of_runs([method(operator, Drawn(40, seed), 12, 1000 * r) for r in range(6)])
        scores.append((found.value - tr) / found.stderr)
    assert found.n == 6
    assert_honest(scores, 5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-3)])
def test_low_rank_is_exact(method: Method, kind: str, dtype: torch.dtype, tolerance: float) -> None:
    operator = dense([5.0, 4.0, 3.0, *[0.0] * 37])
    found = method(operator, FlatProbes(operator.here, 1, kind, dtype), 20)
    assert found.estimate.value == pytest.approx(12, rel=tolerance)
    assert found.estimate.stderr < 12 * tolerance


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_is_zero(method: Method, kind: str) -> None:
    operator = dense([0.0] * 30)
    found = method(operator, FlatProbes(operator.here, 1, kind, torch.float64), 12).estimate
    assert found.value == pytest.approx(0, abs=1e-8)
    assert found.stderr < 1e-8


@pytest.mark.parametrize("method", [xtrace, xnystrace])
def test_a_multiple_of_the_identity_has_no_variance(method: Method) -> None:
    """Lengths are scaled away."""
    operator = DenseOperator(2 * torch.eye(50, dtype=torch.float64))
    found = method(operator, FlatProbes(operator.here, 1, dtype=torch.float64), 10).estimate
    assert found.value == pytest.approx(100, rel=1e-6)
    assert found.stderr < 1e-5


@pytest.mark.parametrize("method", [hutch_plus_plus, xtrace])
def test_indefinite_operators_are_unbiased(method: Method) -> None:
    operator = dense([8.0, -9.0, *np.linspace(-1, 2, 38).tolist()])
    values = np.array([method(operator, Drawn(40, seed), 18).estimate.value for seed in range(SEEDS)])
    assert abs(values.mean() - float(operator.matrix.trace())) < 4 * values.std() / np.sqrt(SEEDS)


def leave_one_out(matrix: np.ndarray, omega: np.ndarray, nystrom: bool, scaled: bool) -> list[float]:
    """The oracle: each probe in turn left out, with dense projections."""
    P, k = matrix.shape[0], len(omega)
    values = []
    for i in range(k):
        others, w = np.delete(omega, i, axis=0).T, omega[i]
        images = matrix @ others
        if nystrom:
            near = images @ np.linalg.pinv(others.T @ images) @ images.T
            outside, _ = np.linalg.qr(others)
            rest = w @ (matrix - near) @ w
            length = w @ w - np.sum((outside.T @ w) ** 2)
            values.append(np.trace(near) + rest * ((P - k + 1) / length if scaled else 1))
        else:
            Q, _ = np.linalg.qr(images)
            left = w - Q @ (Q.T @ w)
            rest = left @ matrix @ left * ((P - k + 1) / (left @ left) if scaled else 1)
            values.append(np.trace(Q.T @ matrix @ Q) + rest)
    return values


@pytest.mark.parametrize("method", [xtrace, xnystrace])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [2, 7, 15])
def test_values_are_those_of_leaving_out(method: Method, kind: str, k: int) -> None:
    operator, nystrom = dense(GOLDEN), method is xnystrace
    probes = FlatProbes(operator.here, 4, kind, torch.float64)
    expected = leave_one_out(operator.matrix.numpy(), probes(range(2, 2 + k)).numpy(), nystrom, kind == "gaussian")
    found = method(operator, probes, k if nystrom else 2 * k, 2)
    np.testing.assert_allclose(found.samples, expected, rtol=1e-5 if nystrom else 1e-9)
    assert found.estimate.value == pytest.approx(np.mean(expected), rel=1e-5)


def test_hutch_plus_plus_is_its_definition() -> None:
    operator = dense(GOLDEN)
    probes, matrix = FlatProbes(operator.here, 4, dtype=torch.float64), operator.matrix.numpy()
    Q, _ = np.linalg.qr(matrix @ probes(range(5, 10)).numpy().T)
    left = probes(range(10, 15)).numpy() @ (np.eye(40) - Q @ Q.T)
    expected = np.trace(Q.T @ matrix @ Q) + ((left @ matrix) * left).sum(axis=1)
    np.testing.assert_allclose(hutch_plus_plus(operator, probes, 15, 5).samples, expected, rtol=1e-10)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda o, p: trace_samples(o, p, range(0)), "probes and together must be at least 1, got 0 and 8; 16 and 8"),
        (lambda o, p: hutchinson(o, p, 0), "max_probes must be at least 1, got 0; 100 is usual"),
        (lambda o, p: hutchinson(o, p, 9, stderr=-1.0), "requested standard error must be positive, got -1.0; 1 %"),
        (lambda o, p: hutchinson(o, p, 9, 0.1, 0.1), "stderr or relative must be given, got both, 0.1 and 0.1; leave"),
        (lambda o, p: hutch_plus_plus(o, p, 5), r"products must be at least 6 for Hutch\+\+, got 5; 30 are usual"),
        (
            lambda o, p: xtrace(o, p, 3),
            "probes of XTrace must be at least 2 and at most the 40 .* got 1 with 2 products",
        ),
        (lambda o, p: xnystrace(o, p, 41), "probes of XNysTrace must be .* at most the 40 .* got 41 with 41 products"),
        (lambda o, p: mean_of_runs([]), "runs must be at least 1, got 0; pass"),
        (
            lambda o, p: trace_samples(o, p, range(2), {"a": range(38, 41)}),
            r"group a must be a range of some of the 40 entries, got range\(38, 41\); see the layout",
        ),
        (
            lambda o, p: merge_samples([trace_samples(o, p, range(3)), trace_samples(o, p, range(2, 4))]),
            r"probes of samples must differ, got \[2\] twice; merge each once",
        ),
        (
            lambda o, p: merge_samples(
                [trace_samples(o, p, range(3)), trace_samples(o, p, range(3, 4), {"a": range(2)})]
            ),
            "samples to be merged must be of one kind and the same groups, got .*; merge those of one run",
        ),
        (
            lambda o, p: expected_norm(trace_samples(o, Drawn(40, 0, "rademacher"), range(3))),
            r"probes of E \|A g\| must be gaussian, got rademacher; draw Gaussian ones",
        ),
        (
            lambda o, p: xnystrace(DenseOperator(o.matrix - 3 * torch.eye(40).double()), p, 10),
            r"operator must be positive semi-definite for XNysTrace, got v\^T A v = -.*; use xtrace or hutch_plus_plus",
        ),
        (
            lambda o, p: xnystrace(o, lambda_probes(p), 4),
            "probes must be 4 independent vectors, got a Gram matrix without inverse; draw others",
        ),
    ],
)
def test_what_cannot_be_asked_for(ask: Callable[..., Any], message: str) -> None:
    with pytest.raises(GradscaleError, match=message):
        ask(dense(GOLDEN), Drawn(40, 0))


def lambda_probes(probes: Drawn) -> Any:
    class Same:
        kind = "gaussian"

        def __call__(self, ids: range) -> torch.Tensor:
            return probes(range(1)).expand(len(ids), -1).contiguous()

    return Same()


@pytest.mark.parametrize("method", [trace_samples, *METHODS])
def test_a_product_that_is_not_finite(method: Any) -> None:
    operator = Spoilt(DenseOperator(rotated(GOLDEN)), 0, torch.nan)
    asked = range(4) if method is trace_samples else 12
    with pytest.raises(GradscaleError, match=r"must be finite, got squared lengths? .*nan.*; look for the example"):
        method(operator, Drawn(40, 0), asked)
