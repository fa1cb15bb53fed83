"""Promise: what probes the model beside its losses is what dense float64 derivatives give, within the stated errors.

Shapes: n examples, C outputs, P entries of all parameters, N probes or draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import contents
from test_before_a_run import run_command
from test_measure_laws import assert_honest
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

import gradscale as gs
from gradscale.errors import GradscaleError
from gradscale.measures.geometric_complexity import GeometricComplexity
from gradscale.measures.measure import Estimate
from gradscale.measures.perturbation import moved
from gradscale.measures.probe_means import means, means_of
from gradscale.measures.sensitivity import Sensitivity
from gradscale.measures.sharpness import Sharpness
from gradscale.measures.tangent_kernel import TangentKernel
from gradscale.run.shard import prepare, run_shard
from gradscale.task import Task, TensorExamples

CLASSES = 3


@dataclass(frozen=True)
class Problem:
    """A small float64 net on random rows, `linear` or `mlp`, with cross-entropy; row `nan` has NaN as its loss."""

    kind: str = "mlp"
    rows: int = 7
    scale: float = 1.0
    nan: int = -1

    def model(self, checkpoint: str | None) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            linear = nn.Linear(4, CLASSES, bias=False)
            mlp = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))
        return (linear if self.kind == "linear" else mlp).double().eval()

    def examples(self) -> TensorExamples:
        x = torch.randn(200, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))[: self.rows]
        return TensorExamples(x=self.scale * x, y=torch.arange(self.rows) % CLASSES, row=torch.arange(self.rows))

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        losses = F.cross_entropy(model(batch["x"] / self.scale), batch["y"], reduction="none")
        return losses * torch.where(batch["row"] == self.nan, torch.nan, 1.0)

    def labels(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["y"]

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return self.outputs_of(model, self.inputs(model, batch), batch)

    def inputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["x"]

    def outputs_of(self, model: nn.Module, inputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return model(inputs / self.scale)


@dataclass(frozen=True)
class ToyWithTargets:
    """The toy of `problems.Toy`, whose single output is fitted to y; `scores` its rows x_i instead, if given."""

    kind: str = "real"
    points: tuple[tuple[float, ...], ...] = ()

    def model(self, checkpoint: str | None) -> nn.Module:
        model = nn.Linear(len(self._x()[0]), 1, bias=False).double().eval()
        nn.init.zeros_(model.weight)
        return model

    def _x(self) -> Tensor:
        y = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        if self.points:
            return torch.tensor(self.points, dtype=torch.float64)
        last = y if self.kind == "real" else torch.zeros_like(y)
        return torch.cat([torch.eye(5, dtype=torch.float64)[:4], last[:, None]], dim=1)

    def examples(self) -> TensorExamples:
        return TensorExamples(x=self._x(), y=torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64))

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return (model(batch["x"])[:, 0] - batch["y"]).square() / 2

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["x"])

    def targets(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["y"][:, None]


class Without:
    """A task without some of its methods."""

    def __init__(self, task: Any, *names: str) -> None:
        self._task, self._names = task, names

    def __reduce__(self) -> Any:
        return Without, (self._task, *self._names)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in self._names:
            raise AttributeError(name)
        return getattr(self._task, name)


def measured(task: Task, measure: Any, size: int = 3, shard: int = 6) -> dict[tuple[str, str], Estimate]:
    """By the code of a run, without its files."""
    subject = prepare(task, None, None)
    state, n = measure.init(), len(subject.examples)
    for start in range(0, n, shard):
        ids = range(start, min(start + shard, n))
        state = measure.merge(state, run_shard(subject, ids, 0, size, [measure], None).states[measure])
    return dict(measure.compute(state))


def agrees(estimate: Estimate, exact: float) -> None:
    """Within four standard errors."""
    assert estimate.stderr is not None
    assert abs(estimate.value - exact) <= 4 * estimate.stderr + 1e-12


def input_jacobians(task: Any) -> list[Tensor]:
    """[C, ...] of every example: the oracle, by reverse mode on batches of one."""
    model, examples = task.model(None), task.examples()
    found = []
    for i in range(len(examples)):
        batch = examples.batch(range(i, i + 1))
        point = task.inputs(model, batch).detach()
        found.append(jacrev(lambda x, batch=batch: task.outputs_of(model, x, batch)[0], chunk_size=1)(point).detach())
    return found


def jacobians(task: Any) -> dict[str, Tensor]:
    """[n, C, P] of every parameter."""
    model = task.model(None).double()
    examples = task.examples()
    batch = examples.batch(range(len(examples)))
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def scores(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(_Scores(task, model), {f"model.{k}": v for k, v in weights.items()}, (batch,))

    return {name: j.detach().flatten(2) for name, j in jacrev(scores, chunk_size=1)(weights).items()}


class _Scores(nn.Module):
    def __init__(self, task: Any, model: nn.Module) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        scores: Tensor = self.task.outputs(self.model, batch)
        return scores


# --- geometric complexity ---------------------------------------------------------------------------------------------


def exact_complexity(task: Any) -> float:
    return float(np.mean([float(j.double().square().sum()) for j in input_jacobians(task)]))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_geometric_complexity_is_the_mean_squared_jacobian(kind: str) -> None:
    task = Problem(kind)
    found = measured(task, GeometricComplexity(400))
    exact = exact_complexity(task)
    agrees(found["gc_sample", "all"], exact)
    assert found["gc_sample", "all"].stderr == pytest.approx(0, abs=0.05 * exact)
    assert found["gc", "all"].value == found["gc_sample", "all"].value
    if kind == "linear":
        assert exact == pytest.approx(float(task.model(None).weight.detach().square().sum()))
    else:
        each = [float(j.square().sum()) for j in input_jacobians(task)]
        spread = np.std(each, ddof=1) / math.sqrt(len(each))
        assert found["gc", "all"].stderr == pytest.approx(spread, rel=0.15)


def test_a_single_output_has_no_probe_noise_and_scaled_inputs_scale_it() -> None:
    @dataclass(frozen=True)
    class First(Problem):
        def outputs_of(self, model: nn.Module, inputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
            return model(inputs / self.scale)[:, :1]

    for scale in (1.0, 4.0):
        task = First(scale=scale)
        found = measured(task, GeometricComplexity(2))["gc_sample", "all"]
        assert found.value == pytest.approx(exact_complexity(First()) / scale**2)
        assert found.stderr == pytest.approx(0, abs=1e-12)


def test_geometric_complexity_has_the_same_bits_however_the_data_are_cut() -> None:
    found = [measured(Problem(), GeometricComplexity(3), 2, shard) for shard in (2, 4, 8)]
    assert found[0] == found[1] == found[2]


def test_probes_belong_to_examples() -> None:
    """An example's rows are the same in any batch, up to rounding, and those of N probes the first of more."""
    subject = prepare(Problem(), None, None)
    batch, observation = subject.examples.batch(range(7)), GeometricComplexity(5, seed=2).observation
    whole = observation.observe(subject, batch, range(7))
    part = observation.observe(subject, subject.examples.batch(range(3, 6)), range(3, 6))
    torch.testing.assert_close(part, whole[3:6])
    torch.testing.assert_close(
        GeometricComplexity(2, seed=2).observation.observe(subject, batch, range(7)), whole[:, :2]
    )
    assert not torch.allclose(GeometricComplexity(5, seed=3).observation.observe(subject, batch, range(7)), whole)


