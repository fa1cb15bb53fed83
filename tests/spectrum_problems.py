"""Tasks for tests of spectrum runs, beside those of `run_problems`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from run_problems import Regression
from torch import nn


@dataclass(frozen=True)
class Scaled(Regression):
    """Regression whose weights are those of `Regression` times the number that the checkpoint's file holds.

    A file that holds 0 is a checkpoint of other shapes.
    """

    def model(self, checkpoint: str | None) -> nn.Module:
        model, scale = super().model(None), float(Path(checkpoint).read_text()) if checkpoint else 1.0
        if not scale:
            return nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 1)).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        return model
