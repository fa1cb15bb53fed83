"""Promise: v^T M_i v of every example, many at once, is that of the example's own dense float64 matrix.

Through LayerNorm and attention above all, where forward mode twice is wrong and nothing tells.

Shapes: n examples, m of a sample, P entries, k vectors, N probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from oracle_problems import FewDigits, LinearRegression
from problems import ModelAtHand, Recurrent, SelfAttention, Toy, UsedTwice
from test_curvature_operators import NarrowGPT2, TanhNet, _checkpointed, probes, rows_of_hessian, stream_of
from torch import Tensor, nn
from torch.nn import functional as F

from gradscale.curvature.backends import BACKWARD_JACOBIAN, DOUBLE_BACKWARD, Choice, FiniteDifferences
from gradscale.curvature.example_products import example_quadratics, sampled_ids, sampled_products
from gradscale.curvature.operators import (
    CovarianceOperator,
    CurvatureOperator,
    gauss_newton,
    hessian,
)
from gradscale.curvature.quadratic_forms import (
    WAYS,
    LayerNormWrittenOut,
    calibrated_differences,
    forward_differences,
    nested_forward,
    triple_backward,
)
from gradscale.curvature.stream import Stream
from gradscale.errors import GradscaleError
from gradscale.task import Task


def scored(net: nn.Module, x: Tensor) -> ModelAtHand:
    """Cross-entropy of three classes in turn."""
    return ModelAtHand(net, {"x": x, "label": torch.arange(len(x)) % 3}, _cross_entropy)


def _cross_entropy(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["label"], reduction="none")


def seeded(make: Callable[[], nn.Module], *shape: int) -> Task:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        return scored(make().double().eval(), torch.randn(*shape, dtype=torch.float64))


def block() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, activation=F.gelu, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3))


def normed(norm: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), norm(6), nn.Tanh(), nn.Linear(6, 3))


TASKS: dict[str, Callable[[], Task]] = {
    "quadratic": LinearRegression,
    "tanh net": TanhNet,
    "digits": lambda: FewDigits(rows=5),
    "gpt2": NarrowGPT2,
    "gpt2 sdpa": lambda: NarrowGPT2(attention="sdpa"),
    "attention": lambda: seeded(SelfAttention, 5, 3, 4),
    "encoder": lambda: seeded(block, 5, 3, 4),
    "group norm": lambda: seeded(lambda: normed(lambda size: nn.GroupNorm(2, size)), 5, 4),
    "rms norm": lambda: seeded(lambda: normed(nn.RMSNorm), 5, 4),
    "batch norm": lambda: seeded(lambda: normed(nn.BatchNorm1d), 5, 4),
    "plain layer norm": lambda: seeded(lambda: normed(lambda size: nn.LayerNorm(size, elementwise_affine=False)), 5, 4),
    "used twice": lambda: seeded(UsedTwice, 5, 3, 4),
    "lstm": lambda: seeded(Recurrent, 5, 3, 4),
}
LAYER_NORMED = ("tanh net", "gpt2", "encoder", "plain layer norm")


def vectors_of(stream: Stream, count: int = 2) -> Tensor:
    """Random ones, not of length one."""
    return probes(stream, count, seed=11) * torch.tensor([[0.1], [3.0], [1.0]], dtype=torch.float64)[:count]


@cache
def oracle(name: str) -> tuple[Tensor, Tensor]:
    """v^T H_i v [n, k] and |H_i v|^2, of the derivative of each example's own gradient along v."""
    stream = stream_of(TASKS[name]())
    forms, squares = [], []
    for i in stream.ids:
        alone, row = replace(stream, ids=range(i, i + 1)), []
        for v in vectors_of(stream):
            row.append(_product(alone, v))
        forms.append([float(v @ h) for v, h in zip(vectors_of(stream), row, strict=True)])
        squares.append([float(h @ h) for h in row])
    return torch.tensor(forms, dtype=torch.float64), torch.tensor(squares, dtype=torch.float64)


def _product(alone: Stream, v: Tensor) -> Tensor:
    """[P]: fourth-order differences of the gradient. No second derivative of any operation has a part in it."""
    total, h = torch.zeros_like(v), 1e-3 / float(v.norm())
    base = torch.nn.utils.parameters_to_vector(alone.parameters).detach().clone()
    for factor, step in ((8, h), (-8, -h), (-1, 2 * h), (1, -2 * h)):
        torch.nn.utils.vector_to_parameters(base + step * v, alone.parameters)
        (loss,) = alone.subject.task.losses(alone.subject.model, alone.subject.examples.batch(alone.ids))
        found = torch.autograd.grad(loss, alone.parameters, allow_unused=True, materialize_grads=True)
        total += factor * torch.cat([part.reshape(-1) for part in found]) / (12 * h)
    torch.nn.utils.vector_to_parameters(base, alone.parameters)
    return total


