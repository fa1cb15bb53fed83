"""Inner products of gradients from their sketches, block by block, in float64.

Where an example meets itself, its exact squared norm stands in place of the sketch's, whose error would bias
cosines. Products are made in tiles of one fixed shape, padded with zeros, so that an entry's bits depend on
the two sketches alone and not on the block that it was made in.

Shapes: n finite examples, a and b of them in a block, K sketch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from gradscale.errors import GradscaleError
from gradscale.store.sketches import StoredSketches, scheme_differences

BLOCK = 1024  # examples
MATRIX_BYTES = 1 << 30  # of a whole matrix: 11,585 x 11,585 in float64
_TILE = 128  # a multiple of what the kernels of matrix products take at once


class GramBlock(NamedTuple):
    """Inner products block[i, j] = <g of ids_a[i], g of ids_b[j]>."""

    ids_a: np.ndarray  # [a] int64
    ids_b: np.ndarray  # [b] int64
    block: np.ndarray  # [a, b] float64


def gram(sketches: StoredSketches, rows: np.ndarray) -> np.ndarray:
    """[m, m] at the positions `rows`, symmetric.

    Raises: GradscaleError if the matrix is larger than MATRIX_BYTES.
    """
    check_fits(len(rows), len(rows))
    out = np.empty((len(rows), len(rows)))
    for part_a, part_b, block in _pairs(sketches, rows, BLOCK):
        out[part_a, part_b] = block
        out[part_b, part_a] = block.T
    return out


def gram_blocks(sketches: StoredSketches, rows: np.ndarray, size: int) -> Iterator[GramBlock]:
    """The upper triangle of blocks, those on the diagonal included; see `Run.gram_blocks`."""
    for part_a, part_b, block in _pairs(sketches, rows, size):
        yield GramBlock(sketches.ids[rows[part_a]], sketches.ids[rows[part_b]], block)


def cross_gram(
    left: StoredSketches, right: StoredSketches, rows: np.ndarray, columns: np.ndarray, same: bool
) -> np.ndarray:
    """[a, b] between two sets of sketches, at the positions `rows` and `columns`; `same` if they are one step's.

    Raises: GradscaleError if the matrix is larger than MATRIX_BYTES.
    """
    check_fits(len(rows), len(columns), "cross_gram_blocks(other, step)")
    out = np.empty((len(rows), len(columns)))
    for part_a, part_b, block in _cross_pairs(left, right, rows, columns, same, BLOCK):
        out[part_a, part_b] = block
    return out


def cross_gram_blocks(
    left: StoredSketches, right: StoredSketches, rows: np.ndarray, columns: np.ndarray, same: bool, size: int
) -> Iterator[GramBlock]:
    """All blocks, row by row; see `Run.cross_gram_blocks`."""
    for part_a, part_b, block in _cross_pairs(left, right, rows, columns, same, size):
        yield GramBlock(left.ids[rows[part_a]], right.ids[columns[part_b]], block)


def products(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[a, b] float64: left @ right^T for sketches [a, K] and [b, K] of any type."""
    out = np.empty((len(left), len(right)))
    for i in range(0, len(left), _TILE):
        above = _tile(left, i)
        for j in range(0, len(right), _TILE):
            part = out[i : i + _TILE, j : j + _TILE]
            part[:] = (above @ _tile(right, j).T)[: part.shape[0], : part.shape[1]]
    return out


def check_fits(a: int, b: int, blocks: str = "gram_blocks(step)") -> None:
    """Raises: GradscaleError if an [a, b] matrix of float64 is larger than MATRIX_BYTES; `blocks` is the remedy."""
    if 8 * a * b > MATRIX_BYTES:
        raise GradscaleError(
            f"a matrix of inner products must be of at most {MATRIX_BYTES >> 20} MiB, got {a} x {b} examples "
            f"({8 * a * b / (1 << 20):,.0f} MiB); pass ids=, or iterate over run.{blocks}"
        )


def check_comparable(here: StoredSketches, there: StoredSketches) -> None:
    """Raises: GradscaleError naming what differs, if the sketches are of different schemes."""
    wrong = scheme_differences(here.scheme, there.scheme)
    if wrong:
        raise GradscaleError(
            f"sketches must be of one scheme to be compared, got {'; '.join(wrong)} ({here.files.root} and "
            f"{there.files.root}); measure both with the same sketch and seed"
        )


def check_same_parameters(here: Mapping[str, Any], there: Mapping[str, Any], paths: str) -> None:
    """Raises: GradscaleError unless two plans measure parameters of the same names and shapes; `paths` says whose."""
    ours, theirs = ({name: tuple(about["shape"]) for name, about in found.items()} for found in (here, there))
    wrong = [
        f"{name} {ours.get(name, 'not measured')} here and {theirs.get(name, 'not measured')} there"
        for name in dict.fromkeys([*ours, *theirs])
        if ours.get(name) != theirs.get(name)
    ]
    if wrong:
        raise GradscaleError(
            f"gradients must be of the same parameters to be compared, got {'; '.join(wrong[:5])}"
            f"{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''} ({paths}); measure both with the same params"
        )


def _pairs(sketches: StoredSketches, rows: np.ndarray, size: int) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Every pair of parts of `rows`, the second not before the first, with their products."""
    parts = list(_parts(len(rows), size))
    for i, part_a in enumerate(parts):
        above = sketches.take(rows[part_a])
        for part_b in parts[i:]:
            beside = above if part_b == part_a else sketches.take(rows[part_b])
            yield part_a, part_b, _exact(products(above, beside), sketches, rows[part_a], rows[part_b])


def _cross_pairs(
    left: StoredSketches, right: StoredSketches, rows: np.ndarray, columns: np.ndarray, same: bool, size: int
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Every part of `rows` with every part of `columns`, and their products."""
    for part_a in _parts(len(rows), size):
        above = left.take(rows[part_a])
        for part_b in _parts(len(columns), size):
            block = products(above, right.take(columns[part_b]))
            yield part_a, part_b, _exact(block, left, rows[part_a], columns[part_b]) if same else block


def _exact(block: np.ndarray, sketches: StoredSketches, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """`block` with the exact squared norm wherever an example meets itself."""
    i, j = np.nonzero(rows[:, None] == columns[None, :])
    block[i, j] = sketches.sq_norms[rows[i]]
    return block


def _parts(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _tile(sketches: np.ndarray, start: int) -> np.ndarray:
    """[_TILE, K] float64: the sketches from `start` on, and zeros; always a copy."""
    part = sketches[start : start + _TILE]
    tile = np.zeros((_TILE, part.shape[1]))
    tile[: len(part)] = part
    return tile
