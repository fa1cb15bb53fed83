"""Products of a batch's generalized Gauss-Newton matrix, J^T Lambda J v, with the loss cut at the model's outputs u.

u is `task.outputs` where the task has `losses_of(outputs, batch)`, else all floating-point tensors that the model
returns when `losses` calls it; J = du/dtheta, and Lambda is the Hessian of sum_i w_i l_i in u.

Shapes: P entries, k vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from gradscale.curvature.layout import Layout
from gradscale.curvature.products import add_parts
from gradscale.curvature.stream import Microbatch, loss_at, summed
from gradscale.errors import GradscaleError
from gradscale.grads.call import float_tensors
from gradscale.grads.functional import (
    Caller,
    called,
    depend,
    differentiable_attention,
    gradient_graph,
    load_forward_derivatives,
)
from gradscale.grads.subject import Subject
from gradscale.task import check_rows


class Split(NamedTuple):
    """A loss that is computed from `leaves`, which have the values of the `outputs`."""

    outputs: Sequence[Tensor]  # in the graph of the parameters
    leaves: Sequence[Tensor]
    slopes: Sequence[Tensor | None]  # d loss / d leaf, in the graph of the leaves


def add_gauss_newton(subject: Subject, microbatch: Microbatch, vectors: Tensor, total: Tensor) -> None:
    """Add J^T Lambda J v for every row v of `vectors` [k, P] to `total` [k, P] float64, J v by forward mode.

    The first vector's J v comes from the same forward pass as the graph for J^T. Cost: five thirds of a forward and
    backward pass for each vector; memory: about twice that of a pass.
    Raises: GradscaleError as `split`.
    """
    layout, parameters = Layout.of(subject.parameters), list(subject.parameters.values())
    with differentiable_attention():
        others = [_forward(subject, microbatch, parameters, layout.unflatten(vector)) for vector in vectors[1:]]
        with torch.enable_grad():
            cut, first = _split_along(subject, microbatch, parameters, layout.unflatten(vectors[0]))
            _add_back(cut, [first, *others], parameters, layout, total)


def add_gauss_newton_backward(subject: Subject, microbatch: Microbatch, vectors: Tensor, total: Tensor) -> None:
    """The same with J v as the derivative of w -> <J^T w, v>, for operations without a forward derivative.

    Cost: two to three forward and backward passes, about two for every further vector.
    """
    layout, parameters = Layout.of(subject.parameters), list(subject.parameters.values())
    with torch.enable_grad(), differentiable_attention():
        cut = split(subject, microbatch)
        weights = [torch.zeros_like(u, requires_grad=True) for u in cut.outputs]
        live = [j for j, u in enumerate(cut.outputs) if u.requires_grad]
        back = gradient_graph([cut.outputs[j] for j in live], parameters, [weights[j] for j in live])
        tangents = [_transposed(back, weights, layout.unflatten(vector)) for vector in vectors]
        _add_back(cut, tangents, parameters, layout, total)


def split(subject: Subject, microbatch: Microbatch) -> Split:
    """The loss of a batch, cut at the outputs. Cost: a forward pass.

    Raises: GradscaleError if the loss is not a function of the outputs, or a linear one of what the model returns.
    """
    return _sloped(subject, *_cut(subject, microbatch))


def _split_along(
    subject: Subject, microbatch: Microbatch, parameters: Sequence[nn.Parameter], along: Sequence[Tensor]
) -> tuple[Split, list[Tensor]]:
    """`split`, and J v for the vector v of which each parameter has a part in `along`."""
    load_forward_derivatives()
    caller = Caller(subject.model, lambda model, m: _cut(subject, m))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, v.to(p.dtype)) for p, v in zip(parameters, along, strict=True)]
        outputs, leaves, loss = called(caller, parameters, duals, microbatch)
        pairs = [forward_ad.unpack_dual(u) for u in outputs]
        tangents = [
            torch.zeros_like(leaf) if t is None else t.detach() for (_, t), leaf in zip(pairs, leaves, strict=True)
        ]
        primals = [primal for primal, _ in pairs]
    return _sloped(subject, primals, leaves, loss), tangents


def _cut(subject: Subject, microbatch: Microbatch) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The outputs, leaves with their values, and the loss computed from these."""
    return _by_outputs(subject, microbatch) or _by_returned(subject, microbatch)


def _sloped(subject: Subject, outputs: list[Tensor], leaves: list[Tensor], loss: Tensor) -> Split:
    if not loss.requires_grad or not any(u.requires_grad for u in outputs):
        raise _not_a_function("they are not computed from what the model returns")
    slopes = gradient_graph([loss], leaves)
    if _losses_of(subject) is None and not depend(slopes, leaves):
        raise _not_a_function("they are linear in what the model returns (is it the loss itself?)")
    return Split(outputs, leaves, slopes)


