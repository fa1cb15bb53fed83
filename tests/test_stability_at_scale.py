"""Promise: what is said of stability from estimates is what is said from all matrices, as far as the errors allow.

Shapes: n examples, m of a sample, d parameters, B a batch, N probes, W processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from problems import Toy
from test_curvature_operators import TanhNet, dense_jacobian, rows_of_hessian, stream_of
from test_example_quadratics import block, seeded
from test_stability import FIVE, outer, random_matrices
from torch import Tensor

from gradscale.curvature.example_products import example_quadratics, sampled_ids, sampled_products
from gradscale.curvature.lanczos import lanczos
from gradscale.curvature.mean_square import batch_factor, threshold_of_matrices
from gradscale.curvature.operator import DenseOperator, Operator
from gradscale.curvature.operators import CurvatureOperator, gauss_newton, hessian
from gradscale.curvature.probes import FlatProbes
from gradscale.curvature.processes import Sharded, gathered
from gradscale.curvature.stability import report_of_matrices
from gradscale.curvature.stability_at_scale import Judged, Known, ScaleReport, stability_at_scale
from gradscale.curvature.stability_inputs import (
    Pair,
    leading_pair,
    mean_over_sample,
    preconditioned_pair,
    quadratic_moments,
)
from gradscale.curvature.stability_rows import stability_rows
from gradscale.curvature.trace import TraceEstimate, TraceSamples, trace_samples
from gradscale.errors import GradscaleError
from gradscale.grads.functional import differentiable_attention

ONE = DenseOperator(torch.eye(1, dtype=torch.float64))  # a process alone
SEEDS, WORLDS = 400, (2, 4)


def samples_of(quadratic: np.ndarray, square: np.ndarray) -> TraceSamples:
    n = len(quadratic)
    return TraceSamples("gaussian", (), np.arange(n), quadratic, np.zeros((n, 0)), square)


def exact(value: Tensor | float) -> TraceEstimate:
    return TraceEstimate(float(value), 0.0, 1, "identity", "none")


def known_of(matrices: Tensor, vector: Tensor | None = None, n: int | None = None) -> Known:
    """Without any error, of Hessians [m, d, d] and the leading vector, or another."""
    H = matrices.mean(dim=0)
    values, vectors = torch.linalg.eigh(H)
    v = vectors[:, -1] if vector is None else vector / vector.norm()
    tr, whole = np.full(2, float(H.trace())), np.full(2, float(H.square().sum()))
    return Known(
        n=n or len(matrices),
        examples=len(matrices),
        leading=Pair(float(values[-1]), 0.0, 0.0, 0.0),
        along=quadratic_moments(ONE, torch.einsum("i,nij,j->n", v, matrices, v)),
        length_sq=exact((matrices @ v).square().sum(dim=1).mean()) if vector is None else None,
        traces=samples_of(tr, whole),
        squares=exact(matrices.square().sum(dim=(1, 2)).mean()),
    )


def named(report: ScaleReport) -> dict[str, Judged]:
    return {each.name: each for each in report.criteria}


# --- goldens, and the report of small problems ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "top", "along", "traces"),
    [("real", 1.25, (1.6, 1.6, 1.6), (1.0, 1.6, 16 / 7)), ("random", 0.25, (2.0, 4.0, 8.0), (2.0, 4.0, 8.0))],
)
def test_the_toys(kind: str, top: float, along: tuple[float, ...], traces: tuple[float, ...]) -> None:
    """From products alone. (15) by hand: v_1 has q_i = 1.25 of all rows, or is any of the rows, which have 1 and 0."""
    stream = stream_of(Toy(kind), microbatch=3)
    operator = hessian(stream)
    start = torch.tensor([1.0, 0, 0, 0, 0, 0] if kind == "random" else [1.0, -1, 1, -1, 0, 4]).double()
    ritz = lanczos(operator, start)
    found = example_quadratics(operator, ritz.vectors)
    H = operator.products(torch.eye(6, dtype=torch.float64))
    squares = sampled_products(operator, tuple(stream.ids), probes=200).squares
    known = Known(
        4,
        4,
        leading_pair(ritz),
        along=quadratic_moments(operator, found.values[:, 0], found.error),
        traces=samples_of(np.full(2, float(H.trace())), np.full(2, float(H.square().sum()))),
        squares=mean_over_sample(operator, squares, 4),
    )
    assert known.squares is not None
    assert known.squares.value == pytest.approx(4 if kind == "real" else 1, abs=4 * known.squares.stderr + 1e-12)
    for B, by_vector, by_traces in zip((1, 2, 4), along, traces, strict=True):
        report = named(stability_at_scale(known._replace(squares=exact(4 if kind == "real" else 1)), 0.1, B))
        assert report["sharpness"].value == pytest.approx(top, rel=1e-9)
        assert report["bound_along"].threshold == pytest.approx(by_vector, rel=1e-9)
        assert report["bound_of_traces"].threshold == pytest.approx(by_traces, rel=1e-9)


@pytest.mark.parametrize("B", [1, 2, 5])
def test_without_errors_it_is_the_report_of_the_matrices(B: int) -> None:
    for seed in range(6):
        matrices = outer(FIVE) if seed == 0 else random_matrices(seed, 5, 4, 1 + seed % 3)
        eta = (0.5 + 0.2 * seed) * threshold_of_matrices(matrices, B).value
        small = {each.name: each for each in report_of_matrices(matrices, eta, B).criteria}
        found = named(stability_at_scale(known_of(matrices), eta, B))
        assert list(found) == [name for name in small if name in found]
        for name in ("sharpness", "bound_along", "bound_of_traces"):
            assert found[name].value == pytest.approx(small[name].value, rel=1e-9)
            assert found[name].threshold == pytest.approx(small[name].threshold, rel=1e-9)
            assert (found[name].met, found[name].role) == (small[name].met, small[name].role)
            assert found[name].source == small[name].source
        lower, s = found["non_uniformity"], small["non_uniformity"]
        assert lower.value <= s.value * (1 + 1e-9)
        assert lower.threshold == s.threshold
        assert lower.met is (True if B == 5 else (False if lower.value > s.threshold else None))


def test_lower_bounds_of_the_non_uniformity() -> None:
    """By |H_i v|^2, and by v^T H_i v alone, which is less."""
    matrices = random_matrices(1, 6, 4, 2)
    H = matrices.mean(dim=0)
    v = torch.linalg.eigh(H).eigenvectors[:, -1]
    known = known_of(matrices)
    long = named(stability_at_scale(known, 0.1, 2))["non_uniformity"].value
    short = named(stability_at_scale(known._replace(length_sq=None), 0.1, 2))["non_uniformity"].value
    assert long == pytest.approx(float(((matrices - H) @ v).square().sum(dim=1).mean().sqrt()), rel=1e-9)
    assert short == pytest.approx(float(torch.einsum("i,nij,j->n", v, matrices, v).std(correction=0)), rel=1e-9)
    assert short < long


@pytest.mark.parametrize("B", [1, 2, 4])
def test_no_bound_is_violated(B: int) -> None:
    """Interpolating problems and vectors that have not converged: what is called unstable is, by the exact eta*."""
    decided = 0
    for seed in range(24):
        n, d = 4 + seed % 3, 3 + seed % 4
        matrices = random_matrices(seed, n, d, 1 + seed % 2)
        exact_eta = threshold_of_matrices(matrices, B).value
        H = DenseOperator(matrices.mean(dim=0))
        start = torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        ritz = lanczos(H, start, max_steps=1 + seed % 3)
        known = known_of(matrices, ritz.vectors[0])._replace(leading=leading_pair(ritz))
        for factor in (0.5, 0.9, 1.0, 1.1, 1.5, 3.0):
            report = stability_at_scale(known, factor * exact_eta, B)
            assert all(each.threshold >= exact_eta * (1 - 1e-9) for each in report.criteria if "bound" in each.name)
            if factor <= 1.0:
                assert report.verdict != "unstable"
            decided += report.verdict == "unstable"
    assert decided > 24  # of 72 that are


# --- a model with LayerNorm and attention -----------------------------------------------------------------------------


def everything(operator: CurvatureOperator, n: int, sharded: Operator, group: dist.ProcessGroup | None = None) -> Known:
    """As a run would have it: `operator` has this process's examples, `sharded` all of them, in slices."""
    double = FlatProbes(sharded.here, 3, dtype=torch.float64)
    ritz = lanczos(sharded, double(range(1))[0], tolerance=1e-12)
    whole = ritz.vectors if len(sharded.here) == sharded.size else gathered(ritz.vectors, sharded.size, group)
    forms = example_quadratics(operator, whole)
    own = [i for i in sampled_ids(range(n), 5, seed=2) if i in operator.stream.ids]
    products = sampled_products(operator, own, whole, probes=2, seed=2)
    everyone = sampled_products(operator, tuple(operator.stream.ids), whole, probes=0).along
    diagonal = torch.linspace(0.5, 2.0, sharded.size, dtype=torch.float64)[sharded.here.start : sharded.here.stop]
    return Known(
        n,
        n,
        leading_pair(ritz),
        preconditioned_pair(sharded, diagonal, tolerance=1e-10),
        quadratic_moments(sharded, forms.values[:, 0], forms.error),
        mean_over_sample(sharded, everyone, n, probed=False),
        trace_samples(sharded, double, range(6)),
        mean_over_sample(sharded, products.squares, n),
    )


