"""A fast Johnson-Lindenstrauss map: random signs, Walsh-Hadamard transforms of blocks, sampled coordinates.

A parameter's P entries, in their own order, are cut into blocks of a power of two n, the last one padded with
zeros. Each block x is mapped to D' Q H D x sqrt(m / K): D random signs, H the orthonormal Walsh-Hadamard matrix,
Q the first K of a random permutation of its coordinates, padded with zeros to m = max(n, K), and D' random signs;
the blocks are added up. A block that fits into K thus keeps its length.

Shapes: B examples, b of them in a tile, P entries of one parameter, n of a block, J blocks, m = max(n, K), K outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from gradscale.grads.layer import LayerGrads
from gradscale.sketches.blocks import kept, tiles
from gradscale.sketches.dimensions import check_dim, check_fits
from gradscale.sketches.philox import Key, key_of
from gradscale.sketches.words import entry_signs, words

VERSION = 1
_BLOCK = 1 << 10  # entries of a block, or more if a larger power of two is still no more than K


@dataclass(frozen=True)
class SrhtSketch:
    """x -> S x by a subsampled randomized Hadamard transform of each block: unbiased, E <Sx, Sy> = <x, y>.

    With N = |x|^2 |y|^2 + <x, y>^2 of the whole vectors, N_j the same of block j of n_j entries, h_j the sum of
    x_p^2 y_p^2 over it, and f_j = max(0, n_j - K) / (n_j - 1), the variance of <Sx, Sy> is
    (N - sum_j [N_j - f_j (N_j - 2 h_j)]) / K, never more than that of a Gaussian sketch, N / K.

    n_j is 1024, the largest power of two up to K where that is more, and for a parameter of fewer entries the
    smallest power of two that holds them. Cost: 2 sqrt(n) products an entry of a gradient, whatever K is.
    Source: Ailon and Chazelle (2009), "The fast Johnson-Lindenstrauss transform"; Tropp (2011), arXiv 1011.1595,
    for the sampled transform. Departures: blocks that share the K outputs, and the second signs, which make the
    blocks' images uncorrelated.
    """

    dim: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_dim("sketch dimension", self.dim)

    @property
    def scheme(self) -> dict[str, object]:
        """What makes two sketches comparable; kept beside them."""
        return {"name": "srht", "version": VERSION, "seed": self.seed, "dim": self.dim}

    def bind(self, sizes: Mapping[str, int]) -> SrhtSketch:
        """Raises: GradscaleError if K is more than P."""
        check_fits(self.dim, sizes)
        return self

    def apply(self, parameter: str, grads: LayerGrads) -> Tensor:
        batch, rows, columns = grads.shape
        total = torch.zeros(batch, self.dim, dtype=torch.float64, device=grads.device)
        block = self.block_size(rows * columns)
        for examples, part, tile in tiles(grads):
            total[examples] += self._mapped(parameter, tile.flatten(1), part.start * columns, block)
        return total

    def materialize(self, parameter: str, shape: tuple[int, int]) -> Tensor:
        """[P, K] float32: the definition."""
        size, cpu = math.prod(shape), torch.device("cpu")
        block = self.block_size(size)
        blocks = -(-size // block)
        before = self._signs(parameter, "before", 0, blocks * block, cpu)
        after = self._signs(parameter, "after", 0, blocks * self.dim, cpu)
        sources = self._sources(parameter, 0, blocks, block, cpu)
        scaled = pad(_hadamard(block, cpu) / math.sqrt(block), (0, max(0, self.dim - block))) * self._scale(block)
        parts = [
            before[j * block : (j + 1) * block, None] * scaled[:, sources[j]] * after[j * self.dim : (j + 1) * self.dim]
            for j in range(blocks)
        ]
        return torch.cat(parts)[:size]

    def block_size(self, size: int) -> int:
        """n, for a parameter of `size` entries."""
        largest = max(_BLOCK, 1 << (self.dim.bit_length() - 1))
        return min(largest, 1 << (size - 1).bit_length())

    def _mapped(self, parameter: str, entries: Tensor, start: int, block: int) -> Tensor:
        """[b, K]: the image of entries start, start + 1, ... of the gradients [b, p]; the others count as zero."""
        first, last = start // block, -(-(start + entries.shape[1]) // block)
        blocks, device = last - first, entries.device
        padded = pad(entries, (start - first * block, last * block - start - entries.shape[1]))
        padded = padded.mul_(self._signs(parameter, "before", first * block, last * block, device).to(entries.dtype))
        mixed = _transformed(padded.view(-1, block)).mul_(self._scale(block) / math.sqrt(block))
        mixed = pad(mixed, (0, max(0, self.dim - block))).view(len(entries), blocks, -1)
        offsets = torch.arange(blocks, device=device)[:, None] * mixed.shape[2]
        index = (self._sources(parameter, first, last, block, device) + offsets).flatten()
        after = self._signs(parameter, "after", first * self.dim, last * self.dim, device).to(entries.dtype)
        chosen = mixed.flatten(1).index_select(1, index).mul_(after)
        return chosen.view(len(entries), blocks, self.dim).sum(dim=1)

    def _scale(self, block: int) -> float:
        return math.sqrt(max(block, self.dim) / self.dim)

    def _signs(self, parameter: str, role: str, start: int, stop: int, device: torch.device) -> Tensor:
        key = self._key(role, parameter)
        return kept(("srht", key, start, stop, str(device)), lambda: entry_signs(key, start, stop, device))

    def _sources(self, parameter: str, first: int, last: int, block: int, device: torch.device) -> Tensor:
        """[J, K] of blocks first to last: which of its m coordinates each output takes, by the order of m words."""
        key, size = self._key("order", parameter), max(block, self.dim)

        def make() -> Tensor:
            drawn = words(key, first * size, last * size, device).view(last - first, size)
            return drawn.argsort(dim=1, stable=True)[:, : self.dim].contiguous()

        return kept(("srht", key, first, last, block, self.dim, str(device)), make)

    def _key(self, role: str, parameter: str) -> Key:
        return key_of("srht", VERSION, self.seed, role, parameter)


def _transformed(blocks: Tensor) -> Tensor:
    """Each row times H_n = H_a (x) H_b, the Walsh-Hadamard matrix of +-1, as two products with small ones."""
    size = blocks.shape[1]
    a = 1 << ((size.bit_length() - 1) // 2)
    left, right = (_hadamard(n, blocks.device).to(blocks.dtype) for n in (a, size // a))
    halfway = (blocks.view(-1, size // a) @ right).view(-1, a, size // a)
    return torch.bmm(left.expand(len(halfway), -1, -1), halfway).view(blocks.shape)  # @ would copy the small matrix


def _hadamard(size: int, device: torch.device) -> Tensor:
    """[n, n] float32 of +1 and -1, symmetric: the sign of (i, j) is the parity of the bits that i and j share."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix
