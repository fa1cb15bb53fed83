"""Gaussian widths of chosen sets, from the sketches of a finished run.

Shapes: n examples, K sketch, M draws, C checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.measures.gaussian_width import (
    GRADIENT_UNIT,
    WidthState,
    empty_state,
    estimates_of,
    merge_states,
    state_of,
)
from gradscale.measures.gram_width import (
    Distortion,
    GramWidth,
    distortion_of_gaussian_sketch,
    sudakov_fernique,
    width_of_gram,
)
from gradscale.measures.measure import Estimate
from gradscale.run.plan import check_positive
from gradscale.sketches.philox import key_of, normals
from gradscale.store.results import Run

_VERSION = 1
_ROWS = 1 << 12  # sketches read at a time
_FAILURE = 0.05


class SketchedWidth(NamedTuple):
    """Widths of the sketched gradients, and where that of the gradients themselves then lies."""

    width: Estimate
    symmetrized: Estimate
    interval: tuple[float, float] | None  # of w, given the sketch; None: no distortion is known for its scheme


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
    draws h are the same at every step and for every set. `interval` is `sudakov_fernique` of it: by `distortion`,
    where `measured_distortion` or `distortion_of_epsilon` gave one, else for dense Gaussian sketches by
    `distortion_of_gaussian_sketch`, which fails with probability 0.05. It does not hold the error over draws.

    Cost: 2 n K M operations; memory for the sketches of the step and 4096 M products. No n x n matrix.
    Raises: GradscaleError if the run has no such step, no sketches, or not all of the examples among its finite ones.
    """
    check_positive(draws=draws)
    found, sketches = run.sketches(step)
    rows = _rows_of(found, ids, step)
    dim = sketches.shape[1]
    h = normals(key_of("sketch width", _VERSION, seed), 0, draws, dim, torch.device("cpu")).double().mT  # [K, M]
    state: WidthState = empty_state(draws)
    for start in range(0, len(rows), _ROWS):
        state = merge_states(state, state_of(_wide(sketches, rows[start : start + _ROWS]) @ h))
    estimates = estimates_of(state, "gaussian_width", "all", "examples@theta/sketch", GRADIENT_UNIT)
    value = estimates["width", "all"]
    known = _distortion(run, len(rows), dim) if distortion is None else distortion
    interval = None if known is None else sudakov_fernique(value.value, known)
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

    Cost: C^2 n K operations; memory for the C n K numbers of the sketches, unless `ids` are few.
    Raises: GradscaleError if there is no step, one is not the run's, there are no sketches, or no example is left.
    """
    chosen = run.steps if steps is None else list(steps)
    if not chosen:
        raise GradscaleError("steps must name at least one step of the run, got none; leave them out for all")
    read = [run.sketches(step) for step in chosen]
    common = np.array(sorted(set.intersection(*({*found.tolist()} for found, _ in read))), dtype=np.int64)
    rows = _rows_of(common, ids, chosen[0])
    kept = common[rows]
    parts = [
        (sketches, _rows_of(found, kept, step), _norms(run, step, kept))
        for step, (found, sketches) in zip(chosen, read, strict=True)
    ]
    gram = torch.zeros(len(chosen), len(chosen), dtype=torch.float64)
    for start in range(0, len(kept), _ROWS):
        block = slice(start, start + _ROWS)
        points = torch.stack([_with_norms(_wide(s, r[block]), norms[block]).flatten() for s, r, norms in parts])
        gram += points @ points.mT
    return width_of_gram(gram / len(kept), draws, seed, "tuple")


def _rows_of(found: np.ndarray, ids: Iterable[int] | None, step: int) -> np.ndarray:
    """Where the examples `ids` are among those `found`, ascending."""
    if ids is None:
        rows = np.arange(len(found))
    else:
        wanted = np.unique(np.fromiter(ids, dtype=np.int64))
        missing = np.setdiff1d(wanted, found)
        if len(missing):
            raise GradscaleError(
                f"ids must be of examples that are finite at step {step}, got {missing[:5].tolist()}; see "
                "the column `finite` of run.rows()"
            )
        rows = np.searchsorted(found, wanted)
    if not len(rows):
        raise GradscaleError(f"ids must name at least one finite example at step {step}, got none")
    return rows


def _wide(sketches: np.ndarray, rows: np.ndarray) -> Tensor:
    return torch.from_numpy(sketches[rows].astype(np.float64))


def _norms(run: Run, step: int, ids: np.ndarray) -> Tensor:
    """[n] the exact norms of the gradients of the examples `ids`."""
    table = run.sql(
        f"select example_id, grad_sq_norm from rows where step = {int(step)} and finite order by example_id"
    )
    rows = np.searchsorted(table["example_id"].to_numpy(), ids)
    return torch.from_numpy(np.sqrt(table["grad_sq_norm"].to_numpy()[rows]))


def _with_norms(sketches: Tensor, norms: Tensor) -> Tensor:
    """[n, K]: the sketches, each as long as its gradient; a sketch that is zero stays so."""
    lengths = sketches.norm(dim=1)
    return sketches * torch.where(lengths > 0, norms / lengths, 0.0)[:, None]


def _distortion(run: Run, points: int, dim: int) -> Distortion | None:
    scheme = run.plan["sketch"]
    return distortion_of_gaussian_sketch(points, dim, _FAILURE) if scheme["name"] == "gaussian" else None
