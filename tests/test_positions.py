"""Positions that are the same for all examples: each gets the gradient that it has alone, or an error is raised.

Shapes: B examples, T positions, E features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from problems import ModelAtHand, gradients_one_by_one
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradscale.errors import GradscaleError
from gradscale.grads.readings import GradientSums, SquaredNorms
from gradscale.grads.subject import load_batch, read_batch
from gradscale.run.check import check_subject, compare_alone
from gradscale.run.shard import prepare

VOCABULARY, LONGEST, E = 7, 12, 4
Use = Callable[[Tensor, Tensor], Tensor]  # of the tokens [B, T, E] and the positions [T, E]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.proj = nn.LayerNorm(E), nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn(self.ln_1(x)).chunk(3, dim=-1)
        return x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class NanoGPT(nn.Module):
    """As Karpathy's nanoGPT: `tok_emb(idx) + pos_emb(pos)`, and a head that is the token table."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(VOCABULARY, E), nn.Embedding(LONGEST, E), nn.Dropout(0.1)
        self.block, self.ln_f, self.head = Block(), nn.LayerNorm(E), nn.Linear(E, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight
        self.use, self.run = use, lambda function, *inputs: function(*inputs)

    def embed(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], dtype=torch.long, device=tokens.device)
        return self.drop(self.use(tokens, self.wpe(positions)))

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.head(self.ln_f(self.block(self.run(self.embed, self.wte(ids)))))
        return scores


def next_token(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["ids"]).mT, batch["ids"].roll(-1, 1), reduction="none").mean(dim=1)


def task_of(net: nn.Module, batch: int, positions: int) -> ModelAtHand:
    torch.manual_seed(0)
    net = net.double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    ids = torch.randint(VOCABULARY, (batch, positions))
    return ModelAtHand(net, {"ids": ids, "label": torch.arange(batch)}, next_token)


