"""How much the mean gradient and the mean loss change under noise on the weights.

Shapes: B examples, N draws, P entries of one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.grads.readings import GradientSums, Reading, Readings, SquaredNorms
from gradscale.grads.subject import Subject, read_batch
from gradscale.measures.gaussian_width import mean_and_error
from gradscale.measures.grouped import SEPARATOR, added
from gradscale.measures.measure import Estimate, Estimates, Gathering, MicroBatch
from gradscale.measures.perturbation import (
    DrawMeans,
    GaussianNoise,
    add_draws,
    draws_of,
    mean_of_draws,
    moved,
    no_draws,
)
from gradscale.task import Batch

HALVES = 2
_SUMS = GradientSums(by_class=True)
_READ: frozenset[Reading] = frozenset({SquaredNorms(), _SUMS})


class SensitivityState(NamedTuple):
    """A commutative monoid: changes of losses, and of sums of gradients over the examples of even and of odd id."""

    totals: Tensor  # [N + 1, D], see `DrawMeans`
    examples: Tensor  # [] int64
    counts: Tensor  # [2] int64, of the halves
    gradients: Mapping[str, Tensor]  # `half|draw|parameter`: [P] float64, sum_i g_i(w + xi) - g_i(w)


@dataclass(frozen=True)
class HalfChanges:
    """Cost: 1 + N forward and backward passes; 2 N P numbers."""

    noise: GaussianNoise

    @property
    def cost(self) -> str:
        return f"{1 + self.noise.num_draws} forward and backward passes at moved weights"

    def gather(self, subject: Subject, batch: Batch, ids: range, keep: Tensor) -> SensitivityState:
        half = torch.arange(ids.start, ids.stop) % HALVES
        before = read_batch(subject, batch, _READ, labels=half, exclude=~keep)
        finite, losses = before.finite, []
        gradients: dict[str, Tensor] = {}
        for draw in range(self.noise.num_draws):
            with moved(subject.parameters, self.noise.of(draw)):
                after = read_batch(subject, batch, _READ, labels=half, exclude=~keep)
            finite = finite & after.finite
            losses.append(after.losses - before.losses)
            gradients |= _changes(before, after, draw)
        if bool((keep & ~finite).any()):
            return self.gather(subject, batch, ids, keep & finite)
        values = draws_of(torch.stack(losses, dim=1)[keep])
        counts = torch.bincount(half[keep.cpu()], minlength=HALVES)
        return SensitivityState(values.totals, values.examples, counts, gradients)

    def merge(self, left: SensitivityState, right: SensitivityState) -> SensitivityState:
        values = add_draws(_values(left), _values(right))
        gradients = added(left.gradients, right.gradients)
        return SensitivityState(values.totals, values.examples, left.counts + right.counts, gradients)


@dataclass(frozen=True)
class Sensitivity:
    """`gradient` Gamma = E |g(w) - g(w + xi)|^2 of the mean gradient g, `value` gamma = E[L(w + xi) - L(w)].

    xi ~ N(0, sigma^2 I) over the measured parameters: N draws, the same for all examples. Gamma is without bias for the
    population's g: <Delta_A, Delta_B>, the changes of the mean gradients of two halves of the data (even and odd ids),
    whose noise is independent, where |Delta|^2 of one sample would be too large. It may be negative. Its standard error
    is over draws and does not hold the noise of the halves; that of gamma is over draws and over examples. NaN for
    N = 1. On a quadratic, Gamma = sigma^2 |H|_F^2 and gamma = sigma^2 tr H / 2. Take sigma so that the changes stand
    out from the rounding of the losses' dtype.

    Cost: 1 + N forward and backward passes; 2 N P numbers of state a shard. The weights are put back bit for bit.
    Source: Neu, Dziugaite, Haghifam and Roy (2021), COLT, theorem 1 (Gamma and -gamma, there Delta); Wang and Mao
    (2021), arXiv 2110.03128 (gamma).
    """

    sigma: float = 0.01
    num_draws: int = 4
    seed: int = 0

    name = "sensitivity"
    summary = (
        "E |g(w) - g(w + xi)|^2 and E L(w + xi) - L(w), xi ~ N(0, sigma^2 I); 1 + N passes; Neu et al. (2021), "
        "Wang & Mao, arXiv 2110.03128"
    )

    def __post_init__(self) -> None:
        GaussianNoise(self.num_draws, self.sigma, self.seed)

    @property
    def needs(self) -> frozenset[Gathering[SensitivityState]]:
        return frozenset({self.gathering})

    @property
    def gathering(self) -> HalfChanges:
        return HalfChanges(GaussianNoise(self.num_draws, self.sigma, self.seed))

    def init(self) -> SensitivityState:
        empty = no_draws(self.num_draws)
        return SensitivityState(empty.totals, empty.examples, torch.zeros(HALVES, dtype=torch.int64), {})

    def update(self, state: SensitivityState, batch: MicroBatch) -> SensitivityState:
        return self.merge(state, batch.gathered[self.gathering])

    def merge(self, left: SensitivityState, right: SensitivityState) -> SensitivityState:
        return self.gathering.merge(left, right)

    def compute(self, state: SensitivityState) -> Estimates:
        n = int(state.examples)
        rows = {
            "gradient": (*self._gradient(state), "(loss unit / parameter unit)^2"),
            "value": (*mean_of_draws(_values(state)), "loss units"),
        }
        return {
            (name, "all"): Estimate(value, error, n, "estimator", f"{self.name}/{name}/sigma={self.sigma:g}/v1", unit)
            for name, (value, error, unit) in rows.items()
        }

    def _gradient(self, state: SensitivityState) -> tuple[float, float]:
        if not bool(state.counts.all()):
            return math.nan, math.nan
        products = torch.zeros(self.num_draws, dtype=torch.float64)
        for key in sorted(key for key in state.gradients if key.startswith(f"0{SEPARATOR}")):
            draw = int(key.split(SEPARATOR)[1])
            products[draw] += state.gradients[key] @ state.gradients[f"1{key[1:]}"]
        return mean_and_error(products / float(state.counts.prod()))


def _values(state: SensitivityState) -> DrawMeans:
    return DrawMeans(state.totals, state.examples)


def _changes(before: Readings, after: Readings, draw: int) -> dict[str, Tensor]:
    changes: dict[str, Tensor] = {}
    for half, sums in after.sums[_SUMS].items():
        for name, total in sums.items():
            key = SEPARATOR.join((str(half), f"{draw:04d}", name))
            changes[key] = (total.double() - before.sums[_SUMS][half][name].double()).cpu()
    return changes
