"""What a rule is given and what it gives back.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradscale.grads.layer import LayerGrads


class Call(NamedTuple):
    """One call of a module, once the gradients of its outputs are known."""

    name: str  # the module's, for messages
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: list[Tensor]  # the floating-point outputs, in pytree order; NaN: not to be compared with anything
    grads: list[Tensor]  # of the outputs
    batch_size: int


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


def float_tensors(tree: Any) -> list[Tensor]:
    """The floating-point tensors of a module's output, in pytree order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
