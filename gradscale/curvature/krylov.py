"""Steps of Lanczos: a block of products more, orthogonalized against all that is held, with restarts under a cap.

Shapes: p entries here, n = j + b vectors held, j multiplied so far, b to be multiplied next, r of a new block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.curvature.operator import Operator
from gradscale.curvature.probes import FlatProbes
from gradscale.curvature.ritz import Goal, kept_at_restart, ritz_pairs
from gradscale.curvature.slices import Swept, combine, orthonormalize, sweep, trim
from gradscale.errors import GradscaleError

_SMALL = 1e-3  # of a vector's length: overlaps that leave no more than rounding when they have been taken off
_ROUNDING = 10  # times the rounding unit and the operator's norm: the level at which a residual is none


class LanczosState(NamedTuple):
    """Where a run stands after a step: `lanczos` goes on from it to the same bits as one that never stopped.

    Of a run with one start vector and without restart so far, `projected` is tridiagonal with the alphas on its
    diagonal and the betas beside it. A step changes rows of `basis` only after those it holds, but for a restart: copy
    what is to be kept.
    """

    basis: Tensor  # [j + b, p], orthonormal, of the start's type; the last b have not been multiplied yet
    projected: Tensor  # [j + b, j + b] float64: Q A Q^T, zero between the last b
    components: Tensor  # [j + b] int64, see `ritz`
    block: int  # of the start
    pending: int  # b: the block, or what is left of R^P if that is less; 0 when all of it is spanned
    step: int  # blocks of products so far
    products: int  # vectors multiplied so far
    fresh: int  # vectors drawn where a Krylov space was exhausted
    restarts: int
    scale: float  # the largest |A q| so far: a lower bound of the norm
    noise: float  # the largest |(A q_i) - T| in the basis: what asymmetry, rounding and dropped directions make


@dataclass(frozen=True)
class Plan:
    """What the steps depend on beside the state."""

    goal: Goal
    cap: int  # vectors held
    seed: int

    def kept(self, block: int) -> int:
        """How many vectors a restart keeps: the wanted, two more, and half of the others that there is room for."""
        least = self.goal.top + 2
        return least + (self.cap - least - 2 * block) // 2


def rounding_level(state: LanczosState) -> float:
    """The residual that cannot be told from none: that of rounding, or of the operator's own noise if it is more."""
    return max(_ROUNDING * torch.finfo(state.basis.dtype).eps * state.scale, state.noise)


def begun(operator: Operator, storage: Tensor, start: Tensor, plan: Plan) -> LanczosState:
    """The state before the first step, in the rows of `storage` [cap, p].

    Raises: GradscaleError if a vector of the start is zero or not finite.
    """
    vectors, nothing = start.clone(), storage[:0]
    found = sweep(operator, nothing, vectors)
    lengths = found.gram.diagonal()
    if not bool((lengths > 0).all() and lengths.isfinite().all()):
        raise GradscaleError(
            f"start must have finite vectors of positive length, got squared lengths {lengths.tolist()}; draw a "
            "random one"
        )
    vectors /= lengths.sqrt().to(vectors)[:, None]
    found = sweep(operator, nothing, vectors)
    made = orthonormalize(operator, nothing, vectors, found, _ROUNDING * torch.finfo(vectors.dtype).eps)
    none, components = torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    empty = LanczosState(nothing, none, components, len(start), 0, 0, 0, 0, 0, 0.0, 0.0)
    return _appended(operator, storage, empty, vectors, none.new_zeros(0, made.coefficients.shape[1]), plan)


def advanced(operator: Operator, storage: Tensor, state: LanczosState, plan: Plan) -> LanczosState:
    """The state after one block of products more.

    Raises: GradscaleError if they are not finite, or of another shape or type than the vectors.
    """
    n = len(state.projected)
    j, basis = n - state.pending, storage[:n]
    product = storage[n : n + state.pending] if n + state.pending <= plan.cap else torch.empty_like(basis[j:])
    product.copy_(_product(operator, basis[j:], state.step))
    whole = sweep(operator, basis[j:], product)
    _check_finite(whole.gram, state.step)
    recurrence = torch.cat([state.projected[:j, j:], whole.overlaps])
    near = _first_coupled(state)
    sweep(operator, basis[near:], product, recurrence[near:])
    rest = sweep(operator, basis, product)
    last = (trim if _are_small(rest) else sweep)(operator, basis, product, rest.overlaps)
    found = recurrence + rest.overlaps + last.overlaps  # [n, b]: Q A of the pending vectors
    off = (found[:j] - state.projected[:j, j:]).norm(dim=0)
    own = found[j:]
    projected = state.projected.clone()
    projected[j:, j:] = (own + own.mT) / 2
    scale = max(state.scale, math.sqrt(float(whole.gram.diagonal().max())))
    noise = max(state.noise, float(off.max()), float((own - own.mT).abs().max()) / 2)
    floor = _ROUNDING * torch.finfo(product.dtype).eps * scale
    made = orthonormalize(operator, basis, product, last, floor)
    done = state._replace(
        projected=projected,
        step=state.step + 1,
        products=state.products + state.pending,
        scale=scale,
        noise=max(noise, made.dropped),
    )
    coupling = torch.cat([made.coefficients.new_zeros(j, made.coefficients.shape[1]), made.coefficients])
    return _appended(operator, storage, done, product, coupling, plan)


