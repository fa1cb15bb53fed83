"""How many passes over the data a choice of measures takes: counted on one microbatch, so that no list can go stale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

from torch import Tensor

from gradscale.grads.subject import Subject
from gradscale.measures.measure import Measure
from gradscale.run.fold import statistics_of
from gradscale.run.shard import run_shard
from gradscale.sketches import BoundSketch
from gradscale.task import Task

_FORWARD = ("losses", "outputs", "outputs_of", "features")  # the methods of a task that are a forward pass
TOGETHER = "all together"


class Passes(NamedTuple):
    """Of every microbatch. A pass of forward mode counts as a forward pass: it takes three to four times as long."""

    forward: int
    backward: int


def passes_of(
    subject: Subject,
    measures: Sequence[Measure],
    microbatch: int,
    sketch: BoundSketch | None = None,
    forward: bool = False,
) -> dict[str, Passes]:
    """Of each measure alone, by its name, and of all of them, and the sketch, together: `TOGETHER`, the last.

    Those of a run on examples that are all finite: a shard that has others is read again without them. `forward` is
    whether products with probes come from forward mode. Not counted are a task's `inputs` and its `labels`.
    Cost: one microbatch is measured once for every measure, and once more.
    """
    chosen = {**{measure.name: [measure] for measure in measures}, TOGETHER: list(measures)}
    ids = range(min(microbatch, len(subject.examples)))
    return {
        name: count_passes(subject, ids, some, sketch if name == TOGETHER else None, forward)
        for name, some in chosen.items()
    }


def count_passes(
    subject: Subject, ids: range, measures: Sequence[Measure], sketch: BoundSketch | None, forward: bool
) -> Passes:
    """The passes of one microbatch, the examples `ids`."""
    counted = CountedTask(subject.task, {"forward": 0, "backward": 0})
    run_shard(replace(subject, task=cast(Task, counted)), ids, 0, len(ids), statistics_of(measures), sketch, forward)
    return Passes(**counted.counts)


@dataclass(frozen=True)
class CountedTask:
    """A task that counts in `counts` how often its model is gone through, forward and backward."""

    task: Task
    counts: dict[str, int]

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.task, name)
        return self._counting(found) if name in _FORWARD else found

    def _counting(self, method: Any) -> Any:
        def counting(*arguments: Any) -> Any:
            self.counts["forward"] += 1
            found = method(*arguments)
            if isinstance(found, Tensor) and found.requires_grad:
                found.register_hook(self._count_backward)
            return found

        return counting

    def _count_backward(self, _: Tensor) -> None:
        self.counts["backward"] += 1
