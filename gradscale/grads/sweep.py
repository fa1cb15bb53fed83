"""Reads squared norms, sums and products from one parameter's per-example gradients in a single sweep.

Where a reading needs the gradients themselves, they are made tile by tile in one reused buffer, small
enough to stay in a processor's cache, and reduced at once: never all B of a layer, never more than a tile.
Where the factors alone give the reading for less (a Gram matrix over positions for norms, one matrix
product for sums, segments for embeddings), they are used instead; `_factors_are_cheaper` decides from (T, R, C).

Shapes: B examples, b of them in a tile, T positions, R rows and C columns of the parameter, r rows in a
tile, P = R C, N outputs of a linear map, w sums on the way to one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gradscale.grads.experts import ExpertGrads, add_norms_of_pairs, add_sum_of_assignments
from gradscale.grads.gram import Factors, add_squared_norms, factors_of, gram_cost, length
from gradscale.grads.layer import DenseGrads, EmbeddingGrads, LayerGrads, OuterGrads, widen

_TILE_ENTRIES = 1 << 20  # of a parameter in a tile
_PRODUCT_ENTRIES = 1 << 16  # the same with products: the blocks of a map, whatever the batch
_CPU_TILE = 1 << 21  # entries of a tile's examples together: 8 MB of float32, which a last-level cache may hold
_FOLDED = 2  # times as many with folds, whose calls on a tile are several
_GPU_TILE = 1 << 26
_RUN = 1 << 10  # entries whose squares are added up in float32
_PASS_COST = 8.0  # multiplications for which an entry in the cache can be read or written once
_PAIR_COST = 5.0  # the same in the small Gram matrices of experts
_GRAM_COST = 1.5  # multiplications of a tile for which one of a Gram matrix, which is smaller, can be had


class Fold(Protocol):
    """A linear map of one parameter's gradients to K numbers, that reads them where they are, by way of w sums."""

    @property
    def width(self) -> int:
        """w."""
        ...

    def add_tile(self, dense: Tensor, start: int, sums: Tensor) -> None:
        """Add entries start, start + 1, ... of gradients [b, p] to their `sums` [b, w]. `dense` may be overwritten."""
        ...

    def add_rows(self, ids: Tensor, grads: Tensor, sums: Tensor) -> None:
        """The same for gradients of a table, whose rows `ids` [B, T] receive `grads` [B, T, C]."""
        ...

    def finish(self, sums: Tensor, total: Tensor) -> None:
        """Add the images of the gradients that `sums` [B, w] are of to `total` [B, K] float64."""
        ...


class Request(NamedTuple):
    """What to read from one parameter; everything is added to what the tensors hold already."""

    norms: Tensor | None  # [B] float64: squared norms
    sums: tuple[tuple[Tensor | None, Tensor], ...]  # weights [B] (None: one each), total [P]
    products: tuple[tuple[Callable[[int, int], Tensor], Tensor], ...]  # rows start:stop of [P, N]; total [B, N]
    folds: tuple[tuple[Fold, Tensor], ...] = ()  # sums [B, w] in the dtype of the tiles


def read(grads: LayerGrads, request: Request) -> None:
    """Add what `request` asks for to its tensors."""
    factors, by_entries = factors_of(grads), bool(request.products or request.folds)
    if isinstance(grads, DenseGrads):
        _read_dense(grads, request)
    elif isinstance(grads, EmbeddingGrads) and not request.products and not (request.folds and _is_short(grads)):
        _read_embedding(grads, request)
    elif isinstance(grads, ExpertGrads) and not by_entries and _pairs_are_cheaper(grads, request):
        _read_assignments(grads, request)
    elif factors and not by_entries and _factors_are_cheaper(factors, request):
        _read_factors(factors, request)
    else:
        _sweep(grads, request)


def sq_norms(grads: LayerGrads) -> Tensor:
    """[B] float64."""
    total = torch.zeros(grads.shape[0], dtype=torch.float64, device=grads.device)
    read(grads, Request(total, (), ()))
    return total


