"""Promise: probes, forward mode, Gram matrices and sketches give one Gaussian width, within the errors they state.

Shapes: n points, B examples, P entries of all parameters, N probes, M draws, K sketch, C checkpoints.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import ModelAtHand, Recurrent, SelfAttention, Toy, UsedTwice, conv_net, gradients_one_by_one
from run_problems import FewDigits, Given, Regression, save_digits
from test_before_a_run import run_command
from test_stored_sketches import write_run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradscale as gs
from gradscale.errors import GradscaleError
from gradscale.grads.readings import Projected
from gradscale.grads.subject import Subject, load_batch, read_batch
from gradscale.measures.exact_sum import add_totals, total_of, value_of
from gradscale.measures.featurizer import FeaturizerWidth
from gradscale.measures.gaussian_width import GaussianWidth, WidthState, state_of
from gradscale.measures.gram_width import (
    Distortion,
    distortion_of_epsilon,
    distortion_of_gaussian_sketch,
    distortion_of_sign_sketch,
    distortion_of_variance,
    measured_distortion,
    sudakov_fernique,
    width_of_gram,
)
from gradscale.measures.measure import Estimate
from gradscale.run.features import featurizer_width
from gradscale.run.forward import forward_products
from gradscale.run.probe_products import check_forward, forward_is_cheaper
from gradscale.run.shard import prepare, run_shard
from gradscale.run.widths import _interval
from gradscale.sketches.count import CountSketch
from gradscale.sketches.gaussian import GaussianProbes, GaussianSketch
from gradscale.sketches.philox import key_of, normals
from gradscale.sketches.rademacher import RademacherSketch
from gradscale.sketches.srht import SrhtSketch
from gradscale.store.results import Run
from gradscale.task import Task, TensorExamples

DRAWS = 40_000
WIDTH_OF_FOUR = 1.0293754  # of four orthonormal points, as of both toys: math.md, section 12
SYMMETRIZED = {"real": 1.9377, "random": 1.4642}
VARIANCE = {"plain": 1.49, "recentred": 0.24}  # of the largest product of the toy "real"


def largest_normal(n: int) -> float:
    """E of the largest of n independent standard normals, by integration."""

    def density(x: float) -> float:
        return float(n * x * scipy.stats.norm.pdf(x) * scipy.stats.norm.cdf(x) ** (n - 1))

    return float(scipy.integrate.quad(density, -10, 10)[0])


def assert_agrees(estimate: Estimate, expected: float, error: float = 0.0) -> None:
    """Within four standard errors, of the estimate and of what is expected together."""
    assert estimate.stderr is not None
    assert abs(estimate.value - expected) <= 4 * math.hypot(estimate.stderr, error) + 1e-12


def gram_of(points: Sequence[Sequence[float]]) -> Tensor:
    rows = torch.tensor(points, dtype=torch.float64)
    return rows @ rows.mT


def subject_of(task: Task) -> Subject:
    return prepare(task, None, None)


def gradients(subject: Subject, ids: range) -> Tensor:
    """[B, P] float64, parameter after parameter."""
    found = gradients_one_by_one(subject.task, subject.parameters, subject.model, load_batch(subject, ids))
    return torch.cat([found[name] for name in subject.parameters], dim=1).double()


def probes_of(subject: Subject, probes: GaussianProbes) -> Tensor:
    """[P, N] float64: the definition."""
    return torch.cat([probes.materialize(name, (p.numel(), 1)) for name, p in subject.parameters.items()]).double()


def width_by_probes(subject: Subject, ids: range, width: GaussianWidth) -> dict[str, Estimate]:
    state = run_shard(subject, ids, 0, 4, [width], None).states[width]
    return {name: estimate for (name, _), estimate in width.compute(state).items()}


def width_by_forward(subject: Subject, ids: range, width: GaussianWidth) -> dict[str, Estimate]:
    probes = GaussianProbes(width.num_probes, width.seed)
    state = state_of(forward_products(subject, [load_batch(subject, ids)], probes))
    return {name: estimate for (name, _), estimate in width.compute(state).items()}


# --- from a Gram matrix -----------------------------------------------------------------------------------------------

SETS = {
    "two points": ([[1.0, 2.0, 0.0], [-1.0, 0.0, 0.5]], math.sqrt(8.25 / (2 * math.pi))),
    "two orthonormal": (np.eye(2).tolist(), 1 / math.sqrt(math.pi)),
    "three orthonormal": (np.eye(3).tolist(), 3 / (2 * math.sqrt(math.pi))),
    "ten orthonormal": (np.eye(10).tolist(), largest_normal(10)),
    "ten, far from the origin": ((np.eye(10) + 30).tolist(), largest_normal(10)),
    "two, each three times": (np.eye(2).repeat(3, axis=0).tolist(), 1 / math.sqrt(math.pi)),
    "one point": ([[3.0, -4.0]], 0.0),
    "zero": ([[0.0, 0.0]] * 3, 0.0),
}


@pytest.mark.parametrize(("points", "width"), SETS.values(), ids=SETS)
def test_known_widths_from_the_gram_matrix(points: list[list[float]], width: float) -> None:
    found = width_of_gram(gram_of(points), DRAWS)
    assert_agrees(found.width, width)
    assert found.lower <= width + 1e-12
    assert width <= found.upper + 1e-12
    assert found.clipped == 0
    assert found.width.n == len(points)


@pytest.mark.parametrize("kind", ["real", "random"])
def test_the_toys_from_their_gram_matrices(kind: str) -> None:
    """The width is blind to the common component; the symmetrized one is not."""
    found = width_of_gram(torch.eye(4) + (1.0 if kind == "real" else 0.0), DRAWS)
    assert_agrees(found.width, WIDTH_OF_FOUR)
    assert_agrees(found.symmetrized, SYMMETRIZED[kind], 1e-4)


def test_two_points_have_the_lower_bound_for_their_width() -> None:
    points, width = SETS["two points"]
    assert width_of_gram(gram_of(points)).lower == pytest.approx(width)


def test_the_value_is_brute_force_on_the_same_draws_and_its_error_honest() -> None:
    rows = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = width_of_gram(rows @ rows.mT, 400_000, seed=99).width.value
    scores = []
    for seed in range(100):
        width = width_of_gram(rows @ rows.mT, 400, seed).width
        assert width.stderr is not None
        scores.append((width.value - truth) / width.stderr)
        assert width.stderr <= float((rows - rows.mean(dim=0)).norm(dim=1).max()) / math.sqrt(400)
    assert 0.5 < (np.abs(scores) < 1).mean() < 0.85
    assert (np.abs(scores) < 2).mean() > 0.87


def test_draws_are_shared_between_gram_matrices_of_the_same_examples() -> None:
    """So that the width of a slightly changed set differs by much less than its error."""
    rows = torch.randn(8, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = rows + 0.02 * torch.randn(8, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def differences(shared: bool) -> list[float]:
        return [
            width_of_gram(moved @ moved.mT, 200, seed).width.value
            - width_of_gram(rows @ rows.mT, 200, seed if shared else seed + 1000).width.value
            for seed in range(30)
        ]

    assert np.std(differences(True)) < 0.1 * np.std(differences(False))


def test_a_slightly_indefinite_gram_matrix_is_clipped_and_says_so() -> None:
    """Sketched inner products beside the exact diagonal, as `run.gram` has them."""
    rows = torch.randn(60, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sketched = rows @ torch.randn(400, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 8
    gram = sketched @ sketched.mT
    gram.fill_diagonal_(0).diagonal().add_(rows.square().sum(dim=1))
    found, exact = width_of_gram(gram, DRAWS), width_of_gram(rows @ rows.mT, DRAWS)
    assert (exact.clipped, 0 < found.clipped < 0.2) == (0, True), found.clipped
    assert found.width.value == pytest.approx(exact.width.value, rel=0.15)


BAD_GRAMS = {
    "empty": (torch.zeros(0, 0), r"at least one point, got shape \(0, 0\)"),
    "not square": (torch.zeros(2, 3), r"square matrix of at least one point, got shape \(2, 3\)"),
    "not finite": (torch.tensor([[1.0, math.nan], [math.nan, 1.0]]), "gram must be finite"),
    "negative": (-torch.eye(3), "squared norms on its diagonal, got -1"),
    "not symmetric": (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "gram must be symmetric, got entries that differ by 0.5"),
    "indefinite": (torch.tensor([[1.0, 5.0], [5.0, 1.0]]), "nearly positive semi-definite, got 100% of its spectrum"),
}


@pytest.mark.parametrize(("gram", "message"), BAD_GRAMS.values(), ids=BAD_GRAMS)
def test_what_is_no_gram_matrix_is_refused(gram: Tensor, message: str) -> None:
    with pytest.raises(GradscaleError, match=message):
        width_of_gram(gram)


def test_no_draws_are_refused() -> None:
    with pytest.raises(GradscaleError, match="draws must be at least 1, got 0"):
        width_of_gram(torch.eye(2), 0)


# --- what a sketch may do ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 12), st.integers(3, 40), st.integers(0, 2**31))
def test_the_width_lies_in_the_interval_that_the_measured_distortion_gives(n: int, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, 60, dtype=torch.float64, generator=generator)
    sketched = rows @ torch.randn(60, dim, dtype=torch.float64, generator=generator) / math.sqrt(dim)
    exact, image = width_of_gram(rows @ rows.mT, 4000), width_of_gram(sketched @ sketched.mT, 4000)
    distortion = measured_distortion(rows @ rows.mT, sketched @ sketched.mT)
    low, high = sudakov_fernique(image.width.value, distortion)
    assert exact.width.stderr is not None
    assert image.width.stderr is not None
    error = 4 * (exact.width.stderr + high / image.width.value * image.width.stderr)
    assert low - error <= exact.width.value <= high + error


def test_the_distortion_of_a_gaussian_sketch_holds_for_all_pairs_of_nearly_all_sketches() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, promised, broken = torch.randn(20, 50, dtype=torch.float64, generator=generator), Distortion(0, 0), 0
    for _ in range(200):
        sketched = rows @ torch.randn(50, 100, dtype=torch.float64, generator=generator) / 10
        found, promised = (
            measured_distortion(rows @ rows.mT, sketched @ sketched.mT),
            distortion_of_gaussian_sketch(20, 100),
        )
        broken += found.low < promised.low or found.high > promised.high
    assert broken <= 0.05 * 200
    assert 0 < promised.low < 1 < promised.high


def test_distortions_by_hand() -> None:
    assert distortion_of_epsilon(0.36) == pytest.approx((0.8, math.sqrt(1.36)))
    assert sudakov_fernique(2.0, distortion_of_epsilon(1.5)) == pytest.approx((2 / math.sqrt(2.5), math.inf))
    assert measured_distortion(torch.eye(3), 4 * torch.eye(3)) == pytest.approx((2.0, 2.0))
    assert distortion_of_gaussian_sketch(1, 8) == (1, 1)
    for message, call in {
        "epsilon must be at least 0, got -1": partial(distortion_of_epsilon, -1),
        "of the same points, got 2 and 3": partial(measured_distortion, torch.eye(2), torch.eye(3)),
        "two different points, got 2 equal ones": partial(measured_distortion, torch.ones(2, 2), torch.ones(2, 2)),
    }.items():
        with pytest.raises(GradscaleError, match=message):
            call()


# --- probes -----------------------------------------------------------------------------------------------------------


def test_recentring_takes_the_variance_of_the_common_component_away() -> None:
    width, subject = GaussianWidth(DRAWS), subject_of(Toy("real"))
    state = run_shard(subject, range(4), 0, 4, [width], None).states[width]
    assert float(state.largest.var()) == pytest.approx(VARIANCE["plain"], abs=0.04)
    assert float((state.largest - state.mean).var()) == pytest.approx(VARIANCE["recentred"], abs=0.01)


def test_common_probes_make_differences_between_checkpoints_less_noisy() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(10, 30, dtype=torch.float64, generator=generator)
    moved = rows + 0.05 * torch.randn(10, 30, dtype=torch.float64, generator=generator)

    def value(points: Tensor, seed: int) -> float:
        width, probes = GaussianWidth(16, seed), GaussianProbes(16, seed).materialize("w", (30, 1)).double()
        return width.compute(state_of(points @ probes))["width", "all"].value

    common = np.std([value(moved, seed) - value(rows, seed) for seed in range(60)])
    independent = np.std([value(moved, seed) - value(rows, seed + 1000) for seed in range(60)])
    assert common < 0.2 * independent


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_states_of_any_shards_merged_in_any_order_have_the_same_bits(shards: int) -> None:
    width = GaussianWidth(8)
    subject = subject_of(Regression(rows=20))

    def state(ids: range) -> WidthState:
        found: WidthState = run_shard(subject, ids, 0, 4, [width], None).states[width]
        return found

    whole, size = state(range(20)), 20 // shards
    parts = [state(range(start, start + size)) for start in range(0, 20, size)]
    for order in itertools.permutations(parts):
        merged = reduce(width.merge, order)
        assert all(torch.equal(a, b) for a, b in zip(merged, whole, strict=True))
        assert width.compute(merged) == width.compute(whole)


numbers = st.floats(allow_nan=False, allow_infinity=False, min_value=-(2.0**500), max_value=2.0**500)


@settings(deadline=None, max_examples=60)
@given(st.lists(numbers, min_size=1, max_size=12), st.randoms())
def test_exact_sums(values: list[float], random: Any) -> None:
    """Correct to a few units in the last place of the result, whatever cancels, and the same in every order."""
    total = total_of(torch.tensor(values, dtype=torch.float64)[:, None])
    expected = float(sum((Fraction(value) for value in values), Fraction(0)))
    assert float(value_of(total)[0]) == pytest.approx(expected, rel=1e-15, abs=2.0**-380)
    shuffled = random.sample(values, len(values))
    single = [total_of(torch.tensor([[value]], dtype=torch.float64)) for value in shuffled]
    assert torch.equal(reduce(add_totals, single), total)


def test_exact_sums_of_many_numbers() -> None:
    values = torch.randn(10_001, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = [math.fsum(column) for column in values.T.tolist()]
    assert value_of(total_of(values)).tolist() == pytest.approx(expected, rel=1e-15)
    with pytest.raises(GradscaleError, match=r"must be below 2\^600, got inf"):
        total_of(torch.tensor([[math.inf]]))


# --- the path of the mean gradient ------------------------------------------------------------------------------------


def path_states(steps: Sequence[Tensor], width: GaussianWidth) -> list[WidthState]:
    probes = GaussianProbes(width.num_probes, width.seed).materialize("w", (steps[0].shape[1], 1)).double()
    return [state_of(points @ probes) for points in steps]


def test_the_width_of_the_path_is_that_of_the_mean_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(n, 7, dtype=torch.float64, generator=generator) + 1 for n in (3, 5, 4)]
    width = GaussianWidth(20_000)
    means = torch.stack([points.mean(dim=0) for points in steps])
    products = means @ GaussianProbes(width.num_probes, width.seed).materialize("w", (7, 1)).double()
    found = width.compute_over_steps(path_states(steps, width))["path_width", "union"]
    recentred = products.amax(dim=0) - products.mean(dim=0)
    assert found.value == pytest.approx(float(recentred.mean()), rel=1e-12)
    assert found.stderr == pytest.approx(float(recentred.std()) / math.sqrt(20_000), rel=1e-9)
    assert (found.n, found.definition) == (3, "gaussian_width/width/path/v1")
    exact = width_of_gram(means @ means.mT, DRAWS, set_name="path").width
    assert_agrees(found, exact.value, exact.stderr or 0)


def test_one_checkpoint_is_one_point_and_an_empty_one_none() -> None:
    width = GaussianWidth(8)
    (state,) = path_states([torch.ones(2, 3, dtype=torch.float64)], width)
    alone = width.compute_over_steps([state])["path_width", "union"]
    assert (alone.value, alone.stderr, alone.n) == (0.0, 0.0, 1)
    assert width.compute_over_steps([state, width.init()])["path_width", "union"].n == 1
    nothing = width.compute_over_steps([width.init()])["path_width", "union"]
    assert math.isnan(nothing.value)
    assert nothing.n == 0


# --- forward mode -----------------------------------------------------------------------------------------------------


def cross_entropy(name: str) -> Callable[[nn.Module, Mapping[str, Tensor]], Tensor]:
    return lambda model, batch: F.cross_entropy(model(batch[name]), batch["label"], reduction="none")


def at_hand(make: Callable[[], nn.Module], *shape: int) -> ModelAtHand:
    torch.manual_seed(0)
    model = make().double().eval()
    x = torch.randn(3, *shape, dtype=torch.float64)
    return ModelAtHand(model, {"x": x, "label": torch.tensor([0, 2, 1])}, cross_entropy("x"))


def tiny_gpt2(attention: str) -> ModelAtHand:
    """The embedding is the output head as well."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 19, "n_positions": 8}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, attn_implementation=attention)
    model = transformers.GPT2LMHeadModel(config).double().eval()

    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        scores = model(input_ids=batch["ids"]).logits[:, :-1]
        return F.cross_entropy(scores.mT, batch["ids"][:, 1:], reduction="none").mean(dim=1)

    return ModelAtHand(model, {"ids": torch.randint(19, (6, 8)), "label": torch.zeros(6, dtype=torch.long)}, losses)


