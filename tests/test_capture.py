"""One pass with hooks gives what autograd gives one example at a time, and leaves the model as it was.

Shapes: B examples, T positions, P entries of a parameter, K outputs of a linear map.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from problems import (
    ModelAtHand,
    Padded,
    PartlyUsed,
    Recurrent,
    SelfAttention,
    TopLevelToken,
    UsedTwice,
    conv_net,
    gradients_one_by_one,
)
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradscale.errors import GradscaleError
from gradscale.grads.readings import GradientSums, Projected, Readings, SquaredNorms
from gradscale.grads.subject import Subject, load_batch, read_batch
from gradscale.run.check import check_subject
from gradscale.run.shard import labels_of, prepare, run_shard
from gradscale.sketches.gaussian import GaussianProbes, GaussianSketch
from gradscale.tasks.digits import Digits

B = 5
SUMS, BY_CLASS = GradientSums(), GradientSums(by_class=True)
PROBES, SKETCH = Projected(GaussianProbes(6, seed=1)), Projected(GaussianSketch(7, seed=2))
READINGS = frozenset({SquaredNorms(), SUMS, BY_CLASS, PROBES, SKETCH})

Losses = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def cross_entropy(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["label"], reduction="none")


def next_token(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    scores = model(input_ids=batch["x"]).logits[:, :-1]
    return F.cross_entropy(scores.mT, batch["x"][:, 1:], reduction="none").mean(dim=1)


def of(make: Callable[[], nn.Module], *shape: int, integers: int = 0, losses: Losses = cross_entropy) -> ModelAtHand:
    torch.manual_seed(0)
    net = make().double().eval()
    x = torch.randint(integers, (B, *shape)) if integers else torch.randn(B, *shape, dtype=torch.float64)
    return ModelAtHand(net, {"x": x, "label": torch.tensor([0, 2, 1, 0, 2])}, losses)


def digits() -> ModelAtHand:
    task = Digits(width=16, depth=2)
    batch = task.examples().batch(range(B))
    tensors = {"x": batch["image"].double(), "label": batch["label"]}
    return ModelAtHand(task.model(None).double(), tensors, cross_entropy)


def gpt2(attention: str) -> ModelAtHand:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=19,
        n_positions=9,
        n_embd=8,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
    )
    task = of(lambda: transformers.GPT2LMHeadModel(config), 6, integers=19, losses=next_token)
    assert task.net.lm_head.weight is task.net.transformer.wte.weight
    return task


def weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3))


class SequenceFirst(nn.Module):
    """Attention and a recurrent layer with torch's default layout [T, B, E], and the latter's last state."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.recurrent = nn.MultiheadAttention(4, 2), nn.LSTM(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        _, (last, _) = self.recurrent(self.attention(x, x, x, need_weights=False)[0])
        return last[0]


CASES: dict[str, Callable[[], ModelAtHand]] = {
    "digits": digits,
    "gpt2-eager": partial(gpt2, "eager"),
    "gpt2-sdpa": partial(gpt2, "sdpa"),
    "conv": partial(of, conv_net, 1, 4, 4),
    "top-level-token": partial(of, TopLevelToken, 3, 4),
    "attention": partial(of, SelfAttention, 3, 4),
    "encoder-layer": partial(
        of,
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), nn.Flatten(), nn.Linear(12, 3)
        ),
        3,
        4,
    ),
    "sequence-first": partial(of, SequenceFirst, 3, 4),
    "sequence-first, as many positions as examples": partial(of, SequenceFirst, 5, 4),
    "used-twice": partial(of, UsedTwice, 3, 4),
    "padding": partial(of, Padded, 3, integers=5),
    "weight-norm": partial(of, weight_norm, 4),
    "partly-used": partial(of, PartlyUsed, 3, 4),
    "recurrent": partial(of, Recurrent, 3, 4),
}


@pytest.mark.parametrize("case", CASES)
def test_float64_is_the_loop_over_examples(case: str) -> None:
    task = CASES[case]()
    subject, batch = prepare(task, None, None), task.tensors
    assert list(subject.parameters) == [name for name, _ in task.net.named_parameters()]
    compare(subject, read(subject), oracle(task, subject), 1e-9, 1e-12)
    torch.testing.assert_close(read(subject).losses, task.losses(task.net, batch).detach(), rtol=1e-12, atol=0)
    check_subject(subject)


