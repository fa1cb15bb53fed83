"""The ways to v^T M_i v of all B examples of a microbatch at once, without a vector for each example.

Second derivatives along v are those of B numbers in one variable, l_i(theta + t v): forward mode twice, backward mode
three times, or a difference of first derivatives. Forward mode twice is wrong through `layer_norm` of torch 2.13, 15 to
70 % off and nothing tells; there it is written out here. `example_products` tests each way before it takes one.

Shapes: B examples of a microbatch, n of all, P entries, k vectors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gradscale.curvature.calibrate import best
from gradscale.curvature.gauss_newton import Split, split
from gradscale.curvature.gradient_covariance import inner_products
from gradscale.curvature.operators import CovarianceOperator
from gradscale.curvature.products import norm
from gradscale.curvature.stream import Microbatch, Stream, loss_at
from gradscale.errors import GradscaleError
from gradscale.grads.functional import Caller, called, differentiable_attention, load_forward_derivatives

WAYS = ("nested_forward", "triple_backward", "forward_differences", "one_by_one")
_FACTOR, _LARGEST = 4, 2e-2  # steps of differences, relative to the weights: one to the next, and the first
_STEPS, _STEPS_DOUBLE = 8, 15


class LayerNormWrittenOut(TorchFunctionMode):
    """Within it `layer_norm` is means, squares and a root, each of which has right derivatives of every order."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.layer_norm, F.layer_norm):
            return _layer_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dims, keepdim=True)
    scaled = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    scaled = scaled if weight is None else scaled * weight
    return scaled if bias is None else scaled + bias


def nested_forward(stream: Stream, vectors: Tensor) -> Tensor:
    """[n, k] float64: the derivative along v of the derivative along v, of the losses. Exact; nothing is kept."""
    load_forward_derivatives()
    return _by_microbatch(stream, vectors, lambda microbatch, parts: _nested(stream, microbatch, parts))


def _nested(stream: Stream, microbatch: Microbatch, along: Sequence[Tensor]) -> Tensor:
    caller = Caller(stream.subject.model, stream.subject.task.losses)
    here = [parameter.detach() for parameter in stream.parameters]
    nothing, once = (torch.tensor(t, dtype=here[0].dtype, device=here[0].device) for t in (0.0, 1.0))

    def losses(t: Tensor) -> Tensor:
        moved = [p + t.to(p.dtype) * v for p, v in zip(here, along, strict=True)]
        found: Tensor = called(caller, stream.parameters, moved, microbatch.batch)
        return found

    def slopes(t: Tensor) -> Tensor:
        found: Tensor = torch.func.jvp(losses, (t,), (once,))[1]
        return found

    with torch.no_grad(), differentiable_attention(), LayerNormWrittenOut():
        found: Tensor = torch.func.jvp(slopes, (nothing,), (once,))[1]
    return found


def triple_backward(stream: Stream, vectors: Tensor) -> Tensor:
    """[n, k] float64: the derivative in c of v^T (sum_i c_i H_i) v, itself from double backward. Exact.

    For whatever can be derived backward three times; LayerNorm can. Memory: the graphs of all three.
    """
    return _by_microbatch(stream, vectors, lambda microbatch, parts: _triple(stream, microbatch, parts))


def _triple(stream: Stream, microbatch: Microbatch, along: Sequence[Tensor]) -> Tensor:
    weighted, c = _weighted(microbatch)
    with torch.enable_grad(), differentiable_attention():
        value: Tensor | None = loss_at(stream.subject, weighted)
        for _ in range(2):
            if value is None or not value.requires_grad:  # a loss that is linear along v
                return torch.zeros_like(c)
            slopes = torch.autograd.grad(value, stream.parameters, create_graph=True, allow_unused=True)
            value = _inner(slopes, along)
        return _derivative(value, c)


def calibrated_differences(stream: Stream, vectors: Tensor) -> tuple[Callable[[Stream, Tensor], Tensor], float]:
    """`forward_differences` with the step that is best for these vectors and examples, and its estimated error.

    The ladder of steps and the model of the error are those of `calibrate`. Cost: 16 derivatives of the losses along
    each vector (30 in float64).
    Raises: GradscaleError if a parameter is coarser than float32.
    """
    _check_fine(stream)
    coarse = max(torch.finfo(parameter.dtype).eps for parameter in stream.parameters)
    ladder = [_LARGEST / _FACTOR**j for j in range(_STEPS if coarse > 1e-10 else _STEPS_DOUBLE)]
    found = [forward_differences(stream, vectors, eps) for eps in ladder]
    changes = []
    for rough, fine in itertools.pairwise(found):
        apart, scale = (rough - fine).norm(dim=0), fine.norm(dim=0)
        share = float(torch.where(apart > 0, apart / scale, 0.0).max())
        changes.append(share if math.isfinite(share) else math.inf)
    step = best(ladder, changes)
    return lambda examples, units: forward_differences(examples, units, step.eps), step.error


def _check_fine(stream: Stream) -> None:
    coarse = {name: p.dtype for name, p in stream.subject.parameters.items() if torch.finfo(p.dtype).eps > 2e-7}
    if coarse:
        name = next(iter(coarse))
        raise GradscaleError(
            f"parameters must be float32 or float64 for differences of derivatives, got {coarse[name]} for {name}; "
            "load the float32 master weights and compute under torch.autocast, or take another way"
        )


