"""A shard that fails does not take the others with it, is named, and is all that is left to do once mended."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import contents
from run_problems import Regression, Troubled

import gradscale as gs
from gradscale.cli import main

pytestmark = pytest.mark.usefixtures("local_ray")

SETTINGS = {"shard_size": 6, "microbatch": 4, "workers": 2}  # row 15 lies in shard 2 of 4


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    return contents(gs.measure(Regression(), str(tmp_path_factory.mktemp("undisturbed") / "run"), **SETTINGS).path)


def command(monkeypatch, *arguments: str) -> int:
    """Run `gradscale ARGUMENTS` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["gradscale", *arguments])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


def attempts(folder: Path) -> int:
    return len(list(folder.glob("attempt-*")))


def test_a_shard_that_raises_every_time(tmp_path, monkeypatch, capsys, undisturbed):
    out = tmp_path / "run"
    measure = [
        "measure",
        "--task",
        "run_problems:Troubled",
        "--out",
        str(out),
        "--shard-size",
        "6",
        "--microbatch",
        "4",
    ]
    for option in (f"folder={tmp_path}", "trouble=raise", "times=99"):
        measure += ["--task-option", option]

    assert command(monkeypatch, *measure) == 1
    message = capsys.readouterr().err
    assert "1 shards failed; the others are committed" in message
    assert "step 0, shard 2 (examples 12 to 17), 3 attempts: row 15 went wrong" in message
    assert attempts(tmp_path) == 3

    committed = {path.name for path in (out / "commits").rglob("*.json")}
    assert committed == {"shard-00000.json", "shard-00001.json", "shard-00003.json"}
    failure = json.loads((out / "failures" / "step-00000000" / "shard-00002.json").read_text())
    expected = {"step": 0, "shard": 2, "start": 12, "stop": 18, "attempts": 3, "error": "row 15 went wrong"}
    assert expected.items() <= failure.items()
    run = gs.open_run(str(out))
    assert run.failures() == [failure]
    assert not len(run.estimates())  # no step is complete
    assert run.rows().count_rows() == 18

    (tmp_path / "mended").touch()
    assert command(monkeypatch, *measure) == 0
    assert contents(out) == undisturbed
    assert run.failures() == []


def test_shards_failed_names_each_of_them(tmp_path):
    task = Troubled(str(tmp_path), "raise", times=99)
    expected = r"step 0, shard 2 \(examples 12 to 17\), 3 attempts: row 15 went wrong"
    with pytest.raises(gs.ShardsFailed, match=expected):
        gs.measure(task, str(tmp_path / "run"), **SETTINGS)


def test_a_shard_that_raises_once_is_tried_again(tmp_path, undisturbed):
    run = gs.measure(Troubled(str(tmp_path), "raise", times=1), str(tmp_path / "run"), **SETTINGS)
    assert attempts(tmp_path) == 2
    assert contents(run.path) == undisturbed


def test_what_the_user_must_put_right_is_not_tried_again(tmp_path):
    with pytest.raises(gs.ShardsFailed, match=r"shard 2 .*, 1 attempts: row 15 must be something else"):
        gs.measure(Troubled(str(tmp_path), "refuse", times=99), str(tmp_path / "run"), **SETTINGS)
    assert attempts(tmp_path) == 1


@pytest.mark.parametrize("kind", ["memory", "torch memory", "cpu memory"])
def test_out_of_memory_says_which_microbatch_to_try(tmp_path, kind):
    settings = SETTINGS | {"workers": 1, "microbatch": 6}
    with pytest.raises(gs.OutOfMemory, match="with microbatch 6; try --microbatch 3"):
        gs.measure(Troubled(str(tmp_path), kind, times=99), str(tmp_path / "run"), **settings)
    assert attempts(tmp_path) == 1


def test_a_shard_that_kills_every_worker_is_given_up(tmp_path):
    with pytest.raises(gs.ShardsFailed, match=r"shard 2 .*5 workers died over it, perhaps killed for memory"):
        gs.measure(Troubled(str(tmp_path), "kill", times=99), str(tmp_path / "run"), **SETTINGS)
    assert gs.open_run(str(tmp_path / "run")).rows().count_rows() == 18


def test_an_exception_that_is_kept_keeps_no_worker(tmp_path):
    """Four CPUs: were the workers of the first call still there, the second one could not start its own."""
    with pytest.raises(gs.GradscaleError, match="params must match") as kept:
        gs.measure(Regression(), str(tmp_path / "a"), params="nothing", workers=4)
    gs.measure(Regression(), str(tmp_path / "b"), workers=4)
    assert kept.value