@pytest.mark.parametrize("make", [hessian, gauss_newton])
def test_of_attention_and_layer_norm(make: Callable[..., CurvatureOperator]) -> None:
    """Against the dense float64 matrix of every example."""
    stream = stream_of(seeded(block, 5, 3, 4), microbatch=3)
    operator, P = make(stream), stream.layout.size
    known = everything(operator, 5, operator)
    if make is hessian:
        alone = [replace(stream, ids=range(i, i + 1)) for i in stream.ids]
        with differentiable_attention():
            matrices = torch.stack([rows_of_hessian(one, range(P)) for one in alone])
    else:
        J, curvature = dense_jacobian(stream)
        matrices = J.mT @ curvature @ J
    H = matrices.mean(dim=0)
    values, vectors = torch.linalg.eigh(H)
    q = torch.einsum("i,nij,j->n", vectors[:, -1], matrices, vectors[:, -1])
    assert known.leading is not None
    assert known.along is not None
    assert known.preconditioned is not None
    assert known.length_sq is not None
    assert known.leading.value == pytest.approx(float(values[-1]), rel=1e-10)
    assert known.along.mean == pytest.approx(float(q.mean()), rel=1e-8)
    assert known.along.second == pytest.approx(float(q.var(correction=0)), rel=1e-6)
    assert known.along.negative == int((q < -1e-6 * q.square().mean().sqrt()).sum())
    scale = torch.linspace(0.5, 2.0, P, dtype=torch.float64).rsqrt()
    adam = torch.linalg.eigvalsh(scale[:, None] * H * scale)[-1]
    assert known.preconditioned.value == pytest.approx(float(adam), rel=1e-9)
    lengths = (matrices @ vectors[:, -1]).square().sum(dim=1)
    assert known.length_sq.value == pytest.approx(float(lengths.mean()), rel=1e-7)
    assert known.length_sq.stderr < 1e-12 * known.length_sq.value
    report = named(stability_at_scale(known, 0.5 / float(values[-1]), 2))
    p = batch_factor(5, 2)
    bound = 2 * float(q.mean()) / (float(q.mean()) ** 2 + p * float(q.var(correction=0)))
    assert report["bound_along"].threshold == pytest.approx(bound, rel=1e-6)
    assert report["bound_along"].error < 1e-9 * bound
    spread = float(((matrices - H) @ vectors[:, -1]).square().sum(dim=1).mean().sqrt())
    assert report["non_uniformity"].value == pytest.approx(spread, rel=1e-6)


