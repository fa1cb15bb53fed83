"""The main job: plan, measure every unit on a pool of workers, commit each once, estimate.

A run that exists is resumed: what is committed is kept, the rest is done, and the estimates come out with the
same bytes as those of an undisturbed run.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gradscale.checkpoints import Checkpoint, resolve
from gradscale.checkpoints import fingerprint as checkpoint_fingerprint
from gradscale.errors import GradscaleError, ShardsFailed
from gradscale.grads.readings import GradientSums
from gradscale.measures.coherence import Coherence
from gradscale.measures.dispersion import Dispersion
from gradscale.measures.gaussian_width import GaussianWidth
from gradscale.measures.measure import Measure, statistic_of
from gradscale.measures.settings import check_measures, json_values, plain_fields, settings_of
from gradscale.run.cluster import Resources, ray_session
from gradscale.run.notices import covered, one_block, underflow
from gradscale.run.plan import Plan, Written, check_positive, differences
from gradscale.run.pool import Failure, Pool
from gradscale.run.probe_products import check_probe_products
from gradscale.run.worker import Description, Job
from gradscale.sketches import Sketch, parse_sketch
from gradscale.store.files import Files
from gradscale.store.narrow import check_dtype
from gradscale.store.results import Run
from gradscale.store.store import PLAN, Store
from gradscale.task import Task, check_task, load_task

_LOG = logging.getLogger("gradscale")


class Progress(NamedTuple):
    """How far a run is: `done` of `total` examples over all steps, `fresh` of them in the `seconds` of this call."""

    done: int
    total: int
    fresh: int
    seconds: float

    @property
    def rate(self) -> float:
        """Examples per second; 0 before the first shard is done."""
        return self.fresh / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        return (self.total - self.done) / self.rate if self.rate else None


def measure(
    task: Task | str,
    out: str,
    measures: Sequence[Measure] = (Coherence(), Dispersion(), GaussianWidth()),
    checkpoints: Sequence[str] | Mapping[int, str] | None = None,
    workers: int = 2,
    microbatch: int = 32,
    shard_size: int = 256,
    sketch: Sketch | str | None = None,
    params: str | None = None,
    seed: int = 0,
    gpus_per_worker: float = 0,
    threads_per_worker: int = 1,
    address: str | None = None,
    task_options: Mapping[str, Any] | None = None,
    exclude: Sequence[str] = (),
    on_progress: Callable[[Progress], None] | None = None,
    sketch_dtype: str = "float32",
    probe_products: str = "auto",
) -> Run:
    """Measure per-example gradients of a task at every checkpoint, sharded over Ray actors, into the folder `out`.

    `checkpoints`: paths, globs or folders of checkpoints, whose step is the number in their name, or a mapping from
    step to path; None measures the initial weights as step 0. `sketch` is a Sketch, NAME:K or identity, stored as
    `sketch_dtype` (float32 or float16), and its error is measured on a few examples of every step. `params` is a
    regular expression for the parameters to measure, `exclude` names some that are not. `address` joins a running Ray
    cluster; None starts one in this process, or joins RAY_ADDRESS. `probe_products` is the pass that products with
    Gaussian probes come from: backward, forward (mode), or auto, the cheaper one that the model allows.

    Raises: GradscaleError for what the user can put right; OutOfMemory with the microbatch size to try; ShardsFailed
    once all other shards are committed, if some raised on every attempt.
    """
    check_positive(workers=workers, microbatch=microbatch, shard_size=shard_size, threads_per_worker=threads_per_worker)
    options = dict(task_options or {})
    name, task = resolve_task(task, options)
    options = options or plain_fields(task)
    steps = resolve(checkpoints)
    store = open_store(out)
    job = Job(
        task,
        store.files.root,
        check_measures(measures),
        parse_sketch(sketch, seed) if isinstance(sketch, str) else sketch,
        params,
        tuple(exclude),
        microbatch,
        threads_per_worker,
        "cuda" if gpus_per_worker else "cpu",
        _sketch_dtype(sketch, sketch_dtype),
        check_probe_products(probe_products),
    )
    resources = Resources(threads_per_worker, gpus_per_worker)
    with ray_session(address, workers, resources), Pool(job, workers, resources) as pool:
        description = pool.call("describe", steps[0].path, shard_size)
        plan = _plan(job, name, options, steps, description, seed, shard_size)
        _LOG.info("%s", covered(plan))
        if notice := one_block(plan, job.measures):
            _LOG.warning("%s", notice)
        if description.probe_products.way == "forward":
            _LOG.info("products with probes come from forward mode: %s", description.probe_products.why)
        _check_workers(workers, plan)
        _check_labels(plan, job)
        adopt(store, plan, bool(store.committed()))
        failures = _measure_units(pool, store, plan, on_progress)
        _estimate(pool, store, plan)
    _report_failures(failures)
    return Run(store.files)


def open_store(out: str) -> Store:
    """The store at `out`, cleared of leftovers.

    Raises: GradscaleError if `out` is neither new, nor an empty folder, nor a run; or of a job a relative path.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and "://" not in out and not os.path.isabs(out):
        raise GradscaleError(
            f"out of a job must be an absolute path or a URI, got {out}; the job's folder is a copy that the cluster "
            "throws away"
        )
    files = Files(out)
    if files.size("") >= 0:
        raise GradscaleError(f"out must be a folder, got the file {out}; choose another name")
    if not files.exists(PLAN) and files.exists() and any(not name.endswith(".tmp") for name in files.list()):
        raise GradscaleError(
            f"out must be a new folder, an empty one or a gradscale run, got {out} with other files and no {PLAN}; "
            "choose another folder"
        )
    list(files.delete_leftovers())
    return Store(files)