def test_the_variance_of_a_probe_is_hutchinsons() -> None:
    subject = prepare(Problem(rows=1), None, None)
    values = GeometricComplexity(4000).observation.observe(subject, subject.examples.batch(range(1)), range(1))[0]
    (j,) = input_jacobians(Problem(rows=1))
    gram = j.flatten(1) @ j.flatten(1).mT
    exact = 2 * float(gram.square().sum() - gram.diagonal().square().sum())
    assert float(values.var()) == pytest.approx(exact, rel=0.1)


def test_examples_that_are_not_finite_are_left_out() -> None:
    with_nan, without = (
        measured(Problem(nan=6), GeometricComplexity(3)),
        measured(Problem(rows=6), GeometricComplexity(3)),
    )
    assert with_nan["gc", "all"].n == 6
    assert with_nan["gc", "all"].value == pytest.approx(without["gc", "all"].value)


SEEDS = 200


@pytest.mark.parametrize(("measure", "name"), [(GeometricComplexity, "gc_sample"), (TangentKernel, "frobenius")])
def test_errors_over_probes_are_honest(measure: Callable[..., Any], name: str) -> None:
    task: Task = Problem(rows=12)
    exact = exact_complexity(task) if name == "gc_sample" else exact_frobenius(task)["all"]
    scores = []
    for seed in range(SEEDS):
        estimate = measured(task, measure(6, seed), 12, 12)[name, "all"]
        assert estimate.stderr is not None
        scores.append((estimate.value - exact) / estimate.stderr)
    assert_honest(scores, 12 * 5)


