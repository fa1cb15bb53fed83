"""Reads squared norms, sums and products from one parameter's per-example gradients in a single sweep.

Where a reading needs the gradients themselves, they are made tile by tile in one reused buffer, small
enough to stay in a processor's cache, and reduced at once: never all B of a layer, never more than a tile.
Where the factors alone give the reading for less (a Gram matrix over positions for norms, one matrix
product for sums, segments for embeddings), they are used instead; `_factors_are_cheaper` decides from (T, R, C).

Shapes: B examples, b of them in a tile, T positions, R rows and C columns of the parameter, r rows in a
tile, P = R C, N outputs of a linear map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations_with_replacement
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.grads.layer import DenseGrads, EmbeddingGrads, LayerGrads, OuterGrads, SharedGrads, widen

_TILE_ENTRIES = 1 << 18  # of a parameter in a tile
_PRODUCT_ENTRIES = 1 << 16  # the same with products: the blocks of a map, whatever the batch
_CPU_TILE = 1 << 20  # entries of a tile's examples together: 4 MB of float32, which the last-level cache holds
_GPU_TILE = 1 << 26
_GRAM_TILE = 1 << 22  # entries of the T x T Gram matrices held at a time
_PASS_COST = 8.0  # multiplications for which an entry in the cache can be read or written once

Factors = OuterGrads | EmbeddingGrads


class Request(NamedTuple):
    """What to read from one parameter; everything is added to what the tensors hold already."""

    norms: Tensor | None  # [B] float64: squared norms
    sums: tuple[tuple[Tensor | None, Tensor], ...]  # weights [B] (None: one each), total [P]
    products: tuple[tuple[Callable[[int, int], Tensor], Tensor], ...]  # rows start:stop of [P, N]; total [B, N]


def read(grads: LayerGrads, request: Request) -> None:
    """Add what `request` asks for to its tensors."""
    factors = _factors(grads)
    if isinstance(grads, DenseGrads):
        _read_dense(grads, request)
    elif isinstance(grads, EmbeddingGrads) and not request.products:
        _read_embedding(grads, request)
    elif factors and not request.products and _factors_are_cheaper(factors, request):
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


def _sweep(grads: LayerGrads, request: Request) -> None:
    batch, rows, columns = grads.shape
    height, group = _tile_shape(grads, request)
    buffer = torch.empty(group * height * columns, dtype=grads.dtype, device=grads.device)
    for row in range(0, rows, height):  # outermost, so that a sum's block stays in the cache
        part = slice(row, min(row + height, rows))
        for example in range(0, batch, group):
            examples = slice(example, min(example + group, batch))
            shape = (examples.stop - examples.start, part.stop - part.start, columns)
            tile = buffer[: math.prod(shape)].view(shape)
            grads.tile(examples, part, tile)
            _reduce(tile.flatten(1), examples, part.start * columns, request)


def _tile_shape(grads: LayerGrads, request: Request) -> tuple[int, int]:
    """How many rows and how many examples a tile has."""
    batch, rows, columns = grads.shape
    height = min(rows, max(1, (_PRODUCT_ENTRIES if request.products else _TILE_ENTRIES) // columns))
    budget = _CPU_TILE if grads.device.type == "cpu" else _GPU_TILE
    return height, min(batch, max(1, budget // (columns * height)))


def _reduce(dense: Tensor, examples: slice, start: int, request: Request) -> None:
    """Add the readings of entries start, start + 1, ... of the gradients `dense` [b, p] of `examples`."""
    stop = start + dense.shape[1]
    if request.norms is not None:
        request.norms[examples] += torch.linalg.vector_norm(dense, dim=1).double().square()
    for weights, total in request.sums:
        _add_sum(dense, None if weights is None else weights[examples], total[start:stop])
    for block, total in request.products:
        total[examples] += dense @ block(start, stop).to(dense.dtype)


def _add_sum(dense: Tensor, weights: Tensor | None, total: Tensor) -> None:
    if weights is not None:
        total.addmv_(dense.mT, weights.to(dense.dtype))
    elif len(dense) == 1:
        total += dense[0]
    else:
        total += dense.sum(dim=0)


def _read_dense(grads: DenseGrads, request: Request) -> None:
    dense = widen(grads.grads)
    everyone = slice(0, len(dense))
    _reduce(dense, everyone, 0, request._replace(products=()))
    for start in range(0, dense.shape[1] if request.products else 0, _PRODUCT_ENTRIES):
        part = dense[:, start : start + _PRODUCT_ENTRIES]
        _reduce(part, everyone, start, Request(None, (), request.products))


def _read_embedding(grads: EmbeddingGrads, request: Request) -> None:
    """By segments: the rows that an example's positions share are added up first."""
    batch, rows, columns = grads.shape
    offsets = torch.arange(batch, device=grads.device)[:, None] * rows
    touched, segment = torch.unique(grads.ids + offsets, return_inverse=True)
    dense = torch.zeros(len(touched), columns, dtype=grads.dtype, device=grads.device)
    dense.index_add_(0, segment.flatten(), widen(grads.grads).flatten(0, 1))
    example, row = touched // rows, touched % rows
    if request.norms is not None:
        request.norms.index_add_(0, example, dense.square().sum(dim=1).double())
    for weights, total in request.sums:
        weighted = dense if weights is None else dense * weights[example, None]
        total.view(rows, columns).index_add_(0, row, weighted)


