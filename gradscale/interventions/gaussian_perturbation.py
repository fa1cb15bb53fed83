"""Gaussian model perturbation: the loss averaged over noise on the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.interventions.draws import normals_of
from gradscale.interventions.state import StepState
from gradscale.interventions.target import Functions, Target, gradient, listed, moved, step_with, training


@dataclass(frozen=True)
class GaussianPerturbation:
    """A step that descends, with k = `draws` fresh d_j ~ N(0, sigma^2 I) at every step,

        (1 - rho) L(w) + rho / k sum_j L(w + d_j),         in expectation about L + rho sigma^2 tr H / 2

    exactly so for a quadratic. The noise is the same on all ranks, by seed, step and place in the model.

    Cost: 1 + k forward and backward passes, no communication more; memory 3 P more; k P random numbers, for which
    Philox takes some tens of operations each.
    Source: Wang and Mao (2022), arXiv 2110.03128, Algorithm 2 (GMP), who find k = 3 enough; as their slides have it.
    """

    sigma: float
    rho: float = 0.5
    draws: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < math.inf:
            raise GradscaleError(f"sigma must be a number from 0 on, got {self.sigma}; it is a standard deviation")
        if not 0 <= self.rho <= 1:
            raise GradscaleError(f"rho must be in [0, 1], got {self.rho}; it is the share of the perturbed loss")
        if self.draws < 1:
            raise GradscaleError(f"draws must be at least 1, got {self.draws}; 3 are usual")

    def step(self, target: Target, loss_fn: Functions, state: StepState) -> Tensor:
        """One step of `target`; `loss_fn(model)` is the mean loss of a microbatch. Returns the loss at w.

        Raises: GradscaleError for a target or losses that do not serve; the weights are then as before.
        """
        trained, functions = training(target, moves=True), listed(loss_fn)
        loss, total = gradient(trained, functions)
        torch._foreach_mul_(total, 1 - self.rho)
        for j in range(self.draws):
            noise = normals_of(trained, "gaussian perturbation", self.seed, state.steps, j)
            torch._foreach_mul_(noise, self.sigma)
            with moved(trained, noise):
                del noise
                torch._foreach_add_(total, gradient(trained, functions).by_parameter, alpha=self.rho / self.draws)
        state.steps += 1
        return step_with(trained, loss, total)
