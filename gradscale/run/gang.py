"""A gang: Ray actors that start together, meet in a process group of torch.distributed, and work in step.

One that is lost takes the gang with it: the others wait for it in a collective. All of them are ended and a new gang is
started, which goes on from what has been committed. Between such calls the actors take items one by one, as those of
a pool do.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from gradscale.errors import GradscaleError
from gradscale.run.cluster import Resources, pickled
from gradscale.run.pool import Dispatch, Failure, Tried, place_of_driver, short

_LOG = logging.getLogger("gradscale")
_LOSSES = 5  # gangs that may be lost in a row without a result
_ATTEMPTS = 3  # of a call that raises an error that is nobody's fault
_POLL_SECONDS = 1.0
_GRACE_SECONDS = 10.0  # for the other ranks to say what happened, once one has failed
_PATIENCE_SECONDS = 30.0


class Gang:
    """`workers` actors of the class `kind` on the cluster that this process has joined; `with` ends them.

    `kind` is made as `gradscale.run.worker.Worker` is, and has the methods ready() -> pid, join(address, port, rank,
    world) and progress(), beside those that `call` names. The actors are reserved together, close to each other where
    the cluster has room.
    """

    def __init__(self, job: Tried, workers: int, resources: Resources, kind: type) -> None:
        import ray

        self._job = ray.put(pickled(job))
        self._workers = workers
        self._resources = resources
        self._kind = kind
        self._microbatch = job.microbatch
        self._actors: list[Any] = []
        self._group: Any = None

    def __enter__(self) -> Gang:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def call(self, method: str, *arguments: Any, on_progress: Callable[[Any], None] | None = None) -> Any:
        """Run `method` on every rank; the result is rank 0's. `on_progress` is told what its `progress` says.

        A gang of which a process is lost is started anew, and runs the method from the beginning: it has to go on from
        what it has committed.
        Raises: what a rank raised; GradscaleError if gangs are lost again and again, or none can start.
        """
        import ray

        losses = attempts = 0
        while True:
            try:
                self._start()
                return self._run(method, arguments, on_progress)
            except _losses() as error:
                losses += 1
                _LOG.warning("a process of the gang was lost (%s); starting the gang again", short(error))
                if losses >= _LOSSES:
                    raise _not_outlived(method, error) from error
            except ray.exceptions.RayTaskError as error:
                problem: Exception = error.cause or error
                attempts += 1
                if isinstance(problem, GradscaleError) or attempts >= _ATTEMPTS:
                    raise problem from error
                _LOG.warning("%s of the gang failed (%s); starting the gang again", method, short(error))
            self._end()

    def map(self, method: str, items: Sequence[tuple[Any, ...]], on_result: Callable[[Any], None]) -> list[Failure]:
        """Run `method` on every item, each on one of the actors, as `Pool.map` does.

        The others do the items of an actor that dies; once none is left, a new gang does.
        Raises: as `Pool.map`; GradscaleError if gangs are lost again and again without a result.
        """
        left, failures, losses = items, list[Failure](), 0

        def keep(result: Any) -> None:
            nonlocal losses
            losses = 0
            on_result(result)

        while left:
            self._start_surely()
            dispatch = Dispatch(list(self._actors), method, left, self._microbatch)
            try:
                dispatch.run(keep)
            except GradscaleError as error:
                losses += 1
                if dispatch.actors:
                    raise
                if losses >= _LOSSES:
                    raise _not_outlived(method, error) from error
                _LOG.warning("all processes of the gang were lost; starting the gang again")
            finally:
                if len(dispatch.actors) < self._workers:
                    self._end()  # the next call starts a whole gang
            left = dispatch.unfinished
            failures += dispatch.failures
        return failures

    def pids(self) -> list[int]:
        """The ranks' process ids, in their order."""
        import ray

        self._start_surely()
        return [int(pid) for pid in ray.get([actor.ready.remote() for actor in self._actors])]

    def _start_surely(self) -> None:
        """`_start`, again if a process is lost, or the port taken, before all have met."""
        import ray

        expected: tuple[type[Exception], ...] = (*_losses(), ray.exceptions.RayTaskError)
        for attempt in range(1, _LOSSES + 1):
            try:
                self._start()
                break
            except expected as error:
                _LOG.warning("the gang could not start (%s); starting it again", short(error))
                self._end()
                if attempt == _LOSSES:
                    raise _not_outlived("its start", error) from error

    def _start(self) -> None:
        """Unless there is one: reserve the places, start the actors, let them meet."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        if self._actors:
            return
        threads, gpus = self._resources
        bundle = {"CPU": threads, "GPU": gpus} if gpus else {"CPU": threads}
        self._group = placement_group([bundle] * self._workers, strategy="PACK")
        started = time.monotonic()
        while not ray.wait([self._group.ready()], timeout=_PATIENCE_SECONDS)[0]:
            _LOG.warning(
                "still waiting, for %.0f s, for room for %d workers of %s at once; the cluster has %s",
                time.monotonic() - started,
                self._workers,
                bundle,
                ray.available_resources(),
            )
        places = [PlacementGroupSchedulingStrategy(self._group, rank) for rank in range(self._workers)]
        kind: Any = ray.remote(self._kind)
        path, folder = place_of_driver()
        self._actors = [
            kind.options(
                num_cpus=threads,
                num_gpus=gpus,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=2,  # to be asked about its progress while it works
                scheduling_strategy=place,
            ).remote(self._job, path, folder)
            for place in places
        ]
        try:
            ray.get([actor.ready.remote() for actor in self._actors])
        except ray.exceptions.ActorDiedError as error:
            if error.__cause__ is None and "creation task" not in str(error):
                raise
            raise GradscaleError(
                f"a worker must be able to start, got {short(error)}; the task must be importable or picklable there"
            ) from error
        address, port = ray.get(self._actors[0].__ray_call__.remote(_meeting_place))
        ray.get([
            actor.join.remote(address, port, rank, self._workers) for rank, actor in enumerate(self._actors)
        ])  # fmt: skip

    def _run(self, method: str, arguments: tuple[Any, ...], on_progress: Callable[[Any], None] | None) -> Any:
        import ray

        waiting = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        first = waiting[0]
        while waiting:
            done, waiting = ray.wait(waiting, timeout=_POLL_SECONDS)
            for reference in done:
                try:
                    ray.get(reference)
                except (ray.exceptions.RayError, GradscaleError) as error:
                    raise self._reason(error, waiting) from error
            if on_progress is not None and waiting:
                _tell(self._actors[0], on_progress)
        return ray.get(first)

    def _reason(self, error: Exception, waiting: list[Any]) -> Exception:
        """The error that the others follow from: a lost process, else what is wrong with the input, else the first.

        The other ranks wait for the one that failed: they are listened to only if its error may follow from theirs.
        """
        import ray

        if isinstance(error, _losses()) or _is_told(error):
            return error
        errors = [error]
        done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=_GRACE_SECONDS) if waiting else ([], [])
        for reference in done:
            try:
                ray.get(reference)
            except ray.exceptions.RayError as other:
                errors.append(other)
        lost = [e for e in errors if isinstance(e, _losses())]
        told = [e for e in errors if _is_told(e)]
        return (lost or told or errors)[0]

    def _end(self) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        for actor in self._actors:
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)
        self._actors, self._group = [], None


def _tell(actor: Any, on_progress: Callable[[Any], None]) -> None:
    import ray

    asked = actor.progress.remote()
    if ray.wait([asked], timeout=_POLL_SECONDS)[0]:
        try:
            on_progress(ray.get(asked))
        except ray.exceptions.RayError:
            return  # of a process that is lost: its work says so


def _losses() -> tuple[type[Exception], ...]:
    """Ray's errors of a process that is no more."""
    import ray.exceptions as known

    return known.RayActorError, known.WorkerCrashedError, known.OutOfMemoryError


def _is_told(error: Exception) -> bool:
    """Whether a rank has said what is wrong with the input."""
    return isinstance(getattr(error, "cause", None), GradscaleError)


def _not_outlived(what: str, error: Exception) -> GradscaleError:
    return GradscaleError(
        f"a gang must outlive {what}, got {_LOSSES} of which a process died, perhaps killed for memory "
        f"({short(error)}); take more workers, a smaller --basis-cap or --microbatch"
    )


def _meeting_place(_: Any) -> tuple[str, int]:
    """This node's address and a port that is free there."""
    import ray

    address = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind(("", 0))
        return address, int(probe.getsockname()[1])
