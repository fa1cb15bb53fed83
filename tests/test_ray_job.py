"""jobs/measure.py, submitted with `ray job submit` to a cluster, and `gs.measure(address=...)` joining the same one.

The cluster is a head on the loopback address, with a home, a token, ports and a temporary folder of its own.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import FOLDER, contents

import gradscale as gs

REPOSITORY = FOLDER.parent
TOY = ["--task", "problems:Toy", "--workers", "2", "--shard-size", "2", "--microbatch", "1"]
RAY = shutil.which("ray", path=str(Path(sys.executable).parent)) or "ray"


class Head(NamedTuple):
    port: int
    dashboard: int
    environment: dict[str, str]


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    token = home / ".ray" / "auth_token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{REPOSITORY}:{FOLDER}",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
    }
    port, dashboard, agent, client = free_ports(4)
    sockets = tempfile.mkdtemp(prefix="gs-", dir="/tmp")  # the names of unix sockets must be short
    command = [
        *(RAY, "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=4", f"--temp-dir={sockets}"),
        *(f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"),
        *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
    ]
    log = home / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, cwd=home, start_new_session=True
        )
    try:
        wait_for(dashboard, process, log)
        yield Head(port, dashboard, environment)
    finally:
        stop(process)
        shutil.rmtree(sockets, ignore_errors=True)


@pytest.fixture(scope="module")
def submitted(head, tmp_path_factory) -> tuple[Path, str]:
    """The run directory of a job, and what the job printed."""
    out = tmp_path_factory.mktemp("job") / "run"
    done = submit(head, "--out", str(out))
    assert done.returncode == 0, done.stdout
    return out, done.stdout


def submit(head: Head, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [RAY, "job", "submit", "--address", f"http://127.0.0.1:{head.dashboard}", "--working-dir", "."]
    return subprocess.run(
        [*command, "--", "python", "jobs/measure.py", *TOY, *arguments],
        cwd=REPOSITORY,
        env=head.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def test_a_job_measures(submitted):
    out, printed = submitted
    assert "measured 4/4 examples" in printed
    run = gs.open_run(str(out))
    estimates = run.estimates().set_index(["measure", "name", "scope"])["value"]
    assert estimates["coherence", "alpha", "all"] == pytest.approx(0.625)
    assert run.rows().to_table()["example_id"].to_pylist() == [0, 1, 2, 3]
    assert "0.625" in printed


def test_a_driver_that_joins_writes_the_same(head, submitted, tmp_path):
    """From a process that knows the address, and finds the token by itself."""
    environment = {name: value for name, value in head.environment.items() if name != "RAY_AUTH_MODE"}
    out = tmp_path / "run"
    command = [sys.executable, "-m", "gradscale", "measure", *TOY, "--out", str(out)]
    subprocess.run([*command, "--address", f"127.0.0.1:{head.port}"], env=environment, cwd=tmp_path, check=True)
    assert contents(out) == contents(submitted[0])


def test_a_job_writes_nowhere_that_is_thrown_away(head):
    done = submit(head, "--out", "runs/a")
    assert done.returncode == 1
    assert "out of a job must be an absolute path or a URI, got runs/a" in done.stdout


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    pytest.fail(f"no head within a minute:\n{log.read_text()}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the head and everything that it started: its session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