def _first_coupled(state: LanczosState) -> int:
    """The first row of the basis that T couples to the pending vectors; those themselves if there is none."""
    j = len(state.projected) - state.pending
    coupled = state.projected[:j, j:].any(dim=1).nonzero()
    return int(coupled[0]) if len(coupled) else j


def _are_small(found: Swept) -> bool:
    """Whether no direction in the span of the vectors has overlaps that must be read again when taken off."""
    shortest = float(torch.linalg.eigvalsh(found.gram)[0])
    return shortest > 0 and float(found.overlaps.abs().max()) <= _SMALL * math.sqrt(shortest)


def _appended(
    operator: Operator,
    storage: Tensor,
    state: LanczosState,
    vectors: Tensor,
    coupling: Tensor,
    plan: Plan,
) -> LanczosState:
    """All n vectors of `state` are multiplied: next come `vectors` [r, p], coupled to them by `coupling` [n, r].

    Where r is less than the block, for the Krylov space is exhausted, fresh vectors fill it up.
    """
    n, components = len(state.projected), state.components
    block = min(state.block, operator.size - n)
    r = min(coupling.shape[1], block)
    latest = int(components[-1]) if n else 0
    if n + block > plan.cap:
        pairs = ritz_pairs(state.projected, 0, components)
        places = kept_at_restart(pairs, latest, plan.goal, plan.kept(state.block))
        combine(pairs.coordinates[:, places].mT.contiguous(), storage[:n], storage[: len(places)])
        coupling = pairs.coordinates[:, places].mT @ coupling
        components, n = pairs.components[places], len(places)
        state = state._replace(projected=torch.diag(pairs.values[places]), restarts=state.restarts + 1)
    storage[n : n + r] = vectors[:r]
    fresh = state.fresh
    for place in range(n + r, n + block):
        fresh = _draw(operator, storage, place, fresh, plan)
    projected = torch.zeros(n + block, n + block, dtype=torch.float64)
    projected[:n, :n] = state.projected
    projected[:n, n : n + r] = coupling[:, :r]
    projected[n : n + r, :n] = coupling[:, :r].mT
    component = torch.full((block,), latest if r else latest + 1)
    return state._replace(
        basis=storage[: n + block],
        projected=projected,
        components=torch.cat([components, component]),
        pending=block,
        fresh=fresh,
    )


def _draw(operator: Operator, storage: Tensor, place: int, fresh: int, plan: Plan) -> int:
    """Puts a random unit vector orthogonal to those before it at `place`; how many have been drawn by then."""
    basis, vector = storage[:place], storage[place : place + 1]
    probes = FlatProbes(operator.here, plan.seed, dtype=storage.dtype, device=str(storage.device))
    while True:
        vector.copy_(probes(range(fresh, fresh + 1)))
        fresh += 1
        first = sweep(operator, basis, vector)
        second = sweep(operator, basis, vector, first.overlaps)
        last = sweep(operator, basis, vector, second.overlaps)
        made = orthonormalize(operator, basis, vector, last, 1e-3 * math.sqrt(float(first.gram) / operator.size))
        if made.coefficients.shape[1]:
            return fresh


def _product(operator: Operator, vectors: Tensor, step: int) -> Tensor:
    """Raises: GradscaleError if they are of another shape or type."""
    found = operator.products(vectors)
    if found.shape != vectors.shape or found.dtype != vectors.dtype:
        raise GradscaleError(
            f"product {step} must have the vectors' shape {tuple(vectors.shape)} and type {vectors.dtype}, got "
            f"{tuple(found.shape)} and {found.dtype}; see Operator.products"
        )
    return found


def _check_finite(gram: Tensor, step: int) -> None:
    if not bool(gram.isfinite().all()):
        raise GradscaleError(
            f"product {step} of the operator must be finite, got a vector of squared length "
            f"{gram.diagonal().tolist()}; look for the example whose loss or gradient is not, or measure in float32"
        )
