"""The host waits for the device as often for a shard of many batches as for one of a few.

Torch's meta device stands in for a GPU: its tensors have no numbers, so that nothing on the host can read one. A first
batch on the CPU settles what has to be settled, the second runs on the meta device.

Shapes: B examples of a batch, T positions.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from problems import ModelAtHand, Recurrent, SelfAttention, TopLevelToken, conv_net
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gradscale.errors import GradscaleError
from gradscale.grads.readings import GradientSums, Readings, SquaredNorms
from gradscale.grads.subject import Subject, load_batch, read_batch
from gradscale.grads.waiting import Doubts
from gradscale.run.shard import ShardResult, labels_of, prepare, run_shard
from gradscale.tasks.digits import DigitsViT

B = 4
READINGS = frozenset({SquaredNorms(), GradientSums(), GradientSums(by_class=True)})
META = torch.device("meta")

READS = {  # operations that need a number on the host: the value itself, or the size of what they give
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"),
    *("nonzero", "nonzero_numpy", "argwhere", "masked_select", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
}


class Waits(TorchDispatchMode):
    """Records what would make the host wait; `device` limits it to the operations on tensors of this device."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.device, self.seen = device, []
        self.made = Made(device, self.seen)

    def __enter__(self) -> Waits:
        self.made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.made.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.waits(func, args, kwargs):
            self.seen.append(f"{func} at {where()}")
        return func(*args, **kwargs)

    def waits(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
        name = func.overloadpacket.__name__
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in ("_to_copy", "copy_"):
            ends = {x.device for x in tensors} | {torch.device(kwargs.get("device") or tensors[0].device)}
            return len(ends) > 1 and not (kwargs.get("non_blocking") or True in args[2:])
        if self.device and all(x.device != self.device for x in tensors):
            return False
        masks = name in ("index", "index_put", "index_put_") and any(x.dtype == torch.bool for x in list_of(args[1]))
        sized = name == "repeat_interleave" and func._overloadname != "self_int" and kwargs.get("output_size") is None
        return name in READS or masks or sized


class Made(TorchFunctionMode):
    """Records tensors made of the host's numbers on `device`, which are copied there."""

    def __init__(self, device: torch.device | None, seen: list[str]) -> None:
        super().__init__()
        self.device, self.seen = device, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        makes = func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
        if makes and made.device == self.device and not where().endswith("losses"):  # the model's own, of transformers
            self.seen.append(f"{func} at {where()}")
        return made


def list_of(tensors: Any) -> list[Tensor]:
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]


def where() -> str:
    ours = [frame for frame in traceback.extract_stack() if "/gradscale/" in frame.filename]
    return f"{ours[-1].filename}:{ours[-1].lineno}:{ours[-1].name}" if ours else "the test"


# --- the models -------------------------------------------------------------------------------------------------------

Losses = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def cross_entropy(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["label"], reduction="none")


def next_token(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    scores = model(input_ids=batch["x"]).logits[:, :-1]
    return F.cross_entropy(scores.mT, batch["x"][:, 1:], reduction="none").mean(dim=1)


def of(
    make: Callable[[], nn.Module], *shape: int, rows: int = B, integers: int = 0, losses: Losses = cross_entropy
) -> ModelAtHand:
    torch.manual_seed(0)
    net = make().double().eval()
    x = torch.randint(integers, (rows, *shape)) if integers else torch.randn(rows, *shape, dtype=torch.float64)
    return ModelAtHand(net, {"x": x, "label": torch.arange(rows) % 3}, losses)


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 19, "n_positions": 9, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 19, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(12, 3))


CASES: dict[str, Callable[..., ModelAtHand]] = {
    "gpt2": partial(of, gpt2, 6, integers=19, losses=next_token),
    "llama": partial(of, llama, 6, integers=19, losses=next_token),
    "conv": partial(of, conv_net, 1, 4, 4),
    "vit": partial(of, partial(DigitsViT, 8, 1), 8, 8),
    "top-level-token": partial(of, TopLevelToken, 3, 4),
    "encoder": partial(of, encoder, 3, 4),
    "attention": partial(of, SelfAttention, 3, 4),
    "recurrent": partial(of, Recurrent, 3, 4),
    "masked": lambda rows=B: masked(rows),
}


