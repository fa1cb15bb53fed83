"""The check before a run: are the per-example gradients that the hooks see those that autograd knows?

Two comparisons on a few examples catch what no rule can see from inside: a parameter that is used behind
its module's back, and examples that influence one another.

Shapes: B examples, L parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.grads.readings import GradientSums, Readings, SquaredNorms
from gradscale.run.shard import Subject, batch_size, labels_of, load_batch, read_batch
from gradscale.task import Batch

_EXAMPLES = 4
_ATTEMPTS = 64
_LOG = logging.getLogger("gradscale")
_MIXING = (
    "the losses or the model mix examples (batch statistics, a mean over the batch, padding that is attended to, "
    "an output whose first dimension is not the batch)"
)


def check_subject(subject: Subject, microbatch: int = _EXAMPLES) -> None:
    """Compare with autograd on the first few examples, at most `microbatch`, whose losses and gradients are finite.

    (i) The sum of the per-example gradients is the gradient of the summed losses, for every parameter;
    (ii) the first example has the same loss and gradient norms alone as beside the others.
    Raises: GradscaleError naming the parameters that differ.
    """
    total, size = len(subject.examples), min(_EXAMPLES, microbatch)
    for start in range(0, min(total, _ATTEMPTS * size), size):
        ids = range(start, min(start + size, total))
        batch = load_batch(subject, ids)
        labels_of(subject.task, batch)
        readings = read_batch(subject, batch, frozenset({SquaredNorms(), GradientSums()}))
        if readings.finite.all():
            _check_sums(subject, batch, readings.sums[GradientSums()][None])
            _check_alone(subject, load_batch(subject, range(ids.start, ids.start + 1)), readings)
            return
    _LOG.warning("the first examples all have a non-finite loss or gradient: the gradients were not held to autograd")


def autograd_sums(subject: Subject, batch: Batch) -> dict[str, Tensor]:
    """[P] float64 for every parameter: the gradient of the summed losses, by one plain backward pass."""
    kept = {parameter: parameter.grad for parameter in subject.model.parameters()}
    subject.model.zero_grad(set_to_none=True)
    with torch.enable_grad():  # .backward, since a checkpoint with use_reentrant=True refuses torch.autograd.grad
        subject.task.losses(subject.model, batch).sum().backward()
    found = {
        name: (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense())
        .reshape(-1)
        .double()
        for name, parameter in subject.parameters.items()
    }
    for parameter, grad in kept.items():
        parameter.grad = grad
    return found


def _check_sums(subject: Subject, batch: Batch, sums: Mapping[str, Tensor]) -> None:
    exact = autograd_sums(subject, batch)
    scale = float(torch.stack([grad.norm() for grad in exact.values()]).norm())
    wrong = [
        name
        for name, grad in exact.items()
        if not float((sums[name].double() - grad).norm()) <= _tolerance(subject, float(grad.norm()), scale)
    ]
    if wrong:
        raise GradscaleError(
            f"the per-example gradients must add up to autograd's gradient, got another sum for {', '.join(wrong)}: "
            "the parameter is used by something other than its own module's forward, or through torch.no_grad(); "
            "call the module, or leave the parameter out by --params"
        )


def _check_alone(subject: Subject, single: Batch, beside: Readings) -> None:
    alone = read_batch(subject, single, frozenset({SquaredNorms()}))
    assert batch_size(single) == 1
    sq_norms = beside.sq_norms[0]
    together, scale = sq_norms.sqrt(), float(sq_norms.sum().sqrt())
    wrong = [
        name
        for name, a, b in zip(subject.parameters, alone.sq_norms[0].sqrt().tolist(), together.tolist(), strict=True)
        if not abs(a - b) <= _tolerance(subject, b, scale)
    ]
    if wrong:
        raise GradscaleError(
            f"an example must have the same gradient alone as within a batch, got another for {', '.join(wrong)}: "
            f"{_MIXING}"
        )
    loss, expected = float(alone.losses[0]), float(beside.losses[0])
    if not abs(loss - expected) <= _tolerance(subject, abs(expected), 1.0):
        raise GradscaleError(
            f"an example must have the same loss alone as within a batch, got {loss:.6g} alone and {expected:.6g} "
            f"within: {_MIXING}"
        )


def _tolerance(subject: Subject, size: float, scale: float) -> float:
    """What rounding may do to a vector of norm `size` in a gradient of norm `scale`."""
    eps = max(torch.finfo(parameter.dtype).eps for parameter in subject.parameters.values())
    return float(4 * eps**0.5 * size + 100 * eps * scale)


class Comparison(NamedTuple):
    """One example's gradient within its batch against the same example's alone."""

    example_id: int
    difference: float  # |g_together - g_alone| / |g_alone|
    allowed: float  # what rounding may do
    worst: str  # the parameter that differs most

    @property
    def agrees(self) -> bool:
        return self.difference <= self.allowed


def compare_alone(subject: Subject, ids: range) -> list[Comparison]:
    """Each of the examples `ids` alone, by plain autograd, against the same one in a batch of them all.

    Padding and batch-mates must not change an example's gradient. Cost: len(ids) + 1 passes for each example.
    """
    batch = load_batch(subject, ids)
    return [_compare(subject, batch, ids, row) for row in range(len(ids))]


def _compare(subject: Subject, batch: Batch, ids: range, row: int) -> Comparison:
    others = torch.ones(len(ids), dtype=torch.bool, device=subject.device)
    others[row] = False
    together = read_batch(subject, batch, frozenset({GradientSums()}), exclude=others).sums[GradientSums()][None]
    alone = autograd_sums(subject, load_batch(subject, ids[row : row + 1]))
    errors = {name: float((together[name].double() - alone[name]).norm()) for name in subject.parameters}
    scale = float(torch.stack([g.norm() for g in alone.values()]).norm())
    difference = sum(error**2 for error in errors.values()) ** 0.5
    return Comparison(
        ids[row],
        difference / scale if scale else difference,
        _tolerance(subject, scale, scale) / scale if scale else 0.0,
        max(errors, key=errors.__getitem__),
    )