def test_errors_over_examples_are_honest() -> None:
    """Of samples of a population of 200 examples, with one probe each, whose noise is in them."""
    population = Problem(rows=200)
    subject, exact = prepare(population, None, None), exact_complexity(population)
    batch, generator, scores = subject.examples.batch(range(200)), np.random.default_rng(0), []
    observations = [GeometricComplexity(1, seed).observation for seed in range(20)]
    values = torch.cat([observation.observe(subject, batch, range(200)) for observation in observations], dim=1)
    for _ in range(SEEDS):
        rows, seeds = torch.from_numpy(generator.integers(0, (200, 20), (60, 2))).unbind(dim=1)
        mean, error, *_ = means(means_of(values[rows, seeds][:, None]), 1)
        scores.append((mean - exact) / error)
    assert_honest(scores, 59)


# --- tangent kernel ---------------------------------------------------------------------------------------------------


def exact_frobenius(task: Any) -> dict[str, float]:
    layers = {f"layer:{name}": float(j.square().sum()) for name, j in jacobians(task).items()}
    return {"all": sum(layers.values()), **layers}


def exact_alignment(task: Any, y: Tensor, centred: bool) -> dict[str, float]:
    """By the dense kernels; y is [n, C]."""
    found = {}
    parts = {f"layer:{name}": j for name, j in jacobians(task).items()}
    for scope, j in {"all": torch.cat(list(parts.values()), dim=2), **parts}.items():
        phi, target = (j - j.mean(dim=0), y - y.mean(dim=0)) if centred else (j, y)
        kernel = phi.flatten(0, 1) @ phi.flatten(0, 1).mT
        u = target.flatten()
        found[scope] = float(u @ kernel @ u / (kernel.norm() * u.square().sum()))
    return found


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_trace_of_the_tangent_kernel_is_that_of_dense_jacobians(kind: str) -> None:
    task = Problem(kind)
    found = measured(task, TangentKernel(150))
    exact = exact_frobenius(task)
    assert {scope for _, scope in found} == set(exact)
    for scope, value in exact.items():
        agrees(found["frobenius", scope], value)
        assert found["trace", scope].value == pytest.approx(found["frobenius", scope].value / 7)
    if kind == "linear":
        x = task.examples().tensors["x"]
        assert exact["all"] == pytest.approx(CLASSES * float(x.square().sum()))
        assert found["frobenius", "all"].value == pytest.approx(exact["all"])  # v'f = sum_c v_c <w_c, x>: no noise


def test_the_trace_of_a_linear_model_with_one_output_is_the_sum_of_squares() -> None:
    for kind, exact in (("real", 8.0), ("random", 4.0)):
        found = measured(ToyWithTargets(kind), TangentKernel(2))["frobenius", "all"]
        assert found.value == pytest.approx(exact)
        assert found.stderr == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_alignment_is_that_of_dense_kernels(kind: str, centred: bool) -> None:
    task = Problem(kind)
    found = measured(task, TangentKernel(100, alignment=True, centred=centred))
    y = F.one_hot(task.examples().tensors["y"], CLASSES).double()
    for scope, value in exact_alignment(task, y, centred).items():
        estimate = found["alignment", scope]
        if centred and scope == "layer:2.bias":  # the same Jacobian for all: nothing is left of it
            assert math.isnan(estimate.value)
            continue
        agrees(estimate, value)
        assert estimate.stderr == pytest.approx(0, abs=0.05)
        assert estimate.definition.endswith("/centred/v1" if centred else "/uncentred/v1")


