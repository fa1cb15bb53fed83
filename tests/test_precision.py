"""Half precision, of weights or by autocast: what is added up is added up in float32, and the gradients are autograd's.

Two oracles. `exact` rebuilds every gradient in float64 from the same half-precision factors: it has to be met to
float32's accuracy, by sums over thousands of positions that half precision would lose, overflow or flush to zero.
Autograd's gradients of one example in the same precision are met to some units of the half type's rounding: the
two round the same numbers at different places (a batch or one example; a bias's gradient in float32 or in half),
each by half a unit, and later layers carry that on: UNITS of it.

Shapes: B examples, T positions, E features, P entries of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import pytest
import test_rules
import test_zoo
import torch
from problems import ModelAtHand
from test_rules import called, loop, names, randn, rule_of, widened
from torch import Tensor, nn
from torch.nn import functional as F

from gradscale.errors import GradscaleError
from gradscale.grads.capture import capture
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
from gradscale.grads.readings import GradientSums, SquaredNorms
from gradscale.grads.subject import Subject, load_batch, read_batch
from gradscale.grads.sweep import sq_norms, weighted_sum
from gradscale.run.check import check_subject, compare_alone
from gradscale.run.shard import prepare
from gradscale.task import Batch

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),  # of torch's RMSNorm under autocast
]
HALVES = [torch.bfloat16, torch.float16]
FLOAT32 = 1e-5  # float32's rounding in sums of a few thousand terms, relative to the largest norm
UNITS = 3  # of the half type's eps, of the parameter's own gradients and of a tenth of the whole
B = 3

BatchLosses = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
Losses = Callable[[nn.Module], Tensor]


# --- rules ------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return out


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.inner = kind(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)[0]
        return out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.tanh(self.table(ids)))
        return scores


def gpt2_linear() -> nn.Module:
    made: nn.Module = pytest.importorskip("transformers").pytorch_utils.Conv1D(3, 4)
    return made


class Long(NamedTuple):
    make: Callable[[], nn.Module]
    shape: Callable[[int], tuple[int, ...]]  # of one example of T positions
    integers: int = 0


LONG: dict[str, Long] = {
    "linear": Long(partial(nn.Linear, 4, 3), lambda T: (T, 4)),
    "conv1d": Long(gpt2_linear, lambda T: (T, 4)),
    "embedding": Long(partial(nn.Embedding, 5, 3), lambda T: (T,), 5),
    "convolution": Long(partial(nn.Conv1d, 4, 6, 3), lambda T: (4, T)),
    "convolution2": Long(partial(nn.Conv2d, 2, 4, 3, groups=2), lambda T: (2, T // 16, 16)),
    "transposed": Long(partial(nn.ConvTranspose1d, 4, 6, 3), lambda T: (4, T)),
    "layer-norm": Long(partial(nn.LayerNorm, 4), lambda T: (T, 4)),
    "rms-norm": Long(partial(nn.RMSNorm, 4), lambda T: (T, 4)),
    "llama-norm": Long(partial(test_rules.hf_norm, "LlamaRMSNorm"), lambda T: (T, 6)),
    "group-norm": Long(partial(nn.GroupNorm, 2, 6), lambda T: (6, T)),
    "batch-norm": Long(partial(test_rules.running, partial(nn.BatchNorm1d, 4)), lambda T: (4, T)),
    "generic": Long(test_rules.LayerScale, lambda T: (T, 4)),
    "attention": Long(partial(nn.MultiheadAttention, 4, 2, batch_first=True), lambda T: (T // 16, 4)),
    "recurrent": Long(partial(nn.GRU, 4, 3, batch_first=True), lambda T: (T // 4, 4)),
}


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("case", test_rules.CASES)
def test_a_rule_adds_up_in_float32(case: str, kind: torch.dtype) -> None:
    """The generic rule too, by running its module in float32."""
    module, source = test_rules.made(case, kind, B)
    call = called(module, (source,))
    test_rules.compare(call, loop(widened(call)), FLOAT32)


@pytest.mark.parametrize("size", [300.0, 1e-4])
@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("case", LONG)
def test_long_sums(case: str, kind: torch.dtype, size: float) -> None:
    """Over 2048 positions, of one sign, and of a size whose squares are beyond float16, above or below."""
    make, shape, integers = LONG[case]
    torch.manual_seed(0)
    module = make().to(kind)
    source = torch.randint(integers, (B, *shape(2048))) if integers else (1 + randn(1, B, *shape(2048)).abs()).to(kind)
    args = (source, source, source) if case == "attention" else (source,)
    call = called(module, args, {"need_weights": False} if case == "attention" else None)
    call = call._replace(grads=[(size * (1 + grad.double().abs())).to(kind) for grad in call.grads[:1]])
    if len(call.outputs) > 1:  # the recurrent layer's last state
        call = call._replace(grads=[*call.grads, torch.zeros_like(call.outputs[1])])
    dims = [0, 1] if case == "recurrent" else [0]
    found, expected = rule_of(module)(call, names(module)), loop(widened(call), out=dims)
    largest = max(float(grads.norm(dim=1).max()) for grads in expected.values())
    for name, grads in expected.items():
        near(found[name], grads, 0.01 * largest)
    assert (size > 1) == (largest**2 > torch.finfo(torch.float16).max)
    assert (size < 1) == (size**2 < torch.finfo(torch.float16).smallest_normal)


@pytest.mark.parametrize("kind", HALVES)
def test_half_precision_would_lose_such_a_sum(kind: torch.dtype) -> None:
    """That the test above could fail: terms of one sign, added up in half precision."""
    terms, total = (1 + randn(0, 2048).abs()).to(kind), torch.zeros((), dtype=kind)
    for term in terms:
        total += term
    assert abs(float(total) / float(terms.double().sum()) - 1) > 100 * FLOAT32


# --- models of half-precision weights ---------------------------------------------------------------------------------

ZOO = ["gpt2", "llama", "vit", "bert", "mixtral"]


def zoo(name: str, kind: torch.dtype) -> test_zoo.Case:
    """A model of the architecture; GPT-2's head is its token table."""
    case = test_zoo.ALL[name](padded=False, attention="eager")
    batch = {key: x.to(kind) if x.is_floating_point() else x for key, x in case.batch.items()}
    return case._replace(model=case.model.to(kind), batch=batch)


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("name", ZOO)
def test_models_in_half_precision(name: str, kind: torch.dtype) -> None:
    case = zoo(name, kind)
    hold(case.model, case.losses, case.batch, kind, None)


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("name", ZOO)
def test_models_under_autocast(name: str, kind: torch.dtype) -> None:
    case = zoo(name, torch.float32)
    hold(case.model, case.losses, case.batch, kind, kind)


