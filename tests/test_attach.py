"""Promise: what a DeepSpeed training step is measured to be is what one process measures, and training goes on as ever.

Two ranks train every case (tests/attach_problems.py), with uneven microbatches, tied weights, places given as ids [T]
and an evaluation between steps; the oracle is `run_shard` on the same weights and batches.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, reduce
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attach_problems import (
    BY_CLASS,
    CASES,
    MEASURES,
    NUMBERS,
    SIZES,
    SLOW,
    WORDS,
    Case,
    batch_of,
    first_logits,
    first_word,
    made_model,
    made_tokens,
)
from rank_problems import environments
from torch import Tensor, nn
from torch.nn import functional as F

import gradscale as gs
from gradscale.measures.measure import statistic_of
from gradscale.run.attach_plan import Blocks
from gradscale.run.attach_setup import Inputs
from gradscale.run.fold import statistics_of
from gradscale.run.shard import ShardResult, bound, prepare, run_shard
from gradscale.sketches import parse_sketch
from gradscale.task import TensorExamples

ROOT = Path(__file__).parent.parent
Ranks = list[dict[str, Any]]


def launched(folder: Path, names: list[str], ranks: int = 2, kill: bool = False) -> dict[str, Ranks]:
    """What the ranks found: one launch, for starting them takes longer than a case. `kill` them once they are ready."""
    job = [sys.executable, str(ROOT / "tests" / "attach_problems.py"), str(folder), *names]
    logs = [(folder / f"log-{rank}").open("w+") for rank in range(ranks)]
    started = [
        subprocess.Popen(job, env=env, stdout=log, stderr=subprocess.STDOUT)
        for env, log in zip(environments(ranks), logs, strict=True)
    ]
    try:
        if kill:
            waited_for([folder / f"ready-{rank}" for rank in range(ranks)], started)
            for each in started:
                each.kill()
        found = {each.wait(timeout=280) for each in started}
    finally:
        for each in started:
            each.kill()
        for log in logs:
            log.close()
    ends = "\n".join((folder / f"log-{rank}").read_text()[-3000:] for rank in range(ranks))
    assert found == {-signal.SIGKILL if kill else 0}, f"the ranks ended with {found}:\n{ends}"
    left = [name for name in names if (folder / f"{name}-0.pt").exists()]
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(ranks)] for name in left
    }


def waited_for(files: list[Path], processes: list[subprocess.Popen[bytes]]) -> None:
    """Until all files are there, or a process has ended."""
    deadline = time.monotonic() + 200
    while not all(file.exists() for file in files) and all(each.poll() is None for each in processes):
        assert time.monotonic() < deadline, "the ranks must become ready"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Ranks]]:
    folder = tmp_path_factory.mktemp("usual")
    return folder, launched(folder, [*CASES, "packed", "failing", "failing-strict", "refused"])


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Path, dict[str, Ranks]]]:
    """A launch for each stage of ZeRO."""

    @cache
    def of_stage(stage: int) -> tuple[Path, dict[str, Ranks]]:
        folder = tmp_path_factory.mktemp(f"more-{stage}")
        return folder, launched(folder, [name for name, case in SLOW.items() if case.stage == stage])

    return of_stage


@pytest.fixture(params=[*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def trained(request: pytest.FixtureRequest) -> tuple[Case, str, Ranks]:
    """A case, its run directory and what the ranks found."""
    name = request.param
    usual = name in CASES
    folder, found = request.getfixturevalue("usual") if usual else request.getfixturevalue("more")(SLOW[name].stage)
    return (CASES | SLOW)[name], str(folder / name), found[name]


@dataclass(frozen=True, eq=False)
class Step:
    """A training step as a task: each example's loss, times the share of its microbatch in the step's gradient."""

    weights: Mapping[str, Tensor]
    case: Case
    step: int

    def model(self, checkpoint: str | None) -> nn.Module:
        model = made_model().to(torch.bfloat16 if self.case.low else torch.float32).eval()
        model.load_state_dict({name: each.to(model.norm.weight.dtype) for name, each in self.weights.items()}, False)
        return model

    def examples(self) -> TensorExamples:
        """g_i = N / (W A) x its share: N / (W A B) x the gradient of its own mean loss."""
        microbatches = [batch_of(self.step, rank, m) for rank in (0, 1) for m in range(self.case.microbatches)]
        n = sum(map(len, microbatches))
        parts = 2 * (self.case.microbatches if self.case.by_gas else 1)
        factors = [torch.full((len(each),), n / (parts * len(each))) for each in microbatches]
        return TensorExamples(words=torch.cat(microbatches), factor=torch.cat(factors))

    def labels(self, batch: Mapping[str, Tensor]) -> Tensor:
        return first_word(Inputs((batch["words"],), {}))

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        logits, words = model(batch["words"][:, :-1]), batch["words"][:, 1:]
        each = F.cross_entropy(logits.flatten(0, 1).float(), words.flatten(), reduction="none")
        return each.view(len(words), -1).mean(dim=1) * batch["factor"]


def expected(case: Case, weights: Mapping[str, Tensor], step: int) -> tuple[list[ShardResult], dict[Any, Any]]:
    """The ranks' microbatches, each a shard and a block of the jackknife, and the estimates of all together."""
    subject = prepare(Step(weights, case, step), None, None)
    sketch = None if case.sketch is None else bound(parse_sketch(case.sketch, 0), subject)
    ends = list(accumulate([0, *(size for size in SIZES for _ in range(case.microbatches))]))
    measures = BY_CLASS if case.labelled else MEASURES
    statistics = statistics_of(measures)
    shards = [
        run_shard(subject, range(start, stop), block, stop - start, statistics, sketch)
        for block, (start, stop) in enumerate(pairwise(ends))
    ]
    states = {each: reduce(each.merge, (shard.states[each] for shard in shards)) for each in statistics}
    estimates = {
        (measure.name, *key): estimate
        for measure in measures
        for key, estimate in measure.compute(states[statistic_of(measure)]).items()
    }
    return shards, estimates


