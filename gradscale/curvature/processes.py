"""Operators on a process group: each process holds a slice of every vector. The one file here with torch.distributed.

Shapes: P entries in all, p of them here, W processes, k vectors, w = ceil(P / W).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gradscale.curvature.operator import Operator
from gradscale.errors import GradscaleError

_TOGETHER = 8  # whole vectors held at a time


def slice_of(size: int, rank: int, world: int) -> range:
    """The entries that process `rank` of `world` holds: ceil(P / W), at the end fewer.

    Raises: GradscaleError if that leaves a process without any.
    """
    width = -(-size // world)
    if rank * width >= size:
        raise GradscaleError(
            f"processes must each hold an entry, got {world} of them for {size} entries in slices of {width}; use fewer"
        )
    return range(rank * width, min((rank + 1) * width, size))


@dataclass(frozen=True)
class Sharded:
    """The sum over the processes of what each has, `part`, as one operator on slices.

    `part` is an operator of this process alone on whole vectors, as of its share of the data. Products gather the
    vectors, multiply, and add the slices up in the vectors' type: 2 k P numbers for as long as they last, of eight
    vectors at a time.
    """

    part: Operator
    group: dist.ProcessGroup | None = None  # the default group

    @property
    def size(self) -> int:
        return self.part.size

    @property
    def here(self) -> range:
        return slice_of(self.size, dist.get_rank(self.group), dist.get_world_size(self.group))

    def products(self, vectors: Tensor) -> Tensor:
        found = [
            reduce_scattered(self.part.products(gathered(few, self.size, self.group)), self.group)
            for few in vectors.split(_TOGETHER)
        ]
        return torch.cat(found)

    def all_sum(self, parts: Tensor) -> Tensor:
        return all_summed(parts, self.group)


@dataclass(frozen=True)
class SlicedDense:
    """A symmetric matrix of which each process holds the rows of its slice, [p, P] float64: for small problems."""

    rows: Tensor
    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return self.rows.shape[1]

    @property
    def here(self) -> range:
        return slice_of(self.size, dist.get_rank(self.group), dist.get_world_size(self.group))

    def products(self, vectors: Tensor) -> Tensor:
        whole = gathered(vectors, self.size, self.group)
        return (whole.double() @ self.rows.mT).to(vectors.dtype)

    def all_sum(self, parts: Tensor) -> Tensor:
        return all_summed(parts, self.group)


def all_summed(parts: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over processes, the same bits on each: what they decide from it, they decide alike."""
    total = parts.clone()
    dist.all_reduce(total, group=group)
    return total


def gathered(vectors: Tensor, size: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """[k, P]: whole vectors from the slices [k, p] of all processes."""
    world, k = dist.get_world_size(group), len(vectors)
    width = -(-size // world)
    found = vectors.new_empty(world * k, width)
    dist.all_gather_into_tensor(found, _padded(vectors, width), group=group)
    return found.view(world, k, width).transpose(0, 1).reshape(k, world * width)[:, :size]


def reduce_scattered(vectors: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """[k, p]: this process's slice of the sum over processes of whole vectors [k, P]."""
    world, rank, (k, size) = dist.get_world_size(group), dist.get_rank(group), vectors.shape
    width = -(-size // world)
    sliced = _padded(vectors, world * width).view(k, world, width).transpose(0, 1).reshape(world * k, width)
    found = vectors.new_empty(k, width)
    dist.reduce_scatter_tensor(found, sliced, group=group)
    return found[:, : len(slice_of(size, rank, world))].contiguous()


def _padded(vectors: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(vectors, (0, width - vectors.shape[1])).contiguous()