@pytest.mark.parametrize("centred", [False, True])
def test_a_parameter_that_the_outputs_do_not_depend_on_has_no_alignment(centred: bool) -> None:
    """Softmax does not see what is added to all keys' scores: the gradient of their bias is rounding."""
    found = measured(First(digits(), 6), TangentKernel(3, alignment=True, centred=centred), 3, 3)
    values = {scope: estimate.value for (name, scope), estimate in found.items() if name == "alignment"}
    keys = {scope for scope in values if scope.endswith("key.bias")}
    assert keys
    assert all(math.isnan(values[scope]) for scope in keys)
    assert not any(math.isnan(value) for scope, value in values.items() if scope.endswith("key.weight"))


@pytest.mark.parametrize(("kind", "exact"), [("real", 0.944911), ("random", 0.5)])
def test_known_alignments_of_the_toy(kind: str, exact: float) -> None:
    found = measured(ToyWithTargets(kind), TangentKernel(150, alignment=True, centred=False))["alignment", "all"]
    assert abs(found.value - exact) < 4 * found.stderr + 1e-6
    assert found.stderr < 0.06


def test_a_kernel_along_the_targets_has_alignment_one_without_error() -> None:
    task = ToyWithTargets(points=((1.0,), (-1.0,), (1.0,), (-1.0,)))
    for centred in (False, True):
        found = measured(task, TangentKernel(4, alignment=True, centred=centred))["alignment", "all"]
        assert found.value == pytest.approx(1)
        assert found.stderr == pytest.approx(0, abs=1e-7)


def test_the_identity_kernel_has_alignment_one_over_root_n() -> None:
    task = ToyWithTargets(points=tuple(map(tuple, torch.eye(4).tolist())))
    found = measured(task, TangentKernel(150, alignment=True, centred=False))["alignment", "all"]
    assert abs(found.value - 0.5) < 4 * found.stderr


def test_the_square_of_the_kernels_norm_is_without_bias() -> None:
    """1 / alignment^2 = |K|_F^2 / (u'Ku)^2 has no bias, whatever the number of probes."""
    task = Problem(rows=5)
    y = F.one_hot(task.examples().tensors["y"], CLASSES).double()
    exact = exact_alignment(task, y, True)["all"] ** -2
    found = [measured(task, TangentKernel(2, seed, alignment=True), 5, 5)["alignment", "all"] for seed in range(200)]
    values = np.array([estimate.value**-2.0 for estimate in found])
    assert abs(values.mean() - exact) < 4 * values.std(ddof=1) / math.sqrt(len(values))
    assert all(math.isnan(estimate.stderr) for estimate in found if estimate.stderr is not None)


def test_alignment_does_not_depend_on_how_the_data_are_cut() -> None:
    measure = TangentKernel(4, alignment=True)
    whole = measured(Problem(), measure, 2, 8)
    for shard in (2, 4):
        cut = measured(Problem(), measure, 2, shard)
        for key, estimate in whole.items():
            assert cut[key].value == pytest.approx(estimate.value, rel=1e-12, nan_ok=True)
            assert key[0] == "alignment" or cut[key] == estimate  # bit for bit


def test_tangents_leave_out_examples_that_are_not_finite() -> None:
    measure = TangentKernel(4, alignment=True)
    with_nan, without = measured(Problem(nan=6), measure), measured(Problem(rows=6), measure)
    for key, estimate in without.items():
        assert with_nan[key].value == pytest.approx(estimate.value, rel=1e-12, nan_ok=True)
        assert with_nan[key].n == estimate.n == 6


# --- ready tasks ------------------------------------------------------------------------------------------------------


@cache
def digits() -> Any:
    from gradscale.tasks.digits import Digits

    return Digits(width=8, depth=1)