def check_split(subject: Subject, microbatch: Microbatch) -> None:
    """Raises: GradscaleError unless the gradient by way of the outputs, J^T dl/du, is that of the loss."""
    parameters = list(subject.parameters.values())
    with torch.enable_grad(), differentiable_attention():
        cut = split(subject, microbatch)
        pairs = [(u, s) for u, s in zip(cut.outputs, cut.slopes, strict=True) if u.requires_grad and s is not None]
        outputs, slopes = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, parameters, [s.detach() for s in slopes], allow_unused=True)
        plain = torch.autograd.grad(loss_at(subject, microbatch), parameters, allow_unused=True)
    layout = Layout.of(subject.parameters)
    apart, whole = (torch.zeros(layout.size, dtype=torch.float64, device=subject.device) for _ in range(2))
    add_parts(layout, plain, whole)
    add_parts(layout, found, apart)
    eps = max(torch.finfo(p.dtype).eps for p in parameters)
    if not float((apart - whole).norm()) <= 4 * eps**0.5 * float(whole.norm()) + 100 * eps:
        raise _not_a_function("their gradient by way of the outputs is another than their own")


def _losses_of(subject: Subject) -> Callable[..., Tensor] | None:
    found: Callable[..., Tensor] | None = getattr(subject.task, "losses_of", None)
    return found if callable(getattr(subject.task, "outputs", None)) else None


def _by_outputs(subject: Subject, microbatch: Microbatch) -> tuple[list[Tensor], list[Tensor], Tensor] | None:
    losses_of = _losses_of(subject)
    if losses_of is None:
        return None
    (found,) = _outputs(subject, subject.model, microbatch)
    leaf = _leaf(found)
    return [found], [leaf], summed(losses_of(leaf, microbatch.batch), microbatch)


def _by_returned(subject: Subject, microbatch: Microbatch) -> tuple[list[Tensor], list[Tensor], Tensor]:
    outputs: list[Tensor] = []
    leaves: list[Tensor] = []

    def cut(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        outputs.append(tensor)
        leaves.append(_leaf(tensor))
        return leaves[-1]

    with _hooked(subject.model, lambda returned: pytree.tree_map_only(Tensor, cut, returned)):
        losses = subject.task.losses(subject.model, microbatch.batch)
    return outputs, leaves, summed(losses, microbatch)


def _leaf(tensor: Tensor) -> Tensor:
    """Its values alone: without its graph, and without its tangent if it has one."""
    primal: Tensor = forward_ad.unpack_dual(tensor).primal
    return primal.detach().requires_grad_()


def _outputs(subject: Subject, model: nn.Module, microbatch: Microbatch) -> list[Tensor]:
    """u, of the model as it is."""
    if _losses_of(subject) is not None:
        found = subject.task.outputs(model, microbatch.batch)  # type: ignore[attr-defined]
        return [check_rows(found, microbatch.batch, "outputs", "C", "flatten what belongs to one example into one row")]
    returned: list[Tensor] = []
    with _hooked(model, lambda tree: returned.extend(float_tensors(tree))):
        subject.task.losses(model, microbatch.batch)
    return returned


@contextmanager
def _hooked(model: nn.Module, see: Callable[[Any], Any]) -> Iterator[None]:
    """Every time that the model returns, `see` takes what it gives, and may give something else."""
    handle = model.register_forward_hook(lambda module, args, returned: see(returned))
    try:
        yield
    finally:
        handle.remove()


def _forward(
    subject: Subject, microbatch: Microbatch, parameters: Sequence[nn.Parameter], along: Sequence[Tensor]
) -> list[Tensor]:
    """J v, a tensor for each output."""
    load_forward_derivatives()
    caller = Caller(subject.model, lambda model, m: _outputs(subject, model, m))

    def outputs(values: tuple[Tensor, ...]) -> list[Tensor]:
        found: list[Tensor] = called(caller, parameters, values, microbatch)
        return found

    here = tuple(parameter.detach() for parameter in parameters)
    with torch.no_grad():
        tangents = tuple(v.to(p.dtype) for v, p in zip(along, here, strict=True))
        return list(torch.func.jvp(outputs, (here,), (tangents,))[1])


def _transposed(back: Sequence[Tensor | None], weights: Sequence[Tensor], along: Sequence[Tensor]) -> list[Tensor]:
    """J v from `back` = J^T w, in the graph of the `weights` w."""
    pairs = [(b, v.to(b.dtype)) for b, v in zip(back, along, strict=True) if b is not None and b.requires_grad]
    sums, vectors = zip(*pairs, strict=True)
    return list(torch.autograd.grad(sums, weights, vectors, retain_graph=True, materialize_grads=True))


def _add_back(
    cut: Split,
    tangents: Sequence[Sequence[Tensor]],
    parameters: Sequence[nn.Parameter],
    layout: Layout,
    total: Tensor,
) -> None:
    """Add J^T Lambda t for every one of the `tangents` t to its row of `total`."""
    curved = {j: slope for j, slope in enumerate(cut.slopes) if slope is not None}
    for k, tangent in enumerate(tangents):
        weights = torch.autograd.grad(
            list(curved.values()),
            cut.leaves,
            [tangent[j] for j in curved],
            retain_graph=True,
            allow_unused=True,
        )
        pairs = [(u, w) for u, w in zip(cut.outputs, weights, strict=True) if u.requires_grad and w is not None]
        if not pairs:  # the loss is linear in the outputs
            return
        outputs, along = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, parameters, along, retain_graph=k + 1 < len(tangents), allow_unused=True)
        add_parts(layout, found, total[k])


def _not_a_function(why: str) -> GradscaleError:
    return GradscaleError(
        f"losses must be a function of the model's outputs for Gauss-Newton, got losses where {why}; add "
        "task.outputs(model, batch) -> [B, C] and task.losses_of(outputs, batch) -> [B]"
    )
