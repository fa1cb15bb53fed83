"""A sparse Johnson-Lindenstrauss map: several count sketches of their own, side by side.

Shapes: B examples, b of them in a tile, T positions, R rows and C columns of a parameter, P = R C entries, s nonzero
entries of a column of the map, K outputs, w sums of all its count sketches together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradscale.grads.layer import LayerGrads
from gradscale.sketches.blocks import apply_fold
from gradscale.sketches.count import CountFold, CountSketch
from gradscale.sketches.dimensions import check_dim, check_fits

VERSION = 1  # changes with that of the count sketch, too


@dataclass(frozen=True)
class SjltSketch:
    """x -> S x where every column of S has s entries, one in each of s blocks of outputs: 1 / sqrt(s) or its negative.

    (In a block of K_j outputs sqrt(K_j / K), if s does not divide K.) Unbiased for inner products, E <Sx, Sy> = <x, y>,
    with the variance of `CountSketch`: it is the mean over blocks of s such sketches, and gains no variance, but
    lighter tails. Cost: s times a count sketch's.
    Source: Kane and Nelson (2014), arXiv 1012.1577, the block construction; its count sketches are our own.
    """

    dim: int
    seed: int = 0
    sparsity: int = 4

    def __post_init__(self) -> None:
        check_dim("sketch dimension", self.dim)
        check_dim("sparsity of an SJLT sketch", self.sparsity)

    @property
    def scheme(self) -> dict[str, object]:
        """What makes two sketches comparable; kept beside them."""
        return {"name": "sjlt", "version": VERSION, "seed": self.seed, "dim": self.dim, "sparsity": self.sparsity}

    def bind(self, sizes: Mapping[str, int]) -> SjltSketch:
        """Itself. Raises: GradscaleError if K is more than all entries together."""
        check_fits(self.dim, sizes)
        return self

    def fold(self, parameter: str, shape: tuple[int, int], device: torch.device) -> SjltFold:
        return SjltFold(tuple(sketch.fold(name, shape, device) for sketch, name in self._blocks(parameter)))

    def apply(self, parameter: str, grads: LayerGrads) -> Tensor:
        return apply_fold(self, parameter, grads)

    def materialize(self, parameter: str, shape: tuple[int, int]) -> Tensor:
        """[P, K] float32: the definition."""
        blocks = list(self._blocks(parameter))
        parts = [sketch.materialize(name, shape) * math.sqrt(sketch.dim / self.dim) for sketch, name in blocks]
        return torch.cat(parts, dim=1)

    def _blocks(self, parameter: str) -> Iterator[tuple[CountSketch, str]]:
        """The count sketches of the blocks, at most K of them, and the name under which each draws."""
        count = min(self.sparsity, self.dim)
        for block in range(count):
            dim = (block + 1) * self.dim // count - block * self.dim // count
            yield CountSketch(dim, self.seed), f"sjlt block {block} of {count}: {parameter}"


@dataclass(frozen=True)
class SjltFold:
    """The part of an SJLT sketch that belongs to one parameter."""

    blocks: tuple[CountFold, ...]

    @property
    def width(self) -> int:
        return sum(block.width for block in self.blocks)

    def add_tile(self, dense: Tensor, start: int, sums: Tensor) -> None:
        for block, own in self._own(sums):
            block.add_tile(dense.clone(), start, own)

    def add_rows(self, ids: Tensor, grads: Tensor, sums: Tensor) -> None:
        for block, own in self._own(sums):
            block.add_rows(ids, grads, own)

    def finish(self, sums: Tensor, total: Tensor) -> None:
        images = []
        for block, own in self._own(sums):
            image = torch.zeros(len(sums), block.dim, dtype=total.dtype, device=total.device)
            block.finish(own, image)
            images.append(image.mul_(math.sqrt(block.dim / total.shape[1])))
        total += torch.cat(images, dim=1)

    def _own(self, sums: Tensor) -> Iterator[tuple[CountFold, Tensor]]:
        yield from zip(self.blocks, sums.split([block.width for block in self.blocks], dim=1), strict=True)
