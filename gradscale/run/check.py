"""The check before a run: are the per-example gradients that the hooks see those that autograd knows?

Three comparisons on a few examples catch what no rule can see from inside: a model that computes something else
under hooks, a parameter that is used behind its module's back, and examples that influence one another.

Shapes: B examples, L parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradscale.errors import GradscaleError
from gradscale.grads.call import float_tensors
from gradscale.grads.readings import GradientSums, Readings, SquaredNorms
from gradscale.grads.subject import Subject, load_batch, read_batch
from gradscale.run.shard import labels_of
from gradscale.task import Batch, batch_size

_EXAMPLES = 4
_ATTEMPTS = 64
_LOG = logging.getLogger("gradscale")
_MIXING = (
    "the losses or the model mix examples (batch statistics, a mean over the batch, padding that is attended to, "
    "an output whose first dimension is not the batch)"
)


def check_subject(subject: Subject, microbatch: int = _EXAMPLES) -> None:
    """Compare with autograd on the first few examples, at most `microbatch`, whose losses and gradients are finite.

    (i) The losses are those of the model without hooks; (ii) the sum of the per-example gradients is the gradient of
    the summed losses, for every parameter; (iii) the first example has the same loss and gradient norms alone as
    beside the others.
    Raises: GradscaleError naming the parameters that differ.
    """
    total, size = len(subject.examples), min(_EXAMPLES, microbatch)
    for start in range(0, min(total, _ATTEMPTS * size), size):
        ids = range(start, min(start + size, total))
        batch = load_batch(subject, ids)
        labels_of(subject.task, batch)
        readings = read_batch(subject, batch, frozenset({SquaredNorms(), GradientSums()}))
        if readings.finite.all():
            plain = autograd(subject, batch)
            _check_losses(readings.losses, plain)
            _check_sums(readings.sums[GradientSums()][None], plain)
            _check_alone(subject, load_batch(subject, range(ids.start, ids.start + 1)), readings, plain.eps)
            return
    _LOG.warning("the first examples all have a non-finite loss or gradient: the gradients were not held to autograd")


class Plain(NamedTuple):
    """What the model gives without hooks of gradscale's."""

    losses: Tensor  # [B] float64
    sums: dict[str, Tensor]  # of every parameter, [P] float64: the gradient of the summed losses
    eps: float  # of the coarsest dtype that a parameter or an output of a module has


def autograd(subject: Subject, batch: Batch) -> Plain:
    """By one plain backward pass."""
    kept = {parameter: parameter.grad for parameter in subject.model.parameters()}
    subject.model.zero_grad(set_to_none=True)
    dtypes = {parameter.dtype for parameter in subject.parameters.values()}
    with torch.enable_grad(), _noted(subject.model, dtypes):
        losses = subject.task.losses(subject.model, batch)
        losses.sum().backward()  # a checkpoint with use_reentrant=True refuses torch.autograd.grad
    found = {
        name: (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense())
        .reshape(-1)
        .double()
        for name, parameter in subject.parameters.items()
    }
    for parameter, grad in kept.items():
        parameter.grad = grad
    return Plain(losses.detach().double(), found, max(torch.finfo(dtype).eps for dtype in dtypes))


@contextmanager
def _noted(model: nn.Module, dtypes: set[torch.dtype]) -> Iterator[None]:
    """Adds the floating-point types of every module's outputs to `dtypes`: under autocast, others than the weights'."""

    def note(module: nn.Module, args: Any, output: Any) -> None:
        dtypes.update(tensor.dtype for tensor in float_tensors(output))

    handles = [module.register_forward_hook(note) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_losses(losses: Tensor, plain: Plain) -> None:
    for row, (loss, expected) in enumerate(zip(losses.tolist(), plain.losses.tolist(), strict=True)):
        if not abs(loss - expected) <= _tolerance(plain.eps, abs(expected), 1.0):
            raise GradscaleError(
                f"the losses must be those of the model as it is, got {loss:.6g} with gradscale's hooks on it and "
                f"{expected:.6g} without, for example {row} of the batch; make the model depend on neither chance, nor "
                "forward hooks, nor whether its parameters require grad"
            )


def _check_sums(sums: Mapping[str, Tensor], plain: Plain) -> None:
    exact = plain.sums
    scale = float(torch.stack([grad.norm() for grad in exact.values()]).norm())
    wrong = [
        name
        for name, grad in exact.items()
        if not float((sums[name].double() - grad).norm()) <= _tolerance(plain.eps, float(grad.norm()), scale)
    ]
    if wrong:
        raise GradscaleError(
            f"the per-example gradients must add up to autograd's gradient, got another sum for {', '.join(wrong)}: "
            "the parameter is used by something other than its own module's forward, or through torch.no_grad(); "
            "call the module, or leave the parameter out by --params"
        )


def _check_alone(subject: Subject, single: Batch, beside: Readings, eps: float) -> None:
    alone = read_batch(subject, single, frozenset({SquaredNorms()}))
    assert batch_size(single) == 1
    sq_norms = beside.sq_norms[0]
    together, scale = sq_norms.sqrt(), float(sq_norms.sum().sqrt())
    wrong = [
        name
        for name, a, b in zip(subject.parameters, alone.sq_norms[0].sqrt().tolist(), together.tolist(), strict=True)
        if not abs(a - b) <= _tolerance(eps, b, scale)
    ]
    if wrong:
        raise GradscaleError(
            f"an example must have the same gradient alone as within a batch, got another for {', '.join(wrong)}: "
            f"{_MIXING}"
        )
    loss, expected = float(alone.losses[0]), float(beside.losses[0])
    if not abs(loss - expected) <= _tolerance(eps, abs(expected), 1.0):
        raise GradscaleError(
            f"an example must have the same loss alone as within a batch, got {loss:.6g} alone and {expected:.6g} "
            f"within: {_MIXING}"
        )


def _tolerance(eps: float, size: float, scale: float) -> float:
    """What rounding may do to a vector of norm `size` in a gradient of norm `scale`: a quarter of it at the most."""
    return float(min(4 * eps**0.5, 0.25) * size + min(100 * eps, 0.1) * scale)


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
    alone = autograd(subject, load_batch(subject, ids[row : row + 1]))
    errors = {name: float((together[name].double() - alone.sums[name]).norm()) for name in subject.parameters}
    scale = float(torch.stack([g.norm() for g in alone.sums.values()]).norm())
    difference = sum(error**2 for error in errors.values()) ** 0.5
    return Comparison(
        ids[row],
        difference / scale if scale else difference,
        _tolerance(alone.eps, scale, scale) / scale if scale else 0.0,
        max(errors, key=errors.__getitem__),
    )
