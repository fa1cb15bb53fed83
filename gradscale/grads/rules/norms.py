"""Rules for normalizations: an output normalized(x) * weight + bias, whose gradients are sums of output gradients.

Shapes: B examples, C channels, E features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradscale.grads.call import Call, batched_input, precision
from gradscale.grads.generic import generic
from gradscale.grads.layer import DenseGrads, LayerGrads, wide_dtype, widen
from gradscale.grads.waiting import once


def layer_norm(call: Call, wanted: Sequence[str]) -> dict[str, LayerGrads]:
    module = call.module
    assert isinstance(module, nn.LayerNorm)
    normalized = F.layer_norm(widen(batched_input(call)), module.normalized_shape, None, None, module.eps)
    return _over_positions(call, wanted, normalized, len(module.normalized_shape))


def group_norm(call: Call, wanted: Sequence[str]) -> dict[str, LayerGrads]:
    module = call.module
    assert isinstance(module, nn.GroupNorm)
    normalized = F.group_norm(widen(batched_input(call)), module.num_groups, None, None, module.eps)
    return _by_channel(call, wanted, normalized)


def batch_norm(call: Call, wanted: Sequence[str]) -> dict[str, LayerGrads]:
    """By the running statistics, which are the same for every example."""
    module = call.module
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    if module.training or module.running_mean is None or module.running_var is None:
        return generic(call, wanted)  # which finds that the examples are mixed
    source, mean, variance = (widen(t) for t in (batched_input(call), module.running_mean, module.running_var))
    return _by_channel(call, wanted, F.batch_norm(source, mean, variance, eps=module.eps))


def instance_norm(call: Call, wanted: Sequence[str]) -> dict[str, LayerGrads]:
    module = call.module
    assert isinstance(module, nn.modules.instancenorm._InstanceNorm)
    if call.grads[0].dim() != module._get_no_batch_dim() + 1:  # a call without a batch
        return generic(call, wanted)
    source = widen(batched_input(call))
    if module.training or not module.track_running_stats:
        return _by_channel(call, wanted, F.instance_norm(source, eps=module.eps))
    assert module.running_mean is not None
    assert module.running_var is not None
    mean, variance = widen(module.running_mean), widen(module.running_var)
    return _by_channel(call, wanted, F.instance_norm(source, mean, variance, use_input_stats=False, eps=module.eps))


def rms_norm(call: Call, wanted: Sequence[str]) -> dict[str, LayerGrads]:
    """x / sqrt(mean(x^2) + eps) times (weight + a constant): torch's, and whatever a model calls its own.

    That a class computes just this is tried out on rows of known content, once where the call has doubts, for the
    data do not matter; if not, `generic`.
    """
    weight = call.module.get_parameter("weight")
    source = batched_input(call)
    eps = _epsilon(call.module, source)
    inputs = [*call.args, *call.kwargs.values()]
    if eps is None or len(inputs) != 1 or source.shape[source.dim() - weight.dim() :] != weight.shape:
        return generic(call, wanted)

    def tried() -> torch.dtype | None:
        kinds = dict.fromkeys((wide_dtype(source.dtype), torch.float32))  # many normalize float64 in float32
        with precision(source.device, call.autocast):
            return next((kind for kind in kinds if _is_rms_norm(call.module, source, weight, eps, kind)), None)

    kind = once((rms_norm, call.module, source.dtype, weight.dtype, call.autocast), tried, call.doubts)
    if kind is None:
        return generic(call, wanted)
    return _over_positions(call, wanted, _over_rms(source.to(kind), weight.dim(), eps), weight.dim())


def _over_rms(source: Tensor, dims: int, eps: float) -> Tensor:
    axes = tuple(range(-dims, 0))
    return source * torch.rsqrt(source.pow(2).mean(axes, keepdim=True) + eps)


def _epsilon(module: nn.Module, source: Tensor) -> float | None:
    named = [getattr(module, name) for name in ("eps", "variance_epsilon") if hasattr(module, name)]
    if named == [None]:  # torch's default
        return torch.finfo(wide_dtype(source.dtype)).eps
    return named[0] if len(named) == 1 and isinstance(named[0], float) else None


def _is_rms_norm(module: nn.Module, like: Tensor, weight: Tensor, eps: float, kind: torch.dtype) -> bool:
    """On rows of ordinary, large, and so small entries that eps counts; with weights that tell all forms apart."""
    entries = torch.arange(weight.numel(), device=like.device)
    row = (1.5 + (1.7 * entries).sin()) * (1 - 2 * (entries % 2))
    rows = torch.stack([row, 30 * row, eps**0.5 * row]).view(1, 3, *weight.shape).to(like.dtype)
    scale = torch.linspace(0.5, 1.5, weight.numel(), device=like.device).view(weight.shape).to(weight.dtype)
    found = torch.func.functional_call(module, {"weight": scale}, (rows,))
    if not isinstance(found, Tensor) or found.shape != rows.shape:
        return False
    normalized = _over_rms(rows.to(kind), weight.dim(), eps)
    tolerance = 8 * max(torch.finfo(t).eps for t in (kind, like.dtype, weight.dtype, found.dtype))
    return any(
        torch.allclose(found.to(kind), normalized * (scale.to(kind) + constant), rtol=tolerance, atol=0)
        for constant in (0, 1)
    )


def _over_positions(call: Call, wanted: Sequence[str], normalized: Tensor, dims: int) -> dict[str, LayerGrads]:
    """For a weight over the last `dims` dimensions."""
    grad = widen(call.grads[0])
    shape = (call.batch_size, -1, grad.shape[grad.dim() - dims :].numel())
    found = {"weight": lambda: _times(normalized, grad), "bias": lambda: grad}
    return {name: DenseGrads(found[name]().reshape(shape).sum(dim=1)) for name in wanted}


def _by_channel(call: Call, wanted: Sequence[str], normalized: Tensor) -> dict[str, LayerGrads]:
    """For a weight over the second dimension, C."""
    grad = widen(call.grads[0])
    shape = (*grad.shape[:2], -1)
    found = {"weight": lambda: _times(normalized, grad), "bias": lambda: grad}
    return {name: DenseGrads(found[name]().reshape(shape).sum(dim=2)) for name in wanted}


def _times(normalized: Tensor, grad: Tensor) -> Tensor:
    """Their product; `normalized` is overwritten, which spares the memory of another tensor, if it has its dtype."""
    return normalized.mul_(grad) if normalized.dtype == grad.dtype else normalized * grad
