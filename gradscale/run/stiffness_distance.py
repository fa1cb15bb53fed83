"""Stiffness against the distance of two examples' inputs, and the distance at which it vanishes.

Pairs are streamed into bins of distance. Sums are kept by pairs of blocks of examples, so that a bootstrap may draw
blocks of examples, never pairs, without seeing a pair again.

Shapes: n examples, d entries of an input, a and b examples in a block of pairs, J bootstrap blocks, M bins, R draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.measures.measure import Estimate
from gradscale.run.inputs import unit_inputs
from gradscale.run.plan import check_positive
from gradscale.run.sign_stiffness import MOST, Side, side_of
from gradscale.sketches.philox import key_of, philox
from gradscale.store.products import BLOCK
from gradscale.store.results import Run
from gradscale.task import Task

KINDS = ("cos", "sign")
_COLUMNS = 7  # count, sum d, sum d^2, then sum S and sum S d of either kind
_BLOCKS = 50  # of examples, that the bootstrap draws
_AT_A_TIME = 64  # draws
_TAIL = 0.025
_VERSION = 1


class Bin(NamedTuple):
    """Pairs at a distance in [low, high) (the last bin holds 2 too), all of them or those within a class."""

    kind: str  # cos or sign
    pairs: str  # all or within
    low: float
    high: float
    number: int  # of unordered pairs
    distance: float  # their mean
    stiffness: float  # their mean
    stderr: float  # the standard deviation over draws of blocks of examples


class CriticalLength(NamedTuple):
    """Where the line of within-class stiffness against distance crosses zero."""

    length: Estimate
    interval: tuple[float, float]  # 95 %, percentiles over draws; NaN where more than 2.5 % of them have no crossing
    without_crossing: float  # the share of draws whose line does not cross within the observed distances
    intercept: float
    slope: float
    observed: tuple[float, float]  # the distances of within-class pairs


class StiffnessByDistance(NamedTuple):
    bins: tuple[Bin, ...]
    critical_length: Mapping[str, CriticalLength]  # by kind; empty without labels
    n: int  # examples
    zero_gradients: int  # left out, as are examples without a direction in input space
    zero_inputs: int


class Binned(NamedTuple):
    """Sums over pairs (all of them, then those within a class), a commutative monoid: sums add, ranges widen."""

    sums: Tensor  # [2, J, J, M, 7] float64
    lowest: Tensor  # [] float64, of the distances within a class
    highest: Tensor


def stiffness_by_distance(
    run: Run,
    task: Task,
    step: int,
    bins: int = 20,
    ids: Sequence[int] | None = None,
    most: int = MOST,
    draws: int = 1000,
    seed: int = 0,
    microbatch: int = 32,
) -> StiffnessByDistance:
    """Mean cosine and sign of <g_i, g_j> by the distance of inputs 1 - <X_i, X_j> / (|X_i| |X_j|), in [0, 2].

    X is `task.input_vectors(model, batch)` [B, d], of the run's own task: pixels, say, or a sequence's mean embedding.
    Distances are those of inputs, never of gradients, whose cosine is the stiffness itself. Distances fall into `bins`
    of equal width over [0, 2]. The critical length is where the least-squares line through all within-class pairs,
    S = intercept + slope distance, crosses zero; NaN where that lies outside the distances observed.

    Signs and cosines come from the run's sketches, with exact norms; which examples, `ids`, `most` and `seed`, as
    `sign_stiffness` has them. Standard errors and the interval: bootstrap over at most 50 blocks of examples, runs of
    neighbouring ids, in which a pair counts as often as both of its blocks are drawn; of a sorted dataset the errors
    come out too large.

    Cost: n^2 (K + d) / 2 operations; memory n d numbers for the inputs, 6 MB for the sums.
    Raises: GradscaleError if the task has no `inputs`, or not the run's examples; or as `sign_stiffness`.
    Source: Fort, Nowak, Jastrzebski and Narayanan (2019), arXiv 1901.09491, section 2 and their figure of stiffness
    against distance; the bootstrap is ours.
    """
    check_positive(bins=bins, most=most, draws=draws, microbatch=microbatch)
    side = side_of(run, step, ids, most, seed)
    points, kept = unit_inputs(run, task, step, side.ids, microbatch)
    zero_inputs = int((~kept).sum())
    side = _only(side, kept.numpy())
    if not len(side.ids):
        raise GradscaleError("inputs must have a direction, got none finite and not zero; see task.input_vectors")
    binned = _binned(run, step, side, points[kept], bins)
    labelled = side.labels is not None
    sums = binned.sums if labelled else binned.sums[:1]
    repeated = list(_repeated(sums, draws, seed))
    lengths = {k: _critical_length(binned, repeated, j, len(side.ids)) for j, k in enumerate(KINDS) if labelled}
    return StiffnessByDistance(tuple(_bins(sums, repeated)), lengths, len(side.ids), side.zeros, zero_inputs)


def line(sums: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """Intercept and slope [...] of the least-squares line of stiffness by distance, from sums [..., 7] over pairs."""
    count, d, dd = sums[..., 0], sums[..., 1], sums[..., 2]
    s, sd = sums[..., 3 + 2 * kind], sums[..., 4 + 2 * kind]
    spread = count * dd - d * d
    slope = torch.where(spread > 1e-12 * count * dd, (count * sd - s * d) / spread, torch.nan)
    return (s - slope * d) / count, slope


def crossing(sums: Tensor, kind: int, lowest: Tensor, highest: Tensor) -> Tensor:
    """[...]: where the line is zero; NaN outside the observed distances."""
    intercept, slope = line(sums, kind)
    zero = -intercept / slope
    return torch.where((zero >= lowest) & (zero <= highest), zero, torch.nan)


def merge_binned(left: Binned, right: Binned) -> Binned:
    return Binned(left.sums + right.sums, left.lowest.minimum(right.lowest), left.highest.maximum(right.highest))


def _binned(run: Run, step: int, side: Side, points: Tensor, bins: int) -> Binned:
    n = len(side.ids)
    J = min(_BLOCKS, n)
    block_of = torch.arange(n) * J // n
    labels = torch.zeros(n, dtype=torch.int64) if side.labels is None else torch.from_numpy(side.labels.copy())
    norms = torch.from_numpy(side.norms)
    far = torch.tensor(math.inf, dtype=torch.float64)
    found = Binned(torch.zeros(2, J, J, bins, _COLUMNS, dtype=torch.float64), far, -far)
    for ids_a, ids_b, block in run.gram_blocks(step, BLOCK, side.ids):
        a, b = (torch.from_numpy(np.searchsorted(side.ids, ids)) for ids in (ids_a, ids_b))
        inner = torch.from_numpy(block)
        different = a[:, None] < b  # every pair once
        distance = (1 - points[a].double() @ points[b].double().mT).clamp(0, 2)[different]
        stiffness = (inner / (norms[a][:, None] * norms[b]))[different], inner.sign()[different]
        place = (block_of[a][:, None] * J + block_of[b])[different]
        within = (labels[a][:, None] == labels[b])[different]
        found = merge_binned(found, _one_block(distance, stiffness, place, within, J, bins))
    return found


def _one_block(
    distance: Tensor, stiffness: tuple[Tensor, Tensor], place: Tensor, within: Tensor, J: int, bins: int
) -> Binned:
    """Of pairs in a row; `place` says which pair of bootstrap blocks each belongs to."""
    index = place * bins + (distance * (bins / 2)).long().clamp(max=bins - 1)
    cos, sign = stiffness
    columns = [torch.ones_like(distance), distance, distance**2, cos, cos * distance, sign, sign * distance]
    parts = [
        torch.stack([torch.bincount(index, column * mask, J * J * bins) for column in columns], dim=-1)
        for mask in (torch.ones_like(within), within)
    ]
    ends = torch.tensor([math.inf, -math.inf], dtype=torch.float64)
    lowest, highest = torch.cat([distance[within], ends[:1]]).amin(), torch.cat([distance[within], ends[1:]]).amax()
    return Binned(torch.stack(parts).view(2, J, J, bins, _COLUMNS), lowest, highest)


def _repeated(sums: Tensor, draws: int, seed: int) -> Iterator[Tensor]:
    """[r, pairs, M, 7]: the sums over resampled examples, r draws at a time; a pair has the product of its blocks'
    numbers of times drawn."""
    J = sums.shape[1]
    key = key_of("stiffness by distance", _VERSION, seed)
    for start in range(0, draws, _AT_A_TIME):
        draw = torch.arange(start, min(start + _AT_A_TIME, draws))
        row, column = (part.flatten() for part in torch.meshgrid(draw, torch.arange(J), indexing="ij"))
        words, *_ = philox(key, (row, column, torch.zeros_like(row), torch.zeros_like(row)))
        times = torch.nn.functional.one_hot(((words * J) >> 32).view(len(draw), J), J).sum(dim=1).double()
        yield torch.einsum("rj,rk,pjkmc->rpmc", times, times, sums)


def _bins(sums: Tensor, repeated: Sequence[Tensor]) -> Iterator[Bin]:
    total, drawn = sums.sum(dim=(1, 2)), torch.cat(list(repeated))  # [pairs, M, 7], [R, pairs, M, 7]
    M = total.shape[1]
    for kind, name in enumerate(KINDS):
        means, resampled = (t[..., 3 + 2 * kind] / t[..., 0] for t in (total, drawn))
        for p, which in enumerate(("all", "within")[: len(total)]):
            for m in range(M):
                count, distance = int(total[p, m, 0]), float(total[p, m, 1] / total[p, m, 0])
                error = _deviation(resampled[:, p, m])
                yield Bin(name, which, 2 * m / M, 2 * (m + 1) / M, count, distance, float(means[p, m]), error)


def _critical_length(binned: Binned, repeated: Sequence[Tensor], kind: int, n: int) -> CriticalLength:
    total = binned.sums[1].sum(dim=(0, 1, 2))
    intercept, slope = line(total, kind)
    length = float(crossing(total, kind, binned.lowest, binned.highest))
    drawn = torch.cat([crossing(part[:, 1].sum(dim=1), kind, binned.lowest, binned.highest) for part in repeated])
    missing = float(drawn.isnan().double().mean())
    known = not math.isnan(length) and missing <= _TAIL
    ends = torch.tensor([_TAIL, 1 - _TAIL], dtype=torch.float64)
    low, high = drawn.nanquantile(ends).tolist() if known else (math.nan, math.nan)
    estimate = Estimate(
        length,
        _deviation(drawn) if known else math.nan,
        n,
        "heuristic",
        f"stiffness/critical_length/{KINDS[kind]}/v1",
        "1 - cosine of inputs",
    )
    observed = float(binned.lowest), float(binned.highest)
    return CriticalLength(estimate, (low, high), missing, float(intercept), float(slope), observed)


def _deviation(values: Tensor) -> float:
    """Of those that are not NaN; NaN of fewer than two."""
    kept = values[~values.isnan()]
    return float(kept.std()) if len(kept) > 1 else math.nan


def _only(side: Side, kept: np.ndarray) -> Side:
    labels = None if side.labels is None else side.labels[kept]
    return Side(side.ids[kept], side.norms[kept], labels, side.zeros)