def weighted_sum(grads: LayerGrads, weights: Tensor) -> Tensor:
    """[P]: sum over examples of weights[b] * gradient[b], for `weights` [B]."""
    total = torch.zeros(grads.shape[1] * grads.shape[2], dtype=grads.dtype, device=grads.device)
    read(grads, Request(None, ((weights.to(grads.dtype), total),), ()))
    return total


def dot(grads: LayerGrads, vectors: Tensor) -> Tensor:
    """[B, N] float64: inner products with the columns of `vectors` [P, N]."""
    total = torch.zeros(grads.shape[0], vectors.shape[1], dtype=torch.float64, device=grads.device)
    read(grads, Request(None, (), ((lambda start, stop: vectors[start:stop], total),)))
    return total


def empty_sums(fold: Fold, grads: LayerGrads) -> Tensor:
    """[B, w] zeros for a request's `folds`."""
    return torch.zeros(grads.shape[0], fold.width, dtype=grads.dtype, device=grads.device)


def tiles(grads: LayerGrads, height: int, group: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Examples, rows, and their gradients [b, r, C], of at most `group` and `height`; the next overwrites the tile."""
    batch, rows, columns = grads.shape
    buffer = torch.empty(group * height * columns, dtype=grads.dtype, device=grads.device)
    for row in range(0, rows, height):  # outermost, so that a sum's block stays in the cache
        part = slice(row, min(row + height, rows))
        for example in range(0, batch, group):
            examples = slice(example, min(example + group, batch))
            shape = (examples.stop - examples.start, part.stop - part.start, columns)
            tile = buffer[: math.prod(shape)].view(shape)
            grads.tile(examples, part, tile)
            yield examples, part, tile


def _sweep(grads: LayerGrads, request: Request) -> None:
    for examples, part, tile in tiles(grads, *_tile_shape(grads, request)):
        _reduce(tile.flatten(1), examples, part.start * grads.shape[2], request)


def _tile_shape(grads: LayerGrads, request: Request) -> tuple[int, int]:
    """How many rows and how many examples a tile has."""
    batch, rows, columns = grads.shape
    budget, entries = (_CPU_TILE, _TILE_ENTRIES) if grads.device.type == "cpu" else (_GPU_TILE, _GPU_TILE)
    height = min(rows, max(1, (_PRODUCT_ENTRIES if request.products else entries) // columns))
    budget *= _FOLDED if request.folds else 1
    groups = -(-batch // max(1, budget // (columns * height)))
    return height, -(-batch // groups)


def _reduce(dense: Tensor, examples: slice, start: int, request: Request) -> None:
    """Add the readings of entries start, start + 1, ... of the gradients `dense` [b, p] of `examples`."""
    stop = start + dense.shape[1]
    if request.norms is not None:
        request.norms[examples].add_(_squares(dense))
    for weights, total in request.sums:
        _add_sum(dense, None if weights is None else weights[examples], total[start:stop])
    for block, total in request.products:
        total[examples].add_(dense @ block(start, stop).to(dense.dtype))
    for i, (fold, sums) in enumerate(request.folds):
        fold.add_tile(dense if i == len(request.folds) - 1 else dense.clone(), start, sums[examples])


def _squares(dense: Tensor) -> Tensor:
    """[b] float64: squared norms. Runs of entries are added up in the tensor's dtype: more would lose digits."""
    whole = dense.shape[1] // _RUN * _RUN
    total: Tensor = torch.linalg.vector_norm(dense[:, whole:], dim=1).double().square_()
    if whole:
        runs = torch.linalg.vector_norm(dense[:, :whole].unflatten(1, (-1, _RUN)), dim=2)
        total += runs.double().square_().sum(dim=1)
    return total


def _add_sum(dense: Tensor, weights: Tensor | None, total: Tensor) -> None:
    if weights is None and len(dense) == 1:
        total += dense[0]
    else:
        total.addmv_(dense.mT, dense.new_ones(len(dense)) if weights is None else weights.to(dense.dtype))


def _read_dense(grads: DenseGrads, request: Request) -> None:
    dense = widen(grads.grads)
    everyone = slice(0, len(dense))
    if request.norms is not None:
        request.norms.add_(_squares(dense))
    for weights, total in request.sums:
        _add_sum(dense, weights, total)
    for fold, sums in request.folds:
        fold.add_tile(dense.clone(), 0, sums)
    for start in range(0, dense.shape[1] if request.products else 0, _PRODUCT_ENTRIES):
        part = dense[:, start : start + _PRODUCT_ENTRIES]
        _reduce(part, everyone, start, Request(None, (), request.products))


def _read_embedding(grads: EmbeddingGrads, request: Request) -> None:
    """By segments: for norms, the rows that an example's positions share are added up first."""
    rows = grads.shape[1]
    positions = widen(grads.grads)
    if request.norms is not None:
        request.norms.add_(_segment_sq_norms(grads.ids, positions))
    for weights, total in request.sums:
        weighted = positions if weights is None else positions * weights.to(positions.dtype)[:, None, None]
        total.view(rows, -1).index_add_(0, grads.ids.flatten(), weighted.flatten(0, 1))
    for fold, sums in request.folds:
        fold.add_rows(grads.ids, positions, sums)


def _is_short(grads: EmbeddingGrads) -> bool:
    """Whether the whole table has hardly more rows than an example has positions, as one of positions has not."""
    return grads.num_rows <= 2 * grads.ids.shape[1]


def _segment_sq_norms(ids: Tensor, positions: Tensor) -> Tensor:
    """[B] float64: squared norms of what `positions` [B, T, C] add up to in the rows `ids` [B, T] of a table.

    The number of segments is not asked for, since a device would have to be waited for.
    """
    in_order, order = ids.sort(dim=1, stable=True)
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[:, 1:] = in_order[:, 1:] != in_order[:, :-1]
    segment = torch.empty_like(ids).scatter_(1, order, is_first.cumsum(dim=1) - 1)
    offsets = torch.arange(len(ids), device=ids.device)[:, None] * ids.shape[1]
    sums = torch.zeros_like(positions).flatten(0, 1)
    sums.index_add_(0, (segment + offsets).flatten(), positions.flatten(0, 1))
    return sums.view(len(ids), -1).square().sum(dim=1).double()


def _factors_are_cheaper(uses: tuple[Factors, ...], request: Request) -> bool:
    """Compare multiplications an example: Gram matrices and one product for each sum, against the tiles."""
    _, rows, columns = uses[0].shape
    product = sum(length(use) * rows * columns for use in uses if isinstance(use, OuterGrads))
    gram = _GRAM_COST * gram_cost(uses) if request.norms is not None else 0
    passes = (request.norms is not None) + len(request.sums)
    return gram + product * len(request.sums) <= product + _PASS_COST * passes * rows * columns


def _pairs_are_cheaper(grads: ExpertGrads, request: Request) -> bool:
    """As `_factors_are_cheaper`, over all experts and examples: a tile is made and read where no assignment is, too."""
    batch, rows, columns = grads.shape
    gram = float(grads.counts.square().sum()) * sum(grads.shape_of_one) if request.norms is not None else 0.0
    product = len(grads.left) * math.prod(grads.shape_of_one)
    passes = (request.norms is not None) + len(request.sums)
    return _PAIR_COST * gram + product * len(request.sums) <= product + _PASS_COST * passes * batch * rows * columns


def _read_assignments(grads: ExpertGrads, request: Request) -> None:
    if request.norms is not None:
        add_norms_of_pairs(grads, request.norms)
    for weights, total in request.sums:
        add_sum_of_assignments(grads, weights, total)


def _read_factors(uses: tuple[Factors, ...], request: Request) -> None:
    if request.norms is not None:
        add_squared_norms(uses, request.norms)
    for use in uses:
        if isinstance(use, EmbeddingGrads):
            _read_embedding(use, request._replace(norms=None))
            continue
        for weights, total in request.sums:
            left = widen(use.left) if weights is None else widen(use.left) * weights[:, None, None]
            total.view(use.shape[1:]).addmm_(left.flatten(0, 1).mT, widen(use.right).flatten(0, 1))
