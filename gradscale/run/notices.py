"""What a run says of itself in the log: what is measured, and what may surprise."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from gradscale.measures.measure import Measure, statistic_of
from gradscale.measures.moments import MomentsStatistic
from gradscale.measures.unit_sums import UnitSumsStatistic
from gradscale.run.plan import Plan

_ENOUGH = 10  # blocks


def underflow(counts: Mapping[str, int], dtype: str | None) -> str:
    return (
        f"{counts['coarse']:,} entries of sketches are too small for all the digits of {dtype}, and "
        f"{counts['zeroed']:,} of them are stored as 0; sketch_error in the estimates tells what that does to cosines, "
        "--sketch-dtype float32 avoids it"
    )


def covered(plan: Plan) -> str:
    """The coverage report in one line; `gradscale plan` has it in full."""
    entries: Counter[str] = Counter()
    for parameter in plan.parameters.values():
        entries[parameter["rule"]] += math.prod(parameter["shape"])
    total = sum(entries.values())
    rules = ", ".join(f"{rule} {share / total:.1%}" for rule, share in entries.most_common())
    left_out = f"; left out by name: {', '.join(plan.excluded)}" if plan.excluded else ""
    return f"measuring {total:,} entries in {len(plan.parameters)} parameters, by rule: {rules}{left_out}"


def one_block(plan: Plan, measures: Sequence[Measure]) -> str | None:
    """Of a run whose jackknife has a single block and could have more: that its errors cannot be told."""
    jackknifed = [m.name for m in measures if isinstance(statistic_of(m), MomentsStatistic | UnitSumsStatistic)]
    size = plan.microbatch * max(1, plan.examples // (_ENOUGH * plan.microbatch))
    if not jackknifed or plan.blocks > 1 or plan.examples <= size:
        return None
    return (
        f"all {plan.examples} examples are in one shard, so that {', '.join(jackknifed)} will have no standard errors, "
        f"which come from leaving shards out; --shard-size {size} gives {-(-plan.examples // size)} shards"
    )
