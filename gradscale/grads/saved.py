"""Keeps a call's tensors until its backward, as autograd keeps what it saves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_TENSOR = object()


class Saved:
    """A tree with its tensors saved for the backward pass: a checkpoint recomputes them, others offload them."""

    def __init__(self, tree: Any, anchor: Tensor) -> None:
        """`anchor` is any tensor that requires grad."""
        leaves, self._structure = _flatten(tree)
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        self._leaves = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._versions = [tensor._version for tensor in tensors]
        self._node = _Save.apply(anchor, *tensors).grad_fn  # type: ignore[no-untyped-call]

    def take(self) -> Any:
        """The tree, once; None if a tensor of it has been changed in place."""
        node, self._node = self._node, None
        try:
            tensors = node.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" in str(error):
                return None
            raise
        # Recomputed tensors pass autograd's own check; a copy starts to count anew.
        if any(tensor._version > version for tensor, version in zip(tensors, self._versions, strict=True)):
            return None
        saved = iter(tensors)
        leaves = [next(saved) if leaf is _TENSOR else leaf for leaf in self._leaves]
        return (tuple(leaves), {}) if self._structure is None else pytree.tree_unflatten(leaves, self._structure)


def _flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec | None]:
    """None for what nearly every module is called with, one tensor: a pass over a small model has time for no more."""
    match tree:
        case ((Tensor() as only,), dict() as kwargs) if not kwargs:
            return [only], None
    return pytree.tree_flatten(tree)


class _Save(torch.autograd.Function):
    """A node that saves tensors and is not run."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("a node that is only there to save tensors")