def adopt(store: Store, plan: Written, begun: bool) -> None:
    """Make `plan` the run's, or check that it is the one that the run has.

    A plan under which nothing has been committed (not `begun`) may be replaced.
    Raises: GradscaleError listing the differences.
    """
    if store.files.exists(PLAN):
        old = type(plan).from_json(store.files.read(PLAN).to_pybytes().decode())
        changed = differences(old, plan)
        if changed and begun:
            raise GradscaleError(
                f"the settings must be those of the run that {store.files.root} already holds, got\n  "
                + "\n  ".join(changed)
                + "\nuse them again, or another --out"
            )
        if not changed:
            return
    store.files.write(PLAN, plan.to_json().encode())


def _plan(
    job: Job,
    name: str,
    options: Mapping[str, Any],
    steps: Sequence[Checkpoint],
    description: Description,
    seed: int,
    shard_size: int,
) -> Plan:
    return Plan(
        task=name,
        task_options=json_values(options),
        checkpoints={str(c.step): identity(c.path) for c in steps},
        examples=description.examples,
        data_fingerprint=description.data_fingerprint,
        parameters=description.parameters,
        params=job.params,
        excluded=list(job.excluded),
        labels=description.labels,
        measures={measure.name: settings_of(measure) for measure in job.measures},
        sketch=_scheme(job.sketch, description),
        seed=seed,
        shard_size=shard_size,
        microbatch=job.microbatch,
        threads_per_worker=job.threads,
        device=job.device,
        versions=description.versions,
        sketch_dtype=job.sketch_dtype if job.sketch is not None else None,
        probe_products=description.probe_products.way,
    )


def _scheme(sketch: Sketch | None, description: Description) -> dict[str, Any] | None:
    if sketch is None:
        return None
    sizes = {name: math.prod(parameter["shape"]) for name, parameter in description.parameters.items()}
    return dict(sketch.bind(sizes).scheme)


def _sketch_dtype(sketch: Sketch | str | None, dtype: str) -> str:
    """Raises: GradscaleError if there is no such type, or nothing to store in it."""
    if sketch is None and check_dtype(dtype) != "float32":
        raise GradscaleError(f"sketch_dtype must come with a sketch, got {dtype} without one; add --sketch NAME:K")
    return check_dtype(dtype)


