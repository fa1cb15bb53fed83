"""Per-example gradients of one parameter, in the factors that backpropagation leaves behind.

`materialize()` is the definition; every other method equals the same operation on it and is held to
that in `tests/test_layer_grads.py`. Gradients are flattened in the parameter's own (row-major) layout.
Half-precision factors are widened to float32 before anything is added up.

Shapes: B examples, T positions, I/O features in and out, V rows of an embedding table, E its width,
P parameter entries, N vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

_CHUNK_ENTRIES = 1 << 24  # at most this many gradient entries are materialized at once


@runtime_checkable
class LayerGrads(Protocol):
    """The gradients of B examples with respect to one parameter of P entries."""

    def materialize(self) -> Tensor:
        """[B, P]: the definition."""
        ...

    def sq_norms(self) -> Tensor:
        """[B]: the squared Euclidean norm of each example's gradient."""
        ...

    def dot(self, vectors: Tensor) -> Tensor:
        """[B, N]: inner products with the columns of `vectors` [P, N]."""
        ...

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """[P]: sum over examples of weights[b] * gradient[b], for `weights` [B]."""
        ...

    def split(self) -> Iterator[LayerGrads]:
        """The same gradients in consecutive groups of examples, each small enough to materialize."""
        ...


def widen(tensor: Tensor) -> Tensor:
    """float32 for half-precision tensors, anything else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def chunk_size(entries: int) -> int:
    """How many examples of `entries` gradient entries may be materialized at once: at least one."""
    return max(1, _CHUNK_ENTRIES // max(1, entries))


@dataclass(frozen=True)
class DenseGrads:
    """Gradients already materialized, [B, P]: biases, norms, and what the generic rule returns."""

    grads: Tensor

    def materialize(self) -> Tensor:
        return widen(self.grads)

    def sq_norms(self) -> Tensor:
        return self.materialize().square().sum(dim=1)

    def dot(self, vectors: Tensor) -> Tensor:
        return self.materialize() @ vectors

    def weighted_sum(self, weights: Tensor) -> Tensor:
        dense = self.materialize()
        return weights.to(dense.dtype) @ dense

    def split(self) -> Iterator[DenseGrads]:
        for part in torch.split(self.grads, chunk_size(self.grads[0].numel())):
            yield DenseGrads(part)


@dataclass(frozen=True)
class OuterGrads:
    """A matrix's gradients as sums of outer products: gradient[b] = sum_t left[b, t] right[b, t]^T.

    For `nn.Linear`, left is the output gradient and right the input, so that the sum is [O, I].
    """

    left: Tensor  # [B, T, O]
    right: Tensor  # [B, T, I]

    def materialize(self) -> Tensor:
        return torch.einsum("bto,bti->boi", widen(self.left), widen(self.right)).flatten(1)

    def sq_norms(self) -> Tensor:
        positions, rows, columns = self.left.shape[1], self.left.shape[2], self.right.shape[2]
        if positions * (rows + columns) < rows * columns:
            return self._gram_norms()
        return torch.cat([part.materialize().square().sum(dim=1) for part in self.split()])

    def _gram_norms(self) -> Tensor:
        left, right = widen(self.left), widen(self.right)
        return ((left @ left.mT) * (right @ right.mT)).sum(dim=(1, 2))

    def dot(self, vectors: Tensor) -> Tensor:
        return torch.cat([part.materialize() @ vectors for part in self.split()])

    def weighted_sum(self, weights: Tensor) -> Tensor:
        left = widen(self.left)
        left = (left * weights.to(left.dtype)[:, None, None]).flatten(0, 1)
        return (left.mT @ widen(self.right).flatten(0, 1)).flatten()

    def split(self) -> Iterator[OuterGrads]:
        size = chunk_size(self.left.shape[2] * self.right.shape[2])
        for left, right in zip(torch.split(self.left, size), torch.split(self.right, size), strict=True):
            yield OuterGrads(left, right)


@dataclass(frozen=True)
class EmbeddingGrads:
    """An embedding table's gradients: row ids[b, t] of gradient[b] receives grads[b, t]."""

    ids: Tensor  # [B, T] int64
    grads: Tensor  # [B, T, E]
    num_rows: int  # V

    def materialize(self) -> Tensor:
        batch, _, width = self.grads.shape
        dense = widen(self.grads).new_zeros(batch, self.num_rows, width)
        index = self.ids[:, :, None].expand(-1, -1, width)
        return dense.scatter_add_(1, index, widen(self.grads)).flatten(1)

    def sq_norms(self) -> Tensor:
        grads = widen(self.grads)
        same_row = self.ids[:, :, None] == self.ids[:, None, :]
        return ((grads @ grads.mT) * same_row).sum(dim=(1, 2))

    def dot(self, vectors: Tensor) -> Tensor:
        grads = widen(self.grads)
        table = vectors.view(self.num_rows, grads.shape[2], -1)
        return torch.stack([torch.einsum("te,ten->n", g, table[rows]) for g, rows in zip(grads, self.ids, strict=True)])

    def weighted_sum(self, weights: Tensor) -> Tensor:
        grads = widen(self.grads)
        weighted = (grads * weights.to(grads.dtype)[:, None, None]).flatten(0, 1)
        table = weighted.new_zeros(self.num_rows, weighted.shape[1])
        return table.index_add_(0, self.ids.flatten(), weighted).flatten()

    def split(self) -> Iterator[EmbeddingGrads]:
        size = chunk_size(self.num_rows * self.grads.shape[2])
        for ids, grads in zip(torch.split(self.ids, size), torch.split(self.grads, size), strict=True):
            yield EmbeddingGrads(ids, grads, self.num_rows)


@dataclass(frozen=True)
class SharedGrads:
    """A parameter used in several places: the gradient is the sum over `uses`, cross-terms included."""

    uses: tuple[LayerGrads, ...]

    def materialize(self) -> Tensor:
        return torch.stack([use.materialize() for use in self.uses]).sum(dim=0)

    def sq_norms(self) -> Tensor:
        return torch.cat([part.materialize().square().sum(dim=1) for part in self.split()])

    def dot(self, vectors: Tensor) -> Tensor:
        return torch.stack([use.dot(vectors) for use in self.uses]).sum(dim=0)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return torch.stack([use.weighted_sum(weights) for use in self.uses]).sum(dim=0)

    def split(self) -> Iterator[SharedGrads]:
        for parts in zip(*(use.split() for use in self.uses), strict=True):
            yield SharedGrads(parts)


def share(uses: list[LayerGrads]) -> LayerGrads:
    """One LayerGrads for all uses of a parameter; at least one use."""
    return uses[0] if len(uses) == 1 else SharedGrads(tuple(uses))