def tolerance(case: Case) -> float:
    return 5e-2 if case.low else 1e-5


def test_a_step_is_what_one_process_measures(trained: tuple[Case, str, Ranks]) -> None:
    case, out, ranks = trained
    run = gs.open_run(out)
    assert run.steps == ranks[0]["steps"] == ranks[1]["steps"] == [0, 2]
    assert not list(Path(out).rglob("*.safetensors"))
    rows, frame = run.rows().to_table().to_pandas(), run.estimates()
    for step in run.steps:
        shards, estimates = expected(case, ranks[0]["weights"][step], step)
        mine = rows[rows.step == step]
        assert list(mine.example_id) == list(range(sum(SIZES) * case.microbatches))
        assert list(mine.shard) == [rank for rank in (0, 1) for _ in range(SIZES[rank] * case.microbatches)]
        layers = torch.cat([shard.columns.layer_sq_norms for shard in shards])
        found = torch.tensor(np.stack(mine.layer_sq_norms.to_list()))
        assert found.shape == layers.shape
        assert float((found - layers).norm() / layers.norm()) < tolerance(case)
        if not case.low:
            torch.testing.assert_close(found, layers, rtol=1e-4, atol=1e-5 * float(layers.max()))
        if case.labelled:
            words = Step(ranks[0]["weights"][step], case, step).examples().batch(range(len(mine)))["words"][:, :-1]
            with torch.no_grad():
                output = Step(ranks[0]["weights"][step], case, step).model(None)(words)
            losses = first_logits(output, Inputs((words,), {}))
            torch.testing.assert_close(torch.tensor(mine.loss.to_numpy()), losses.double(), rtol=1e-5, atol=1e-5)
            assert list(mine.label) == first_word(Inputs((words,), {})).tolist()
        else:
            assert mine.loss.isna().all()
        here = frame[frame.step == step].set_index(["measure", "name", "scope"])
        assert set(here.index) == set(estimates)
        for key in [key for key in estimates if key[2] == "all" or key[1] in ("alpha", "trace_covariance")]:
            value, stderr, n = here.loc[key, ["value", "stderr", "n"]]
            assert n == estimates[key].n
            if (
                not key[2].startswith("layer:") or not case.low
            ):  # of a layer whose gradients all but cancel, little is left
                slack = tolerance(case) * (10 if key[1] == "noise_scale" else 1)
                assert value == pytest.approx(estimates[key].value, rel=slack, abs=slack), key
            if not case.low:
                assert stderr == pytest.approx(estimates[key].stderr, rel=1e-3, abs=1e-5, nan_ok=True), key


