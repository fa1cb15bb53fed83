"""What two runs at the same weights say together: stiffness between the examples of one and those of the other.

Shapes: C classes, P entries of all parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from gradscale.errors import GradscaleError
from gradscale.measures.measure import Estimates
from gradscale.measures.stiffness import cosines_between, cosines_within
from gradscale.measures.unit_sums import UnitState, UnitSumsStatistic
from gradscale.run.fold import unflatten
from gradscale.store.products import check_same_parameters
from gradscale.store.results import Run
from gradscale.store.store import Store


class TwoSets(NamedTuple):
    """Estimates by (name, scope): of the pairs within either set, and of those between them."""

    first: Estimates
    between: Estimates
    second: Estimates


def stiffness_between(run: Run, other: Run, step: int) -> TwoSets:
    """Cosine stiffness at `step` within two sets of examples and between them: of a training and a validation set, say.

    `run` and `other` were both measured with `Stiffness`, at the same weights; by class where both have it by class.
    The rows of `between`'s class matrix are `run`'s classes, its columns `other`'s: all `class:<a>,<b>`. Exact for the
    examples measured, from the merged states of the runs: no gradient is computed. Given the same run twice, all three
    are over its pairs i != j. Standard errors: jackknife over the blocks of examples; between two sets, over those of
    either while the other is held, squares added.

    That runs of different data have no example in common cannot be seen here, and is for the caller to see to. Runs
    without a checkpoint are taken to begin with the same weights if their options `seed` agree.

    Cost: C^2 J^2 P operations and memory for the merged states of both runs.
    Raises: GradscaleError if a run has no such step, not all of its shards or no stiffness; if they measured other
    parameters or another checkpoint, or are two runs of the same examples.
    Source: Fort, Nowak, Jastrzebski and Narayanan (2019), arXiv 1901.09491, section 2: the modes train-train,
    train-val and val-val.
    """
    check_same_weights(run, other, step)
    by_class = all(_has_classes(one) for one in (run, other))
    left, right = _state(run, step), _state(other, step)
    first, second = cosines_within(left, by_class), cosines_within(right, by_class)
    between = first if is_same(run, other) else cosines_between(left, right, by_class)
    return TwoSets(first, between, second)


def is_same(run: Run, other: Run) -> bool:
    return run.files == other.files


def check_same_weights(run: Run, other: Run, step: int) -> None:
    """Raises: GradscaleError unless both runs measured the same parameters, at the same weights at `step`, of different
    examples or as one and the same run."""
    for one in (run, other):
        if step not in one.steps:
            raise GradscaleError(f"step must be one of {one.steps} of {one.path}, got {step}")
    here, there = run.plan, other.plan
    where = f"{run.path} and {other.path}"
    check_same_parameters(here["parameters"], there["parameters"], where)
    if _weights(here, step) != _weights(there, step):
        raise GradscaleError(
            f"both runs must be of the same weights at step {step}, got {_weights(here, step)} and "
            f"{_weights(there, step)} ({where}); measure both from the same checkpoint"
        )
    if not is_same(run, other) and here["data_fingerprint"] == there["data_fingerprint"]:
        raise GradscaleError(
            f"runs must be of different examples to be paired, got the same data in {where}; pass the same run twice "
            "for the pairs within it"
        )


def _weights(plan: Mapping[str, Any], step: int) -> str:
    fingerprint = plan["checkpoints"][str(step)]["fingerprint"]
    if fingerprint is not None:
        return f"checkpoint {fingerprint}"
    return f"initial weights of seed {plan['task_options'].get('seed')}"


def _has_classes(run: Run) -> bool:
    settings = run.plan["measures"].get("stiffness")
    if settings is None:
        raise GradscaleError(
            f"run {run.path} must have been measured with stiffness, got {', '.join(run.plan['measures']) or 'none'}; "
            "measure it again with --measures stiffness, or stiffness:by_class"
        )
    return bool(settings.get("by_class"))


def _state(run: Run, step: int) -> UnitState:
    merged = Store(run.files).read_merged(step)
    if merged is None:
        raise GradscaleError(
            f"run {run.path} must have all its shards at step {step}, got some missing; run its command again"
        )
    (state,) = unflatten([UnitSumsStatistic(_has_classes(run))], merged).values()
    assert isinstance(state, UnitState)
    return state