@pytest.mark.parametrize("kind", HALVES)
def test_totals_are_float64_and_sums_float32(kind: torch.dtype) -> None:
    subject, batch = subject_of(zoo("gpt2", kind))
    readings = read_batch(subject, batch, frozenset({SquaredNorms(), GradientSums()}))
    assert readings.losses.dtype == readings.sq_norms.dtype == torch.float64
    assert {total.dtype for total in readings.sums[GradientSums()][None].values()} == {torch.float32}


# --- autocast ---------------------------------------------------------------------------------------------------------

MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    **{name: (case.make, case.shape, case.integers) for name, case in test_rules.CASES.items()},
    **{name: (make, shape(8), integers) for name, (make, shape, integers) in LONG.items() if "2" not in name},
    "attention": (Attention, (5, 4), 0),
    "recurrent": (partial(Recurrent, nn.GRU), (5, 4), 0),
    "lstm": (partial(Recurrent, nn.LSTM), (5, 4), 0),
    "tied": (Tied, (6,), 5),
}


def module_of(name: str) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """With modules before and after it, so that its gradients come in half precision, as do its inputs if they can."""
    make, shape, integers = MODULES[name]
    torch.manual_seed(0)
    module = make()
    if integers:
        net, source = nn.Sequential(module), torch.randint(integers, (B, *shape))
    else:
        source = torch.randn(B, *shape)
        net = nn.Sequential(nn.Linear(shape[-1], shape[-1]), module)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        width = module(source).shape[-1]
    return net.append(nn.Linear(width, 2)).eval(), {"x": source}