@dataclass(frozen=True)
class First:
    """The first examples of a task in float64."""

    task: Any
    rows: int

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.task, name)

    def model(self, checkpoint: str | None) -> nn.Module:
        model: nn.Module = self.task.model(checkpoint)
        return model.double()

    def examples(self) -> TensorExamples:
        batch = self.task.examples().batch(range(self.rows))
        return TensorExamples(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()})


def test_digits() -> None:
    task = First(digits(), 4)
    agrees(measured(task, GeometricComplexity(100), 2)["gc_sample", "all"], exact_complexity(task))
    found = measured(task, TangentKernel(25), 4)
    for scope, exact in exact_frobenius(task).items():
        agrees(found["frobenius", scope], exact)


IDS = [[1, 2, 3, 4], [6, 7, 8], [3, 1]]


def write_model(folder: Path, config: Any, columns: Mapping[str, Any]) -> tuple[str, str]:
    """A config.json and a Parquet file: their paths, data first."""
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), folder / "x.parquet")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return str(folder / "x.parquet"), str(folder / "config.json")


def gpt2(**changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 8, "vocab_size": 12}
    return transformers.GPT2Config(**(sizes | {"bos_token_id": 0, "eos_token_id": 0} | changes))


def test_a_tiny_gpt2(tmp_path: Path) -> None:
    from gradscale.tasks.causal_lm import CausalLM

    task = First(CausalLM(*write_model(tmp_path, gpt2(), {"input_ids": IDS}), dtype="float64"), 3)
    batch = task.examples().batch(range(3))
    model = task.model(None)
    assert task.outputs(model, batch).shape == (3, 3 * 12)
    assert not task.outputs(model, batch)[2, 12:].any()  # two tokens: one is predicted
    torch.testing.assert_close(task.outputs_of(model, task.inputs(model, batch), batch), task.outputs(model, batch))
    agrees(measured(task, GeometricComplexity(100), 3)["gc_sample", "all"], exact_complexity(task))
    found = measured(task, TangentKernel(25), 3)
    for scope, exact in exact_frobenius(task).items():
        agrees(found["frobenius", scope], exact)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "vit"])
def test_classifiers_are_the_same_function_of_their_inputs(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from gradscale.tasks.classification import Classification

    small = {
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "num_labels": 3,
    }
    columns: dict[str, Any] = {"input_ids": IDS, "label": [0, 2, 1]}
    if kind == "vit":
        config = transformers.ViTConfig(**small, image_size=4, patch_size=2, num_channels=1)
        columns = {"pixel_values": torch.randn(3, 16).tolist(), "label": [0, 2, 1]}
    else:
        bert = transformers.BertConfig(**small, vocab_size=12, max_position_embeddings=8)
        config = bert if kind == "bert" else gpt2(num_labels=3)
    task = First(Classification(*write_model(tmp_path, config, columns), dtype="float64"), 3)
    model, batch = task.model(None), task.examples().batch(range(3))
    points = task.inputs(model, batch)
    torch.testing.assert_close(task.outputs_of(model, points, batch), task.outputs(model, batch), rtol=0, atol=0)
    assert not torch.allclose(task.outputs_of(model, 2 * points, batch), task.outputs(model, batch))
    agrees(measured(task, GeometricComplexity(60), 3)["gc_sample", "all"], exact_complexity(task))


# --- noise on the weights ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quadratic:
    """Half the square of <w, x> - y: its Hessian is the mean of x x^T, for any half of the data."""

    rows: int = 40

    def model(self, checkpoint: str | None) -> nn.Module:
        model = nn.Linear(4, 1, bias=False).double().eval()
        nn.init.constant_(model.weight, 0.3)
        return model

    def examples(self) -> TensorExamples:
        x = torch.randn(self.rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return TensorExamples(x=x, y=x.sum(dim=1) / 2)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return (model(batch["x"])[:, 0] - batch["y"]).square() / 2


def hessian_of(x: Tensor) -> Tensor:
    return x.mT @ x / len(x)


def test_sensitivity_of_a_quadratic() -> None:
    sigma, task = 0.3, Quadratic()
    found = measured(task, Sensitivity(sigma, num_draws=400), 40, 40)
    x = task.examples().tensors["x"]
    exact = sigma**2 * float((hessian_of(x[::2]) * hessian_of(x[1::2])).sum())
    agrees(found["gradient", "all"], exact)
    assert found["gradient", "all"].stderr == pytest.approx(0, abs=0.1 * exact)
    agrees(found["value", "all"], sigma**2 * float(hessian_of(x).trace()) / 2)
    assert found["gradient", "all"].definition == "sensitivity/gradient/sigma=0.3/v1"


def test_the_gradient_sensitivity_is_the_product_of_the_halves_changes() -> None:
    """Draw by draw, from autograd at weights moved by hand."""
    measure, task = Sensitivity(0.1, num_draws=2, seed=5), Problem(rows=9)
    subject = prepare(task, None, None)
    products = []
    for draw in range(2):
        sums = []
        for half in range(2):
            rows = {name: tensor[half::2] for name, tensor in subject.examples.batch(range(9)).items()}
            before = flat_gradient(subject, rows)
            with moved(subject.parameters, measure.gathering.noise.of(draw)):
                sums.append(flat_gradient(subject, rows) - before)
        products.append(float(sums[0] @ sums[1]))
    found = measured(task, measure, 4, 4)["gradient", "all"]
    assert found.value == pytest.approx(np.mean(products), rel=1e-8)
    assert found.stderr == pytest.approx(np.std(products, ddof=1) / math.sqrt(2), rel=1e-8)


def flat_gradient(subject: Any, rows: Mapping[str, Tensor]) -> Tensor:
    loss = subject.task.losses(subject.model, rows).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(subject.parameters.values()))])


