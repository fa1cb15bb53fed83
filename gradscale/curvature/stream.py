"""The examples that an operator is a mean over, one microbatch after another, and the model called with other weights.

Shapes: B examples of a microbatch, n of all.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradscale.curvature.layout import Layout
from gradscale.errors import GradscaleError
from gradscale.grads.capture import check_losses
from gradscale.grads.subject import Subject
from gradscale.grads.waiting import sent
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
            yield Microbatch(ids, load(self.subject, ids), weights)


def load(subject: Subject, ids: range) -> Batch:
    """The examples `ids` on the subject's device.

    Raises: GradscaleError if the batch does not have one row for each of them.
    """
    batch = subject.examples.batch(ids)
    wrong = {name: tuple(tensor.shape) for name, tensor in batch.items() if tensor.shape[:1] != (len(ids),)}
    if wrong or not batch:
        raise GradscaleError(
            f"examples.batch must return tensors with {len(ids)} rows for {ids}, got {wrong or 'none'}"
        )
    return {name: sent(tensor, subject.device) for name, tensor in batch.items()}


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


class Caller(nn.Module):
    """A function of a model and a batch as a module's forward, so that the model can be called with other weights."""

    def __init__(self, subject: Subject, function: Any) -> None:
        super().__init__()
        self.model, self._function = subject.model, function
        self.training = subject.model.training

    def forward(self, microbatch: Microbatch) -> Any:
        return self._function(self.model, microbatch)


def called(caller: Caller, parameters: Sequence[nn.Parameter], values: Sequence[Tensor], microbatch: Microbatch) -> Any:
    """What the function gives with `values` in the place of the `parameters`, wherever one is used."""
    there = dict(zip(parameters, values, strict=True))
    return functional_call(caller, _everywhere(caller, there), (microbatch,), tie_weights=False)


def _everywhere(caller: nn.Module, values: Mapping[nn.Parameter, Tensor]) -> dict[str, Tensor]:
    """Each value at every place where its parameter is, a module that has two names being one place.

    Left to find tied parameters itself, `functional_call` puts such a module's own parameters not back (torch 2.13).
    """
    return {
        f"{path}.{name}": values[parameter]
        for path, module in caller.named_modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter in values
    }


def load_forward_derivatives() -> None:
    """At its first dual tensor torch compiles some derivatives with torch.jit, of whose end it then warns."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Of the ways to compute attention, the one that has a second and a forward derivative: B heads T^2 scores held."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
