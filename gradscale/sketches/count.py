"""A count sketch that reads gradients at the speed of memory: a random modulus, and random places for what it leaves.

A parameter's entries, in row-major order, get random signs and are added up modulo a random prime W, a sum over
the rows of a matrix with W columns: nothing is moved entry by entry. The W sums, a small part of the entries, are cut
into parts of K; the K sums of a part go to the K places in a random order, turned by a random number of the parameter's
own. So two entries of one parameter meet with probability 1 / K, or, if their distance is a multiple of a prime that
W is drawn from, with one over the number of those primes (464 or more) beside.
A parameter of few entries goes without a modulus.

Signs, primes, orders and turns are Philox words, keyed by (version, seed, role, parameter); a sign by row and column.
Signs are kept within a memory budget for each process and made again from their counters beyond it.

Shapes: B examples, b of them in a tile, T positions, R rows and C columns of a parameter, P = R C entries, p of them
in a tile, K outputs, W sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gradscale.grads.layer import LayerGrads
from gradscale.grads.sweep import Request, read
from gradscale.sketches.blocks import kept
from gradscale.sketches.dimensions import check_dim, check_fits
from gradscale.sketches.philox import Key, key_of
from gradscale.sketches.words import signs, signs_of, words

VERSION = 1
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
        total = torch.zeros(grads.shape[0], self.dim, dtype=torch.float64, device=grads.device)
        read(grads, Request(None, (), (), ((self.fold(parameter, grads.shape[1:], grads.device), total),)))
        return total

    def materialize(self, parameter: str, shape: tuple[int, int]) -> Tensor:
        """[P, K] float32: the definition."""
        fold = self.fold(parameter, shape, _HOST)
        entry = torch.arange(shape[0] * shape[1])
        matrix = torch.zeros(len(entry), self.dim)
        matrix[entry, fold.buckets(entry)] = fold.signs(0, len(entry))
        return matrix


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
        return _modulus(self.seed, self.parameter, self.rows * self.columns, self.dim)

    def buckets(self, entries: Tensor) -> Tensor:
        """Where the entries go, in 0 ... K - 1."""
        places = _places(self.seed, self.dim, -(-self.modulus // self.dim), str(entries.device))
        return (places[entries % self.modulus] + self._turn) % self.dim

    def add_tile(self, dense: Tensor, start: int, total: Tensor) -> None:
        stop = start + dense.shape[1]
        if self.rows * self.columns <= _SMALLEST:  # a bias: as few calls as can be
            places, sign = _of_few(self)
            total.index_add_(1, places[start:stop], (dense * sign[start:stop]).double())
            return
        parts = -(-self.modulus // self.dim)
        sums = dense.new_zeros(len(dense), parts * self.dim)
        _add_modulo(dense.mul_(self.signs(start, stop)), start, sums[:, : self.modulus])
        placed = sums.index_select(1, _sources(self.seed, self.dim, parts, str(self.device)))
        total.add_(placed.view(len(dense), parts, self.dim).sum(dim=1).roll(self._turn, dims=1))

    def add_rows(self, ids: Tensor, grads: Tensor, total: Tensor) -> None:
        entries = ids[:, :, None] * self.columns + torch.arange(self.columns, device=ids.device)
        signed = grads * signs_of(self._key, ids.flatten(), self.columns).view(grads.shape)
        total.scatter_add_(1, self.buckets(entries).flatten(1), signed.flatten(1).double())

    def signs(self, start: int, stop: int) -> Tensor:
        """[stop - start] float32, 1 or -1, of these entries."""
        first, last = start // self.columns, -(-stop // self.columns)
        name = ("count", self._key, first, last, self.columns, str(self.device))
        made = kept(name, lambda: signs(self._key, first, last, self.columns, self.device))
        return made.flatten()[start - first * self.columns : stop - first * self.columns]

    @property
    def _key(self) -> Key:
        return _key("sign", self.seed, self.parameter)

    @property
    def _turn(self) -> int:
        return _turn(self.seed, self.parameter) % self.dim


@lru_cache(maxsize=1 << 14)
def _key(role: str, seed: int, *names: str | int) -> Key:
    return key_of("count", VERSION, seed, role, *names)


@lru_cache(maxsize=4096)
def _of_few(fold: CountFold) -> tuple[Tensor, Tensor]:
    """[P] each: the places and the signs of all entries."""
    entries = torch.arange(fold.rows * fold.columns, device=fold.device)
    return fold.buckets(entries), fold.signs(0, len(entries))


def _add_modulo(signed: Tensor, start: int, sums: Tensor) -> None:
    """Add entries start, start + 1, ... [b, p] into `sums` [b, W] at their remainders."""
    size = sums.shape[1]
    first = min(-start % size, signed.shape[1])  # entries before the first multiple of W
    whole = first + (signed.shape[1] - first) // size * size
    if first:
        sums[:, start % size : start % size + first] += signed[:, :first]
    if whole > first:
        sums += signed[:, first:whole].unflatten(1, (-1, size)).sum(dim=1)
    if whole < signed.shape[1]:
        sums[:, : signed.shape[1] - whole] += signed[:, whole:]


@lru_cache(maxsize=4096)
def _modulus(seed: int, parameter: str, entries: int, dim: int) -> int:
    """A random prime from W_0 to 2 W_0, or P itself where W_0 is not much less."""
    lowest = max(dim, _SMALLEST, min(entries // _BLOCKS, _LARGEST))
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
