"""What one process of a run does: load a checkpoint, measure units, fold steps. No Ray: `pool.py` makes it an actor."""

from __future__ import annotations

import math
import os
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from gradscale.errors import GradscaleError
from gradscale.grads.coverage import describe
from gradscale.grads.subject import Subject, load_batch
from gradscale.measures.measure import Measure
from gradscale.run.check import check_subject
from gradscale.run.fold import EstimateRow, estimate_over_steps, estimate_step, flatten, statistics_of
from gradscale.run.memory import explaining_memory
from gradscale.run.observations import try_beside
from gradscale.run.plan import Plan, Unit
from gradscale.run.probe_products import Choice, choose
from gradscale.run.shard import Columns, ShardResult, bound, labels_of, prepare, run_shard
from gradscale.run.sketch_error import sketch_error
from gradscale.sketches import BoundSketch, Sketch
from gradscale.store.files import Files
from gradscale.store.narrow import Narrowed, narrowed
from gradscale.store.store import ShardColumns, Store
from gradscale.task import Task, fingerprint


@dataclass(frozen=True)
class Job:
    """What every worker needs to know before there is a plan."""

    task: Task
    out: str
    measures: tuple[Measure, ...]
    sketch: Sketch | None
    params: str | None
    excluded: tuple[str, ...]
    microbatch: int
    threads: int
    device: str
    sketch_dtype: str = "float32"
    probe_products: str = "backward"  # or forward, or auto: see `probe_products.choose`


class Description(NamedTuple):
    """What a worker finds out about the task, for the plan."""

    examples: int
    data_fingerprint: str
    parameters: dict[str, Any]
    labels: bool
    versions: dict[str, str]
    probe_products: Choice


