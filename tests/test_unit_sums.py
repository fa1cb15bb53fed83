"""Promise: sums of unit gradients are those of the dense gradients, for one pass more in which nothing else is read.

Shapes: B examples of a microbatch, n of the data, C classes, L parameters, P entries of all parameters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import ModelAtHand, Padded, PartlyUsed, SelfAttention, UsedTwice, conv_net, gradients_one_by_one
from torch import Tensor, nn
from torch.nn import functional as F

from gradscale.grads.layer import LayerGrads
from gradscale.grads.readings import GradientSums, Projected, Reading, Readings, SquaredNorms, has_norm_above, passes
from gradscale.grads.subject import load_batch, read_batch
from gradscale.measures.coherence import Coherence
from gradscale.measures.measure import MicroBatch
from gradscale.measures.moments import MomentsStatistic
from gradscale.report.forecasts import forecast_lines
from gradscale.run.forecast import forecast
from gradscale.run.job import _reads_labels
from gradscale.run.shard import prepare, run_shard
from gradscale.sketches.gaussian import GaussianProbes

n = 9
LABELS = torch.tensor([0, 2, 1, 0, 2, 2, 0, 1, 2])
EVERYONE = torch.ones(n, dtype=torch.bool)
SUMS, UNIT, BY_CLASS = GradientSums(), GradientSums(unit=True), GradientSums(by_class=True, unit=True)
FIRST_PASS: frozenset[Reading] = frozenset({SquaredNorms(), SUMS, GradientSums(by_class=True)})
BOTH_PASSES = FIRST_PASS | {UNIT, BY_CLASS}


class UnitState(NamedTuple):
    """A commutative monoid. Keys are `class` and `class|parameter`."""

    directed: Mapping[str, Tensor]  # [] int64, the examples that have a direction
    sums: Mapping[str, Tensor]  # [P of the parameter] float64


@dataclass(frozen=True)
class UnitSums:
    """What cosine stiffness is made of."""

    @property
    def needs(self) -> frozenset[Reading]:
        return frozenset({BY_CLASS})

    def init(self) -> UnitState:
        return UnitState({}, {})

    def update(self, state: UnitState, batch: MicroBatch) -> UnitState:
        assert batch.labels is not None
        sums = batch.sums[BY_CLASS]
        directed = {str(c): ((batch.labels == c) & batch.directed).sum() for c in sums}
        return self.merge(
            state, UnitState(directed, {f"{c}|{name}": s.double() for c in sums for name, s in sums[c].items()})
        )

    def merge(self, left: UnitState, right: UnitState) -> UnitState:
        return UnitState(*(_add(a, b) for a, b in zip(left, right, strict=True)))


def _add(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**left, **{key: left[key] + value if key in left else value for key, value in right.items()}}


def scaled_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["label"], reduction="none") * batch["scale"]


def of(
    make: Callable[[], nn.Module], *shape: int, integers: int = 0, dtype: torch.dtype = torch.float64
) -> ModelAtHand:
    """n examples whose losses, and so their gradients, are `scale` times as large; the scales are 1."""
    torch.manual_seed(0)
    net = make().to(dtype).eval()
    x = torch.randint(integers, (n, *shape)) if integers else torch.randn(n, *shape, dtype=dtype)
    return ModelAtHand(net, {"x": x, "label": LABELS, "scale": torch.ones(n, dtype=dtype)}, scaled_losses)


CASES: dict[str, Callable[..., ModelAtHand]] = {
    "linear": partial(of, lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), 4),
    "conv": partial(of, conv_net, 1, 4, 4),
    "attention": partial(of, SelfAttention, 3, 4),
    "used-twice": partial(of, UsedTwice, 3, 4),
    "padding": partial(of, Padded, 3, integers=5),
    "partly-used": partial(of, PartlyUsed, 3, 4),
}


@pytest.mark.parametrize("case", CASES)
def test_one_batch(case: str) -> None:
    task = CASES[case]()
    exact = units(task)
    readings = read(task, BOTH_PASSES)
    near(readings.sums[UNIT][None], exact, EVERYONE, 1e-12)
    assert set(readings.sums[BY_CLASS]) == {0, 1, 2}
    for c in range(3):
        near(readings.sums[BY_CLASS][c], exact, c == LABELS, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("microbatch", [1, 2, 4, n])
def test_a_shard_with_examples_that_have_no_part(dtype: torch.dtype, microbatch: int) -> None:
    """Example 2 has no gradient, 5 a loss that is not finite, and class 1 is left with one example."""
    task = CASES["attention"](dtype=dtype)
    task.tensors["scale"][[2, 5]] = torch.tensor([0.0, torch.nan], dtype=dtype)
    exact, has_part = units(task), torch.tensor([b not in (2, 5) for b in range(n)])
    columns, states = run_shard(prepare(task, None, None), range(n), 0, microbatch, [UnitSums()], None)
    assert columns.finite.tolist() == [b != 5 for b in range(n)]
    state = states[UnitSums()]
    assert {c: int(count) for c, count in state.directed.items()} == {"0": 3, "1": 1, "2": 3}
    for c in range(3):
        near({name: state.sums[f"{c}|{name}"] for name in exact}, exact, has_part & (c == LABELS), 1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_excluded_example_and_one_that_turns_out_not_to_be_finite(bad: float) -> None:
    """An excluded example has no part; the other spoils the sums, and the caller begins anew without it."""
    task = CASES["attention"]()
    task.tensors["scale"][[0, 3]] = torch.tensor([bad, bad], dtype=torch.float64)
    readings = read(task, BOTH_PASSES, torch.arange(n) == 0)
    assert readings.finite.tolist() == [b not in (0, 3) for b in range(n)]
    assert not all(total.isfinite().all() for total in readings.sums[UNIT][None].values())
    readings = read(task, BOTH_PASSES, ~readings.finite)
    near(readings.sums[UNIT][None], units(task), readings.finite, 1e-12)
    for c in range(3):
        near(readings.sums[BY_CLASS][c], units(task), readings.finite & (c == LABELS), 1e-12)


def test_sums_are_added_to_the_totals_of_other_examples() -> None:
    task = CASES["linear"]()
    subject, totals = prepare(task, None, None), {}
    for ids in (range(4), range(4, n)):
        batch = load_batch(subject, ids)
        read_batch(subject, batch, frozenset({UNIT}), totals=totals)
    near(totals[UNIT][None], units(task), EVERYONE, 1e-12)


# --- of the gradients above a norm ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_sums_above_a_norm(case: str) -> None:
    task = CASES[case]()
    task.tensors["scale"].copy_(10.0 ** torch.linspace(-3, 3, n, dtype=torch.float64))
    exact, norms = gradients_of(task)
    least = float(norms.quantile(0.45))  # between two of them
    above, units_above = GradientSums(min_norm=least), GradientSums(unit=True, min_norm=least)
    by_class = GradientSums(by_class=True, min_norm=least)
    readings = read(task, FIRST_PASS | {above, units_above, by_class})
    assert has_norm_above(readings.sq_norms, least).tolist() == (norms > least).tolist()
    near(readings.sums[above][None], exact, norms > least, 1e-9)
    near(readings.sums[units_above][None], units(task), norms > least, 1e-12)
    for c in range(3):
        near(readings.sums[by_class][c], exact, (norms > least) & (c == LABELS), 1e-9)
    assert passes({above}) == passes({units_above}) == 2


@pytest.mark.parametrize("microbatch", [1, 4, n])
def test_the_coherence_of_a_shard_above_a_norm(microbatch: int) -> None:
    """The oracle, with an example that is not finite and one without a gradient among them."""
    task = CASES["attention"]()
    task.tensors["scale"][:] = torch.tensor([3, 1, 2, torch.nan, 0, 5, 1, 1e-3, 4], dtype=torch.float64)
    exact, norms = gradients_of(task)
    measure = Coherence(min_norm=float(norms.nanquantile(0.4)))
    _, states = run_shard(prepare(task, None, None), range(n), 0, microbatch, [measure.statistic], None)
    found = measure.compute(states[measure.statistic])
    above = norms > float(norms.nanquantile(0.4))
    for scope, rows in {"all": torch.cat(list(exact.values()), dim=1), **prefixed(exact)}.items():
        kept = rows[above]
        alpha = float(kept.mean(dim=0).square().sum() / kept.square().sum(dim=1).mean())
        assert math.isclose(found["alpha_above", scope].value, alpha, rel_tol=1e-9)
        assert found["alpha_above", scope].n == int(above.sum())


def test_the_second_pass_is_forecast() -> None:
    subject = prepare(CASES["linear"](), None, None)
    assert forecast(subject, [Coherence().statistic], None, 4, 1).passes == 1
    cost = forecast(subject, [Coherence(min_norm=0.1).statistic], None, 4, 1)
    assert cost.passes == 2
    assert "in 2 such passes, the second for sums of unit gradients or of those above a norm" in " ".join(
        forecast_lines(cost, 1, 8)
    )


def gradients_of(task: ModelAtHand) -> tuple[dict[str, Tensor], Tensor]:
    """[n, P of the parameter] each, and the norms [n] over all of them."""
    net = copy.deepcopy(task.net)
    grads = gradients_one_by_one(task, dict(net.named_parameters()), net, task.tensors)
    return grads, torch.cat(list(grads.values()), dim=1).norm(dim=1)


def prefixed(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"layer:{name}": grad for name, grad in grads.items()}


# --- two passes, and nothing twice ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counting:
    """A linear map that tells how often it has been asked for."""

    dim: int = 2
    asked: list[str] = field(default_factory=list, hash=False, compare=False)

    def apply(self, parameter: str, grads: LayerGrads) -> Tensor:
        self.asked.append(parameter)
        return torch.ones(grads.shape[0], self.dim, dtype=torch.float64)


def test_what_the_first_pass_can_read_is_not_read_twice() -> None:
    runs: list[int] = []

    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        runs.append(len(batch["x"]))
        return scaled_losses(model, batch)

    task = CASES["linear"]()
    task = ModelAtHand(task.net, task.tensors, losses)
    probes = Projected(GaussianProbes(4, seed=1))
    one, two = Projected(Counting()), Projected(Counting())
    first = read(task, FIRST_PASS | {probes, one})
    assert runs == [n] == [n] * passes(FIRST_PASS)
    both = read(task, BOTH_PASSES | {probes, two})
    assert runs[1:] == [n, n] == [n] * passes(BOTH_PASSES)
    for once in (one, two):
        assert isinstance(once.map, Counting)
        assert sorted(once.map.asked) == sorted(name for name, _ in task.net.named_parameters())
    assert torch.equal(first.sq_norms, both.sq_norms)
    assert torch.equal(first.projections[probes], both.projections[probes])
    for reading, groups in first.sums.items():
        for group, by_parameter in groups.items():
            assert all(torch.equal(both.sums[reading][group][name], total) for name, total in by_parameter.items())


def test_a_forecast_counts_the_passes_and_the_state() -> None:
    subject = prepare(CASES["linear"](), None, None)
    entries = sum(parameter.numel() for parameter in subject.parameters.values())
    plain = forecast(subject, [MomentsStatistic()], None, 4, 1)
    unit = forecast(subject, [MomentsStatistic(), UnitSums()], None, 4, 1)
    assert (plain.passes, unit.passes) == (1, 2)
    assert "passes" not in " ".join(forecast_lines(plain, 1, 8))
    assert "in 2 such passes, the second for sums of unit gradients" in " ".join(forecast_lines(unit, 1, 8))
    assert unit.state_bytes - plain.state_bytes == 3 * 8 * (entries + 1)  # classes 0, 2, 1 and 0


def test_sums_by_class_are_known_to_need_labels() -> None:
    @dataclass(frozen=True)
    class Stiffness:
        name = "stiffness"
        summary = "none"
        statistic = UnitSums()

        def compute(self, state: UnitState) -> dict[tuple[str, str], object]:
            return {}

    assert _reads_labels(Stiffness())  # type: ignore[arg-type]


# --- any length of gradient -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(-30, 30), min_size=n, max_size=n))
def test_the_length_of_a_gradient_does_not_matter(exponents: list[float]) -> None:
    task = CASES["linear"]()
    exact = units(task)
    task.tensors["scale"].copy_(10.0 ** torch.tensor(exponents, dtype=torch.float64))
    near(read(task, frozenset({UNIT})).sums[UNIT][None], exact, EVERYONE, 1e-12)


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float64, -140, 140), (torch.float32, -14, 14)])
def test_lengths_that_squares_hold(dtype: torch.dtype, least: int, most: int) -> None:
    task = CASES["linear"](dtype=dtype)
    exact = units(task)
    task.tensors["scale"].copy_(10.0 ** torch.linspace(least, most, n, dtype=torch.float64))
    readings = read(task, BOTH_PASSES)
    assert readings.finite.all()
    near(readings.sums[UNIT][None], exact, EVERYONE, 1e-12 if dtype is torch.float64 else 1e-6)


def test_lengths_that_squares_in_float32_do_not_hold() -> None:
    """A norm of 1e-30 reads as zero, one of 1e30 as infinite; the weights of neither reach the sums."""
    task = CASES["linear"](dtype=torch.float32)
    task.tensors["scale"][[1, 4]] = torch.tensor([1e-30, 1e30])
    _, states = run_shard(prepare(task, None, None), range(n), 0, 4, [UnitSums()], None)
    state, has_part = states[UnitSums()], torch.tensor([b not in (1, 4) for b in range(n)])
    exact = units(CASES["linear"](dtype=torch.float32))
    for c in range(3):
        assert int(state.directed[str(c)]) == int((has_part & (c == LABELS)).sum())
        near({name: state.sums[f"{c}|{name}"] for name in exact}, exact, has_part & (c == LABELS), 1e-6)


class TwoKinds(nn.Module):
    """float32 below, float64 above."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(4, 4), nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.above(torch.tanh(self.below(x.float())).double())
        return scores