@pytest.mark.parametrize("case", CASES)
def test_float32_is_the_float64_loop_to_rounding(case: str) -> None:
    exact_task = CASES[case]()
    exact_task.net.float().double()  # weights that float32 holds
    exact = oracle(exact_task, prepare(exact_task, None, None))
    task = lowered(exact_task, torch.float32)
    compare(prepare(task, None, None), read(prepare(task, None, None)), exact, 1e-4, 2e-6)


@pytest.mark.parametrize("case", ["digits", "gpt2-sdpa", "attention", "padding"])
def test_bfloat16_is_near(case: str) -> None:
    exact_task = CASES[case]()
    task = lowered(exact_task, torch.bfloat16)
    exact = oracle(exact_task, prepare(exact_task, None, None))
    subject = prepare(task, None, None)
    readings = read(subject)
    assert readings.finite.all()
    assert readings.sq_norms.dtype == torch.float64
    total = torch.stack([g.square().sum(dim=1) for g in exact.values()]).sum(dim=0)
    torch.testing.assert_close(readings.sq_norms.sum(dim=1), total, rtol=0.2, atol=0)
    check_subject(subject)


def test_digits_is_vmap_of_grad() -> None:
    task = digits()
    subject = prepare(task, None, None)

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        scores = torch.func.functional_call(task.net, parameters, (image[None],))
        return F.cross_entropy(scores, label[None])

    parameters = {name: p.detach() for name, p in subject.parameters.items()}
    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, task.tensors["x"], task.tensors["label"])
    compare(subject, read(subject), {name: grad.flatten(1) for name, grad in found.items()}, 1e-9, 1e-12)


@pytest.mark.parametrize("B_", [1, 2, 3])
@pytest.mark.parametrize("case", ["gpt2-sdpa", "top-level-token", "conv", "attention", "recurrent", "used-twice"])
def test_any_batch_size(case: str, B_: int) -> None:
    """B = 1, where everything looks broadcast, and B equal to other dimensions of the model."""
    task = CASES[case]()
    task = ModelAtHand(task.net, {name: tensor[:B_] for name, tensor in task.tensors.items()}, task.loss)
    subject = prepare(task, None, None)
    compare(subject, read(subject), oracle(task, subject), 1e-9, 1e-12)


@pytest.mark.parametrize("params", [r"^blocks\.1\.", "norm", r"class_token|head\.bias", r"patches\.weight$"])
def test_params_measures_a_part_of_the_model(params: str) -> None:
    task = digits()
    whole, part = prepare(task, None, None), prepare(task, None, params)
    assert 0 < len(part.parameters) < len(whole.parameters)
    exact = oracle(task, whole)
    compare(part, read(part), {name: exact[name] for name in part.parameters}, 1e-9, 1e-12)
    check_subject(part)


def test_frozen_parameters_are_left_out() -> None:
    task = digits()
    task.net.blocks.requires_grad_(False)
    task.net.patches.weight.requires_grad_(False)
    subject = prepare(task, None, None)
    assert not [name for name in subject.parameters if name.startswith("blocks")]
    compare(subject, read(subject), oracle(task, subject), 1e-9, 1e-12)
    check_subject(subject)


def test_unused_parameters_have_zero_gradients() -> None:
    subject = prepare(CASES["partly-used"](), None, None)
    readings = read(subject)
    unused = [j for j, name in enumerate(subject.parameters) if name.split(".")[0] in ("spare", "ignored")]
    assert len(unused) == 4
    assert not readings.sq_norms[:, unused].any()
    for name in ("spare.weight", "ignored.bias"):
        assert torch.equal(readings.sums[SUMS][None][name], torch.zeros(subject.parameters[name].numel()).double())


