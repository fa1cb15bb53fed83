"""What an intervention remembers from step to step: a step's number, and a threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gradscale.errors import GradscaleError


@dataclass
class StepState:
    """One for each training run; the same on all ranks. Nothing is kept on modules, parameters or optimizers.

    `steps`: taken so far; random methods draw anew at every step, by this number. `threshold`: the G of dynamic
    clipping, the smallest gradient norm that it has passed unclipped; infinite until there is one.
    """

    steps: int = 0
    threshold: float = math.inf

    def state_dict(self) -> dict[str, int | float]:
        """For `torch.save`, or the `client_state` of a DeepSpeed checkpoint."""
        return {"steps": self.steps, "threshold": self.threshold}

    def load_state_dict(self, saved: Mapping[str, int | float]) -> None:
        """Raises: GradscaleError if `saved` is not what `state_dict` gives."""
        expected = self.state_dict()
        steps, threshold = saved.get("steps", -1), saved.get("threshold", math.nan)
        if set(saved) != set(expected) or not isinstance(steps, int) or steps < 0 or not threshold >= 0:
            raise GradscaleError(
                "the state must have steps, a whole number from 0 on, and threshold, a number from 0 on, "
                f"got {dict(saved)}; pass what state_dict() gave"
            )
        self.steps, self.threshold = steps, float(threshold)
