"""Promise: `gradscale plan` says how many passes over the data a choice of measures costs, and so many there are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from test_before_a_run import run_command
from torch import Tensor, nn

from gradscale.measures import MEASURES, Coherence, GaussianWidth, TangentKernel
from gradscale.report.listing import about_functions, about_measure, about_measures, entry, functions
from gradscale.run.check_measure import _Problem
from gradscale.run.fold import statistics_of
from gradscale.run.passes import TOGETHER, passes_of
from gradscale.run.shard import prepare, run_shard


class Hooked(nn.Sequential):
    """Counts by its own hooks how often its first part, which every pass goes through, is gone through."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__(*layers)
        self.counts = [0, 0]
        self[1].register_forward_hook(self.count)

    def count(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.counts[0] += 1
        if output.requires_grad:
            output.register_hook(self.count_backward)

    def count_backward(self, grad: Tensor) -> None:
        self.counts[1] += 1


@dataclass(frozen=True)
class Counting(_Problem):
    made: list[Hooked] = field(default_factory=list)

    def model(self, checkpoint: str | None) -> nn.Module:
        self.made.append(Hooked(super().model(checkpoint)).eval())
        return self.made[-1]

    def features(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model[1](model[0](batch["x"]))


CHOSEN = [*(kind() for kind in MEASURES.values()), Coherence(min_norm=0.1), TangentKernel(2, alignment=True)]


@pytest.mark.parametrize("forward", [False, True], ids=["backward", "forward"])
def test_the_passes_are_those_that_the_model_sees(forward: bool) -> None:
    task = Counting()
    subject = prepare(task, None, None)
    model = task.made[0]
    together = CHOSEN[: len(MEASURES)]
    for measures in (*([measure] for measure in CHOSEN), together):
        found = passes_of(subject, measures, 8, forward=forward)
        model.counts[:] = [0, 0]
        run_shard(subject, range(16), 0, 8, statistics_of(measures), None, forward)  # two microbatches
        assert [2 * found[TOGETHER].forward, 2 * found[TOGETHER].backward] == model.counts
        if len(measures) == 1:
            assert found[measures[0].name] == found[TOGETHER]
    assert found[TOGETHER].backward < sum(found[measure.name].backward for measure in together)


def test_what_the_measures_cost() -> None:
    found = passes_of(prepare(_Problem(), None, None), CHOSEN[: len(MEASURES)], 4)
    assert found["coherence"] == found["dispersion"] == found["gaussian_width"] == (1, 1)
    assert found["stiffness"] == (2, 2)
    assert found["featurizer"] == (2, 1)
    assert found["geometric_complexity"] == (2, 9)
    only = passes_of(prepare(_Problem(), None, None), [GaussianWidth(7)], 4, forward=True)
    assert only[TOGETHER] == (8, 1)


def test_plan_prints_passes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    task = ("--task", "gradscale.run.check_measure:_Problem", "--measures", "coherence,stiffness,geometric_complexity")
    assert run_command(monkeypatch, "plan", *task) == 0
    printed = capsys.readouterr().out
    assert "passes: 3 forward and 10 backward over the data, together; each alone" in printed
    assert re.search(r"stiffness +2 forward +2 backward", printed)


def test_every_measure_is_listed_with_definition_cost_and_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for about in about_measures():
        assert all(about), about
        assert re.search(r"\d", about.source), about
    assert run_command(monkeypatch, "measures") == 0
    printed = capsys.readouterr().out
    assert all(f" {name} " in printed for name in MEASURES)
    assert all(f" gs.{name} " in printed for name in functions())
    assert about_measure("mine", "a number") == ("mine", "a number", "", "")


def test_every_function_of_runs_and_tasks_says_what_it_costs_and_where_it_is_from() -> None:
    assert {"sign_stiffness", "width", "batch_coherence", "stiffness_between"} <= set(functions())
    assert not {"measure", "open_run", "width_of_gram", "check_measure"} & set(functions())
    unsaid = [about.name for about in about_functions() if not all(about)]
    assert not unsaid, "their docstrings need lines `Cost: ...` and `Source: ...`"


def test_an_entry_ends_where_the_next_begins() -> None:
    text = "It is.\n\nNot much. Cost: two\npasses; P numbers. More.\nRaises: E if not.\nSource: A (2019), eq. 2.\n"
    assert entry(text, "Cost") == "two passes; P numbers"
    assert entry(text, "Source") == "A (2019), eq. 2"
    assert entry(text, "Returns") == ""


def test_one_measure_is_shown_with_its_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "measures", "coherence:min_norm=0.1", "--laws") == 0
    printed = capsys.readouterr().out
    assert re.search(r"min_norm +null +also of the examples alone whose gradient norm is above it", printed)
    assert "cost: one backward pass" in printed
    assert "Exact per parameter" in printed
    assert "coherence obeys the laws of settings, state," in printed


def test_problem_has_all_that_a_task_can_have() -> None:
    task = _Problem()
    model, batch = task.model(None), task.examples().batch(range(3))
    assert torch.equal(task.outputs(model, batch), model(task.inputs(model, batch)))
    assert task.features(model, batch).shape == (3, 4)
