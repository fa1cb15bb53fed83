"""Sketches of outer products from their factors: small projections of rows and columns, then a count sketch.

The gradient G [R, C] of a matrix becomes A^T G B, where A [R, r_o] and B [C, r_i] hold random signs / sqrt(r),
or the identity where the side is no longer than the rank. Its entries are added, each with a random sign, to
a random one of the K outputs. Vectors (C = 1) go to the outputs at once.

Shapes: B examples, b of them in a tile, T positions, S assignments, G groups, R rows and C columns of the parameter,
P = R C, r_o and r_i what remains of R and C, K outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradscale.grads.experts import ExpertGrads
from gradscale.grads.layer import EmbeddingGrads, LayerGrads, OuterGrads, SharedGrads, widen
from gradscale.sketches.blocks import kept, tiles
from gradscale.sketches.dimensions import check_dim, check_fits
from gradscale.sketches.philox import Key, key_of
from gradscale.sketches.words import buckets, signs

VERSION = 1
_WIDENED = 1 << 21  # entries of a half-precision factor in float32 at a time


@dataclass(frozen=True)
class KroneckerSketch:
    """x -> S x by A^T G B and a count sketch of it: unbiased for inner products, E <Sx, Sy> = <x, y>.

    Exact up to the count sketch, whose variance is that of a dense sketch of K signs: for a vector,
    (|x|^2 |y|^2 + <x, y>^2 - 2 sum_p x_p^2 y_p^2) / K. The squared norm of a matrix G with t = |G|^2, rows g_i and
    columns c_j has before that the variance
      V = (2 / r_o) sum_{i != k} <g_i, g_k>^2
        + (2 / r_i) sum_{j != l} [(1 + 1 / r_o) <c_j, c_l>^2 + (|c_j|^2 |c_l|^2 - 2 sum_i G_ij^2 G_il^2) / r_o],
    where a side that is kept has 1 / r = 0; in the end it is at most V + 2 (t^2 + V) / K. So a layer whose gradient
    is of rank one has about 2 t^2 / V = 1 / (1 / r_o + 1 / r_i + 2 / (r_o r_i)) effective dimensions, however large K
    is: 31 at rank 64. Gradients of many positions bring a layer up to r_o r_i = 4096, and the errors of different
    parameters are independent. Take a larger rank where single tokens matter, and exact norms from the store's rows.

    Cost: T r (R + C + r) products an example, against T R C of the gradient itself; r (R + C) numbers are kept.
    Source: Choe et al. (2024), "What is your data worth to GPT?", arXiv 2405.13954, for the projections of the factors;
    Charikar, Chen and Farach-Colton (2004) for the count sketch. The variance is our own, tested.
    Departure: one vector of K outputs for all parameters together, and scales that make it unbiased.
    """

    dim: int
    seed: int = 0
    rank: int = 64

    def __post_init__(self) -> None:
        check_dim("sketch dimension", self.dim)
        check_dim("rank of a Kronecker sketch", self.rank)

    @property
    def scheme(self) -> dict[str, object]:
        """What makes two sketches comparable; kept beside them."""
        return {"name": "kronecker", "version": VERSION, "seed": self.seed, "dim": self.dim, "rank": self.rank}

    def bind(self, sizes: Mapping[str, int]) -> KroneckerSketch:
        """Raises: GradscaleError if K is more than P."""
        check_fits(self.dim, sizes)
        return self

    def apply(self, parameter: str, grads: LayerGrads) -> Tensor:
        total = torch.zeros(grads.shape[0], self.dim, dtype=torch.float64, device=grads.device)
        if grads.shape[2] == 1:
            for examples, part, tile in tiles(grads):
                self._fold(parameter, tile.flatten(1), part.start, total[examples])
        else:
            left, right = self._side("rows", parameter, 1, grads), self._side("columns", parameter, 2, grads)
            self._fold(parameter, projected(grads, left, right).flatten(1), 0, total)
        return total

    def materialize(self, parameter: str, shape: tuple[int, int]) -> Tensor:
        """[P, K] float32: the definition."""
        cpu = torch.device("cpu")
        rows, columns = shape
        if columns == 1:
            return self._fold_matrix(parameter, rows)
        left = self._matrix("rows", parameter, rows, cpu)
        right = self._matrix("columns", parameter, columns, cpu)
        return torch.kron(left, right) @ self._fold_matrix(parameter, left.shape[1] * right.shape[1])

    def _fold_matrix(self, parameter: str, size: int) -> Tensor:
        """[size, K]."""
        bucket, sign = buckets(self._key("fold", parameter), 0, size, self.dim, torch.device("cpu"))
        return torch.zeros(size, self.dim).scatter_(1, bucket[:, None], sign[:, None].float())

    def _fold(self, parameter: str, entries: Tensor, start: int, total: Tensor) -> None:
        """Add the count sketch of entries start, start + 1, ... [b, m] to `total` [b, K]."""
        key, stop, device = self._key("fold", parameter), start + entries.shape[1], entries.device

        def make() -> Tensor:
            return torch.stack(buckets(key, start, stop, self.dim, device))

        bucket, sign = kept(("fold", key, start, stop, self.dim, str(device)), make)
        offsets = torch.arange(len(entries), device=device)[:, None] * self.dim
        total.view(-1).index_add_(0, (bucket + offsets).flatten(), (entries * sign).double().flatten())

    def _side(self, role: str, parameter: str, axis: int, grads: LayerGrads) -> Tensor:
        """A or B in the dtype of the tiles; kept."""
        size = grads.shape[axis]
        name = ("kronecker", self._key(role, parameter), size, self.rank, str(grads.device), grads.dtype)
        return kept(name, lambda: self._matrix(role, parameter, size, grads.device).to(grads.dtype))

    def _matrix(self, role: str, parameter: str, size: int, device: torch.device) -> Tensor:
        """[size, r] float32 of +-1 / sqrt(r), or the identity where the rank is not less than the size."""
        if size <= self.rank:
            return torch.eye(size, device=device)
        return signs(self._key(role, parameter), 0, size, self.rank, device) * math.sqrt(1 / self.rank)

    def _key(self, role: str, parameter: str) -> Key:
        return key_of("kronecker", VERSION, self.seed, role, parameter)


def projected(grads: LayerGrads, left: Tensor, right: Tensor) -> Tensor:
    """[B, r_o, r_i]: left^T gradient right of every example, for left [R, r_o] and right [C, r_i]."""
    if isinstance(grads, SharedGrads):
        return torch.stack([projected(use, left, right) for use in grads.uses]).sum(dim=0)
    if isinstance(grads, OuterGrads):
        return _product(grads.left, left).mT @ _product(grads.right, right)
    if isinstance(grads, EmbeddingGrads):
        return left[grads.ids].mT @ _product(grads.grads, right)
    if isinstance(grads, ExpertGrads):
        return _of_assignments(grads, left, right)
    return _of_tiles(grads, left, right)


def _product(factor: Tensor, matrix: Tensor) -> Tensor:
    """factor [..., n] @ matrix [n, r]; a factor in half precision is widened a part at a time."""
    size, rank = matrix.shape
    if factor.dtype == matrix.dtype:
        return factor @ matrix
    rows = factor.reshape(-1, size)
    parts = [widen(part) @ matrix for part in rows.split(max(1, _WIDENED // size))]
    return torch.cat(parts).view(*factor.shape[:-1], rank)


def _of_assignments(grads: ExpertGrads, left: Tensor, right: Tensor) -> Tensor:
    """Each expert projects the rows of its own assignments, which are then taken example by example."""
    height, batch = grads.shape_of_one[0], grads.shape[0]
    rows = left.new_empty(len(grads.left), left.shape[1])
    for expert, bounds in enumerate(grads.bounds):
        own = slice(bounds[0], bounds[-1])
        rows[own] = _product(grads.left[own], left[expert * height : (expert + 1) * height])
    columns = _product(grads.right, right)
    counts = grads.counts
    order = torch.arange(batch).repeat(len(counts)).repeat_interleave(counts.flatten()).argsort(stable=True)
    order, of_example = order.to(grads.device), counts.sum(dim=0).tolist()
    pairs = zip(rows[order].split(of_example), columns[order].split(of_example), strict=True)
    return torch.stack([a.mT @ b for a, b in pairs])


def _of_tiles(grads: LayerGrads, left: Tensor, right: Tensor) -> Tensor:
    total = left.new_zeros(grads.shape[0], left.shape[1], right.shape[1])
    for examples, part, tile in tiles(grads):
        total[examples] += left[part].mT @ (tile @ right)
    return total
