"""Linear algebra on slices of vectors, a block of columns at a time: sums in float64, a few MiB beside the vectors.

Shapes: p entries here, n vectors of a basis, k and r others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gradscale.curvature.operator import Operator

_CPU_ENTRIES = 1 << 18  # widened at a time: 2 MiB, which stays in the cache
_GPU_ENTRIES = 1 << 22
_OVERLAP = 32  # times the rounding unit, at which a vector counts as orthogonal to a basis
_TOLD = 1e-7
_ROUNDS = 6


def column_blocks(vectors: Tensor, rows: int) -> Iterator[slice]:
    """Slices of the columns of `vectors` [k, p] of which `rows` rows are widened together."""
    columns = vectors.shape[1]
    width = max(1, (_CPU_ENTRIES if vectors.device.type == "cpu" else _GPU_ENTRIES) // max(1, rows))
    return (slice(start, min(start + width, columns)) for start in range(0, columns, width))


def row_dots(operator: Operator, left: Tensor, right: Tensor) -> Tensor:
    """[k] float64: the inner product of each row of `left` [k, p] with that of `right`, over all processes."""
    total = torch.zeros(len(left), dtype=torch.float64, device=left.device)
    for block in column_blocks(left, 2 * len(left)):
        total += (left[:, block].double() * right[:, block].double()).sum(dim=1)
    return operator.all_sum(total).cpu()


def combine(coefficients: Tensor, vectors: Tensor, out: Tensor) -> None:
    """Writes `coefficients` [r, n] float64 times `vectors` [n, p] to `out` [r, p], which may be rows of `vectors`."""
    wide = coefficients.to(vectors.device)
    for block in column_blocks(vectors, len(vectors) + len(out)):
        out[:, block] = (wide @ vectors[:, block].double()).to(out.dtype)


class Swept(NamedTuple):
    """Of k vectors beside a basis, float64 on the CPU."""

    overlaps: Tensor  # [n, k], the basis times the vectors
    gram: Tensor  # [k, k], of the vectors


def sweep(operator: Operator, basis: Tensor, vectors: Tensor, off: Tensor | None = None) -> Swept:
    """Takes `off` [n, k] times `basis` [n, p] off `vectors` [k, p] in place, then reads what is left of the overlaps.

    The basis is read once for both. One sum over processes.
    """
    n, k = len(basis), len(vectors)
    total = torch.zeros(n + k, k, dtype=torch.float64, device=vectors.device)
    taken = None if off is None else off.mT.contiguous().to(vectors.device)
    for block in column_blocks(vectors, n + 2 * k):
        q, w = basis[:, block].double(), vectors[:, block].double()
        if taken is not None:
            vectors[:, block] = torch.addmm(w, taken, q, alpha=-1).to(vectors.dtype)
            w = vectors[:, block].double()
        total[:n].addmm_(q, w.mT)
        total[n:].addmm_(w, w.mT)
    whole = operator.all_sum(total).cpu()
    return Swept(whole[:n], whole[n:])


def trim(operator: Operator, basis: Tensor, vectors: Tensor, off: Tensor) -> Swept:
    """Takes `off` [n, k] times `basis` off `vectors` in place, where that is so little that rounding is what is left.

    So it multiplies in the vectors' own type, whose digits are enough, and reads no overlaps: it says that they are
    zero. One sum over processes.
    """
    k = len(vectors)
    gram = torch.zeros(k, k, dtype=torch.float64, device=vectors.device)
    taken = off.mT.to(vectors)
    for block in column_blocks(vectors, (len(basis) + 1) // 2 + 2 * k):
        w = vectors[:, block].addmm_(taken, basis[:, block], alpha=-1).double()
        gram.addmm_(w, w.mT)
    return Swept(torch.zeros_like(off), operator.all_sum(gram).cpu())


class Orthonormalized(NamedTuple):
    """Of k vectors: r orthonormal ones that make them again, and how much of them is lost."""

    coefficients: Tensor  # [k, r] float64 on the CPU: the vectors are these times the orthonormal ones
    dropped: float  # the length of what they do not make


def orthonormalize(
    operator: Operator, basis: Tensor, vectors: Tensor, found: Swept, floor: float = 0.0
) -> Orthonormalized:
    """Makes the first r of `vectors` [k, p] orthonormal, and orthogonal to `basis` [n, p], in place.

    `found` is of these vectors, which have been swept. Directions shorter than `floor` are dropped, and so are those
    shorter than 1e-7 of the longest, which a Gram matrix of float64 does not tell from none. The factor is the square
    root of the Gram matrix by its eigenvectors, again until it is accurate: Cholesky-QR2 without the matrix that must
    be positive definite. One sum over processes a round, none where `found` shows that the first one is enough.
    Source: Yamamoto, Nakatsukasa, Yanagisawa and Fukaya (2015), ETNA 44, for the rounds.
    """
    coefficients, dropped = torch.eye(len(vectors), dtype=torch.float64), 0.0
    unit = torch.finfo(vectors.dtype).eps
    for round_ in range(_ROUNDS):
        values, rotation = torch.linalg.eigh(found.gram)
        least = max(floor, _TOLD * math.sqrt(max(0.0, float(values[-1])))) if len(values) else floor
        kept = (values > least**2).nonzero().flatten().flip(0)
        pieces = coefficients @ (rotation * values.clamp(min=0).sqrt())
        dropped = max(dropped, float(pieces[:, values <= least**2].norm()))
        roots, coefficients = values[kept].sqrt(), pieces[:, kept]
        change = (rotation[:, kept] / roots).mT
        combine(change, vectors[: len(values)], vectors[: len(kept)])
        overlaps = found.overlaps @ change.mT
        orthogonal = not overlaps.numel() or float(overlaps.abs().max()) <= _OVERLAP * unit
        exact = not len(kept) or float(roots[0] / roots[-1]) < 4
        if (orthogonal and exact) or round_ == _ROUNDS - 1:
            break
        found = sweep(operator, basis, vectors[: len(kept)], overlaps)
        floor = 0.1  # of directions of length one: what is shorter now was in the span of the basis
    return Orthonormalized(coefficients, dropped)
