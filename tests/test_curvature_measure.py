"""Promise: the measure `curvature` is what dense float64 Hessians and its probes give, within the stated errors.

The oracle differentiates every entry of the gradient of all examples; it is held to differences of gradients first.

Shapes: n examples, P entries of the measured parameters, N probes, J blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import contents
from oracle_problems import FewDigits, LinearRegression, SmallGPT2
from problems import ModelAtHand
from run_problems import Given, Regression
from test_measure_laws import assert_honest
from test_probing import agrees, measured
from test_sharpness import Squares
from torch import Tensor, nn

import gradscale as gs
from gradscale.errors import GradscaleError
from gradscale.measures.curvature import CurvatureState, trace_of
from gradscale.measures.exact_sum import total_of
from gradscale.measures.measure import Estimate
from gradscale.measures.settings import parse_measures
from gradscale.run.shard import prepare, run_shard

Array = np.ndarray[Any, np.dtype[np.float64]]
SHARD, MICROBATCH = 5, 4


@dataclass(frozen=True)
class FusedGPT2(SmallGPT2):
    """With torch's fused attention, whose own kernels have no second derivative."""

    def model(self, checkpoint: str | None) -> nn.Module:
        model = super().model(checkpoint)
        model.set_attn_implementation("sdpa")
        return model


PROBLEMS: dict[str, tuple[Any, str | None]] = {
    "linear": (LinearRegression(), None),
    "digits": (FewDigits(), "norm|attention|head|patches"),
    "gpt2": (SmallGPT2(), "h.0.attn.c_proj|c_attn.bias|ln_|wpe"),
    "fused": (FusedGPT2(), "h.0.attn.c_proj|c_attn.bias|ln_|wpe"),
}


@cache
def dense(problem: str) -> tuple[dict[str, slice], Array]:
    """Where each parameter lies, and sum_i H_i [2, P, P] over the examples of even and of odd id."""
    if problem == "fused":
        return dense("gpt2")
    task, params = PROBLEMS[problem]
    subject = prepare(task, None, params)
    weights, layers, start = list(subject.parameters.values()), {}, 0
    for name, parameter in subject.parameters.items():
        layers[name] = slice(start, start + parameter.numel())
        start += parameter.numel()
    n, found = len(subject.examples), np.zeros((2, start, start))
    for half in range(2):
        rows = torch.arange(half, n, 2)
        batch = {key: tensor[rows] for key, tensor in subject.examples.batch(range(n)).items()}
        g = flat(torch.autograd.grad(task.losses(subject.model, batch).sum(), weights, create_graph=True))
        for p in range(start):
            row = torch.autograd.grad(g[p], weights, retain_graph=True, materialize_grads=True)
            found[half, p] = flat(row).numpy()
    return layers, found


def flat(parts: Any) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def probes_of(problem: str, measure: gs.Curvature) -> Array:
    """[N, P]"""
    task, params = PROBLEMS[problem]
    subject = prepare(task, None, params)
    return np.array([flat(measure.gathering.vectors(subject, j)).numpy() for j in range(measure.num_probes)])


def found_of(problem: str, measure: gs.Curvature, size: int = MICROBATCH, shard: int = SHARD) -> Any:
    """By the code of a run, without its files; a shard is a jackknife block."""
    task, params = PROBLEMS[problem]
    subject, state = prepare(task, None, params), measure.init()
    n = len(subject.examples)
    for block, start in enumerate(range(0, n, shard)):
        result = run_shard(subject, range(start, min(start + shard, n)), block, size, [measure], None)
        state = measure.merge(state, result.states[measure])
    return measure.compute(state)


def expect(estimate: Estimate, exact: float, error: float | None = None) -> None:
    assert estimate.value == pytest.approx(exact, rel=1e-9, abs=1e-11)
    if error is not None:
        assert estimate.stderr == pytest.approx(error, rel=1e-7, abs=1e-11)


def over_probes(values: Array) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


