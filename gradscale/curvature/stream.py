"""The examples that an operator is a mean over, one microbatch after another.

Shapes: B examples of a microbatch, n of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from gradscale.curvature.layout import Layout
from gradscale.errors import GradscaleError
from gradscale.grads.capture import check_losses
from gradscale.grads.subject import Subject, load_batch
from gradscale.task import Batch, batch_size


class Microbatch(NamedTuple):
    ids: range
    batch: Batch  # on the subject's device
    weights: Tensor | None  # [B] float64, on the host


@dataclass(frozen=True, eq=False)
class Stream:
    """The examples `ids` of a subject in microbatches, the last of which may be smaller.

    An operator over it is the mean over the examples with `weights` [n] float64 (None: one each), so that the size of a
    microbatch changes nothing but rounding.
    Raises: GradscaleError unless there are examples, a positive microbatch, and as many weights of positive sum.
    """

    subject: Subject
    ids: range
    microbatch: int
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        total = len(self.subject.examples)
        if not 0 <= self.ids.start < self.ids.stop <= total or self.ids.step != 1:
            raise GradscaleError(
                f"examples must be a range of consecutive ids from 0 to {total - 1}, got {self.ids}; pass "
                f"range({total})"
            )
        if self.microbatch < 1:
            raise GradscaleError(f"microbatch must be at least 1, got {self.microbatch}; 32 is a usual size")
        if self.weights is not None and (self.weights.shape != (len(self.ids),) or not self.total_weight > 0):
            raise GradscaleError(
                f"weights must be {len(self.ids)} numbers of positive sum, one an example, got shape "
                f"{tuple(self.weights.shape)} of sum {self.total_weight:g}; give counts of tokens, or None"
            )

    @property
    def layout(self) -> Layout:
        return Layout.of(self.subject.parameters)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.subject.parameters.values())

    @property
    def total_weight(self) -> float:
        return float(len(self.ids)) if self.weights is None else float(self.weights.double().sum())

    @property
    def first(self) -> Stream:
        """Its first microbatch alone."""
        weights = None if self.weights is None else self.weights[: self.microbatch]
        return replace(self, ids=self.ids[: self.microbatch], weights=weights)

    def __iter__(self) -> Iterator[Microbatch]:
        for start in range(0, len(self.ids), self.microbatch):
            ids = self.ids[start : start + self.microbatch]
            weights = None if self.weights is None else self.weights[start : start + self.microbatch].double()
            yield Microbatch(ids, load_batch(self.subject, ids), weights)


def summed(losses: Tensor, microbatch: Microbatch) -> Tensor:
    """[]: sum_i w_i l_i of the losses [B]. Raises: GradscaleError unless they are one an example."""
    check_losses(losses, batch_size(microbatch.batch))
    weights = microbatch.weights
    return losses.sum() if weights is None else losses @ weights.to(losses.device, losses.dtype)


def loss_at(subject: Subject, microbatch: Microbatch) -> Tensor:
    """[]: sum_i w_i l_i, in the graph of the parameters.

    Raises: GradscaleError if it does not depend on them.
    """
    value = summed(subject.task.losses(subject.model, microbatch.batch), microbatch)
    if not value.requires_grad:
        raise GradscaleError(
            "losses must depend on the measured parameters, got losses without a gradient; compute them without "
            "torch.no_grad() and without .detach()"
        )
    return value
