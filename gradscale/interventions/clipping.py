"""Dynamic gradient clipping: no gradient longer than the shortest so far."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.interventions import partitioned
from gradscale.interventions.state import StepState
from gradscale.interventions.target import (
    Functions,
    Target,
    Training,
    gradient,
    listed,
    mean_over_ranks,
    norm,
    step_with,
    training,
)


@dataclass(frozen=True)
class DynamicClipping:
    """From step t > `start` (T_c) on, counted from 1, with g the gradient of the batch of all ranks and a threshold G:

        if |g| > G:  g <- alpha G g / |g|
        else:        G <- |g|

    So G is the smallest norm that has been seen, not a mean. It is `state.threshold`: infinite at first, so that the
    first gradient sets it, or the number given to `StepState(threshold=...)`, the algorithm's initial G.

    Cost: one forward and backward pass, the sum over ranks of one more gradient; memory P. Under ZeRO-3, that of a
    plain step: the gradient is scaled in its partitions.
    Source: Wang and Mao (2022), arXiv 2110.03128, Algorithm 1; as their slides have it.
    """

    alpha: float = 1.0
    start: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise GradscaleError(f"alpha must be a positive number, got {self.alpha}; 1 clips to the threshold itself")
        if self.start < 0:
            raise GradscaleError(f"start must be a number of steps from 0 on, got {self.start}; 0 clips from the first")

    def step(self, target: Target, loss_fn: Functions, state: StepState) -> Tensor:
        """One step of `target`; `loss_fn(model)` is the mean loss of a microbatch. Returns the loss.

        Raises: GradscaleError for a target, losses or gradients that do not serve; the weights are then as before.
        """
        trained = training(target, partitioned=True)
        if trained.partitioned:
            return self._step_of_partitions(trained, loss_fn, state)
        loss, found = gradient(trained, listed(loss_fn))
        if state.steps >= self.start:
            factor = self._factor(norm(mean_over_ranks(trained, found)), state)
            if factor != 1:
                torch._foreach_mul_(found, factor)
        state.steps += 1
        return step_with(trained, loss, found)

    def _step_of_partitions(self, trained: Training, loss_fn: Functions, state: StepState) -> Tensor:
        loss = partitioned.backward(trained, loss_fn)
        if state.steps >= self.start:
            factor = self._factor(partitioned.norm(trained), state)
            if factor != 1:
                partitioned.scale(trained, factor)
        state.steps += 1
        trained.engine.step()
        return loss

    def _factor(self, length: float, state: StepState) -> float:
        """By which a gradient is to be multiplied; one that is not clipped sets the threshold."""
        if length > state.threshold:
            return self.alpha * state.threshold / length
        state.threshold = length
        return 1.0