def test_sketches_are_those_of_one_process(usual: tuple[Path, dict[str, Ranks]]) -> None:
    folder, found = usual
    name = "zero2-3"
    ids, matrix = gs.open_run(str(folder / name)).sketches(2)
    shards, _ = expected(CASES[name], found[name][0]["weights"][2], 2)
    oracle = torch.cat([shard.columns.sketch for shard in shards])
    assert list(ids) == list(range(15))
    torch.testing.assert_close(torch.tensor(matrix).double(), oracle, rtol=1e-4, atol=1e-5 * float(oracle.abs().max()))


def test_training_goes_on_bit_for_bit(trained: tuple[Case, str, Ranks]) -> None:
    for rank in trained[2]:
        assert rank["same"]
        assert rank["failures"] == 0


def test_hooks_are_there_on_measured_steps_only(trained: tuple[Case, str, Ranks]) -> None:
    for rank in trained[2]:
        assert {step: count > 0 for step, count in rank["hooks"].items()} == {0: True, 1: False, 2: True, 3: False}
        assert rank["left"] == 0
        assert rank["own"] == []


def test_parameters_under_zero3_are_partitioned(usual: tuple[Path, dict[str, Ranks]]) -> None:
    assert [usual[1][name][0]["partitioned"] for name in CASES] == [CASES[name].stage == 3 for name in CASES]


def test_a_failure_on_one_rank_costs_a_step_on_all(usual: tuple[Path, dict[str, Ranks]]) -> None:
    folder, found = usual
    for rank in found["failing"]:
        assert rank["same"]
        assert rank["steps"] == [0, 2, 3]
        assert rank["failures"] == 1
        assert "step 1: " in rank["problem"]
        assert "no such word" in rank["problem"]
    run = gs.open_run(str(folder / "failing"))
    rows = run.rows().to_table().to_pandas()
    assert run.steps == sorted(rows.step.unique()) == sorted(run.estimates().step.unique()) == [0, 2, 3]
    assert rows.loss.notna().all()
    assert [(folder / f"log-{rank}").read_text().count("not measured, training goes on") for rank in (0, 1)] == [8, 0]
    kept = {path.parent.name for path in (folder / "failing" / "states").rglob("merged.safetensors")}
    assert kept == {f"step-{step:08d}" for step in run.steps}


def test_strict_raises_on_all_ranks_after_the_step(usual: tuple[Path, dict[str, Ranks]]) -> None:
    first, second = usual[1]["failing-strict"]
    assert first["said"] == "GradscaleError: all ranks must succeed, got a failure on rank 1: ValueError: no such word"
    assert second["said"] == "ValueError: no such word"
    for rank in (first, second):
        assert rank["same"]
        assert rank["global_steps"] == 2


