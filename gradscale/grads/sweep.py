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
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.grads.layer import DenseGrads, EmbeddingGrads, LayerGrads, OuterGrads, widen

_CPU_TILE = 1 << 18  # entries: a megabyte of float32, which the second-level cache of a core holds
_PRODUCT_ENTRIES = 1 << 16  # of a parameter, with products: the blocks of a map, whatever the batch
_CPU_PRODUCT_TILE = 1 << 20  # with products, where more examples share each block
_GPU_TILE = 1 << 26
_GRAM_TILE = 1 << 22  # entries of the T x T Gram matrices held at a time
_PASS_COST = 8.0  # multiplications for which an entry in the cache can be read or written once


class Request(NamedTuple):
    """What to read from one parameter; everything is added to what the tensors hold already."""

    norms: Tensor | None  # [B] float64: squared norms
    sums: tuple[tuple[Tensor | None, Tensor], ...]  # weights [B] (None: one each), total [P]
    products: tuple[tuple[Callable[[int, int], Tensor], Tensor], ...]  # rows start:stop of [P, N]; total [B, N]


def read(grads: LayerGrads, request: Request) -> None:
    """Add what `request` asks for to its tensors."""
    if isinstance(grads, DenseGrads):
        _read_dense(grads, request)
    elif isinstance(grads, EmbeddingGrads) and not request.products:
        _read_embedding(grads, request)
    elif isinstance(grads, OuterGrads) and not request.products and _factors_are_cheaper(grads, request):
        _read_factors(grads, request)
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
    on_cpu = grads.device.type == "cpu"
    if request.products:
        height, budget = max(1, _PRODUCT_ENTRIES // columns), _CPU_PRODUCT_TILE if on_cpu else _GPU_TILE
    else:
        budget = _CPU_TILE if on_cpu else _GPU_TILE
        height = max(1, budget // columns)
    height = min(rows, height)
    return height, min(batch, max(1, budget // (columns * height)))


def _reduce(dense: Tensor, examples: slice, start: int, request: Request) -> None:
    """Add the readings of entries start, start + 1, ... of the gradients `dense` [b, p] of `examples`."""
    stop = start + dense.shape[1]
    if request.norms is not None:
        request.norms[examples] += (
            torch.dot(dense[0], dense[0]) if len(dense) == 1 else torch.linalg.vecdot(dense, dense)
        )
    for weights, total in request.sums:
        _add_sum(dense, None if weights is None else weights[examples], total[start:stop])
    for block, total in request.products:
        total[examples] += dense @ block(start, stop).to(dense.dtype)


def _add_sum(dense: Tensor, weights: Tensor | None, total: Tensor) -> None:
    if weights is not None:
        total.addmv_(dense.mT, weights)
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


def _factors_are_cheaper(grads: OuterGrads, request: Request) -> bool:
    """Compare multiplications an example: Gram matrices and one product for each sum, against the tiles."""
    positions, (_, rows, columns) = grads.left.shape[1], grads.shape
    product = positions * rows * columns
    gram = positions**2 * (rows + columns) if request.norms is not None else 0
    passes = (request.norms is not None) + 3 * len(request.sums)
    return gram + product * len(request.sums) <= product + _PASS_COST * passes * rows * columns


def _read_factors(grads: OuterGrads, request: Request) -> None:
    if request.norms is not None:
        _add_gram_norms(grads, request.norms)
    for weights, total in request.sums:
        left = widen(grads.left) if weights is None else widen(grads.left) * weights[:, None, None]
        total.view(grads.shape[1:]).addmm_(left.flatten(0, 1).mT, widen(grads.right).flatten(0, 1))


def _add_gram_norms(grads: OuterGrads, norms: Tensor) -> None:
    """|sum_t l_t r_t^T|^2 = sum_st <l_s, l_t> <r_s, r_t>, by tiles of at most _GRAM_TILE entries."""
    batch, positions = grads.left.shape[:2]
    height = min(positions, max(1, _GRAM_TILE // positions))
    group = max(1, _GRAM_TILE // (height * positions))
    for first in range(0, batch, group):
        examples = slice(first, first + group)
        left, right = widen(grads.left[examples]), widen(grads.right[examples])
        for row in range(0, positions, height):
            block = left[:, row : row + height] @ left.mT
            block *= right[:, row : row + height] @ right.mT
            norms[examples] += block.flatten(1).sum(dim=1)