def compare(task: ModelAtHand, params: str | None = None, run: Callable[..., Tensor] | None = None) -> None:
    """Losses, norms and the gradient of each example with the others excluded, against the loop of one example."""
    subject = prepare(task, None, params)
    exact = gradients_one_by_one(task, subject.parameters, task.net, task.tensors)
    if run is not None:  # how ours runs `embed`: autograd.grad, as the loop uses it, is refused by some checkpoints
        task.net.run = run
    size = len(task.tensors["ids"])
    batch = load_batch(subject, range(size))
    readings = read_batch(subject, batch, frozenset({SquaredNorms(), GradientSums()}))
    torch.testing.assert_close(readings.losses, task.losses(task.net, batch).detach(), rtol=1e-12, atol=0)
    for j, (name, grads) in enumerate(exact.items()):
        torch.testing.assert_close(readings.sq_norms[:, j], grads.square().sum(dim=1), rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(readings.sums[GradientSums()][None][name], grads.sum(dim=0), rtol=1e-9, atol=1e-12)
    check_subject(subject)
    assert all(one.difference < 1e-9 for one in compare_alone(subject, range(size)))


SIZES = [(3, 5), (4, 4), (3, 3), (1, 5), (1, 1), (3, 1), (2, 6)]
USES: dict[str, Use] = {
    "sum": lambda tokens, positions: tokens + positions,
    "sum, the other way": lambda tokens, positions: positions + tokens,
    "function": torch.add,
    "difference": lambda tokens, positions: tokens - 2.0 * positions,
    "product": lambda tokens, positions: tokens * (1 + positions),
    "in place": lambda tokens, positions: tokens.clone().add_(positions),
    "augmented": lambda tokens, positions: augmented(tokens, positions),
    "none": lambda tokens, positions: tokens + positions[None],
    "unsqueeze": lambda tokens, positions: tokens + positions.unsqueeze(0),
    "view": lambda tokens, positions: tokens + positions.view(1, -1, E),
    "sliced": lambda tokens, positions: tokens + positions[: tokens.shape[1], :].to(tokens.dtype),
    "expand": lambda tokens, positions: tokens + positions.expand(len(tokens), -1, -1),
    "expand of one": lambda tokens, positions: tokens + positions[None].expand_as(tokens),
    "repeat": lambda tokens, positions: torch.cat([tokens, positions.repeat(len(tokens), 1, 1)], dim=2)[..., ::2],
    "twice": lambda tokens, positions: torch.tanh(tokens + positions) * positions,
    "alone": lambda tokens, positions: tokens + (positions + positions * 0.5),
    "dropout": lambda tokens, positions: tokens + F.dropout(positions, training=False),
    "unused": lambda tokens, positions: tokens,
    "zero": lambda tokens, positions: tokens + 0 * positions,
}


def augmented(tokens: Tensor, positions: Tensor) -> Tensor:
    tokens = tokens.clone()
    tokens += positions
    return tokens


@pytest.mark.parametrize(("batch", "positions"), SIZES)
@pytest.mark.parametrize("use", USES)
def test_positions_without_a_batch(use: str, batch: int, positions: int) -> None:
    compare(task_of(NanoGPT(USES[use]), batch, positions))


@pytest.mark.parametrize("params", [None, "wpe", "wte"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("batch", "positions"), [(3, 5), (3, 3), (3, 1)])
def test_checkpointing(batch: int, positions: int, use_reentrant: bool, params: str | None) -> None:
    task = task_of(NanoGPT(USES["none"]), batch, positions)
    compare(task, params, partial(checkpoint, use_reentrant=use_reentrant))


UNSUPPORTED: dict[str, Use] = {
    "transposed": lambda tokens, positions: tokens + positions.mT.contiguous().mT,
    "stacked": lambda tokens, positions: tokens + torch.stack([positions] * len(tokens)),
    "activation": lambda tokens, positions: tokens + torch.tanh(positions),
    "scores": lambda tokens, positions: (tokens @ positions.mT) @ tokens,
    "with a constant": lambda tokens, positions: tokens + (positions + torch.ones_like(positions)),
    "changed in place": lambda tokens, positions: tokens + positions.mul_(2),
    "both ways": lambda tokens, positions: tokens + positions + torch.tanh(positions),
}


@pytest.mark.parametrize(("batch", "positions"), [(3, 5), (4, 4), (3, 3), (2, 1), (4, 2)])
@pytest.mark.parametrize("use", UNSUPPORTED)
def test_another_use_is_exact_alone_and_else_refused(use: str, batch: int, positions: int) -> None:
    """If T = B and the positions are used in no other way, by the check of a run, which compares an example alone."""
    compare(task_of(NanoGPT(UNSUPPORTED[use]), 1, positions))
    subject = prepare(task_of(NanoGPT(UNSUPPORTED[use]), batch, positions), None, None)
    with pytest.raises(GradscaleError) as caught:
        check_subject(subject)
    found = str(caught.value)
    if batch != positions or use == "both ways":
        assert f"the output of embedding wpe for ids of shape ({positions},) must be added to a tensor" in found
    else:
        assert "an example must have the same gradient alone as within a batch, got another for wpe.weight" in found


class ByClass(nn.Module):
    """Labels [B] for ids, whose embedding [B, E] is one row for each example."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.tokens, self.classes = nn.Embedding(VOCABULARY, E), nn.Embedding(LONGEST, E)
        self.norm, self.head, self.use = nn.LayerNorm(E), nn.Linear(E, VOCABULARY), use

    def forward(self, ids: Tensor, label: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.tanh(self.use(self.norm(self.tokens(ids)), self.classes(label))))
        return scores


def by_class(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    scores = model(batch["ids"], batch["label"])
    return F.cross_entropy(scores.mT, batch["ids"], reduction="none").mean(dim=1)


@pytest.mark.parametrize("label", [[0, 1, 2, 3], [2, 0, 3, 1], [1, 1, 1, 1]])
@pytest.mark.parametrize("positions", [1, 4, 6])
@pytest.mark.parametrize(
    "use",
    [
        lambda tokens, classes: tokens + classes[:, None],
        lambda tokens, classes: tokens * (1 + classes.unsqueeze(1)) + classes.view(-1, 1, E),
        lambda tokens, classes: tokens + torch.tanh(classes)[:, None, :].expand_as(tokens),
        lambda tokens, classes: torch.cat([tokens[:, :-1], tokens[:, -1:] + classes[:, None]], dim=1),
    ],
)
def test_labels_are_not_taken_for_positions(use: Use, positions: int, label: list[int]) -> None:
    """Not even where they count up and there are as many examples as positions."""
    task = task_of(ByClass(use), 4, positions)
    compare(ModelAtHand(task.net, {**task.tensors, "label": torch.tensor(label)}, by_class))


class Owned(nn.Module):
    """A table of positions that the model itself owns."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.wte, self.head = nn.Embedding(VOCABULARY, E), nn.Linear(E, VOCABULARY)
        self.pos = nn.Parameter(torch.zeros(*shape))

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.tanh(self.wte(ids) + self.pos))
        return scores


@pytest.mark.parametrize(("batch", "positions"), SIZES)
@pytest.mark.parametrize("leading", [(), (1,)])
def test_a_parameter_of_positions(leading: tuple[int, ...], batch: int, positions: int) -> None:
    compare(task_of(Owned(*leading, positions, E), batch, positions))
