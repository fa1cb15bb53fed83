"""A model ready to be measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from gradscale.grads.coverage import Site
from gradscale.task import Examples, Task


@dataclass(frozen=True)
class Subject:
    """What does not change from shard to shard of one checkpoint."""

    task: Task
    model: nn.Module
    examples: Examples
    parameters: Mapping[str, nn.Parameter]
    sites: tuple[Site, ...]

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device
