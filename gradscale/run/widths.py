"""Gaussian widths of chosen sets, from the sketches of a finished run.

Shapes: n examples, K sketch, M draws, C checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.measures.gaussian_width import (
    GRADIENT_UNIT,
    empty_state,
    estimates_of,
    merge_states,
    state_of,
)
from gradscale.measures.gram_width import (
    Distortion,
    GramWidth,
    distortion_of_gaussian_sketch,
    distortion_of_sign_sketch,
    distortion_of_variance,
    sudakov_fernique,
    width_of_gram,
)
from gradscale.measures.measure import Estimate
from gradscale.run.plan import check_positive
from gradscale.sketches.philox import key_of, normals
from gradscale.store.results import Run
from gradscale.store.sketches import StoredSketches

_VERSION = 1
_ENTRIES = 1 << 19  # of a block of sketches, and of its products: 4 MiB of float64, ten times that as they are added
_TUPLE_ENTRIES = 1 << 20  # of the blocks of all steps together
_FAILURE = 0.05
_KNOWN: dict[str, Callable[[int, int, float], Distortion]] = {
    "gaussian": distortion_of_gaussian_sketch,
    "rademacher": distortion_of_sign_sketch,
    "srht": distortion_of_variance,
    "count": distortion_of_variance,
    "sjlt": distortion_of_variance,
}


class SketchedWidth(NamedTuple):
    """Widths of the sketched gradients, and where that of the gradients themselves then lies."""

    width: Estimate
    symmetrized: Estimate
    interval: tuple[float, float] | None  # of w, given the sketch; None: nothing finite is known for its scheme


def width(
    run: Run,
    step: int,
    ids: Iterable[int] | None = None,
    draws: int = 1000,
    seed: int = 0,
    distortion: Distortion | None = None,
) -> SketchedWidth:
    """The width of the gradients of the examples `ids` (None: all finite ones) at `step`, from the run's sketches.

    w({S g_i}) = E max_i <S g_i, h> over standard normal h in R^K, recentred, as `GaussianWidth` has it in R^P; the
    draws h are the same at every step and for every set. No bit depends on the shards that the sketches are stored in.

    `interval` is `sudakov_fernique` of it: by `distortion`, where `measured_distortion` or `distortion_of_epsilon` gave
    one, else by what is known of the run's scheme, but for probability 0.05 over seeds of the sketch, and for rounding
    to the stored type, by which it is widened. It does not hold the error over draws. By scheme:

        identity                    the sketch is the gradient: the width itself, widened by rounding alone
        gaussian, rademacher        `distortion_of_gaussian_sketch`, `distortion_of_sign_sketch`
        srht, count, sjlt           `distortion_of_variance`: for few examples only, 14 of K = 4096; of count and sjlt
                                    given that two entries meet with probability 1 / K, as `CountSketch` says
        kronecker                   None: its variance depends on the gradients

    It is None wherever it would reach to infinity: K is then too small for the number of examples, and no more is
    known. The run's own `sketch_error` is no help: an average over a few pairs bounds no maximum over all of them.

    Cost: 2 n K M operations; memory for K M numbers and for a few row groups of sketches, 32 bytes an example beside,
    whatever n is.
    Raises: GradscaleError if the run has no such step, no sketches, or not all of the examples among its finite ones.
    Source: Banerjee et al. (2024), arXiv 2406.07712, as `GaussianWidth`; the interval is derived here.
    """
    check_positive(draws=draws)
    stored = run.stored_sketches(step)
    positions = _positions(stored, ids)
    dim = int(stored.scheme["dim"])
    h = _directions(seed, draws, dim)
    state, rounding = empty_state(draws), 0.0
    for block in stored.scan(positions, max(1, _ENTRIES // max(dim, draws))):
        points = _wide(block)
        state = merge_states(state, state_of(points @ h))
        rounding = max(rounding, _rounding(float(points.norm(dim=1).max()), dim, block.dtype))
    estimates = estimates_of(state, "gaussian_width", "all", "examples@theta/sketch", GRADIENT_UNIT)
    value = estimates["width", "all"]
    if distortion is not None:
        interval: tuple[float, float] | None = sudakov_fernique(value.value, distortion)
    else:
        interval = _interval(value, stored.scheme, rounding)
    return SketchedWidth(value, estimates["symmetrized", "all"], interval)


def tuple_width(
    run: Run, steps: Sequence[int] | None = None, ids: Iterable[int] | None = None, draws: int = 10_000, seed: int = 0
) -> GramWidth:
    """The width of the set `tuple`: E max_t (1 / sqrt n) sum_i <g_i(theta_t), v_i>, with v_i of its own for each i.

    That of C points with K_ab = (1/n) sum_i <g_i(theta_a), g_i(theta_b)>, by `width_of_gram`: over the examples `ids`
    that are finite at all `steps` (None: all). The inner products are the cosines of the sketches times the exact
    norms: unbiased up to O(1 / K) and, unlike sketched products beside an exact diagonal, a Gram matrix of vectors
    whose error vanishes as two checkpoints come close. Of a single step the width is 0: one point. n of the estimates
    counts checkpoints. Their standard errors are over draws and do not hold the sketch's error, of a distance about
    sqrt(1 / (2 K)) of it or less.

    Cost: C^2 n K operations; memory for a row group of each of the C steps, 16 MiB, and a few blocks, 32 bytes an
    example and step beside, whatever n is.
    Raises: GradscaleError if there is no step, one is not the run's, there are no sketches, or no example is left.
    Source: Banerjee et al. (2024), arXiv 2406.07712, whose set is not pinned down in what could be read of it.
    """
    chosen = run.steps if steps is None else list(steps)
    if not chosen:
        raise GradscaleError("steps must name at least one step of the run, got none; leave them out for all")
    stored = [run.stored_sketches(step) for step in chosen]
    if ids is None:
        kept = reduce(np.intersect1d, (of_step.ids for of_step in stored))
    else:
        kept = stored[0].ids[_positions(stored[0], ids)]
    if not len(kept):
        raise GradscaleError(f"steps must have an example that is finite at all of them, got none at {chosen}")
    rows = max(1, _TUPLE_ENTRIES // (int(stored[0].scheme["dim"]) * len(chosen)))
    gram = torch.zeros(len(chosen), len(chosen), dtype=torch.float64)
    for parts in zip(*(_scaled(of_step, of_step.positions(kept), rows) for of_step in stored), strict=True):
        points = torch.stack(parts).flatten(1)  # [C, rows K]
        gram += points @ points.mT
    return width_of_gram(gram / len(kept), draws, seed, "tuple")


def _positions(stored: StoredSketches, ids: Iterable[int] | None) -> np.ndarray:
    """Where the examples `ids` are among those stored, ascending and each once."""
    positions = np.arange(len(stored.ids)) if ids is None else np.unique(stored.positions(list(ids)))
    if not len(positions):
        raise GradscaleError(f"ids must name at least one finite example at step {stored.step}, got none")
    return positions


def _directions(seed: int, draws: int, dim: int) -> Tensor:
    """[K, M] float64: the draws h, made a few at a time."""
    key, rows = key_of("sketch width", _VERSION, seed), max(1, _ENTRIES // dim)
    h = torch.empty(draws, dim, dtype=torch.float64)
    for start in range(0, draws, rows):
        stop = min(start + rows, draws)
        h[start:stop] = normals(key, start, stop, dim, torch.device("cpu"))
    return h.mT


def _wide(sketches: np.ndarray) -> Tensor:
    return torch.from_numpy(sketches.astype(np.float64))


def _scaled(stored: StoredSketches, positions: np.ndarray, rows: int) -> Iterator[Tensor]:
    """[rows, K]: the sketches, each as long as its gradient; a sketch that is zero stays so."""
    norms = torch.from_numpy(np.sqrt(stored.sq_norms[positions]))
    for block, of_block in zip(stored.scan(positions, rows), norms.split(rows), strict=True):
        points = _wide(block)
        lengths = points.norm(dim=1)
        yield points * torch.where(lengths > 0, of_block / lengths, 0.0)[:, None]


def _interval(width_of_sketch: Estimate, scheme: Mapping[str, Any], rounding: float) -> tuple[float, float] | None:
    """Where the width is by what is known of the scheme, but for probability _FAILURE; None if that has no upper end.

    Sketches moved by `rounding` or less move their width by no more than sqrt(2 log n) times as much, a bound of the
    width of what was added.
    """
    value, points = width_of_sketch.value, width_of_sketch.n
    if scheme["name"] == "identity":
        known = Distortion(1.0, 1.0)
    elif scheme["name"] in _KNOWN:
        known = _KNOWN[scheme["name"]](points, int(scheme["dim"]), _FAILURE)
    else:
        return None
    moved = rounding * math.sqrt(2 * math.log(points))
    low, _ = sudakov_fernique(max(0.0, value - moved), known)
    _, high = sudakov_fernique(value + moved, known)
    return (low, high) if math.isfinite(high) else None


def _rounding(longest: float, dim: int, kind: np.dtype[Any]) -> float:
    """The most that a sketch of at most this length was moved by rounding to the nearest number of its type."""
    limits = np.finfo(kind)
    half = float(limits.eps) / 2
    return longest * half / (1 - half) + math.sqrt(dim) * float(limits.smallest_subnormal) / 2
