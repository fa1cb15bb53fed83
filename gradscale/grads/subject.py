"""A model ready to be measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradscale.errors import GradscaleError
from gradscale.grads.coverage import Site
from gradscale.grads.readings import Reading, Readings, Totals, read_gradients
from gradscale.grads.waiting import Doubts, sent
from gradscale.task import Batch, Examples, Task, batch_size


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


def read_batch(
    subject: Subject,
    batch: Batch,
    readings: Set[Reading],
    labels: Tensor | None = None,
    exclude: Tensor | None = None,
    totals: Totals | None = None,
    doubts: Doubts | None = None,
    scalars: Callable[[nn.Module], Tensor] | None = None,
) -> Readings:
    """The readings of one batch, which is on the subject's device; see `read_gradients`.

    Of the gradients of `scalars(model)` [B], where they are given, in the place of those of the task's losses.
    """

    def losses(model: nn.Module) -> Tensor:
        return subject.task.losses(model, batch)

    return read_gradients(
        subject.model,
        subject.sites,
        subject.parameters,
        scalars or losses,
        batch_size(batch),
        readings,
        labels,
        exclude,
        totals,
        doubts,
    )


def load_batch(subject: Subject, ids: range) -> Batch:
    """The examples `ids` on the subject's device.

    Raises: GradscaleError if the batch does not have one row for each of them.
    """
    return sent_batch(subject, fetched_batch(subject, ids))


def fetched_batch(subject: Subject, ids: range) -> Batch:
    """The examples `ids` where `subject.examples` has them: on the host."""
    batch = subject.examples.batch(ids)
    wrong = {name: tuple(tensor.shape) for name, tensor in batch.items() if tensor.shape[:1] != (len(ids),)}
    if wrong or not batch:
        raise GradscaleError(
            f"examples.batch must return tensors with {len(ids)} rows for {ids}, got {wrong or 'none'}"
        )
    return batch


def sent_batch(subject: Subject, batch: Batch) -> Batch:
    return {name: sent(tensor, subject.device) for name, tensor in batch.items()}
