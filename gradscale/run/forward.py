"""Products of per-example gradients with probes by forward-mode differentiation: no gradient is ever formed.

One pass with the tangent v_j carries <g_i, v_j> for all B losses at once. No rule and no hook has a part in it, so that
it also serves parameters that no rule covers, and is an independent check of those that one does.

Shapes: B examples, n of several batches, P entries of all parameters, N probes, T positions of an example.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gradscale.errors import GradscaleError
from gradscale.grads.functional import Caller, called, differentiable_attention, load_forward_derivatives
from gradscale.grads.readings import Projected, Reading
from gradscale.grads.subject import Subject, sent_batch
from gradscale.sketches.gaussian import TOGETHER, GaussianProbes
from gradscale.task import Batch

_MISSING = ("forward ad", "forward mode", "jvp")  # in torch's messages about a derivative that it lacks
_REMEDY = "take the products from the backward pass: --probe-products backward"


def forward_products(subject: Subject, batches: Sequence[Batch], probes: GaussianProbes) -> Tensor:
    """[n, N] float64 on the subject's device: <g_i, v_j>, as the reading `Projected(probes)` has them, up to rounding.

    Exact, with the same probes, for the examples of all `batches` one after another. Tied parameters have one tangent
    in all their uses. Attention by scaled_dot_product_attention takes its MATH backend, which alone has a forward
    derivative: B heads T^2 scores are held. The probes are the outer loop, so that those beyond the budget in which
    they are kept are made once for all batches. Cost: N passes of three to four forward passes each, N P normals;
    memory: 5 P numbers beside two forward passes' and the probes that are kept.

    Where a model computes under torch.no_grad, forward mode goes through though the backward pass does not; where it
    hides parameters from autograd inside a function of its own, as a reentrant checkpoint does, forward mode stops:
    call `check_forward` once before.
    Raises: GradscaleError if an operation of the model has no forward derivative (in torch 2.13 on a CPU: LSTM in
    float32, EmbeddingBag, functions of its own without `jvp`), or nothing depends on the parameters.
    """
    load_forward_derivatives()
    caller = Caller(subject.model, subject.task.losses)
    products = [
        torch.cat([_derivative(caller, sent_batch(subject, batch), subject.parameters, v) for batch in batches])
        for v in _tangents(subject.parameters, probes)
    ]
    return torch.stack(products, dim=1)


def probes_in(readings: Iterable[Reading]) -> dict[Projected, GaussianProbes]:
    """The readings that forward mode can take, with their probes."""
    return {
        reading: reading.map
        for reading in readings
        if isinstance(reading, Projected) and isinstance(reading.map, GaussianProbes)
    }


def finite_products(products: Tensor, finite: Tensor, ids: range) -> Tensor:
    """[n, N] `products` of the examples `ids`, zero for those that are not `finite` [n], as the backward pass has them.

    Raises: GradscaleError if those of a finite example are not: its tangents overflow where its gradient does not.
    """
    kept = products.where(finite[:, None], 0.0)
    wrong = ~kept.isfinite().all(dim=1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise GradscaleError(
            f"the products of a finite gradient must be finite, got {kept[row].tolist()[:4]} in forward mode for "
            f"example {ids[row]}; {_REMEDY}, and another --out"
        )
    return kept


def _tangents(parameters: Mapping[str, nn.Parameter], probes: GaussianProbes) -> Iterator[dict[str, Tensor]]:
    """One probe after another: the part of every parameter, in its shape and type."""
    for first in range(0, probes.dim, TOGETHER):
        last = min(first + TOGETHER, probes.dim)
        blocks = {
            name: probes.columns(name, first, last, parameter.numel(), parameter.device)
            for name, parameter in parameters.items()
        }
        for j in range(last - first):
            yield {
                name: blocks[name][:, j].contiguous().view(parameter.shape).to(parameter.dtype)
                for name, parameter in parameters.items()
            }


def _derivative(
    caller: Caller, batch: Batch, parameters: Mapping[str, nn.Parameter], tangents: Mapping[str, Tensor]
) -> Tensor:
    """[B] float64: the derivative of the losses along `tangents`."""
    with differentiable_attention(), torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(p.detach(), tangents[name]) for name, p in parameters.items()]
        try:
            losses = called(caller, list(parameters.values()), duals, batch)
        except (NotImplementedError, RuntimeError) as error:
            if not any(part in str(error).lower() for part in _MISSING):
                raise
            raise GradscaleError(
                f"every operation must have a forward derivative, got one without: {str(error).splitlines()[0]}; "
                f"{_REMEDY}"
            ) from error
        found: Tensor | None = forward_ad.unpack_dual(losses).tangent
    if found is None:
        raise GradscaleError(
            "the losses must depend on the measured parameters in forward mode, got losses that do not: a reentrant "
            f"checkpoint hides them, or they are not used; {_REMEDY}"
        )
    return found.double()
