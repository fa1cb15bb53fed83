"""What a run will do, settled before it starts: which shards at which steps, with which settings. No Ray, no files.

A plan fixes every bit of the results. It is written once, into run.json; a run directory is resumed only by an
equal plan.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from gradscale.errors import GradscaleError

_MAX_BLOCKS = 20  # jackknife blocks: more would not make the standard error much better
_BLOCK_BYTES = 8 << 30  # each block holds a sum of gradients in float64: large models get fewer, but at least two


@dataclass(frozen=True, order=True)
class Unit:
    """One shard at one step: the unit of work, of commitment and of retry."""

    step: int
    shard: int
    start: int
    stop: int
    block: int

    @property
    def ids(self) -> range:
        return range(self.start, self.stop)

    def __str__(self) -> str:
        return f"step {self.step}, shard {self.shard} (examples {self.start} to {self.stop - 1})"


class Written(Protocol):
    """A plan of any kind of run."""

    @classmethod
    def from_json(cls, text: str) -> Written: ...

    def to_json(self) -> str: ...


@dataclass(frozen=True)
class Plan:
    """Everything that determines the results. All fields are JSON values."""

    task: str
    task_options: Mapping[str, Any]
    checkpoints: Mapping[str, Any]  # step -> {"path", "fingerprint"}
    examples: int
    data_fingerprint: str
    parameters: Mapping[str, Any]  # name -> {"shape", "dtype", "rule"}
    params: str | None
    excluded: list[str]  # parameters left out by name
    labels: bool
    measures: Mapping[str, Any]  # name -> settings
    sketch: Mapping[str, Any] | None  # its scheme
    seed: int
    shard_size: int
    microbatch: int
    threads_per_worker: int
    device: str
    versions: Mapping[str, str]
    sketch_dtype: str | None  # that sketches are stored in, if there are any
    probe_products: str = "backward"  # the pass that products with probes come from; once there was no other

    @property
    def steps(self) -> list[int]:
        return [int(step) for step in self.checkpoints]

    @property
    def blocks(self) -> int:
        """How many jackknife blocks the shards of a step fall into."""
        entries = sum(int(math.prod(parameter["shape"])) for parameter in self.parameters.values())
        affordable = max(2, _BLOCK_BYTES // (8 * max(1, entries)))
        return min(_MAX_BLOCKS, self.shards, affordable)

    @property
    def shards(self) -> int:
        return -(-self.examples // self.shard_size)

    def units(self) -> list[Unit]:
        """Every shard of every step, step by step; a shard's block is a contiguous run of shards."""
        return [self.unit(step, shard) for step in self.steps for shard in range(self.shards)]

    def unit(self, step: int, shard: int) -> Unit:
        start = shard * self.shard_size
        stop = min(start + self.shard_size, self.examples)
        return Unit(step, shard, start, stop, shard * self.blocks // self.shards)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises: GradscaleError if the text is not a plan."""
        try:
            found = json.loads(text)
            if "kind" in found:
                raise ValueError(f"the plan of a {found['kind']} run")
            found.setdefault("sketch_dtype", "float32" if found.get("sketch") else None)  # of before there was a choice
            return cls(**found)
        except (ValueError, TypeError, AttributeError) as error:
            raise GradscaleError(
                f"run.json must hold the plan of a run of this version of gradscale, got {error}; take another --out, "
                "the files of the run stay readable as Parquet"
            ) from error


def differences(old: Written, new: Written) -> list[str]:
    """Where two plans differ, a line for each setting; empty if they are equal.

    Where a checkpoint lies is no difference: its fingerprint tells whether it is the same one.
    """
    before, after = json.loads(old.to_json()), json.loads(new.to_json())
    for checkpoint in (*before["checkpoints"].values(), *after["checkpoints"].values()):
        del checkpoint["path"]
    return [line for name in before for line in _difference(name, before[name], after[name])]


def _difference(name: str, before: Any, after: Any) -> list[str]:
    if before == after:
        return []
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [line for key in keys for line in _difference(f"{name}.{key}", before.get(key), after.get(key))]
    return [f"{name}: {before!r} in the run, {after!r} now"]


def check_positive(**settings: int) -> None:
    """Raises: GradscaleError naming the first setting that is not a whole number of at least 1."""
    for name, value in settings.items():
        if not isinstance(value, int) or value < 1:
            raise GradscaleError(f"{name} must be a whole number of at least 1, got {value!r}")