@pytest.mark.parametrize("length", [1e-45, 1e-60, 1e60])
def test_lengths_that_only_one_of_two_dtypes_holds(length: float) -> None:
    torch.manual_seed(0)
    scale = torch.ones(n, dtype=torch.float64)
    x = torch.randn(n, 4, dtype=torch.float64)
    task = ModelAtHand(TwoKinds(), {"x": x, "label": LABELS, "scale": scale}, scaled_losses)
    scale[3] = length
    readings = read(task, frozenset({UNIT}))
    if length > 1:
        assert readings.finite.tolist() == [b != 3 for b in range(n)]  # infinite below
        readings = read(task, frozenset({UNIT}), ~readings.finite)
    assert all(total.isfinite().all() for total in readings.sums[UNIT][None].values())
    if length > 1:
        return
    alone = read(task, frozenset({UNIT}), torch.arange(n) != 3).sums[UNIT][None]
    norm = torch.cat([total.double() for total in alone.values()]).norm()
    assert math.isclose(float(norm), 1.0, rel_tol=1e-6)


# --- the oracle -------------------------------------------------------------------------------------------------------


def read(task: ModelAtHand, readings: frozenset[Reading], exclude: Tensor | None = None) -> Readings:
    subject = prepare(task, None, None)
    return read_batch(subject, load_batch(subject, range(n)), readings, LABELS, exclude)


def units(task: ModelAtHand) -> dict[str, Tensor]:
    """[n, P of the parameter] float64: each example's gradient by its norm over all parameters, or zero."""
    net = copy.deepcopy(task.net).double()
    tensors = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in task.tensors.items()}
    grads = gradients_one_by_one(task, dict(net.named_parameters()), net, tensors)
    whole = torch.cat(list(grads.values()), dim=1)
    norms = whole.norm(dim=1, keepdim=True)
    return {name: torch.where(norms > 0, grad / norms, 0.0) for name, grad in grads.items()}


def near(found: Mapping[str, Tensor], exact: Mapping[str, Tensor], has_part: Tensor, tolerance: float) -> None:
    """For every parameter, the sum of the rows of `exact` that `has_part` picks, to `tolerance` of a unit gradient."""
    for name, rows in exact.items():
        expected = rows[has_part].sum(dim=0)
        error = float((found[name].double() - expected).norm())
        assert error <= tolerance, f"{name}: {error:.2g} apart from {float(expected.norm()):.2g}"
