"""The Gaussian width of a task's features: the code of the gradients' width on activations instead.

Shapes: B examples, F features, N probes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from gradscale.errors import GradscaleError
from gradscale.measures.gaussian_width import empty_state, estimates_of, merge_states, state_of
from gradscale.measures.measure import Estimate
from gradscale.run.plan import check_positive
from gradscale.run.shard import batch_size, check_mode, explaining_memory
from gradscale.sketches.gaussian import GaussianProbes
from gradscale.task import Batch, Task

PARAMETER = "features"  # by which the probes are keyed: the only parameter there is


def featurizer_width(
    task: Task,
    checkpoint: str | None = None,
    num_probes: int = 64,
    seed: int = 0,
    microbatch: int = 32,
    device: str = "cpu",
) -> Mapping[str, Estimate]:
    """`width` E max_i <h_i, v> and `symmetrized` E max_i |<h_i, v>| of the features h_i of all examples of a task.

    `task.features(model, batch)` gives one vector [F] an example: what the last layer is given. Recentred, with the
    same probes at every checkpoint, and the standard error over them, as `GaussianWidth`; examples whose features are
    not finite are left out, and n does not count them. In units of the features.

    It bounds the width of the gradients of a last layer W, g_i = r_i h_i^T with r_i the loss's gradient at the scores:
    w({g_i}) <= sqrt(2) (max |r_i| w({h_i}) + max |h_i| w({r_i})), since |r h^T - s k^T| <= |r| |h - k| + |k| |r - s|
    (Sudakov and Fernique).

    Cost: one forward pass; F N numbers for the probes, F N operations an example.
    Raises: GradscaleError if the task has no features, or they are not one vector for each example.
    """
    check_positive(num_probes=num_probes, microbatch=microbatch)
    features: Callable[[nn.Module, Batch], Tensor] | None = getattr(task, "features", None)
    if features is None:
        raise GradscaleError("the featurizer width needs task.features(model, batch) -> [B, F], got a task without it")
    model = task.model(checkpoint)
    check_mode(model)
    model, examples = model.to(device), task.examples()
    state, probes = empty_state(num_probes), None
    for start in range(0, len(examples), microbatch):
        found = examples.batch(range(start, min(start + microbatch, len(examples))))
        batch = {name: tensor.to(device) for name, tensor in found.items()}
        with torch.no_grad(), explaining_memory(microbatch):
            points = _checked(features(model, batch), batch_size(batch))
        if probes is None:
            probes = GaussianProbes(num_probes, seed).materialize(PARAMETER, (points.shape[1], 1)).double()
        points = points[points.isfinite().all(dim=1)].cpu().double()
        state = merge_states(state, state_of(points @ probes))
    estimates = estimates_of(state, "featurizer", "all", "examples@theta", "feature units")
    return {name: estimate for (name, _), estimate in estimates.items()}


def _checked(points: Tensor, batch: int) -> Tensor:
    if points.dim() != 2 or len(points) != batch or not points.is_floating_point():
        raise GradscaleError(
            f"task.features must return floating-point numbers of shape ({batch}, F), got {points.dtype} of shape "
            f"{tuple(points.shape)}; pool over positions, so that there is one vector for each example"
        )
    return points
