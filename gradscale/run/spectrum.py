"""The spectrum job: traces as shard jobs on a pool, Krylov spaces on a gang, every part committed once.

A run that exists is resumed: the parts that are there are kept, a Lanczos run goes on from its last commit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gradscale.checkpoints import resolve
from gradscale.errors import GradscaleError
from gradscale.measures.settings import json_values, plain_fields
from gradscale.run.cluster import Resources, ray_session
from gradscale.run.gang import Gang
from gradscale.run.job import adopt, identity, open_store, resolve_task
from gradscale.run.plan import check_positive
from gradscale.run.pool import Pool
from gradscale.run.spectrum_parts import SpectrumParts, SpectrumProgress, needs_gang
from gradscale.run.spectrum_plan import (
    SLQ,
    Deflated,
    Hutchinson,
    Norms,
    SpectrumPlan,
    Stability,
    check_settings,
    check_sizes,
)
from gradscale.run.spectrum_worker import Described, SpectrumJob, SpectrumWorker
from gradscale.store.parts import Parts
from gradscale.store.spectra import Spectrum
from gradscale.task import Task


def spectrum(
    task: Task | str,
    out: str,
    operator: str = "hessian",
    top: int = 10,
    trace: bool | Hutchinson | Deflated = True,
    density: bool | SLQ = False,
    norms: bool | Norms = False,
    stability: Stability | None = None,
    checkpoints: Sequence[str] | Mapping[int, str] | None = None,
    workers: int = 2,
    seed: int = 0,
    which: str = "largest",
    tolerance: float = 1e-6,
    max_steps: int = 300,
    basis_cap: int | None = None,
    vectors: str = "float32",
    backend: str = "auto",
    examples: int | None = None,
    microbatch: int = 32,
    shard_size: int = 256,
    params: str | None = None,
    exclude: Sequence[str] = (),
    gpus_per_worker: float = 0,
    threads_per_worker: int = 1,
    address: str | None = None,
    task_options: Mapping[str, Any] | None = None,
    commit_seconds: float = 60.0,
    on_progress: Callable[[SpectrumProgress], None] | None = None,
) -> Spectrum:
    """Eigenvalues, traces and the spectral density of an operator of a task's model, at every checkpoint.

    `operator`: the Hessian of the mean loss over the first `examples` (None: all), its Gauss-Newton part `ggn`, or the
    `covariance` of the examples' gradients. `top` eigenvalues (0: none) by `which` end, see
    `gradscale.curvature.lanczos`; a start in float32 or float64 `vectors`. `backend`: the way of Hessian products, see
    `choose_hessian`; auto takes the first that the model allows, and says which in parts/step-.../choice.json. `params`
    and `exclude` restrict the operator to a diagonal block.

    Traces are shard jobs of a pool of `workers` Ray actors; the rest is solved by a gang of as many, each of which
    holds a part of 1 / workers of every vector and takes as much of the examples. A gang that loses a process goes on
    from what it committed last; commits are `commit_seconds` apart. Results depend on `workers` within rounding.

    Cost: products of all examples, of two to three forward and backward passes each: one an iteration of Lanczos, a
    probe of the trace or of the norms, and a node of each probe of the density.
    Raises: GradscaleError for what the user can put right; OutOfMemory with what to try; ShardsFailed once all other
    units of a trace are done, if some raised on every attempt.
    Source: Wu and Simon (2000), Lanczos with thick restarts; Hutchinson (1990); Ghorbani, Krishnan and Xiao (2019),
    arXiv 1901.10159; Mulayoff and Michaeli (2023), arXiv 2306.07850, for stability.
    """
    check_positive(workers=workers, microbatch=microbatch, shard_size=shard_size, threads_per_worker=threads_per_worker,
                   max_steps=max_steps)  # fmt: skip
    asked = _asked(operator, trace, density, norms, stability)
    check_settings(operator, top, which, tolerance, backend, vectors, list(asked.values()), bool(asked["norms"]))
    if stability is not None and (not top or which == "magnitude" or operator == "covariance"):
        raise GradscaleError(
            f"stability needs the largest eigenvalue of hessian or ggn, got top = {top}, which = {which} and operator "
            f"{operator}; ask for --top 1"
        )
    options = dict(task_options or {})
    name, loaded = resolve_task(task, options)
    options = options or plain_fields(loaded)
    steps = resolve(checkpoints)
    store = open_store(out)
    device = "cuda" if gpus_per_worker else "cpu"
    job = SpectrumJob(loaded, store.files.root, params, tuple(exclude), microbatch, threads_per_worker, device,
                      commit_seconds)  # fmt: skip
    resources = Resources(threads_per_worker, gpus_per_worker)
    chosen: dict[str, Any] = {
        "operator": operator,
        "top": top,
        "which": which,
        "tolerance": tolerance,
        "max_steps": max_steps,
        "basis_cap": basis_cap,
        "vectors": vectors,
        "backend": backend,
        "seed": seed,
        "shard_size": shard_size,
        "microbatch": microbatch,
        "params": params,
        "excluded": list(exclude),
        "threads_per_worker": threads_per_worker,
        "device": device,
        **asked,
    }
    kind = Gang if needs_gang(top, operator, **asked) else Pool
    if kind is Gang and workers > 1 and not float(gpus_per_worker).is_integer():
        raise GradscaleError(
            f"gpus_per_worker must be a whole number where workers meet, got {gpus_per_worker}; two ranks cannot share "
            "a GPU, use fewer workers"
        )
    with ray_session(address, workers, resources), kind(job, workers, resources, SpectrumWorker) as actors:
        described: Described = actors.call("describe", steps[0].path)
        plan = SpectrumPlan(
            task=name,
            task_options=json_values(options),
            checkpoints={str(c.step): identity(c.path) for c in steps},
            examples=_count(examples, described.examples),
            data_fingerprint=described.data_fingerprint,
            parameters=described.parameters,
            versions=described.versions,
            **chosen,
        )
        check_sizes(plan, workers, kind is Gang)
        parts = Parts(store.files)
        adopt(store, plan, parts.any())
        run = SpectrumParts(plan, parts, on_progress)
        for step in plan.steps:
            run.choose(actors, step)
            run.trace(actors, step, workers)
            if isinstance(actors, Gang):
                run.solve(actors, step)
    run.write(store)
    return Spectrum(store.files)


def _asked(
    operator: str,
    trace: bool | Hutchinson | Deflated,
    density: bool | SLQ,
    norms: bool | Norms,
    stability: Stability | None,
) -> dict[str, dict[str, Any] | None]:
    """The quantities' settings as the plan has them; True stands for the defaults."""
    chosen = {
        "trace": Hutchinson() if trace is True else trace or None,
        "density": SLQ() if density is True else density or None,
        "norms": Norms() if norms is True else norms or None,
        "stability": stability,
    }
    if isinstance(trace, Deflated) and operator == "covariance":
        raise GradscaleError(
            f"method of the trace must be left out for the covariance, whose trace is exact, got {trace.method}"
        )
    if isinstance(trace, Deflated) and trace.method == "xnystrace" and operator == "hessian":
        raise GradscaleError(
            "method of the trace must be hutchinson, hutch++ or xtrace for a Hessian, which has negative eigenvalues, "
            "got xnystrace; take hutch++"
        )
    found = {}
    for name, settings in chosen.items():
        method = {"method": settings.method} if isinstance(settings, Hutchinson | Deflated) else {}
        found[name] = None if settings is None else {**dataclasses.asdict(settings), **method}
    return found


def _count(asked: int | None, present: int) -> int:
    if asked is None:
        return present
    if not isinstance(asked, int) or not 1 <= asked <= present:
        raise GradscaleError(f"examples must be from 1 to the {present} of the dataset, got {asked!r}; take fewer")
    return asked
