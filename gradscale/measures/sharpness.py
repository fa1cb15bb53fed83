"""How much the loss rises around the weights: on average, and along the gradient of a batch.

Shapes: B examples, N draws, D digits of an exact sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradscale.errors import GradscaleError
from gradscale.grads.subject import Subject
from gradscale.measures.exact_sum import add_totals, total_of, value_of
from gradscale.measures.measure import Estimate, Estimates, Gathering, MicroBatch, Observation
from gradscale.measures.perturbation import (
    DrawMeans,
    GaussianNoise,
    add_draws,
    draws_of,
    losses_at,
    mean_of_draws,
    moved,
    no_draws,
)
from gradscale.task import Batch

UNIT = "loss units"


@dataclass(frozen=True)
class LossChanges:
    """l_b(w + xi_j) - l_b(w): [B, N] float64. Cost: 1 + N forward passes."""

    noise: GaussianNoise

    @property
    def cost(self) -> str:
        return f"{1 + self.noise.num_draws} forward passes at moved weights"

    def observe(self, subject: Subject, batch: Batch, ids: range) -> Tensor:
        before, columns = losses_at(subject, batch), []
        for draw in range(self.noise.num_draws):
            with moved(subject.parameters, self.noise.of(draw)):
                columns.append(losses_at(subject, batch) - before)
        return torch.stack(columns, dim=1)


class AscentState(NamedTuple):
    """Of microbatches by their number of examples: how many, and exact sums of d and d^2; and |w|^2."""

    batches: Mapping[str, Tensor]  # [] int64
    totals: Mapping[str, Tensor]  # [2, D]
    weights: Tensor  # [] float64


@dataclass(frozen=True)
class BatchAscent:
    """d = L(w + rho g / |g|) - L(w), L the mean loss of a microbatch and g its gradient; 0 where g is.

    It depends on the batch, by definition. Cost: two forward passes and a backward pass.
    """

    rho: float

    cost = "two forward passes and a backward pass of every microbatch"

    def gather(self, subject: Subject, batch: Batch, ids: range, keep: Tensor) -> AscentState:
        weights = torch.stack([p.detach().double().square().sum() for p in subject.parameters.values()]).sum().cpu()
        if not bool(keep.any()):
            return AscentState({}, {}, weights)
        with torch.enable_grad():
            before = subject.task.losses(subject.model, batch)[keep].mean()
            found = torch.autograd.grad(before, list(subject.parameters.values()), allow_unused=True)
        grads = {name: g for name, g in zip(subject.parameters, found, strict=True) if g is not None}
        norm = torch.stack([g.double().square().sum() for g in grads.values()]).sum().sqrt()
        scale = float(self.rho / norm) if float(norm) > 0 else 0.0

        def ascent(name: str, parameter: nn.Parameter) -> Tensor:
            return scale * grads[name] if name in grads else torch.zeros_like(parameter)

        with moved(subject.parameters, ascent):
            after = losses_at(subject, batch)[keep].mean()
        d = (after - before.detach().double()).cpu()
        if not bool(d.isfinite()):
            return AscentState({}, {}, weights)
        size = f"{int(keep.sum()):06d}"
        return AscentState({size: torch.tensor(1)}, {size: total_of(torch.stack([d, d.square()])[None])}, weights)

    def merge(self, left: AscentState, right: AscentState) -> AscentState:
        batches, totals = {**left.batches}, {**left.totals}
        for size, count in right.batches.items():
            there = size in batches
            batches[size] = batches[size] + count if there else count
            totals[size] = add_totals(totals[size], right.totals[size]) if there else right.totals[size]
        return AscentState(batches, totals, torch.maximum(left.weights, right.weights))


class SharpnessState(NamedTuple):
    """A commutative monoid, to the bit: a `DrawMeans` and an `AscentState`."""

    totals: Tensor
    examples: Tensor
    ascent_batches: Mapping[str, Tensor]
    ascent_totals: Mapping[str, Tensor]
    weights: Tensor


@dataclass(frozen=True)
class Sharpness:
    """`average` E L(w + xi) - L(w), xi ~ N(0, sigma^2 I), and `sam` L_B(w + rho g_B / |g_B|) - L_B(w) on batches B.

    With `adaptive`, xi is scaled entry by entry by |w|. `average`: N draws, the same for all examples; standard error
    over draws and examples (NaN for N = 1); about sigma^2 tr H / 2, exactly on a quadratic. `sam`: on the microbatches
    of the run, whose size m is part of the definition (`sam/m=32/...`), since small batches have larger gradients:
    those with m finite examples, m the largest there is; n counts them, standard error over them. On a quadratic it is
    rho |g| + rho^2 g^T H g / (2 |g|^2). `weight_norm` |w| of the measured parameters, exact, stands beside them: a
    rescaling that leaves the function as it is (Dinh et al. 2017, arXiv 1703.04933) changes all but the adaptive.

    The epsilon-sharpness of a projected ascent is not measured. Take sigma and rho so that changes stand out from the
    rounding of the losses' dtype. Cost: 3 + N forward passes and a backward pass; state 32 N numbers. The weights are
    put back bit for bit.
    Source: Foret et al. (2021), arXiv 2010.01412, equation 2 (sam); Andriushchenko et al. (2023), arXiv 2302.07011
    (average and adaptive).
    """

    sigma: float = 0.01
    rho: float = 0.05
    num_draws: int = 4
    adaptive: bool = False
    seed: int = 0

    name = "sharpness"
    summary = (
        "E L(w + sigma v) - L(w), and L(w + rho g/|g|) - L(w) on microbatches; 4 + N passes; Foret et al., 2010.01412"
    )

    def __post_init__(self) -> None:
        GaussianNoise(self.num_draws, self.sigma, self.seed, self.adaptive)
        if not 0 < self.rho < math.inf:
            raise GradscaleError(f"rho must be a positive number, got {self.rho}; 0.05 is the default")

    @property
    def needs(self) -> frozenset[Observation | Gathering[AscentState]]:
        return frozenset({self.observation, self.gathering})

    @property
    def observation(self) -> LossChanges:
        return LossChanges(GaussianNoise(self.num_draws, self.sigma, self.seed, self.adaptive))

    @property
    def gathering(self) -> BatchAscent:
        return BatchAscent(self.rho)

    def init(self) -> SharpnessState:
        return _state(no_draws(self.num_draws), AscentState({}, {}, torch.zeros((), dtype=torch.float64)))

    def update(self, state: SharpnessState, batch: MicroBatch) -> SharpnessState:
        draws = draws_of(batch.observations[self.observation])
        ascent: AscentState = batch.gathered[self.gathering]
        return self.merge(state, _state(draws, ascent))

    def merge(self, left: SharpnessState, right: SharpnessState) -> SharpnessState:
        draws = add_draws(DrawMeans(*left[:2]), DrawMeans(*right[:2]))
        return _state(draws, self.gathering.merge(AscentState(*left[2:]), AscentState(*right[2:])))

    def compute(self, state: SharpnessState) -> Estimates:
        n, kind = int(state.examples), "adaptive" if self.adaptive else "plain"
        average = mean_of_draws(DrawMeans(*state[:2]))
        definition = f"{self.name}/average/{kind}/sigma={self.sigma:g}/v1"
        norm = math.sqrt(float(state.weights))
        return {
            ("average", "all"): Estimate(*average, n, "estimator", definition, UNIT),
            ("sam", "all"): self._sam(state),
            ("weight_norm", "all"): Estimate(norm, None, n, "identity", "sharpness/weight_norm/v1", "parameter units"),
        }

    def _sam(self, state: SharpnessState) -> Estimate:
        definition = f"{self.name}/sam/m={{}}/rho={self.rho:g}/v1"
        if not state.ascent_batches:
            return Estimate(math.nan, math.nan, 0, "estimator", definition.format(0), UNIT)
        size = max(state.ascent_batches)
        count = int(state.ascent_batches[size])
        total, squares = value_of(state.ascent_totals[size]).tolist()
        spread = max(0.0, squares - total * total / count)
        error = math.sqrt(spread / (count - 1) / count) if count > 1 else math.nan
        return Estimate(total / count, error, count, "estimator", definition.format(int(size)), UNIT)


def _state(draws: DrawMeans, ascent: AscentState) -> SharpnessState:
    return SharpnessState(draws.totals, draws.examples, ascent.batches, ascent.totals, ascent.weights)
