"""Eigenvalues at the ends of a spectrum by Lanczos, on vectors cut into slices: one process and a gang alike.

Every product is orthogonalized twice: by the recurrence, then against all that are held, in two sweeps over the basis,
and again where that took more than a thousandth off. The basis is then orthonormal to rounding, and by Cauchy's
interlacing no list of Ritz values has a value more often than the operator has eigenvalues there: ghosts cannot come
up. A cap on the basis is kept by thick restarts. What there is of T is `LanczosState.projected`, whatever the restarts
and blocks have made of its shape.

Shapes: p entries here, j vectors multiplied so far, b to be multiplied next, k values wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.curvature.krylov import LanczosState, Plan, advanced, begun, rounding_level
from gradscale.curvature.operator import Operator, dots
from gradscale.curvature.ritz import WHICH, Goal, Pairs, accurate, error_bounds, is_complete, ranked, ritz_pairs
from gradscale.curvature.slices import combine
from gradscale.errors import GradscaleError

__all__ = ["LanczosState", "Ritz", "lanczos"]


class Ritz(NamedTuple):
    """k' <= k wanted values, descending, with their vectors and errors."""

    values: Tensor  # [k'] float64
    residuals: Tensor  # [k']: |A y - theta y|, from the recurrence; an eigenvalue lies that near
    errors: Tensor  # [k']: min(r, r^2 / gap) and the noise; conditional where the second is taken
    converged: Tensor  # [k'] bool
    vectors: Tensor  # [k', p], of the start's type
    complete: bool  # all k converged and nothing left that could add to them: see `lanczos`
    steps: int
    products: int  # vectors multiplied
    restarts: int
    orthogonality: float  # max |Q Q^T - I| of the basis at the end
    noise: float
    state: LanczosState


def lanczos(
    operator: Operator,
    start: Tensor | LanczosState,
    top: int = 1,
    max_steps: int = 300,
    tolerance: float = 1e-6,
    basis_cap: int | None = None,
    which: str = "largest",
    seed: int = 0,
    on_step: Callable[[LanczosState], None] | None = None,
) -> Ritz:
    """The `top` eigenvalues of a symmetric operator: the `largest`, those of `both` ends, or largest in `magnitude`.

    `both` is half of each, of an odd number one more of the largest. `start` is a vector [p], a block [b, p] of them,
    or the state of a run to go on with, under the same settings (`max_steps` counts from the beginning). A run ends
    when min(r, r^2 / gap) of every wanted value is within `tolerance` of the value (of a thousandth of the norm, if
    that is more), or r within rounding or the operator's own noise, or after `max_steps` blocks of products; what is
    not accurate then is not `converged`.

    What is promised of equal eigenvalues: a Krylov space shows min(m, b) copies of an eigenvalue of multiplicity m,
    for almost every start. One that is exhausted, below `10 eps |A|`, is followed by a fresh random vector, keyed by
    `seed`, orthogonal to it, and the list is complete only when that has nothing to add: so all copies are found where
    the distinct eigenvalues are fewer than the steps (low rank, small problems), and otherwise up to b of each.
    Almost every start: one orthogonal to an eigenvector will not show it, unless its space is exhausted.

    `basis_cap` is the number of vectors held, by default 20 or 2 top + 2 b + 2 if that is more, and is reached before
    the first restart. Memory: that times p numbers of the start's type, k p of the answer, and b p. Costs: 2 readings
    of the basis a step, and with N processes four sums of (j + b) b numbers. All processes take the same decisions
    from the same sums, with the same eigensolver: the machines should be alike.

    Raises: GradscaleError if top is less than 1 or more than P, the start is zero, not finite or no slice of a vector,
    a product is not finite or of another shape, the cap holds too few, or another setting is out of range.
    Source: Wu and Simon (2000), SIAM J. Matrix Anal. Appl. 22, for thick restarts; Daniel, Gragg, Kaufman and Stewart
    (1976), Math. Comp. 30, for orthogonalizing twice; Golub and Underwood (1977) for blocks.
    """
    vectors = start.basis if isinstance(start, LanczosState) else torch.atleast_2d(start)
    block = start.block if isinstance(start, LanczosState) else len(vectors)
    goal = Goal(top, which, tolerance)
    _check(operator, vectors, goal, max_steps)
    plan = Plan(goal, _cap(operator, goal, block, basis_cap), seed)
    storage = vectors.new_empty(plan.cap, vectors.shape[1])
    state = _taken(storage, start) if isinstance(start, LanczosState) else begun(operator, storage, vectors, plan)
    del start, vectors  # whose basis is in the storage now
    pairs = ritz_pairs(state.projected, state.pending, state.components)
    while state.step < max_steps and not _is_over(pairs, state, goal):
        state = advanced(operator, storage, state, plan)
        pairs = ritz_pairs(state.projected, state.pending, state.components)
        if on_step is not None:
            on_step(state)
    return _answer(operator, pairs, state, goal)


