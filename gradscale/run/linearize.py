"""The outputs and losses of a model at one point, in dense matrices: for small problems in float64.

Shapes: B examples, C outputs of each, P entries of all parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradscale.errors import GradscaleError
from gradscale.grads.subject import Subject
from gradscale.measures.effective_gram_dense import Linearized
from gradscale.task import Batch

_AGREEMENT = 1e-9  # of two gradients in float64, relative


def linearize(subject: Subject, batch: Batch) -> Linearized:
    """Jacobians of the model's output f [B, ...], and the first two derivatives of the losses in it.

    The output is shifted by u = 0 in a forward hook, and the losses derived by u. Cost: a forward pass, B C backward
    passes of B examples, and C + 1 through the loss alone.
    Raises: GradscaleError if the model is not called once, or gives anything but a tensor with a row for each example.
    """
    output, shift, losses = _shifted(subject, batch)
    B = len(losses)
    (slope,) = torch.autograd.grad(losses.sum(), shift, create_graph=True, materialize_grads=True)
    residuals = slope.reshape(B, -1)
    C = residuals.shape[1]
    curvature = [_derivative(residuals[:, c].sum(), shift).reshape(B, C) for c in range(C)]
    parts = torch.autograd.grad(
        output.reshape(-1),
        list(subject.parameters.values()),
        torch.eye(B * C, dtype=torch.float64),
        is_grads_batched=True,
        materialize_grads=True,
    )
    jacobians = torch.cat([part.reshape(B, C, -1) for part in parts], dim=2)
    return Linearized(jacobians, residuals.detach(), torch.stack(curvature, dim=1))


def check_by_outputs(point: Linearized, gradient: Tensor) -> None:
    """Raises: GradscaleError unless sum J_i^T r_i is `gradient` [P], that of the summed losses."""
    found = torch.einsum("ncp,nc->p", point.jacobians, point.residuals)
    error, scale = float((found - gradient).norm()), float(point.jacobians.norm() * point.residuals.norm())
    if not error <= _AGREEMENT * scale:
        raise GradscaleError(
            f"the losses must depend on the parameters by the model's output alone for K_n, got a gradient {error:.3g} "
            "off; move what else depends on them (a penalty of the weights) out of the losses, or leave out gram"
        )


def _shifted(subject: Subject, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The model's output, the zeros [B, ...] added to it, and the losses [B]."""
    found: list[tuple[Tensor, Tensor]] = []
    B = len(next(iter(batch.values())))

    def shift(module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.shape[:1] != (B,):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise GradscaleError(
                f"the model must give one tensor with {B} rows for K_n, got {shape}; give it, or leave out gram"
            )
        found.append((output, torch.zeros_like(output, requires_grad=True)))
        return output + found[-1][1]

    handle = subject.model.register_forward_hook(shift)
    try:
        with torch.enable_grad():
            losses = subject.task.losses(subject.model, batch)
    finally:
        handle.remove()
    if len(found) != 1:
        raise GradscaleError(
            f"the losses must call the model once for K_n, got {len(found)} calls; call it as model(...), or leave "
            "out gram"
        )
    return *found[0], losses


def _derivative(value: Tensor, variable: Tensor) -> Tensor:
    """d value / d variable; zero where value is a constant, as the residuals of a linear loss are."""
    if not value.requires_grad:
        return torch.zeros_like(variable)
    (found,) = torch.autograd.grad(value, variable, retain_graph=True, materialize_grads=True)
    return found.detach()
