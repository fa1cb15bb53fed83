"""Promise: every measure of a run is its formula on dense float64 derivatives, with its probes, for three problems.

The oracle shares no code with what it checks but the probes: gradients and Jacobians come from torch.func on one
example at a time, the formulas are written out in numpy. The problems: linear regression, the digits' transformer, and
a GPT-2 with tied embeddings.

Shapes: n examples, C outputs, P entries of all parameters, N probes or draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from oracle_problems import FewDigits, LinearRegression, SmallGPT2
from test_measure_laws import alpha, alpha_unbiased, busing, noise_scale, trace_covariance
from test_stiffness import cosines, expect_pairs
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn import functional as F

import gradscale as gs
from gradscale.measures.measure import Estimate, Measure, statistic_of
from gradscale.measures.outputs import output_signs
from gradscale.measures.perturbation import GaussianNoise
from gradscale.run.fold import statistics_of
from gradscale.run.shard import prepare, run_shard
from gradscale.sketches.gaussian import GaussianProbes
from gradscale.task import Task

Array = np.ndarray[Any, np.dtype[np.float64]]
Batch = Mapping[str, Tensor]
MICROBATCH, SHARD = 4, 5  # shards of microbatches of unequal sizes; a shard is a jackknife block


PROBLEMS: dict[str, Any] = {"linear": LinearRegression(), "digits": FewDigits(), "gpt2": SmallGPT2()}


# --- the oracle -------------------------------------------------------------------------------------------------------


class Dense(NamedTuple):
    """What torch.func gives of a problem, one example at a time."""

    layers: dict[str, slice]  # where each parameter lies among the P entries
    grads: Array  # [n, P]
    labels: Array  # [n]
    blocks: Array  # [n]

    def scopes(self) -> Iterator[tuple[str, slice]]:
        """All parameters, and each whose gradient is more than rounding: that of an attention's key bias is not."""
        yield "all", slice(None)
        for name, part in self.layers.items():
            if np.abs(self.grads[:, part]).max() > 1e-12:
                yield f"layer:{name}", part

    def norms(self) -> Array:
        return np.linalg.norm(self.grads, axis=1)

    def middle(self) -> float:
        """A norm that half of the examples are above, and none near."""
        norms = np.sort(self.norms())
        return float(norms[len(norms) // 2 - 1 : len(norms) // 2 + 1].mean())


class Called(nn.Module):
    """A function of the model and the batch as a module's forward, for `functional_call`."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Batch], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch: Batch) -> Tensor:
        return self.function(self.model, batch)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def at(model: nn.Module, function: Callable[[nn.Module, Batch], Tensor], weights: dict[str, Tensor], row: Batch) -> Any:
    """`function` of a single example at `weights`: [...]."""
    named = {f"model.{name}": tensor for name, tensor in weights.items()}
    return functional_call(Called(model, function), named, (row,))[0]


def rows_of(task: Any) -> list[Batch]:
    examples = task.examples()
    return [examples.batch(range(i, i + 1)) for i in range(len(examples))]


def gradients_at(task: Any, model: nn.Module, weights: dict[str, Tensor]) -> Array:
    """[n, P]"""
    found = [grad(lambda w, row=row: at(model, task.losses, w, row))(weights) for row in rows_of(task)]
    return torch.stack([torch.cat([g[name].flatten() for name in weights]) for g in found]).detach().numpy()


def losses_at(task: Any, model: nn.Module, weights: dict[str, Tensor]) -> Array:
    """[n]"""
    with torch.no_grad():
        return np.array([float(at(model, task.losses, weights, row)) for row in rows_of(task)])


@cache
def dense(problem: str) -> Dense:
    task = PROBLEMS[problem]
    model = task.model(None)
    weights, layers, start = weights_of(model), {}, 0
    for name, tensor in weights.items():
        layers[name] = slice(start, start + tensor.numel())
        start += tensor.numel()
    n = len(task.examples())
    labels = task.labels(task.examples().batch(range(n))).numpy()
    return Dense(layers, gradients_at(task, model, weights), labels, np.arange(n) // SHARD)


@cache
def jacobians(problem: str) -> Array:
    """[n, C, P]"""
    task = PROBLEMS[problem]
    model = task.model(None)
    weights = weights_of(model)
    found = [jacrev(lambda w, row=row: at(model, task.outputs, w, row), chunk_size=1)(weights) for row in rows_of(task)]
    return torch.stack([torch.cat([j[name].flatten(1) for name in weights], dim=1) for j in found]).detach().numpy()


@cache
def input_jacobians(problem: str) -> Array:
    """[n, C, D]"""
    task = PROBLEMS[problem]
    model = task.model(None)
    found = []
    for row in rows_of(task):
        point = task.inputs(model, row).detach()
        found.append(jacrev(lambda x, row=row: task.outputs_of(model, x, row)[0], chunk_size=1)(point).flatten(1))
    return torch.stack(found).detach().numpy()


def signs_of(n: int, C: int, N: int, seed: int) -> Array:
    """[n, N, C]: the signs that weigh an example's outputs."""
    like = torch.zeros(0, C, dtype=torch.float64)
    return torch.stack([output_signs(range(n), j, seed, like) for j in range(N)], dim=1).numpy()


def noise_of(problem: str, noise: GaussianNoise, draw: int) -> dict[str, Tensor]:
    model = PROBLEMS[problem].model(None)
    change = noise.of(draw)
    return {name: (p + change(name, p)).detach() for name, p in model.named_parameters()}


def flat(weights: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in weights.values()])


# --- the measures -----------------------------------------------------------------------------------------------------

SIGMA, RHO, WIDTHS, DRAWS = 0.05, 0.1, 9, 2


def measures_of(problem: str) -> dict[str, Measure]:
    return {
        "coherence": gs.Coherence(by_class=True, min_norm=dense(problem).middle()),
        "dispersion": gs.Dispersion(batch_size=4),
        "effective_gram": gs.EffectiveGram(),
        "stiffness": gs.Stiffness(by_class=True),
        "gaussian_width": gs.GaussianWidth(WIDTHS, seed=1),
        "featurizer": gs.FeaturizerWidth(WIDTHS, seed=2),
        "geometric_complexity": gs.GeometricComplexity(3, seed=3),
        "tangent_kernel": gs.TangentKernel(4, seed=4, alignment=True),
        "uncentred": gs.TangentKernel(3, seed=5, alignment=True, centred=False),
        "sensitivity": gs.Sensitivity(SIGMA, DRAWS, seed=6),
        "sharpness": gs.Sharpness(SIGMA, RHO, DRAWS, seed=7),
        "adaptive": gs.Sharpness(SIGMA, RHO, DRAWS, adaptive=True, seed=8),
    }


Found = Mapping[tuple[str, str], Estimate]


@cache
def found_of(problem: str) -> dict[str, Found]:
    """By the code of a run on one process, without its files."""
    task: Task = PROBLEMS[problem]
    subject, measures = prepare(task, None, None), measures_of(problem)
    statistics, n = statistics_of(list(measures.values())), len(subject.examples)
    states = {statistic: statistic.init() for statistic in statistics}
    for block, start in enumerate(range(0, n, SHARD)):
        ids = range(start, min(start + SHARD, n))
        here = run_shard(subject, ids, block, MICROBATCH, statistics, None).states
        states = {statistic: statistic.merge(state, here[statistic]) for statistic, state in states.items()}
    return {name: measure.compute(states[statistic_of(measure)]) for name, measure in measures.items()}


def expect(estimate: Estimate, value: float, stderr: float | None = math.nan, scale: float = 1e-3) -> None:
    """To rounding, against `scale` where a value cancels; its error too, if it is given, to that of sums of squares."""
    assert estimate.value == pytest.approx(value, rel=1e-8, abs=1e-8 * scale, nan_ok=True)
    if stderr is None:
        assert estimate.stderr is None
    elif not math.isnan(stderr):
        assert estimate.stderr == pytest.approx(stderr, rel=1e-6, abs=1e-8 * max(scale, abs(value)))


problems = pytest.mark.parametrize("problem", PROBLEMS)


@problems
def test_coherence(problem: str) -> None:
    d, found = dense(problem), found_of(problem)["coherence"]
    above = d.norms() > d.middle()
    for scope, part in d.scopes():
        g = d.grads[:, part]
        expect(found["alpha", scope], alpha(g), busing(alpha, g, d.blocks))
        expect(found["m_coherence", scope], len(g) * alpha(g), len(g) * busing(alpha, g, d.blocks))
        expect(found["alpha_unbiased", scope], alpha_unbiased(g), busing(alpha_unbiased, g, d.blocks))
        expect(found["alpha_above", scope], alpha(g[above]), busing(alpha, g[above], d.blocks[above]))
        assert (found["alpha", scope].n, found["alpha_above", scope].n) == (len(g), above.sum())
    for c in np.unique(d.labels):
        g, blocks = d.grads[d.labels == c], d.blocks[d.labels == c]
        expect(found["alpha", f"class:{c}"], alpha(g), busing(alpha, g, blocks))
        expect(found["m_coherence", f"class:{c}"], len(g) * alpha(g))
        expect(found["alpha_unbiased", f"class:{c}"], alpha_unbiased(g))
        assert found["alpha", f"class:{c}"].n == len(g)
    assert len(found) == 4 * (1 + len(d.layers)) + 3 * len(np.unique(d.labels))


@problems
def test_dispersion_and_the_perturbation(problem: str) -> None:
    d, everything = dense(problem), found_of(problem)
    found, perturbation = everything["dispersion"], everything["effective_gram"]
    n = len(d.grads)
    for scope, part in d.scopes():
        g = d.grads[:, part]
        trace, error = trace_covariance(g), busing(trace_covariance, g, d.blocks)
        expect(found["trace_covariance", scope], trace, error)
        expect(found["v_within", scope], trace / 4, error / 4)
        expect(found["noise_scale", scope], noise_scale(g), busing(noise_scale, g, d.blocks), scale=1.0)
        expect(perturbation["perturbation", scope], trace / n, error / n)
        left_out = [g[i] - np.delete(g, i, axis=0).mean(axis=0) for i in range(n)]
        expect(perturbation["perturbation", scope], sum(g[i] @ left_out[i] for i in range(n)) / n**2)


@problems
def test_stiffness(problem: str) -> None:
    """Every pair; sums of unit gradients are added in the wide type, float64 here."""
    d = dense(problem)
    expect_pairs(found_of(problem)["stiffness"], cosines(d.grads), d.labels, d.blocks)


@problems
def test_gaussian_width(problem: str) -> None:
    d, found = dense(problem), found_of(problem)["gaussian_width"]
    probes = GaussianProbes(WIDTHS, seed=1)
    v = np.concatenate([probes.materialize(name, (p.stop - p.start, 1)).double().numpy() for name, p in parts(d)])
    products = d.grads @ v
    expect_probes(found["width", "all"], (products - products.mean(axis=0)).max(axis=0))
    expect_probes(found["symmetrized", "all"], np.abs(products).max(axis=0))


def parts(d: Dense) -> list[tuple[str, slice]]:
    return list(d.layers.items())


def expect_probes(estimate: Estimate, values: Array) -> None:
    """A mean over probes and its error."""
    expect(estimate, values.mean(), values.std(ddof=1) / math.sqrt(len(values)))


@problems
def test_featurizer_width(problem: str) -> None:
    task, found = PROBLEMS[problem], found_of(problem)["featurizer"]
    model = task.model(None)
    with torch.no_grad():
        h = torch.cat([task.features(model, row) for row in rows_of(task)])
    products = (h @ GaussianProbes(WIDTHS, seed=2).materialize("features", (h.shape[1], 1)).double()).numpy()
    expect_probes(found["width", "all"], (products - products.mean(axis=0)).max(axis=0))
    expect_probes(found["symmetrized", "all"], np.abs(products).max(axis=0))


@problems
def test_geometric_complexity(problem: str) -> None:
    j, found = input_jacobians(problem), found_of(problem)["geometric_complexity"]
    n, C, _ = j.shape
    squares = np.square(np.einsum("icd,ivc->ivd", j, signs_of(n, C, 3, seed=3))).sum(axis=2)  # [n, N]
    each = squares.mean(axis=1)
    expect(found["gc", "all"], each.mean(), each.std(ddof=1) / math.sqrt(n))
    expect(found["gc_sample", "all"], each.mean(), math.sqrt((squares.var(axis=1, ddof=1) / 3).sum()) / n)
    exact = np.square(j).sum(axis=(1, 2)).mean()
    assert abs(each.mean() - exact) <= 5 * found["gc_sample", "all"].stderr


@problems
@pytest.mark.parametrize(("name", "N", "seed"), [("tangent_kernel", 4, 4), ("uncentred", 3, 5)])
def test_tangent_kernel(problem: str, name: str, N: int, seed: int) -> None:
    d, j, found = dense(problem), jacobians(problem), found_of(problem)[name]
    n, C, _ = j.shape
    signs, y, centred = signs_of(n, C, N, seed), targets_of(problem, C), name == "tangent_kernel"
    for scope, part in d.scopes():
        squares = np.square(np.einsum("icp,ivc->ivp", j[:, :, part], signs)).sum(axis=2)
        each = squares.mean(axis=1)
        expect(found["frobenius", scope], each.sum(), math.sqrt((squares.var(axis=1, ddof=1) / N).sum()))
        expect(found["trace", scope], each.mean(), each.std(ddof=1) / math.sqrt(n))
        phi, u, w = j[:, :, part], y, signs
        if centred:
            phi, u, w = phi - phi.mean(axis=0), u - u.mean(axis=0), w - w.mean(axis=0)
        if np.abs(phi).max() < 1e-12:  # one Jacobian for all examples
            assert math.isnan(found["alignment", scope].value)
            continue
        value, error = aligned(phi.reshape(n * C, -1), u.reshape(-1), w.transpose(1, 0, 2).reshape(N, -1))
        expect(found["alignment", scope], value, error)
        assert found["alignment", scope].n == n


def targets_of(problem: str, C: int) -> Array:
    """[n, C]"""
    task = PROBLEMS[problem]
    batch = task.examples().batch(range(len(task.examples())))
    given = task.targets(batch) if hasattr(task, "targets") else F.one_hot(batch["label"], C).double()
    return given.numpy()


def aligned(phi: Array, y: Array, probes: Array) -> tuple[float, float]:
    """y^T K y / (|K|_F |y|^2) with |K|_F^2 from probes [N, n C], and its delete-one-probe jackknife error."""
    kernel, u = phi @ phi.T, y / np.linalg.norm(y)
    w = probes - np.outer(probes @ u, u)
    quadratic = w @ kernel @ w.T

    def value(kept: Array) -> float:
        pairs = quadratic[np.ix_(kept, kept)][~np.eye(len(kept), dtype=bool)]
        square = (u @ kernel @ u) ** 2 + 2 * np.square(w[kept] @ kernel @ u).mean() + np.square(pairs).mean()
        return float(u @ kernel @ u / math.sqrt(square))

    everyone = np.arange(len(w))
    left_out = np.array([value(np.delete(everyone, j)) for j in everyone])
    return value(everyone), math.sqrt((len(w) - 1) * left_out.var())


@problems
def test_sensitivity(problem: str) -> None:
    task, found = PROBLEMS[problem], found_of(problem)["sensitivity"]
    model, noise = task.model(None), GaussianNoise(DRAWS, SIGMA, 6)
    weights, products, rises = weights_of(model), [], []
    g, losses = gradients_at(task, model, weights), losses_at(task, model, weights)
    for draw in range(DRAWS):
        there = noise_of(problem, noise, draw)
        changes = gradients_at(task, model, there) - g
        products.append(changes[::2].mean(axis=0) @ changes[1::2].mean(axis=0))
        rises.append(losses_at(task, model, there) - losses)
    expect_probes(found["gradient", "all"], np.array(products))
    expect_draws(found["value", "all"], np.array(rises).T)


def expect_draws(estimate: Estimate, values: Array) -> None:
    """A mean over examples and draws [n, N]: both are samples."""
    n, N = values.shape
    error = values.mean(axis=0).var(ddof=1) / N + values.mean(axis=1).var(ddof=1) / n
    expect(estimate, values.mean(), math.sqrt(error))


@problems
@pytest.mark.parametrize(("name", "seed"), [("sharpness", 7), ("adaptive", 8)])
def test_sharpness(problem: str, name: str, seed: int) -> None:
    task, found, d = PROBLEMS[problem], found_of(problem)[name], dense(problem)
    model, noise = task.model(None), GaussianNoise(DRAWS, SIGMA, seed, adaptive=name == "adaptive")
    weights = weights_of(model)
    losses = losses_at(task, model, weights)
    rises = [losses_at(task, model, noise_of(problem, noise, draw)) - losses for draw in range(DRAWS)]
    expect_draws(found["average", "all"], np.array(rises).T)
    ascents = []
    for start in (s + m for s in range(0, len(losses), SHARD) for m in range(0, SHARD, MICROBATCH)):
        ids = np.arange(start, min(start + MICROBATCH, start - start % SHARD + SHARD, len(losses)))
        if len(ids) < MICROBATCH:  # smaller ones are another definition
            continue
        g = torch.from_numpy(d.grads[ids].mean(axis=0))
        scale = flat(weights).abs() if name == "adaptive" else torch.ones_like(g)
        step = RHO * scale.square() * g / (scale * g).norm()
        there = {k: w + step[d.layers[k]].reshape(w.shape) for k, w in weights.items()}
        ascents.append((losses_at(task, model, there) - losses)[ids].mean())
    ascent = found["asam" if name == "adaptive" else "sam", "all"]
    expect_probes(ascent, np.array(ascents))
    assert ascent.n == len(ascents)
    expect(found["weight_norm", "all"], float(flat(weights).norm()), None)


def test_adaptive_noise_is_scaled_by_the_weights() -> None:
    """By hand: entry by entry that of |w|."""
    plain, adaptive = (GaussianNoise(1, SIGMA, 8, adaptive=flag).of(0) for flag in (False, True))
    parameter = nn.Parameter(torch.tensor([2.0, -3.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(adaptive("w", parameter), plain("w", parameter) * torch.tensor([2.0, 3.0, 0.0]).double())


# --- whole runs -------------------------------------------------------------------------------------------------------

WHOLE: Mapping[str, Mapping[str, Any]] = {
    "one": {"workers": 1, "microbatch": 4},
    "two": {"workers": 2, "microbatch": 4},
    "one, smaller": {"workers": 1, "microbatch": 3},
    "two, smaller": {"workers": 2, "microbatch": 3},
}


@pytest.fixture(scope="module")
def runs(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All measures together."""
    folder, measures = tmp_path_factory.mktemp("runs"), measures_of("linear")
    together = [measure for name, measure in measures.items() if name == measure.name]
    for name, settings in WHOLE.items():
        gs.measure(PROBLEMS["linear"], str(folder / name), measures=together, shard_size=SHARD, **settings)
    return {name: folder / name / "estimates.parquet" for name in WHOLE}


@pytest.mark.parametrize("size", ["", ", smaller"])
def test_the_number_of_workers_changes_no_bit_of_the_estimates(runs: dict[str, Path], size: str) -> None:
    assert runs[f"one{size}"].read_bytes() == runs[f"two{size}"].read_bytes()


def test_the_microbatch_size_changes_no_more_than_rounding(runs: dict[str, Path]) -> None:
    """But for `sam`, which is of microbatches by its definition."""
    index = ["measure", "name", "scope"]
    frames = [pd.read_parquet(runs[name]).set_index(index) for name in ("one", "one, smaller")]
    assert frames[0].index.equals(frames[1].index)
    kept = frames[0].index.get_level_values("name") != "sam"
    for column in ("value", "stderr"):
        ours, theirs = (frame.loc[kept, column].to_numpy() for frame in frames)
        np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-10)
    assert not np.isclose(*(frame.loc[~kept, "value"].iloc[0] for frame in frames))


def test_a_run_has_the_estimates_of_its_code_on_one_process(runs: dict[str, Path]) -> None:
    frame = pd.read_parquet(runs["two"]).set_index(["measure", "name", "scope"])
    for name, estimates in found_of("linear").items():
        if name in ("uncentred", "adaptive"):
            continue
        for key, estimate in estimates.items():
            assert frame.loc[(name, *key), "value"] == pytest.approx(estimate.value, rel=1e-8, abs=1e-10, nan_ok=True)
