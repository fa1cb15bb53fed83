"""What a run will cost before it starts: one microbatch is measured, the rest is arithmetic. No Ray, no files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from gradscale.errors import GradscaleError
from gradscale.grads.readings import passes
from gradscale.grads.subject import Subject, load_batch
from gradscale.measures.measure import Statistic
from gradscale.run.check import check_subject
from gradscale.run.observations import gatherings_of, observations_of
from gradscale.run.probe_products import Choice, choose
from gradscale.run.shard import ShardResult, bound, needs_of, run_shard
from gradscale.sketches import Sketch
from gradscale.store.narrow import DTYPES, check_dtype


class Forecast(NamedTuple):
    """Costs of measuring `examples` examples at `steps` checkpoints. Seconds are those of this machine's device."""

    examples: int
    steps: int
    plain_seconds: float  # an example, plain forward and backward pass
    seconds: float  # an example, measured
    passes: int  # forward and backward, over every microbatch
    row_bytes: int  # an example and step, before compression
    sketch_bytes: int  # an example and step
    state_bytes: int  # a shard, until its step is complete; by class, for the classes of one microbatch
    scheme: Mapping[str, object] | None  # of the sketch
    probe_products: Choice
    observations: tuple[str, ...]  # what each costs beside

    def hours(self, workers: int) -> float:
        """With `workers` workers as fast as this one, all of them busy."""
        return self.examples * self.steps * self.seconds / workers / 3600


def forecast(
    subject: Subject,
    statistics: Sequence[Statistic[Any]],
    sketch: Sketch | None,
    microbatch: int,
    steps: int,
    sketch_dtype: str = "float32",
    probe_products: str = "backward",
    shard_size: int = 256,
) -> Forecast:
    """Check the task as a run would, then time one microbatch, after one to warm up.

    Where products come from forward mode, two microbatches are timed as well: a shard's share the making of the probes.
    Raises: GradscaleError as `check_subject` and `choose`, if there is no example, or if the sketch does not fit the
    parameters.
    """
    mapped = bound(sketch, subject)
    examples = len(subject.examples)
    if not examples:
        raise GradscaleError("the dataset must have at least one example, got 0; check --data")
    check_subject(subject, microbatch)
    choice = choose(probe_products, subject, statistics, microbatch, shard_size)
    forward = choice.way == "forward"
    batches = -(-min(shard_size, examples) // microbatch)
    ids = range(min(microbatch, examples))

    def plain() -> None:
        subject.task.losses(subject.model, load_batch(subject, ids)).mean().backward()
        subject.model.zero_grad(set_to_none=True)

    def measured(ids: range = ids) -> ShardResult:
        return run_shard(subject, ids, 0, microbatch, statistics, mapped, forward)

    def seconds() -> float:
        once = _seconds(measured)
        if not forward or batches == 1:
            return once
        more = _seconds(lambda: measured(range(min(2 * microbatch, examples)))) - once
        return more + max(0.0, once - more) / batches

    plain()
    states = measured().states  # both to warm up
    return Forecast(
        examples,
        steps,
        _seconds(plain) / len(ids),
        seconds() / len(ids),
        passes(needs_of(statistics, mapped)),
        8 * (len(subject.parameters) + 6),
        DTYPES[check_dtype(sketch_dtype)].itemsize * mapped.dim if mapped is not None else 0,
        sum(leaf.nbytes for leaf in pytree.tree_leaves(states) if isinstance(leaf, Tensor)),
        mapped.scheme if mapped is not None else None,
        choice,
        (*(each.cost for each in observations_of(statistics)), *(each.cost for each in gatherings_of(statistics))),
    )


def _seconds(function: Any) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