class Masked(nn.Module):
    """Self-attention under a mask [T, T] that the batch brings along: as many rows as examples where T = B."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (x @ x.mT).masked_fill(mask, -torch.inf).softmax(dim=-1) @ (x * self.scale)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Masked(), nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores: Tensor = self.head(self.inner(x, mask).mean(dim=1))
        return scores


def masked(rows: int, *, from_row: int = 0) -> ModelAtHand:
    """A causal mask where a batch holds an example of `from_row` or later, and one that hides nothing elsewhere."""

    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        causal = torch.ones(B, B, dtype=torch.bool, device=batch["x"].device).triu(1)
        hidden = causal & (batch["row"].max() >= from_row)
        return F.cross_entropy(model(batch["x"], hidden), batch["label"], reduction="none")

    task = of(Attending, B, 4, rows=rows, losses=losses)
    return ModelAtHand(task.net, {**task.tensors, "row": torch.arange(rows)}, losses)


# --- the promises -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_later_batches_do_not_wait(case: str) -> None:
    task, doubts = CASES[case](), Doubts()
    read(prepare(task, None, None), doubts)
    assert not doubts.justified()
    task.net.to(META)
    if hasattr(task.net, "tie_weights"):
        task.net.tie_weights()
    subject = prepare(task, None, None, "meta")
    with Waits(META) as waits:
        readings = read(subject, doubts)
    assert not waits.seen
    assert readings.sq_norms.device == META


@pytest.mark.parametrize("case", CASES)
def test_the_first_batch_alone_settles_things(case: str) -> None:
    """Counted on the CPU, with all numbers there: a shard of 2 batches waits as often as one of 5."""
    found = []
    for batches in (2, 5):
        subject = prepare(CASES[case](rows=batches * B), None, None)
        with Waits() as waits:
            run(subject)
        found.append(sorted(waits.seen))
    assert found[0] == found[1]


@pytest.mark.parametrize("case", CASES)
def test_doubts_change_no_reading(case: str) -> None:
    subject = prepare(CASES[case](), None, None)
    doubts = Doubts()
    at_once, first, later = read(subject, None), read(subject, doubts), read(subject, doubts)
    assert not doubts.justified()
    for found in (first, later):
        for ours, expected in zip(pytree.tree_leaves(found), pytree.tree_leaves(at_once), strict=True):
            assert torch.equal(ours, expected)


def test_a_later_batch_may_show_what_the_first_did_not() -> None:
    """The first batch's mask hides nothing, so that it may as well be taken for a row for each example."""
    late = run(prepare(masked(3 * B, from_row=2 * B), None, None)).columns
    assert late.finite.all()
    for batch in range(3):
        alone = run(prepare(masked(3 * B, from_row=2 * B), None, None), range(batch * B, (batch + 1) * B)).columns
        ours = late.layer_sq_norms[batch * B : (batch + 1) * B]
        torch.testing.assert_close(ours, alone.layer_sq_norms, rtol=1e-12, atol=0)


class Centred(nn.Module):
    """Mixes the examples of a batch that has a positive sum."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(dim=0) * (x.sum() > 0)) * self.scale


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_a_module_must_not_mix_examples_in_any_batch(batch: int) -> None:
    task = of(lambda: nn.Sequential(Centred(), nn.Linear(4, 3)), 4, rows=3 * B)
    task.tensors["x"].abs_().mul_(-1)[batch * B : (batch + 1) * B].mul_(-1)
    with pytest.raises(GradscaleError, match=r"module 0 must give each example the output .* got one .* apart"):
        run(prepare(task, None, None))


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self) -> Tensor:
        return self.weight * 1


class WithTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = Table(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        used = (x.sum() > 0).to(x.dtype)
        scores: Tensor = self.head((x + used * self.table()).mean(dim=1))
        return scores


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_outputs_must_be_batched_in_any_batch(batch: int) -> None:
    """A table's output that no loss depends on is fine."""
    task = of(WithTable, 3, 4, rows=3 * B)
    task.tensors["x"].abs_().mul_(-1)
    assert run(prepare(task, None, None)).columns.finite.all()
    task.tensors["x"][batch * B : (batch + 1) * B].mul_(-1)
    message = rf"the output of module table must have the batch \({B}\) as its first dimension, got shape \(3, 4\)"
    with pytest.raises(GradscaleError, match=message + ".*leave table.weight out by --params"):
        run(prepare(task, None, None))


