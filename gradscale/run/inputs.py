"""Where a task's examples lie in input space.

Shapes: B examples of a microbatch, n chosen ones, d entries of an input.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from gradscale.errors import GradscaleError
from gradscale.grads.modes import check_mode
from gradscale.run.memory import explaining_memory
from gradscale.store.results import Run
from gradscale.task import Batch, Task, check_rows, fingerprint

_ADVICE = "flatten images, pool the embeddings of sequences over positions"


def unit_inputs(run: Run, task: Task, step: int, ids: np.ndarray, microbatch: int) -> tuple[Tensor, Tensor]:
    """[n, d]: X / |X| of the examples `ids`, ascending, in the inputs' own type; and [n], which have a direction.

    An input that is zero or not finite has none. Cost: the microbatches that hold one of the examples, on the CPU.
    Raises: GradscaleError if the task has no `input_vectors`, they are not one vector for each example, or its
    examples are not those of the run.
    """
    inputs: Callable[[nn.Module, Batch], Tensor] | None = getattr(task, "input_vectors", None)
    if inputs is None:
        raise GradscaleError(
            "stiffness by distance needs task.input_vectors(model, batch) -> [B, d], got a task without it; add it"
        )
    examples, plan = task.examples(), run.plan
    if len(examples) != plan["examples"] or fingerprint(examples) != plan["data_fingerprint"]:
        raise GradscaleError(
            f"task must have the examples that were measured in {run.path}, got others; pass the task of the run"
        )
    model = task.model(plan["checkpoints"][str(step)]["path"])
    check_mode(model)
    found = []
    for start in range(0, len(examples), microbatch):
        part = range(start, min(start + microbatch, len(examples)))
        chosen = ids[np.searchsorted(ids, part.start) : np.searchsorted(ids, part.stop)] - start
        if len(chosen):
            with torch.no_grad(), explaining_memory(microbatch):
                batch = examples.batch(part)
                points = check_rows(inputs(model, batch), batch, "input_vectors", "d", _ADVICE)
            found.append(points[torch.from_numpy(chosen)])
    points = torch.cat(found)
    norms = points.double().norm(dim=1)
    kept = norms.isfinite() & (norms > 0)
    return (points / norms.where(kept, 1.0)[:, None]).to(points.dtype), kept
