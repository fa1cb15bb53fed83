"""From the committed shards' states to estimates: merge in shard order, then compute. No Ray.

States are stored flat: a NamedTuple's tensors under their field names, a field that maps strings to tensors
under `field/key`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from gradscale.measures.identities import Recorded, check_moments
from gradscale.measures.measure import Estimate, Estimates, Measure, OverSteps, Statistic, statistic_of
from gradscale.measures.moments import MomentsStatistic
from gradscale.run.plan import Plan
from gradscale.store.store import Store

States = Mapping[Statistic[Any], Any]
_SCOPES = ("all", "union", "class", "layer")


class EstimateRow(NamedTuple):
    """One row of estimates.parquet, in the order of its columns."""

    step: int
    measure: str
    name: str
    scope: str
    value: float
    stderr: float | None
    n: int
    status: str
    definition: str
    unit: str


def statistics_of(measures: Sequence[Measure]) -> list[Statistic[Any]]:
    """The statistics that `measures` need, each once."""
    return list(dict.fromkeys(statistic_of(measure) for measure in measures))


def flatten(states: States) -> dict[str, dict[str, Tensor]]:
    return {_key(statistic): _flat(state) for statistic, state in states.items()}


def unflatten(
    statistics: Sequence[Statistic[Any]], stored: Mapping[str, Mapping[str, Tensor]]
) -> dict[Statistic[Any], Any]:
    return {statistic: _restore(statistic.init(), stored.get(_key(statistic), {})) for statistic in statistics}


def fold_step(store: Store, plan: Plan, measures: Sequence[Measure], step: int) -> States:
    """The states of one step, merged over its shards in shard order. All shards must be committed."""
    statistics = statistics_of(measures)
    merged = store.read_merged(step)
    if merged is not None:
        return unflatten(statistics, merged)
    states = {statistic: statistic.init() for statistic in statistics}
    for shard in range(plan.shards):
        found = unflatten(statistics, store.read_states(step, shard))
        states = {statistic: statistic.merge(state, found[statistic]) for statistic, state in states.items()}
    store.write_merged(step, flatten(states), plan.shards)
    return states


def estimate_step(store: Store, plan: Plan, measures: Sequence[Measure], step: int) -> list[EstimateRow]:
    """Every measure's estimates at one step.

    Raises: GradscaleError if the states violate an identity, see `check_moments`.
    """
    states = fold_step(store, plan, measures, step)
    _check_identities(store, plan, states, step)
    return [
        row
        for measure in measures
        for row in rows_of(plan.parameters, step, measure, measure.compute(states[statistic_of(measure)]))
    ]


def estimate_over_steps(
    store: Store, plan: Plan, measures: Sequence[Measure], steps: Sequence[int]
) -> list[EstimateRow]:
    """The estimates of the union of checkpoints up to each of `steps`, of the measures that have one."""
    combining = [measure for measure in measures if isinstance(measure, OverSteps)]
    if not combining or len(steps) < 2:
        return []
    states = [fold_step(store, plan, combining, step) for step in steps]
    return [
        row
        for measure in combining
        for upto, step in enumerate(steps, start=1)
        for found in (measure.compute_over_steps([s[statistic_of(measure)] for s in states[:upto]]),)
        for row in rows_of(plan.parameters, step, measure, found)
    ]


def _check_identities(store: Store, plan: Plan, states: States, step: int) -> None:
    checked = [state for statistic, state in states.items() if isinstance(statistic, MomentsStatistic)]
    recorded = _recorded(store, plan, step) if checked else None
    if recorded is not None:
        for state in checked:
            check_moments(state, recorded, step)


def _recorded(store: Store, plan: Plan, step: int) -> Recorded | None:
    """What the commit records say; None if some are of a time when they did not say it."""
    records = [store.commit_record(step, shard) for shard in range(plan.shards)]
    if not all("sq_norm" in record for record in records):
        return None
    examples = sum(record["stop"] - record["start"] - record["nonfinite"] for record in records)
    return Recorded(examples, math.fsum(record["sq_norm"] for record in records))


def rows_of(parameters: Iterable[str], step: int, measure: Measure, estimates: Estimates) -> list[EstimateRow]:
    """Sorted by scope (parameters in the model's order), then in the measure's own order."""
    position = {f"layer:{name}": j for j, name in enumerate(parameters)}

    def order(item: tuple[tuple[str, str], Estimate]) -> tuple[int, int]:
        scope = item[0][1]
        return _SCOPES.index(scope.partition(":")[0]), position.get(scope, 0)

    return [
        EstimateRow(step, measure.name, name, scope, *estimate)
        for (name, scope), estimate in sorted(estimates.items(), key=order)
    ]


def _key(statistic: Statistic[Any]) -> str:
    return repr(statistic).replace("/", "_")


def _flat(state: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for field, value in zip(state._fields, state, strict=True):
        if isinstance(value, Tensor):
            found[field] = value
        else:
            found |= {f"{field}/{key}": tensor for key, tensor in value.items()}
    return found


def _restore(empty: Any, flat: Mapping[str, Tensor]) -> Any:
    """A state of the kind of `empty`, the unit, from flat tensors."""
    return type(empty)(
        *(
            flat.get(field, value)
            if isinstance(value, Tensor)
            else {key.removeprefix(f"{field}/"): t for key, t in sorted(flat.items()) if key.startswith(f"{field}/")}
            for field, value in zip(empty._fields, empty, strict=True)
        )
    )
