"""What is on disk does not depend on the number of workers, nor on what was killed on the way, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import contents
from run_problems import FewDigits, Troubled, save_digits

import gradscale as gs

pytestmark = pytest.mark.usefixtures("local_ray")

MEASURES = "coherence:by_class,dispersion,gaussian_width:num_probes=8"
SETTINGS = {
    "measures": [gs.Coherence(by_class=True), gs.Dispersion(), gs.GaussianWidth(num_probes=8)],
    "sketch": "gaussian:16",
    "shard_size": 50,
    "microbatch": 16,
}
SHARDS = 8  # of 200 digits at two checkpoints


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[int, str]:
    return save_digits(tmp_path_factory.mktemp("digits"), rows=200)


@pytest.fixture(scope="module")
def digits(checkpoints) -> str:
    return str(Path(checkpoints[10]).parent)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, digits, checkpoints) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return contents(gs.measure(FewDigits(digits), str(out), checkpoints=checkpoints, workers=1, **SETTINGS).path)


def test_everything_is_there(undisturbed):
    kinds = {kind: sum(name.startswith(f"{kind}/step-") for name in undisturbed) for kind in ("rows", "sketches")}
    assert kinds == {"rows": SHARDS, "sketches": SHARDS}
    assert "estimates.parquet" in undisturbed
    assert not any(name.endswith(".tmp") for name in undisturbed)


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers(tmp_path, digits, checkpoints, undisturbed, workers):
    run = gs.measure(FewDigits(digits), str(tmp_path / "run"), checkpoints=checkpoints, workers=workers, **SETTINGS)
    assert contents(run.path) == undisturbed


def test_a_complete_run_measured_again_stays_as_it_is(tmp_path, digits, checkpoints, undisturbed):
    for _ in range(2):
        run = gs.measure(FewDigits(digits), str(tmp_path / "run"), checkpoints=checkpoints, workers=2, **SETTINGS)
    assert contents(run.path) == undisturbed


def test_a_killed_worker(tmp_path, digits, checkpoints, undisturbed):
    """A worker that holds a shard is killed with SIGKILL, once."""
    task = Troubled(str(tmp_path), "kill", row=60, digits=digits)
    run = gs.measure(task, str(tmp_path / "run"), checkpoints=checkpoints, workers=2, **SETTINGS)
    assert len(list(tmp_path.glob("attempt-*"))) == 3  # at two checkpoints, and once again
    assert contents(run.path) == undisturbed
    assert_each_example_once(run)


def test_a_killed_driver(tmp_path, digits, checkpoints, undisturbed, environment):
    """A `gradscale measure` is killed with SIGKILL after its first commits; the same settings finish its run."""
    out, options = tmp_path / "run", {"folder": str(tmp_path), "trouble": "pause", "digits": digits}
    command = [
        *(sys.executable, "-m", "gradscale", "measure", "--task", "run_problems:Troubled", "--out", str(out)),
        *(word for name, value in options.items() for word in ("--task-option", f"{name}={value}")),
        *(word for path in checkpoints.values() for word in ("--checkpoint", path)),
        *("--measures", MEASURES, "--sketch", "gaussian:16", "--shard-size", "50", "--microbatch", "16"),
    ]
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: len(committed(out)) >= 2 or driver.poll() is not None, seconds=60)
        assert driver.poll() is None, (tmp_path / "log").read_text()
    finally:
        driver.kill()
        driver.wait()
    before = committed(out)
    assert 2 <= len(before) < SHARDS
    try:  # Ray's own agents stay for about a minute more
        wait_until(lambda: not [pid for pid in of_session(driver.pid) if "Agent" not in title(pid)], seconds=30)
    finally:
        for pid in of_session(driver.pid):
            os.kill(pid, signal.SIGKILL)

    leftover = out / "rows" / "step-00000010" / "shard-00003.parquet.1.tmp"
    leftover.write_bytes(b"half a file")
    times = {path: path.stat().st_mtime_ns for path in before}
    run = gs.measure(
        "run_problems:Troubled", str(out), checkpoints=list(checkpoints.values()), task_options=options, **SETTINGS
    )
    assert contents(out) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in before} == times  # what was committed was kept
    assert_each_example_once(run)


def test_damaged_states_are_refused(tmp_path):
    """Those of a shard, as long as another is missing; then those of all shards together."""
    task = Troubled(str(tmp_path), "refuse", row=15, times=99)
    settings = {"workers": 1, "shard_size": 12}
    with pytest.raises(gs.ShardsFailed):
        gs.measure(task, str(tmp_path / "run"), **settings)
    (tmp_path / "mended").touch()
    for name, damage in (("shard-00000", lambda whole: whole[:-1]), ("merged", lambda whole: whole[:-1] + b"\xff")):
        path = tmp_path / "run" / "states" / "step-00000000" / f"{name}.safetensors"
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        with pytest.raises(gs.GradscaleError, match=f"states/step-00000000/{name}.safetensors must be as it was"):
            gs.measure(task, str(tmp_path / "run"), **settings)
        path.write_bytes(whole)
        gs.measure(task, str(tmp_path / "run"), **settings)


def assert_each_example_once(run: gs.Run) -> None:
    rows = run.rows().to_table(columns=["step", "example_id"]).to_pylist()
    assert [(row["step"], row["example_id"]) for row in rows] == [(s, i) for s in (10, 20) for i in range(200)]


def committed(out: Path) -> list[Path]:
    return sorted((out / "commits").rglob("*.json"))


def of_session(leader: int) -> list[int]:
    """The living processes of a session: everything that its leader started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(session) == leader and state != "Z":
                found.append(int(entry.name))
    return found


def title(pid: int) -> str:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "Agent"


def wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.05)
