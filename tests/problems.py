"""Small models and data with known answers.

`Toy` is the five-row table of arXiv-free folklore used throughout: x_i = (e_i, z_i) in R^6, weights zero, loss
(f - y)^2 / 2, so that g_i = -y_i x_i. In the "real" table z_i = y_i and every pair of gradients has inner product 1;
in the "random" one z_i = 0 and the gradients are orthonormal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradscale.task import TensorExamples


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
