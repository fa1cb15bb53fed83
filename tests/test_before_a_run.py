"""Promise: before a run, gradscale says which rule serves each parameter, what it will cost, and what is wrong."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from problems import ModelAtHand
from run_problems import Regression
from torch import Tensor, nn

import gradscale as gs
from gradscale.cli import main
from gradscale.run.check import check_subject, compare_alone
from gradscale.run.plan import Plan
from gradscale.run.shard import prepare
from gradscale.task import TensorExamples


@dataclass(frozen=True)
class Padded:
    """Token sequences padded to the longest of the batch; `attend_to_padding` is the mistake to be found."""

    attend_to_padding: bool = False

    def model(self, checkpoint: str | None) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            return nn.ModuleDict({"embed": nn.Embedding(11, 8), "block": layer, "head": nn.Linear(8, 11)}).eval()

    def examples(self) -> TensorExamples:
        tokens = torch.randint(1, 11, (6, 7), generator=torch.Generator().manual_seed(0))
        for row, length in enumerate((7, 3, 5, 7, 2, 4)):
            tokens[row, length:] = 0
        return TensorExamples(tokens=tokens)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        longest = int((batch["tokens"] != 0).sum(dim=1).max())
        tokens = batch["tokens"][:, :longest]
        padding = tokens == 0
        assert isinstance(model, nn.ModuleDict)
        mask = None if self.attend_to_padding else padding
        hidden = model["block"](model["embed"](tokens), src_key_padding_mask=mask)
        losses = nn.functional.cross_entropy(model["head"](hidden).mT, tokens, reduction="none")
        return (losses * ~padding).sum(dim=1)


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gradscale", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_plan_prints_coverage_and_cost(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--task", "digits", "--steps", "9", "--workers", "4", "--sketch", "gaussian:16")
    assert run_command(monkeypatch, "plan", *settings) == 0
    printed = capsys.readouterr().out
    assert "102,666 entries in 56 parameters" in printed
    assert "linear" in printed
    assert "layer_norm" in printed
    assert "1,438 examples at 9 checkpoints" in printed
    assert "with 4 workers" in printed
    assert "sketches 828 kB" in printed  # 4 bytes x 16 x 1438 x 9


def test_padding_that_is_masked_changes_nothing() -> None:
    subject = prepare(Padded(), None, None)
    check_subject(subject)
    compared = compare_alone(subject, range(6))
    assert [one.example_id for one in compared] == list(range(6))
    assert all(one.agrees for one in compared), compared


def test_padding_that_is_attended_to_is_found() -> None:
    compared = compare_alone(prepare(Padded(attend_to_padding=True), None, None), range(6))
    assert [one.example_id for one in compared if not one.agrees] == [1, 2, 4, 5]  # the shorter ones
    assert all(one.difference > 100 * one.allowed for one in compared if not one.agrees)


class Watchful(nn.Module):
    """Gives something else while its parameters do not require grad."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + (0.0 if self.inner.weight.requires_grad else 0.5)


def test_a_model_that_notices_that_it_is_measured_is_found() -> None:
    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["x"])[:, 0]

    task = ModelAtHand(Watchful(), {"x": torch.randn(4, 3), "label": torch.zeros(4).long()}, losses)
    message = r"the losses must be those of the model as it is, got .* with gradscale's hooks on it and"
    with pytest.raises(gs.GradscaleError, match=message):
        check_subject(prepare(task, None, None))


def test_check_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(monkeypatch, "check", "--task", "digits", "--examples", "3") == 0
    assert capsys.readouterr().out.count("agrees") == 3
    task = ("--task", "test_before_a_run:Padded", "--task-option", "attend_to_padding=1")
    assert run_command(monkeypatch, "check", *task) == 2
    assert "must have the same gradient alone as within a batch" in capsys.readouterr().err


def test_excluded_parameters_are_left_out_and_recorded(tmp_path: Path, local_ray: None) -> None:
    run = gs.measure(Padded(), out=str(tmp_path / "run"), measures=[], exclude=["embed.weight", "head.bias"], workers=1)
    plan = json.loads((tmp_path / "run" / "run.json").read_text())
    assert plan["excluded"] == ["embed.weight", "head.bias"]
    assert not {"embed.weight", "head.bias"} & set(plan["parameters"])
    assert len(run.rows().to_table()) == 6


def test_an_unknown_excluded_parameter_is_refused() -> None:
    with pytest.raises(gs.GradscaleError, match=r"exclude must name trainable parameters, got nothing\.here"):
        prepare(Padded(), None, None, exclude=["nothing.here"])


@pytest.mark.parametrize(("shard_size", "told"), [(24, True), (4, False)])
def test_a_run_of_a_single_shard_is_told_that_it_will_have_no_jackknife(
    shard_size: int, told: bool, local_ray: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measures = [gs.Coherence(), gs.GaussianWidth(4)]
    with caplog.at_level(logging.WARNING, logger="gradscale"):
        run = gs.measure(Regression(), str(tmp_path / "run"), measures, workers=1, microbatch=4, shard_size=shard_size)
    advice = (
        "so that coherence will have no standard errors, which come from leaving shards out; --shard-size 4 gives 6"
    )
    assert (advice in caplog.text) == told
    errors = run.estimates().set_index(["name", "scope"])["stderr"]
    assert math.isnan(errors["alpha", "all"]) == told
    assert errors["width", "all"] > 0


def test_the_plan_of_another_version_says_what_to_do() -> None:
    for text in ('{"task": "digits", "examples": 4}', '{"no": "plan"}', "[]", "not json"):
        with pytest.raises(gs.GradscaleError, match=r"of this version of gradscale, got .*; take another --out"):
            Plan.from_json(text)