# --- activation checkpointing -----------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Two blocks, the second within the first's checkpoint if they are nested; one layer is used in both."""

    def __init__(self, *, use_reentrant: bool, nested: bool) -> None:
        super().__init__()
        self.run = partial(checkpoint, use_reentrant=use_reentrant)
        self.nested = nested
        self.inside: list[StorageWeakRef] = []
        self.first, self.shared, self.norm, self.head = nn.Linear(4, 37), nn.Linear(37, 4), Scale(), nn.Linear(4, 3)

    def block(self, x: Tensor) -> Tensor:
        x = self.norm(self.shared(self.wide(x)))
        return self.run(self.inner, x) if self.nested else x

    def inner(self, x: Tensor) -> Tensor:
        return torch.sin(self.shared(self.wide(x)))

    def wide(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        self.inside.append(StorageWeakRef(x.untyped_storage()))
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = self.run(self.block, x)
        if not self.nested:
            x = self.run(self.inner, x)
        scores: Tensor = self.head(torch.tanh(x).mean(dim=1))
        return scores


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # the inner one, at first
@pytest.mark.parametrize("params", [None, "shared|norm", "first", "head"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool, nested: bool, params: str | None) -> None:
    task = of(lambda: Checkpointed(use_reentrant=use_reentrant, nested=nested), 3, 4)
    subject = prepare(task, None, params)
    found = read(subject)
    task.net.run = lambda function, x: function(x)
    compare(subject, found, oracle(task, subject), 1e-9, 1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_keeps_no_activations(use_reentrant: bool) -> None:
    """Of what is computed inside the checkpoints, between the forward and the backward pass."""
    alive: list[int] = []

    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        model.inside.clear()
        values = cross_entropy(model, batch)
        assert len(model.inside) == 2
        alive.append(sum(not storage.expired() for storage in model.inside))
        return values

    task = of(lambda: Checkpointed(use_reentrant=use_reentrant, nested=False), 3, 4, losses=losses)
    subject = prepare(task, None, None)
    read(subject)
    task.net.run = lambda function, x: function(x)
    read(subject)
    assert alive == [0, 2]


def test_offloading() -> None:
    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy(force=True).copy(), torch.from_numpy):
            return cross_entropy(model, batch)

    task = digits()
    subject = prepare(ModelAtHand(task.net, task.tensors, losses), None, None)
    compare(subject, read(subject), oracle(task, subject), 1e-9, 1e-12)


def test_modules_may_also_run_without_a_gradient() -> None:
    """Under no_grad, as for a target, beside a use that counts."""

    def step(net: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = net.head(torch.tanh(net.lin(x)))
        return net.head(torch.tanh(net.lin(x))) - 0.5 * target

    task = of(lambda: Net(step), 4)
    for params in (None, "head"):
        subject = prepare(task, None, params)
        compare(subject, read(subject), oracle(task, subject), 1e-9, 1e-12)


def test_a_module_that_only_runs_without_a_gradient_has_none() -> None:
    def step(net: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = net.lin(x)
        return net.head(x)

    task = of(lambda: Net(step), 4)
    subject = prepare(task, None, None)
    compare(subject, read(subject), oracle(task, subject), 1e-9, 1e-12)


def test_one_output_may_be_made_of_another() -> None:
    """And both be used: what reaches the first by way of the second is the module's own affair."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x * self.scale
            return y, torch.sin(y) * self.scale

    def step(net: Net, x: Tensor) -> Tensor:
        y, z = net.two(x)
        return net.head(torch.tanh(y) + z + net.two(z)[1])

    task = of(lambda: Net(step, two=Two()), 4)
    subject = prepare(task, None, None)
    compare(subject, read(subject), oracle(task, subject), 1e-9, 1e-12)


# --- the model stays as it was ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_left_as_it_was(case: str) -> None:
    task = CASES[case]()
    next(iter(task.net.parameters())).requires_grad_(False)
    before = state_of(task.net)
    subject = prepare(task, None, None)
    read(subject)
    check_subject(subject)
    assert_unchanged(task.net, before)


def test_the_model_is_left_as_it_was_after_an_exception() -> None:
    """In the forward pass, between the passes, and in the backward pass."""

    def raising(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        model(batch["x"])
        raise KeyError("in the loss")

    def reduced(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return cross_entropy(model, batch).mean()

    def failing_backward(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return FailingBackward.apply(cross_entropy(model, batch))

    task = digits()
    before = state_of(task.net)
    for losses, error in ((raising, KeyError), (reduced, GradscaleError), (failing_backward, ArithmeticError)):
        with pytest.raises(error):
            read(prepare(ModelAtHand(task.net, task.tensors, losses), None, None))
        assert_unchanged(task.net, before)
    subject = prepare(task, None, None)
    compare(subject, read(subject), oracle(task, subject), 1e-9, 1e-12)


def test_measuring_under_no_grad_is_possible() -> None:
    subject = prepare(digits(), None, None)
    with torch.no_grad():
        readings = read(subject)
    assert torch.equal(readings.sq_norms, read(subject).sq_norms)


# --- examples that are not finite -------------------------------------------------------------------------------------


class RootOfSquare(nn.Module):
    """|x| as sqrt(x^2): its gradient at 0 is 0 x inf."""

    def forward(self, x: Tensor) -> Tensor:
        return x.square().sqrt()


def fragile(case: str) -> tuple[ModelAtHand, Tensor]:
    """A task, and which of its examples are not finite."""
    bad = torch.tensor([False, True, False, False, True])
    if case == "gradient":
        task = of(lambda: nn.Sequential(nn.Linear(4, 4, bias=False), RootOfSquare(), nn.Linear(4, 3)), 4)
        task.tensors["x"][bad] = 0.0
        assert task.losses(task.net, task.tensors).isfinite().all()
    else:
        task = CASES[case]()
        task.tensors["x"][bad] = torch.nan if case != "top-level-token" else torch.inf
    return task, bad


@pytest.mark.parametrize(
    "case",
    [
        "gradient",
        "digits",
        "conv",
        "top-level-token",
        "attention",
        "used-twice",
        "weight-norm",
        "recurrent",
        "partly-used",
    ],
)
def test_examples_that_are_not_finite_have_no_part(case: str) -> None:
    task, bad = fragile(case)
    readings = read(prepare(task, None, None))
    assert torch.equal(readings.finite, ~bad)
    good = ModelAtHand(task.net, {name: tensor[~bad] for name, tensor in task.tensors.items()}, task.loss)
    subject = prepare(good, None, None)
    kept = Readings(
        readings.losses[~bad],
        readings.finite[~bad],
        readings.sq_norms[~bad],
        readings.sums,
        {reading: products[~bad] for reading, products in readings.projections.items()},
    )
    compare(subject, kept, oracle(good, subject), 1e-9, 1e-12)


def test_one_loss_that_is_nan() -> None:
    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return cross_entropy(model, batch) + batch["spoil"]

    task = digits()
    spoil = torch.tensor([0.0, 0.0, torch.nan, 0.0, torch.inf], dtype=torch.float64)
    spoiled = ModelAtHand(task.net, {**task.tensors, "spoil": spoil}, losses)
    result = run_shard(prepare(spoiled, None, None), range(B), 0, 3, [], SKETCH.map)
    columns = result.columns
    assert columns.finite.tolist() == [True, True, False, True, False]
    assert torch.equal(columns.loss.isfinite(), columns.finite)
    assert torch.equal(columns.grad_sq_norm.isfinite(), columns.finite)
    assert torch.equal(columns.layer_sq_norms.isfinite().all(dim=1), columns.finite)
    healthy = run_shard(prepare(task, None, None), range(B), 0, 3, [], SKETCH.map).columns
    keep = columns.finite
    torch.testing.assert_close(columns.layer_sq_norms[keep], healthy.layer_sq_norms[keep], rtol=1e-9, atol=1e-20)
    assert columns.sketch is not None
    assert healthy.sketch is not None
    torch.testing.assert_close(columns.sketch[keep], healthy.sketch[keep])


@pytest.mark.parametrize("case", ["digits", "conv", "attention"])
def test_no_example_is_finite(case: str) -> None:
    task = CASES[case]()
    task.tensors["x"].fill_(torch.nan)
    subject = prepare(task, None, None)
    readings = read(subject)
    assert not readings.finite.any()
    assert not any(total.any() for sums in readings.sums.values() for part in sums.values() for total in part.values())
    check_subject(subject)  # has nothing to compare, and says nothing


# --- what is refused --------------------------------------------------------------------------------------------------


def bad_losses() -> dict[str, tuple[Losses, str]]:
    def integers(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["x"]).argmax(dim=1)

    def detached(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return cross_entropy(model, batch).detach()

    def without_grad(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return cross_entropy(model, batch)

    shape = rf"losses must be one per example, a floating-point tensor of shape \({B},\), got"
    return {
        "reduced": (lambda m, b: F.cross_entropy(m(b["x"]), b["label"]), rf"{shape} torch.float64 of shape \(\)"),
        "too-few": (lambda m, b: cross_entropy(m, b)[1:], rf"{shape} .* of shape \({B - 1},\); use reduction='none'"),
        "matrix": (lambda m, b: m(b["x"]), rf"{shape} .* of shape \({B}, 3\)"),
        "integers": (integers, rf"{shape} torch.int64"),
        "list": (lambda m, b: list(cross_entropy(m, b)), r"losses must be a tensor of shape \(5,\), got list"),
        "detached": (detached, "losses must depend on the measured parameters, got losses without a gradient"),
        "no-grad": (without_grad, "losses must depend on the measured parameters, got losses without a gradient"),
    }


@pytest.mark.parametrize("case", bad_losses())
def test_losses_must_be_one_per_example_with_a_gradient(case: str) -> None:
    losses, message = bad_losses()[case]
    task = of(lambda: nn.Linear(4, 3), 4)
    with pytest.raises(GradscaleError, match=message):
        read(prepare(ModelAtHand(task.net, task.tensors, losses), None, None))


class Net(nn.Module):
    """`step(self, x)` on a Linear `lin` [4 -> 4], a Linear `head` [4 -> 3] and whatever else `extra` makes."""

    def __init__(self, step: Callable[..., Tensor], **extra: nn.Module) -> None:
        super().__init__()
        self.lin, self.head, self.step = nn.Linear(4, 4), nn.Linear(4, 3), step
        for name, module in extra.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


def test_inputs_must_not_be_changed_in_place() -> None:
    def step(net: Net, x: Tensor) -> Tensor:
        x = x + 1
        y = net.lin(x)
        x += y
        return net.head(x)

    message = "the inputs of module lin must stay as they are .* got an in-place change; write x = x \\+ y"
    with pytest.raises(GradscaleError, match=message):
        read(prepare(of(lambda: Net(step), 4), None, None))


def test_outputs_may_be_changed_in_place() -> None:
    def step(net: Net, x: Tensor) -> Tensor:
        y = net.lin(x)
        y += 1
        z = net.conv(y[:, None])[:, 0]
        z *= 2
        return net.head(z)

    task = of(lambda: Net(step, conv=nn.Conv1d(1, 1, 1)), 4)
    subject = prepare(task, None, None)
    compare(subject, read(subject), oracle(task, subject), 1e-9, 1e-12)


def test_outputs_with_positions_may_be_changed_in_place() -> None:
    """They are views, whose own node autograd throws away then."""

    def step(net: Net, x: Tensor) -> Tensor:
        y = net.lin(x[:, None] * torch.tensor([[1.0], [-2.0], [0.5]])).relu_()
        return net.head(net.inner(y).relu_()).mean(dim=1)

    task = of(lambda: Net(step, inner=nn.Linear(4, 4)), 4)
    subject = prepare(task, None, None)
    compare(subject, read(subject), oracle(task, subject), 1e-9, 1e-12)


class Table(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, 4))

    def forward(self) -> Tensor:
        return self.weight * 1


def with_table(net: Net, x: Tensor) -> Tensor:
    return net.head(torch.tanh(net.lin(x + net.table())).mean(dim=1))


def test_outputs_must_be_batched() -> None:
    message = rf"the output of module table must have the batch \({B}\) as its first dimension, got shape \(3, 4\)"
    with pytest.raises(GradscaleError, match=message + ".*leave table.weight out by --params"):
        read(prepare(of(lambda: Net(with_table, table=Table(3)), 3, 4), None, None))


def test_a_table_with_as_many_rows_as_examples_is_found_by_the_check() -> None:
    with pytest.raises(
        GradscaleError, match=r"module table must give each example the output it has alone, got shape \(4, 4\)"
    ):
        check_subject(prepare(of(lambda: Net(with_table, table=Table(4)), 4, 4), None, None))


class Centred(nn.Module):
    """Mixes examples."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(dim=0)) * self.scale


def test_a_module_must_not_mix_examples() -> None:
    with pytest.raises(GradscaleError, match="module 0 must give each example the output it has alone"):
        read(prepare(of(lambda: nn.Sequential(Centred(), nn.Linear(4, 3)), 4), None, None))


@pytest.mark.parametrize("setting", [{"max_norm": 0.1}, {"scale_grad_by_freq": True}])
def test_embeddings_must_not_couple_examples(setting: dict[str, float]) -> None:
    net = partial(lambda: nn.Sequential(nn.Embedding(5, 4, **setting), nn.Flatten(), nn.Linear(12, 3)))
    with pytest.raises(GradscaleError, match="embedding 0 must have max_norm=None and scale_grad_by_freq=False"):
        read(prepare(of(net, 3, integers=5), None, None))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("nothing", "params must match at least one trainable parameter, got 'nothing' for 2 .* such as weight"),
        ("(", r"params must be a regular expression, got '\('"),
    ],
)
def test_params_must_match(params: str, message: str) -> None:
    with pytest.raises(GradscaleError, match=message):
        prepare(of(lambda: nn.Linear(4, 3), 4), None, params)


def test_some_parameter_must_be_trainable() -> None:
    task = of(lambda: nn.Linear(4, 3), 4)
    task.net.requires_grad_(False)
    with pytest.raises(GradscaleError, match="got None for 0 trainable parameters"):
        prepare(task, None, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.BatchNorm1d(4).train(), "BatchNorm 0 must be in eval mode with running statistics"),
        (
            lambda: nn.BatchNorm1d(4, track_running_stats=False),
            "BatchNorm 0 must be in eval mode with running statistics",
        ),
        (lambda: nn.Dropout(0.25).train(), "dropout 0 must be off, got p=0.25 in training mode"),
    ],
)
def test_the_mode_must_make_examples_independent(make: Callable[[], nn.Module], message: str) -> None:
    task = of(lambda: nn.Linear(4, 3), 4)
    with pytest.raises(GradscaleError, match=message):
        prepare(ModelAtHand(nn.Sequential(make(), task.net), task.tensors, task.loss), None, None)