# --- errors -----------------------------------------------------------------------------------------------------------


def covers(errors: list[float], stderrs: list[float]) -> None:
    """68 % within one standard error and 95 % within two, within 3.5 deviations of such counts."""
    ratios = np.abs(np.array(errors) / np.array(stderrs))
    assert len(ratios) >= 200
    for width, nominal in ((1.0, 0.6827), (2.0, 0.9545)):
        share = float((ratios <= width).mean())
        assert abs(share - nominal) < 3.5 * math.sqrt(nominal * (1 - nominal) / len(ratios)), (width, share)


@pytest.mark.parametrize(("m", "probes"), [(60, 2), (60, 6), (120, 2)])
def test_means_over_samples_have_their_error(m: int, probes: int) -> None:
    """Two stages: norms of 120 examples, seen through probes. Of all examples, only the error of the probes is left."""
    norms = 1 + torch.rand(120, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors, stderrs = [], []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randperm(120, generator=generator)[:m]
        noise = torch.randn(m, probes, dtype=torch.float64, generator=generator)
        found = mean_over_sample(ONE, norms[ids, None] * (1 + 0.4 * noise), 120)
        errors.append(found.value - float(norms.mean()))
        stderrs.append(found.stderr)
    covers(errors, stderrs)


def test_of_one_probe_the_error_is_no_less_than_it_is() -> None:
    norms = 1 + torch.rand(120, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors, variances = [], []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randperm(120, generator=generator)[:60]
        noise = torch.randn(60, 1, dtype=torch.float64, generator=generator)
        found = mean_over_sample(ONE, norms[ids, None] * (1 + 0.4 * noise), 120)
        errors.append(found.value - float(norms.mean()))
        variances.append(found.stderr**2)
    assert np.mean(variances) > 0.95 * np.var(errors)
    assert math.isnan(mean_over_sample(ONE, torch.ones(1, 1), 5).stderr)
    assert math.isnan(mean_over_sample(ONE, torch.ones(1, 1), 1).stderr)
    assert mean_over_sample(ONE, torch.ones(1, 1), 1, probed=False).stderr == 0


@pytest.mark.parametrize("B", [1, 20, 200])
def test_the_bound_along_has_its_error(B: int) -> None:
    """Of 100 of 400 examples, along a direction that they had no part in; B = 200 is more than are measured."""
    q = 1 + torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) ** 2
    p = batch_factor(400, B)
    truth = 2 * float(q.mean()) / (float(q.mean()) ** 2 + p * float(q.var(correction=0)))
    errors, stderrs = [], []
    for seed in range(SEEDS):
        ids = torch.randperm(400, generator=torch.Generator().manual_seed(seed))[:100]
        known = Known(400, 400, along=quadratic_moments(ONE, q[ids]), independent=True)
        found = named(stability_at_scale(known, 0.5, B))["bound_along"]
        assert (found.status, found.role, found.n) == ("estimator", "necessary", 100)
        errors.append(found.threshold - truth)
        stderrs.append(found.stderr)
    covers(errors, stderrs)


def test_a_samples_own_mean_makes_no_bias() -> None:
    """Of 5 of 12 examples: the mean over samples of a^2 + p' var is that of all examples with p, to 4 errors."""
    q = 3 * torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    p, c = batch_factor(12, 2), batch_factor(12, 5)
    truth = float(q.mean()) ** 2 + p * float(q.var(correction=0))
    draws = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(s))[:5] for s in range(4000)])
    mean, second = q[draws].mean(dim=1), q[draws].var(dim=1, correction=0)
    below = mean**2 + (p - c) / (1 - c) * second
    known = Known(12, 12, along=quadratic_moments(ONE, q[draws[0]]), independent=True)
    found = named(stability_at_scale(known, 0.5, 2))["bound_along"]
    assert found.threshold == pytest.approx(float(2 * mean[0] / below[0]), rel=1e-12)
    assert abs(float(below.mean()) - truth) < 4 * float(below.std()) / math.sqrt(4000)
    plain = mean**2 + p * second
    assert abs(float(plain.mean()) - truth) > 4 * float(plain.std()) / math.sqrt(4000)


