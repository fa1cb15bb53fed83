"""A count sketch that reads gradients at the speed of memory: a random modulus, and random places for what it leaves.

Entry (r, c) of a parameter, the p-th in row-major order, gets the sign s(r) s'(c) s''(p mod W) and is added to sum
p mod W of W, a random prime: a sum over the rows of a matrix with W columns, where nothing is moved entry by entry.
The W sums, a small part of the entries, are cut into parts of K; the K sums of a part go to the K places in a random
order, turned by a random number of the parameter's own. So two entries of one parameter meet with probability 1 / K
(1.04 / K at most, since W is no multiple of K), or, if their distance is a multiple of a prime that W is drawn from,
with one over the number of those primes (464 or more) beside. Entries that share a sum differ in row and column, W
being more than both (up to 262,144), so that products of s and s' do to the variance what a sign for each entry would.
A parameter of few entries goes without a modulus, s and s'.

Signs, primes, orders and turns are Philox words, keyed by (version, seed, role, parameter).

Shapes: B examples, b of them in a tile, T positions, R rows and C columns of a parameter, P = R C entries, p of them
in a tile, K outputs, W sums, w of them with padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gradscale.grads.layer import LayerGrads
from gradscale.sketches.blocks import apply_fold, kept
from gradscale.sketches.dimensions import check_dim, check_fits
from gradscale.sketches.philox import Key, key_of
from gradscale.sketches.words import entry_signs, words

VERSION = 2
_BLOCKS = 64  # of W entries of a large parameter
_SMALLEST, _LARGEST = 1 << 12, 1 << 18  # W_0, below W
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class CountSketch:
    """x -> S x where every column of S has one entry, 1 or -1: unbiased for inner products, E <Sx, Sy> = <x, y>.

    The variance of <Sx, Sy> is (|x|^2 |y|^2 + <x, y>^2 - 2 sum_p x_p^2 y_p^2) / K if two entries meet with probability
    1 / K: no more than of a dense matrix of normals, and measured to be so, for gradients of rank one and single rows
    and columns too. Cost: one pass over the gradients' entries, which have to be there: they are where sums are read.
    Source: Charikar, Chen and Farach-Colton (2002); for one entry a column, Kane and Nelson (2014), arXiv 1012.1577;
    for random primes, Karp and Rabin (1987). The way the three go together is ours.
    """

    dim: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_dim("sketch dimension", self.dim)

    @property
    def scheme(self) -> dict[str, object]:
        """What makes two sketches comparable; kept beside them."""
        return {"name": "count", "version": VERSION, "seed": self.seed, "dim": self.dim}

    def bind(self, sizes: Mapping[str, int]) -> CountSketch:
        """Itself. Raises: GradscaleError if K is more than all entries together."""
        check_fits(self.dim, sizes)
        return self

    def fold(self, parameter: str, shape: tuple[int, int], device: torch.device) -> CountFold:
        rows, columns = shape if shape[1] > 1 else (1, shape[0])
        return CountFold(self.dim, self.seed, parameter, rows, columns, device)

    def apply(self, parameter: str, grads: LayerGrads) -> Tensor:
        return apply_fold(self, parameter, grads)

    def materialize(self, parameter: str, shape: tuple[int, int]) -> Tensor:
        """[P, K] float32: the definition."""
        fold = self.fold(parameter, shape, _HOST)
        entry = torch.arange(shape[0] * shape[1])
        sum_of = entry % fold.modulus
        matrix = torch.zeros(len(entry), self.dim)
        matrix[entry, fold.places[sum_of]] = fold.sum_signs[sum_of]
        return matrix if fold.is_small else matrix.mul_(fold.signs(0, len(entry))[:, None])


@dataclass(frozen=True)
class CountFold:
    """The part of a count sketch that belongs to one parameter."""

    dim: int
    seed: int
    parameter: str
    rows: int
    columns: int
    device: torch.device

    @property
    def modulus(self) -> int:
        """W."""
        return _modulus(self.seed, self.parameter, self.rows, self.columns, self.dim)

    @property
    def is_small(self) -> bool:
        """Whether W is P: then the signs s'' are all."""
        return self.modulus == self.rows * self.columns

    @property
    def width(self) -> int:
        """w: W, and in more than one part of K so much more that they are whole."""
        return self.modulus if self.modulus <= self.dim else self._parts * self.dim

    def add_tile(self, dense: Tensor, start: int, sums: Tensor) -> None:
        stop = start + dense.shape[1]
        if self.is_small:
            sums[:, start:stop] += dense
        else:
            _add_modulo(dense.mul_(self.signs(start, stop)), start, sums[:, : self.modulus])

    def add_rows(self, ids: Tensor, grads: Tensor, sums: Tensor) -> None:
        entries = ids[:, :, None] * self.columns + torch.arange(self.columns, device=ids.device)
        if not self.is_small:
            row, column = self._factors
            grads = grads * row[ids][:, :, None] * column
        sums.scatter_add_(1, (entries % self.modulus).flatten(1), grads.flatten(1))

    def finish(self, sums: Tensor, total: Tensor) -> None:
        signed = sums * self.sum_signs
        if self.width == self.modulus <= self.dim:
            total.scatter_add_(1, self.places.expand(len(sums), -1), signed.double())
            return
        placed = signed.index_select(1, _sources(self.seed, self.dim, self._parts, str(self.device)))
        total += placed.view(len(sums), self._parts, self.dim).sum(dim=1).roll(self._turn, dims=1)

    def signs(self, start: int, stop: int) -> Tensor:
        """[stop - start] float32: s(r) s'(c) of these entries."""
        first, last = start // self.columns, -(-stop // self.columns)

        def make() -> Tensor:
            row, column = self._factors
            return torch.outer(row[first:last], column).flatten()

        made = kept(("count", self._key("row"), first, last, self.columns, str(self.device)), make)
        return made[start - first * self.columns : stop - first * self.columns]

    @property
    def sum_signs(self) -> Tensor:
        """[w] float32: s'' of the sums."""
        return self._signs("sum", self.width)

    @property
    def places(self) -> Tensor:
        """[w]: where the sums go, in 0 ... K - 1."""
        return (_places(self.seed, self.dim, self._parts, str(self.device))[: self.width] + self._turn) % self.dim

    @property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """[R] and [C] float32: s and s'."""
        return self._signs("row", self.rows), self._signs("column", self.columns)

    def _signs(self, role: str, size: int) -> Tensor:
        key = self._key(role)
        return kept(("count", key, size, str(self.device)), lambda: entry_signs(key, 0, size, self.device))

    @property
    def _parts(self) -> int:
        return -(-self.modulus // self.dim)

    @property
    def _turn(self) -> int:
        return _turn(self.seed, self.parameter) % self.dim

    def _key(self, role: str) -> Key:
        return _key(role, self.seed, self.parameter)


@lru_cache(maxsize=1 << 14)
def _key(role: str, seed: int, *names: str | int) -> Key:
    return key_of("count", VERSION, seed, role, *names)


def _add_modulo(signed: Tensor, start: int, sums: Tensor) -> None:
    """Add entries start, start + 1, ... [b, p] into `sums` [b, W] at their remainders."""
    size = sums.shape[1]
    first = min(-start % size, signed.shape[1])  # entries before the first multiple of W
    whole = first + (signed.shape[1] - first) // size * size
    if first:
        sums[:, start % size : start % size + first] += signed[:, :first]
    if whole > first:
        _add_blocks(signed[:, first:whole].unflatten(1, (-1, size)), sums)
    if whole < signed.shape[1]:
        sums[:, : signed.shape[1] - whole] += signed[:, whole:]


def _add_blocks(blocks: Tensor, sums: Tensor) -> None:
    """Add the sums of `blocks` [b, n, W] over n to `sums` [b, W]."""
    if blocks.device.type == "cpu":  # a product with ones is the faster sum
        sums += torch.bmm(blocks.new_ones(1, 1, blocks.shape[1]).expand(len(blocks), -1, -1), blocks)[:, 0]
    else:
        sums += blocks.sum(dim=1)


@lru_cache(maxsize=4096)
def _modulus(seed: int, parameter: str, rows: int, columns: int, dim: int) -> int:
    """A random prime from W_0 to 2 W_0, or P itself where W_0 is not much less."""
    entries, longest = rows * columns, 1 + max(rows, columns) if rows > 1 else 0
    lowest = max(2 * dim, _SMALLEST, min(max(entries // _BLOCKS, longest), _LARGEST))
    if entries <= 4 * lowest:
        return entries
    for word in words(_key("modulus", seed, parameter), 0, 1 << 10, _HOST).tolist():
        candidate = lowest + word % lowest
        if all(candidate % factor for factor in range(2, math.isqrt(candidate) + 1)):
            return int(candidate)
    raise AssertionError("a thousand numbers without a prime")


@lru_cache(maxsize=4096)
def _turn(seed: int, parameter: str) -> int:
    return int(words(_key("turn", seed, parameter), 0, 1, _HOST))


def _orders(seed: int, dim: int, parts: int) -> Tensor:
    """[parts, K]: which sum of a part goes to each place; the same for all parameters, which turn them."""
    return words(_key("order", seed, dim, parts), 0, parts * dim, _HOST).view(parts, dim).argsort(dim=1, stable=True)


@lru_cache(maxsize=64)
def _places(seed: int, dim: int, parts: int, device: str) -> Tensor:
    """[parts K]: the place to which each sum goes."""
    return _orders(seed, dim, parts).argsort(dim=1).flatten().to(device)


@lru_cache(maxsize=64)
def _sources(seed: int, dim: int, parts: int, device: str) -> Tensor:
    """[parts K]: which of all sums goes to each place of each part."""
    return (_orders(seed, dim, parts) + torch.arange(0, parts * dim, dim)[:, None]).flatten().to(device)