MISTAKES = {
    "doubled": "the mean of the per-example gradients must be the gradient that DeepSpeed has to 0.001, got",
    "all doubled": "their ratio is 0.5; use engine.backward",
    "direct": "the loss must go backward by engine.backward",
    "twice": "module words must be called once by the model's forward for every engine.backward, got a call after it",
    "outside": "module head must be called once by the model's forward for every engine.backward, got a call after it",
    "poisoned": "gradients of a measured step must be finite, got 2 of 2 examples that are not",
    "engine": "engine must be one of deepspeed.initialize, got Tiny without backward",
    "every": "every must be a whole number of at least 1, got 0",
    "two passes": "measures of a training step must take one pass, got one that weighs",
    "observed": "measures of a training step must need its gradients alone, got sharpness",
    "by class": "estimates by class must have labels, got none; pass labels",
    "columns": "columns must be some of loss, grad_sq_norm, layer_sq_norms, got ('loss', 'norm'); labels",
    "packed rule": "of packed batches must be of Linear, Conv1D, Embedding, LayerNorm or RMSNorm, got 1.weight",
    "folder": "out must be a new folder, an empty one or a gradscale run, got",
    "first": "",
    "settings": "the settings must be those of the run that",
    "zero3 rule": "parameters under ZeRO-3 must be of Linear, Conv1D, Embedding or LayerNorm, got curve.weight of",
    "batch norm": "BatchNorm flat must be in eval mode, got batch statistics",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_on_all_ranks(usual: tuple[Path, dict[str, Ranks]], mistake: str) -> None:
    said = [rank[mistake] for rank in usual[1]["refused"]]
    assert any(part in said[0] + said[1] for part in MISTAKES[mistake].split("|")), said
    assert [bool(each) for each in said] == [bool(MISTAKES[mistake])] * 2, said


@pytest.mark.parametrize("mistake", ["doubled", "all doubled", "direct", "twice", "outside", "poisoned"])
def test_training_survives(usual: tuple[Path, dict[str, Ranks]], mistake: str) -> None:
    counted = [rank[f"{mistake} counted"] for rank in usual[1]["refused"]]
    assert counted[0] == counted[1]
    failures, steps, made = counted[0]
    assert made == 2
    assert steps == []
    assert failures == (1 if "doubled" in mistake else 2)  # after a refusal nothing is tried again


@dataclass(frozen=True, eq=False)
class PackedStep:
    """A step of `packed` as a task: an example a row, padded; its loss times its positions' share in the gradient."""

    weights: Mapping[str, Tensor]
    step: int

    def model(self, checkpoint: str | None) -> nn.Module:
        model = made_tokens().eval()
        model.load_state_dict(self.weights, False)
        return model

    def examples(self) -> TensorExamples:
        rows = list[tuple[Tensor, Tensor, Tensor, Tensor]]()
        n = 2 * sum(int((numbers.amax(dim=1) + 1).sum()) for numbers in NUMBERS)
        for rank, numbers in enumerate(NUMBERS):
            for microbatch in range(2):
                words = batch_of(self.step, 1, microbatch)
                share = n / (4 * int((numbers >= 0).sum()))
                for row, of in zip(words, numbers, strict=True):
                    for number in range(int(of.max()) + 1):
                        at = (of == number).nonzero().flatten()
                        length = torch.tensor(len(at))
                        at = torch.cat([at, at.new_zeros(len(of) - len(at))])
                        rows.append(((row[at] + rank) % WORDS, row[at + 1], length, torch.tensor(share)))
        words, targets, lengths, shares = (torch.stack(each) for each in zip(*rows, strict=True))
        return TensorExamples(words=words, targets=targets, lengths=lengths, shares=shares)

    def labels(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["words"][:, 0] % 2

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        each = F.cross_entropy(model(batch["words"]).mT, batch["targets"], reduction="none")
        inside = torch.arange(each.shape[1]) < batch["lengths"][:, None]
        return (each * inside).sum(dim=1) * batch["shares"]


@pytest.mark.parametrize("name", ["packed", pytest.param("packed-zero3", marks=pytest.mark.slow)])
def test_packed_rows_are_measured_as_unpacked_examples(
    request: pytest.FixtureRequest, name: str, tmp_path: Path
) -> None:
    if name == "packed":
        folder, found = request.getfixturevalue("usual")
    else:
        folder, found = tmp_path, launched(tmp_path, [name])
    ranks = found[name]
    run = gs.open_run(str(folder / name))
    rows, frame = run.rows().to_table().to_pandas(), run.estimates()
    assert [rank["failures"] for rank in ranks] == [0, 0]
    assert run.steps == [0, 1]
    for step in run.steps:
        subject = prepare(PackedStep(ranks[0]["weights"][step], step), None, None)
        blocks = [range(5), range(5, 10), range(10, 13), range(13, 16)]
        statistics = statistics_of(BY_CLASS)
        shards = [run_shard(subject, ids, i, len(ids), statistics, None) for i, ids in enumerate(blocks)]
        mine = rows[rows.step == step]
        assert list(mine.shard) == [0] * 10 + [1] * 6
        assert list(mine.label) == torch.cat([shard.columns.label for shard in shards]).tolist()
        oracle = torch.cat([shard.columns.layer_sq_norms for shard in shards])
        torch.testing.assert_close(
            torch.tensor(np.stack(mine.layer_sq_norms.to_list())), oracle, rtol=1e-5, atol=1e-6 * float(oracle.max())
        )
        (statistic,) = statistics
        state = reduce(statistic.merge, (shard.states[statistic] for shard in shards))
        here = frame[frame.step == step].set_index(["name", "scope"])
        for key, estimate in BY_CLASS[0].compute(state).items():
            value, stderr, n = here.loc[key, ["value", "stderr", "n"]]
            assert n == estimate.n
            assert (value, stderr) == pytest.approx(
                (estimate.value, estimate.stderr), rel=1e-4, abs=1e-5, nan_ok=True
            ), key


def test_a_single_microbatch_has_standard_errors(tmp_path: Path) -> None:
    """Three examples are three blocks; and of the rows only the columns asked for are filled."""
    found = launched(tmp_path, ["single"], ranks=1)["single"][0]
    run = gs.open_run(str(tmp_path / "single"))
    assert run.steps == found["steps"] == [0, 1]
    rows, frame = run.rows().to_table().to_pandas(), run.estimates()
    assert rows.loss.isna().all()
    assert np.isnan(np.stack(rows.layer_sq_norms.to_list())).all()
    for step in run.steps:
        words = batch_of(step, 0, 0)
        task = Step(found["weights"][step], Case(1), step)
        model = task.model(None)
        each = F.cross_entropy(model(words[:, :-1]).mT, words[:, 1:], reduction="none").mean(dim=1)
        gradients = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in each]
        matrix = torch.stack([torch.cat([g.flatten() for g in of]) for of in gradients]).double()
        norms = torch.tensor(rows[rows.step == step].grad_sq_norm.to_numpy())
        torch.testing.assert_close(norms, matrix.square().sum(dim=1), rtol=1e-5, atol=0)

        def alpha(rows: Tensor) -> float:
            return float(rows.mean(dim=0).square().sum() / rows.square().sum(dim=1).mean())

        left_out = [alpha(matrix[[j for j in range(3) if j != i]]) for i in range(3)]
        jackknife = (2 / 3 * sum((value - np.mean(left_out)) ** 2 for value in left_out)) ** 0.5
        here = frame[frame.step == step].set_index(["name", "scope"]).loc["alpha", "all"]
        assert (here.value, here.stderr) == pytest.approx((alpha(matrix), jackknife), rel=1e-4)


def test_blocks_are_microbatches_in_the_order_of_ranks() -> None:
    few, many, one = Blocks(6, 3, 2), Blocks(20, 8, 4), Blocks(10, 1, 1)
    assert [few.first(rank, m) for rank in (0, 1) for m in range(3)] == list(range(6))
    numbers = [many.first(rank, m) for rank in range(4) for m in range(8)]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(20))
    assert (few.parts, many.parts, one.parts) == (1, 1, 10)


@pytest.mark.slow
def test_killed_training_resumes_without_a_step_twice(tmp_path: Path) -> None:
    """`whole` is what an undisturbed training leaves; the other one is killed in step 4, and goes on from step 2."""
    assert launched(tmp_path, ["whole", "killed"], kill=True)["whole"][0]["steps"] == list(range(6))
    whole, run = (gs.open_run(str(tmp_path / name)) for name in ("whole", "interrupted"))
    assert run.steps == sorted(run.estimates().step.unique()) == [0, 1, 2, 3]
    assert run.rows().count_rows() == 4 * 10
    assert launched(tmp_path, ["resumed"])["resumed"][0]["steps"] == [2, 3, 4, 5]
    assert run.steps == whole.steps == list(range(6))
    ours, theirs = (each.rows().to_table().drop_columns(["loss"]) for each in (run, whole))  # NaN
    assert ours.equals(theirs)
    assert run.estimates().equals(whole.estimates())
