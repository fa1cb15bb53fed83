"""Promise: `gradscale spectrum` finds what the dense matrices have, on any number of workers, with crashes in between.

Shapes: n examples, P entries.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from run_problems import Broken, Falling, Regression, Troubled
from spectrum_problems import Scaled
from torch import Tensor

import gradscale as gs
from gradscale.cli import main
from gradscale.curvature.krylov import LanczosState
from gradscale.curvature.lanczos import lanczos
from gradscale.curvature.operator import DenseOperator
from gradscale.curvature.stability import report_of_gram
from gradscale.run.lanczos_commits import LanczosCommits
from gradscale.run.spectrum_estimates import TraceSums, enough
from gradscale.run.spectrum_plan import SpectrumPlan, check_sizes
from gradscale.run.spectrum_worker import SpectrumJob, SpectrumWorker
from gradscale.store.files import Files

pytestmark = pytest.mark.usefixtures("local_ray")

EXAMPLES, P = 24, 29
SETTINGS = {"microbatch": 4, "shard_size": 8, "vectors": "float64", "tolerance": 1e-10}
OPERATORS = ("hessian", "ggn", "covariance")


def rows(checkpoint: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """[n, P] gradients, [n, P] Jacobians of the output, [n, P, P] Hessians of the examples, by plain autograd."""
    task = Scaled()
    model, data = task.model(checkpoint), task.examples()
    parameters = list(model.parameters())

    def flat(value: Tensor, create: bool = False) -> Tensor:
        found = torch.autograd.grad(value, parameters, create_graph=create, allow_unused=True)
        return torch.cat([torch.zeros(p.numel()).double() if g is None else g.flatten()
                          for g, p in zip(found, parameters, strict=True)])  # fmt: skip

    gradients, jacobians, hessians = [], [], []
    for i in range(len(data)):
        batch = data.batch(range(i, i + 1))
        gradient = flat(task.losses(model, batch).sum(), create=True)
        hessians.append(torch.stack([flat_of(entry, parameters) for entry in gradient]))
        gradients.append(gradient.detach())
        jacobians.append(flat(model(batch["x"]).sum()))
    return torch.stack(gradients), torch.stack(jacobians), torch.stack(hessians)


def flat_of(entry: Tensor, parameters: list[Tensor]) -> Tensor:
    found = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
    return torch.cat([part.flatten() for part in parts])


@pytest.fixture(scope="module")
def dense() -> dict[str, np.ndarray]:
    gradients, jacobians, hessians = rows()
    centred = gradients - gradients.mean(dim=0)
    return {
        "hessian": hessians.mean(dim=0).numpy(),
        "ggn": (jacobians.T @ jacobians / EXAMPLES).numpy(),
        "covariance": (centred.T @ centred / (EXAMPLES - 1)).numpy(),
    }


def value(run: gs.Spectrum, name: str, scope: str = "all") -> tuple[float, float]:
    frame = run.estimates()
    row = frame[(frame["name"] == name) & (frame["scope"] == scope)]
    assert len(row) == 1, (name, scope, frame["name"].unique())
    return float(row["value"].iloc[0]), float(row["stderr"].iloc[0])


def layers(run: gs.Spectrum, name: str) -> float:
    frame = run.estimates()
    return float(frame[(frame["name"] == name) & frame["scope"].str.startswith("layer:")]["value"].sum())


@pytest.mark.parametrize("operator", OPERATORS)
def test_all_quantities_are_those_of_the_dense_matrix(operator: str, tmp_path: Path, dense: dict) -> None:
    matrix, top = dense[operator], 5
    exact = np.sort(np.linalg.eigvalsh(matrix))[::-1]
    norms = gs.Norms(8) if operator != "covariance" else False
    slq = gs.SLQ(num_probes=8, steps=29, shift=20.0, edge=float(exact[2:4].mean()), reorthogonalize=True)
    alone = {"microbatch": EXAMPLES} if operator == "covariance" else {}  # one microbatch: a rank without examples
    run = gs.spectrum(Regression(), str(tmp_path / "run"), operator, top, gs.Hutchinson(16, None), slq, norms,
                      workers=2, **{**SETTINGS, **alone})  # fmt: skip
    np.testing.assert_allclose(run.eigenvalues(), exact[:top], rtol=1e-9)
    assert value(run, "lambda_max")[0] == pytest.approx(exact[0], rel=1e-9)
    row = run.estimates().set_index("name").loc["lambda_max"]
    squared = operator == "covariance"
    assert row["unit"] == ("(loss units / parameter unit)^2" if squared else "loss units / parameter unit^2")
    assert row["status"] == "identity"
    trace, stderr = value(run, "trace_sample")
    if operator == "covariance":
        assert trace == pytest.approx(np.trace(matrix), rel=1e-12)
        assert math.isnan(stderr)  # exact
    else:
        assert abs(trace - np.trace(matrix)) < 4 * stderr
        assert value(run, "trace")[1] >= stderr  # that of the data beside it
        frobenius, error = value(run, "frobenius_sample")
        assert abs(frobenius - np.linalg.norm(matrix)) < 4 * error
        halves = [matrix_of(operator, range(half, 6, 2)) for half in (0, 1)]
        square, error = value(run, "frobenius_sq")
        assert abs(square - (halves[0] * halves[1]).sum()) < 4 * error
    assert layers(run, "trace_sample") == pytest.approx(trace, rel=1e-12)
    for name, function in {
        "effective_dimension": lambda x: x / (x + 20.0),
        "outliers": lambda x: 1.0 * (x > exact[2:4].mean()),
    }.items():
        found, error = value(run, name)
        assert abs(found - function(exact).sum()) < 4 * error, name
    found, error = value(run, "log_determinant")
    assert abs(found - np.log(exact + 20.0).sum()) < 4 * error
    nodes = run.quadrature()
    np.testing.assert_allclose([nodes.value.min(), nodes.value.max()], exact[[-1, 0]], rtol=1e-8, atol=1e-10)


def matrix_of(operator: str, microbatches: range) -> np.ndarray:
    _, jacobians, hessians = rows()
    chosen = torch.cat([torch.arange(4 * m, 4 * m + 4) for m in microbatches])
    parts = hessians if operator == "hessian" else torch.einsum("ip,iq->ipq", jacobians, jacobians)
    return parts[chosen].mean(dim=0).numpy()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> gs.Spectrum:
    return gs.spectrum(Regression(), str(tmp_path_factory.mktemp("one") / "run"), workers=1, **ASKED)


ASKED = {"top": 4, "which": "both", "trace": gs.Hutchinson(16, None), "density": gs.SLQ(2, 6), **SETTINGS}


def same(run: gs.Spectrum, other: gs.Spectrum, step: int = 0) -> None:
    for all_steps, expected in ((run.estimates(), other.estimates()), (run.spectra(), other.spectra())):
        frame = all_steps[all_steps["step"] == step].reset_index(drop=True)
        for column in ("value", "stderr", "weight"):
            if column in frame:
                np.testing.assert_allclose(
                    frame[column].astype(float), expected[column].astype(float), rtol=1e-7, atol=1e-9, err_msg=column
                )
        names = [name for name in ("step", "measure", "name", "scope", "kind", "index", "probe") if name in frame]
        assert frame[names].equals(expected[names])


def test_three_workers_find_what_one_does_at_every_checkpoint(tmp_path: Path, undisturbed: gs.Spectrum) -> None:
    paths = {0: tmp_path / "one", 7: tmp_path / "two"}
    for path, scale in zip(paths.values(), ("1.0", "2.0"), strict=True):
        path.write_text(scale)
    run = gs.spectrum(Scaled(), str(tmp_path / "run"), workers=3,
                      checkpoints={step: str(path) for step, path in paths.items()}, **ASKED)  # fmt: skip
    same(run, undisturbed, step=0)
    exact = np.linalg.eigvalsh(rows(str(paths[7]))[2].mean(dim=0).numpy())
    np.testing.assert_allclose(run.eigenvalues(step=7), exact[[-1, -2, 1, 0]], rtol=1e-9)
    found = run.estimates()
    assert not np.allclose(*(found[(found["step"] == step) & (found["scope"] == "all")]["value"] for step in paths))


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path: Path, undisturbed: gs.Spectrum) -> None:
    (tmp_path / "other").write_text("0")
    plan = SpectrumPlan.from_json((Path(undisturbed.path) / "run.json").read_text())
    plan = dataclasses.replace(plan, checkpoints={"7": {"path": str(tmp_path / "other"), "fingerprint": None}})
    job = SpectrumJob(Scaled(), str(tmp_path), None, (), 4, 1, "cpu", 60.0)
    with pytest.raises(
        gs.GradscaleError, match=r"parameters of the first one, got others at step 7: 0\.weight, 0\.bias"
    ):
        SpectrumWorker(pickle.dumps(job), sys.path, os.getcwd()).choose(plan, 7, ["trace"])


def test_a_gang_of_one_that_dies_over_a_unit_is_started_again(tmp_path: Path) -> None:
    settings = {"top": 0, "trace": gs.Hutchinson(8, None), "norms": gs.Norms(1), "microbatch": 4, "shard_size": 4}
    run = gs.spectrum(Troubled(str(tmp_path), "kill"), str(tmp_path / "run"), workers=1, **settings)
    assert (tmp_path / "attempt-0").exists()
    assert np.isfinite(value(run, "trace")).all()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_commits_are_read_back_to_the_bit_and_go_on_to_the_same_eigenvalues(tmp_path: Path) -> None:
    """At every step of a run with restarts, also beside what a gang before it has left."""
    matrix = torch.randn(60, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    operator, start = DenseOperator(matrix + matrix.T), torch.linspace(1, 2, 60, dtype=torch.float64)
    asked = {"top": 3, "basis_cap": 12, "tolerance": 1e-10}
    commits = LanczosCommits(Files(str(tmp_path)), 0, range(60), 0.0)
    states: list[LanczosState] = []

    def on_step(state: LanczosState) -> None:
        commits.commit(state)
        found = LanczosCommits(Files(str(tmp_path)), 0, range(60), 0.0).read(torch.device("cpu"))
        assert found is not None
        assert torch.equal(found.basis, state.basis)
        assert found[3:] == state[3:]
        states.append(found)

    undisturbed = lanczos(operator, start, on_step=on_step, **asked)
    assert undisturbed.restarts > 2
    for state in states[:: len(states) // 3]:
        assert torch.equal(lanczos(operator, state, **asked).values, undisturbed.values)
    folder = tmp_path / "lanczos" / "step-00000000"
    record = json.loads((folder / "state.json").read_text())
    assert {path.name for path in folder.glob("rows-*")} == {piece["file"] for piece in record["pieces"]}
    (folder / record["pieces"][0]["file"]).write_bytes(b"other")
    with pytest.raises(gs.GradscaleError, match=r"must be as it was written, got other content; delete the folder"):
        commits.read(torch.device("cpu"))
    (folder / record["pieces"][0]["file"]).unlink()
    with pytest.raises(gs.GradscaleError, match=r"must be as it was written, got no such file; delete the folder"):
        commits.read(torch.device("cpu"))
    with pytest.raises(gs.GradscaleError, match=r"out must be a folder that all workers see, got .* a shared folder"):
        commits._check_shared(record["pieces"])


def test_a_killed_rank(tmp_path: Path, undisturbed: gs.Spectrum) -> None:
    """The gang goes on from the last commit, and finds the same."""
    out = tmp_path / "run"
    run = gs.spectrum(Falling(out=str(out)), str(out), workers=2, commit_seconds=0.0, **ASKED)
    assert Path(f"{out}-fallen").exists()
    found = json.loads((out / "parts" / "step-00000000" / "eigenvalues.json").read_text())
    assert 3 <= found["resumed_from"] < found["steps"]
    assert not (out / "lanczos").exists() or not list((out / "lanczos").rglob("*.safetensors"))
    same(run, undisturbed)


def test_a_killed_driver(tmp_path: Path, environment: dict[str, str], undisturbed: gs.Spectrum) -> None:
    """A `gradscale spectrum` is killed after its first commits; a gang of another size finishes its run."""
    out = tmp_path / "run"
    options = {"out": str(out), "pause": "0.1"}
    command = [
        *(sys.executable, "-m", "gradscale", "spectrum", "--task", "run_problems:Falling", "--out", str(out)),
        *(word for name, text in options.items() for word in ("--task-option", f"{name}={text}")),
        *("--top", "4", "--which", "both", "--microbatch", "4", "--shard-size", "8", "--vectors", "float64"),
        *("--tolerance", "1e-10", "--commit-seconds", "0", "--workers", "2"),
    ]
    state = out / "lanczos" / "step-00000000" / "state.json"
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: (state.exists() and json.loads(state.read_text())["step"] >= 2) or driver.poll() is not None)
        assert driver.poll() is None, (tmp_path / "log").read_text()
    finally:
        driver.kill()
        driver.wait()
    wait_until(lambda: not writing(driver.pid), seconds=30)
    for pid in of_session(driver.pid):
        os.kill(pid, signal.SIGKILL)
    run = gs.spectrum("run_problems:Falling", str(out), workers=3, task_options={"out": str(out), "pause": 0.1},
                      **{**ASKED, "trace": False, "density": False})  # fmt: skip
    found = json.loads((out / "parts" / "step-00000000" / "eigenvalues.json").read_text())
    assert found["resumed_from"] >= 2
    assert found["world"] == 3
    np.testing.assert_allclose(run.eigenvalues(), undisturbed.eigenvalues(), rtol=1e-9)


def of_session(leader: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if os.getsid(int(entry.name)) == leader:
                    found.append(int(entry.name))
            except ProcessLookupError:
                continue
    return found


def writing(leader: int) -> list[int]:
    """Actors of the killed driver that are still there."""
    found = []
    for pid in of_session(leader):
        try:
            if b"SpectrumWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def wait_until(condition, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.05)


def test_a_finished_run_is_left_as_it_is_and_other_settings_are_refused(
    tmp_path: Path, undisturbed: gs.Spectrum
) -> None:
    out, asked = shutil.copytree(undisturbed.path, tmp_path / "run").as_posix(), {**ASKED, "workers": 1}
    before = {path: path.stat().st_mtime_ns for path in Path(out).glob("parts/**/*.json")}
    gs.spectrum(Regression(), out, **asked)
    assert len(before) == 3 + 2 * 3  # choice, eigenvalues, nodes, and two blocks of probes over three shards
    assert {path: path.stat().st_mtime_ns for path in Path(out).glob("parts/**/*.json")} == before
    with pytest.raises(gs.GradscaleError, match=r"(?s)settings must be those of the run .* top: 4 in the run, 5 now"):
        gs.spectrum(Regression(), out, **{**asked, "top": 5})
    with pytest.raises(
        gs.GradscaleError, match=r"run\.json must hold the plan of a run of this version.*the plan of a spectrum run"
    ):
        gs.measure(Regression(), out, microbatch=4)


def test_a_trace_stops_at_the_error_that_was_asked_for(tmp_path: Path, dense: dict) -> None:
    asked = gs.Hutchinson(400, 0.2, min_probes=8)
    run = gs.spectrum(Regression(), str(tmp_path / "run"), "ggn", 0, asked, **SETTINGS)
    trace, stderr = value(run, "trace_sample")
    assert stderr <= 0.2 * trace
    assert abs(trace - np.trace(dense["ggn"])) < 4 * stderr
    probes = 8 * len({path.name[:11] for path in Path(run.path).glob("parts/**/trace-*.json")})
    assert 8 <= probes <= 80


def test_enough_probes() -> None:
    """Samples of two shards, whose mean over examples is 100 +- 14 over probes."""
    samples = 100 + 20 * torch.randn(40, 1, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    errors = {N: float(samples[:N].mean(dim=2).std()) / N**0.5 for N in range(8, 41, 8)}
    for settings, limit in (({}, 0.0), ({"relative": 0.1}, 10.0), ({"stderr": 2.6}, 2.6), ({"stderr": 1e-3}, 1e-3)):
        asked = dataclasses.asdict(gs.Hutchinson(40, **{"relative": None, **settings}))
        found = [N for N in errors if enough(TraceSums(samples[:N], torch.ones(2).double()), asked)]
        assert found[0] == next((N for N, error in errors.items() if N >= 16 and error <= limit), 40), settings


def test_a_deflated_trace(tmp_path: Path, dense: dict) -> None:
    run = gs.spectrum(Regression(), str(tmp_path / "run"), "ggn", 0, gs.Deflated("hutch++", 90), workers=1, **SETTINGS)
    assert value(run, "trace_sample")[0] == pytest.approx(np.trace(dense["ggn"]), rel=1e-7)  # P = 29 vectors span all


def test_stability_is_that_of_the_dense_matrices(tmp_path: Path) -> None:
    """The Gauss-Newton matrices are of rank one and no less than 0: the report for small problems has all, exactly.

    With one microbatch, of two workers one has no examples.
    """
    _, jacobians, _ = rows()
    eta, batch = 0.9, 4
    exact = {each.name: each for each in report_of_gram(jacobians @ jacobians.T, eta, batch).criteria}
    run = gs.spectrum(Regression(), str(tmp_path / "run"), "ggn", 1, False, stability=gs.Stability(eta, batch),
                      workers=2, **{**SETTINGS, "microbatch": EXAMPLES})  # fmt: skip
    found = run.estimates().set_index("name")
    assert set(found["measure"]) == {"gauss_newton", "stability"}
    for name in ("sharpness", "bound_along"):
        assert found.loc[name, "value"] == pytest.approx(exact[name].value, rel=1e-7)
        assert found.loc[f"{name}_threshold", "value"] == pytest.approx(exact[name].threshold, rel=1e-7)
    bound = found.loc["bound_of_traces_threshold"]
    assert abs(bound["value"] - exact["bound_of_traces"].threshold) < 4 * bound["stderr"]
    assert found.loc["non_uniformity", "value"] <= exact["non_uniformity"].value
    report = json.loads((tmp_path / "run/parts/step-00000000/eigenvalues.json").read_text())["stability"]
    assert report["verdict"] in ("unstable", "undecided")


def test_a_unit_that_fails_leaves_the_others(tmp_path: Path) -> None:
    task, out = Troubled(str(tmp_path), "raise", times=99), tmp_path / "run"
    settings = {"top": 0, "trace": gs.Hutchinson(8, None), "microbatch": 4, "shard_size": 4}
    with pytest.raises(
        gs.ShardsFailed, match=r"(?s)1 units of the trace failed.*probes 0 to 7 of step 0, examples 12 to 15"
    ):
        gs.spectrum(task, str(out), **settings)
    assert len(list(out.glob("parts/**/trace-*.json"))) == 5
    (tmp_path / "mended").touch()
    assert np.isfinite(value(gs.spectrum(task, str(out), **settings), "trace")[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"operator": "fisher"}, "operator must be one of hessian, ggn, covariance, got 'fisher'"),
        ({"which": "smallest"}, "which must be one of largest, both, magnitude, got 'smallest'"),
        ({"backend": "exact"}, "backend must be one of auto, "),
        ({"backend": "double_backward", "operator": "ggn"}, "backend must be auto for the operator ggn"),
        ({"top": 0, "trace": False}, "a spectrum must be asked for something, got nothing; add --top"),
        ({"operator": "covariance", "norms": True}, "norms must be of hessian or ggn, got operator covariance"),
        ({"trace": gs.Deflated("xnystrace")}, "method of the trace must be hutchinson, hutch"),
        ({"trace": gs.Deflated(), "operator": "covariance"}, "method of the trace must be left out for the covariance"),
        ({"tolerance": -1.0}, "tolerance must be positive, got -1.0"),
        (
            {"stability": gs.Stability(0.1, 4), "top": 0},
            "stability needs the largest eigenvalue of hessian or ggn, got top = 0",
        ),
        ({"gpus_per_worker": 0.5, "workers": 2}, "gpus_per_worker must be a whole number where workers meet, got 0.5"),
        ({"max_steps": 0}, "max_steps must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_settings(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(gs.GradscaleError, match=message):
        gs.spectrum(Regression(), str(tmp_path / "run"), **{"top": 1, "trace": False, "microbatch": 8, **settings})


@pytest.mark.parametrize(
    ("settings", "workers", "message"),
    [
        ({"top": 30}, 2, "top must be at most the 29 measured entries, got 30; ask for fewer"),
        (
            {},
            30,
            "workers must be such that each holds an entry of the 29 measured ones, got 30 with slices of 1; use 29",
        ),
        (
            {},
            20,
            "workers must be such that each holds an entry of the 29 measured ones, got 20 with slices of 2; use 15",
        ),
        ({"examples": 1, "operator": "covariance"}, 2, "examples must be two or more for a covariance, got 1"),
        ({"stability": {"batch_size": 25}}, 2, "batch_size must be at most the 24 examples, got 25"),
        ({"basis_cap": 3, "top": 1}, 2, "basis_cap must be at least 5 for top = 1, got 3; raise it"),
    ],
)
def test_more_than_there_is(settings: dict, workers: int, message: str, undisturbed: gs.Spectrum) -> None:
    plan = SpectrumPlan.from_json((Path(undisturbed.path) / "run.json").read_text())
    with pytest.raises(gs.GradscaleError, match=message):
        check_sizes(dataclasses.replace(plan, **settings), workers)


def test_a_trace_has_the_digits_of_its_parts(undisturbed: gs.Spectrum) -> None:
    """In double precision, all the way from the products."""
    parts = [json.loads(path.read_text()) for path in Path(undisturbed.path).glob("parts/**/trace-*.json")]
    total = math.fsum(number for part in parts for row in part["sums"] for number in row)
    assert value(undisturbed, "trace")[0] == pytest.approx(total / (EXAMPLES * 16), rel=1e-14)


def test_more_examples_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(gs.GradscaleError, match="examples must be from 1 to the 24 of the dataset, got 25"):
        gs.spectrum(Regression(), str(tmp_path / "run"), top=0, workers=1, examples=25)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (gs.Hutchinson, {"max_probes": 0}, "max_probes must be a whole number of at least 1, got 0"),
        (gs.Hutchinson, {"relative": 0.0}, "relative must be a positive standard error, got 0.0"),
        (gs.Hutchinson, {"probes": "signs"}, "probes must be one of gaussian, rademacher, got 'signs'"),
        (gs.SLQ, {"num_probes": 0}, "num_probes must be a whole number of at least 1, got 0"),
        (gs.SLQ, {"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        (gs.SLQ, {"shift": -1.0}, "shift must be a number of at least 0, got -1.0"),
        (gs.SLQ, {"edge": math.nan}, "edge must be a finite number, got nan"),
        (gs.Norms, {"num_probes": 0}, "num_probes must be a whole number of at least 1, got 0"),
        (gs.Deflated, {"products": 5}, "products must be a whole number of at least 6, got 5"),
        (gs.Deflated, {"method": "lanczos"}, "method of the trace must be hutchinson or one of"),
        (gs.Stability, {"eta": 0.0, "batch_size": 1}, "eta must be a positive number, got 0.0"),
        (gs.Stability, {"eta": 0.1, "batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        (gs.Stability, {"eta": 0.1, "batch_size": 1, "momentum": 1.0}, "momentum must be at least 0 and less than 1"),
    ],
)
def test_bad_quantities(kind: type, settings: dict, message: str) -> None:
    with pytest.raises(gs.GradscaleError, match=message):
        kind(**settings)


@pytest.mark.parametrize("asked", [{"top": 1, "trace": False}, {"top": 0, "trace": gs.Hutchinson(8)}])
def test_a_loss_that_is_not_finite_is_named(asked: dict, tmp_path: Path) -> None:
    with pytest.raises((gs.GradscaleError, gs.ShardsFailed), match="example 15"):
        gs.spectrum(Regression(nan=15), str(tmp_path / "run"), microbatch=4, shard_size=8, **asked)


def test_a_model_that_is_not_in_the_mode_to_be_measured(tmp_path: Path) -> None:
    with pytest.raises(gs.GradscaleError, match="BatchNorm"):
        gs.spectrum(Broken("batchnorm"), str(tmp_path / "run"), top=1, trace=False)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    command = ["gradscale", "spectrum", "--task", "run_problems:Regression", "--out", out, "--microbatch", "8"]

    def code(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", [*command, *more])
        monkeypatch.setattr(sys, "path", [*sys.path])
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    assert code("--eta", "0.1") == 2
    assert "stability must have --eta and --batch-size, got no --batch-size" in capsys.readouterr().err
    assert code("--norms", "-3") == 2
    assert "norms must be a number of probes, or 0 for none, got -3" in capsys.readouterr().err
    assert code("--top", "2", "--trace", "--trace-probes", "8") == 0
    printed = capsys.readouterr()
    assert "estimates; see them with: gradscale show" in printed.out
    assert "step 0: trace, 24 of 24 products" in printed.err or "step 0: trace, 8 of 8 products" in printed.err
    assert gs.open_run(out).eigenvalues().shape == (2,)
