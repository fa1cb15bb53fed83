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
from gradscale.curvature.master import master_of, squared_way
from gradscale.curvature.stream import Microbatch, Stream, loss_at, summed
from gradscale.grads.functional import (
    Caller,
    called,
    differentiable_attention,
    gradient_graph,
    hessian_products,
    load_forward_derivatives,
)
from gradscale.grads.subject import Subject

_PIECE = 1 << 16  # entries widened at a time, in the processor's cache


def add_double_backward(subject: Subject, microbatch: Microbatch, vectors: Tensor, total: Tensor) -> None:
    """Add sum_i w_i H_i v for every row v of `vectors` [k, P] to `total` [k, P] float64.

    The gradient's graph is made once and derived k times. Cost: two to three forward and backward passes, about two
    more for every further vector; memory: about three times that of a pass.
    Raises: NotTwiceDifferentiable as `gradient_graph`.
    """
    layout, parameters = Layout.of(subject.parameters), list(subject.parameters.values())
    with torch.enable_grad(), differentiable_attention():
        value = loss_at(subject, microbatch)
        gradient = gradient_graph([value], parameters)
    parts = (layout.unflatten(vector) for vector in vectors)
    found = hessian_products(value, gradient, parameters, parts, len(vectors))
    for row, (_, product) in zip(total, found, strict=True):
        add_parts(layout, product, row)


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
    `calibrate`. Parameters coarser than float32 are moved by way of `master_of`, and the difference is divided by how
    far they have come along v. Cost: two forward and backward passes; memory: the parameters once more, in float32 too
    if they are coarser.
    """
    length, layout = float(norm(vector)), stream.layout
    if length == 0:
        return
    h = eps * (math.sqrt(sum(float(norm(p.detach())) ** 2 for p in stream.parameters)) or 1.0) / length
    rows, along = total.split(layout.sizes), layout.unflatten(vector)
    with restored(stream.parameters) as kept:
        masters = [master_of(name, weights) for name, weights in zip(layout.names, kept, strict=True)]
        come = squared_way(kept, masters, along, h) or length**2
        for step in (h, -h):
            move(stream.parameters, masters, along, step)
            add_gradients(stream, rows, length**2 / come / (2 * step))


def add_gradients(stream: Stream, rows: Sequence[Tensor], factor: float) -> None:
    """Add `factor` times the gradient of sum_i w_i l_i over the stream to `rows`, [P_j] float64 for each parameter."""
    with own_gradients(stream.subject.model), torch.enable_grad():
        for microbatch in stream:
            loss_at(stream.subject, microbatch).backward()  # not autograd.grad, which use_reentrant=True refuses
            for row, parameter in zip(rows, stream.parameters, strict=True):
                if parameter.grad is not None:
                    row.add_(parameter.grad.to_dense().reshape(-1), alpha=factor)
            stream.subject.model.zero_grad(set_to_none=True)


def norm(tensor: Tensor) -> Tensor:
    """[] float64: of all entries, widened a few at a time."""
    pieces = (piece.double() for piece in tensor.reshape(-1).split(_PIECE))
    return torch.stack([torch.dot(piece, piece) for piece in pieces]).sum().sqrt()


def move(parameters: Sequence[nn.Parameter], kept: Sequence[Tensor], along: Sequence[Tensor], step: float) -> None:
    """Set every parameter to what was kept of it plus `step` times `along`, rounded once."""
    with torch.no_grad():
        for parameter, before, v in zip(parameters, kept, along, strict=True):
            torch.add(before, v, alpha=step, out=parameter)
    torch.clear_autocast_cache()  # an autocast around all of this would compute with the weights as they were


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
        torch.clear_autocast_cache()


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