def halved_squares(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(batch["x"]).float().tanh().square().flatten(1).mean(dim=1)


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("name", MODULES)
def test_modules_under_autocast(name: str, kind: torch.dtype) -> None:
    model, batch = module_of(name)
    try:
        with torch.autocast("cpu", kind):
            model(batch["x"])
    except RuntimeError as error:
        if "could not create a primitive descriptor for the LSTM" not in str(error):
            raise
        pytest.skip("torch itself cannot run an LSTM under autocast on this processor")
    hold(model, halved_squares, batch, kind, kind)


@pytest.mark.parametrize("kind", HALVES)
def test_modules_that_run_again_run_as_they_ran(kind: torch.dtype) -> None:
    """The generic rule and the proof of RMS norms, in the backward pass, where autocast is off."""

    class Noting(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
            return super().forward(x)

    class NotingRMSNormOfAnotherKind(Noting):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    seen: list[torch.dtype | None] = []
    for make in (Noting, NotingRMSNormOfAnotherKind):
        for autocast in (kind, None):
            seen.clear()
            model = nn.Sequential(nn.Linear(4, 4), make(4, eps=1e-6), nn.Linear(4, 2))
            captured(model, in_precision(halved_squares, {"x": torch.randn(B, 4)}, autocast))
            assert len(seen) > 1
            assert set(seen) == {autocast}


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit"])
def test_autocast_around_the_whole_pass_is_autocast_around_the_model(name: str) -> None:
    """The same bits: what the rules and readings add up is not cast, and the weights are left as autocast knew them."""
    case = zoo(name, torch.float32)
    parameters = select_parameters(case.model, None)

    def autograd() -> list[Tensor]:
        return list(torch.autograd.grad(case.losses(case.model, case.batch).sum(), list(parameters.values())))

    inside = captured(case.model, in_precision(case.losses, case.batch, torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        before = autograd()
        around = captured(case.model, in_precision(case.losses, case.batch, None, leave=True))
        after = autograd()
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_cache_enabled()
    for name, grads in inside.items():
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(materialize(around[name]), materialize(grads))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.requires_grad for parameter in parameters.values())


def test_autocast_may_keep_cast_weights_of_a_run_without_gradient() -> None:
    """For a target computed under no_grad, in the same context as the run that counts: no gradient is lost to them."""

    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                target = model(batch["x"])
            return (model(batch["x"]) - 0.5 * target).float().square().mean(dim=1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    batch = {"x": torch.randn(B, 4)}
    found = captured(model, lambda model: losses(model, batch))
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert all(materialize(grads).any() for grads in found.values())


# --- the check before a run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("name", ZOO)
def test_the_check_passes_what_only_rounds(name: str, kind: torch.dtype, autocast: bool) -> None:
    case = zoo(name, torch.float32 if autocast else kind)
    subject, _ = subject_of(case, kind if autocast else None)
    check_subject(subject)
    compared = compare_alone(subject, range(B))
    assert all(one.agrees for one in compared), compared
    assert all(one.allowed < 0.5 for one in compared)


def averaged(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return test_zoo.next_tokens(model, batch) / len(batch["ids"])


def relative_to_others(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    scores = model(input_ids=batch["ids"]).logits[:, 0]
    return F.cross_entropy(scores - scores.mean(dim=0), batch["label"], reduction="none")


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("losses", [averaged, relative_to_others])
def test_the_check_finds_examples_that_are_mixed(losses: test_zoo.Losses, kind: torch.dtype, autocast: bool) -> None:
    case = zoo("gpt2", torch.float32 if autocast else kind)._replace(losses=losses)
    subject, _ = subject_of(case, kind if autocast else None)
    with pytest.raises(GradscaleError, match="same gradient alone as within a batch"):
        check_subject(subject)


# --- the oracles ------------------------------------------------------------------------------------------------------


def hold(
    model: nn.Module,
    losses: BatchLosses,
    batch: Mapping[str, Tensor],
    kind: torch.dtype,
    autocast: torch.dtype | None,
) -> None:
    """Both oracles, for every parameter."""
    parameters = select_parameters(model, None)
    found = captured(model, in_precision(losses, batch, autocast))
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for i in range(B):
        (loss,) = in_precision(losses, {name: x[i : i + 1] for name, x in batch.items()}, autocast)(model)
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
            full = torch.zeros_like(parameter) if grad is None else grad.to_dense() if grad.is_sparse else grad
            rows[name].append(full.flatten())
    autograd = {name: torch.stack(list_of).double() for name, list_of in rows.items()}
    whole = float(torch.cat(list(autograd.values()), dim=1).norm())
    eps = torch.finfo(kind).eps
    for name, grads in autograd.items():
        if name not in found:
            assert not grads.any()
            continue
        assert found[name].dtype == torch.float32
        near(found[name], exact(found[name]), 1e-3 * whole)
        error = float((materialize(found[name]) - grads).norm())
        assert error <= UNITS * eps * (float(grads.norm()) + 0.1 * whole), f"{name}: {error / whole / eps:.2g} eps"


def near(grads: LayerGrads, expected: Tensor, least: float) -> None:
    """Gradients, squared norms and a weighted sum to float32's accuracy, relative to the largest norm or `least`."""
    scale = max(float(expected.norm(dim=1).max()), least)
    weights = torch.linspace(-1, 2, len(expected), dtype=torch.float64)
    norms, total = sq_norms(grads), weighted_sum(grads, weights)
    assert norms.dtype == torch.float64
    assert total.dtype == materialize(grads).dtype == torch.float32
    assert float((materialize(grads) - expected).norm()) <= FLOAT32 * scale
    assert float((norms.sqrt() - expected.norm(dim=1)).abs().max()) <= FLOAT32 * scale
    assert float((total - weights @ expected).norm()) <= len(expected) * FLOAT32 * scale


def exact(grads: LayerGrads) -> Tensor:
    """[B, P] float64, from the factors as they are."""
    if isinstance(grads, SharedGrads):
        return torch.stack([exact(use) for use in grads.uses]).sum(dim=0)
    if isinstance(grads, OuterGrads):
        return torch.einsum("btr,btc->brc", grads.left.double(), grads.right.double()).flatten(1)
    if isinstance(grads, GroupedGrads):
        return torch.einsum("bgtr,bgtc->bgrc", grads.left.double(), grads.right.double()).flatten(1)
    if isinstance(grads, EmbeddingGrads):
        rows = F.one_hot(grads.ids, grads.num_rows).double()
        return torch.einsum("btr,btc->brc", rows, grads.grads.double()).flatten(1)
    if isinstance(grads, ExpertGrads):
        parts = [
            [grads.left[a:b].double().mT @ grads.right[a:b].double() for a, b in pairwise(row)] for row in grads.bounds
        ]
        return torch.stack([torch.stack(part) for part in parts], dim=1).flatten(1)
    assert isinstance(grads, DenseGrads)
    return grads.grads.double()


def captured(model: nn.Module, losses: Losses) -> dict[str, LayerGrads]:
    found: dict[str, LayerGrads] = {}
    capture(model, sites(model, select_parameters(model, None)), losses, B, found.__setitem__)
    return found


def in_precision(
    losses: BatchLosses,
    batch: Mapping[str, Tensor],
    autocast: torch.dtype | None,
    *,
    leave: bool = False,
) -> Losses:
    """Under autocast to `autocast`, without it, or as it is outside."""

    def run(model: nn.Module) -> Tensor:
        if leave:
            return losses(model, batch)
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            return losses(model, batch)

    return run


def subject_of(case: test_zoo.Case, autocast: torch.dtype | None = None) -> tuple[Subject, Batch]:
    task = ModelAtHand(case.model, case.batch, lambda model, batch: in_precision(case.losses, batch, autocast)(model))
    subject = prepare(task, None, None)
    return subject, load_batch(subject, range(B))
