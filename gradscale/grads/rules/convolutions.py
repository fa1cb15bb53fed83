"""Rules for convolutions: over the windows of its input, a convolution is a linear layer.

Shapes: B examples, T output positions, G groups, I/O channels in and out, S entries of a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from gradscale.grads.call import Call, batched_input
from gradscale.grads.generic import generic
from gradscale.grads.layer import DenseGrads, GroupedGrads, LayerGrads, OuterGrads, widen


def convolution(call: Call, wanted: Sequence[str]) -> dict[str, LayerGrads]:
    module = call.module
    assert isinstance(module, nn.modules.conv._ConvNd)
    grad = call.grads[0]
    if grad.dim() != len(module.kernel_size) + 2:  # a call without a batch
        return generic(call, wanted)
    source = batched_input(call)
    found: dict[str, LayerGrads] = {}
    if "weight" in wanted:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padding = module._reversed_padding_repeated_twice
        padded = F.pad(source, padding, mode=mode) if any(padding) else source
        found["weight"] = _outer(module, grad.flatten(2), _windows(padded, module))
    return found | _bias(grad, wanted)


def transposed_convolution(call: Call, wanted: Sequence[str]) -> dict[str, LayerGrads]:
    """The adjoint of a convolution: its weight [I, O / G, S] multiplies windows of the output's gradient."""
    module = call.module
    assert isinstance(module, nn.modules.conv._ConvTransposeNd)
    grad = call.grads[0]
    if grad.dim() != len(module.kernel_size) + 2:  # a call without a batch
        return generic(call, wanted)
    source = batched_input(call)
    found: dict[str, LayerGrads] = {}
    if "weight" in wanted:
        assert not isinstance(module.padding, str)
        padded = F.pad(grad, [side for size in reversed(module.padding) for side in (size, size)])
        windows = _windows(padded, module)
        for dim, size in enumerate(source.shape[2:], start=2):  # output_padding may leave room for more
            windows = windows.narrow(dim, 0, size)
        found["weight"] = _outer(module, source.flatten(2), windows)
    return found | _bias(grad, wanted)


def _windows(source: Tensor, module: nn.modules.conv._ConvNd) -> Tensor:
    """[B, I, *output, *kernel]: a view."""
    settings = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for dim, (size, stride, dilation) in enumerate(settings, start=2):
        source = source.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return source


def _outer(module: nn.modules.conv._ConvNd, left: Tensor, windows: Tensor) -> LayerGrads:
    """Of `left` [B, O, T] and windows [B, I, *output, *kernel], group by group."""
    spatial, groups = len(module.kernel_size), module.groups
    batch, channels = windows.shape[:2]
    by_group = windows.unflatten(1, (groups, channels // groups)).movedim(2, 2 + spatial)  # [B, G, *output, I / G, *k]
    right = by_group.reshape(batch, groups, left.shape[2], -1)
    if groups == 1:
        return OuterGrads(left.mT, right[:, 0])
    return GroupedGrads(left.unflatten(1, (groups, -1)).mT, right)


def _bias(grad: Tensor, wanted: Sequence[str]) -> dict[str, LayerGrads]:
    return {"bias": DenseGrads(widen(grad).flatten(2).sum(dim=2))} if "bias" in wanted else {}
