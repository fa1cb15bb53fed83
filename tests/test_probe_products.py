"""Promise: a run's products with probes come from the backward pass or from forward mode, and mean the same.

Shapes: B examples, N probes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import Recurrent, SelfAttention, UsedTwice
from run_problems import FewDigits, Regression, save_digits
from torch import Tensor, nn
from torch.nn import functional as F

import gradscale as gs
from gradscale.cli import main
from gradscale.grads.subject import Subject
from gradscale.measures.gaussian_width import GaussianWidth, WidthState
from gradscale.measures.moments import MomentsStatistic
from gradscale.run.forecast import forecast
from gradscale.run.forward import finite_products
from gradscale.run.plan import Plan
from gradscale.run.probe_products import Choice, choose, mean_positions
from gradscale.run.shard import bound, prepare, run_shard
from gradscale.sketches import blocks, parse_sketch
from gradscale.task import Task, TensorExamples

WIDTH = GaussianWidth(num_probes=6)


@dataclass(frozen=True)
class Net:
    """A classifier of random inputs of this shape, 10 of them; the loss of row `nan` is NaN."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    nan: int = -1

    def model(self, checkpoint: str | None) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return self.make().to(self.dtype).eval()

    def examples(self) -> TensorExamples:
        x = torch.randn(10, *self.shape, generator=torch.Generator().manual_seed(1)).to(self.dtype)
        return TensorExamples(x=x, row=torch.arange(10))

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        x = torch.where((batch["row"] == self.nan).view(-1, *[1] * len(self.shape)), torch.nan, batch["x"])
        return F.cross_entropy(model(x), batch["row"] % 3, reduction="none")


@dataclass(frozen=True)
class TinyGPT2:
    """The embedding is the output head as well."""

    def model(self, checkpoint: str | None) -> nn.Module:
        transformers = pytest.importorskip("transformers")
        sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 19, "n_positions": 8}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()

    def examples(self) -> TensorExamples:
        return TensorExamples(ids=torch.randint(19, (10, 8), generator=torch.Generator().manual_seed(0)))

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        scores = model(input_ids=batch["ids"]).logits[:, :-1]
        return F.cross_entropy(scores.mT, batch["ids"][:, 1:], reduction="none").mean(dim=1)


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 3))


LSTM = Net(Recurrent, (5, 4))
TASKS: dict[str, Task] = {
    "one position": Net(wide, (8,)),
    "tied": Net(UsedTwice, (5, 4)),
    "attention": Net(SelfAttention, (5, 4)),
    "gpt2": TinyGPT2(),
    "regression": Regression(),
}


def subject_of(task: Task) -> Subject:
    return prepare(task, None, None)


def state_of_shard(subject: Subject, ids: range, forward: bool, microbatch: int = 2) -> WidthState:
    state: WidthState = run_shard(subject, ids, 0, microbatch, [WIDTH], None, forward).states[WIDTH]
    return state


