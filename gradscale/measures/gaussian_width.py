"""The Loss Gradient Gaussian Width of the examples' gradients.

Shapes: B examples, N probes, S steps, D digits of an exact sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.grads.readings import Projected, Reading
from gradscale.measures.exact_sum import add_totals, total_of, value_of, zero_total
from gradscale.measures.measure import Estimate, Estimates, MicroBatch
from gradscale.sketches.dimensions import check_dim
from gradscale.sketches.gaussian import GaussianProbes

GRADIENT_UNIT = "loss units / parameter unit"


class WidthState(NamedTuple):
    """A commutative monoid, to the bit: per probe, the largest and smallest product of the points seen, and their sum.

    The sum is exact, so that no number depends on how the points were cut into shards or in which order those merge.
    """

    largest: Tensor  # [N] float64
    smallest: Tensor  # [N] float64
    total: Tensor  # [N, D] int64, see `exact_sum`
    examples: Tensor  # [] int64

    @property
    def mean(self) -> Tensor:
        """[N] float64: the probes' products with the mean point; NaN of an empty set."""
        return value_of(self.total) / self.examples


@dataclass(frozen=True)
class GaussianWidth:
    """w = E max_i <g_i, v> over standard normal v, for the set {g_i} of the examples' gradients at one checkpoint.

    `width` is the mean over N probes of max_i <g_i - mean g, v_j>: recentring leaves w unchanged, since
    E <c, v> = 0, and takes the common component's variance away. `symmetrized` is E max_i |<g_i, v>|, which
    does see the common component. Scope `all`: the set `examples@theta` of this checkpoint; scope `union`:
    the gradients at this and all earlier checkpoints of the run together.

    `path_width`, in scope `union` only, is E max_t <mean g(theta_t), v> over this and all earlier checkpoints t:
    the set `path` of the mean gradients, again recentred; its n counts checkpoints. Exact given the probes. Of a
    single checkpoint it is 0 on every probe: one point has no width. Checkpoints without a finite example have no
    mean gradient and are left out.

    The same probes serve every checkpoint, so that differences between them have small errors. Standard errors: of
    the mean over probes. The width is that of the n examples measured and grows with n.

    Cost: N P products an example; state 34 N numbers, merged by elementwise maximum, minimum and exact sum.
    Source: Banerjee et al. (2024), arXiv 2406.07712, whose set is not pinned down in what could be read of it;
    the definition here is the plain Gaussian width of a finite set.
    """

    num_probes: int = 64
    seed: int = 0

    name = "gaussian_width"
    summary = "E max_i <g_i, v> over N Gaussian v; one backward pass, N products; Banerjee et al., arXiv 2406.07712"

    def __post_init__(self) -> None:
        check_dim("num_probes", self.num_probes)

    @property
    def needs(self) -> frozenset[Reading]:
        return frozenset({self._reading})

    @property
    def _reading(self) -> Projected:
        return Projected(GaussianProbes(self.num_probes, self.seed))

    def init(self) -> WidthState:
        return empty_state(self.num_probes)

    def update(self, state: WidthState, batch: MicroBatch) -> WidthState:
        return merge_states(state, state_of(batch.projections[self._reading]))

    def merge(self, left: WidthState, right: WidthState) -> WidthState:
        return merge_states(left, right)

    def compute(self, state: WidthState) -> Estimates:
        return estimates_of(state, self.name, "all", "examples@theta", GRADIENT_UNIT)

    def compute_over_steps(self, states: Sequence[WidthState]) -> Estimates:
        union = estimates_of(reduce(merge_states, states), self.name, "union", "examples@union", GRADIENT_UNIT)
        return {**union, ("path_width", "union"): self._path(states)}

    def _path(self, states: Sequence[WidthState]) -> Estimate:
        means = [state.mean for state in states if state.examples]
        definition = f"{self.name}/width/path/v1"
        if not means:
            return Estimate(math.nan, math.nan, 0, "estimator", definition, GRADIENT_UNIT)
        path = torch.stack(means)  # [S, N]
        recentred = path.amax(dim=0) - path.mean(dim=0) if len(path) > 1 else torch.zeros_like(path[0])
        return Estimate(*mean_and_error(recentred), len(path), "estimator", definition, GRADIENT_UNIT)


def empty_state(num_probes: int) -> WidthState:
    infinite = torch.full((num_probes,), math.inf, dtype=torch.float64)
    return WidthState(-infinite, infinite, zero_total(num_probes), torch.tensor(0))


def state_of(products: Tensor) -> WidthState:
    """The state, on the CPU, of points whose products with the probes are [B, N]."""
    if not len(products):
        return empty_state(products.shape[1])
    here = products.cpu().double()
    return WidthState(here.amax(dim=0), here.amin(dim=0), total_of(here), torch.tensor(len(here)))


def merge_states(left: WidthState, right: WidthState) -> WidthState:
    return WidthState(
        torch.maximum(left.largest, right.largest),
        torch.minimum(left.smallest, right.smallest),
        add_totals(left.total, right.total),
        left.examples + right.examples,
    )


def estimates_of(state: WidthState, measure: str, scope: str, set_name: str, unit: str) -> Estimates:
    """`width` and `symmetrized` of the points that `state` has seen; NaN if it has seen none."""
    n = int(state.examples)
    magnitudes = torch.maximum(state.largest.abs(), state.smallest.abs())
    found = {"width": state.largest - state.mean, "symmetrized": magnitudes}
    return {
        (name, scope): Estimate(
            *(mean_and_error(values) if n else (math.nan, math.nan)),
            n,
            "estimator",
            f"{measure}/{name}/{set_name}/v1",
            unit,
        )
        for name, values in found.items()
    }


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean over probes and its standard error, which is NaN of a single probe."""
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), error
