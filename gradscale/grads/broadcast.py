"""An embedding of positions that are given without a batch, as ids [T]: one output for all examples.

The model sees the values and the shape that its own module gave. A `Broadcast` carries beside them a copy for each
example, which takes the tensor's place where it meets the examples: in a sum or a product with a tensor [B, ...]
over which torch broadcasts it, or in `expand` and `repeat` to B rows. So each example's copy receives that example's
gradient. Whether ids of T = B entries are positions or one label for each example is settled by that use too. Any
other use is the tensor's own, and its gradient then has no batch, which `capture` refuses.

Shapes: B examples, S any dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradscale.errors import GradscaleError
from gradscale.grads.call import Call

_VIEWS = frozenset({"unsqueeze", "__getitem__", "view", "reshape", "to", "float", "contiguous", "squeeze"})
_SPREADS = frozenset({"expand", "expand_as", "repeat", "broadcast_to"})
_BINARY = frozenset({"add", "sub", "mul", "rsub"})
_OPERATORS = _BINARY | {form.format(name) for name in _BINARY for form in ("__{}__", "__r{}__")}
_IN_PLACE = frozenset({form.format(name) for name in _BINARY for form in ("{}_", "__i{}__")})


class Broadcast(Tensor):
    """A tensor [*S], the same for all examples, and its copies [B, *S]."""

    _copies: Tensor | None = None  # of the values as they were made
    _written = 0  # the tensor's version as of the copies

    @classmethod
    def of(cls, tensor: Tensor, copies: Tensor) -> Broadcast:
        made: Broadcast = tensor.as_subclass(cls)
        made._copies, made._written = copies, made._version
        return made

    @property
    def copies(self) -> Tensor:
        assert self._copies is not None
        return self._copies

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            shared = [tensor for tensor in tensors if isinstance(tensor, Broadcast)]
            if any(tensor._copies is None or tensor._version != tensor._written for tensor in shared):
                return func(*args, **kwargs)
            if len(shared) == len(tensors) and name in _VIEWS | _OPERATORS:
                return _alike(func, args, kwargs, shared)
            if name in _SPREADS and tensors[0] is shared[0]:
                return _spread(func(*args, **kwargs), shared[0])
            if name in _OPERATORS | _IN_PLACE and len(shared) == 1 and len(tensors) == 2:
                (other,) = (tensor for tensor in tensors if tensor is not shared[0])
                args, kwargs = pytree.tree_map_only(Broadcast, partial(_met, other=other), (tuple(args), dict(kwargs)))
            return func(*args, **kwargs)


def _alike(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], shared: list[Broadcast]) -> Any:
    """What is done to the tensors, done to the copies too."""
    result = func(*args, **kwargs)
    if not isinstance(result, Tensor) or any(result is tensor for tensor in shared):
        return result

    def alone(*copies: Tensor) -> Tensor:
        given = iter(copies)
        again, named = pytree.tree_map_only(Broadcast, lambda _: next(given), (tuple(args), dict(kwargs)))
        made: Tensor = func(*again, **named)
        return made

    return Broadcast.of(result, torch.func.vmap(alone)(*[tensor.copies for tensor in shared]))


def _spread(result: Tensor, shared: Broadcast) -> Tensor:
    """The copies in place of `result`, if it has B rows that are all the tensor."""
    one = shared.shape[1:] if shared.dim() == result.dim() and shared.shape[0] == 1 else shared.shape
    return shared.copies.reshape(result.shape) if result.shape == (len(shared.copies), *one) else result


def _met(shared: Broadcast, other: Tensor) -> Tensor:
    """The copies [B, 1, ..., *S] in place of the tensor, if torch broadcasts it over the rows of `other` [B, ...]."""
    batch, more = len(shared.copies), other.dim() - shared.dim()
    if more < 0 or other.shape[0] != batch or not (more or shared.shape[0] == 1):
        return shared
    shape = (*[1] * (more - 1), *shared.shape) if more else shared.shape[1:]
    return shared.copies.reshape(batch, *shape)


def settled(call: Call) -> Call:
    """The call whose outputs are the copies and the tensor itself, as a rule expects it: with the one that was used.

    Raises: GradscaleError if the tensor itself was, and does not have the batch as its first dimension either.
    """
    copies, own = call.grads
    if call.batch_size == 1:
        return _of_positions(call, own[None])
    if 1 in call.unreached or not bool(own.any()):
        return _of_positions(call, copies)
    if len(own) != call.batch_size or (0 not in call.unreached and bool(copies.any())):
        raise GradscaleError(
            f"the output of embedding {call.name} for ids of shape ({len(own)},) must be added to a tensor of shape "
            f"({call.batch_size}, {len(own)}, ...) wherever it is used, got another use, in which the examples cannot "
            "be told apart; give it ids of shape (1, positions) or (batch, positions)"
        )
    return call._replace(outputs=call.outputs[1:], grads=[own], unreached=frozenset())


def _of_positions(call: Call, grad: Tensor) -> Call:
    args, kwargs = pytree.tree_map_only(Tensor, lambda ids: ids[None], (call.args, dict(call.kwargs)))
    outputs = [torch.full_like(grad, torch.nan)]
    return call._replace(args=args, kwargs=kwargs, outputs=outputs, grads=[grad], unreached=frozenset())
