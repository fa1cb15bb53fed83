"""The run directory of a training: a step's shards are the ranks' parts, and a step is there once run.json lists it.

Only rows and sketches go by way of the disk. The ranks' states, of P numbers and more, go to the first rank, which
merges them as they come; they are written where they are to be kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradscale.errors import GradscaleError
from gradscale.grads.readings import Projected
from gradscale.grads.ride import scaled
from gradscale.measures.identities import Recorded, check_moments, check_products, check_sums
from gradscale.measures.measure import MicroBatch, Statistic, statistic_of
from gradscale.measures.moments import MomentsStatistic
from gradscale.run.attach_plan import planned
from gradscale.run.attach_setup import Setup
from gradscale.run.attach_step import Block, Part
from gradscale.run.attach_together import at_first, gathered, rank, together
from gradscale.run.fold import EstimateRow, flatten, rows_of, unflatten
from gradscale.run.job import open_store
from gradscale.run.plan import Plan, differences
from gradscale.store.files import Files
from gradscale.store.folder import read_table
from gradscale.store.narrow import Narrowed, narrowed
from gradscale.store.store import ESTIMATES, PLAN, ShardColumns, Store

_FOLDERS = ("rows", "sketches", "states", "commits", "failures")
States = dict[Statistic[Any], Any]


@dataclass(eq=False)
class Keeper:
    """Writes a rank's part of every measured step; the first rank commits them, and keeps the plan and estimates."""

    setup: Setup
    store: Store
    keep_states: bool
    plan: Plan
    estimates: list[tuple[Any, ...]] = field(default_factory=list)

    @classmethod
    def opened(cls, setup: Setup, out: str, first: int, keep_states: bool) -> Keeper:
        """The run in the folder `out`, new or gone on with from step `first`. Only the first rank touches it.

        Raises: GradscaleError if `out` is something else, or a run of other settings.
        """
        if rank():
            return cls(setup, Store(Files(out)), keep_states, planned(setup))
        keeper = cls(setup, open_store(out), keep_states, planned(setup))
        keeper._resume(first)
        return keeper

    def keep(self, step: int, part: Part) -> None:
        """Store the step. Collectives. Raises: on all ranks, whatever fails on one; the step is then not there."""
        counts = gathered(part.n)
        start, n = sum(counts[: rank()]), sum(counts)
        try:
            record, states = together(lambda: self._write(step, start, part, n / self.setup.ranks))
            records = gathered(record)
            merged, problem = self._merged(states)
            together(lambda: self._commit(step, records, merged, problem) if not rank() else None)
        except Exception:
            if not rank():
                self._forget(step)
            raise

    def _write(self, step: int, start: int, part: Part, scale: float) -> tuple[dict[str, Any], States]:
        """The rows and sketches of this rank's examples, whose ids begin at `start`; the commit record, the states."""
        setup, ids = self.setup, range(start, start + part.n)
        blocks = [block._replace(readings=scaled(block.readings, scale)) for block in part.blocks]
        states = states_of(setup, start, blocks)
        stored = self._narrowed(ids, blocks)
        columns: ShardColumns = pytree.tree_map_only(Tensor, Tensor.cpu, _columns(setup, ids, blocks, stored))
        sq_norm = math.fsum(norm for block in blocks for norm in block.readings.sq_norms.sum(dim=1).tolist())
        names, scheme = list(setup.parameters), None if setup.sketch is None else setup.sketch.scheme
        written = self.store.write_shard(step, rank(), columns, {}, names, scheme)
        record: dict[str, Any] = {
            "step": step,
            "shard": rank(),
            "start": ids.start,
            "stop": ids.stop,
            "nonfinite": 0,
            "sq_norm": sq_norm,
            "files": [list(file) for file in written if not file.name.startswith("states/")],
        }
        if stored is not None:
            record["underflown"] = {"zeroed": int(stored.zeroed.sum()), "coarse": stored.coarse}
        return record, states

    def _narrowed(self, ids: range, blocks: Sequence[Block]) -> Narrowed | None:
        if self.setup.sketch is None:
            return None
        reading = Projected(self.setup.sketch)
        found = torch.cat([block.readings.projections[reading] for block in blocks]).cpu()
        finite = torch.ones(len(ids), dtype=torch.bool)
        return narrowed(found, torch.tensor(ids), finite, self.setup.sketch_dtype)

    def _merged(self, states: States) -> tuple[States, Exception | None]:
        """On the first rank the states of all, in the order of ranks. A collective, which no failure cuts short."""
        flat = {(key, name): tensor for key, fields in flatten(states).items() for name, tensor in fields.items()}
        merged: States = {}
        problem = None
        for found in at_first(flat, self.setup.device):
            try:
                nested: dict[str, dict[str, Tensor]] = {}
                for (key, name), tensor in found.items():
                    nested.setdefault(key, {})[name] = tensor
                theirs = unflatten(self.setup.statistics, nested)
                merged = {each: each.merge(merged[each], theirs[each]) for each in theirs} if merged else theirs
            except Exception as raised:
                problem = problem or raised
        return merged, problem

    def _commit(
        self, step: int, records: Sequence[Mapping[str, Any]], merged: States, problem: Exception | None
    ) -> None:
        if problem is not None:
            raise problem
        rows = [tuple(row) for row in estimated(self.setup, step, merged, records)]
        for record in records:
            self.store.commit(step, record["shard"], record)
        self.store.files.delete_folder(f"states/{_name(step)}")
        if self.keep_states:
            self.store.write_merged(step, flatten(merged), 0)
        self.store.write_estimates([*self.estimates, *rows])
        listed = {**self.plan.checkpoints, str(step): {"path": None, "fingerprint": None}}
        plan = dataclasses.replace(self.plan, checkpoints=listed)
        self.store.files.write(PLAN, plan.to_json().encode())
        self.estimates += rows
        self.plan = plan

    def _forget(self, step: int) -> None:
        for folder in _FOLDERS:
            with suppress(OSError):  # what stays is not listed, and goes when the run is gone on with
                self.store.files.delete_folder(f"{folder}/{_name(step)}")

    def _resume(self, first: int) -> None:
        files, kept = self.store.files, dict[str, Any]()
        if files.exists(PLAN):
            old = Plan.from_json(files.read(PLAN).to_pybytes().decode())
            kept = {step: each for step, each in old.checkpoints.items() if int(step) < first}
            changed = differences(
                dataclasses.replace(old, checkpoints=kept), dataclasses.replace(self.plan, checkpoints=kept)
            )
            if changed and old.checkpoints:
                raise GradscaleError(
                    f"the settings must be those of the run that {files.root} already holds, got\n  "
                    + "\n  ".join(changed)
                    + "\nuse them again, or another out"
                )
        self.plan = dataclasses.replace(self.plan, checkpoints=kept)
        if files.exists(ESTIMATES):
            rows = read_table(files, ESTIMATES).to_pylist()
            self.estimates = [tuple(row.values()) for row in rows if str(row["step"]) in kept]
            self.store.write_estimates(self.estimates)
        files.write(PLAN, self.plan.to_json().encode())
        there = {name.split("/")[1] for folder in _FOLDERS for name in files.list(folder)}
        for name in there - {_name(int(step)) for step in kept}:
            for folder in ("commits", *_FOLDERS):
                files.delete_folder(f"{folder}/{name}")


