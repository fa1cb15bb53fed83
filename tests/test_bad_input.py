"""What cannot be measured is refused before it costs anything, by a message that says what to do."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import contents
from problems import Toy
from run_problems import Broken, FromParquet, Regression, Troubled, WithLock

import gradscale as gs
from gradscale.cli import main

pytestmark = pytest.mark.usefixtures("local_ray")


def refused(match: str, task: object, out: Path, **settings: object) -> None:
    with pytest.raises(gs.GradscaleError, match=match):
        gs.measure(task, str(out), **({"workers": 1} | settings))


@pytest.mark.parametrize(
    ("task", "match"),
    [
        ("nothing", r"task must be one of digits, .* or module:attribute, got 'nothing'; see `gradscale tasks`"),
        (
            "nowhere:Task",
            "task module 'nowhere' must be importable, got No module named 'nowhere'; run from its folder",
        ),
        ("problems:Nothing", "task problems:Nothing must exist, got no attribute 'Nothing' in problems"),
        ("math:pi", "task math:pi must be a Task or make one when called, got float"),
        (object(), r"task builtins:object must have the methods model, examples and losses, got none named \['model'"),
    ],
)
def test_no_such_task(tmp_path, task, match):
    refused(match, task, tmp_path / "run")


def test_task_option_that_the_task_does_not_take(tmp_path):
    options = {"colour": "red"}
    match = r"task run_problems:Regression could not be made with the options \{'colour': 'red'\}: .*unexpected keyword"
    refused(match, "run_problems:Regression", tmp_path / "run", task_options=options)


@pytest.mark.parametrize(
    ("measures", "match"),
    [
        ("coherent", "measure must be one of coherence, .*got 'coherent'; see `gradscale measures`"),
        ("coherence:by_colour", "measure coherence could not be made from 'coherence:by_colour': .*'by_colour'"),
        ("gaussian_width:num_probes=0", "num_probes must be at least 1, got 0"),
        ("coherence,coherence", "measures must have different names, got coherence, coherence"),
    ],
)
def test_no_such_measure(tmp_path, monkeypatch, capsys, measures, match):
    arguments = ["gradscale", "measure", "--task", "digits", "--out", str(tmp_path / "run"), "--measures", measures]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit, match="2"):
        main()
    message = capsys.readouterr().err
    assert re.match(f"error: .*{match}", message), message
    assert not (tmp_path / "run").exists()


def test_measure_class_instead_of_an_instance(tmp_path):
    match = r"measures must be instances such as Coherence\(\), got <class .*Coherence'>; see `gradscale measures`"
    refused(match, Toy(), tmp_path / "run", measures=[gs.Coherence])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"checkpoints": ["no/such/step1.pt"]}, "checkpoint .*exist.*got no/such/step1.pt"),
        ({"workers": 0}, "workers must be a whole number of at least 1, got 0"),
        ({"microbatch": 0}, "microbatch must be a whole number of at least 1, got 0"),
        ({"shard_size": 2.5}, "shard_size must be a whole number of at least 1, got 2.5"),
        ({"sketch": "gauss:16"}, "sketch must be NAME:K with NAME in count, gaussian, .*got 'gauss:16'"),
        ({"sketch": "gaussian"}, "sketch must be NAME:K .*got 'gaussian'"),
        ({"sketch": "gaussian:0"}, "sketch dimension must be at least 1, got 0"),
        ({"workers": 5}, "workers must be at most the number of examples, 4, got 5; use fewer workers"),
        (
            {"measures": [gs.Coherence(by_class=True)]},
            r"need task.labels\(batch\), got a task without it for coherence",
        ),
        ({"params": "nothing"}, "params must match at least one trainable parameter, got 'nothing' for 1 .*weight"),
        ({"params": "("}, r"params must be a regular expression, got '\(': "),
    ],
)
def test_settings(tmp_path, settings, match):
    refused(match, Toy(), tmp_path / "run", **settings)


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ("batchnorm", r"BatchNorm 0 must be in eval mode .*; return model.eval\(\) from task.model\(\)"),
        (
            "reduced",
            r"losses must be one per example, .*of shape \(4,\), got torch.float64 of shape \(\); use reduction='none'",
        ),
        ("mixing", "must (have the same|add up) .*got another"),
        ("empty", "the dataset must have at least one example, got 0; check --data"),
    ],
)
def test_tasks_without_a_gradient_for_each_example(tmp_path, fault, match):
    refused(match, Broken(fault), tmp_path / "run")


def test_task_that_cannot_be_pickled(tmp_path):
    refused(
        "task must be picklable, got TypeError: cannot pickle '_thread.lock' object; ", WithLock(), tmp_path / "run"
    )


@pytest.fixture
def table(tmp_path) -> Path:
    path = tmp_path / "data.parquet"
    x = np.random.default_rng(0).normal(size=30)
    pq.write_table(pa.table({"x": pa.FixedSizeListArray.from_arrays(x, 3), "y": pa.array(x[:10])}), path)
    return path


def test_data_without_the_column(tmp_path, table):
    pq.write_table(pq.read_table(table).drop_columns(["y"]), table)
    match = f"column must be one of those in {table} .x., got y; name one of them"
    refused(match, FromParquet(str(table)), tmp_path / "run")


def test_truncated_data(tmp_path, table):
    table.write_bytes(table.read_bytes()[:-20])
    match = f"data file {table} must be a whole Parquet file, got .*; it is truncated"
    refused(match, FromParquet(str(table)), tmp_path / "run")


def test_data_that_are_not_there(tmp_path):
    refused("data must be an existing file, folder or glob", FromParquet(str(tmp_path / "no")), tmp_path / "run")


def test_other_settings_than_those_of_the_run(tmp_path):
    gs.measure(Regression(), str(tmp_path / "run"), workers=1, measures=[gs.Coherence()])
    before = contents(tmp_path / "run")
    match = (
        r"(?s)the settings must be those of the run that .*run already holds, got\n"
        r".*examples: 24 in the run, 23 now\n.*measures.coherence.by_class: False in the run, True now\n"
        r".*seed: 0 in the run, 1 now\nuse them again, or another --out"
    )
    other = {"measures": [gs.Coherence(by_class=True)], "seed": 1}
    refused(match, Regression(without=3), tmp_path / "run", **other)
    assert contents(tmp_path / "run") == before


def test_a_plan_may_be_replaced_while_nothing_is_committed(tmp_path):
    task = Troubled(str(tmp_path), "refuse", times=1)
    with pytest.raises(gs.ShardsFailed):
        gs.measure(task, str(tmp_path / "run"), workers=1)
    assert gs.measure(task, str(tmp_path / "run"), workers=1, microbatch=8).plan["microbatch"] == 8


def test_out_that_is_something_else(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").touch()
    match = "out must be a new folder, an empty one or a gradscale run, got .* with other files and no run.json; choose"
    refused(match, Toy(), tmp_path / "letters")
    refused("out must be a folder, got the file .*a.txt; choose another name", Toy(), tmp_path / "letters" / "a.txt")
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["a.txt"]


def test_opening_what_is_no_run(tmp_path):
    with pytest.raises(gs.GradscaleError, match=r"run must be a folder that gradscale has written, got .* without run"):
        gs.open_run(str(tmp_path))


def test_an_example_that_is_not_finite_is_kept_out(tmp_path):
    one_shard = {"workers": 1, "shard_size": 100, "sketch": "gaussian:4"}
    run = gs.measure(Regression(nan=13), str(tmp_path / "nan"), **one_shard)
    other = gs.measure(Regression(without=13), str(tmp_path / "without"), **one_shard)
    ours, theirs = (r.estimates()[lambda frame: frame["measure"] != "sketch_error"] for r in (run, other))
    assert set(ours["n"]) == {23}
    np.testing.assert_allclose(ours["value"], theirs["value"], rtol=1e-12)
    rows = run.rows().to_table().to_pandas()
    assert rows.loc[~rows["finite"], "example_id"].tolist() == [13]
    assert np.isnan(rows.loc[13, ["loss", "grad_sq_norm"]].astype(float)).all()
    ids, sketches = run.sketches(0)
    assert 13 not in ids
    np.testing.assert_allclose(sketches, other.sketches(0)[1], rtol=1e-6)


def test_address_where_nothing_listens(tmp_path, environment):
    """In a process of its own: this one has joined a Ray already."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        arguments = ["--task", "digits", "--out", str(tmp_path / "run"), "--address", address]
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "gradscale", "measure", *arguments], env=environment, capture_output=True, text=True
        )
    assert time.monotonic() - start < 30
    assert done.returncode == 2
    assert f"address must be that of a running Ray cluster, got {address} where nothing answers" in done.stderr


class Growing(Toy):
    """A model that has one parameter more at every checkpoint but the first."""

    def model(self, checkpoint):
        model = super().model(checkpoint)
        if checkpoint and checkpoint.endswith("1"):
            model.more = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        return model


def test_checkpoints_of_different_models(tmp_path):
    for step in (0, 1):
        (tmp_path / f"step{step}").write_bytes(b"")
    match = "every checkpoint must have the parameters of the first one, got others at step 1; measure it into a run"
    with pytest.raises(gs.ShardsFailed, match=match):
        gs.measure(Growing(), str(tmp_path / "run"), checkpoints=[str(tmp_path / "step*")], workers=1)
    assert set(gs.open_run(str(tmp_path / "run")).estimates().step) == {0}  # the first one is measured
