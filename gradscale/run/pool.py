"""Ray actors that hold a worker each and take items one by one.

Ray may run an item more than once; the commit record makes it count once. An actor that dies is restarted by
Ray and its item is done again. An item that raises is tried up to three times.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gradscale.errors import GradscaleError, OutOfMemory
from gradscale.run.cluster import Resources, pickled
from gradscale.run.memory import memory_message
from gradscale.run.worker import Worker

_LOG = logging.getLogger("gradscale")
_ATTEMPTS = 3
_DEATHS = 5  # an item in whose hands so many actors died is given up: it kills them
_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 30.0  # without a single worker, before the log says so
_INLINE_BYTES = 1 << 16  # Ray sends arguments of this size with the call itself


class Tried(Protocol):
    """What a pool has to know of a job."""

    @property
    def microbatch(self) -> int: ...


class Failure(NamedTuple):
    item: Any
    attempts: int
    error: Exception


class Pool:
    """A fixed number of actors on the Ray cluster that this process has joined; `with` ends them.

    Were they left to the garbage collector, an exception that somebody keeps would keep them and their CPUs too.
    """

    def __init__(self, job: Tried, workers: int, resources: Resources, kind: type = Worker) -> None:
        """`kind` is the class of the actors, made as `Worker` is; it has the method `ready`."""
        import ray

        actor: Any = ray.remote(kind).options(
            num_cpus=resources.threads, num_gpus=resources.gpus, max_restarts=-1, max_task_retries=0
        )
        shipped = pickled(job)
        self._job = shipped if len(shipped) < _INLINE_BYTES else ray.put(shipped)  # held: actors restart from it
        self._actors: list[Any] = [actor.remote(self._job, *place_of_driver()) for _ in range(workers)]
        self._microbatch = job.microbatch

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)

    def call(self, method: str, *arguments: Any) -> Any:
        """Run one method on whichever actor is up first; its last error is raised here."""
        results: list[Any] = []
        failures = self.map(method, [arguments], lambda result: results.append(result))
        if failures:
            raise failures[0].error
        return results[0]

    def map(self, method: str, items: Sequence[tuple[Any, ...]], on_result: Callable[[Any], None]) -> list[Failure]:
        """Call `method(*item)` for every item on some actor; `on_result` runs here, once for each that succeeds.

        Returns the items given up. Raises: OutOfMemory at once; GradscaleError if no actor can start.
        """
        dispatch = Dispatch(self._actors, method, items, self._microbatch)
        dispatch.run(on_result)
        return dispatch.failures

    def pids(self) -> list[int]:
        """The actors' process ids."""
        import ray

        return [int(pid) for pid in ray.get([actor.ready.remote() for actor in self._actors])]


class Dispatch:
    """One pass of items over actors. An actor gets its first item once it is up, so slow starters hold nothing back."""

    def __init__(self, actors: list[Any], method: str, items: Sequence[tuple[Any, ...]], microbatch: int) -> None:
        self.failures: list[Failure] = []
        self.actors = actors
        self._method = method
        self._items = items
        self._microbatch = microbatch
        self._waiting = deque(range(len(items)))
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[Any, int]] = {}  # reference -> (actor, index of its item)
        self._starting = {actor.ready.remote(): actor for actor in actors}
        self._raised: Counter[int] = Counter()
        self._deaths: Counter[int] = Counter()

    @property
    def unfinished(self) -> list[tuple[Any, ...]]:
        """The items that have neither a result nor been given up, of a run that has been interrupted too."""
        running = [index for _, index in self._running.values()]
        return [self._items[index] for index in sorted([*self._waiting, *running])]

    def run(self, on_result: Callable[[Any], None]) -> None:
        import ray

        started = time.monotonic()
        while self._waiting or self._running:
            if not (self._idle or self._running) and time.monotonic() - started > _PATIENCE_SECONDS:
                _LOG.warning("still waiting for a first worker; the cluster has %s", ray.available_resources())
                started = time.monotonic()
            while self._waiting and self._idle:
                actor, index = self._idle.pop(), self._waiting.popleft()
                self._running[getattr(actor, self._method).remote(*self._items[index])] = (actor, index)
            for reference in ray.wait([*self._running, *self._starting], timeout=_POLL_SECONDS)[0]:
                if reference in self._starting:
                    self._started(reference, self._starting.pop(reference))
                else:
                    self._finished(reference, *self._running.pop(reference), on_result)

    def _started(self, reference: Any, actor: Any) -> None:
        import ray

        try:
            ray.get(reference)
            self._idle.append(actor)
        except ray.exceptions.ActorDiedError as error:
            self._drop(actor, error)
        except ray.exceptions.RayActorError:
            self._starting[actor.ready.remote()] = actor  # still restarting

    def _finished(self, reference: Any, actor: Any, index: int, on_result: Callable[[Any], None]) -> None:
        import ray

        try:
            result = ray.get(reference)
        except ray.exceptions.RayActorError as error:
            self._died(index, error)
            if isinstance(error, ray.exceptions.ActorDiedError):
                self._drop(actor, error)
            else:
                self._starting[actor.ready.remote()] = actor
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            self._died(index, error)
            self._starting[actor.ready.remote()] = actor
        except ray.exceptions.RayTaskError as error:
            self._idle.append(actor)
            self._raise_or_retry(index, error.cause or error)
        else:
            self._idle.append(actor)
            on_result(result)

    def _raise_or_retry(self, index: int, error: Exception) -> None:
        if isinstance(error, OutOfMemory):
            raise error
        self._raised[index] += 1
        if isinstance(error, GradscaleError) or self._raised[index] >= _ATTEMPTS:
            self.failures.append(Failure(self._items[index], self._raised[index], error))
        else:
            self._waiting.append(index)

    def _died(self, index: int, error: Exception) -> None:
        self._deaths[index] += 1
        if self._deaths[index] < _DEATHS:
            self._waiting.appendleft(index)
            return
        hint = f"{_DEATHS} workers died over it, perhaps killed for memory: {memory_message(self._microbatch)}"
        self.failures.append(
            Failure(self._items[index], self._deaths[index], GradscaleError(f"{hint} ({short(error)})"))
        )

    def _drop(self, actor: Any, error: Exception) -> None:
        """An actor that Ray does not restart: it could not be made."""
        self.actors.remove(actor)
        if not self.actors:
            raise GradscaleError(
                f"a worker must be able to start, got {short(error)}; the task must be importable or picklable there"
            ) from error


def place_of_driver() -> tuple[list[str], str]:
    """Its sys.path and working directory, for workers: see `unpacked`."""
    return [str(Path(entry).resolve()) for entry in sys.path], os.getcwd()


def short(error: Exception) -> str:
    """The last line of Ray's long messages that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