def test_sharpness_of_a_quadratic() -> None:
    sigma, rho, task = 0.3, 0.2, Quadratic()
    found = measured(task, Sharpness(sigma, rho, num_draws=400), 20, 40)
    x = task.examples().tensors["x"]
    agrees(found["average", "all"], sigma**2 * float(hessian_of(x).trace()) / 2)
    weight = torch.full((4,), 0.3, dtype=torch.float64)
    exact = []
    for part in x.split(20):
        g = hessian_of(part) @ (weight - 0.5)
        exact.append(float(rho * g.norm() + rho**2 * g @ hessian_of(part) @ g / (2 * g @ g)))
    sam = found["sam", "all"]
    assert (sam.value, sam.n, sam.definition) == (pytest.approx(np.mean(exact)), 2, "sharpness/sam/m=20/rho=0.2/v1")
    assert sam.stderr == pytest.approx(np.std(exact, ddof=1) / math.sqrt(2))
    assert found["weight_norm", "all"][:2] == (pytest.approx(0.6), None)
    adaptive = measured(task, Sharpness(sigma, rho, num_draws=400, adaptive=True), 20, 40)["average", "all"]
    agrees(adaptive, 0.3**2 * sigma**2 * float(hessian_of(x).trace()) / 2)


@pytest.mark.parametrize("measure", [Sharpness(num_draws=2), Sensitivity(num_draws=2)])
def test_weights_are_put_back_bit_for_bit(measure: Any) -> None:
    subject = prepare(digits(), None, None)
    before = {name: p.detach().clone() for name, p in subject.parameters.items()}
    run_shard(subject, range(6), 0, 3, [measure], None)
    with pytest.raises(ArithmeticError), moved(subject.parameters, lambda name, p: torch.ones_like(p)):
        raise ArithmeticError
    for name, parameter in subject.parameters.items():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad


@pytest.mark.parametrize("measure", [Sharpness(num_draws=3), Sensitivity(num_draws=3)])
def test_noise_is_the_same_however_the_data_are_cut(measure: Any) -> None:
    whole, cut = measured(Problem(), measure, 2, 8), measured(Problem(), measure, 2, 2)
    for key, estimate in whole.items():
        assert cut[key].value == pytest.approx(estimate.value, rel=1e-10)
        assert cut[key] == estimate or key[0] == "gradient"


