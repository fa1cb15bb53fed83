"""The Gaussian width of a task's features without a run: no gradients, no files."""

from __future__ import annotations

from collections.abc import Mapping

from gradscale.grads.modes import check_mode
from gradscale.grads.subject import Subject
from gradscale.measures.featurizer import FeaturizerWidth, state_of_finite
from gradscale.measures.measure import Estimate
from gradscale.run.memory import explaining_memory
from gradscale.run.plan import check_positive
from gradscale.task import Task


def featurizer_width(
    task: Task,
    checkpoint: str | None = None,
    num_probes: int = 64,
    seed: int = 0,
    microbatch: int = 32,
    device: str = "cpu",
) -> Mapping[str, Estimate]:
    """`width` and `symmetrized` of the features of all examples of a task, as the measure `FeaturizerWidth` has them.

    Cost: one forward pass; F N numbers for the probes, F N operations an example.
    Raises: GradscaleError if the task has no features, or they are not one vector for each example.
    Source: Banerjee et al. (2024), arXiv 2406.07712, as `FeaturizerWidth`.
    """
    check_positive(num_probes=num_probes, microbatch=microbatch)
    measure = FeaturizerWidth(num_probes, seed)
    model = task.model(checkpoint)
    check_mode(model)
    subject = Subject(task, model.to(device), task.examples(), {}, ())
    state = measure.init()
    for start in range(0, len(subject.examples), microbatch):
        ids = range(start, min(start + microbatch, len(subject.examples)))
        found = subject.examples.batch(ids)
        batch = {name: tensor.to(device) for name, tensor in found.items()}
        with explaining_memory(microbatch):
            products = measure.observation.observe(subject, batch, ids)
        state = measure.merge(state, state_of_finite(products))
    return {name: estimate for (name, _), estimate in measure.compute(state).items()}
