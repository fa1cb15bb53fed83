"""The Gaussian width of a task's features: the code of the gradients' width on activations instead.

Shapes: B examples, F features, N probes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from gradscale.errors import GradscaleError
from gradscale.grads.readings import Reading
from gradscale.grads.subject import Subject
from gradscale.measures.gaussian_width import WidthState, empty_state, estimates_of, merge_states, state_of
from gradscale.measures.measure import Estimates, MicroBatch, Observation
from gradscale.sketches.dimensions import check_dim
from gradscale.sketches.gaussian import GaussianProbes
from gradscale.task import Batch, check_rows

PARAMETER = "features"  # by which the probes are keyed: the only parameter there is
_ADVICE = "pool over positions, so that there is one vector for each example"


@dataclass(frozen=True)
class FeatureProducts:
    """<h_b, v_j> of the features h_b = task.features(model, batch) with N Gaussian probes: [B, N] float64.

    NaN where a feature is not finite. Cost: a forward pass, F N products an example.
    """

    probes: GaussianProbes

    cost = "a forward pass for task.features"

    def observe(self, subject: Subject, batch: Batch, ids: range) -> Tensor:
        """Raises: GradscaleError if the task has no features, or they are not one vector for each example."""
        features: Callable[[nn.Module, Batch], Tensor] | None = getattr(subject.task, "features", None)
        if features is None:
            raise GradscaleError(
                "the featurizer width needs task.features(model, batch) -> [B, F], got a task without it; add it, or "
                "leave the measure featurizer out"
            )
        with torch.no_grad():
            points = check_rows(features(subject.model, batch), batch, "features", "F", _ADVICE)
        points = points.cpu().double()
        return (points @ _matrix(self.probes, points.shape[1])).where(points.isfinite().all(dim=1)[:, None], torch.nan)


@dataclass(frozen=True)
class FeaturizerWidth:
    """`width` E max_i <h_i, v> and `symmetrized` E max_i |<h_i, v>| of the features h_i of a task's examples.

    `task.features(model, batch)` gives one vector [F] an example: what the last layer is given. Recentred, with the
    same probes at every checkpoint, and the standard error over them, as `GaussianWidth`; examples whose features are
    not finite are left out, and n does not count them. In units of the features.

    It bounds the width of the gradients of a last layer W, g_i = r_i h_i^T with r_i the loss's gradient at the scores:
    w({g_i}) <= sqrt(2) (max |r_i| w({h_i}) + max |h_i| w({r_i})), since |r h^T - s k^T| <= |r| |h - k| + |k| |r - s|
    (Sudakov and Fernique).

    Cost: one forward pass; F N numbers for the probes, F N operations an example.
    Source: Banerjee et al. (2024), arXiv 2406.07712, for the idea; the statement there could not be read.
    """

    num_probes: int = 64
    seed: int = 0

    name = "featurizer"
    summary = "E max_i <h_i, v> over N Gaussian v, h = task.features; one forward pass; Banerjee et al., 2406.07712"

    def __post_init__(self) -> None:
        check_dim("num_probes", self.num_probes)

    @property
    def needs(self) -> frozenset[Reading | Observation]:
        return frozenset({self.observation})

    @property
    def observation(self) -> FeatureProducts:
        return FeatureProducts(GaussianProbes(self.num_probes, self.seed))

    def init(self) -> WidthState:
        return empty_state(self.num_probes)

    def update(self, state: WidthState, batch: MicroBatch) -> WidthState:
        return merge_states(state, state_of_finite(batch.observations[self.observation]))

    def merge(self, left: WidthState, right: WidthState) -> WidthState:
        return merge_states(left, right)

    def compute(self, state: WidthState) -> Estimates:
        return estimates_of(state, self.name, "all", "examples@theta", "feature units")


def state_of_finite(products: Tensor) -> WidthState:
    """The state of the points whose products [B, N] are finite."""
    return state_of(products[products.isfinite().all(dim=1)])


@lru_cache(maxsize=1)
def _matrix(probes: GaussianProbes, features: int) -> Tensor:
    """[F, N] float64"""
    return probes.materialize(PARAMETER, (features, 1)).double()
