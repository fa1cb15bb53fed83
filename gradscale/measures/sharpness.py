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
from gradscale.measures.measure import Estimate, Estimates, Gathering, MicroBatch, Observation
from gradscale.measures.perturbation import (
    BatchMeans,
    DrawMeans,
    GaussianNoise,
    add_batches,
    add_draws,
    batch_of,
    draws_of,
    gradient_of,
    losses_at,
    mean_of_batches,
    mean_of_draws,
    moved,
    no_batches,
    no_draws,
    norm_of,
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
    """A `BatchMeans` of the changes d, and |w|^2."""

    batches: Mapping[str, Tensor]
    totals: Mapping[str, Tensor]
    weights: Tensor  # [] float64


@dataclass(frozen=True)
class BatchAscent:
    """d = L(w + rho g / |g|) - L(w), L the mean loss of a microbatch and g its gradient; 0 where g is.

    With `adaptive`, d = L(w + rho w^2 g / ||w| g|) - L(w), products entry by entry. It depends on the batch, by
    definition. Cost: two forward passes and a backward pass.
    """

    rho: float
    adaptive: bool = False

    cost = "two forward passes and a backward pass of every microbatch"

    def gather(self, subject: Subject, batch: Batch, ids: range, keep: Tensor) -> AscentState:
        norm = norm_of(parameter.detach() for parameter in subject.parameters.values())
        weights = torch.tensor(norm**2, dtype=torch.float64)
        if not bool(keep.any()):
            return AscentState(*no_batches(), weights)
        before, grads = gradient_of(subject, batch, keep)
        if self.adaptive:
            grads = {name: g * subject.parameters[name].detach().abs() for name, g in grads.items()}
        length = norm_of(grads.values())
        if not math.isfinite(length):
            return AscentState(*no_batches(), weights)
        scale = self.rho / length if length > 0 else 0.0

        def ascent(name: str, parameter: nn.Parameter) -> Tensor:
            step = scale * grads[name]
            return step * parameter.detach().abs() if self.adaptive else step

        with moved(subject.parameters, ascent):
            after = losses_at(subject, batch)[keep].mean()
        return AscentState(*batch_of(after - before, int(keep.sum())), weights)

    def merge(self, left: AscentState, right: AscentState) -> AscentState:
        batches = add_batches(BatchMeans(*left[:2]), BatchMeans(*right[:2]))
        return AscentState(*batches, torch.maximum(left.weights, right.weights))


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

    With `adaptive`, xi is scaled entry by entry by |w|, and `asam` L_B(w + rho w^2 g_B / ||w| g_B|) - L_B(w) takes the
    place of `sam`: neither changes under a rescaling of the weights that leaves the function as it is (Dinh et al.
    2017, arXiv 1703.04933), as all others do; the exact `weight_norm` |w| of the measured parameters stands beside
    them. The worst case in a ball is the measure `worst_case`.

    `average`: N draws, the same for all examples; standard error
    over draws and examples (NaN for N = 1); about sigma^2 tr H / 2, exactly on a quadratic. `sam`: on the microbatches
    of the run, whose size m is part of the definition (`sam/m=32/...`), since small batches have larger gradients:
    those with m finite examples, m the largest there is; n counts them, standard error over them. On a quadratic it is
    rho |g| + rho^2 g^T H g / (2 |g|^2). `asam` has the same form, and rho |D g| + rho^2 (D^2 g)^T H D^2 g / (2 |D g|^2)
    with D = diag |w|. Take sigma and rho so that changes stand out from the
    rounding of the losses' dtype. Cost: 3 + N forward passes and a backward pass; state 32 N numbers. The weights are
    put back bit for bit.
    Source: Foret et al. (2021), arXiv 2010.01412, equation 2 (sam); Kwon et al. (2021), arXiv 2102.11600
    (asam); Andriushchenko et al. (2023), arXiv 2302.07011 (average and adaptive).
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
        return BatchAscent(self.rho, self.adaptive)

    def init(self) -> SharpnessState:
        return _state(no_draws(self.num_draws), AscentState(*no_batches(), torch.zeros((), dtype=torch.float64)))

    def update(self, state: SharpnessState, batch: MicroBatch) -> SharpnessState:
        draws = draws_of(batch.observations[self.observation])
        ascent: AscentState = batch.gathered[self.gathering]
        return self.merge(state, _state(draws, ascent))

    def merge(self, left: SharpnessState, right: SharpnessState) -> SharpnessState:
        draws = add_draws(DrawMeans(*left[:2]), DrawMeans(*right[:2]))
        return _state(draws, self.gathering.merge(AscentState(*left[2:]), AscentState(*right[2:])))

    def compute(self, state: SharpnessState) -> Estimates:
        n, kind, step = int(state.examples), *(("adaptive", "asam") if self.adaptive else ("plain", "sam"))
        average = mean_of_draws(DrawMeans(*state[:2]))
        definition = f"{self.name}/average/{kind}/sigma={self.sigma:g}/v1"
        ascent, norm = mean_of_batches(BatchMeans(*state[2:4])), math.sqrt(float(state.weights))
        on_batches = f"{self.name}/{step}/m={ascent.size}/rho={self.rho:g}/v1"
        return {
            ("average", "all"): Estimate(*average, n, "estimator", definition, UNIT),
            (step, "all"): Estimate(ascent.value, ascent.stderr, ascent.batches, "estimator", on_batches, UNIT),
            ("weight_norm", "all"): Estimate(norm, None, n, "identity", "sharpness/weight_norm/v1", "parameter units"),
        }


def _state(draws: DrawMeans, ascent: AscentState) -> SharpnessState:
    return SharpnessState(draws.totals, draws.examples, ascent.batches, ascent.totals, ascent.weights)