def assert_same(left: WidthState, right: WidthState) -> None:
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gradscale", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every probe is beyond the budget."""
    monkeypatch.setattr(blocks, "_CACHE_BYTES", 0)


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_forward_and_backward_agree_beside_a_sketch(task: Task) -> None:
    subject = subject_of(task)
    sketch = bound(parse_sketch("gaussian:3", 0), subject)
    results = [run_shard(subject, range(10), 0, 4, [WIDTH], sketch, forward) for forward in (False, True)]
    backward, forward = (result.states[WIDTH] for result in results)
    for name in ("largest", "smallest", "mean"):
        torch.testing.assert_close(getattr(forward, name), getattr(backward, name), rtol=1e-4, atol=1e-5)
    first, second = (result.columns.sketch for result in results)
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)  # sketches come from the backward pass


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_the_bits_depend_on_neither_the_shards_nor_their_order(shards: int) -> None:
    subject = subject_of(TASKS["tied"])
    whole = state_of_shard(subject, range(10), forward=True)
    size = -(-10 // shards // 2) * 2
    merged = WIDTH.init()
    for start in reversed(range(0, 10, size)):
        merged = WIDTH.merge(merged, state_of_shard(subject, range(start, min(start + size, 10)), forward=True))
    assert_same(merged, whole)


@pytest.mark.usefixtures("nothing_kept")
def test_the_bits_do_not_depend_on_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of(TASKS["one position"])
    without = state_of_shard(subject, range(10), forward=True)
    monkeypatch.setattr(blocks, "_CACHE_BYTES", 1 << 20)
    for _ in range(2):
        assert_same(state_of_shard(subject, range(10), forward=True), without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_example_that_is_not_finite_is_left_out(dtype: torch.dtype) -> None:
    subject = subject_of(Net(wide, (8,), dtype, nan=3))
    backward, forward = (state_of_shard(subject, range(10), way) for way in (False, True))
    assert int(forward.examples) == 9
    for state in (forward.largest, forward.smallest, forward.mean):
        assert state.isfinite().all()
    torch.testing.assert_close(forward.largest, backward.largest, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(forward.mean, backward.mean, rtol=1e-4, atol=1e-5)


def test_products_that_overflow_in_forward_mode_alone_are_an_error() -> None:
    products = torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [torch.inf, 1.0]], dtype=torch.float64)
    found = finite_products(products[:2], torch.tensor([True, False]), range(7, 9))
    assert found.tolist() == [[1.0, 2.0], [0.0, 0.0]]
    message = r"products of a finite gradient must be finite, got \[inf, 1.0\] in forward mode for example 9; take"
    with pytest.raises(gs.GradscaleError, match=message):
        finite_products(products, torch.tensor([True, False, True]), range(7, 10))


# --- the choice -------------------------------------------------------------------------------------------------------


def chosen(asked: str, task: Task, measures: tuple[Any, ...] = (WIDTH,)) -> Choice:
    return choose(asked, subject_of(task), measures, 2, 10)


def test_what_is_kept_is_left_to_the_backward_pass() -> None:
    assert chosen("auto", TASKS["one position"]) == ("backward", "cheaper by these shapes")
    assert chosen("forward", TASKS["one position"]) == ("forward", "as asked for")
    assert chosen("backward", TASKS["one position"]) == ("backward", "as asked for")


@pytest.mark.usefixtures("nothing_kept")
def test_beyond_the_budget_forward_mode_is_chosen() -> None:
    assert chosen("auto", TASKS["one position"]) == ("forward", "cheaper by these shapes")
    assert chosen("auto", TASKS["one position"], ()) == ("backward", "no measure has probes")
    narrow = chosen("auto", Net(wide, (8,), torch.bfloat16))
    assert narrow == ("backward", "forward mode would round the probes to torch.bfloat16")


@pytest.mark.usefixtures("nothing_kept")
def test_a_model_without_a_forward_derivative() -> None:
    """An LSTM in float32 on a CPU."""
    choice = chosen("auto", LSTM)
    assert choice.way == "backward"
    assert choice.why.startswith("forward mode would be cheaper, but every operation must have a forward derivative")
    message = r"must have a forward derivative, got one without: .*mkldnn_rnn_layer.*--probe-products backward"
    with pytest.raises(gs.GradscaleError, match=message):
        chosen("forward", LSTM)


def test_positions_are_counted() -> None:
    assert mean_positions(subject_of(Net(partial(nn.Linear, 8, 3, bias=False), (8,))), range(4)) == 1
    tokens = mean_positions(subject_of(TinyGPT2()), range(4))
    assert 6 < tokens < 11  # of 8: attention adds to them, position embeddings take away


def test_no_such_way_and_no_probes(tmp_path: Path) -> None:
    with pytest.raises(gs.GradscaleError, match="probe_products must be one of auto, backward, forward, got 'fwd'"):
        gs.measure(Regression(), str(tmp_path / "run"), probe_products="fwd")
    message = "probe_products must come with a measure that has probes, got forward without one; add gaussian_width"
    with pytest.raises(gs.GradscaleError, match=message):
        chosen("forward", Regression(), (MomentsStatistic(),))


def test_a_forecast_knows_that_a_shard_shares_its_probes() -> None:
    subject = subject_of(Regression())
    found = forecast(subject, [WIDTH], None, 4, 1, probe_products="forward", shard_size=12)
    assert found.probe_products == ("forward", "as asked for")
    assert found.seconds > 0


def test_plan_says_which_way(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    task = ("plan", "--task", "run_problems:Regression", "--microbatch", "4")
    assert run_command(monkeypatch, *task) == 0
    assert "probes  by the backward pass: cheaper by these shapes" in capsys.readouterr().out
    assert run_command(monkeypatch, *task, "--probe-products", "forward") == 0
    assert "probes  by the forward pass: as asked for" in capsys.readouterr().out
    assert run_command(monkeypatch, *task, "--probe-products", "sideways") == 2
    assert "probe_products must be one of auto, backward, forward, got 'sideways'" in capsys.readouterr().err


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("digits")
    save_digits(folder, rows=40)
    return str(folder)


def measured(out: Path, task: Task, way: str, **settings: Any) -> gs.Run:
    sizes = {"measures": [WIDTH], "workers": 1, "shard_size": 8, "microbatch": 4} | settings
    return gs.measure(task, str(out), probe_products=way, **sizes)


def test_a_run_by_forward_mode(local_ray: None, tmp_path: Path, digits: str) -> None:
    task = FewDigits(digits)
    backward = measured(tmp_path / "backward", task, "auto")
    one, two = (measured(tmp_path / f"forward{w}", task, "forward", workers=w) for w in (1, 2))
    assert [run.plan["probe_products"] for run in (backward, one, two)] == ["backward", "forward", "forward"]
    files = [Path(run.path) / "estimates.parquet" for run in (one, two)]
    assert files[0].read_bytes() == files[1].read_bytes()
    columns = ["value", "stderr"]
    expected, found = (run.estimates()[columns].to_numpy(float) for run in (backward, one))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5, equal_nan=True)
    message = r"(?s)the settings must be those of the run .*probe_products: 'forward' in the run, 'backward' now"
    with pytest.raises(gs.GradscaleError, match=message):
        measured(tmp_path / "forward1", task, "backward")
    assert len(measured(tmp_path / "forward1", task, "forward").estimates()) == len(one.estimates())


def test_a_run_that_forward_mode_cannot_do_is_refused_before_it_starts(local_ray: None, tmp_path: Path) -> None:
    with pytest.raises(gs.GradscaleError, match="must have a forward derivative, got one without"):
        measured(tmp_path / "run", LSTM, "forward")
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_plan_of_before_there_was_a_choice_is_of_the_backward_pass(local_ray: None, tmp_path: Path) -> None:
    path = Path(measured(tmp_path / "run", Regression(), "auto").path) / "run.json"
    plan = json.loads(path.read_text())
    del plan["probe_products"]
    assert Plan.from_json(json.dumps(plan)).probe_products == "backward"
