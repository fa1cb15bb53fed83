"""What measures read beside the gradients: observations, a row an example, and what they gather over a shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradscale.grads.subject import Subject
from gradscale.measures.measure import Gathering, Observation, Statistic
from gradscale.task import Batch


class Beside(NamedTuple):
    observations: Mapping[Observation, Tensor]  # [n, ...] each
    gathered: Mapping[Gathering[Any], Any]


class BesideReader:
    """Reads one microbatch of a shard after another; each is loaded once, whatever is asked."""

    def __init__(self, subject: Subject, statistics: Sequence[Statistic[Any]]) -> None:
        self._subject = subject
        self._rows: dict[Observation, list[Tensor]] = {each: [] for each in observations_of(statistics)}
        self._gatherings = gatherings_of(statistics)
        self._gathered: dict[Gathering[Any], Any] = {}

    @property
    def asked(self) -> bool:
        return bool(self._rows or self._gatherings)

    def read(self, batch: Batch, ids: range, keep: Tensor) -> None:
        for observation, rows in self._rows.items():
            rows.append(observation.observe(self._subject, batch, ids))
        for gathering in self._gatherings:
            here = gathering.gather(self._subject, batch, ids, keep)
            before = self._gathered.get(gathering)
            self._gathered[gathering] = here if before is None else gathering.merge(before, here)

    def found(self) -> Beside:
        return Beside({observation: torch.cat(rows) for observation, rows in self._rows.items()}, self._gathered)


def observations_of(statistics: Sequence[Statistic[Any]]) -> tuple[Observation, ...]:
    """What is observed for them, each once."""
    needs = (need for statistic in statistics for need in statistic.needs if isinstance(need, Observation))
    return tuple(dict.fromkeys(needs))


def gatherings_of(statistics: Sequence[Statistic[Any]]) -> tuple[Gathering[Any], ...]:
    """What is gathered for them, each once."""
    needs = (need for statistic in statistics for need in statistic.needs if isinstance(need, Gathering))
    return tuple(dict.fromkeys(needs))


def try_beside(subject: Subject, statistics: Sequence[Statistic[Any]], first: Batch) -> None:
    """Observe and gather on the batch of example 0. Raises: GradscaleError if the task lacks what that takes."""
    reader = BesideReader(subject, statistics)
    reader.read(first, range(1), torch.ones(1, dtype=torch.bool, device=subject.device))
