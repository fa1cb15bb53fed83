"""Promise: path.parquet has every optimizer step's |dw| to 1e-6, and what is worked out from it is what its words say.

Two ranks train every case (tests/attach_path_problems.py): the oracle of |dw| are float64 copies of the masters after
each step, and one process of plain torch. What is read from the table is held to slow loops and to fresh samples.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from attach_path_problems import CASES, CLIP, POISONED, RATES, SLOW, STEPS, Case, rows_of
from attach_problems import batch_of, made_model
from rank_problems import environments

import gradscale as gs
from gradscale.errors import GradscaleError
from gradscale.measures.dispersion import trace_covariance
from gradscale.measures.moments import Moments, jackknife
from gradscale.run.attach_masters import sq_distance
from gradscale.store.files import Files
from gradscale.store.store import PLAN, Store
from gradscale.store.training_path import PATH, PathRow, PathTable

ROOT = Path(__file__).parent.parent
Ranks = list[dict[str, Any]]
_TRACE, _ABOUT = ("dispersion", "trace_covariance", "all"), ("estimator", "of a test", "")


def launched(folder: Path, names: Iterable[str], codes: tuple[int, int] = (0, 0)) -> dict[str, Ranks]:
    """What the two ranks found: one launch, for starting them takes longer than a case."""
    job = [sys.executable, str(ROOT / "tests" / "attach_path_problems.py"), str(folder), *names]
    logs = [(folder / f"log-{rank}").open("w+") for rank in (0, 1)]
    ranks = [
        subprocess.Popen(job, env=env, stdout=log, stderr=subprocess.STDOUT)
        for env, log in zip(environments(), logs, strict=True)
    ]
    try:
        found = tuple(rank.wait(timeout=280) for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
        for log in logs:
            log.close()
    ends = "\n".join((folder / f"log-{rank}").read_text()[-3000:] for rank in (0, 1))
    assert found == codes, f"the ranks must end with {codes}, got {found}:\n{ends}"
    left = [name for name in names if (folder / f"{name}-0.pt").exists()]
    return {name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in (0, 1)] for name in left}


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Ranks]]:
    folder = tmp_path_factory.mktemp("usual")
    return folder, launched(folder, [*CASES, "failing", "failing-strict", "again", "refused"])


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Ranks]]:
    folder = tmp_path_factory.mktemp("slow")
    return folder, launched(folder, SLOW)


@pytest.fixture(params=[*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def trained(request: pytest.FixtureRequest) -> tuple[Case, gs.Run, Ranks]:
    name = request.param
    folder, found = request.getfixturevalue("usual" if name in CASES else "slow")
    return (CASES | SLOW)[name], gs.open_run(str(folder / name)), found[name]


def test_lengths_are_those_of_the_masters(trained: tuple[Case, gs.Run, Ranks]) -> None:
    case, run, ranks = trained
    path, weights = gs.training_path(run), ranks[0]["weights"]
    assert path["step"].tolist() == list(range(STEPS))
    assert run.steps == [0, 2, 4]
    measured = list(run.plan["parameters"])
    assert (len(measured) < len(weights[0])) == (case.params is not None)
    for step, row in path.set_index("step").iterrows():
        squares = {name: float((weights[step + 1][name] - w).square().sum()) for name, w in weights[step].items()}
        assert row["length_trained"] == pytest.approx(math.sqrt(sum(squares.values())), rel=1e-6, abs=0)
        assert row["length"] == pytest.approx(math.sqrt(sum(squares[name] for name in measured)), rel=1e-6, abs=0)
        assert row["skipped"] == (case.low and step == POISONED)
        assert (row["length_trained"] > 0) != row["skipped"]
    assert gs.path_length(run).value == pytest.approx(sum(path["length"]), rel=1e-12)


def test_the_rest_of_a_row_is_the_step_s_own(trained: tuple[Case, gs.Run, Ranks]) -> None:
    case, run, ranks = trained
    path = gs.training_path(run)
    assert [list(rates) for rates in path["learning_rates"]] == ranks[0]["rates"]
    if case.low:
        assert len({rates[0] for rates in ranks[0]["rates"]}) > 2  # the schedule's
    else:
        assert {tuple(rates) for rates in ranks[0]["rates"]} == {RATES}
    parts = case.microbatches if case.by_gas else 1
    losses = [sum(sum(rank["losses"][step]) for rank in ranks) / (2 * parts) for step in range(STEPS)]
    assert path["loss"].tolist() == pytest.approx(losses, rel=1e-6)
    assert np.isinf(path["loss"]).tolist() == [case.low and step == POISONED for step in range(STEPS)]
    if case.low:
        assert np.isinf(path["gradient_norm"][POISONED])
    elif case.stage == 0:
        assert path["gradient_norm"].isna().all()
    else:
        assert path["gradient_norm"].tolist() == pytest.approx(ranks[0]["norms"], rel=1e-5)
        assert max(ranks[0]["norms"]) > CLIP
    assert (path["seconds"] > 0).all()


def test_training_goes_on_bit_for_bit(trained: tuple[Case, gs.Run, Ranks]) -> None:
    for rank in trained[2]:
        assert rank["same"]
        assert rank["failures"] == 0
        assert rank["own"] == []
        assert rank["partitioned"] == (trained[0].stage == 3)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.low])
def test_lengths_are_those_of_one_process(usual: tuple[Path, dict[str, Ranks]], name: str) -> None:
    case, model = CASES[name], made_model().double()
    groups = [[p for p in model.parameters() if (p.dim() > 1) == wide] for wide in (True, False)]
    optimizer = torch.optim.SGD(
        [{"params": group, "lr": rate} for group, rate in zip(groups, RATES, strict=True)], momentum=0.9
    )
    parts = case.microbatches if case.by_gas else 1
    expected = []
    for step in range(STEPS):
        batches = [batch_of(step, rank, m) for rank in (0, 1) for m in range(case.microbatches)]
        logits = [model(batch[:, :-1]) for batch in batches]
        pairs = zip(logits, batches, strict=True)
        each = [torch.nn.functional.cross_entropy(x.flatten(0, 1), b[:, 1:].flatten()) for x, b in pairs]
        optimizer.zero_grad()
        (torch.stack(each).sum() / (2 * parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizer.step()
        expected.append(float((torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm()))
    path = gs.training_path(gs.open_run(str(usual[0] / name)))
    assert path["length_trained"].tolist() == pytest.approx(expected, rel=1e-5)


def test_a_failure_costs_a_length_and_no_training(usual: tuple[Path, dict[str, Ranks]]) -> None:
    folder, found = usual
    first, second = found["failing"]
    assert [rank["same"] for rank in (first, second)] == [True, True]
    assert [rank["failures"] for rank in (first, second)] == [2, 2]
    assert first["steps"] == second["steps"] == [0, 2, 4]
    assert first["problem"].startswith("step 3: ")
    assert "Is a directory" in first["problem"]
    assert second["problem"] == "step 3: all ranks must succeed, got a failure on 1 of 2; the others know why"
    path = gs.training_path(gs.open_run(str(folder / "failing")))
    assert path["step"].tolist() == list(range(STEPS))
    assert path["length"].isna().tolist() == path["length_trained"].isna().tolist() == [False, True, *[False] * 3]
    assert path["loss"].notna().all()
    with pytest.raises(GradscaleError, match=r"lengths of .* must be finite, got others at steps \[1\]; the training"):
        gs.path_length(gs.open_run(str(folder / "failing")))


def test_strict_raises_on_all_ranks_after_the_step(usual: tuple[Path, dict[str, Ranks]]) -> None:
    first, second = usual[1]["failing-strict"]
    assert first["said"] == "GradscaleError: all ranks must succeed, got a failure on 1 of 2; the others know why"
    assert second["said"].startswith("AttributeError: ")
    assert "_hp_mapping" in second["said"]
    for rank in (first, second):
        assert rank["same"]
        assert rank["global_steps"] == 2


def test_rows_from_the_checkpoint_on_are_made_anew(usual: tuple[Path, dict[str, Ranks]]) -> None:
    folder, found = usual
    first = found["again"][0]
    assert first["at the checkpoint"] == [0, 1]
    assert first["first"]["step"] == list(range(STEPS))
    assert first["without"] == [0, 1]
    path = gs.training_path(gs.open_run(str(folder / "again"))).drop(columns=["seconds", "learning_rates"])
    pd.testing.assert_frame_equal(path, pd.DataFrame(first["first"])[path.columns])


MISTAKES = {
    "swapped out": "masters must be in memory and partitioned over all ranks for path, got another way under ZeRO-3",
    "late": "weights must be moved within engine.step for path, got zenflow, which moves some later; leave it out",
    "other columns": "must have the columns step, length, length_trained, skipped, learning_rates, gradient_norm, loss",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_on_all_ranks(usual: tuple[Path, dict[str, Ranks]], mistake: str) -> None:
    for rank in usual[1]["refused"]:
        assert MISTAKES[mistake] in rank[mistake]


def test_any_reader_has_the_table(usual: tuple[Path, dict[str, Ranks]]) -> None:
    import duckdb
    import pyarrow.parquet as pq

    file = usual[0] / "zero1" / PATH
    ours = gs.training_path(gs.open_run(str(file.parent)))
    pd.testing.assert_frame_equal(pd.read_parquet(file), ours)
    total, rate = duckdb.sql(f"select sum(length), max(learning_rates[2]) from '{file}'").fetchall()[0]
    assert total == pytest.approx(ours["length"].sum())
    assert rate == RATES[1]
    fields = {field.name: field for field in pq.read_schema(file)}
    assert all(field.metadata[b"unit"] for field in fields.values())
    assert [name for name, field in fields.items() if field.nullable] == ["gradient_norm"]


@pytest.mark.slow
def test_killed_training_resumes_without_a_step_twice(tmp_path: Path) -> None:
    launched(tmp_path, ["whole"])
    launched(tmp_path, ["killed"], (-9, -9))
    assert rows_of(tmp_path / "interrupted") == [0, 1]
    launched(tmp_path, ["resumed"])
    ours, theirs = (gs.training_path(gs.open_run(str(tmp_path / name))) for name in ("interrupted", "whole"))
    assert ours["step"].tolist() == list(range(6))
    pd.testing.assert_frame_equal(ours.drop(columns="seconds"), theirs.drop(columns="seconds"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_distances_are_those_in_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    before = torch.randn(1001, dtype=torch.float64).to(dtype)
    after = (before.double() + 1e-3 * torch.randn(1001, dtype=torch.float64)).to(dtype)
    expected = (after.double() - before.double()).square().sum()
    assert float(sq_distance(before.clone(), after)) == pytest.approx(float(expected), rel=1e-6)


def written(
    folder: Path,
    steps: Iterable[int] = range(7),
    rates: Mapping[int, tuple[float, ...]] | None = None,
    lengths: Mapping[int, float] | None = None,
    skipped: Iterable[int] = (),
    traces: Mapping[int, tuple[float, float]] | None = None,
    measures: Iterable[str] = ("dispersion",),
    features: Mapping[int, float] | None = None,
    shape: tuple[int, ...] = (3, 2),
    n: int = 8,
) -> gs.Run:
    """A run with these rows: tr Sigma with its error, |Phi|_F."""
    files = Files(str(folder))
    plan = {
        "measures": {name: {} for name in measures},
        "parameters": {"w": {"shape": list(shape)}},
        "checkpoints": {str(step): {"path": None, "fingerprint": None} for step in (traces or features or {})},
    }
    files.write(PLAN, json.dumps(plan).encode())
    table = PathTable(files, 0)
    for step in steps:
        rate = (rates or {}).get(step, (0.1 + 0.05 * step,))
        length = (lengths or {}).get(step, 1.0 + step)
        table.add(PathRow(step, length, length, step in skipped, rate, None, 0.5, 0.1))
    table.flush()
    rows = [(step, *_TRACE, *each, n, *_ABOUT) for step, each in (traces or {}).items()]
    rows += [
        (step, "tangent_kernel", "frobenius", "all", each**2, 0.1, n, *_ABOUT)
        for step, each in (features or {}).items()
    ]
    Store(files).write_estimates(rows)
    return gs.open_run(str(folder))


TRACES = {0: (4.0, 0.4), 2: (6.0, 0.2), 5: (3.0, 0.6)}


@cache
def between(interpolation: str, step: int) -> float:
    """tr Sigma at a step, told in words."""
    if step in TRACES or step > 5:
        return TRACES[min(step, 5)][0]
    first, last = (0, 2) if step < 2 else (2, 5)
    if interpolation == "step":
        return TRACES[first][0]
    return TRACES[first][0] + (TRACES[last][0] - TRACES[first][0]) * (step - first) / (last - first)


@pytest.mark.parametrize("interpolation", ["trapezoid", "step"])
def test_sums_along_the_path_are_those_of_a_loop(tmp_path: Path, interpolation: str) -> None:
    run = written(tmp_path, traces=TRACES, skipped=[3])
    rates = [0.0 if step == 3 else 0.1 + 0.05 * step for step in range(7)]
    found = gs.variance_sum(run, interpolation)
    assert found.value == pytest.approx(sum(rates[t] ** 2 * between(interpolation, t) / 8 for t in range(7)), rel=1e-12)
    integral = gs.perturbation_integral(run, 50, interpolation)
    expected = sum(rates[t] * between(interpolation, t) / 50 for t in range(7))
    assert integral.integral.value == pytest.approx(expected, rel=1e-12)
    assert (found.status, integral.integral.status) == ("heuristic", "conditional")
    assert found.n == integral.integral.n == 24
    assert integral.time == pytest.approx(sum(rates))
    assert integral.spacing == pytest.approx(max(sum(rates[:2]), sum(rates[2:5]), sum(rates[5:])))
    ends = written(tmp_path / "ends", traces={step: TRACES[step] for step in (0, 5)}, skipped=[3])
    assert integral.coarser == pytest.approx(gs.perturbation_integral(ends, 50, interpolation).integral.value)
    assert f"3 of 7 steps, {interpolation}" in found.definition
    assert f"m=50, 3 of 7 steps, {interpolation}, time={sum(rates):g}" in integral.integral.definition


def test_errors_are_those_of_the_measured_steps(tmp_path: Path) -> None:
    """Of what is linear in the measured values, by moving each of them by its error."""
    run = written(tmp_path / "run", traces=TRACES)
    for number, function in enumerate((gs.variance_sum, lambda run: gs.perturbation_integral(run, 50).integral)):
        moves = []
        for step, (value, error) in TRACES.items():
            other = written(tmp_path / f"{number}-{step}", traces=TRACES | {step: (value + error, error)})
            moves.append(function(other).value - function(run).value)
        assert function(run).stderr == pytest.approx(math.sqrt(sum(move**2 for move in moves)), rel=1e-9)


def test_a_measured_step_s_variance_is_that_of_its_mean(tmp_path: Path) -> None:
    run = written(tmp_path, traces=TRACES, skipped=[2], rates={t: (0.1, 0.1 * t) for t in range(7)})
    frame = gs.gradient_variances(run, group=1)
    assert frame.to_dict("list") == {
        "step": [0, 2, 5],
        "learning_rate": pytest.approx([0.0, 0.2, 0.5]),
        "variance": pytest.approx([4 / 8, 6 / 8, 3 / 8]),
        "stderr": pytest.approx([0.4 / 8, 0.2 / 8, 0.6 / 8]),
        "n": [8, 8, 8],
        "skipped": [False, True, False],
    }


def test_every_step_measured_is_an_estimator(tmp_path: Path) -> None:
    run = written(tmp_path, steps=range(3), traces=dict.fromkeys(range(3), (1.0, 0.1)))
    assert gs.variance_sum(run).status == "estimator"
    assert gs.variance_sum(run).value == gs.variance_sum(run, "step").value


def test_full_batch_perturbation_is_that_of_leave_one_out(tmp_path: Path) -> None:
    """On full-batch descent, the integral is that of gs.leave_out_gap, from its definition."""
    torch.manual_seed(0)
    x, y, w = torch.randn(6, 3).double(), torch.randn(6).double(), torch.zeros(3).double()
    traces, eta, integral = {}, 0.05, 0.0
    for step in range(20):
        gradients = (x @ w - y)[:, None] * x
        mean = gradients.mean(dim=0)
        left_out = [(gradients.sum(dim=0) - g) / 5 for g in gradients]
        integral += eta * float(sum(g @ (g - rest) for g, rest in zip(gradients, left_out, strict=True))) / 36
        traces[step] = (float((gradients - mean).square().sum()) / 5, 0.0)
        w = w - eta * mean
    run = written(tmp_path, steps=range(20), rates=dict.fromkeys(range(20), (eta,)), traces=traces, n=6)
    assert gs.perturbation_integral(run, 6).integral.value == pytest.approx(integral, rel=1e-9)


@pytest.mark.parametrize("interpolation", ["trapezoid", "step"])
def test_complexity_takes_every_step_s_length(tmp_path: Path, interpolation: str) -> None:
    training = written(tmp_path / "training")
    checkpoints = written(tmp_path / "checkpoints", features={0: 2.0, 3: 5.0, 6: 4.0}, measures=["tangent_kernel"])
    found = gs.training_complexity(training, checkpoints, interpolation)
    linear = [2.0, 3.0, 4.0, 5.0, 14 / 3, 13 / 3]
    norms = linear if interpolation == "trapezoid" else [2.0, 2.0, 2.0, 5.0, 5.0, 5.0]
    expected = sum((1.0 + step) * norm for step, norm in enumerate(norms))
    assert found.complexity.value == pytest.approx(expected, rel=1e-12)
    assert found.complexity.status == "heuristic"
    assert found.length.value == sum(range(1, 7))
    assert gs.path_length(training).value == sum(range(1, 8))


def test_stated_errors_cover(tmp_path: Path) -> None:
    """Fresh Gaussian gradients on four ranks in each of 200 trainings, tr Sigma_t linear in t: 68 % and 95 %.

    With every step measured, and every fourth.
    """
    seeds, steps, ranks, size, dim = 200, 13, 4, 6, 3
    rates = {t: (0.1 / (1 + 0.1 * t),) for t in range(steps)}
    truth = {t: dim * (1 + 0.2 * t) for t in range(steps)}
    weights = np.array([rates[t][0] for t in range(steps)])
    true = [
        float(weights**2 @ list(truth.values())) / (ranks * size),
        float(weights @ list(truth.values())) / 1000,
    ]
    runs = {every: written(tmp_path / str(every), range(steps), rates) for every in (1, 4)}
    inside = np.zeros((4, 2))
    for seed in range(seeds):
        draw = torch.Generator().manual_seed(seed)
        traces = {}
        for t in range(steps):
            g = torch.randn(ranks, size, dim, generator=draw, dtype=torch.float64) * math.sqrt(truth[t] / dim) + 1
            blocks = g.sum(dim=1)
            counts = torch.full((ranks,), size).double()
            traces[t] = jackknife(Moments(counts, g.square().sum(dim=(1, 2)), blocks @ blocks.mT), trace_covariance)
        for every, run in runs.items():
            rows = [(t, *_TRACE, *traces[t], ranks * size, *_ABOUT) for t in range(0, steps, every)]
            Store(run.files).write_estimates(rows)
            both = gs.variance_sum(run), gs.perturbation_integral(run, 1000).integral
            for number, found in enumerate(both, 0 if every == 1 else 2):
                error = abs(found.value - true[number % 2])
                inside[number] += [error <= k * found.stderr for k in (1, 2)]
    for k, rate in enumerate((0.683, 0.954)):
        slack = 3 * math.sqrt(rate * (1 - rate) / seeds)
        assert (np.abs(inside[:, k] / seeds - rate) < slack).all(), inside / seeds


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    def run(name: str, **settings: Any) -> gs.Run:
        return written(tmp_path / name, **({"traces": TRACES} | settings))

    with pytest.raises(GradscaleError, match=r"must have been measured with dispersion, got coherence; train again"):
        gs.gradient_variances(run("coherence", measures=["coherence"]))
    with pytest.raises(GradscaleError, match="must have a measured step on its path, got none; train longer than"):
        gs.variance_sum(run("none", traces={9: (1.0, 0.1)}))
    with pytest.raises(GradscaleError, match=r"path of .* must have every step once, got 6 rows for 7 steps; train"):
        gs.path_length(run("gap", steps=[0, 1, 2, 4, 5, 6]))
    with pytest.raises(GradscaleError, match=r"must have one learning rate, got \[0.1, 0.2\] at step 0; pass group="):
        gs.variance_sum(run("rates", rates={0: (0.1, 0.2)}))
    with pytest.raises(GradscaleError, match="group must be one of 1 from 0 on, got 1 at step 0; see get_lr"):
        gs.variance_sum(run("group"), group=1)
    with pytest.raises(GradscaleError, match="interpolation must be one of trapezoid, step, got 'cubic'; trapezoid is"):
        gs.variance_sum(run("cubic"), "cubic")
    for examples in (1, 2.5, True):
        with pytest.raises(
            GradscaleError, match=f"examples must be a whole number of at least 2, got {examples}; give"
        ):
            gs.perturbation_integral(run(f"examples-{examples}"), examples)  # type: ignore[arg-type]
    checkpoints = run("other", measures=["tangent_kernel"], features={0: 1.0, 6: 1.0}, traces=None, shape=(3, 3))
    with pytest.raises(GradscaleError, match="runs must have measured the same parameters, got differences in w; use"):
        gs.training_complexity(run("training"), checkpoints)
    bare = run("bare")
    (tmp_path / "bare" / PATH).unlink()
    with pytest.raises(GradscaleError, match=f"must have the path of a training, got no {PATH}; train under gs.attach"):
        gs.training_path(bare)


def test_rows_that_could_not_be_written_are_kept(tmp_path: Path) -> None:
    run = written(tmp_path, steps=range(2))
    table = PathTable(run.files, 2)
    table.add(PathRow(2, 1.0, 1.0, False, (0.1,), 0.5, 0.5, 0.1))
    (tmp_path / PATH).rename(tmp_path / "aside")
    (tmp_path / PATH).mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        table.flush()
    (tmp_path / PATH).rmdir()
    table.flush()
    assert rows_of(tmp_path) == [0, 1, 2]
