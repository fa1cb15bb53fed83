"""Promise: what checkpoints say together is what the weights and gradients on the path say, with honest errors.

Shapes: T checkpoints, S steps, n examples, J jackknife blocks, P entries of the weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from test_measure_laws import TOY_Y, TOYS, Array, assert_honest, busing
from test_probing import measured
from torch import Tensor, nn

import gradscale as gs
from gradscale.errors import GradscaleError
from gradscale.measures.coherence import Coherence
from gradscale.measures.moments import Moments
from gradscale.measures.tangent_kernel import TangentKernel
from gradscale.run.plan import Plan
from gradscale.run.trajectory import FeatureNorms, SquaredNorm, _complexity, _Way
from gradscale.run.trajectory_domination import StepMoments, domination
from gradscale.store.files import Files
from gradscale.store.results import open_run
from gradscale.store.store import PLAN, Store
from gradscale.task import TensorExamples

N, RATE, EVERY, LAST = 96, 0.15, 10, 40


@dataclass(frozen=True)
class Line:
    """Regression by a line, from weights of one; rows drawn by `seed`."""

    seed: int = 0

    def model(self, checkpoint: str | None) -> nn.Module:
        model = nn.Linear(4, 1, bias=False).double().eval()
        nn.init.ones_(model.weight)
        if checkpoint is not None:
            model.load_state_dict(torch.load(checkpoint, weights_only=True))
        return model

    def examples(self) -> TensorExamples:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(N, 4, dtype=torch.float64, generator=generator) * torch.tensor([0.6, 1.0, 1.4, 2.0])
        return TensorExamples(x=x, y=x @ torch.tensor([0.2, -0.3, 0.5, 0.1], dtype=torch.float64))

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return (model(batch["x"])[:, 0] - batch["y"]).square() / 2

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["x"])


def descent() -> list[Array]:
    """[4] after every one of 40 steps of gradient descent."""
    tensors = Line().examples().tensors
    x, y, path = tensors["x"].numpy(), tensors["y"].numpy(), [np.ones(4)]
    for _ in range(LAST):
        path.append(path[-1] - RATE * x.T @ (x @ path[-1] - y) / N)
    return path


@pytest.fixture(scope="module")
def run(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> gs.Run:
    folder = tmp_path_factory.mktemp("path")
    paths = {}
    for step in range(0, LAST + 1, EVERY):
        paths[step] = str(folder / f"w{step}.pt")
        torch.save({"weight": torch.from_numpy(descent()[step])[None]}, paths[step])
    measures = [TangentKernel(4), Coherence()]
    settings: dict[str, Any] = {"shard_size": 16, "microbatch": 16, "workers": 1}
    gs.measure(Line(seed=7), str(folder / "held"), measures=measures, checkpoints=paths, **settings)
    return gs.measure(Line(), str(folder / "run"), measures=measures, checkpoints=paths, **settings)


# --- path complexity --------------------------------------------------------------------------------------------------


def test_of_a_linear_model_it_is_the_length_of_the_path_by_the_norm_of_the_inputs(run: gs.Run) -> None:
    """|Phi|_F^2 = sum |x_i|^2 at all weights; without lengths the way is that from checkpoint to checkpoint."""
    path, root = descent(), math.sqrt(float(Line().examples().tensors["x"].square().sum()))
    coarse = sum(np.linalg.norm(b - a) for a, b in zip(path[:-EVERY:EVERY], path[EVERY::EVERY], strict=True))
    steps = [(s, float(np.linalg.norm(path[s + 1] - path[s]))) for s in range(LAST)]
    length = sum(moved for _, moved in steps)
    assert coarse < 0.99 * length
    for interpolation in ("trapezoid", "step"):
        found = gs.path_complexity(run, interpolation=interpolation)
        assert found.length.value == pytest.approx(coarse, rel=1e-12)
        assert found.complexity.value == pytest.approx(coarse * root, rel=1e-12)
        assert found.complexity.stderr == pytest.approx(0.0, abs=1e-6 * root)
        assert (found.complexity.status, found.complexity.n) == ("heuristic", N)
        assert "lower bound of sum |delta w_t|" in found.complexity.definition
        logged = gs.path_complexity(run, lengths=pd.DataFrame(steps, columns=["step", "length"]))
        assert logged.complexity.value == pytest.approx(length * root, rel=1e-12)
        assert "logged |delta w_t| of every step" in logged.complexity.definition
    assert [(s.first, s.last) for s in found.stretches] == [(0, 10), (10, 20), (20, 30), (30, 40)]
    assert sum(s.complexity for s in found.stretches) == pytest.approx(found.complexity.value)
    extra = [(-1, 5.0), *steps[::-1], (LAST, 5.0)]  # in any order, with steps of before and after
    assert gs.path_complexity(run, lengths=extra).complexity.value == pytest.approx(length * root, rel=1e-12)
    assert gs.path_complexity(run, Line()).length.value == pytest.approx(coarse, rel=1e-12)


def test_weights_that_the_task_changes_in_place_are_compared_as_they_were(run: gs.Run) -> None:
    @dataclass(frozen=True)
    class OneModule(Line):
        net: nn.Module = dataclasses.field(default_factory=lambda: nn.Linear(4, 1, bias=False).double())

        def model(self, checkpoint: str | None) -> nn.Module:
            assert checkpoint is not None
            self.net.load_state_dict(torch.load(checkpoint, weights_only=True))
            return self.net

    assert gs.path_complexity(run, OneModule()).length == gs.path_complexity(run).length


def norms(values: Mapping[int, tuple[float, float]], n: int = 5) -> dict[int, FeatureNorms]:
    return {step: FeatureNorms(n, SquaredNorm(*value), {}) for step, value in values.items()}


def test_interpolation_is_linear_in_the_step_or_from_the_left(tmp_path: Path) -> None:
    """|Phi| 2, 4 and 3 at steps 0, 4 and 6: by the definition, step by step."""
    run = written(tmp_path, {0: (4.0, 0.4), 4: (16.0, 1.6), 6: (9.0, 0.6)})
    lengths = np.array([[s, 0.5 + s] for s in range(6)])
    phi = np.interp(range(6), [0, 4, 6], [2.0, 4.0, 3.0])
    linear = gs.path_complexity(run, lengths=lengths)
    assert linear.complexity.value == pytest.approx((phi * lengths[:, 1]).sum())
    left = gs.path_complexity(run, lengths=lengths, interpolation="step")
    assert left.complexity.value == pytest.approx((np.array([2, 2, 2, 2, 4, 4]) * lengths[:, 1]).sum())
    errors = np.array([0.1, 0.1, 0.1, 0.1, 0.2, 0.2])  # stderr / (2 |Phi|)
    assert left.complexity.stderr == pytest.approx((errors * lengths[:, 1]).sum())
    coarse = _complexity(norms({0: (4.0, 0.4), 4: (16.0, 1.6)}), [_Way(0, 4, 3.0, 1.5)], "x/y").complexity
    assert (coarse.value, coarse.stderr) == (pytest.approx(9.0), pytest.approx(0.45))


@dataclass(frozen=True)
class Mixed(Line):
    """f = M W x: |J^T v|^2 = |M^T v|^2 |x|^2 depends on the probe, and not on W."""

    mixing = torch.tensor([[1.0, 0.5], [0.9, 0.2], [0.3, -1.0]], dtype=torch.float64)

    def model(self, checkpoint: str | None) -> nn.Module:
        return nn.Linear(4, 2, bias=False).double().eval()

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return self.outputs(model, batch).square().sum(dim=1)

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["x"]) @ self.mixing.mT


def test_the_error_of_the_complexity_is_honest_where_probes_are_shared() -> None:
    """The same features at all checkpoints, hence the same error: then the stated bound is the error itself."""
    task, scores = Mixed(), []
    x = task.examples().tensors["x"]
    root = math.sqrt(float(x.square().sum() * task.mixing.square().sum()))
    for seed in range(220):
        found = measured(task, TangentKernel(4, seed), N, N)["frobenius", "all"]
        both = norms(dict.fromkeys((0, 1, 2), (found.value, float(found.stderr or math.nan))))
        c = _complexity(both, [_Way(0, 1, 2.0, 1.0), _Way(1, 2, 0.5, 0.0)], "x/y").complexity
        scores.append((c.value - 2.5 * root) / float(c.stderr or math.nan))
    assert_honest(scores, N)


def test_the_error_of_the_complexity_is_not_too_small_where_errors_are_independent() -> None:
    generator, inside = np.random.default_rng(0), []
    for _ in range(300):
        squares = 9 + 0.2 * generator.standard_normal(4)
        found = norms({t: (float(square), 0.2) for t, square in enumerate(squares)})
        c = _complexity(found, [_Way(t, t + 1, 1.0, 0.5) for t in range(3)], "x/y").complexity
        inside.append(abs(c.value - 9) <= float(c.stderr or 0))
    assert np.mean(inside) > 0.68


# --- Rademacher complexity --------------------------------------------------------------------------------------------


def test_the_bound_holds_the_supremum_and_is_its_formula() -> None:
    """(1/n) E_s m |A^-1 Phi^T s| over signs s, by all of them: below the bound, and near it."""
    generator, n, m = np.random.default_rng(0), 6, 0.7
    phi = {"a": generator.standard_normal((n, 3)), "b": 3 * generator.standard_normal((n, 2))}
    signs = np.array(np.meshgrid(*[[-1, 1]] * n)).reshape(n, -1).T
    layers = {name: SquaredNorm(float((part**2).sum()), 0.0) for name, part in phi.items()}
    features = FeatureNorms(n, SquaredNorm(sum(part.value for part in layers.values()), 0.0), layers)
    for a in (2.5, {"a": 0.5, "b": 4.0}):
        scales = {name: a if isinstance(a, float) else a[name] for name in phi}
        scaled = np.concatenate([part / scales[name] for name, part in phi.items()], axis=1)
        exact = m / n * np.linalg.norm(signs @ scaled, axis=1).mean()
        bound = gs.rademacher_bound({3: features}, {3: m}, {3: a})
        assert bound.value == pytest.approx(m / n * np.linalg.norm(scaled), rel=1e-12)
        assert 0.8 * bound.value < exact <= bound.value
        assert (bound.status, bound.n) == ("conditional", n)
    assert bound.definition == "rademacher_bound/A=by parameter/v1"


def test_with_the_identity_it_is_the_complexity_by_n(run: gs.Run) -> None:
    found = gs.path_complexity(run, interpolation="step")
    radii = {stretch.first: stretch.length for stretch in found.stretches}
    bound = gs.rademacher_bound(run, radii)
    assert bound.value == pytest.approx(found.complexity.value / N, rel=1e-12)
    half = gs.rademacher_bound(run, radii, {step: {"weight": 2.0} for step in radii})
    assert half.value == pytest.approx(bound.value / 2, rel=1e-9)


def test_its_error_adds_those_of_the_layers() -> None:
    layers = {"a": SquaredNorm(4.0, 0.4), "b": SquaredNorm(36.0, 1.2)}
    features = FeatureNorms(10, SquaredNorm(40.0, 1.0), layers)
    bound = gs.rademacher_bound({0: features}, {0: 5.0}, {0: {"a": 1.0, "b": 2.0}})
    assert bound.value == pytest.approx(0.5 * math.sqrt(4 + 9))
    assert bound.stderr == pytest.approx(0.5 * (0.4 + 0.3) / (2 * math.sqrt(13)))


# --- gradient domination ----------------------------------------------------------------------------------------------


def at_weights(x: Array, y: Array, path: Sequence[Array], blocks: int) -> list[StepMoments]:
    """Of half the squares of x w - y at every w, in equal blocks."""
    found = []
    for t, w in enumerate(path):
        apart = x @ w - y
        g = torch.from_numpy((apart[:, None] * x).reshape(blocks, -1, x.shape[1]))
        sums, counts = g.sum(dim=1), torch.full((blocks,), float(g.shape[1]), dtype=torch.float64)
        losses = torch.from_numpy((apart**2 / 2).reshape(blocks, -1).sum(axis=1))
        found.append(StepMoments(t, Moments(counts, g.square().sum(dim=(1, 2)), sums @ sums.mT), losses))
    return found


def test_of_a_run_they_are_those_of_the_dense_gradients(run: gs.Run) -> None:
    """Of the training run, and of another at the same weights as held-out examples, jackknife errors included."""
    held = open_run(run.path.rstrip("/").removesuffix("run") + "held")
    path = descent()[::EVERY]
    for found, task in ((gs.gradient_domination(run), Line()), (gs.gradient_domination(run, held), Line(seed=7))):
        x, y = (task.examples().tensors[name].numpy() for name in ("x", "y"))
        blocks = np.arange(N) * 6 // N

        def values(rows: Array, kind: str, alpha: float | None) -> float:
            g = [(rows[:, :4] @ w - rows[:, 4])[:, None] * rows[:, :4] for w in path]
            losses = np.array([((rows[:, :4] @ w - rows[:, 4]) ** 2 / 2).mean() for w in path])
            n = len(rows)
            off = np.array([((one @ one.T).sum() - (one**2).sum()) / (n * (n - 1)) for one in g])
            squares = off if kind == "unbiased" else np.array([(one.mean(0) ** 2).sum() for one in g])
            if alpha is None:
                return float(np.polyfit(np.log(squares) / 2, np.log(losses), 1)[0])
            return float((losses / squares ** (alpha / 2)).max())

        rows = np.concatenate([x, y[:, None]], axis=1)
        for kind in ("plug_in", "unbiased"):
            assert found.without_gradient == 0
            for alpha in (1.0, 1.5, 2.0):
                constant = found.constants[kind, alpha]
                assert constant.value == pytest.approx(values(rows, kind, alpha), rel=1e-9)
                assert (constant.status, constant.n) == ("conditional", N)
                exact = busing(lambda r, k=kind, a=alpha: values(r, k, a), rows, blocks)
                assert constant.stderr == pytest.approx(exact, rel=1e-6)
            assert found.slopes[kind].value == pytest.approx(values(rows, kind, None), rel=1e-9)
        assert [point.step for point in found.points] == [0, 10, 20, 30, 40]
    assert "held-out examples" in found.slopes["plug_in"].definition


def test_a_quadratic_has_exponent_two_and_half_the_inverse_of_its_least_eigenvalue() -> None:
    """math.md, section 2: 2.5 for 0.2. The path ends along the flattest direction; H is diag(1, 0.2)."""
    x, y = np.array([[math.sqrt(2), 0.0], [0.0, math.sqrt(0.4)]]), np.zeros(2)
    path = [np.array([0.0, 0.5**t]) for t in range(4)]
    found = domination(at_weights(x, y, path, 1), 0.0, [2.0], "own")
    assert found.constants["plug_in", 2.0].value == pytest.approx(2.5)
    assert found.slopes["plug_in"].value == pytest.approx(2.0)
    steeper = domination(at_weights(x, y, [np.array([1.0, 0.0]), np.array([0.3, 0.1]), path[1]], 1), 0.0, [2.0], "own")
    assert steeper.constants["plug_in", 2.0].value == pytest.approx(2.5)
    assert steeper.points[0].gap / steeper.points[0].plug_in == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["real", "random"])
def test_the_toy(kind: str) -> None:
    """math.md, section 12: 2 for both tables. The first step of descent leaves the steep direction of the real one."""
    x = -TOYS[kind] * TOY_Y[:, None]
    path = [np.array([0.3, -0.2, 0.5, 0.1, 0.4, 0.2])]
    for _ in range(8):
        path.append(path[-1] - 0.8 * x.T @ (x @ path[-1] - TOY_Y) / 4)
    found = domination(at_weights(x, TOY_Y, path, 1), 0.0, [2.0], "own")
    assert found.constants["plug_in", 2.0].value == pytest.approx(2.0, rel=1e-9)


def test_checkpoints_without_a_gradient_are_counted_and_left_out() -> None:
    """At the weights of least squares S = 0 and Q is not, nor is the loss: there the plug-in ratio has no end."""
    generator = np.random.default_rng(0)
    x, w = generator.standard_normal((40, 3)), np.array([1.0, -0.5, 0.2])
    y = x @ w + generator.standard_normal(40)
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    path = [best + scale * np.ones(3) for scale in (4.0, 2.0, 0.0, 1.0)]
    found = domination(at_weights(x, y, path, 4), 0.0, [1.0], "own")
    assert found.without_gradient == 1
    assert found.points[2].unbiased < 0
    ratios = [point.gap / math.sqrt(point.unbiased) for point in found.points if point.unbiased > 0]
    assert found.constants["unbiased", 1.0].value == pytest.approx(max(ratios))
    assert found.constants["plug_in", 1.0].value > 1e3
    fewer = domination(at_weights(x, y, [path[0], path[2], path[2]], 4), 0.0, [1.0], "own")
    assert math.isnan(fewer.slopes["unbiased"].value)
    assert fewer.without_gradient == 2


def test_blocks_that_are_not_finite_at_one_checkpoint_are_an_error() -> None:
    x = np.random.default_rng(0).standard_normal((12, 3))
    found = at_weights(x, np.ones(12), [scale * np.ones(3) for scale in (4.0, 2.0, 1.0)], 4)
    counts, squares, gram = found[1].moments
    fewer = Moments(counts[:3], squares[:3], gram[:3, :3])
    broken = [found[0], found[1]._replace(moments=fewer, losses=found[1].losses[:3]), found[2]]
    with pytest.raises(GradscaleError, match=r"must have finite examples in the same blocks, got \[4, 3, 4\] blocks"):
        domination(broken, 0.0, [1.0], "own")


def test_the_errors_of_slope_and_constant_are_honest() -> None:
    """Examples anew in 220 runs, the weights fixed; y = <x, w*> + noise, of which the optimum is half the variance."""
    J, n, P, noise = 20, 800, 3, 0.5
    generator, scale = np.random.default_rng(1), np.array([0.7, 1.0, 1.3])
    apart = [np.array(d) for d in ([2.0, 0.5, 0.3], [0.5, 1.0, 0.4], [0.3, 0.4, 0.6], [0.1, 0.3, 0.2])]
    gaps = np.array([(scale**2 * d**2).sum() / 2 for d in apart])
    squares = np.array([((scale**2 * d) ** 2).sum() for d in apart])
    truth = {"slope": np.polyfit(np.log(squares) / 2, np.log(gaps), 1)[0], "c": (gaps / squares).max()}
    scores: dict[str, list[float]] = {name: [] for name in truth}
    for _ in range(220):
        x = scale * generator.standard_normal((n, P))
        y = noise * generator.standard_normal(n)
        found = domination(at_weights(x, y, apart, J), noise**2 / 2, [2.0], "own")
        for name, estimate in (("slope", found.slopes["unbiased"]), ("c", found.constants["unbiased", 2.0])):
            scores[name].append((estimate.value - truth[name]) / float(estimate.stderr or math.nan))
    for parts in scores.values():
        assert_honest(parts, J - 1)


# --- what is refused --------------------------------------------------------------------------------------------------


def written(folder: Path, frobenius: Mapping[int, tuple[float, float]], **changes: Any) -> gs.Run:
    """A run of which there are a plan and estimates of the tangent kernel alone."""
    store = Store(Files(str(folder)))
    checkpoints = {str(step): {"path": None, "fingerprint": None} for step in frobenius}
    about: dict[str, Any] = dict(  # noqa: C408
        task="t", task_options={}, data_fingerprint="", params=None, excluded=[], labels=False, versions={}, seed=0
    )
    sizes = {"examples": 5, "shard_size": 5, "microbatch": 5, "threads_per_worker": 1, "device": "cpu"}
    kept = {"sketch": None, "sketch_dtype": None, "measures": {"tangent_kernel": {}}, "checkpoints": checkpoints}
    parameters = {"weight": {"shape": [1, 4], "dtype": "torch.float64"}}
    about = {**about, **sizes, **kept, "parameters": parameters, **changes}
    store.files.write(PLAN, Plan(**about).to_json().encode())
    store.write_estimates(
        (step, "tangent_kernel", "frobenius", scope, *value, 5, "estimator", "d", "u")
        for step, value in frobenius.items()
        for scope in ("all", "layer:weight")
    )
    return open_run(str(folder))


LENGTHS = [(0, 1.0), (1, 1.0)]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([1.0, 2.0], r"lengths must be a table of \(step, length\), \[S, 2\], got shape \(2,\)"),
        ([(0, 1.0)], "lengths must have every step from 0 to 1 once, got 1 rows for 2 steps; log"),
        ([*LENGTHS, (1, 1.0)], "lengths must have every step from 0 to 1 once, got 3 rows for 2 steps"),
        ([(0, 1.0), (1, -1.0)], "lengths must be finite and not negative, got -1.0; log"),
        ([(0, 1.0), (1, math.nan)], "lengths must be finite and not negative, got nan"),
    ],
)
def test_lengths_are_checked(lengths: Any, message: str, tmp_path: Path) -> None:
    run = written(tmp_path, {0: (1.0, 0.1), 2: (1.0, 0.1)})
    with pytest.raises(GradscaleError, match=message):
        gs.path_complexity(run, lengths=lengths)


def test_what_a_path_needs_is_said(tmp_path: Path, run: gs.Run) -> None:
    bare = written(tmp_path / "a", {0: (1.0, 0.1)}, measures={"sharpness": {}})
    with pytest.raises(GradscaleError, match="got sharpness; measure it again with --measures tangent_kernel"):
        gs.path_complexity(bare, lengths=LENGTHS)
    with pytest.raises(GradscaleError, match="got sharpness; measure it again with --measures coherence"):
        gs.gradient_domination(
            written(tmp_path / "b", dict.fromkeys((0, 1, 2), (1.0, 0.1)), measures={"sharpness": {}})
        )
    measures = {"coherence": {"by_class": True}}
    broken = written(tmp_path / "e", dict.fromkeys((0, 1, 2), (1.0, 0.1)), measures=measures)
    with pytest.raises(GradscaleError, match="must have all its shards at step 0, got some missing; run its command"):
        gs.gradient_domination(broken)
    two = written(tmp_path / "c", {0: (1.0, 0.1), 2: (1.0, 0.1)})
    with pytest.raises(GradscaleError, match="interpolation must be one of trapezoid, step, got 'cubic'"):
        gs.path_complexity(two, interpolation="cubic")
    with pytest.raises(GradscaleError, match=r"must have at least 3 checkpoints for a slope, got .0, 2.; measure more"):
        gs.gradient_domination(two)
    one = written(tmp_path / "d", {0: (1.0, 0.1)})
    with pytest.raises(GradscaleError, match=r"must have at least two measured checkpoints to be a path, got .0."):
        gs.path_complexity(one)
    with pytest.raises(GradscaleError, match=r"task.model must have the parameters that were measured, got none such"):
        gs.path_complexity(run, Mixed())
    with pytest.raises(
        GradscaleError, match=r"optimum must be at most every mean loss, got 100 and .* give a lower one"
    ):
        gs.gradient_domination(run, optimum=100.0)
    with pytest.raises(GradscaleError, match=r"alphas must be positive numbers, got \[0\]"):
        gs.gradient_domination(run, alphas=[0])


def test_a_checkpoint_that_has_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"weight": torch.ones(1, 4)}, path)
    there = {str(step): {"path": str(path), "fingerprint": "other"} for step in (0, 2)}
    run = written(tmp_path / "run", {0: (1.0, 0.1), 2: (1.0, 0.1)}, checkpoints=there)
    with pytest.raises(GradscaleError, match="must be as it was when it was measured, got other content; put it back"):
        gs.path_complexity(run, Line())


@pytest.mark.parametrize(
    ("radii", "preconditioners", "message"),
    [
        ({}, None, "radii must be given for steps among .0, 2., got .."),
        ({1: 1.0}, None, "radii must be given for steps among .0, 2., got .1."),
        ({0: -1.0}, None, "radii must be positive numbers, got .-1.0.; leave steps without one out"),
        ({0: 1.0}, {2: 1.0}, "preconditioners must be given for the steps of radii, .0., got .2.; give 1.0"),
        ({0: 1.0}, {0: 0.0}, "preconditioners must be positive numbers, got .0.0. at step 0"),
        ({0: 1.0}, {0: {"bias": 1.0}}, "must be given for every measured parameter, weight, got bias at step 0"),
    ],
)
def test_radii_and_preconditioners_are_checked(radii: Any, preconditioners: Any, message: str, tmp_path: Path) -> None:
    run = written(tmp_path, {0: (1.0, 0.1), 2: (1.0, 0.1)})
    with pytest.raises(GradscaleError, match=message):
        gs.rademacher_bound(run, radii, preconditioners)


def test_steps_of_other_numbers_of_examples_are_not_added() -> None:
    both = {**norms({0: (1.0, 0.1)}, n=5), **norms({1: (1.0, 0.1)}, n=4)}
    with pytest.raises(GradscaleError, match=r"all steps must have as many finite examples, got .4, 5."):
        gs.rademacher_bound(both, {0: 1.0, 1: 1.0})
