"""Label-noise SGD: fresh noise on the targets of every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.interventions import partitioned
from gradscale.interventions.state import StepState
from gradscale.interventions.target import Function, Target, gradient, listed, step_with, training
from gradscale.sketches.philox import key_of
from gradscale.sketches.words import entry_signs


@dataclass(frozen=True)
class LabelNoise:
    """A step along the gradient of the half squared loss of targets with noise, e = +1 or -1, each with chance 1/2:

        1 / (2 B) sum_i |f(x_i; w) - y_i - delta e_i|^2

    Once the targets are fitted, plain SGD with a small learning rate eta drifts along the manifold of minimizers as

        dw / dtau = - (delta^2 / 4) grad tr H,     tau = eta^2 t,    for batches of one example

    (of B examples, delta^2 / B in the place of delta^2). The factor 1/4 belongs to the loss with its 1/2, which the
    slides' update leaves out. Every entry of the targets has noise of its own, by seed, step, microbatch (counted
    through all ranks, rank by rank) and position.

    Cost: one forward and backward pass; memory P. Under ZeRO-3, that of a plain step.
    Source: Blanc, Gupta, Valiant, Valiant (2020), arXiv 1904.09080; Li, Wang, Arora (2022), arXiv 2110.06914, for the
    flow; Li's slides (2024).
    """

    delta: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.delta < math.inf:
            raise GradscaleError(f"delta must be a number from 0 on, got {self.delta}; it is in the targets' unit")

    def step(self, target: Target, loss_fn: Function | Sequence[Function], state: StepState) -> Tensor:
        """One step of `target`; `loss_fn(model)` is (outputs, targets), [B, ...] both. Returns the loss with the noise.

        Raises: GradscaleError for a target or outputs that do not serve; the weights are then as before.
        """
        trained = training(target, partitioned=True)

        def noisy(microbatch: int, returned: Any) -> Tensor:
            outputs, targets = _checked(returned)
            key = key_of("label noise", self.seed, state.steps, microbatch)
            signs = entry_signs(key, 0, targets.numel(), targets.device).view(targets.shape)
            return (outputs - (targets + self.delta * signs)).square().sum() / (2 * len(targets))

        if trained.partitioned:
            loss = partitioned.backward(trained, loss_fn, noisy)
            state.steps += 1
            trained.engine.step()
            return loss
        loss, found = gradient(trained, listed(loss_fn), noisy)
        state.steps += 1
        return step_with(trained, loss, found)


def _checked(returned: Any) -> tuple[Tensor, Tensor]:
    pair = isinstance(returned, tuple) and len(returned) == 2 and all(isinstance(each, Tensor) for each in returned)
    if pair:
        outputs, targets = returned
        if outputs.shape == targets.shape and outputs.dim() and targets.is_floating_point():
            return outputs, targets
    found = [(str(each.dtype), tuple(each.shape)) for each in returned] if pair else type(returned).__name__
    raise GradscaleError(
        "loss_fn must return outputs and targets, floating-point tensors of one shape (B, ...), got "
        f"{found}; turn classes into one_hot(...).float()"
    )