def forward_differences(stream: Stream, vectors: Tensor, eps: float) -> Tensor:
    """[n, k] float64: (<g_i(theta + h v), v> - <g_i(theta - h v), v>) / 2 h of unit vectors, h = eps |theta|.

    Both derivatives by forward mode, which needs one of the first order only. Error: O(eps^2), and rounding over eps.
    """
    load_forward_derivatives()
    h = eps * (math.sqrt(sum(float(norm(p.detach())) ** 2 for p in stream.parameters)) or 1.0)

    def forms(microbatch: Microbatch, along: Sequence[Tensor]) -> Tensor:
        ahead, behind = (_slopes(stream, microbatch, along, step) for step in (h, -h))
        return (ahead - behind) / (2 * h)

    return _by_microbatch(stream, vectors, forms)


def _slopes(stream: Stream, microbatch: Microbatch, along: Sequence[Tensor], step: float) -> Tensor:
    """[B] float64: the derivative of the losses along v at theta + `step` v."""
    caller = Caller(stream.subject.model, stream.subject.task.losses)
    with torch.no_grad(), differentiable_attention(), forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(torch.add(p.detach(), v, alpha=step), v)
            for p, v in zip(stream.parameters, along, strict=True)
        ]
        losses = called(caller, stream.parameters, duals, microbatch.batch)
        found: Tensor | None = forward_ad.unpack_dual(losses).tangent
    return torch.zeros_like(losses, dtype=torch.float64) if found is None else found.double()


def forward_jacobian(stream: Stream, vectors: Tensor) -> Tensor:
    """[n, k] float64: t^T Lambda_i t, t = J_i v by forward mode, Lambda_i the loss's Hessian in the outputs. Exact."""
    load_forward_derivatives()

    def forms(microbatch: Microbatch, along: Sequence[Tensor]) -> Tensor:
        weighted, c = _weighted(microbatch)
        caller = Caller(stream.subject.model, lambda model, m: split(stream.subject, m))
        with torch.enable_grad(), differentiable_attention(), forward_ad.dual_level():
            duals = [forward_ad.make_dual(p, v) for p, v in zip(stream.parameters, along, strict=True)]
            cut: Split = called(caller, stream.parameters, duals, weighted)
            tangents = [forward_ad.unpack_dual(u).tangent for u in cut.outputs]
            moved = [None if t is None else t.detach() for t in tangents]
        return _in_outputs(cut, moved, c)

    return _by_microbatch(stream, vectors, forms)


def transposed_jacobian(stream: Stream, vectors: Tensor) -> Tensor:
    """The same with J v as the derivative of w -> <J^T w, v>, for operations without a forward derivative."""

    def forms(microbatch: Microbatch, along: Sequence[Tensor]) -> Tensor:
        weighted, c = _weighted(microbatch)
        with torch.enable_grad(), differentiable_attention():
            cut = split(stream.subject, weighted)
            live = [u for u in cut.outputs if u.requires_grad]
            w = [torch.zeros_like(u, requires_grad=True) for u in live]
            back = torch.autograd.grad(live, stream.parameters, w, create_graph=True, allow_unused=True)
            value = _inner(back, along)
            found = iter([] if value is None else torch.autograd.grad(value, w, materialize_grads=True))
            return _in_outputs(cut, [next(found, None) if u.requires_grad else None for u in cut.outputs], c)

    return _by_microbatch(stream, vectors, forms)


def _in_outputs(cut: Split, tangents: Sequence[Tensor | None], c: Tensor) -> Tensor:
    """[B]: the derivative in c of t^T (sum_i c_i Lambda_i) t, wherever in the outputs an example has its own."""
    with torch.enable_grad():
        value = _inner(cut.slopes, tangents)
        if value is None or not value.requires_grad:
            return torch.zeros_like(c)
        turned = torch.autograd.grad(value, cut.leaves, create_graph=True, allow_unused=True)
        return _derivative(_inner(turned, tangents), c)


def squared_slopes(operator: CovarianceOperator, vectors: Tensor) -> Tensor:
    """[n, k] float64: what each example adds to n v^T C v. Cost: a forward and backward pass."""
    slopes = inner_products(operator.stream, vectors)
    if not operator.centred:
        return slopes.square()
    n = len(slopes)
    return (slopes - slopes.mean(dim=0)).square() * (n / (n - 1))


def _weighted(microbatch: Microbatch) -> tuple[Microbatch, Tensor]:
    """With weights c = 1 that can be derived in: what is linear in them has the examples' own parts as derivative."""
    c = torch.ones(len(microbatch.ids), dtype=torch.float64, requires_grad=True)
    return microbatch._replace(weights=c), c


def _derivative(value: Tensor | None, c: Tensor) -> Tensor:
    if value is None or not value.requires_grad:
        return torch.zeros_like(c)
    (found,) = torch.autograd.grad(value, c, materialize_grads=True)
    return found.detach()


def _inner(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of the inner products of the pairs; None if there is none."""
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    return torch.stack([(a.to_dense() * b.to(a.dtype)).sum() for a, b in pairs]).sum()


def _by_microbatch(stream: Stream, vectors: Tensor, forms: Callable[[Microbatch, Sequence[Tensor]], Tensor]) -> Tensor:
    """[n, k] float64 on the device of the vectors: `forms` of every microbatch, and the parts of every vector."""
    rows = []
    for microbatch in stream:
        found = [
            forms(microbatch, [v.to(p.dtype) for v, p in zip(parts, stream.parameters, strict=True)]).double()
            for parts in map(stream.layout.unflatten, vectors)
        ]
        rows.append(torch.stack([row.to(vectors.device) for row in found], dim=1))
    return torch.cat(rows)