def test_the_bound_of_traces_has_its_error() -> None:
    """Over probes of H, which its trace and its norm share, and a sample of examples with probes of their own."""
    matrices = random_matrices(4, 120, 30, 20)
    H, p = matrices.mean(dim=0), batch_factor(120, 8)
    squares = matrices.square().sum(dim=(1, 2))
    truth = 2 * float(H.trace()) / ((1 - p) * float(H.square().sum()) + p * float(squares.mean()))
    errors, stderrs = [], []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        probes = torch.randn(48, 30, dtype=torch.float64, generator=generator)
        products = probes @ H
        ids = torch.randperm(120, generator=generator)[:60]
        own = torch.randn(60, 2, 30, dtype=torch.float64, generator=generator)
        seen = torch.einsum("nij,nkj->nki", matrices[ids], own).square().sum(dim=2)
        traces = samples_of((products * probes).sum(dim=1).numpy(), products.square().sum(dim=1).numpy())
        known = Known(120, 120, traces=traces, squares=mean_over_sample(ONE, seen, 120))
        found = named(stability_at_scale(known, 0.5, 8))["bound_of_traces"]
        errors.append(found.threshold - truth)
        stderrs.append(found.stderr)
    covers(errors, stderrs)


def test_the_lower_bound_of_the_non_uniformity_has_its_error() -> None:
    q = 1 + torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) ** 2
    errors, stderrs = [], []
    for seed in range(SEEDS):
        ids = torch.randperm(400, generator=torch.Generator().manual_seed(seed))[:100]
        known = Known(400, 100, along=quadratic_moments(ONE, q[ids]))
        found = named(stability_at_scale(known, 0.5, 2))["non_uniformity"]
        errors.append(found.value - float(q.std(correction=0)))
        stderrs.append(found.stderr)
    covers(errors, stderrs)