def far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class TestHessian:
    @pytest.mark.parametrize("name", TASKS)
    @pytest.mark.parametrize("way", ["nested_forward", "triple_backward"])
    def test_exact_ways(self, name: str, way: str) -> None:
        stream = stream_of(TASKS[name](), microbatch=3)
        found = example_quadratics(hessian(stream, "double_backward"), vectors_of(stream), way)
        assert (found.way, found.refused) == (way, {})
        assert far(found.values, oracle(name)[0]) < 1e-8  # of the oracle's differences
        assert found.error < 1e-12

    @pytest.mark.parametrize("name", TASKS)
    def test_the_two_exact_ways_agree_to_rounding(self, name: str) -> None:
        stream = stream_of(TASKS[name]())
        v = vectors_of(stream)
        assert far(nested_forward(stream, v), triple_backward(stream, v)) < 1e-13

    @pytest.mark.parametrize("name", ["quadratic", "tanh net", "gpt2", "encoder", "lstm"])
    def test_differences_are_as_far_off_as_they_say(self, name: str) -> None:
        stream = stream_of(TASKS[name]())
        found = example_quadratics(hessian(stream, "double_backward"), vectors_of(stream), "forward_differences")
        assert far(found.values, triple_backward(stream, vectors_of(stream))) < max(4 * found.error, 1e-12)
        assert found.error < 1e-7

    def test_differences_in_float32(self) -> None:
        exact = stream_of(NarrowGPT2())
        single = replace(exact, subject=replace(exact.subject, model=exact.subject.model.float()))
        v = vectors_of(exact)
        found = example_quadratics(hessian(single, "double_backward"), v, "forward_differences")
        single.subject.model.double()
        assert far(found.values, triple_backward(exact, v)) < 4 * found.error < 1e-2

    @pytest.mark.parametrize("name", LAYER_NORMED)
    def test_forward_mode_twice_is_wrong_through_layer_norm_unless_it_is_written_out(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """torch 2.13. When this fails, torch is right and `LayerNormWrittenOut` can go."""
        stream = stream_of(TASKS[name]())
        as_it_is = lambda self, func, types, args=(), kwargs=None: func(*args, **(kwargs or {}))  # noqa: E731
        monkeypatch.setattr(LayerNormWrittenOut, "__torch_function__", as_it_is)
        v = vectors_of(stream)
        assert far(nested_forward(stream, v), oracle(name)[0]) > 0.1
        with pytest.raises(GradscaleError, match=r"must be possible in one of the ways tried, got nested_forward: its"):
            example_quadratics(hessian(stream), v, "nested_forward")
        found = example_quadratics(hessian(stream), v)
        assert found.way == "triple_backward"
        assert "off the product of the operator" in found.refused["nested_forward"]
        assert far(found.values, oracle(name)[0]) < 1e-8

    def test_whole_matrices_of_a_toy(self) -> None:
        stream = stream_of(Toy("real"), microbatch=3)
        x = stream.subject.examples.batch(stream.ids)["x"]
        found = example_quadratics(hessian(stream), torch.eye(6, dtype=torch.float64))
        assert far(found.values, x.square()) < 1e-14

    def test_a_dense_matrix_of_every_example(self) -> None:
        stream = stream_of(TanhNet())
        v = vectors_of(stream)
        found = example_quadratics(hessian(stream), v).values
        for i in (0, 5, 10):
            dense = rows_of_hessian(replace(stream, ids=range(i, i + 1)), range(stream.layout.size))
            assert far(found[i], ((v @ dense) * v).sum(dim=1)) < 1e-12

    def test_microbatches_weights_and_length_change_nothing(self) -> None:
        stream = stream_of(TanhNet(), 11)
        v = vectors_of(stream)
        found = example_quadratics(hessian(stream), v).values
        weighted = replace(stream, microbatch=4, weights=torch.arange(1.0, 12.0).double())
        assert far(example_quadratics(hessian(weighted), v).values, found) < 1e-13
        assert far(example_quadratics(hessian(stream), 100 * v).values, 1e4 * found) < 1e-13
        zero = example_quadratics(hessian(stream), torch.zeros(1, 63))
        assert not zero.values.any()

    def test_of_part_of_the_parameters(self) -> None:
        whole = stream_of(TanhNet())
        chosen = {name: p for name, p in whole.subject.parameters.items() if name.startswith("2.")}
        part = replace(whole, subject=replace(whole.subject, parameters=chosen))
        v = probes(part, 2)
        expected = example_quadratics(hessian(part), v, "one_by_one").values
        for way in WAYS[:2]:
            assert far(example_quadratics(hessian(part), v, way).values, expected) < 1e-12

    @pytest.mark.filterwarnings(
        "ignore:None of the inputs have requires_grad=True"
    )  # of forward mode, which is refused
    def test_what_neither_way_goes_through_is_left_to_one_product_an_example(self) -> None:
        """A reentrant checkpoint, which refuses `autograd.grad`."""
        plain = stream_of(TanhNet())
        task = ModelAtHand(plain.subject.model, TanhNet().examples().tensors, _checkpointed)
        stream = replace(plain, subject=replace(plain.subject, task=task))
        operator = hessian(stream)
        assert operator.choice.backend.name == "finite_differences"
        v = vectors_of(stream)
        found = example_quadratics(operator, v)
        assert far(found.values, oracle("tanh net")[0]) < 1e-5
        assert "triple_backward" in found.refused

    def test_an_operation_without_a_forward_derivative(self) -> None:
        stream = stream_of(scored(Recurrent().eval(), torch.randn(5, 3, 4)))
        v = vectors_of(stream).float()
        found = example_quadratics(hessian(stream), v)
        assert (found.way, list(found.refused)) == ("triple_backward", ["nested_forward"])
        one_by_one = example_quadratics(hessian(stream), v, "one_by_one").values
        assert far(found.values, one_by_one) < 1e-5

    def test_weights_are_left_bit_for_bit(self) -> None:
        stream = stream_of(NarrowGPT2())
        before = [p.detach().clone() for p in stream.parameters]
        for way in WAYS:
            example_quadratics(hessian(stream), vectors_of(stream, 1), way)
        assert all(torch.equal(p, b) for p, b in zip(stream.parameters, before, strict=True))
        assert all(p.grad is None for p in stream.parameters)


class TestOtherOperators:
    @pytest.mark.parametrize("name", ["quadratic", "tanh net", "digits", "gpt2", "gpt2 sdpa"])
    @pytest.mark.parametrize("forward", [True, False])
    def test_gauss_newton(self, name: str, forward: bool) -> None:
        stream = stream_of(TASKS[name](), microbatch=3)
        operator = gauss_newton(stream)
        if not forward:
            operator = CurvatureOperator(stream, Choice(BACKWARD_JACOBIAN, 0.0, {}))
        v = vectors_of(stream)
        found = example_quadratics(operator, v)
        assert found.way == ("forward_jacobian" if forward else "backward_jacobian")
        assert far(found.values, example_quadratics(operator, v, "one_by_one").values) < 1e-12
        assert float(found.values.min()) >= 0
        mean = (operator.products(v) * v).sum(dim=1)
        assert far(found.values.mean(dim=0), mean) < 1e-12

    def test_gauss_newton_is_the_hessian_of_a_quadratic(self) -> None:
        stream = stream_of(LinearRegression())
        v = vectors_of(stream)
        assert far(example_quadratics(gauss_newton(stream), v).values, oracle("quadratic")[0]) < 1e-8

    @pytest.mark.parametrize("centred", [True, False])
    def test_covariance(self, centred: bool) -> None:
        stream = stream_of(NarrowGPT2(), microbatch=2)
        operator, v = CovarianceOperator(stream, centred), vectors_of(stream)
        losses = stream.subject.task.losses(stream.subject.model, stream.subject.examples.batch(stream.ids))
        rows = [torch.autograd.grad(loss, stream.parameters, retain_graph=True) for loss in losses]
        G = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
        slopes = G @ v.mT
        expected = (slopes - slopes.mean(dim=0)).square() * 5 / 4 if centred else slopes.square()
        found = example_quadratics(operator, v)
        assert far(found.values, expected) < 1e-12
        assert far(found.values.mean(dim=0), (operator.products(v) * v).sum(dim=1)) < 1e-12


class TestSampledProducts:
    @pytest.mark.parametrize("name", ["tanh net", "gpt2"])
    def test_lengths_along_vectors(self, name: str) -> None:
        stream = stream_of(TASKS[name]())
        found = sampled_products(hessian(stream), (0, 3, 4), vectors_of(stream), probes=0)
        assert far(found.along, oracle(name)[1][[0, 3, 4]]) < 1e-8
        assert found.squares.shape == (3, 0)

    def test_probes_give_the_frobenius_norm_of_each_example(self) -> None:
        """Within 5 standard errors, which are those of signs: Var u^T A u = 2 (|A|_F^2 - sum A_ii^2), A = H_i^2."""
        stream = stream_of(TanhNet())
        found = sampled_products(hessian(stream), (0, 5, 10), probes=128, seed=1)
        for i, squares in zip(found.ids, found.squares, strict=True):
            dense = rows_of_hessian(replace(stream, ids=range(i, i + 1)), range(63))
            A = dense @ dense
            error = math.sqrt(2 * float(A.square().sum() - A.diagonal().square().sum()) / 128)
            assert abs(float(squares.mean()) - float(A.trace())) < 5 * error

    def test_an_examples_probes_are_its_own_whatever_the_sample(self) -> None:
        stream = stream_of(TanhNet())
        operator = hessian(stream)
        some, all_ = (sampled_products(operator, ids, probes=2) for ids in ((2, 7), tuple(stream.ids)))
        assert torch.equal(some.squares, all_.squares[[2, 7]])
        assert len(set(all_.squares.flatten().tolist())) == 22
        assert not torch.equal(sampled_products(operator, (2, 7), probes=2, seed=1).squares, some.squares)

    def test_samples_are_without_replacement_and_every_example_as_often(self) -> None:
        counts = torch.zeros(20)
        for seed in range(600):
            ids = sampled_ids(range(5, 25), 6, seed)
            assert len(set(ids)) == 6
            assert list(ids) == sorted(ids)
            counts[torch.tensor(ids) - 5] += 1
        assert float((counts - 180).abs().max()) < 4.5 * math.sqrt(600 * 0.3 * 0.7)
        assert sampled_ids(range(4), 4) == (0, 1, 2, 3)


@dataclass(frozen=True)
class WrongCurvature:
    """Twice the Hessian."""

    name: str = "double"

    def add(self, stream: Stream, vectors: Tensor, total: Tensor) -> None:
        DOUBLE_BACKWARD.add(stream, 2 * vectors, total)


class TestBadInput:
    def test_a_way_that_does_not_agree_with_the_operator_is_not_taken(self) -> None:
        stream = stream_of(TanhNet())
        found = example_quadratics(CurvatureOperator(stream, Choice(WrongCurvature(), 0.0, {})), vectors_of(stream))
        assert found.way == "one_by_one"
        assert list(found.refused) == list(WAYS[:3])

    def test_settings(self) -> None:
        stream = stream_of(TanhNet())
        operator = hessian(stream)
        with pytest.raises(GradscaleError, match="way must be auto or one of nested_forward, triple_backward"):
            example_quadratics(operator, vectors_of(stream), "jvp")
        with pytest.raises(GradscaleError, match=r"one of the ways tried, got nested_forward: it is no way for this"):
            example_quadratics(gauss_newton(stream), vectors_of(stream), "nested_forward")
        with pytest.raises(GradscaleError, match=r"vectors must be float32 or float64 of shape \(k, 63\), got"):
            example_quadratics(operator, torch.zeros(2, 5))
        with pytest.raises(GradscaleError, match="a sample must be of 1 to 11 examples, got 12"):
            sampled_ids(range(11), 12)
        with pytest.raises(
            GradscaleError, match=r"sampled examples must be of range\(0, 11\) with .* got \[11\] and 2"
        ):
            sampled_products(operator, (3, 11))

    def test_an_example_whose_loss_is_not_finite_is_named(self) -> None:
        tensors = TanhNet().examples().tensors
        x = tensors["x"].clone()
        x[6] = math.nan
        task = ModelAtHand(TanhNet().model(None), {**tensors, "x": x}, TanhNet().losses)
        stream = stream_of(task)
        for choice in (Choice(DOUBLE_BACKWARD, 0.0, {}), Choice(FiniteDifferences(1e-4), 0.0, {})):
            with pytest.raises(GradscaleError, match="quadratic forms must be finite, got one that is not for example"):
                example_quadratics(CurvatureOperator(stream, choice), vectors_of(stream))

    def test_coarse_weights(self) -> None:
        stream = stream_of(TanhNet())
        stream.subject.model.bfloat16()
        with pytest.raises(GradscaleError, match="parameters must be float32 or float64 for differences of deriv"):
            calibrated_differences(stream, vectors_of(stream))

    def test_a_loss_that_is_linear_along_the_vectors(self) -> None:
        task = ModelAtHand(nn.Linear(3, 1).double(), {"x": torch.randn(6, 3).double()}, lambda m, b: m(b["x"])[:, 0])
        stream = stream_of(task)
        v = vectors_of(stream)
        for found in (nested_forward(stream, v), triple_backward(stream, v)):
            assert not found.any()
        assert float(forward_differences(stream, v, 1e-3).abs().max()) < 1e-10