def identity(path: str | None) -> dict[str, str | None]:
    """What a plan says of a checkpoint."""
    if path is None:
        return {"path": None, "fingerprint": None}
    absolute = path if "://" in path else str(Path(path).expanduser().absolute())
    return {"path": absolute, "fingerprint": checkpoint_fingerprint(path)}


def _measure_units(
    pool: Pool, store: Store, plan: Plan, on_progress: Callable[[Progress], None] | None
) -> list[Failure]:
    """Measure and commit whatever is not committed yet."""
    committed = store.committed()
    units = [unit for unit in plan.units() if (unit.step, unit.shard) not in committed]
    total = plan.examples * len(plan.steps)
    fresh, started = 0, time.monotonic()
    underflown: Counter[str] = Counter()
    kept = total - sum(len(unit.ids) for unit in units)

    def tell() -> None:
        if on_progress is not None:
            on_progress(Progress(kept + fresh, total, fresh, time.monotonic() - started))

    def commit(record: dict[str, Any]) -> None:
        nonlocal fresh
        store.commit(record["step"], record["shard"], record)
        fresh += record["stop"] - record["start"]
        underflown.update(record.get("underflown", {}))
        tell()

    tell()
    failures = pool.map("measure", [(plan, unit) for unit in units], commit)
    if underflown["coarse"]:
        _LOG.warning("%s", underflow(underflown, plan.sketch_dtype))
    for failure in failures:
        unit = failure.item[1]
        record = {**dataclasses.asdict(unit), "attempts": failure.attempts, "error": str(failure.error)}
        store.record_failure(unit.step, unit.shard, record)
    return failures


def _estimate(pool: Pool, store: Store, plan: Plan) -> None:
    """Write the estimates of the steps all of whose shards are committed."""
    committed = store.committed()
    steps = [step for step in plan.steps if all((step, shard) in committed for shard in range(plan.shards))]
    rows: list[tuple[Any, ...]] = []
    failures = pool.map("estimate", [(plan, step) for step in steps], rows.extend)
    failures += pool.map("estimate_over_steps", [(plan, steps)], rows.extend)
    if failures:
        raise failures[0].error
    order = {name: j for j, name in enumerate(plan.measures)}
    store.write_estimates(sorted(rows, key=lambda row: (row[0], order.get(row[1], len(order)))))


def _report_failures(failures: Sequence[Failure]) -> None:
    """Raises: ShardsFailed naming the shards, if there are any."""
    if failures:
        lines = [f"{failure.item[1]}, {failure.attempts} attempts: {failure.error}" for failure in failures]
        raise ShardsFailed(
            f"{len(failures)} shards failed; the others are committed, and steps without all their shards have no "
            "estimates. Run the same command again to try them anew.\n  " + "\n  ".join(lines)
        )


def _check_workers(workers: int, plan: Plan) -> None:
    if workers > plan.examples:
        raise GradscaleError(
            f"workers must be at most the number of examples, {plan.examples}, got {workers}; use fewer workers"
        )


def _check_labels(plan: Plan, job: Job) -> None:
    asking = [measure.name for measure in job.measures if _reads_labels(measure)]
    if asking and not plan.labels:
        raise GradscaleError(
            f"estimates by class need task.labels(batch), got a task without it for {', '.join(asking)}"
        )


def _reads_labels(measure: Measure) -> bool:
    return any(isinstance(reading, GradientSums) and reading.by_class for reading in statistic_of(measure).needs)


def resolve_task(task: Task | str, options: Mapping[str, Any]) -> tuple[str, Task]:
    """The name that a plan has for the task, and the task."""
    if isinstance(task, str):
        return task, load_task(task, **options)
    kind = type(task)
    name = f"{kind.__module__}:{kind.__qualname__}"
    return name, check_task(task, name)