# --- runs -------------------------------------------------------------------------------------------------------------

ALL = (
    GeometricComplexity(2),
    TangentKernel(3, alignment=True),
    Sensitivity(num_draws=2),
    Sharpness(num_draws=2),
)


@pytest.mark.usefixtures("local_ray")
def test_a_run_has_the_same_bits_for_one_worker_and_for_two(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"shard_size": 3, "microbatch": 2}
    runs = [tmp_path / f"{workers}" for workers in (1, 2)]
    for workers, path in enumerate(runs, start=1):
        found = gs.measure(Problem(rows=8), str(path), measures=[*ALL], workers=workers, **settings).estimates()
    assert contents(runs[0]) == contents(runs[1])
    assert set(found["measure"]) == {measure.name for measure in ALL}


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("missing", "measure", "message"),
    [
        ("inputs", GeometricComplexity(), r"needs task.inputs\(model, batch\) -> \[B, ...\], got a task without it"),
        ("outputs_of", GeometricComplexity(), r"needs task.outputs_of\(model, inputs, batch\)"),
        ("outputs", TangentKernel(), "leave the measure tangent_kernel out"),
        ("labels", TangentKernel(alignment=True), "or leave alignment out"),
    ],
)
def test_what_a_task_lacks_is_said_before_anything_is_measured(
    missing: str, measure: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(GradscaleError, match=message):
        gs.measure(Without(Problem(), missing), str(tmp_path / "run"), measures=[measure], workers=1)
    assert not (tmp_path / "run" / "rows").exists()


@dataclass(frozen=True)
class Wrong(Problem):
    fault: str = ""

    def inputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["y"] if self.fault == "ids" else batch["x"]

    def outputs_of(self, model: nn.Module, inputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        found = model(batch["x"] if self.fault == "ignored" else inputs)
        return found[:, None] if self.fault == "shape" else found.detach() if self.fault == "detached" else found

    def labels(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["y"] + (7 if self.fault == "labels" else 0)


@pytest.mark.parametrize(
    ("fault", "measure", "message"),
    [
        ("ids", GeometricComplexity(), "give embeddings where the batch holds token ids"),
        ("detached", GeometricComplexity(), "must depend on the inputs that it is given"),
        ("ignored", GeometricComplexity(), "must depend on the inputs that it is given"),
        ("shape", GeometricComplexity(), r"must return floating-point numbers of shape \(3, C\), got torch.float64"),
        ("labels", TangentKernel(alignment=True), "labels must be from 0 to 2 to be one-hot"),
    ],
)
def test_what_is_not_as_a_task_says_is_refused(fault: str, measure: Any, message: str) -> None:
    with pytest.raises(GradscaleError, match=message):
        measured(Wrong(fault=fault), measure)


@dataclass(frozen=True)
class WithOneTarget(Problem):
    def targets(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["y"].double()[:, None]


def test_targets_that_are_not_of_the_outputs_shape_are_refused() -> None:
    with pytest.raises(
        GradscaleError, match=r"task.targets must return shape \(3, 3\), that of the outputs, got \(3, 1\)"
    ):
        measured(WithOneTarget(), TangentKernel(alignment=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GeometricComplexity(0), "num_probes must be at least 1, got 0"),
        (lambda: TangentKernel(0), "num_probes must be at least 1, got 0"),
        (lambda: Sensitivity(sigma=0.0), "sigma must be a positive number, got 0.0"),
        (lambda: Sharpness(rho=-1.0), "rho must be a positive number, got -1.0"),
        (lambda: Sharpness(num_draws=0), "num_draws must be at least 1, got 0"),
    ],
)
def test_settings_are_checked(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(GradscaleError, match=message):
        make()


def test_plan_says_what_they_cost(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = "geometric_complexity:num_probes=2,tangent_kernel:num_probes=2:alignment"
    assert run_command(monkeypatch, "plan", "--task", "digits", "--measures", names) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "a forward pass and 2 backward passes to task.inputs" in printed
    assert "3 forward and backward passes, one more for each output, of task.outputs" in printed