def _factors(grads: LayerGrads) -> tuple[Factors, ...]:
    """The uses of a parameter as sums over positions of a row's factor times a column's; empty if they are not."""
    uses = grads.uses if isinstance(grads, SharedGrads) else (grads,)
    return tuple(use for use in uses if isinstance(use, Factors)) if all(isinstance(u, Factors) for u in uses) else ()


def _factors_are_cheaper(uses: tuple[Factors, ...], request: Request) -> bool:
    """Compare multiplications an example: Gram matrices and one product for each sum, against the tiles."""
    _, rows, columns = uses[0].shape
    product = sum(_positions(use) * rows * columns for use in uses if isinstance(use, OuterGrads))
    gram = sum(_gram_cost(a, b) for a, b in combinations_with_replacement(uses, 2)) if request.norms is not None else 0
    passes = (request.norms is not None) + 3 * len(request.sums)
    return gram + product * len(request.sums) <= product + _PASS_COST * passes * rows * columns


def _gram_cost(a: Factors, b: Factors) -> int:
    _, rows, columns = a.shape
    both_outer = isinstance(a, OuterGrads) and isinstance(b, OuterGrads)
    return _positions(a) * _positions(b) * (columns + (rows if both_outer else 1))


def _read_factors(uses: tuple[Factors, ...], request: Request) -> None:
    if request.norms is not None:
        for i, j in combinations_with_replacement(range(len(uses)), 2):
            _add_gram(uses[i], uses[j], 1.0 if i == j else 2.0, request.norms)
    for use in uses:
        if isinstance(use, EmbeddingGrads):
            _read_embedding(use, request._replace(norms=None))
            continue
        for weights, total in request.sums:
            left = widen(use.left) if weights is None else widen(use.left) * weights[:, None, None]
            total.view(use.shape[1:]).addmm_(left.flatten(0, 1).mT, widen(use.right).flatten(0, 1))


def _add_gram(a: Factors, b: Factors, scale: float, norms: Tensor) -> None:
    """Add scale <a, b> = scale sum_st <rows of a at s, of b at t> <columns ...>, by tiles of _GRAM_TILE entries."""
    batch, height = len(norms), min(_positions(a), max(1, _GRAM_TILE // _positions(b)))
    group = max(1, _GRAM_TILE // (height * _positions(b)))
    for first in range(0, batch, group):
        examples = slice(first, first + group)
        for start in range(0, _positions(a), height):
            part = slice(start, start + height)
            block = widen(_columns(a)[examples, part]) @ widen(_columns(b)[examples]).mT
            block *= _row_products(a, b, examples, part)
            norms[examples] += block.flatten(1).sum(dim=1).mul_(scale)


def _row_products(a: Factors, b: Factors, examples: slice, part: slice) -> Tensor:
    """[b, s, t]: inner products of the row factors; an embedding's are unit vectors."""
    if isinstance(a, OuterGrads) and isinstance(b, OuterGrads):
        return widen(a.left[examples, part]) @ widen(b.left[examples]).mT
    if isinstance(a, OuterGrads):
        assert isinstance(b, EmbeddingGrads)
        ids = b.ids[examples, None, :].expand(-1, a.left[examples, part].shape[1], -1)
        return widen(a.left[examples, part].gather(2, ids))
    if isinstance(b, OuterGrads):
        ids = a.ids[examples, None, part].expand(-1, b.left.shape[1], -1)
        return widen(b.left[examples].gather(2, ids)).mT
    assert isinstance(a, EmbeddingGrads)
    assert isinstance(b, EmbeddingGrads)
    return a.ids[examples, part, None] == b.ids[examples, None, :]


def _columns(use: Factors) -> Tensor:
    return use.right if isinstance(use, OuterGrads) else use.grads


def _positions(use: Factors) -> int:
    return _columns(use).shape[1]
