"""Promise: readings that ride on somebody else's pass are those of a pass of our own, and leave that pass as it is.

The pass goes backward from a scaled mean over the batch, as a training step's does. The oracle of the readings is
`read_gradients`, that of the pass itself the same pass without a ride, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_zoo import DENSE, MIXTURES, checkpointed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradscale.errors import GradscaleError
from gradscale.grads.coverage import select_parameters, sites
from gradscale.grads.experts import ExpertGrads
from gradscale.grads.layer import (
    DenseGrads,
    EmbeddingGrads,
    GroupedGrads,
    LayerGrads,
    OuterGrads,
    SharedGrads,
    materialize,
)
from gradscale.grads.packing import packing_of
from gradscale.grads.readings import GradientSums, Projected, Readings, SquaredNorms, read_gradients
from gradscale.grads.ride import Ride, examples_of, joined, parts_of, scaled
from gradscale.sketches import parse_sketch

B, T, E = 4, 5, 6
SCALE = 1 / 3
ZOO = DENSE | MIXTURES


class Places(nn.Module):
    """Words, places as ids [1, T] or [T], a tied head."""

    def __init__(self, batched: bool) -> None:
        super().__init__()
        self.words, self.places, self.mix = nn.Embedding(7, E), nn.Embedding(T, E), nn.Linear(E, E)
        self.head = nn.Linear(E, 7, bias=False)
        self.head.weight, self.batched = self.words.weight, batched

    def forward(self, words: Tensor) -> Tensor:
        ids = torch.arange(T)
        x = self.words(words) + self.places(ids[None] if self.batched else ids)
        return self.head(torch.relu_(self.mix(x)))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.words, self.head, self.use_reentrant = nn.Embedding(7, E), nn.Linear(E, 3), use_reentrant
        self.block = nn.Sequential(nn.Linear(E, 2 * E), nn.GELU(), nn.LayerNorm(2 * E), nn.Linear(2 * E, E))

    def forward(self, words: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, self.words(words), use_reentrant=self.use_reentrant))


class Attending(nn.Module):
    """Modules of several outputs, and one by the generic rule."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.attend = nn.Embedding(7, E), nn.MultiheadAttention(E, 2, batch_first=True)
        self.walk, self.curve = nn.LSTM(E, E, batch_first=True), nn.PReLU()

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        return self.curve(self.walk(self.attend(x, x, x)[0])[0])


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.drop, self.head = nn.Embedding(7, E), nn.Dropout(0.5), nn.Linear(E, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.drop(self.words(words)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "places [1, T]": lambda: Places(True),
    "places [T]": lambda: Places(False),
    "checkpointed": lambda: Checkpointed(False),
    "checkpointed, reentrant": lambda: Checkpointed(True),
    "several outputs": Attending,
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(7)
    return MODELS[name]().double(), torch.randint(7, (B, T))


def losses(model: nn.Module, words: Tensor) -> Tensor:
    return model(words).square().mean(dim=(1, 2))


def needs(model: nn.Module) -> frozenset[SquaredNorms | GradientSums | Projected]:
    sketch = parse_sketch("rademacher:8", 0).bind({n: p.numel() for n, p in select_parameters(model, None).items()})
    return frozenset({SquaredNorms(), GradientSums(), GradientSums(by_class=True), Projected(sketch)})


def ridden(model: nn.Module, words: Tensor, labels: Tensor, failed: Callable[[Exception], None]) -> Readings:
    parameters = select_parameters(model, None)
    ride = Ride(model, sites(model, parameters), parameters, len(words), needs(model), failed, labels)
    loss = losses(model, words).mean() * SCALE
    ride.forward_is_over()
    with ride.going_back():
        loss.backward()
    (found,) = ride.finish()
    ride.stop()
    return found


def not_failed(problem: Exception) -> None:
    raise AssertionError("the ride must not fail") from problem


@pytest.mark.parametrize("name", MODELS)
def test_readings_are_those_of_a_pass_of_our_own(name: str) -> None:
    model, words = made(name)
    parameters, labels = select_parameters(model, None), torch.tensor([0, 1, 1, 0])
    parts = [ridden(model, words[part], labels[part], not_failed) for part in (slice(0, 3), slice(3, 4))]
    found = joined([scaled(parts[0], 3 / SCALE), scaled(parts[1], 1 / SCALE)])
    model.zero_grad()
    oracle = read_gradients(
        model, sites(model, parameters), parameters, lambda m: losses(m, words), B, needs(model), labels
    )
    torch.testing.assert_close(found.sq_norms, oracle.sq_norms, rtol=1e-9, atol=1e-18)
    for reading, products in oracle.projections.items():
        torch.testing.assert_close(found.projections[reading], products, rtol=1e-9, atol=1e-12)
    for reading, groups in oracle.sums.items():
        for group, sums in groups.items():
            for parameter, total in sums.items():
                torch.testing.assert_close(found.sums[reading][group][parameter], total, rtol=1e-9, atol=1e-12)
    assert found.losses.isnan().all()
    assert found.finite.all()


@pytest.mark.parametrize("name", MODELS)
def test_the_pass_is_bit_for_bit_what_it_was(name: str) -> None:
    model, words = made(name)
    (losses(model, words).mean() * SCALE).backward()
    alone = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    ridden(model, words, torch.zeros(B, dtype=torch.int64), not_failed)
    assert all(torch.equal(a, p.grad) for a, p in zip(alone, model.parameters(), strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def kinds_of_gradients() -> list[LayerGrads]:
    torch.manual_seed(0)
    ids, left, right = torch.randint(4, (5, 3)), torch.randn(5, 3, 4), torch.randn(5, 3, 2)
    bounds = ((0, 1, 1, 3, 4, 4), (4, 6, 7, 7, 7, 9))
    outer, table = OuterGrads(left, right), EmbeddingGrads(ids, right, 4)
    grouped = GroupedGrads(torch.randn(5, 2, 3, 4), torch.randn(5, 2, 3, 2))
    experts = ExpertGrads(torch.randn(9, 4), torch.randn(9, 2), bounds)
    return [DenseGrads(torch.randn(5, 6)), outer, table, grouped, SharedGrads((outer, table)), experts]


@pytest.mark.parametrize("grads", kinds_of_gradients(), ids=lambda grads: type(grads).__name__)
def test_gradients_of_consecutive_examples(grads: LayerGrads) -> None:
    for part in (slice(0, 2), slice(2, 3), slice(1, 5)):
        torch.testing.assert_close(materialize(examples_of(grads, part)), materialize(grads)[part])


def test_parts_hold_every_example_once() -> None:
    for examples in range(1, 25):
        found = parts_of(examples, 10)
        assert [i for part in found for i in range(part.start, part.stop)] == list(range(examples))
        assert len(found) == min(10, examples)


@pytest.mark.parametrize("name", MODELS)
def test_parts_are_read_as_passes_of_their_own(name: str) -> None:
    model, words = made(name)
    parameters, labels = select_parameters(model, None), torch.tensor([0, 1, 1, 0])
    asked = needs(model)
    ride = Ride(model, sites(model, parameters), parameters, B, asked, not_failed, labels, parts=3, check=True)
    loss = losses(model, words).mean()
    ride.forward_is_over()
    with ride.going_back():
        loss.backward()
    found, together = ride.finish(), ride.sums_by_rules()
    ride.stop()
    assert len(found) == 3
    for parameter, total in together.items():
        torch.testing.assert_close(total, model.get_parameter(parameter).grad.flatten(), rtol=1e-9, atol=1e-15)
    for part, readings in zip(parts_of(B, 3), found, strict=True):
        oracle = read_gradients(
            model,
            sites(model, parameters),
            parameters,
            lambda m, part=part: losses(m, words[part]),
            part.stop - part.start,
            asked,
            labels[part],
        )
        here = scaled(readings, B)
        torch.testing.assert_close(here.sq_norms, oracle.sq_norms, rtol=1e-9, atol=1e-18)
        assert here.sums.keys() == oracle.sums.keys()
        for reading, groups in oracle.sums.items():
            for group, sums in groups.items():
                for parameter, total in sums.items():
                    torch.testing.assert_close(here.sums[reading][group][parameter], total, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_the_sums_of_the_pass_are_those_of_the_rules(name: str) -> None:
    model, words = made(name)
    parameters = select_parameters(model, "mix|head|curve|block|walk")
    ride = Ride(model, sites(model, parameters), parameters, B, frozenset({GradientSums()}), not_failed, check=True)
    loss = losses(model, words).mean()
    ride.forward_is_over()
    with ride.going_back():
        loss.backward()
    (found,), by_rules = ride.finish(), ride.sums_by_rules()
    ride.stop()
    assert found.sums[GradientSums()][None].keys() == by_rules.keys() == parameters.keys()
    for parameter, total in found.sums[GradientSums()][None].items():
        torch.testing.assert_close(total, by_rules[parameter], rtol=1e-9, atol=1e-15)
        assert torch.equal(total, model.get_parameter(parameter).grad.flatten())


class Packed(nn.Module):
    """Attention within the examples of a row, places [T] from the start of the row, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.norm = nn.Embedding(7, E), nn.Embedding(T, E), nn.LayerNorm(E)
        self.heads, self.out, self.head = nn.Linear(E, 3 * E), nn.Linear(E, E), nn.Linear(E, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor, places: Tensor, numbers: Tensor) -> Tensor:
        x = self.words(words) + self.places(places)
        queries, keys, values = self.heads(self.norm(x)).chunk(3, dim=-1)
        causal = torch.ones(words.shape[1], words.shape[1], dtype=torch.bool).tril()
        seen = (numbers[:, :, None] == numbers[:, None, :]) & causal
        x = x + self.out(nn.functional.scaled_dot_product_attention(queries, keys, values, seen))
        return self.head(x)


NUMBERS = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, -1, -1], [4, 4, 4, 4, 4]])
PLACES = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 0, 0], [0, 1, 2, 3, 4]])


@pytest.mark.parametrize("places", ["of each example", "of the row, [1, T]", "of the row, [T]"])
def test_packed_examples_are_read_as_unpacked_ones(places: str) -> None:
    torch.manual_seed(2)
    model, words = Packed().double(), torch.randint(7, (3, T))
    where = {"of each example": PLACES, "of the row, [1, T]": torch.arange(T)[None], "of the row, [T]": torch.arange(T)}
    at = where[places]
    parameters, labels = select_parameters(model, None), torch.tensor([0, 1, 1, 0, 1])
    packing, asked, problems = packing_of(NUMBERS), needs(model), list[Exception]()
    ride = Ride(model, sites(model, parameters), parameters, 3, asked, problems.append, labels, packing=packing)
    counted = NUMBERS >= 0
    loss = model(words, at, NUMBERS).square().mean(dim=2)[counted].mean()
    ride.forward_is_over()
    with ride.going_back():
        loss.backward()
    (found,) = ride.finish()
    ride.stop()
    assert not problems
    alone = [
        (words[row, here][None], at.expand(3, T)[row, here][None])
        for row in range(3)
        for number in NUMBERS[row].unique()[NUMBERS[row].unique() >= 0]
        for here in [NUMBERS[row] == number]
    ]
    assert len(alone) == ride.examples == 5
    total = dict.fromkeys(parameters, 0.0)
    for i, (ids, own) in enumerate(alone):
        share = model(ids, own, torch.zeros_like(ids)).square().mean(dim=2).sum() / counted.sum()
        grads = torch.autograd.grad(share, list(parameters.values()))
        oracle = torch.stack([each.square().sum() for each in grads])
        torch.testing.assert_close(found.sq_norms[i], oracle, rtol=1e-9, atol=1e-18)
        total = {name: total[name] + each for name, each in zip(parameters, grads, strict=True)}
        (reading,) = found.projections
        image = sum(
            each.flatten()
            @ reading.map.materialize(name, tuple(each.shape) if each.dim() == 2 else (len(each), 1)).double()
            for name, each in zip(parameters, grads, strict=True)
        )
        torch.testing.assert_close(found.projections[reading][i], image, rtol=1e-9, atol=1e-12)
    for name, sums in found.sums[GradientSums()][None].items():
        torch.testing.assert_close(sums, total[name].flatten(), rtol=1e-9, atol=1e-15)


def test_what_is_not_rows_of_positions_cannot_be_packed() -> None:
    class Pooled(Packed):
        def forward(self, words: Tensor, places: Tensor, numbers: Tensor) -> Tensor:
            return self.out(self.words(words).mean(dim=1))

    model, problems = Pooled(), list[Exception]()
    parameters = select_parameters(model, "words|out")
    needs, packing = frozenset({SquaredNorms()}), packing_of(NUMBERS)
    ride = Ride(model, sites(model, parameters), parameters, 3, needs, problems.append, packing=packing)
    loss = model(torch.zeros(3, T, dtype=torch.int64), PLACES, NUMBERS).square().mean()
    with ride.going_back():
        loss.backward()
    ride.stop()
    (problem,) = problems
    with pytest.raises(
        GradscaleError, match=r"module out must be called with the 3 rows of 5 positions that bound.*\(3, 6\)"
    ):
        raise problem


@pytest.mark.parametrize(
    ("boundaries", "said"),
    [
        (torch.zeros(3, T), r"boundaries must be integers of shape \(rows, positions\), got torch.float32 of shape"),
        (torch.zeros(T, dtype=torch.int64), r"boundaries must be integers .* got torch.int64 of shape \(5,\)"),
        (None, r"boundaries must be integers .* got None; see gs.attach"),
        (torch.full((3, T), -1), r"boundaries must number the examples of a row from 0 on, .* got -1 to -1"),
        (torch.full((3, T), -100), r"boundaries must number the examples of a row from 0 on, .* got -100 to -100"),
    ],
)
def test_boundaries_that_are_none(boundaries: object, said: str) -> None:
    with pytest.raises(GradscaleError, match=said):
        packing_of(boundaries)


def test_the_dropout_of_the_pass_is_the_one_that_is_read() -> None:
    torch.manual_seed(1)
    model, words = Dropping().double(), torch.randint(7, (B, T))
    state = torch.get_rng_state()
    found = ridden(model, words, torch.zeros(B, dtype=torch.int64), not_failed)
    after = torch.get_rng_state()
    model.zero_grad()
    torch.set_rng_state(state)
    each = losses(model, words) / B * SCALE
    assert torch.equal(torch.get_rng_state(), after)
    for i in range(B):
        alone = torch.autograd.grad(each[i], list(model.parameters()), retain_graph=True)
        oracle = torch.stack([gradient.square().sum() for gradient in alone])
        torch.testing.assert_close(found.sq_norms[i], oracle, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("name", MODELS)
def test_a_failing_ride_leaves_the_pass_alone(name: str) -> None:
    """It fails when the first gradient is read, in the middle of a backward pass that may recompute."""
    model, words = made(name)
    (losses(model, words).mean() * SCALE).backward()
    alone = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    problems: list[Exception] = []
    parameters = select_parameters(model, None)
    ride = Ride(model, sites(model, parameters), parameters, B, needs(model), problems.append, torch.zeros(B).long())
    loss = losses(model, words).mean() * SCALE
    ride.forward_is_over()
    loss.backward()  # not `going_back`
    ride.stop()
    assert all(torch.equal(a, p.grad) for a, p in zip(alone, model.parameters(), strict=True))
    (problem,) = problems
    with pytest.raises(GradscaleError, match=r"the loss must go backward by engine\.backward\(loss\), once"):
        raise problem


def test_a_part_of_the_parameters_is_measured_of_a_model_that_is_all_trained() -> None:
    model, words = made("checkpointed, reentrant")
    parameters = select_parameters(model, "block.3|head")
    ride = Ride(model, sites(model, parameters), parameters, B, frozenset({SquaredNorms()}), not_failed)
    loss = losses(model, words).mean()
    ride.forward_is_over()
    with ride.going_back():
        loss.backward()
    found = scaled(ride.finish()[0], B)
    oracle = read_gradients(model, sites(model, parameters), parameters, lambda m: losses(m, words), B, [])
    torch.testing.assert_close(found.sq_norms, oracle.sq_norms, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("name", ZOO)
def test_models_that_people_train(name: str, use_reentrant: bool | None) -> None:
    torch.manual_seed(0)
    case = ZOO[name](padded=False, attention="eager")
    if use_reentrant is not None:
        checkpointed(case.model, use_reentrant)
    parameters, size = select_parameters(case.model, None), len(next(iter(case.batch.values())))
    oracle = read_gradients(
        case.model, sites(case.model, parameters), parameters, lambda m: case.losses(m, case.batch), size, []
    )
    case.losses(case.model, case.batch).mean().backward()
    alone = {n: None if p.grad is None else p.grad.clone() for n, p in case.model.named_parameters()}
    case.model.zero_grad()
    needs = frozenset({SquaredNorms()})
    ride = Ride(case.model, sites(case.model, parameters), parameters, size, needs, not_failed)
    loss = case.losses(case.model, case.batch).mean()
    ride.forward_is_over()
    with ride.going_back():
        loss.backward()
    found = scaled(ride.finish()[0], size)
    ride.stop()
    scale = float(oracle.sq_norms.sum())
    torch.testing.assert_close(found.sq_norms, oracle.sq_norms, rtol=1e-5, atol=1e-9 * scale)
    for n, p in case.model.named_parameters():
        assert (p.grad is None) == (alone[n] is None), n
        assert p.grad is None or torch.equal(p.grad, alone[n]), n