def _taken(storage: Tensor, state: LanczosState) -> LanczosState:
    """The state with its basis in `storage`."""
    held = len(state.basis)
    if held > len(storage):
        raise GradscaleError(
            f"basis_cap must hold the {held} vectors of the state, got {len(storage)}; go on with the settings "
            "that the run began with"
        )
    storage[:held] = state.basis
    return state._replace(basis=storage[:held])


def _is_over(pairs: Pairs, state: LanczosState, goal: Goal) -> bool:
    return state.pending == 0 or is_complete(pairs, int(state.components[-1]), goal, rounding_level(state))


def _answer(operator: Operator, pairs: Pairs, state: LanczosState, goal: Goal) -> Ritz:
    places = ranked(pairs.values, goal.which)[: goal.top]
    places = places[torch.argsort(pairs.values[places], descending=True, stable=True)]
    basis = state.basis
    vectors = basis.new_empty(len(places), basis.shape[1])
    combine(pairs.coordinates[:, places].mT, basis[: len(pairs.values)], vectors)
    unit = torch.eye(len(basis), dtype=torch.float64)
    return Ritz(
        values=pairs.values[places],
        residuals=pairs.residuals[places],
        errors=error_bounds(pairs.values, pairs.residuals)[places] + state.noise,
        converged=accurate(pairs, goal.tolerance, rounding_level(state))[places],
        vectors=vectors,
        complete=len(places) == goal.top and _is_over(pairs, state, goal),
        steps=state.step,
        products=state.products,
        restarts=state.restarts,
        orthogonality=float((dots(operator, basis, basis).cpu() - unit).abs().max()),
        noise=state.noise,
        state=state,
    )


def _check(operator: Operator, vectors: Tensor, goal: Goal, max_steps: int) -> None:
    if not 1 <= goal.top <= operator.size:
        raise GradscaleError(
            f"top must be at least 1 and at most the {operator.size} entries of a vector, got {goal.top}; ask for "
            "fewer eigenvalues"
        )
    if goal.which not in WHICH:
        raise GradscaleError(f"which must be one of {', '.join(WHICH)}, got {goal.which}; largest is usual")
    if not goal.tolerance > 0:
        raise GradscaleError(f"tolerance must be positive, got {goal.tolerance}; 1e-6 of each eigenvalue is usual")
    if max_steps < 1:
        raise GradscaleError(f"max_steps must be at least 1, got {max_steps}; 300 is the default")
    if vectors.shape[1] != len(operator.here) or vectors.dtype not in (torch.float32, torch.float64):
        raise GradscaleError(
            f"start must be float32 or float64 vectors of the {len(operator.here)} entries that this process holds, "
            f"got {vectors.dtype} of shape {tuple(vectors.shape)}; pass the slice operator.here of each"
        )


def _cap(operator: Operator, goal: Goal, block: int, basis_cap: int | None) -> int:
    least = min(operator.size, goal.top + 2 + 2 * block)
    if not 1 <= block <= operator.size:
        raise GradscaleError(f"start must be 1 to {operator.size} vectors, got {block}; pass fewer")
    if basis_cap is None:
        return min(operator.size, max(20, 2 * goal.top + 2 + 2 * block))
    if basis_cap < least:
        raise GradscaleError(
            f"basis_cap must be at least {least} for top = {goal.top} and blocks of {block}, got {basis_cap}; raise it"
        )
    return min(operator.size, basis_cap)
