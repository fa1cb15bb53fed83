"""Sign stiffness from a run's sketches: whether a step along one example's gradient lowers the loss of another.

Shapes: n examples, m of another set, a and b of them in a block, C classes, K sketch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.measures.measure import Estimates
from gradscale.measures.pairs import (
    ALL,
    PairMeans,
    class_estimates,
    means_between,
    means_within,
    whole_estimate,
    zeros_estimate,
)
from gradscale.run.plan import check_positive
from gradscale.run.sample import bottom_k
from gradscale.run.stiffness_between import check_same_weights, is_same
from gradscale.store.products import BLOCK
from gradscale.store.results import Run

MOST = 4096  # examples of a run: 8 million pairs


class Side(NamedTuple):
    """The examples of one run that pairs are made of, ascending by id."""

    ids: np.ndarray  # [n] int64
    norms: np.ndarray  # [n] float64, none of them 0
    labels: np.ndarray | None  # [n] int64
    zeros: int  # examples asked for that have a zero gradient


class Tally(NamedTuple):
    """Of every example of one side, sums over the examples of the other."""

    signs: Tensor  # [n, C] float64, by the other's class
    undetermined: Tensor  # [n, 1] float64


def sign_stiffness(
    run: Run,
    step: int,
    ids: Sequence[int] | None = None,
    other: Run | None = None,
    most: int = MOST,
    seed: int = 0,
) -> Estimates:
    """The mean of sign <g_i, g_j> over the pairs of different examples i != j, by (name, scope).

    `sign` with scope `all`; where the run has labels, `sign_within`, `sign_between`, and `sign` with scope
    `class:<a>,<b>`, the class matrix, as `Stiffness` has them of the cosine. sign(0) is 0. With `other`, over pairs of
    an example of `run` with one of `other` (training and validation, say), measured at `step` with the same weights;
    the class matrix has `run`'s classes in its rows.

    `ids` picks examples of `run` (None: all finite ones). Of more than `most` in a run, `bottom_k` of their ids are
    taken, the same for every sharding; n says how many. A zero gradient has no direction: such examples are left out
    and counted, `zero_gradients`.

    Signs come from inner products of sketches. By a sketch of K numbers one is likely to flip only where |cos| is not
    large beside 1 / sqrt(K): `undetermined` is the share of pairs with |cos| < 2 / sqrt(K), by exact norms. It is 0 of
    the identity, which is exact up to rounding to the stored type. Standard errors: jackknife over examples, never
    over pairs (with `other`, over those of either run, squares added); they do not hold the flips.

    Cost: n^2 K / 2 operations, n m K with `other`; memory of 2048 sketches, some blocks, and n C numbers.
    Raises: GradscaleError if there are no sketches, an id is unknown, or the two runs may not be compared: other
    parameters, another checkpoint or scheme, or another run of the same examples.
    Source: Fort, Nowak, Jastrzebski and Narayanan (2019), arXiv 1901.09491, section 2: their equation for S_sign.
    """
    check_positive(most=most)
    if other is not None:
        check_same_weights(run, other, step)
        other = None if is_same(run, other) else other
    scheme = run.plan["sketch"]
    first = side_of(run, step, ids, most, seed)
    if other is None:
        return _within(run, step, first, scheme)
    return _between(run, other, step, first, side_of(other, step, None, most, seed), scheme)


def side_of(run: Run, step: int, ids: Sequence[int] | None, most: int, seed: int) -> Side:
    """Those of the examples `ids` (None: all) with a direction, or a sample of at most `most` of them."""
    stored = run.stored_sketches(step)
    positions = np.arange(len(stored.ids)) if ids is None else np.unique(stored.positions(ids))
    directed = positions[stored.sq_norms[positions] > 0]
    chosen = bottom_k(stored.ids[directed], most, seed)
    if not len(chosen):
        raise GradscaleError(
            f"ids must name at least one finite example with a gradient other than zero at step {step}, got none"
        )
    norms = np.sqrt(stored.sq_norms[stored.positions(chosen)])
    return Side(chosen, norms, _labels(run, step, chosen), len(positions) - len(directed))


def undetermined_below(scheme: Mapping[str, Any]) -> float:
    """The |cos| under which the sign of a sketched product may well be another: 2 / sqrt(K); 0 of the identity."""
    return 0.0 if scheme["name"] == "identity" else 2 / math.sqrt(int(scheme["dim"]))


def _within(run: Run, step: int, side: Side, scheme: Mapping[str, Any]) -> Estimates:
    classes, (own,) = _classes(side)
    members, C = torch.nn.functional.one_hot(own, len(classes)).double(), len(classes)
    tally = _empty(len(own), C)
    limit = undetermined_below(scheme)
    for ids_a, ids_b, block in run.gram_blocks(step, BLOCK, side.ids):
        a, b = _slice(side, ids_a), _slice(side, ids_b)
        signs, unclear = _judged(block, side.norms[a], side.norms[b], limit)
        if a == b:
            signs.fill_diagonal_(0)
            unclear.fill_diagonal_(0)
        else:
            _add(tally, b, signs.mT, unclear.mT, members[a])
        _add(tally, a, signs, unclear, members[b])
    signs_found = means_within(tally.signs, own, C)
    unclear_found = means_within(tally.undetermined, torch.zeros_like(own), 1)
    return _estimates(classes, signs_found, unclear_found, side.labels is not None, side.zeros, scheme, True)


def _between(run: Run, other: Run, step: int, first: Side, second: Side, scheme: Mapping[str, Any]) -> Estimates:
    classes, (own, theirs) = _classes(first, second)
    C = len(classes)
    rows, columns = (torch.nn.functional.one_hot(group, C).double() for group in (own, theirs))
    ours, back = _empty(len(own), C), _empty(len(theirs), C)
    limit = undetermined_below(scheme)
    for ids_a, ids_b, block in run.cross_gram_blocks(other, step, None, BLOCK, first.ids, second.ids):
        a, b = _slice(first, ids_a), _slice(second, ids_b)
        signs, unclear = _judged(block, first.norms[a], second.norms[b], limit)
        _add(ours, a, signs, unclear, columns[b])
        _add(back, b, signs.mT, unclear.mT, rows[a])
    found = means_between(ours.signs, own, back.signs, theirs, C)
    nothing = torch.zeros_like(own), torch.zeros_like(theirs)
    unclear_found = means_between(ours.undetermined, nothing[0], back.undetermined, nothing[1], 1)
    labelled = first.labels is not None and second.labels is not None
    return _estimates(classes, found, unclear_found, labelled, first.zeros + second.zeros, scheme, False)


def _estimates(
    classes: Sequence[int],
    signs: PairMeans,
    unclear: PairMeans,
    labelled: bool,
    zeros: int,
    scheme: Mapping[str, Any],
    symmetric: bool,
) -> Estimates:
    definition = f"stiffness/{scheme['name']}:{scheme['dim']}"
    found = {**whole_estimate("sign", signs, definition), **whole_estimate("undetermined", unclear, definition)}
    if labelled:
        found |= class_estimates("sign", classes, signs, definition, symmetric)
    return {**found, **zeros_estimate(zeros, int(signs.sizes[ALL]))}


def _judged(block: np.ndarray, norms_a: np.ndarray, norms_b: np.ndarray, limit: float) -> tuple[Tensor, Tensor]:
    """The signs [a, b] of inner products, and where they are undetermined."""
    inner = torch.from_numpy(block)
    lengths = torch.from_numpy(norms_a)[:, None] * torch.from_numpy(norms_b)
    return inner.sign(), (inner.abs() < limit * lengths).double()


def _add(tally: Tally, part: slice, signs: Tensor, unclear: Tensor, members: Tensor) -> None:
    tally.signs[part] += signs @ members
    tally.undetermined[part] += unclear.sum(dim=1, keepdim=True)


def _empty(n: int, C: int) -> Tally:
    return Tally(torch.zeros(n, C, dtype=torch.float64), torch.zeros(n, 1, dtype=torch.float64))


def _slice(side: Side, ids: np.ndarray) -> slice:
    """Where a block of consecutive examples lies."""
    start = int(np.searchsorted(side.ids, ids[0]))
    return slice(start, start + len(ids))


def _classes(*sides: Side) -> tuple[list[int], list[Tensor]]:
    """The classes of all, ascending, and where each example's is among them; a single one unless all have labels."""
    labels = [np.zeros(len(side.ids), np.int64) if side.labels is None else side.labels for side in sides]
    if any(side.labels is None for side in sides):
        labels = [np.zeros_like(one) for one in labels]
    classes = np.unique(np.concatenate(labels))
    return classes.tolist(), [torch.from_numpy(np.searchsorted(classes, one)) for one in labels]


def _labels(run: Run, step: int, ids: np.ndarray) -> np.ndarray | None:
    """[n] int64, or None if the run has none."""
    if not run.plan["labels"]:
        return None
    frame = run.sql(f"select example_id, label from rows where step = {int(step)} order by example_id")
    found: np.ndarray = frame["label"].to_numpy()[np.searchsorted(frame["example_id"].to_numpy(), ids)]
    return found