# --- against dense Hessians -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", ["linear", "digits", "gpt2"])
def test_the_oracle_is_what_differences_of_gradients_give(problem: str) -> None:
    task, params = PROBLEMS[problem]
    subject = prepare(task, None, params)
    weights = list(subject.parameters.values())
    batch, H = subject.examples.batch(range(len(subject.examples))), dense(problem)[1].sum(axis=0)
    v = torch.randn(len(H), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sides = []
    for sign in (1, -1):
        for parameter, part in zip(weights, v.split([w.numel() for w in weights]), strict=True):
            parameter.data += sign * 1e-5 * part.view_as(parameter)
        sides.append(flat(torch.autograd.grad(task.losses(subject.model, batch).sum(), weights)))
        for parameter, part in zip(weights, v.split([w.numel() for w in weights]), strict=True):
            parameter.data -= sign * 1e-5 * part.view_as(parameter)
    differences = ((sides[0] - sides[1]) / 2e-5).numpy()
    assert np.linalg.norm(differences - H @ v.numpy()) < 1e-6 * np.linalg.norm(differences)
    assert np.allclose(H, H.T, atol=1e-10 * np.abs(H).max())


@pytest.mark.parametrize("probes", ["rademacher", "gaussian"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_number_is_its_formula_on_the_dense_hessian(problem: str, probes: str) -> None:
    measure = gs.Curvature(6, probes, frobenius=True, seed=3)
    layers, halves = dense(problem)
    n, V, found = len(PROBLEMS[problem][0].examples()), probes_of(problem, measure), found_of(problem, measure)
    H, (A, B) = halves.sum(axis=0) / n, (halves[k] / len(range(k, n, 2)) for k in range(2))
    names = {"trace", "trace_sample", "frobenius_sq", "frobenius", "frobenius_sample"}
    names |= {"ellipsoid", "ellipsoid_sample"} if probes == "gaussian" else set()
    assert {name for name, _ in found} == names
    for scope, part in {"all": slice(None), **{f"layer:{name}": part for name, part in layers.items()}}.items():
        expect(found["trace_sample", scope], *over_probes((V[:, part] * (V @ H)[:, part]).sum(axis=1)))
        assert found["trace", scope].value == found["trace_sample", scope].value
        assert found["trace", scope].n == n
    between, lengths = ((V @ A) * (V @ B)).sum(axis=1), np.linalg.norm(V @ H, axis=1)
    expect(found["frobenius_sq", "all"], *over_probes(between))
    root = math.sqrt(between.mean())
    expect(found["frobenius", "all"], root, over_probes(between)[1] / (2 * root))
    expect(found["frobenius_sample", "all"], math.sqrt((lengths**2).mean()))
    if probes == "gaussian":
        expect(found["ellipsoid", "all"], *over_probes(np.sqrt(between.clip(min=0))))
        expect(found["ellipsoid_sample", "all"], *over_probes(lengths))
    assert all(estimate.status == "estimator" for estimate in found.values())
    assert found["trace", "all"].definition == f"curvature/trace/hessian/{probes}/v1"


@pytest.mark.parametrize("problem", ["linear", "digits", "gpt2"])
def test_the_truth_is_within_the_errors_over_probes(problem: str) -> None:
    measure = gs.Curvature(48, "gaussian", frobenius=True, seed=1)
    layers, halves = dense(problem)
    n = len(PROBLEMS[problem][0].examples())
    H, (A, B) = halves.sum(axis=0) / n, (halves[k] / len(range(k, n, 2)) for k in range(2))
    found = found_of(problem, measure, 10, 10)
    agrees(found["trace_sample", "all"], float(np.trace(H)))
    for name, part in layers.items():
        agrees(found["trace_sample", f"layer:{name}"], float(np.trace(H[part, part])))
    agrees(found["frobenius_sq", "all"], float(np.trace(A @ B)))
    agrees(found["frobenius_sample", "all"], float(np.linalg.norm(H)))
    least = math.sqrt(2 / math.pi) * np.linalg.norm(H)
    ellipsoid = found["ellipsoid_sample", "all"]
    assert least - 4 * ellipsoid.stderr <= ellipsoid.value <= np.linalg.norm(H) + 4 * ellipsoid.stderr
    assert found["ellipsoid", "all"].value <= ellipsoid.value


def test_linear_regression_has_its_closed_form() -> None:
    """H = (1/n) sum x x^T x I, with x = (x, 1); signs make the trace of the offset exact in no probe, but its mean."""
    task = LinearRegression()
    x = task.examples().tensors["x"].numpy()
    found = found_of("linear", gs.Curvature(64, seed=2))
    agrees(found["trace_sample", "layer:weight"], 3 * float((x**2).sum() / len(x)))
    agrees(found["trace_sample", "layer:bias"], 3.0)
    agrees(found["trace_sample", "all"], 3 * (float((x**2).sum() / len(x)) + 1))


def test_the_traces_of_the_parameters_add_up() -> None:
    found = found_of("digits", gs.Curvature(3))
    layers = [estimate.value for (name, scope), estimate in found.items() if name == "trace" and scope != "all"]
    assert len(layers) > 5
    assert math.fsum(layers) == pytest.approx(found["trace", "all"].value, rel=1e-12)


def test_signs_and_normals_are_those_of_their_positions() -> None:
    """Probes of a seed are the same whatever their number; other seeds, probes and parameters have others."""
    device = torch.device("cpu")
    for kind in ("rademacher", "gaussian"):
        few, many, other = gs.Curvature(2, kind), gs.Curvature(9, kind), gs.Curvature(9, kind, seed=1)
        v = many.gathering.entries("w", 1, 5000, device)
        assert torch.equal(few.gathering.entries("w", 1, 5000, device), v)
        assert torch.equal(many.gathering.entries("w", 1, 300, device), v[:300])
        for apart in (
            many.gathering.entries("w", 8, 5000, device),
            many.gathering.entries("u", 1, 5000, device),
            other.gathering.entries("w", 1, 5000, device),
        ):
            assert abs(float(apart @ v)) < 5 * math.sqrt(5000)
        assert float(v.square().mean()) == pytest.approx(1.0, abs=0.1)


# --- what it depends on -----------------------------------------------------------------------------------------------


def test_no_bit_of_a_trace_depends_on_how_the_examples_were_cut() -> None:
    measure = gs.Curvature(4, frobenius=True)
    cuts = [found_of("linear", measure, 2, shard) for shard in (2, 4, 6, 14)]
    for found in cuts[1:]:
        for key, estimate in cuts[0].items():
            if key[0] == "trace_sample":
                assert estimate == found[key]
            elif key[0] != "trace":
                assert estimate.value == pytest.approx(found[key].value, rel=1e-12)


def test_its_two_errors_are_probes_and_blocks_as_written() -> None:
    """Of equal blocks, the two-way analysis of variance by hand."""
    q = np.random.default_rng(0).standard_normal((6, 5)) + np.arange(5) + np.arange(6)[:, None]  # [J, N], of 4 examples
    sums = [total_of(torch.from_numpy(row)[None]) for row in 4 * q]
    found = trace_of(sums, torch.full((6,), 4.0, dtype=torch.float64))
    probes, blocks, whole = q.mean(axis=0), q.mean(axis=1), q.mean()
    own = ((q - probes - blocks[:, None] + whole) ** 2).sum() / (5 * 4)  # the mean square of what is neither's
    exact = probes.var(ddof=1) / 5 + blocks.var(ddof=1) / 6 - own / 30
    assert found.value == pytest.approx(whole)
    assert found.over_probes == pytest.approx(probes.std(ddof=1) / math.sqrt(5))
    assert found.over_both == pytest.approx(math.sqrt(exact))


def test_what_has_no_error() -> None:
    one_block = measured(LinearRegression(), gs.Curvature(4), 13, 13)["trace", "all"]
    assert math.isnan(one_block.stderr)
    one_probe = found_of("linear", gs.Curvature(1))
    assert math.isnan(one_probe["trace", "all"].stderr)
    assert math.isnan(one_probe["trace_sample", "all"].stderr)
    for measure in (gs.Curvature(2), gs.Curvature(2, "gaussian", frobenius=True)):
        assert all(math.isnan(e.value) and e.n == 0 for e in measure.compute(measure.init()).values())
    odd = measured(Squares(1), gs.Curvature(2, frobenius=True), 1, 1)
    assert math.isnan(odd["frobenius_sq", "all"].value)
    assert odd["frobenius_sample", "all"].value > 0


def test_a_loss_that_is_linear_has_no_curvature() -> None:
    found = measured(Given(((1.0, 2.0), (3.0, -1.0))), gs.Curvature(3, frobenius=True), 1, 2)
    assert found["trace_sample", "all"][:2] == (0.0, 0.0)
    assert found["frobenius_sq", "all"].value == 0.0
    assert math.isnan(found["frobenius", "all"].value)


@pytest.mark.parametrize("frobenius", [False, True])
def test_an_example_that_is_not_finite_is_left_out(frobenius: bool) -> None:
    measure = gs.Curvature(3, frobenius=frobenius)
    found = measured(Regression(rows=12, nan=7), measure, 4, 12)
    rest = [i for i in range(12) if i != 7]
    x = Regression(rows=12).examples().tensors["x"]
    exact, counted = hessian_trace(Regression(rows=12), rest, measure), found["trace_sample", "all"]
    assert len(x) == 12
    assert (counted.n, counted.value) == (11, pytest.approx(exact, rel=1e-10))


def hessian_trace(task: Any, rows: list[int], measure: gs.Curvature) -> float:
    """mean_j v_j^T H v_j of these rows, one example at a time."""
    subject = prepare(task, None, None)
    weights, total = list(subject.parameters.values()), 0.0
    for row in rows:
        loss = task.losses(subject.model, subject.examples.batch(range(row, row + 1))).sum()
        g = torch.autograd.grad(loss, weights, create_graph=True)
        for j in range(measure.num_probes):
            v = measure.gathering.vectors(subject, j)
            slope = sum((a * b).sum() for a, b in zip(g, v, strict=True))
            h = torch.autograd.grad(slope, weights, retain_graph=True, materialize_grads=True)
            total += float(flat(h) @ flat(v)) / measure.num_probes
    return total / len(rows)


@pytest.mark.parametrize("frobenius", [False, True])
def test_an_example_with_a_gradient_but_no_second_derivative_is_left_out(frobenius: bool) -> None:
    """|f|^1.5 at f = 0 has gradient 0 and no Hessian."""

    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["x"])[:, 0].abs() ** 1.5

    x = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[4] = 0.0
    torch.manual_seed(1)
    net = nn.Linear(3, 1, bias=False).double().eval()
    task = ModelAtHand(net, {"x": x, "label": torch.zeros(9, dtype=torch.int64)}, losses)
    measure = gs.Curvature(3, frobenius=frobenius)
    found = measured(task, measure, 9, 9)["trace_sample", "all"]
    exact = hessian_trace(task, [0, 1, 2, 3, 5, 6, 7, 8], measure)
    assert (found.n, found.value) == (8, pytest.approx(exact, rel=1e-10))


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


def test_what_is_refused() -> None:
    with pytest.raises(GradscaleError, match="num_probes must be at least 1, got 0"):
        gs.Curvature(0)
    with pytest.raises(GradscaleError, match="probes must be one of rademacher, gaussian, got 'cauchy'"):
        gs.Curvature(probes="cauchy")
    torch.manual_seed(0)
    tensors = {"x": torch.randn(3, 2).double(), "label": torch.zeros(3, dtype=torch.int64)}
    once = ModelAtHand(nn.Linear(2, 1).double(), tensors, lambda m, b: OnceOnly.apply(m(b["x"])[:, 0]))
    says = r"losses must be twice differentiable for the measure curvature, got .*once_differentiable"
    with pytest.raises(GradscaleError, match=says):
        measured(once, gs.Curvature(1), 3, 3)


def test_errors_of_the_model_are_not_taken_for_that() -> None:
    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if torch.backends.cuda.flash_sdp_enabled():
            return model(batch["x"])[:, 0].square()
        raise RuntimeError("something else")

    tensors = {"x": torch.ones(3, 2).double(), "label": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(RuntimeError, match="something else"):
        measured(ModelAtHand(nn.Linear(2, 1).double(), tensors, losses), gs.Curvature(1), 3, 3)


def test_from_the_command_line() -> None:
    text = "curvature:num_probes=4:probes=gaussian:frobenius"
    assert parse_measures(text) == (gs.Curvature(4, "gaussian", frobenius=True),)


def test_half_precision_adds_up_in_float64() -> None:
    """bf16 weights and products: within bf16's rounding of the same in float64, whose weights are the rounded ones."""

    class Half(Regression):
        def model(self, checkpoint: str | None) -> nn.Module:
            return super().model(checkpoint).bfloat16()

        def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            x = batch["x"].to(next(model.parameters()).dtype)
            return (model(x)[:, 0].float() - batch["x"].sum(dim=1).float()).square() / 2

    class Wide(Half):
        def model(self, checkpoint: str | None) -> nn.Module:
            return super().model(checkpoint).double()

    exact = measured(Wide(rows=12), gs.Curvature(8), 6, 6)["trace_sample", "all"].value
    found = measured(Half(rows=12), gs.Curvature(8), 6, 6)["trace_sample", "all"].value
    assert found == pytest.approx(exact, rel=0.03)
    assert found != exact


# --- standard errors --------------------------------------------------------------------------------------------------

RUNS, P, N = 240, 10, 8
SCALES = np.linspace(0.4, 1.6, P)


def quadratic_forms(x: Array, V: Array) -> Array:
    """v_j^T H_i v_j with H_i = x_i x_i^T: [n, N]."""
    return np.square(x @ V.T)


@pytest.mark.parametrize(
    ("blocks", "size", "probes"), [(24, 4, 24), (24, 1, 24), (40, 200, 12), (24, 2, 200)],
    ids=["both", "own", "probes", "examples"],
)  # fmt: skip
def test_the_errors_of_the_trace_are_honest(blocks: int, size: int, probes: int) -> None:
    """Where examples, probes or what each pair has of its own make most of the noise. Examples and probes anew."""
    generator = np.random.default_rng(5)
    truth = float((SCALES**2).sum())
    scores: dict[str, list[float]] = {"trace": [], "trace_sample": []}
    for _ in range(RUNS):
        x = SCALES * generator.standard_normal((blocks * size, P))
        V = generator.choice([-1.0, 1.0], (probes, P))
        sums = quadratic_forms(x, V).reshape(blocks, size, probes).sum(axis=1)
        counts = torch.full((blocks,), float(size), dtype=torch.float64)
        found = trace_of([total_of(torch.from_numpy(row)[None]) for row in sums], counts)
        scores["trace"].append((found.value - truth) / found.over_both)
        scores["trace_sample"].append((found.value - np.square(x).sum() / len(x)) / found.over_probes)
    freedom = {"trace": min(blocks, probes) - 1, "trace_sample": probes - 1}
    for name, parts in scores.items():
        assert_honest(parts, freedom[name])


def test_the_errors_of_a_run_are_honest() -> None:
    """The same by the code of a run, with the probes' own seeds."""
    at, scale = tuple(np.linspace(-1, 1, 6)), np.linspace(0.5, 2, 6)  # the scale of the columns of x in Squares
    scores = []
    for seed in range(200):
        measure = gs.Curvature(N, seed=seed)
        subject, totals, counts = prepare(Squares(24, at, at, seed), None, None), {}, {}
        for block in range(6):
            ids = range(4 * block, 4 * block + 4)
            gathered = measure.gathering.gather(subject, subject.examples.batch(ids), ids, torch.ones(4) > 0)
            totals |= {f"{block:04d}|{name}": total for name, total in gathered.totals.items()}
            counts[f"{block:04d}"] = gathered.counts
        found = measure.compute(CurvatureState(totals, counts, {}))["trace", "all"]
        scores.append(float((found.value - (scale**2).sum()) / found.stderr))
    assert_honest(scores, 5)


def test_halves_take_the_noise_of_the_data_out_and_the_two_lengths_lie_on_either_side() -> None:
    """H_i = x_i x_i^T of 60 examples, E H_i diagonal: |H|_F^2 of a sample is too large by tr Cov / n, by halves not."""
    generator, n = np.random.default_rng(2), 60
    H = np.diag(SCALES**2)
    truth, found, scores = float((H**2).sum()), [], []
    V = generator.standard_normal((4000, P))
    width = float(np.linalg.norm(V @ H, axis=1).mean())
    for _ in range(300):
        x = SCALES * generator.standard_normal((n, P))
        halves = [part.T @ part for part in (x[::2], x[1::2])]
        probes = generator.standard_normal((16, P))
        products = {
            f"{half}|{j:04d}|w": torch.from_numpy(halves[half] @ probes[j]) for half in range(2) for j in range(16)
        }
        counts = {"0000": torch.tensor([n // 2, n // 2])}
        totals = {"0000|w": total_of(torch.from_numpy(quadratic_forms(x, probes)).sum(dim=0)[None])}
        estimates = gs.Curvature(16, "gaussian", frobenius=True).compute(CurvatureState(totals, counts, products))
        names = ("frobenius_sq", "frobenius_sample", "ellipsoid", "ellipsoid_sample")
        found.append([estimates[name, "all"].value for name in names])
        square = estimates["frobenius_sq", "all"]
        assert square.stderr is not None
        scores.append(float((square.value - 4 * (halves[0] * halves[1]).sum() / n**2) / square.stderr))
    assert_honest(scores, 15)
    columns = np.array(found).T
    mean, error = columns.mean(axis=1), columns.std(axis=1) / math.sqrt(300)
    assert abs(mean[0] - truth) < 4 * error[0]
    assert (columns[1] ** 2).mean() > truth + 4 * (columns[1] ** 2).std() / math.sqrt(300)
    assert mean[2] < width < mean[3]
    assert abs(mean[2] - width) < abs(mean[3] - width)


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("local_ray")
def test_workers_make_no_difference(tmp_path: Path) -> None:
    measures = [gs.Curvature(3, "gaussian", frobenius=True), gs.Coherence()]
    settings: dict[str, Any] = {"measures": measures, "microbatch": 3, "shard_size": 6}
    one, two = (
        gs.measure(Regression(rows=24, nan=5), str(tmp_path / str(workers)), workers=workers, **settings)
        for workers in (1, 2)
    )
    assert contents(one.path) == contents(two.path)
    frame = one.estimates()
    row = frame[(frame["measure"] == "curvature") & (frame["name"] == "trace") & (frame["scope"] == "all")].iloc[0]
    assert row["n"] == 23
    exact = hessian_trace(Regression(rows=24), [i for i in range(24) if i != 5], measures[0])
    assert row["value"] == pytest.approx(exact, rel=1e-10)


def test_merging_is_that_of_the_whole() -> None:
    """A block that two shards share, and shards in any order."""
    task, measure = LinearRegression(), gs.Curvature(2, frobenius=True)
    subject = prepare(task, None, None)
    parts = [
        run_shard(subject, range(start, stop), block, 3, [measure], None).states[measure]
        for start, stop, block in ((0, 3, 0), (3, 7, 0), (7, 13, 1))
    ]
    forward, backward = (measure.compute(reduce(measure.merge, order)) for order in (parts, parts[::-1]))
    for key, estimate in forward.items():
        assert estimate.value == pytest.approx(backward[key].value, rel=1e-12)
        assert estimate.stderr == pytest.approx(backward[key].stderr, rel=1e-9)
