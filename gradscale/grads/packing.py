"""Several examples in a row of a batch: what a token-wise module was called with, brought to one example a row.

A token-wise module makes of every position's input that position's output, and looks at nothing else. Its gradient is
a sum over positions, so that of an example the sum over the example's own. Attention is not token-wise: unless the
model masks it between the examples of a row, a position's gradient is not its own example's alone.

Shapes: B rows of T positions, n examples, S positions of the longest one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradscale.errors import GradscaleError
from gradscale.grads.call import Call


class Packing(NamedTuple):
    """Where the examples of a batch lie."""

    shape: tuple[int, int]  # (B, T)
    places: Tensor  # [n, S] int64: an example's positions, in order, of the B T; 0 beyond its last
    padding: Tensor  # [n, S] bool: beyond its last

    @property
    def examples(self) -> int:
        return len(self.places)


def packing_of(boundaries: object) -> Packing:
    """Of `boundaries` [B, T]: the number of the example that a position belongs to, -1 of none.

    Numbers count within a row: an example lies in one row. The examples are in the order of rows, then of numbers.
    Raises: GradscaleError unless they are integers [B, T], -1 or more, not all -1.
    """
    if (
        not isinstance(boundaries, Tensor)
        or boundaries.dim() != 2
        or boundaries.dtype not in (torch.int32, torch.int64)
    ):
        kind = (
            f"{boundaries.dtype} of shape {tuple(boundaries.shape)}" if isinstance(boundaries, Tensor) else boundaries
        )
        raise GradscaleError(f"boundaries must be integers of shape (rows, positions), got {kind}; see gs.attach")
    numbers = boundaries.detach().long()
    if not numbers.numel() or int(numbers.min()) < -1 or int(numbers.max()) < 0:
        raise GradscaleError(
            "boundaries must number the examples of a row from 0 on, with -1 for positions of none, got "
            + (f"{int(numbers.min())} to {int(numbers.max())}" if numbers.numel() else "no positions")
            + "; a batch needs at least one example"
        )
    row = torch.arange(len(numbers), device=numbers.device)[:, None]
    key = (row * (numbers.max() + 1) + numbers).masked_fill(numbers < 0, -1).flatten()
    positions = (key >= 0).nonzero().flatten()
    _, example, counts = key[positions].unique(return_inverse=True, return_counts=True)
    padding = torch.arange(int(counts.max()), device=key.device) >= counts[:, None]
    index = torch.zeros_like(padding, dtype=torch.int64)
    index[~padding] = positions[example.argsort(stable=True)]
    return Packing((numbers.shape[0], numbers.shape[1]), index, padding)


def unpacked(call: Call, packing: Packing) -> Call:
    """The call with all that is [B, T, ...] as [n, S, ...], zero in the padding: a position without slope adds nothing.

    Raises: GradscaleError if the module was given or gave something else.
    """

    def example_rows(tensor: Tensor) -> Tensor:
        rows, positions = packing.shape
        if tensor.dim() >= 2 and tensor.shape[0] == 1:
            tensor = tensor.expand(rows, *tensor.shape[1:])
        if tensor.shape[:2] != (rows, positions):
            raise GradscaleError(
                f"module {call.name} must be called with the {rows} rows of {positions} positions that boundaries "
                f"tells of, got shape {tuple(tensor.shape)}; leave it out by params"
            )
        found = tensor.flatten(0, 1)[packing.places]
        return found.masked_fill(packing.padding.view(*packing.padding.shape, *[1] * (found.dim() - 2)), 0)

    args, kwargs = pytree.tree_map_only(Tensor, example_rows, (call.args, dict(call.kwargs)))
    outputs, grads = ([example_rows(each) for each in tensors] for tensors in (call.outputs, call.grads))
    return call._replace(args=args, kwargs=kwargs, outputs=outputs, grads=grads, batch_size=packing.examples)
