"""Per-example gradients of one parameter, in the factors that backpropagation leaves behind.

A parameter is seen as a matrix of R rows and C columns, in its own row-major layout (a vector has one
column); `tile` gives any block of rows of any group of examples. `materialize` is all of them at once: the
definition, to which `sweep.py`, which reads the tiles one after another, is held in
`tests/test_layer_grads.py`. Half-precision factors are widened to float32 tile by tile.

Shapes: B examples, b of them in a tile, T positions, I/O features in and out, R rows and C columns of the
parameter, r rows in a tile, P = R C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class LayerGrads(Protocol):
    """The gradients of B examples with respect to one parameter of R x C entries."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, R, C)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the tiles: the factors' own, but at least float32."""
        ...

    @property
    def device(self) -> torch.device: ...

    def tile(self, examples: slice, rows: slice, out: Tensor, *, add: bool = False) -> None:
        """Write the gradients of `examples` with respect to `rows` into `out` [b, r, C]; or add them to it."""
        ...


def materialize(grads: LayerGrads) -> Tensor:
    """[B, P]: the definition."""
    batch, rows, columns = grads.shape
    out = torch.empty(batch, rows, columns, dtype=grads.dtype, device=grads.device)
    grads.tile(slice(0, batch), slice(0, rows), out)
    return out.flatten(1)


def widen(tensor: Tensor) -> Tensor:
    """float32 for half-precision tensors, anything else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def multiply(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Write left @ right [b, r, C] into `out`, or add it; for left [b, r, T] and right [b, T, C]."""
    if len(out) == 1:  # one product is faster than a batch of one
        out[0].addmm_(left[0], right[0]) if add else torch.mm(left[0], right[0], out=out[0])
    else:
        out.baddbmm_(left, right) if add else torch.bmm(left, right, out=out)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@dataclass(frozen=True)
class DenseGrads:
    """Gradients already materialized, [B, P]: biases, norms, and what the generic rule returns."""

    grads: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.grads.shape, 1)

    @property
    def dtype(self) -> torch.dtype:
        return wide_dtype(self.grads.dtype)

    @property
    def device(self) -> torch.device:
        return self.grads.device

    def tile(self, examples: slice, rows: slice, out: Tensor, *, add: bool = False) -> None:
        part = self.grads[examples, rows]
        out.squeeze(2).add_(part) if add else out.squeeze(2).copy_(part)


@dataclass(frozen=True)
class OuterGrads:
    """A matrix's gradients as sums of outer products: gradient[b] = sum_t left[b, t] right[b, t]^T.

    For `nn.Linear`, left is the output gradient and right the input, so that the sum is [O, I].
    """

    left: Tensor  # [B, T, R]
    right: Tensor  # [B, T, C]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.left.shape[0], self.left.shape[2], self.right.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return wide_dtype(self.left.dtype)

    @property
    def device(self) -> torch.device:
        return self.left.device

    def tile(self, examples: slice, rows: slice, out: Tensor, *, add: bool = False) -> None:
        multiply(widen(self.left[examples, :, rows]).mT, widen(self.right[examples]), out, add=add)


@dataclass(frozen=True)
class GroupedGrads:
    """Outer products in G groups of r rows, which lie below one another: grouped convolutions.

    gradient[b, g r : (g + 1) r] = sum_t left[b, g, t] right[b, g, t]^T, and R = G r.
    """

    left: Tensor  # [B, G, T, r]
    right: Tensor  # [B, G, T, C]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.left.shape[0], self.left.shape[1] * self.left.shape[3], self.right.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        return wide_dtype(self.left.dtype)

    @property
    def device(self) -> torch.device:
        return self.left.device

    def tile(self, examples: slice, rows: slice, out: Tensor, *, add: bool = False) -> None:
        height = self.left.shape[3]
        first, last = rows.start // height, -(-rows.stop // height)
        part = slice(rows.start - first * height, rows.stop - first * height)
        left, right = self.left[examples, first:last], widen(self.right[examples, first:last])
        if last - first == 1:
            multiply(widen(left[:, 0, :, part]).mT, right[:, 0], out, add=add)
        else:
            found = (widen(left).mT @ right).flatten(1, 2)[:, part]
            out.add_(found) if add else out.copy_(found)


@dataclass(frozen=True)
class EmbeddingGrads:
    """An embedding table's gradients: row ids[b, t] of gradient[b] receives grads[b, t]."""

    ids: Tensor  # [B, T] int64
    grads: Tensor  # [B, T, C]
    num_rows: int  # R

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.grads.shape[0], self.num_rows, self.grads.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return wide_dtype(self.grads.dtype)

    @property
    def device(self) -> torch.device:
        return self.grads.device

    def tile(self, examples: slice, rows: slice, out: Tensor, *, add: bool = False) -> None:
        ids, grads, height = self.ids[examples] - rows.start, self.grads[examples], rows.stop - rows.start
        if height < self.num_rows:  # how many are inside is not asked for: a device would have to be waited for
            inside = (ids >= 0) & (ids < height)
            ids, grads = ids.clamp(0, height - 1), grads.masked_fill(~inside[:, :, None], 0)
        index = torch.arange(len(ids), device=self.device)[:, None] * height + ids
        flat = (out if add else out.zero_()).view(-1, out.shape[2])
        flat.index_add_(0, index.flatten(), widen(grads).flatten(0, 1))


@dataclass(frozen=True)
class SharedGrads:
    """A parameter used in several places: the gradient is the sum over `uses`, cross-terms included."""

    uses: tuple[LayerGrads, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.uses[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.uses[0].dtype

    @property
    def device(self) -> torch.device:
        return self.uses[0].device

    def tile(self, examples: slice, rows: slice, out: Tensor, *, add: bool = False) -> None:
        for i, use in enumerate(self.uses):
            use.tile(examples, rows, out, add=add or i > 0)


def share(uses: Sequence[LayerGrads]) -> LayerGrads:
    """One LayerGrads for all uses of a parameter, at least one. Uses of different layouts are seen as vectors."""
    if len(uses) == 1:
        return uses[0]
    if len({use.shape for use in uses}) > 1:
        return SharedGrads(tuple(DenseGrads(materialize(use)) for use in uses))
    return SharedGrads(tuple(uses))