class Worker:
    """Holds one loaded checkpoint at a time.

    `job` is a pickled Job, `path` the driver's sys.path and `folder` its working directory: what the driver can
    import or open by a relative path, the worker can, where the node has it.
    """

    def __init__(self, job: bytes, path: Sequence[str], folder: str) -> None:
        self._job: Job = unpacked(job, path, folder)
        set_up(self._job.threads, self._job.device)
        self._store = Store(Files(self._job.out))
        self._loaded: _Loaded | None = None

    def ready(self) -> int:
        """The process id: the worker is up."""
        return os.getpid()

    def describe(self, checkpoint: str | None, shard_size: int) -> Description:
        """Load `checkpoint`, hold the hooks to autograd on its first examples, and say what the task is.

        Raises: GradscaleError if the task cannot be measured, or not by forward mode where that is asked for.
        """
        subject, parameters, _ = self._load(checkpoint)
        examples = len(subject.examples)
        if not examples:
            raise GradscaleError("the dataset must have at least one example, got 0; check --data")
        with explaining_memory(self._job.microbatch):
            check_subject(subject, self._job.microbatch)
            statistics = statistics_of(self._job.measures)
            choice = choose(self._job.probe_products, subject, statistics, self._job.microbatch, shard_size)
        first = load_batch(subject, range(1))
        try_beside(subject, statistics, first)
        return Description(
            examples,
            fingerprint(subject.examples),
            parameters,
            labels_of(subject.task, first) is not None,
            versions(self._job.device),
            choice,
        )

    def measure(self, plan: Plan, unit: Unit) -> dict[str, Any]:
        """Measure one shard and write its files; returns the content of its commit record."""
        subject, parameters, sketch = self._load(plan.checkpoints[str(unit.step)]["path"])
        if parameters != plan.parameters:
            raise GradscaleError(
                f"every checkpoint must have the parameters of the first one, got others at step {unit.step}; "
                "measure it into a run of its own"
            )
        job = self._job
        statistics, forward = statistics_of(job.measures), plan.probe_products == "forward"
        result = run_shard(subject, unit.ids, unit.block, job.microbatch, statistics, sketch, forward)
        stored = _narrowed(result.columns, job.sketch_dtype)
        if sketch is not None and stored is not None:
            result = self._with_sketches(subject, unit, result, stored, sketch)
        written = self._store.write_shard(
            unit.step,
            unit.shard,
            ShardColumns(*result.columns),
            flatten(result.states),
            list(plan.parameters),
            sketch.scheme if sketch is not None else None,
        )
        record: dict[str, Any] = {
            "step": unit.step,
            "shard": unit.shard,
            "start": unit.start,
            "stop": unit.stop,
            "nonfinite": int((~result.columns.finite).sum()),
            "sq_norm": math.fsum(result.columns.grad_sq_norm[result.columns.finite].tolist()),
            "files": [list(file) for file in written],
        }
        if stored is not None:
            record["underflown"] = {"zeroed": int(stored.zeroed.sum()), "coarse": stored.coarse}
        return record

    def _with_sketches(
        self, subject: Subject, unit: Unit, result: ShardResult, stored: Narrowed, sketch: BoundSketch
    ) -> ShardResult:
        """`result` with the sketches as they are stored and, in a step's first shard, their error."""
        columns = result.columns._replace(sketch=stored.matrix)
        if unit.shard:
            return ShardResult(columns, result.states)
        diagnostic = sketch_error(sketch.scheme)
        state = diagnostic.sample(subject, unit.ids, self._job.microbatch, columns.finite, stored)
        return ShardResult(columns, {**result.states, diagnostic: state})

    def estimate(self, plan: Plan, step: int) -> list[EstimateRow]:
        measures = self._job.measures  # and the error of the sketches, if they are stored
        diagnostics = () if plan.sketch is None else (sketch_error(plan.sketch),)
        return estimate_step(self._store, plan, (*measures, *diagnostics), step)

    def estimate_over_steps(self, plan: Plan, steps: Sequence[int]) -> list[EstimateRow]:
        return estimate_over_steps(self._store, plan, self._job.measures, steps)

    def _load(self, checkpoint: str | None) -> tuple[Subject, dict[str, Any], BoundSketch | None]:
        """The model of `checkpoint`, its parameters for the plan, and the sketch of them: once for all its shards."""
        if self._loaded is None or self._loaded.checkpoint != checkpoint:
            self._loaded = None  # free the one before
            job = self._job
            subject = prepare(job.task, checkpoint, job.params, job.device, job.excluded)
            self._loaded = _Loaded(checkpoint, subject, _parameters(subject), bound(job.sketch, subject))
        return self._loaded.subject, self._loaded.parameters, self._loaded.sketch


class _Loaded(NamedTuple):
    checkpoint: str | None
    subject: Subject
    parameters: dict[str, Any]
    sketch: BoundSketch | None


def _narrowed(columns: Columns, dtype: str) -> Narrowed | None:
    if columns.sketch is None:
        return None
    return narrowed(columns.sketch, columns.example_id, columns.finite, dtype)


def _parameters(subject: Subject) -> dict[str, Any]:
    return {
        row.name: {
            "shape": list(subject.parameters[row.name].shape),
            "dtype": str(subject.parameters[row.name].dtype).removeprefix("torch."),
            "rule": row.rule,
        }
        for row in describe(subject.sites, subject.parameters).parameters
    }


def unpacked(job: bytes, path: Sequence[str], folder: str) -> Any:
    """The job, in a process that can import and open what the driver can."""
    sys.path.extend(entry for entry in path if entry not in sys.path)
    if os.path.isdir(folder):
        os.chdir(folder)
    return pickle.loads(job)


def set_up(threads: int, device: str) -> None:
    """The process computes with so many threads, on a GPU the same bits every time."""
    torch.set_num_threads(threads)
    if device != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def versions(device: str) -> dict[str, str]:
    from gradscale import __version__

    hardware = torch.cuda.get_device_name() if device != "cpu" else torch.backends.cpu.get_cpu_capability()
    return {"gradscale": __version__, "torch": torch.__version__, "hardware": hardware}
