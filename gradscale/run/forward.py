"""Products of per-example gradients with probes by forward-mode differentiation: no gradient is ever formed.

One pass with the tangent v_j carries <g_i, v_j> for all B losses at once. No rule and no hook has a part in it, so that
it also serves parameters that no rule covers, and is an independent check of those that one does.

Shapes: B examples, n of several batches, P entries of all parameters, N probes, T positions of an example.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradscale.errors import GradscaleError
from gradscale.grads.readings import Projected, Reading
from gradscale.grads.subject import Subject
from gradscale.grads.waiting import sent
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
    _load_derivatives()
    caller = _Losses(subject)
    products = [
        torch.cat([_derivative(caller, _there(batch, subject.device), subject.parameters, v) for batch in batches])
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


def _there(batch: Batch, device: torch.device) -> Batch:
    return {name: sent(tensor, device) for name, tensor in batch.items()}


class _Losses(nn.Module):
    """The task's losses as a module's forward, so that the model can be called with other parameters."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.model, self._task = subject.model, subject.task
        self.training = subject.model.training

    def forward(self, batch: Batch) -> Tensor:
        return self._task.losses(self.model, batch)


def _derivative(
    caller: _Losses, batch: Batch, parameters: Mapping[str, nn.Parameter], tangents: Mapping[str, Tensor]
) -> Tensor:
    """[B] float64: the derivative of the losses along `tangents`."""
    with differentiable_attention(), torch.no_grad(), forward_ad.dual_level():
        duals = {
            parameter: forward_ad.make_dual(parameter.detach(), tangents[name])
            for name, parameter in parameters.items()
        }
        try:
            losses = functional_call(caller, _everywhere(caller, duals), (batch,), tie_weights=False)
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


def _everywhere(caller: nn.Module, duals: Mapping[nn.Parameter, Tensor]) -> dict[str, Tensor]:
    """Each dual tensor at every place where its parameter is, a module that has two names being one place.

    Left to find tied parameters itself, `functional_call` puts such a module's own parameters not back (torch 2.13).
    """
    return {
        f"{path}.{name}": duals[parameter]
        for path, module in caller.named_modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter in duals
    }


def _load_derivatives() -> None:
    """At its first dual tensor torch compiles some derivatives with torch.jit, of whose end it then warns."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Of the ways to compute attention, those that have a forward derivative."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
