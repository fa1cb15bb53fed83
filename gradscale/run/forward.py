"""Products of per-example gradients with probes by forward-mode differentiation: no gradient is ever formed.

One pass with the tangent v_j carries <g_i, v_j> for all B losses at once. No rule and no hook has a part in it, so that
it also serves parameters that no rule covers, and is an independent check of those that one does.

Shapes: B examples, P entries of all parameters, N probes, T positions at which an example uses a parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradscale.errors import GradscaleError
from gradscale.grads.readings import Projected
from gradscale.run.shard import Subject, batch_size, load_batch, read_batch
from gradscale.sketches.gaussian import VERSION, GaussianProbes
from gradscale.sketches.philox import key_of, normal_of, philox
from gradscale.task import Batch

_TOGETHER = 4  # probes held at a time: a call of Philox gives as many numbers
_ROWS = 1 << 15  # of a probe made at a time
_NORMAL_COST = 300  # multiply-adds that take as long as one normal from its counter, about
_PASS_COST = 2  # a pass with a tangent, in forward passes
_MASK = 0xFFFFFFFF
_MISSING = ("forward ad", "forward mode", "jvp")  # in torch's messages about a derivative that it lacks


def forward_products(subject: Subject, batch: Batch, probes: GaussianProbes) -> Tensor:
    """[B, N] float64 on the subject's device: <g_b, v_j>, as the reading `Projected(probes)` has them, up to rounding.

    Exact, with the same probes. Tied parameters have one tangent in all their uses. Attention by
    scaled_dot_product_attention takes its MATH backend, which alone has a forward derivative: B heads T^2 scores are
    held. Cost: N passes of about two forward passes each, N P normals; memory 4 P numbers beside two forward passes'.

    Where a model computes under torch.no_grad, forward mode goes through though the backward pass does not; where it
    hides parameters from autograd inside a function of its own, as a reentrant checkpoint does, forward mode stops:
    call `check_forward` once before.
    Raises: GradscaleError if an operation of the model has no forward derivative (in torch 2.13 on a CPU: LSTM in
    float32, EmbeddingBag, functions of its own without `jvp`), or nothing depends on the parameters.
    """
    _load_derivatives()
    caller = _Losses(subject)
    rows = torch.zeros(batch_size(batch), probes.dim, dtype=torch.float64, device=subject.device)
    for first in range(0, probes.dim, _TOGETHER):
        last = min(first + _TOGETHER, probes.dim)
        blocks = {
            name: columns(probes, name, first, last, parameter.numel(), parameter.device)
            for name, parameter in subject.parameters.items()
        }
        for j in range(last - first):
            tangents = {
                name: blocks[name][:, j].view(parameter.shape).to(parameter.dtype)
                for name, parameter in subject.parameters.items()
            }
            rows[:, first + j] = _derivative(caller, batch, subject.parameters, tangents)
    return rows


def check_forward(subject: Subject, ids: range, num_probes: int = 2) -> None:
    """Hold forward mode to the backward pass on the examples `ids`, which should be few.

    Raises: GradscaleError if they differ: the model cuts its graph, or an operation's forward derivative is wrong.
    """
    probes = GaussianProbes(num_probes, seed=1)
    batch = load_batch(subject, ids)
    forward = forward_products(subject, batch, probes)
    readings = read_batch(subject, batch, frozenset({Projected(probes)}))
    backward = readings.projections[Projected(probes)]
    eps = max(torch.finfo(parameter.dtype).eps for parameter in subject.parameters.values())
    allowed = 4 * eps**0.5 * readings.sq_norms.sum(dim=1).sqrt()  # of a product's size, which is |g_b|
    wrong = ((forward - backward).abs() > allowed[:, None]).any(dim=1) & readings.finite
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise GradscaleError(
            f"forward mode must give the products of the backward pass, got {float(forward[row, 0]):.6g} for "
            f"{float(backward[row, 0]):.6g} on example {ids[row]}; the model computes something under torch.no_grad() "
            "or in a reentrant checkpoint: take the products from the backward pass"
        )


def forward_is_cheaper(
    entries: int, batch: int, positions: float, probes: int, cached: bool, batches: int, passed: bool = True
) -> bool:
    """Compare the multiply-adds of N products of each of B P-entry gradients, for one microbatch.

    Backward: T B P for the gradients' tiles, N B P for the products, N P normals unless they are `cached`, and
    2 T B P + T B P for the pass itself unless it is `passed` anyway. Forward: 2 N passes of T B P, and N P normals,
    made once for the `batches` of a shard if the probes are the outer loop. `entries` is P, `positions` is T.

    So for sequences forward mode wins only with a probe or two that nothing else is read beside; for T = 1, when the
    probes outgrow the cache.
    """
    pass_ = positions * batch * entries
    normals = _NORMAL_COST * probes * entries
    backward = pass_ + probes * batch * entries + (0 if cached else normals) + (0 if passed else 3 * pass_)
    return _PASS_COST * probes * pass_ + normals / batches < backward


def columns(probes: GaussianProbes, parameter: str, first: int, last: int, size: int, device: torch.device) -> Tensor:
    """[P, last - first] float32: probes `first` (a multiple of four) to `last` of a parameter with P = `size` entries.

    The columns of `probes.materialize`, made without the others.
    """
    assert first % _TOGETHER == 0
    assert last - first <= _TOGETHER
    key = key_of("gaussian", VERSION, probes.seed, "probe", parameter)
    found = torch.empty(size, last - first, device=device)
    for start in range(0, size, _ROWS):
        position = torch.arange(start, min(start + _ROWS, size), device=device)
        block = torch.full_like(position, first // _TOGETHER)
        words = philox(key, (position & _MASK, position >> 32, block, torch.zeros_like(block)))
        found[start : start + _ROWS] = normal_of(torch.stack(words, dim=1)[:, : last - first])
    return found


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
    with _differentiable_attention(), torch.no_grad(), forward_ad.dual_level():
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
                "take the products from the backward pass"
            ) from error
        found: Tensor | None = forward_ad.unpack_dual(losses).tangent
    if found is None:
        raise GradscaleError(
            "the losses must depend on the measured parameters in forward mode, got losses that do not: a reentrant "
            "checkpoint hides them, or they are not used; take the products from the backward pass"
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
def _differentiable_attention() -> Iterator[None]:
    """Of the ways to compute attention, those that have a forward derivative."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
