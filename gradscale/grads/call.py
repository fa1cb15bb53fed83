"""What a rule is given and what it gives back.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradscale.grads.layer import DenseGrads, LayerGrads
from gradscale.grads.waiting import Doubts

_CACHE = "transformers.cache_utils.Cache"


class Call(NamedTuple):
    """One call of a module, once the gradients of its outputs are known."""

    name: str  # the module's, for messages
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: list[Tensor]  # the floating-point outputs, in pytree order; NaN: not to be compared with anything
    grads: list[Tensor]  # of the outputs
    batch_size: int
    unreached: frozenset[int] = frozenset()  # the outputs that have no gradient; `grads` holds zeros for them
    doubts: Doubts | None = None  # None: whatever is in doubt is settled at once
    autocast: torch.dtype | None = None  # what autocast made of the forward's matrices; None: it was off


Rule = Callable[[Call, Sequence[str]], dict[str, LayerGrads]]  # of the wanted parameters, by the module's own names


def batched_input(call: Call) -> Tensor:
    """The call's first input with B rows; an input that is broadcast over the batch is repeated."""
    source = call.args[0] if call.args else next(iter(call.kwargs.values()))
    assert isinstance(source, Tensor)
    if source.shape[0] != call.batch_size:
        source = source.expand(call.batch_size, *source.shape[1:])
    return source


def batch_dims(call: Call) -> list[int]:
    """The batch dimension of each output: the first, but of some modules of torch."""
    first = 0 if getattr(call.module, "batch_first", True) else 1
    if isinstance(call.module, nn.MultiheadAttention):
        return [first, 0][: len(call.outputs)]  # the attention weights are [B, ...] always
    if isinstance(call.module, nn.RNNBase):
        return [first, 1, 1][: len(call.outputs)]  # the states are [layers, B, ...] always
    return [0] * len(call.outputs)


def autocast_of(device: torch.device) -> torch.dtype | None:
    """The type to which autocast casts at present; None: it is off."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def precision(device: torch.device, autocast: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast as given, off or on; it keeps no cast weights, so that gradients of several uses add up in theirs."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype=autocast, enabled=autocast is not None, cache_enabled=False)


def float_tensors(tree: Any) -> list[Tensor]:
    """The floating-point tensors of a module's output, in pytree order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def without_caches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs without the key-value caches that the call goes on to fill: of an example alone they are empty."""

    def is_cache(value: Any) -> bool:
        kinds = () if isinstance(value, Tensor) else type(value).__mro__
        return any(f"{kind.__module__}.{kind.__qualname__}" == _CACHE for kind in kinds)

    kept = {name: None if is_cache(value) else value for name, value in kwargs.items()}
    return tuple(None if is_cache(value) else value for value in args), kept


def by_example(call: Call, positions: int) -> Call:
    """The call with everything [B T, ...] as [B, T, ...]; nothing else inside such a block has B T rows."""

    def split(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != call.batch_size * positions or positions == 1:
            return tensor
        return tensor.view(call.batch_size, positions, *tensor.shape[1:])

    args, kwargs = pytree.tree_map_only(Tensor, split, (call.args, call.kwargs))
    outputs, grads = [split(output) for output in call.outputs], [split(grad) for grad in call.grads]
    return call._replace(args=args, kwargs=kwargs, outputs=outputs, grads=grads)


def without(call: Call, exclude: Tensor | None) -> Call:
    """The call with the excluded examples' inputs and gradients set to zero."""
    if exclude is None or any(batch_dims(call)):  # the rule of the latter takes each example alone: `cleared` suffices
        return call

    def clear(tensor: Tensor, value: float = 0.0) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != call.batch_size or not tensor.is_floating_point():
            return tensor
        return tensor.masked_fill(exclude.view(-1, *[1] * (tensor.dim() - 1)), value)

    args, kwargs = pytree.tree_map_only(Tensor, clear, (call.args, call.kwargs))
    outputs = [clear(output, torch.nan) for output in call.outputs]
    return call._replace(args=args, kwargs=kwargs, outputs=outputs, grads=[clear(grad) for grad in call.grads])


def cleared(grads: LayerGrads, exclude: Tensor | None) -> LayerGrads:
    """What a rule gave, with zero for the excluded examples, whatever the rule made of zero inputs."""
    if exclude is None or not isinstance(grads, DenseGrads):
        return grads
    return DenseGrads(grads.grads.masked_fill(exclude[:, None], 0))
