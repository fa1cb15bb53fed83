"""The models of the benchmarks, and the plain pass that every method is compared with.

Shapes: B examples, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """A GPT-2 with random weights in float32, without dropout, and a batch of random tokens for it."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    positions: int = 128
    vocabulary: int = 1024
    batch: int = 16

    def __str__(self) -> str:
        return (
            f"GPT-2 of {self.layers} layers, width {self.width}, {self.heads} heads, T={self.positions}, "
            f"B={self.batch}, vocabulary {self.vocabulary}"
        )

    def model(self, *, tied: bool = True, conv1d: bool = True) -> nn.Module:
        """The same weights every time; `conv1d=False` writes transformers' Conv1D as the equal nn.Linear."""
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            n_layer=self.layers,
            n_embd=self.width,
            n_head=self.heads,
            n_positions=self.positions,
            vocab_size=self.vocabulary,
            tie_word_embeddings=tied,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        torch.manual_seed(0)
        model: nn.Module = GPT2LMHeadModel(config).eval()
        return model if conv1d else _with_linear(model)

    def ids(self) -> Tensor:
        """[B, T]"""
        return torch.randint(self.vocabulary, (self.batch, self.positions), generator=torch.Generator().manual_seed(0))


SHAPES = {
    "base": Shape(),
    "vocabulary": Shape(vocabulary=50257, batch=4),
    "long": Shape(positions=1024, batch=2, width=512),
}


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """[B]: each sequence's mean next-token cross-entropy."""
    logits = model(ids).logits[:, :-1]
    return F.cross_entropy(logits.mT, ids[:, 1:], reduction="none").mean(dim=1)


def plain(model: nn.Module, ids: Tensor) -> None:
    """What training does: one forward and backward pass with the gradient of every weight."""
    losses(model, ids).mean().backward()
    model.zero_grad(set_to_none=True)


def squared_norms_by_loop(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The definition: for every parameter, [B] float64, by one backward pass per example."""
    parameters = dict(model.named_parameters())
    rows = []
    for example in ids.split(1):
        grads = torch.autograd.grad(losses(model, example).sum(), list(parameters.values()))
        rows.append([grad.double().square().sum() for grad in grads])
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(parameters)}


def worst_error(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """The worst error of a parameter's squared norms, relative to their largest.

    `found` has squared norms [B], or the gradients themselves, which have more dimensions.
    """
    worst = 0.0
    for name, values in found.items():
        norms = values.double() if values.dim() == 1 else values.double().flatten(1).square().sum(dim=1)
        worst = max(worst, float((norms - reference[name]).abs().max() / reference[name].max()))
    return worst


def _with_linear(model: nn.Module) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.nx, module.nf)
            linear.weight.data = module.weight.data.T.contiguous()
            linear.bias.data = module.bias.data
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    return model