MODELS: dict[str, Callable[[], Task]] = {
    "toy": partial(Toy, "real"),
    "tied": lambda: at_hand(UsedTwice, 5, 4),
    "attention": lambda: at_hand(SelfAttention, 5, 4),
    "convolutions": lambda: at_hand(conv_net, 1, 4, 4),
    "gpt2 with fused attention": lambda: tiny_gpt2("sdpa"),
    "gpt2 with plain attention": lambda: tiny_gpt2("eager"),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_forward_products_are_those_of_the_definition_and_of_the_reading(make: Callable[[], Task]) -> None:
    subject, ids, probes = subject_of(make()), range(3), GaussianProbes(6, seed=5)
    found = forward_products(subject, [load_batch(subject, ids)], probes)
    expected = gradients(subject, ids) @ probes_of(subject, probes)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    readings = read_batch(subject, load_batch(subject, ids), frozenset({Projected(probes)}))
    torch.testing.assert_close(found, readings.projections[Projected(probes)], rtol=1e-9, atol=1e-9)
    check_forward(subject, ids, probes)
    again = {name: parameter for name, parameter in subject.model.named_parameters() if name in subject.parameters}
    assert all(again[name] is parameter for name, parameter in subject.parameters.items())  # all put back


@pytest.mark.parametrize(("first", "last"), [(0, 4), (4, 6), (0, 1), (0, 6)])
def test_columns_are_those_of_the_probes_to_the_bit(first: int, last: int) -> None:
    probes = GaussianProbes(6, seed=2)
    found = probes.columns("some.weight", first, last, 40_000, torch.device("cpu"))
    assert torch.equal(found, probes.materialize("some.weight", (40_000, 1))[:, first:last])


class CutGraph(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.inner, self.head = how, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "detach":
            hidden = self.inner(x).detach()
        elif self.how == "reentrant":
            hidden = checkpoint(self.inner, x.requires_grad_(), use_reentrant=True)
        else:
            with torch.no_grad():
                hidden = self.inner(x)
        scores: Tensor = self.head(hidden + self.inner(x))
        return scores


def test_detach_cuts_forward_mode_as_well() -> None:
    subject, probes = subject_of(at_hand(partial(CutGraph, "detach"), 4)), GaussianProbes(2)
    expected = gradients(subject, range(3)) @ probes_of(subject, probes)
    torch.testing.assert_close(forward_products(subject, [load_batch(subject, range(3))], probes), expected)


@pytest.mark.parametrize("how", ["no_grad", "reentrant"])
def test_where_forward_mode_differs_the_check_finds_it(how: str) -> None:
    """Forward mode goes through torch.no_grad, and stops at a reentrant checkpoint."""
    subject = subject_of(at_hand(partial(CutGraph, how), 4))
    with pytest.raises(GradscaleError, match="forward mode must give the products of the backward pass, got"):
        check_forward(subject, range(3), GaussianProbes(2))


class Opaque(torch.autograd.Function):
    """Its backward is given, its forward derivative is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class WithOpaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = Opaque.apply(self.head(x))
        return scores


def test_an_operation_without_a_forward_derivative_is_refused() -> None:
    subject = subject_of(at_hand(WithOpaque, 4))
    with pytest.raises(GradscaleError, match=r"must have a forward derivative, got one without: .*take the products"):
        forward_products(subject, [load_batch(subject, range(3))], GaussianProbes(2))


def test_a_fused_recurrent_layer_has_a_forward_derivative_in_float64_alone() -> None:
    """On a CPU; in float32 it is another kernel."""
    task = at_hand(Recurrent, 5, 4)
    subject, probes = subject_of(task), GaussianProbes(2)
    expected = gradients(subject, range(3)) @ probes_of(subject, probes)
    torch.testing.assert_close(forward_products(subject, [load_batch(subject, range(3))], probes), expected)
    narrow = subject_of(ModelAtHand(task.net.float(), {**task.tensors, "x": task.tensors["x"].float()}, task.loss))
    with pytest.raises(GradscaleError, match=r"must have a forward derivative, got one without: .*mkldnn_rnn_layer"):
        forward_products(narrow, [load_batch(narrow, range(3))], probes)


def test_the_choice_by_cost() -> None:
    """Forward mode only where the probes are not kept, and passes are short."""
    single = partial(forward_is_cheaper, entries=10**9, batch=8, positions=1, batches=32)
    assert single(probes=64, kept=0)
    assert single(probes=64, kept=10**9)
    assert not single(probes=64, kept=64 * 10**9)
    assert not single(probes=64, kept=0, batches=1, batch=1024)
    sequences = partial(forward_is_cheaper, entries=10**6, batch=8, positions=128, batches=32)
    assert not sequences(probes=64, kept=64 * 10**6)
    assert not sequences(probes=64, kept=0)
    assert not sequences(probes=1, kept=10**6)


# --- all ways together ------------------------------------------------------------------------------------------------


def digits_task() -> Task:
    from gradscale.tasks.digits import Digits

    return Digits(width=16, depth=1)


@pytest.mark.parametrize(
    "make",
    [lambda: Given(SETS["two points"][0]), partial(Toy, "random"), digits_task, lambda: tiny_gpt2("sdpa")],
    ids=["two points", "toy", "digits", "gpt2"],
)
def test_probes_forward_mode_and_the_gram_matrix_agree(make: Callable[[], Task]) -> None:
    task = make()
    subject, ids, width = subject_of(task), range(min(6, len(task.examples()))), GaussianWidth(64)
    rows = gradients(subject, ids)
    gram = width_of_gram(rows @ rows.mT, DRAWS)
    backward, forward = width_by_probes(subject, ids, width), width_by_forward(subject, ids, width)
    for name, exact in (("width", gram.width), ("symmetrized", gram.symmetrized)):
        assert forward[name].value == pytest.approx(backward[name].value, rel=1e-4)
        assert_agrees(backward[name], exact.value, exact.stderr or 0)


# --- features ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WithFeatures:
    """The features are the given rows; NaN in one of them if `nan`."""

    rows: tuple[tuple[float, ...], ...]
    shape: tuple[int, ...] = ()

    def model(self, checkpoint: str | None) -> nn.Module:
        return nn.Linear(len(self.rows[0]), 3).double().eval()

    def examples(self) -> TensorExamples:
        return TensorExamples(x=torch.tensor(self.rows, dtype=torch.float64))

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["x"]), torch.zeros(len(batch["x"]), dtype=torch.long), reduction="none")

    def features(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["x"].reshape(self.shape) if self.shape else batch["x"]


def test_the_featurizer_width_is_the_width_of_the_features() -> None:
    points = SETS["two points"][0]
    found = featurizer_width(WithFeatures(tuple(map(tuple, points))), num_probes=20_000, microbatch=1)
    assert_agrees(found["width"], SETS["two points"][1])
    assert found["width"].definition == "featurizer/width/examples@theta/v1"
    with_nan = featurizer_width(WithFeatures((*map(tuple, points), (math.nan, 0.0, 0.0))), num_probes=20_000)
    assert with_nan["width"].value == pytest.approx(found["width"].value, rel=1e-12)
    assert with_nan["width"].n == 2


def test_the_featurizer_width_of_digits_bounds_that_of_the_last_layers_gradients() -> None:
    from gradscale.tasks.digits import Digits

    task = Digits(width=16, depth=1)
    subject = prepare(task, None, "head.weight")
    ids = range(20)
    batch = load_batch(subject, ids)
    rows = gradients(subject, ids)
    with torch.no_grad():
        h = task.features(subject.model, batch).double()
        scores = subject.model(batch["image"]).double()
    r = scores.softmax(dim=1) - F.one_hot(batch["label"], 10)
    torch.testing.assert_close(rows, torch.einsum("bc,bf->bcf", r, h).flatten(1), rtol=1e-4, atol=1e-5)
    of_rows, of_h, of_r = (width_of_gram(points @ points.mT, 4000).width.value for points in (rows, h, r))
    bound = math.sqrt(2) * (float(r.norm(dim=1).max()) * of_h + float(h.norm(dim=1).max()) * of_r)
    assert of_rows < bound


def test_features_that_are_missing_or_not_one_vector_an_example_are_refused() -> None:
    with pytest.raises(GradscaleError, match=r"needs task.features\(model, batch\)"):
        featurizer_width(Toy())
    with pytest.raises(GradscaleError, match=r"of shape \(2, F\), got torch.float64 of shape \(2, 2, 2\)"):
        featurizer_width(WithFeatures(((1.0,) * 4,) * 2, shape=(2, 2, 2)))
    with pytest.raises(GradscaleError, match="num_probes must be a whole number of at least 1, got 0"):
        featurizer_width(Toy(), num_probes=0)
    with pytest.raises(GradscaleError, match="num_probes must be at least 1, got 0"):
        FeaturizerWidth(0)


@pytest.mark.usefixtures("local_ray")
def test_a_run_measures_the_featurizer_width_beside_gradients(tmp_path: Path) -> None:
    """With the same bits, however its points were cut; features that are not finite have no part in it."""
    points = torch.randn(13, 4, generator=torch.Generator().manual_seed(0)).tolist()
    task = WithFeatures(tuple(map(tuple, points)))
    alone = featurizer_width(task, num_probes=32, seed=3)
    for shard_size in (3, 13):
        measures = [gs.FeaturizerWidth(32, seed=3), GaussianWidth(8)]
        settings: dict[str, Any] = {"workers": 1, "shard_size": shard_size, "microbatch": 3}
        found = gs.measure(task, str(tmp_path / str(shard_size)), measures=measures, **settings).estimates()
        found = found[found["measure"] == "featurizer"].set_index("name")
        assert set(found.index) == {"width", "symmetrized"}
        for name, estimate in alone.items():
            assert found.loc[name, ["value", "stderr", "n"]].tolist() == [estimate.value, estimate.stderr, 13]


@pytest.mark.usefixtures("local_ray")
def test_a_task_without_features_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(GradscaleError, match="leave the measure featurizer out"):
        gs.measure(Toy(), str(tmp_path / "run"), measures=[gs.FeaturizerWidth()], workers=1)
    assert not (tmp_path / "run" / "rows").exists()


def test_plan_says_what_features_cost(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(monkeypatch, "plan", "--task", "digits", "--measures", "featurizer:num_probes=4") == 0
    assert "and a forward pass for task.features" in capsys.readouterr().out


# --- from a finished run ----------------------------------------------------------------------------------------------

ROWS, DIM = 24, 256


@pytest.fixture(scope="module")
def run_and_gradients(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[int, Tensor]]:
    folder = tmp_path_factory.mktemp("digits")
    checkpoints = save_digits(folder, ROWS)
    task = FewDigits(str(folder))
    settings: dict[str, Any] = {"workers": 1, "shard_size": 10, "microbatch": 5, "sketch": f"gaussian:{DIM}"}
    width = GaussianWidth(256)
    run = gs.measure(task, str(folder / "run"), measures=[width], checkpoints=checkpoints, **settings)
    return run, {step: gradients(prepare(task, path, None), range(ROWS)) for step, path in checkpoints.items()}


@pytest.mark.parametrize("ids", [None, [3, 5, 8, 20]])
def test_the_width_of_chosen_examples_from_a_runs_sketches(
    run_and_gradients: tuple[Run, dict[int, Tensor]], ids: list[int] | None
) -> None:
    run, by_step = run_and_gradients
    rows = by_step[10] if ids is None else by_step[10][ids]
    exact = width_of_gram(rows @ rows.mT, DRAWS)
    found_ids, sketches = run.sketches(10)
    mine = torch.from_numpy(sketches[np.isin(found_ids, found_ids if ids is None else ids)]).double()
    image = width_of_gram(mine @ mine.mT, DRAWS)
    found = gs.width(run, 10, ids, draws=4000)
    assert_agrees(found.width, image.width.value, image.width.stderr or 0)
    assert_agrees(found.symmetrized, image.symmetrized.value, image.symmetrized.stderr or 0)
    assert found.width.n == len(rows)
    measured = gs.width(run, 10, ids, draws=4000, distortion=measured_distortion(rows @ rows.mT, mine @ mine.mT))
    for interval in (found.interval, measured.interval):
        assert interval is not None
        assert interval[0] * 0.97 < exact.width.value < interval[1] * 1.03
    assert measured.interval is not None
    assert found.interval is not None
    assert measured.interval[1] < found.interval[1]
    assert found.width.value == pytest.approx(exact.width.value, rel=0.2)


def test_the_width_of_the_tuple_from_a_runs_sketches(run_and_gradients: tuple[Run, dict[int, Tensor]]) -> None:
    """Of two checkpoints: their distance, the root of the mean squared one of the examples, by sqrt(2 pi)."""
    run, by_step = run_and_gradients
    distance = float((by_step[10] - by_step[20]).square().sum(dim=1).mean().sqrt())
    found = gs.tuple_width(run)
    assert found.width.value == pytest.approx(distance / math.sqrt(2 * math.pi), rel=0.1)
    assert found.clipped == 0
    assert (found.width.n, found.width.definition) == (2, "gaussian_width/width/tuple/gram/v1")
    again = gs.tuple_width(run, [10, 10, 20])  # the same point twice
    assert again.lower == pytest.approx(found.lower)
    assert_agrees(again.width, found.width.value, found.width.stderr or 0)
    assert gs.tuple_width(run, [20]).width[:3] == (0.0, 0.0, 1)
    ids = [1, 2, 3]
    few = float((by_step[10] - by_step[20])[ids].square().sum(dim=1).mean().sqrt())
    assert gs.tuple_width(run, ids=ids).lower == pytest.approx(few / math.sqrt(2 * math.pi), rel=0.2)


def test_the_norms_of_the_tuple_are_exact(run_and_gradients: tuple[Run, dict[int, Tensor]]) -> None:
    run, by_step = run_and_gradients
    found = gs.tuple_width(run, [20])
    norm = float(by_step[20].square().sum(dim=1).mean().sqrt())
    assert_agrees(found.symmetrized, norm * math.sqrt(2 / math.pi))


def test_the_path_of_a_run_is_in_its_estimates(run_and_gradients: tuple[Run, dict[int, Tensor]]) -> None:
    run, by_step = run_and_gradients
    frame = run.estimates().set_index(["name", "scope", "step"])
    distance = float((by_step[10].mean(dim=0) - by_step[20].mean(dim=0)).norm())
    row = frame.loc[("path_width", "union", 20)]
    assert abs(row["value"] - distance / math.sqrt(2 * math.pi)) < 4 * row["stderr"]
    assert frame.loc[("path_width", "union", 10), "value"] == 0
    assert row["n"] == 2


def stored_run(
    folder: Path,
    steps: Mapping[int, np.ndarray],
    scheme: str = "gaussian",
    shard: int = 1000,
    nonfinite: tuple[int, ...] = (),
    dtype: str = "float32",
) -> Run:
    """A run of these sketches [n, K], as `test_stored_sketches` writes them."""
    about = {"name": scheme, "version": 1, "seed": 0, "dim": next(iter(steps.values())).shape[1]}
    narrow = {step: matrix.astype(dtype) for step, matrix in steps.items()}
    return write_run(folder, narrow, shard=shard, nonfinite=nonfinite, scheme=about)


def test_no_bit_of_a_width_depends_on_the_shards_that_it_is_read_from(tmp_path: Path) -> None:
    """Blocks span shards, and shards hold several blocks; not the same examples are finite at the two steps."""
    matrix = np.random.default_rng(0).standard_normal((2500, 600))
    steps = {0: matrix, 1: matrix + np.random.default_rng(1).standard_normal(matrix.shape)}
    one, many = (stored_run(tmp_path / str(shard), steps, shard=shard, nonfinite=(7, 900)) for shard in (2500, 130))
    for ids in (None, range(31, 2000, 3)):
        assert gs.width(one, 0, ids, 50) == gs.width(many, 0, ids, 50)
        assert gs.tuple_width(one, ids=ids) == gs.tuple_width(many, ids=ids)
    kept = np.delete(matrix, [7, 900], axis=0).astype(np.float32).astype(np.float64)
    h = normals(key_of("sketch width", 1, 0), 0, 50, 600, torch.device("cpu")).double().numpy()
    products = kept @ h.T
    expected = (products.max(axis=0) - products.mean(axis=0)).mean()
    assert gs.width(one, 0, None, 50).width.value == pytest.approx(expected, rel=1e-12)
    assert gs.width(one, 0, None, 50).symmetrized.value == pytest.approx(np.abs(products).max(axis=0).mean(), rel=1e-12)


PEAK = """
import sys
import gradscale as gs

def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

for folder in sys.argv[1:]:  # of the small run first, so that all is imported and every pool warm
    run = gs.open_run(folder)
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = kib("VmRSS")
    gs.width(run, 0, draws=64), gs.tuple_width(run, draws=100)
print(kib("VmHWM") - before >> 10, "MiB")
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read as Linux has it")
def test_widths_of_many_sketches_are_found_in_little_memory(tmp_path: Path, environment: dict[str, str]) -> None:
    """Two steps of 192 MiB each, which took 384 MiB and twice that in float64, within 240 MiB."""
    rows, dim = 98_304, 512
    matrix = np.random.default_rng(0).standard_normal((rows, dim), dtype=np.float32)
    stored_run(tmp_path / "small", {0: matrix[:2000], 1: matrix[:2000]}, "count")
    stored_run(tmp_path / "large", {0: matrix, 1: matrix[::-1].copy()}, "count", shard=rows // 3)
    del matrix
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) < 240, done.stdout


POINTS = {
    "dense": np.random.default_rng(5).standard_normal((3, 300)),
    "two entries": np.eye(2, 300) * [[1.0], [-1.0]],  # their difference is lost where the two entries meet
    "rank one and close": np.outer([1.0, 1.1, -2.0], np.arange(300.0)) + np.eye(3, 300),
}
MAPS: dict[str, Callable[[int, int], Any]] = {
    "gaussian": GaussianSketch,
    "rademacher": RademacherSketch,
    "srht": SrhtSketch,
    "count": CountSketch,
}


@pytest.mark.parametrize("name", MAPS)
def test_what_is_known_of_a_scheme_covers_the_width_for_nearly_all_seeds(name: str) -> None:
    """Of sets of two and three points, whose widths are exact on both sides."""
    covered, dim, seeds = Counter[str](), 200, 100
    for seed in range(seeds):
        matrix = MAPS[name](dim, seed).materialize("w", (20, 15)).double().numpy()
        for kind, points in POINTS.items():
            sketches, exact = points @ matrix, exact_width(points @ points.T)
            image = Estimate(exact_width(sketches @ sketches.T), 0.0, len(points), "estimator", "", "")
            interval = _interval(image, {"name": name, "dim": dim}, 0.0)
            assert interval is not None
            covered[kind] += interval[0] <= exact * (1 + 1e-9) and exact <= interval[1] * (1 + 1e-9)
    assert min(covered[kind] for kind in POINTS) >= 0.95 * seeds, covered


def exact_width(gram: np.ndarray) -> float:
    """Of three points or two: half the sum of their distances by sqrt(2 pi)."""
    norms = np.diag(gram)
    distances = np.sqrt(np.maximum(0, norms[:, None] + norms - 2 * gram))
    return float(distances.sum() / 2 / math.sqrt(2 * math.pi) / (1 if len(gram) == 2 else 2))


def test_three_points_have_half_their_perimeter_for_their_width() -> None:
    gram = POINTS["dense"] @ POINTS["dense"].T
    assert_agrees(width_of_gram(torch.from_numpy(gram), DRAWS).width, exact_width(gram))


@pytest.mark.parametrize(("name", "points", "dim", "known"), [
    ("gaussian", 100, 49, True), ("gaussian", 100, 48, False), ("rademacher", 100, 74, True),
    ("rademacher", 100, 73, False), ("srht", 14, 4096, True), ("srht", 15, 4096, False), ("count", 14, 4096, True),
    ("count", 15, 4096, False), ("kronecker", 2, 4096, False), ("identity", 10**6, 8, True),
])  # fmt: skip
def test_an_interval_without_an_upper_end_is_none(name: str, points: int, dim: int, known: bool) -> None:
    interval = _interval(Estimate(2.0, 0.1, points, "estimator", "", ""), {"name": name, "dim": dim}, 0.0)
    assert (interval is not None) == known
    if interval is not None:
        assert 0 < interval[0] <= 2.0 <= interval[1] < math.inf


@pytest.mark.parametrize(("dtype", "wide"), [("float32", 1e-3), ("float16", 5.0)])
def test_of_the_identity_the_interval_is_what_rounding_may_have_done(tmp_path: Path, dtype: str, wide: float) -> None:
    """Gradients far from the origin and close together: float16 keeps little of their distances, and says so."""
    points = 100 + np.random.default_rng(0).standard_normal((2, 50)) / 10
    found = gs.width(stored_run(tmp_path / "run", {0: points}, "identity", dtype=dtype), 0, draws=4000)
    exact = exact_width(points @ points.T)
    assert found.interval is not None
    assert found.width.stderr is not None
    assert found.interval[0] - 4 * found.width.stderr <= exact <= found.interval[1] + 4 * found.width.stderr
    assert found.interval[1] - found.interval[0] < wide * exact
    assert (found.interval[1] - found.interval[0] > 0.1 * exact) == (dtype == "float16")


def test_a_kronecker_sketch_gives_no_interval_but_by_a_distortion(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run", {0: np.eye(4, 20)}, "kronecker")
    assert gs.width(run, 0).interval is None
    found = gs.width(run, 0, distortion=Distortion(0.5, 2.0))
    assert found.interval == (found.width.value / 2, found.width.value * 2)


def test_the_distortions_of_signs_and_of_variances_by_hand() -> None:
    t = math.log(20 * 19 / 0.05)
    assert distortion_of_sign_sketch(20, 100).low == pytest.approx(math.sqrt(1 - math.sqrt(6 * t / 100)))
    assert distortion_of_sign_sketch(20, 100).high == distortion_of_gaussian_sketch(20, 100).high
    assert distortion_of_variance(2, 640) == pytest.approx((math.sqrt(0.75), math.sqrt(1.25)))
    assert distortion_of_variance(1, 4) == distortion_of_sign_sketch(1, 4) == (1, 1)


def test_examples_and_steps_that_a_run_does_not_have_are_refused(
    run_and_gradients: tuple[Run, dict[int, Tensor]],
) -> None:
    run, _ = run_and_gradients
    for message, call in {
        r"example id must be one of those measured at step 10 of .*, got 99": partial(gs.width, run, 10, [3, 99]),
        r"example id must be one of those measured at step 20 of .*, got 98": partial(gs.tuple_width, run, [20], [98]),
        "example ids must be whole numbers, got float64": partial(gs.width, run, 10, [1.5]),
        "ids must name at least one finite example at step 20, got none": partial(gs.tuple_width, run, [20], []),
        "ids must name at least one finite example at step 10, got none": partial(gs.width, run, 10, []),
        "step must be one of .*, got 7": partial(gs.width, run, 7),
        "steps must name at least one step": partial(gs.tuple_width, run, []),
        "draws must be a whole number of at least 1, got 0": partial(gs.width, run, 10, None, 0),
    }.items():
        with pytest.raises(GradscaleError, match=message):
            call()
