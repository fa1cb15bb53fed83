"""Scans of stored sketches for the spectrum of their covariance: of all examples, then without each jackknife block.

Both ways give the same, the one of matrices [n, n], the other of [K, K].

Shapes: n examples, b of them in a block, K sketch, J jackknife blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from gradscale.measures.covariance_moments import (
    PointMoments,
    Spectrum,
    add_points,
    centred_gram,
    eigenvalues,
    invariants_of_gram,
    invariants_of_moments,
    no_points,
    scatter,
    subtract,
)
from gradscale.store.sketches import StoredSketches

_ENTRIES = 1 << 20  # of a block of sketches: 8 MiB of float64


def by_gram(stored: StoredSketches, positions: np.ndarray, J: int) -> Iterator[Spectrum]:
    """Of all examples, then without each block: from the Gram matrix [n, n]."""
    n = len(positions)
    points = torch.from_numpy(stored.take(positions).astype(np.float64))
    gram = points @ points.mT
    scale = _scales(gram.diagonal(), stored.sq_norms[positions])
    del points
    for kept in (slice(0, 0), *_blocks(n, J)):
        rows = torch.ones(n, dtype=torch.bool)
        rows[kept] = False
        part, lengths = gram[rows][:, rows], scale[rows]
        scaled = part * lengths[:, None] * lengths
        yield Spectrum(invariants_of_gram(part), eigenvalues(centred_gram(scaled), len(part)))


def by_moments(stored: StoredSketches, positions: np.ndarray, J: int) -> Iterator[Spectrum]:
    """The same from second moments [K, K], of the sketches as they are and of those scaled, about their means."""
    n, dim = len(positions), int(stored.scheme["dim"])
    about = torch.zeros(2, dim, dtype=torch.float64)
    for both in _scanned(stored, positions):
        about += both.sum(dim=1) / n
    moments = partial(_moments, stored, about=about)
    whole = moments(positions)
    yield _spectrum(whole)
    for block in _blocks(n, J):
        raw, scaled = (subtract(a, b) for a, b in zip(whole, moments(positions[block]), strict=True))
        yield _spectrum((raw, scaled))


def _moments(stored: StoredSketches, positions: np.ndarray, about: Tensor) -> tuple[PointMoments, PointMoments]:
    raw, scaled = no_points(about.shape[1]), no_points(about.shape[1])
    for both in _scanned(stored, positions):
        for moments, points, origin in zip((raw, scaled), both, about, strict=True):
            add_points(moments, points - origin)
    return raw, scaled


def _spectrum(both: tuple[PointMoments, PointMoments]) -> Spectrum:
    raw, scaled = both
    return Spectrum(invariants_of_moments(raw), eigenvalues(scatter(scaled), round(float(scaled.points))))


def _scanned(stored: StoredSketches, positions: np.ndarray) -> Iterator[Tensor]:
    """[2, b, K] float64: sketches, and each as long as its gradient."""
    rows = max(1, _ENTRIES // int(stored.scheme["dim"]))
    sq_norms = stored.sq_norms[positions]
    for i, block in enumerate(stored.scan(positions, rows)):
        points = torch.from_numpy(block.astype(np.float64))
        scale = _scales(points.square().sum(dim=1), sq_norms[i * rows : i * rows + len(points)])
        yield torch.stack([points, points * scale[:, None]])


def _scales(sketched: Tensor, sq_norms: np.ndarray) -> Tensor:
    """[b]: what makes a sketch of these squared norms as long as its gradient; a sketch that is zero stays so."""
    ratio = torch.from_numpy(sq_norms) / sketched
    return torch.where(sketched > 0, ratio, 0.0).sqrt()


def _blocks(n: int, J: int) -> list[slice]:
    """J runs of neighbouring examples; none of a single one, without which nothing is left."""
    ends = [j * n // J for j in range(J + 1)]
    return [slice(*pair) for pair in pairwise(ends)] if J > 1 else []
