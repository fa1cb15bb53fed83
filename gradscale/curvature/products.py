"""Products of a batch's Hessian with vectors: by double backward, forward over backward, and finite differences.

Never by `jvp(jacrev)`, `torch.func.hessian` or reverse over forward: these are wrong through LayerNorm and BatchNorm
(torch 2.13: 9 % and 50 % off, in float64), and nothing tells.

Every function adds to a total in float64. Shapes: P entries, k vectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gradscale.curvature.layout import Layout
from gradscale.curvature.stream import Microbatch, Stream, loss_at, summed
from gradscale.errors import GradscaleError
from gradscale.grads.functional import Caller, called, differentiable_attention, load_forward_derivatives
from gradscale.grads.subject import Subject


def add_double_backward(subject: Subject, microbatch: Microbatch, vectors: Tensor, total: Tensor) -> None:
    """Add sum_i w_i H_i v for every row v of `vectors` [k, P] to `total` [k, P] float64.

    The gradient's graph is made once and derived k times. Cost: two to three forward and backward passes, about two
    more for every further vector; memory: about three times that of a pass.
    """
    layout, parameters = Layout.of(subject.parameters), list(subject.parameters.values())
    with torch.enable_grad(), differentiable_attention():
        gradient = torch.autograd.grad(loss_at(subject, microbatch), parameters, create_graph=True, allow_unused=True)
        for k, vector in enumerate(vectors):
            pairs = [
                (g, v.to(g.dtype))
                for g, v in zip(gradient, layout.unflatten(vector), strict=True)
                if g is not None and g.requires_grad
            ]
            if pairs:  # else the gradient is constant
                slopes, along = zip(*pairs, strict=True)
                found = torch.autograd.grad(
                    slopes, parameters, along, retain_graph=k + 1 < len(vectors), allow_unused=True
                )
                add_parts(layout, found, total[k])


def add_forward_over_backward(subject: Subject, microbatch: Microbatch, vectors: Tensor, total: Tensor) -> None:
    """The same by the derivative of the gradient along each vector, `jvp(grad)`: no graph of a graph is held.

    Cost: three to five forward and backward passes for each vector.
    """
    load_forward_derivatives()
    layout, parameters = Layout.of(subject.parameters), list(subject.parameters.values())
    caller = Caller(subject.model, lambda model, m: summed(subject.task.losses(model, m.batch), m))

    def loss(values: tuple[Tensor, ...]) -> Tensor:
        value: Tensor = called(caller, parameters, values, microbatch)
        return value

    here = tuple(parameter.detach() for parameter in parameters)
    with torch.no_grad(), differentiable_attention():
        for k, vector in enumerate(vectors):
            along = tuple(v.to(p.dtype) for v, p in zip(layout.unflatten(vector), here, strict=True))
            found = torch.func.jvp(torch.func.grad(loss), (here,), (along,))[1]
            add_parts(layout, found, total[k])


def add_differences(stream: Stream, vector: Tensor, eps: float, total: Tensor) -> None:
    """Add (grad(theta + h v) - grad(theta - h v)) / 2 h, h = eps |theta| / |v|, to `total` [P] float64.

    The gradient is that of sum_i w_i l_i over the whole stream: parameters are moved once for each sign, and put back
    bit for bit whatever happens. Whatever a plain backward pass goes through will do: fused attention, torch.compile,
    any checkpointing. Where theta is zero, its norm counts as 1. Error: O(eps^2), and rounding over eps, see
    `calibrate`. Cost: two forward and backward passes; memory: the parameters once more.
    Raises: GradscaleError if a parameter is coarser than float32: it would not move by so little.
    """
    check_fine(stream.subject)
    length, layout = float(norm(vector)), stream.layout
    if length == 0:
        return
    h = eps * (math.sqrt(sum(float(norm(p.detach())) ** 2 for p in stream.parameters)) or 1.0) / length
    rows = total.split(layout.sizes)
    with restored(stream.parameters) as kept:
        for step in (h, -h):
            move(stream.parameters, kept, layout.unflatten(vector), step)
            add_gradients(stream, rows, 1 / (2 * step))


def add_gradients(stream: Stream, rows: Sequence[Tensor], factor: float) -> None:
    """Add `factor` times the gradient of sum_i w_i l_i over the stream to `rows`, [P_j] float64 for each parameter."""
    with own_gradients(stream.subject.model), torch.enable_grad():
        for microbatch in stream:
            loss_at(stream.subject, microbatch).backward()  # not autograd.grad, which use_reentrant=True refuses
            for row, parameter in zip(rows, stream.parameters, strict=True):
                if parameter.grad is not None:
                    row.add_(parameter.grad.to_dense().reshape(-1), alpha=factor)
            stream.subject.model.zero_grad(set_to_none=True)


def check_fine(subject: Subject) -> None:
    coarse = {name: p.dtype for name, p in subject.parameters.items() if torch.finfo(p.dtype).eps > 2e-7}
    if coarse:
        name = next(iter(coarse))
        raise GradscaleError(
            f"parameters must be float32 or float64 for finite differences, got {coarse[name]} for {name}; load the "
            "float32 master weights and compute under torch.autocast, or take backend double_backward"
        )


def norm(tensor: Tensor) -> Tensor:
    """[] float64: of all entries, widened a few at a time."""
    flat = tensor.reshape(-1)
    return torch.stack([part.double().square().sum() for part in flat.split(1 << 18)]).sum().sqrt()


def move(parameters: Sequence[nn.Parameter], kept: Sequence[Tensor], along: Sequence[Tensor], step: float) -> None:
    """Set every parameter to what was kept of it plus `step` times `along`, rounded once."""
    with torch.no_grad():
        for parameter, before, v in zip(parameters, kept, along, strict=True):
            if v.dtype == before.dtype:
                torch.add(before, v, alpha=step, out=parameter)
            else:
                parameter.copy_(torch.add(before.double(), v, alpha=step))


@contextmanager
def restored(parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Copies of the parameters, which are written back at the end, bit for bit."""
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        yield kept
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.copy_(before)


@contextmanager
def own_gradients(model: nn.Module) -> Iterator[None]:
    """Without gradients on the parameters; those that were there come back."""
    kept = {parameter: parameter.grad for parameter in model.parameters()}
    model.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        for parameter, gradient in kept.items():
            parameter.grad = gradient


def add_parts(layout: Layout, parts: Sequence[Tensor | None], total: Tensor) -> None:
    """Add one tensor for each parameter (None: zero) to `total` [P] float64."""
    for row, part in zip(total.split(layout.sizes), parts, strict=True):
        if part is not None:
            row.add_(part.detach().to_dense().reshape(-1))