def test_dropout_that_drops_nothing_may_train() -> None:
    task = of(lambda: nn.Sequential(nn.Dropout(0.0), nn.Linear(4, 3)), 4)
    read(prepare(ModelAtHand(task.net.train(), task.tensors, task.loss), None, None))


def test_a_model_must_be_a_module() -> None:
    task = of(lambda: nn.Linear(4, 3), 4)
    with pytest.raises(GradscaleError, match=r"task\.model must return a torch.nn.Module, got function"):
        prepare(ModelAtHand(lambda x: x, task.tensors, task.loss), None, None)  # type: ignore[arg-type]


def behind(net: Net, x: Tensor) -> Tensor:
    return net.head(torch.tanh(F.linear(net.lin(x), net.lin.weight)))


def detaching(net: Net, x: Tensor) -> Tensor:
    return net.head(torch.tanh(net.lin(x)) - torch.tanh(net.lin(x)).mean(dim=0))


def weighted_by_rank(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    losses = cross_entropy(model, batch)
    return losses / len(losses)


@pytest.mark.parametrize(
    ("make", "losses", "message"),
    [
        (lambda: Net(behind), cross_entropy, r"add up to autograd's gradient, got another sum for lin\.weight:"),
        (lambda: Net(detaching), cross_entropy, r"same gradient alone as within a batch, got another for lin\.weight"),
        (
            lambda: nn.Linear(4, 3),
            weighted_by_rank,
            "same gradient alone as within a batch, got another for weight, bias",
        ),
    ],
)
def test_the_check_finds_what_no_rule_can_see(make: Callable[[], nn.Module], losses: Losses, message: str) -> None:
    subject = prepare(of(make, 4, losses=losses), None, None)
    read(subject)  # nothing to be seen from inside
    with pytest.raises(GradscaleError, match=message):
        check_subject(subject)


def test_the_check_finds_losses_that_mix_examples_without_a_gradient() -> None:
    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return cross_entropy(model, batch) + len(batch["x"])

    with pytest.raises(GradscaleError, match="an example must have the same loss alone as within a batch, got"):
        check_subject(prepare(of(lambda: nn.Linear(4, 3), 4, losses=losses), None, None))


def test_a_parameter_must_belong_to_a_module_that_is_called() -> None:
    class Holder(nn.ModuleList):
        pass

    holder = Holder([nn.Linear(4, 3)])
    holder.register_parameter("loose", nn.Parameter(torch.zeros(2)))
    net = nn.Sequential(nn.Linear(4, 3))
    net.add_module("holder", holder)
    with pytest.raises(GradscaleError, match=r"must belong to a module that is called, got none for holder\.loose"):
        prepare(of(lambda: net, 4), None, None)


@pytest.mark.parametrize(
    "labels", [torch.zeros(B - 1, dtype=torch.long), torch.zeros(B, 1, dtype=torch.long), torch.zeros(B)]
)
def test_labels_must_be_one_integer_per_example(labels: Tensor) -> None:
    task = of(lambda: nn.Linear(4, 3), 4)
    with pytest.raises(GradscaleError, match=rf"labels must be integers of shape \({B},\), got"):
        labels_of(task, {"x": task.tensors["x"], "label": labels})


def test_batches_must_have_a_row_for_each_example() -> None:
    class Short:
        def __len__(self) -> int:
            return B

        def batch(self, ids: range) -> Mapping[str, Tensor]:
            return {"x": torch.zeros(len(ids), 4), "label": torch.zeros(max(0, len(ids) - 1))}

    class Short5(ModelAtHand):
        def examples(self) -> Short:  # type: ignore[override]
            return Short()

    task = of(lambda: nn.Linear(4, 3), 4)
    subject = prepare(Short5(task.net, task.tensors, task.loss), None, None)
    with pytest.raises(GradscaleError, match=r"tensors with 3 rows for range\(1, 4\), got \{'label': \(2,\)\}"):
        load_batch(subject, range(1, 4))


# --- the oracle -------------------------------------------------------------------------------------------------------


def read(subject: Subject) -> Readings:
    """Begun anew without the examples that turn out not to be finite, as `run_shard` does."""
    batch = load_batch(subject, range(len(subject.examples)))
    labels, exclude = labels_of(subject.task, batch), torch.zeros(len(subject.examples), dtype=torch.bool)
    while True:
        readings = read_batch(subject, batch, READINGS, labels, exclude if exclude.any() else None)
        if (readings.finite | exclude).all():
            return readings
        exclude = ~readings.finite


def oracle(task: ModelAtHand, subject: Subject) -> dict[str, Tensor]:
    return gradients_one_by_one(task, subject.parameters, task.net, task.tensors)


def lowered(task: ModelAtHand, kind: torch.dtype) -> ModelAtHand:
    """The task in a lower precision; it shares nothing with the other."""
    tensors = {name: t.to(kind) if t.is_floating_point() else t for name, t in task.tensors.items()}
    return ModelAtHand(copy.deepcopy(task.net).to(kind), tensors, task.loss)


def compare(subject: Subject, found: Readings, exact: Mapping[str, Tensor], rtol: float, atol: float) -> None:
    """Within rtol of the parameter's own gradient, and atol of the whole gradient: some are zero but for rounding."""
    assert list(exact) == list(subject.parameters)
    whole = float(torch.cat(list(exact.values()), dim=1).norm())
    labels = labels_of(subject.task, load_batch(subject, range(len(subject.examples))))
    assert labels is not None
    projections = {PROBES: torch.zeros(len(labels), 6).double(), SKETCH: torch.zeros(len(labels), 7).double()}
    sums = found.sums[BY_CLASS]
    absent = set(sums) - set(labels.tolist())
    for j, (name, grads) in enumerate(exact.items()):

        def near(ours: Tensor, theirs: Tensor, what: str, name: str = name, own: float = float(grads.norm())) -> None:
            error = float((ours.double() - theirs).norm())
            assert error <= rtol * own + atol * whole, f"{what} of {name}: {error:.2g} apart from {own:.2g}"

        near(found.sq_norms[:, j].sqrt(), grads.norm(dim=1), "norms")
        near(found.sums[SUMS][None][name], grads.sum(dim=0), "sum")
        for c in labels.unique().tolist():
            near(sums[c][name], grads[labels == c].sum(dim=0), f"sum of class {c}")
        for c in absent:
            assert not sums[c][name].any()  # of examples that are not finite alone
        for reading, total in projections.items():
            assert isinstance(reading.map, GaussianProbes | GaussianSketch)
            total += grads @ reading.map.materialize(name, (grads.shape[1], 1)).double()
    for reading, total in projections.items():
        error = float((found.projections[reading] - total).norm())
        rounding = 1e-6 if reading is SKETCH else 0.0  # its materialize() is float32 after the factor 1 / sqrt(K)
        assert error <= (10 * (rtol + atol) + rounding) * whole
    assert found.finite.all()


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        raise ArithmeticError("in the backward pass")


def state_of(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, bool]]:
    return copy.deepcopy(net.state_dict()), {name: p.requires_grad for name, p in net.named_parameters()}


def assert_unchanged(net: nn.Module, before: tuple[dict[str, Tensor], dict[str, bool]]) -> None:
    tensors, flags = state_of(net)
    assert flags == before[1]
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before[0].items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(isinstance(parameter, nn.Parameter) for parameter in net.parameters())
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