# --- what is decided --------------------------------------------------------------------------------------------------


def test_what_errors_leave_open_is_neither_met_nor_not() -> None:
    pair = Pair(10.0, 0.5, 0.5, 0.1)
    for limit, met in ((9.0, False), (9.95, None), (10.2, None), (10.6, True)):
        report = stability_at_scale(Known(8, 8, pair), 2 / limit, 2)
        assert (named(report)["sharpness"].met, report.verdict) == (met, "unstable" if met is False else "undecided")
        assert (
            stability_at_scale(Known(8, 8, pair), 2 / limit, 8).verdict
            == ({None: "undecided", True: "stable", False: "unstable"}[met])
        )
    early = Pair(10.0, 0.5, math.inf, 0.0)
    assert named(stability_at_scale(Known(8, 8, early), 1e-3, 2))["sharpness"].met is None
    assert named(stability_at_scale(Known(8, 8, early), 1.0, 2))["sharpness"].met is False
    parts = TraceEstimate(4.0, 0.2, 10, "estimator", "over probes")
    traces = samples_of(np.full(2, 2.0), np.full(2, 1.0))
    found = named(stability_at_scale(Known(8, 8, traces=traces, squares=parts), 1.0, 1))["bound_of_traces"]
    assert (found.threshold, found.stderr) == (1.0, pytest.approx(0.05))
    for eta, met in ((0.89, True), (0.95, None), (1.05, None), (1.11, False)):
        known = Known(8, 8, traces=traces, squares=parts)
        assert named(stability_at_scale(known, eta, 1))["bound_of_traces"].met is met
    (once,) = stability_at_scale(Known(8, 8, traces=samples_of(np.ones(1), np.ones(1)), squares=parts), 9, 1).criteria
    assert once.met is None