def states_of(setup: Setup, start: int, blocks: Sequence[Block]) -> States:
    """Of one rank's examples, from id `start` on. Raises: GradscaleError as `check_products` and `check_sums`."""
    states: States = {statistic: statistic.init() for statistic in setup.statistics}
    eps = max(torch.finfo(parameter.dtype).eps for parameter in setup.parameters.values())
    for block in blocks:
        ids, readings, labels = range(start, start + block.n), block.readings, block.labels
        start = ids.stop
        batch = MicroBatch(
            torch.arange(ids.start, ids.stop, device=readings.losses.device),
            readings.losses,
            labels if labels is None else labels.to(readings.losses.device),
            tuple(setup.parameters),
            readings.sq_norms,
            readings.sums,
            readings.projections,
            block.number,
        )
        check_products(batch, ids)
        check_sums(batch, ids, eps)
        states = {statistic: statistic.update(state, batch) for statistic, state in states.items()}
    return states


def estimated(
    setup: Setup, step: int, states: Mapping[Statistic[Any], Any], records: Sequence[Mapping[str, Any]]
) -> Iterator[EstimateRow]:
    """Every measure's estimates at one step, by scope as in every run.

    Raises: GradscaleError if the states violate an identity, see `check_moments`.
    """
    recorded = Recorded(sum(r["stop"] - r["start"] for r in records), math.fsum(r["sq_norm"] for r in records))
    for statistic, state in states.items():
        if isinstance(statistic, MomentsStatistic):
            check_moments(state, recorded, step)
    for measure in setup.measures:
        yield from rows_of(setup.parameters, step, measure, measure.compute(states[statistic_of(measure)]))


def _columns(setup: Setup, ids: range, blocks: Sequence[Block], stored: Narrowed | None) -> ShardColumns:
    """Numbers that are not asked for are NaN."""
    losses, sq_norms = (
        torch.cat([getattr(block.readings, name) for block in blocks]) for name in ("losses", "sq_norms")
    )
    labels = [block.labels for block in blocks if block.labels is not None]
    filled = {"loss": losses, "grad_sq_norm": sq_norms.sum(dim=1), "layer_sq_norms": sq_norms}
    numbers = {
        name: values if name in setup.columns else torch.full_like(values, torch.nan) for name, values in filled.items()
    }
    return ShardColumns(
        torch.tensor(ids),
        torch.cat(labels) if labels else None,
        **numbers,
        finite=torch.ones(len(ids), dtype=torch.bool),
        sketch=None if stored is None else stored.matrix,
    )


def _name(step: int) -> str:
    return f"step-{step:08d}"
