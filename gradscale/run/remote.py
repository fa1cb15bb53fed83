"""Plain Ray tasks: one function over many items, each of them a process's whole work for a while.

For items of seconds and more that hold no state between them; shards, which share a loaded checkpoint, go to the
actors of `pool.py`. Ray itself starts a task again whose process died.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from gradscale.errors import GradscaleError
from gradscale.run.cluster import Resources, pickled

_DEATHS = 3  # further starts of a task whose process died

Job = TypeVar("Job")
Item = TypeVar("Item")
Result = TypeVar("Result")


class _Place(NamedTuple):
    """What the driver can import, or open by a relative path, a task can too, where the node has it."""

    path: list[str]
    folder: str
    threads: int


def run_tasks(
    function: Callable[[Job, Item], Result],
    job: Job,
    items: Sequence[Item],
    workers: int,
    resources: Resources,
    on_result: Callable[[Item, Result], None],
) -> None:
    """Call `function(job, item)` for every item in Ray tasks, at most `workers` at a time, of the cluster joined.

    `function` is of a module that the workers can import too. `on_result` runs here, once for each item that succeeds.
    Raises: what a function raised, or a GradscaleError for an item that its process died of, once the items that had
    been started are done; no more are started. A function is deterministic, so what it raised is not tried again.
    """
    import ray

    remote = ray.remote(_call).options(num_cpus=resources.threads, num_gpus=resources.gpus, max_retries=_DEATHS)
    shipped = ray.put(pickled(job))
    place = _Place([str(Path(entry).resolve()) for entry in sys.path], os.getcwd(), resources.threads)
    waiting, running = deque(items), dict[Any, Item]()
    failed: Exception | None = None
    try:
        while running or (waiting and failed is None):
            while waiting and failed is None and len(running) < workers:
                item = waiting.popleft()
                running[remote.remote(place, function, shipped, item)] = item
            for reference in ray.wait(list(running))[0]:
                item = running.pop(reference)
                try:
                    result: Result = ray.get(reference)
                except (ray.exceptions.RayTaskError, ray.exceptions.RaySystemError) as error:
                    failed = failed or getattr(error, "cause", None) or error
                except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
                    failed = failed or _died(item, error)
                else:
                    on_result(item, result)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
    if failed is not None:
        raise failed


def _call(place: _Place, function: Callable[[Any, Any], Any], job: bytes, item: Any) -> Any:
    sys.path.extend(entry for entry in place.path if entry not in sys.path)
    if os.path.isdir(place.folder):
        os.chdir(place.folder)
    torch.set_num_threads(place.threads)
    return function(pickle.loads(job), item)


def _died(item: object, error: Exception) -> GradscaleError:
    return GradscaleError(
        f"a task must outlive its item, got {_DEATHS + 1} processes that died of {item}, perhaps killed for memory "
        f"({str(error).splitlines()[0]}); give it more memory, or a smaller problem"
    )
