"""Sharpness-aware minimization: the gradient at the worst weights nearby, to first order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.interventions.state import StepState
from gradscale.interventions.target import (
    Functions,
    Target,
    Training,
    gradient,
    listed,
    mean_over_ranks,
    moved,
    norm,
    step_with,
    training,
)


@dataclass(frozen=True)
class SAM:
    """A step along the gradient at w + e in the place of that at w, with g the gradient of the batch of all ranks.

        e = rho g / |g|                                SAM
        e = rho w^2 * g / | |w| * g |                  ASAM, `adaptive`: entry by entry

    The adaptive ball |e / w| <= rho moves with weights that are rescaled. All ranks climb along one gradient, as one
    process with the whole batch does; many implementations climb on every rank along its own (m-SAM), which regularizes
    otherwise. Where g is zero, e is zero. Dropout draws anew in the second pass, and BatchNorm in training mode counts
    both.

    Cost: two forward and backward passes, the sum over ranks of one more gradient; memory up to 4 P more, 6 P if
    adaptive.
    Source: Foret, Kleiner, Mobahi, Neyshabur (2021), arXiv 2010.01412, eq. 2, 3; Kwon, Kim, Park, Choi (2021), arXiv
    2102.11600, without its eta beside |w|. Departure from the slides of Li (2024): the gradient is taken at the
    moved weights, as in the papers; the slides' formula has the move outside of it.
    """

    rho: float = 0.05
    adaptive: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rho < math.inf:
            raise GradscaleError(f"rho must be a number from 0 on, got {self.rho}; 0.05 is usual, 0.5 if adaptive")

    def step(self, target: Target, loss_fn: Functions, state: StepState) -> Tensor:
        """One step of `target`; `loss_fn(model)` is the mean loss of a microbatch. Returns the loss at w.

        Raises: GradscaleError for a target, losses or gradients that do not serve; the weights are then as before.
        """
        trained, functions = training(target, moves=True), listed(loss_fn)
        loss, found = gradient(trained, functions)
        with moved(trained, self._ascent(trained, list(mean_over_ranks(trained, found)))):
            there = gradient(trained, functions).by_parameter
        state.steps += 1
        return step_with(trained, loss, there)

    @torch.no_grad()
    def _ascent(self, trained: Training, found: list[Tensor]) -> list[Tensor]:
        """e, in the place of g."""
        sizes = [weight.abs() for weight in trained.weights] if self.adaptive else []
        if self.adaptive:
            found = [g * size for g, size in zip(found, sizes, strict=True)]
        length = norm(found)
        scaled = [g * (self.rho / length if length else 0.0) for g in found]
        return [e * size for e, size in zip(scaled, sizes, strict=True)] if self.adaptive else scaled