@pytest.mark.parametrize("bad", [0, 2 * B + 1])
def test_examples_that_are_not_finite_beside_doubts(bad: int) -> None:
    """They are left out, also where the pass has to be made again for a mask that changes."""
    for from_row in (0, 2 * B, 9 * B):
        task = masked(3 * B, from_row=from_row)
        expected = run(prepare(task, None, None)).columns
        task.tensors["x"][bad] = torch.nan
        columns = run(prepare(task, None, None)).columns
        assert columns.finite.tolist() == [i != bad for i in range(3 * B)]
        keep = columns.finite
        torch.testing.assert_close(columns.layer_sq_norms[keep], expected.layer_sq_norms[keep], rtol=1e-9, atol=0)


def test_a_choice_that_a_later_call_cannot_run_with_is_made_anew() -> None:
    doubts = Doubts()
    subject = prepare(masked(B), None, None)
    expected = read(subject, doubts)
    (key,) = doubts.decided
    assert doubts.decided[key] == [0, None]
    doubts.decided[key] = [None, 0]
    assert torch.equal(read(subject, doubts).sq_norms, expected.sq_norms)
    assert doubts.decided[key] == [0, None]


# --- the oracle is awake ----------------------------------------------------------------------------------------------

READING: dict[str, Callable[[Tensor], object]] = {
    "bool": lambda x: bool(x.any()),
    "float": lambda x: float(x.sum()),
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "mask": lambda x: x[x > 0],
    "masked-select": lambda x: x.masked_select(x > 0),
    "bincount": lambda x: x.long().bincount(),
    "repeats": lambda x: torch.arange(3, device=x.device).repeat_interleave(x.long()),
    "equal": lambda x: torch.equal(x, x.clone()),
    "allclose": lambda x: torch.allclose(x, x),
    "to-the-device": lambda x: torch.zeros(3).to(x.device),
    "copy": lambda x: x.copy_(torch.zeros(3)),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
}
FREE: dict[str, Callable[[Tensor], object]] = {
    "on-the-host": lambda x: bool(torch.zeros(3).unique().any()),
    "under-way": lambda x: torch.zeros(3).to(x.device, non_blocking=True),
    "where": lambda x: x.where(x > 0, 0).masked_fill(x > 1, 2.0)[torch.arange(2, device=x.device)],
    "repeat": lambda x: x.repeat_interleave(2),
}


@pytest.mark.parametrize("reading", READING)
def test_the_oracle_sees(reading: str) -> None:
    x = torch.zeros(3, device=META)
    with Waits(META) as waits, suppress(RuntimeError, NotImplementedError):
        READING[reading](x)
    assert waits.seen


@pytest.mark.parametrize("operation", FREE)
def test_the_oracle_lets_pass(operation: str) -> None:
    x = torch.zeros(3, device=META)
    with Waits(META) as waits:
        FREE[operation](x)
    assert not waits.seen


# --- the oracle -------------------------------------------------------------------------------------------------------


def read(subject: Subject, doubts: Doubts | None) -> Readings:
    """The batch and its labels come from the host, as `run_shard` has them."""
    batch = load_batch(subject, range(B))
    labels = labels_of(subject.task, subject.examples.batch(range(B)))
    return read_batch(subject, batch, READINGS, labels, doubts=doubts)


def run(subject: Subject, ids: range | None = None) -> ShardResult:
    return run_shard(subject, ids or range(len(subject.examples)), 0, B, [], None)
