"""The lines that `gradscale plan` prints: which rule serves each parameter, and what a run will cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from gradscale.store.sketches import cosine_error

if TYPE_CHECKING:
    from gradscale.grads.coverage import Coverage
    from gradscale.run.forecast import Forecast
    from gradscale.run.passes import Passes


def coverage_lines(coverage: Coverage) -> Iterator[str]:
    """The parameters by rule, and those that the generic rule serves by name."""
    yield f"{coverage.entries:,} entries in {len(coverage.parameters)} parameters"
    for rule in sorted({p.rule for p in coverage.parameters}):
        ours = [p for p in coverage.parameters if p.rule == rule]
        entries = sum(p.entries for p in ours)
        yield f"  {rule:14} {len(ours):5} parameters {entries:15,} entries {entries / coverage.entries:7.1%}"
    slow = [p.name for p in coverage.parameters if not p.fast]
    shown = ", ".join(slow[:5]) + (", …" if len(slow) > 5 else "")
    rest = f"; exactly but slowly {shown}" if slow else ""
    yield f"  {coverage.share_fast:.1%} of the entries by fast rules{rest}"


def forecast_lines(cost: Forecast, workers: int, shard_size: int) -> Iterator[str]:
    """Time, memory and bytes of the run."""
    total = cost.examples * cost.steps
    yield f"{cost.examples:,} examples at {cost.steps} checkpoints"
    ratio = cost.seconds / cost.plain_seconds
    yield f"  time    {_duration(cost.hours(workers) * 3600)} with {workers} workers"
    yield f"          of {1 / cost.seconds:,.0f} examples/s, {ratio:.2f} times a plain forward and backward pass"
    if cost.passes > 1:
        yield f"          in {cost.passes} such passes, the second for sums of unit gradients or of those above a norm"
    for cost_of_one in cost.observations:
        yield f"          and {cost_of_one}"
    yield f"  rows    {_bytes(cost.row_bytes * total)} before compression"
    if cost.scheme is not None:
        each = _bytes(cost.sketch_bytes * cost.examples)
        yield f"  sketches {_bytes(cost.sketch_bytes * total)}, {each} for each checkpoint"
        near, far = (cosine_error(cost.scheme, cosine) for cosine in (1.0, 0.0))
        yield f"          standard error of a cosine, with exact norms: {far:.3g} near 0, {near:.3g} near 1 or -1"
    shards = -(-cost.examples // shard_size)
    yield f"  states  {_bytes(cost.state_bytes * shards)} for each checkpoint, until its shards are merged"


def pass_lines(passes: Mapping[str, Passes]) -> Iterator[str]:
    """The passes over the data that all measures cost together, then those of each alone; see `passes_of`."""
    *alone, (_, together) = passes.items()
    yield f"passes: {together.forward} forward and {together.backward} backward over the data, together; each alone"
    for name, (forward, backward) in alone:
        yield f"  {name:24} {forward:5} forward {backward:5} backward"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
