"""Squared norms from the factors alone: Gram matrices over positions.

The square of sum_t l_t r_t^T is sum_st <l_s, l_t> <r_s, r_t>: T^2 (R + C) multiplications in place of T R C, and no
gradient. A table's row factors are unit vectors, given by the row's number. A symmetric Gram matrix is computed by
halves, of which one is left out, as far as that pays.

Shapes: B examples, b of them in a tile, T positions, R rows and C columns of the parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from gradscale.grads.layer import EmbeddingGrads, LayerGrads, OuterGrads, SharedGrads, widen

_GRAM_TILE = 1 << 22  # entries of the T x T Gram matrices held at a time
_GRAM_HALF = 1 << 27  # multiplications from which on it pays to compute one half of a Gram matrix less

Factors = OuterGrads | EmbeddingGrads


def factors_of(grads: LayerGrads) -> tuple[Factors, ...]:
    """The uses of a parameter as sums over positions of a row's factor times a column's; empty if they are not."""
    uses = grads.uses if isinstance(grads, SharedGrads) else (grads,)
    return tuple(use for use in uses if isinstance(use, Factors)) if all(isinstance(u, Factors) for u in uses) else ()


def gram_cost(uses: Sequence[Factors]) -> float:
    """Multiplications an example of `add_squared_norms`."""
    squares = sum(_pair_cost(use, use) * _share_of_square(use.shape[0], length(use), use) for use in uses)
    return squares + sum(_pair_cost(a, b) for a, b in combinations(uses, 2))


def add_squared_norms(uses: Sequence[Factors], norms: Tensor) -> None:
    """Add |sum of the uses|^2 to `norms` [B] float64: of each use with itself, and twice of each pair."""
    for use in uses:
        _add_square(use, norms)
    for a, b in combinations(uses, 2):
        _add_gram(a, b, 2.0, norms)


def _pair_cost(a: Factors, b: Factors) -> int:
    _, rows, columns = a.shape
    both_outer = isinstance(a, OuterGrads) and isinstance(b, OuterGrads)
    return length(a) * length(b) * (columns + (rows if both_outer else 1))


def _share_of_square(batch: int, positions: int, use: Factors) -> float:
    """How much of a symmetric Gram matrix `_add_square` computes."""
    if not _pays_to_halve(batch, positions, use):
        return 1.0
    return (1 + _share_of_square(2 * batch, positions // 2, use)) / 2


def _pays_to_halve(batch: int, positions: int, use: Factors) -> bool:
    _, rows, columns = use.shape
    half = positions // 2
    return half > 0 and batch * half**2 * (columns + (rows if isinstance(use, OuterGrads) else 1)) >= _GRAM_HALF


def _add_square(use: Factors, norms: Tensor) -> None:
    """Add <a, a>: of its two halves with one another twice, and of each with itself, as of twice as many examples."""
    batch, positions = len(norms), length(use)
    if not _pays_to_halve(batch, positions, use):
        _add_gram(use, use, 1.0, norms)
        return
    half = positions // 2
    if positions % 2:
        last = _part(use, slice(2 * half, None))
        _add_gram(last, last, 1.0, norms)
        _add_gram(last, _part(use, slice(0, 2 * half)), 2.0, norms)
    _add_gram(_part(use, slice(0, half)), _part(use, slice(half, 2 * half)), 2.0, norms)
    of_halves = norms.new_zeros(2 * batch)
    _add_square(_by_halves(use), of_halves)
    norms += of_halves.view(batch, 2).sum(dim=1)


def _part(use: Factors, positions: slice) -> Factors:
    if isinstance(use, OuterGrads):
        return OuterGrads(use.left[:, positions], use.right[:, positions])
    return EmbeddingGrads(use.ids[:, positions], use.grads[:, positions], use.num_rows)


def _by_halves(use: Factors) -> Factors:
    """The two halves of every example's positions as two examples, without the last of an odd number."""

    def split(factor: Tensor) -> Tensor:
        half = factor.shape[1] // 2
        return factor[:, : 2 * half].reshape(2 * len(factor), half, *factor.shape[2:])

    if isinstance(use, OuterGrads):
        return OuterGrads(split(use.left), split(use.right))
    return EmbeddingGrads(split(use.ids), split(use.grads), use.num_rows)


def _add_gram(a: Factors, b: Factors, scale: float, norms: Tensor) -> None:
    """Add scale <a, b> = scale sum_st <rows of a at s, of b at t> <columns ...>, by tiles of _GRAM_TILE entries."""
    batch, height = len(norms), min(length(a), max(1, _GRAM_TILE // length(b)))
    group = max(1, _GRAM_TILE // (height * length(b)))
    for first in range(0, batch, group):
        examples = slice(first, first + group)
        for start in range(0, length(a), height):
            part = slice(start, start + height)
            block = torch.bmm(widen(_columns(a)[examples, part]), widen(_columns(b)[examples]).mT)
            block *= _row_products(a, b, examples, part)
            norms[examples].add_(block.flatten(1).sum(dim=1), alpha=scale)


def _row_products(a: Factors, b: Factors, examples: slice, part: slice) -> Tensor:
    """[b, s, t]: inner products of the row factors; an embedding's are unit vectors."""
    if isinstance(a, OuterGrads) and isinstance(b, OuterGrads):
        return torch.bmm(widen(a.left[examples, part]), widen(b.left[examples]).mT)
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


def length(use: Factors) -> int:
    """T."""
    return _columns(use).shape[1]