def test_a_ritz_value_of_too_few_steps() -> None:
    values = torch.linspace(0.0, 1.0, 60, dtype=torch.float64)
    operator = DenseOperator(torch.diag(values))
    ritz = lanczos(operator, torch.ones(60, dtype=torch.float64), max_steps=3)
    pair = leading_pair(ritz)
    assert pair.error == math.inf
    assert pair.value <= 1.0
    assert leading_pair(lanczos(operator, torch.ones(60, dtype=torch.float64))).error < 1e-5


def test_what_is_heuristic_has_no_part_in_the_verdict() -> None:
    matrices, eta = random_matrices(2, 6, 3, 1), 1e3
    whole = stability_at_scale(known_of(matrices), eta, 2)
    sample = stability_at_scale(known_of(matrices, n=60), eta, 2)
    assert (whole.verdict, sample.verdict) == ("unstable", "undecided")
    assert {each.status for each in sample.criteria} == {"heuristic"}
    assert {each.role for each in sample.criteria} == {"neither"}
    assert [each.status for each in whole.criteria] == ["identity", "upper bound", "estimator", "conditional"]
    held_out = stability_at_scale(known_of(matrices, n=60)._replace(independent=True), eta, 2)
    assert named(held_out)["bound_along"].status == "estimator"
    assert held_out.verdict == "unstable"
    saddle = known_of(torch.cat([matrices, -0.1 * matrices[:1]]))
    for name in ("bound_along", "bound_of_traces"):
        found = named(stability_at_scale(saddle, eta, 2))[name]
        assert (found.status, found.role) == ("heuristic", "neither")
    lone = Known(60, 1, along=quadratic_moments(ONE, torch.ones(1)))
    assert list(named(stability_at_scale(lone, 0.1, 2))) == ["non_uniformity"]


def test_momentum_and_adam() -> None:
    known = known_of(random_matrices(2, 6, 3, 1))._replace(preconditioned=Pair(37.0, 0.0, 0.0, 0.0))
    report = named(stability_at_scale(known, 1.0, 2, momentum=0.9))
    assert list(report) == ["sharpness_momentum", "sharpness_adam"]
    assert report["sharpness_momentum"].threshold == pytest.approx(3.8)
    assert report["sharpness_adam"].threshold == pytest.approx(38.0)
    assert (report["sharpness_adam"].met, report["sharpness_adam"].role) == (True, "neither")
    assert report["sharpness_adam"].status == "conditional"


def test_rows() -> None:
    parts = TraceEstimate(4.0, 0.2, 10, "estimator", "over probes")
    known = known_of(outer(FIVE))._replace(squares=parts, leading=Pair(2.0, 1e-3, 1e-4, 0.0))
    rows = {row.name: row for row in stability_rows(stability_at_scale(known, 0.5, 2))}
    criteria = ("sharpness", "bound_along", "bound_of_traces", "non_uniformity")
    assert list(rows) == [f"{name}{end}" for name in criteria for end in ("", "_threshold")]
    assert {row.status for row in rows.values()} <= {"identity", "estimator", "conditional", "heuristic"}
    assert (rows["sharpness"].value, rows["sharpness"].stderr, rows["sharpness"].n) == (2.0, 1e-4, 5)
    assert (rows["sharpness_threshold"].value, rows["sharpness_threshold"].stderr) == (4.0, None)
    assert (rows["bound_of_traces"].value, rows["bound_of_traces"].stderr) == (0.5, None)
    assert rows["bound_of_traces_threshold"].status == "conditional"
    stderr = rows["bound_of_traces_threshold"].stderr
    assert stderr is not None
    assert stderr > 0
    assert rows["bound_along_threshold"].stderr is None
    assert rows["bound_along"].unit == "parameter unit^2 / loss units"
    assert rows["sharpness"].definition.endswith("eta = 0.5, B = 2; arXiv 2103.00065")
    early = stability_rows(stability_at_scale(Known(5, 5, Pair(2.0, 1.0, math.inf, 0.0)), 0.5, 2))
    assert early[0].stderr is not None
    assert math.isnan(early[0].stderr)


