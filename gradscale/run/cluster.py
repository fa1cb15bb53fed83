"""The Ray cluster that a run works on: joined, or started in this process and ended with it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from gradscale.errors import GradscaleError

_LOG = logging.getLogger("gradscale")
_CONNECT_SECONDS = 10.0  # Ray itself would try an address where nothing listens for many minutes


class Resources(NamedTuple):
    """What one worker asks of the cluster."""

    threads: int
    gpus: float


@contextmanager
def ray_session(address: str | None, workers: int, resources: Resources) -> Iterator[None]:
    """Join the cluster at `address` (or RAY_ADDRESS, or the one this process has joined), else start one here.

    Only a session that was started here is shut down at the end.
    Raises: GradscaleError if there is no cluster at `address`, or this machine lacks the GPUs.
    """
    _settings()
    joined = _joined(address)
    if joined:
        _use_token()  # before Ray is imported, which is when it looks
    import ray

    if ray.is_initialized():
        if address:
            _LOG.warning("address %s is not used: this process has joined a Ray cluster already", address)
        yield
        return
    if joined:
        _check_listening(joined)
    try:
        if joined:
            ray.init(address=joined, log_to_driver=False, logging_level=logging.ERROR)
        else:
            cpus = max(os.cpu_count() or 1, workers * resources.threads)
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise GradscaleError(
            f"address must be that of a running Ray cluster, got {joined}: {error}; if it asks for a token, "
            "set RAY_AUTH_MODE=token before Python starts"
        ) from error
    try:
        if not joined:
            _check_gpus(resources.gpus, ray.cluster_resources().get("GPU", 0))
        yield
    finally:
        ray.shutdown()


def _joined(address: str | None) -> str | None:
    """The address of the cluster to join; None to start one here."""
    named = address or os.environ.get("RAY_ADDRESS")
    return None if named == "local" else named or None


def _check_listening(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # such as auto
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise GradscaleError(
            f"address must be that of a running Ray cluster, got {address} where nothing answers: {error}; "
            "start one there with `ray start --head`, or leave the address out"
        ) from error


def _check_gpus(asked: float, present: float) -> None:
    if asked > present:
        raise GradscaleError(
            f"gpus_per_worker must be at most the GPUs of this machine, {present:g}, got {asked:g}; "
            "use fewer, or the address of a cluster that has them"
        )


def _settings() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def _use_token() -> None:
    """Ray 2.60 asks for a token where it wrote one, but its clients send it only when told to."""
    if (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def pickled(job: object) -> bytes:
    """`job` for the workers of a cluster. Raises: GradscaleError if it cannot be pickled."""
    import ray

    try:
        return bytes(ray.cloudpickle.dumps(job))
    except Exception as error:  # whatever an object's __reduce__ raises
        raise GradscaleError(
            f"task must be picklable, got {type(error).__name__}: {error}; open files and connections, and make locks, "
            "where they are used, or name the task as module:attribute of a class"
        ) from error
