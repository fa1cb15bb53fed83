"""Small models and data with known answers.

`Toy` is the five-row table of arXiv-free folklore used throughout: x_i = (e_i, z_i) in R^6, weights zero, loss
(f - y)^2 / 2, so that g_i = -y_i x_i. In the "real" table z_i = y_i and every pair of gradients has inner product 1;
in the "random" one z_i = 0 and the gradients are orthonormal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradscale.task import Task, TensorExamples


@dataclass(frozen=True)
class Toy:
    kind: str = "real"
    rows: int = 4

    def model(self, checkpoint: str | None) -> nn.Module:
        model = nn.Linear(6, 1, bias=False).double().eval()
        nn.init.zeros_(model.weight)
        return model

    def examples(self) -> TensorExamples:
        y = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0], dtype=torch.float64)[: self.rows]
        last = y if self.kind == "real" else torch.zeros_like(y)
        return TensorExamples(x=torch.cat([torch.eye(5, dtype=torch.float64)[: self.rows], last[:, None]], dim=1), y=y)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return (model(batch["x"])[:, 0] - batch["y"]).square() / 2


@dataclass(frozen=True, eq=False)
class ModelAtHand:
    """A task made of a model, tensors and a loss that are at hand. `label`, where there is one, is the class."""

    net: nn.Module
    tensors: Mapping[str, Tensor]
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]

    def model(self, checkpoint: str | None) -> nn.Module:
        return self.net

    def examples(self) -> TensorExamples:
        return TensorExamples(**self.tensors)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return self.loss(model, batch)

    def labels(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["label"]


def gradients_one_by_one(
    task: Task, parameters: Mapping[str, nn.Parameter], model: nn.Module, batch: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The oracle: [B, P] for each parameter, from autograd on batches of a single example."""
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for i in range(len(next(iter(batch.values())))):
        (loss,) = task.losses(model, {name: tensor[i : i + 1] for name, tensor in batch.items()})
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
            rows[name].append((torch.zeros_like(parameter) if grad is None else grad).flatten())
    return {name: torch.stack(found) for name, found in rows.items()}


class TopLevelToken(nn.Module):
    """A class token, a position table and a temperature that the model itself owns, beside modules of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(4, 4))
        self.log_temperature = nn.Parameter(torch.tensor(0.3))
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        scores: Tensor = self.head(torch.tanh(self.inner(tokens)).mean(dim=1)) * self.log_temperature.exp()
        return scores


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.attention(x, x, x)[0].mean(dim=1))
        return scores


class UsedTwice(nn.Module):
    """One layer in two places, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.again = nn.Sequential(self.layer, nn.Tanh())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.again(torch.tanh(self.layer(x))).mean(dim=1))
        return scores


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(5, 4, padding_idx=0), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.head(self.norm(self.embedding(ids)).mean(dim=1))
        return scores


class PartlyUsed(nn.Module):
    """`spare` is never called, and what `ignored` gives has no part in the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.ignored, self.head = nn.Linear(2, 2), nn.Linear(4, 2), nn.Linear(4, 3)
        self.banks = nn.ParameterList([nn.Parameter(torch.randn(4)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        self.ignored(x)
        scores: Tensor = self.head((x * self.banks[0] + self.banks[1]).mean(dim=1))
        return scores


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.lstm(x)[0][:, -1])
        return scores


def conv_net() -> nn.Module:
    """Convolutions, in-place activations and norms by their running statistics: the generic rule."""
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, 2, groups=1, bias=False),
        nn.ReLU(inplace=True),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    return net.eval()