def test_what_is_refused() -> None:
    with pytest.raises(GradscaleError, match="examples must be 1 to n = 5 and deviations positive, got 6 and"):
        stability_at_scale(Known(5, 6), 0.1, 2)
    with pytest.raises(GradscaleError, match="deviations positive, got 5 and 0"):
        stability_at_scale(Known(5, 5), 0.1, 2, deviations=0)
    with pytest.raises(GradscaleError, match="batch_size must be from 1 to the number of examples 5, got 6"):
        stability_at_scale(Known(5, 5), 0.1, 6)
    with pytest.raises(GradscaleError, match="eta must be a positive number, got -1"):
        stability_at_scale(Known(5, 5), -1, 2)
    with pytest.raises(GradscaleError, match="quadratic forms must be finite and at least one, got 2 of sum nan"):
        quadratic_moments(ONE, torch.tensor([1.0, math.nan]))
    with pytest.raises(GradscaleError, match="quadratic forms must be finite and at least one, got 0"):
        quadratic_moments(ONE, torch.zeros(0))
    with pytest.raises(GradscaleError, match="sampled examples must be 1 to 3, got 4"):
        mean_over_sample(ONE, torch.ones(4, 2), 3)


# --- on 2 and 4 processes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """What this process's examples add to the mean over all n."""

    operator: CurvatureOperator
    n: int

    @property
    def size(self) -> int:
        return self.operator.size

    @property
    def here(self) -> range:
        return self.operator.here

    def products(self, vectors: Tensor) -> Tensor:
        return (self.operator.sums(vectors) / self.n).to(vectors)

    def all_sum(self, parts: Tensor) -> Tensor:
        return parts


def report_rows(known: Known) -> tuple[list[tuple[str, float, float, float]], list[str]]:
    report = stability_at_scale(known, 0.7, 3)
    adam = stability_at_scale(known, 0.7, 3, momentum=0.9)
    rows = [(each.name, each.value, each.threshold, each.stderr) for each in report.criteria + adam.criteria]
    return rows, [report.verdict, adam.verdict]


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=max(WORLDS))
    for world in WORLDS:
        group = dist.new_group(list(range(world)))
        if rank < world:
            ids = range(11 * rank // world, 11 * (rank + 1) // world)
            operator = hessian(replace(stream_of(TanhNet()), ids=ids), "double_backward")
            known = everything(operator, 11, Sharded(Share(operator, 11), group), group)
            torch.save((report_rows(known), len(ids)), f"{folder}/{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_the_gang_reports_what_one_process_does(tmp_path: Path) -> None:
    mp.spawn(on_rank, args=(str(tmp_path),), nprocs=max(WORLDS))
    operator = hessian(stream_of(TanhNet()), "double_backward")
    rows, verdicts = report_rows(everything(operator, 11, operator))
    for world in WORLDS:
        found = [torch.load(tmp_path / f"{world}-{rank}.pt", weights_only=False) for rank in range(world)]
        assert sum(count for _, count in found) == 11
        for (here, decided), _ in found:
            assert here == found[0][0][0]  # to the bit, on all ranks
            assert decided == verdicts
            assert [row[0] for row in here] == [row[0] for row in rows]
            np.testing.assert_allclose([row[1:] for row in here], [row[1:] for row in rows], rtol=1e-7, atol=1e-9)
