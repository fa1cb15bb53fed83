"""The Loss Gradient Gaussian Width of the examples' gradients.

Shapes: B examples, N probes.
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
from gradscale.measures.measure import Estimate, Estimates, MicroBatch
from gradscale.sketches.dimensions import check_dim
from gradscale.sketches.gaussian import GaussianProbes


class WidthState(NamedTuple):
    """A commutative monoid: per probe, the largest and smallest product with the gradients seen, and their sum."""

    largest: Tensor  # [N] float64
    smallest: Tensor  # [N] float64
    total: Tensor  # [N] float64
    examples: Tensor  # [] int64


@dataclass(frozen=True)
class GaussianWidth:
    """w = E max_i <g_i, v> over standard normal v, for the set {g_i} of the examples' gradients at one checkpoint.

    `width` is the mean over N probes of max_i <g_i - mean g, v_j>: recentring leaves w unchanged, since
    E <c, v> = 0, and takes the common component's variance away. `symmetrized` is E max_i |<g_i, v>|, which
    does see the common component. Scope `all`: the set `examples@theta` of this checkpoint; scope `union`:
    the gradients at this and all earlier checkpoints of the run together. The same probes serve every
    checkpoint, so that differences between them have small errors. Standard errors: of the mean over
    probes. The width is that of the n examples measured and grows with n.

    Cost: N P products an example; state 3 N numbers, merged by elementwise maximum, minimum and sum.
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
        zero = torch.zeros(self.num_probes, dtype=torch.float64)
        return WidthState(zero - math.inf, zero + math.inf, zero, torch.tensor(0))

    def update(self, state: WidthState, batch: MicroBatch) -> WidthState:
        products = batch.projections[self._reading]  # [B, N]
        if not len(products):
            return state
        seen = WidthState(products.amax(0), products.amin(0), products.sum(0), torch.tensor(len(products)))
        return self.merge(state, WidthState(*(part.to(whole.device) for part, whole in zip(seen, state, strict=True))))

    def merge(self, left: WidthState, right: WidthState) -> WidthState:
        return WidthState(
            torch.maximum(left.largest, right.largest),
            torch.minimum(left.smallest, right.smallest),
            left.total + right.total,
            left.examples + right.examples,
        )

    def compute(self, state: WidthState) -> Estimates:
        return self._estimates(state, "all", "examples@theta")

    def compute_over_steps(self, states: Sequence[WidthState]) -> Estimates:
        return self._estimates(reduce(self.merge, states), "union", "examples@union")

    def _estimates(self, state: WidthState, scope: str, set_name: str) -> Estimates:
        n = int(state.examples)
        recentred = state.largest - state.total / max(n, 1)
        magnitudes = torch.maximum(state.largest.abs(), state.smallest.abs())
        unit = "loss units / parameter unit"
        return {
            (name, scope): Estimate(*_mean(values, n), n, "estimator", f"gaussian_width/{name}/{set_name}/v1", unit)
            for name, values in (("width", recentred), ("symmetrized", magnitudes))
        }


def _mean(values: Tensor, n: int) -> tuple[float, float]:
    """The mean over probes and its standard error; NaN of an empty set, and the error of a single probe."""
    if not n:
        return math.nan, math.nan
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), error
