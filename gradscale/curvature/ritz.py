"""Ritz pairs of a projected matrix: which are wanted, how far off they are, and whether the list is complete.

The basis falls into components: Krylov spaces that A maps into themselves, each begun with a fresh vector where the
one before it was exhausted. They are decomposed one by one, for eigenvectors of equal eigenvalues would mix them.

Shapes: n vectors multiplied so far, b to be multiplied next.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SMALL = 1e-3
WHICH = ("largest", "both", "magnitude")


class Pairs(NamedTuple):
    """Of the n vectors, float64, in no order."""

    values: Tensor  # [n]
    coordinates: Tensor  # [n, n]: column i is the Ritz vector of value i in the basis
    residuals: Tensor  # [n]: |A y_i - theta_i y_i|
    components: Tensor  # [n] int64


class Goal(NamedTuple):
    """When a list is complete."""

    top: int
    which: str
    tolerance: float


def ritz_pairs(projected: Tensor, pending: int, components: Tensor) -> Pairs:
    """Of T = Q A Q^T, `projected` [n + b, n + b], whose last b = `pending` rows couple the vectors not multiplied yet.

    The residual of a Ritz pair is |beta u_nj| with a block of them: |u_j^T T[:n, n:]|.
    """
    n = len(projected) - pending
    values, coordinates = projected.new_zeros(n), projected.new_zeros(n, n)
    done = components[:n]
    for component in done.unique().tolist():
        at = (done == component).nonzero().flatten()
        values[at], coordinates[at[:, None], at] = torch.linalg.eigh(projected[at[:, None], at])
    residuals = (coordinates.mT @ projected[:n, n:]).norm(dim=1) if pending else values.new_zeros(n)
    return Pairs(values, coordinates, residuals, done)


def ranked(values: Tensor, which: str) -> Tensor:
    """[n]: places of `values` from the most wanted on; of equal ones the earlier first.

    `both` takes in turn the largest that is left and the smallest.
    """
    order = torch.argsort(values.abs() if which == "magnitude" else values, descending=True, stable=True)
    if which != "both":
        return order
    turns = torch.stack([order, order.flip(0)], dim=1).flatten()
    return turns[: len(order)]


def error_bounds(values: Tensor, residuals: Tensor) -> Tensor:
    """[n]: min(r, r^2 / gap), with the gap from each value to the nearest interval theta_j +- r_j of another.

    Some eigenvalue lies within r of theta, whatever else there is. The second bound, of Kato and Temple, holds if no
    eigenvalue that has not been seen lies within the gap: it is conditional on that.
    Source: Parlett (1998), The Symmetric Eigenvalue Problem, theorems 4.5.1 and 11.7.1.
    """
    if len(values) < 2:
        return residuals
    distances = (values[:, None] - values).abs() - residuals
    gaps = distances.fill_diagonal_(torch.inf).amin(dim=1)
    return torch.where(gaps > residuals, residuals.square() / gaps, residuals)


def accurate(pairs: Pairs, tolerance: float, floor: float) -> Tensor:
    """[n] bool: the error is within `tolerance` of the value, or the residual at `floor`, the level of rounding.

    Of values below a thousandth of the largest magnitude, within `tolerance` of that thousandth.
    """
    errors, sizes = error_bounds(pairs.values, pairs.residuals), pairs.values.abs()
    return (errors <= tolerance * sizes.clamp(min=_SMALL * float(sizes.max()))) | (pairs.residuals <= floor)


def is_complete(pairs: Pairs, open_component: int, goal: Goal, floor: float) -> bool:
    """Whether the wanted values are accurate, and the newest component has shown what it could add to them.

    `open_component` is that of the vectors to be multiplied next; every other is exhausted. An exhausted component
    shows each of its eigenvalues once, so that the one after it may hold another copy of each: the list is complete
    when the newest component has nothing for it, or is still open and its own first value is accurate.
    """
    if len(pairs.values) < goal.top:
        return False
    good, listed = accurate(pairs, goal.tolerance, floor), ranked(pairs.values, goal.which)[: goal.top]
    newest = int(pairs.components.max())
    own = (pairs.components == newest).nonzero().flatten()
    ends = own[ranked(pairs.values[own], goal.which)[: ends_of(goal.which)]]
    if not bool(good[listed].all() and good[ends].all()):
        return False
    return newest == open_component or not bool(torch.isin(ends, listed).any())


def kept_at_restart(pairs: Pairs, open_component: int, goal: Goal, room: int) -> Tensor:
    """[l] places of the Ritz vectors to go on with, at most `room`: the first of the open component, and the wanted."""
    own = (pairs.components == open_component).nonzero().flatten()
    first = own[ranked(pairs.values[own], goal.which)[: ends_of(goal.which)]]
    rest = ranked(pairs.values, goal.which)
    return torch.cat([first, rest[~torch.isin(rest, first)]])[:room]


def ends_of(which: str) -> int:
    return 2 if which == "both" else 1
