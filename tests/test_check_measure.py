"""Promise: `gs.check_measure` passes every measure of gradscale's, and names the law that a broken one breaks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from run_problems import Regression
from torch import Tensor

import gradscale as gs
from gradscale.measures import MEASURES, Coherence, Stiffness, TangentKernel
from gradscale.measures.measure import Estimates, MicroBatch
from gradscale.measures.settings import parse_measures, settings_taken
from gradscale.run.laws import difference, joined

LAWS = (
    *(
        "settings",
        "state",
        "arguments left untouched",
        "unit",
        "commutativity",
        "associativity",
        "exchange of update and merge",
    ),
    *("splitting of microbatches", "storage", "estimates"),
)
SETTINGS = [Coherence(by_class=True, min_norm=1e-3), Stiffness(by_class=True), TangentKernel(2, alignment=True)]


@pytest.mark.parametrize("measure", [*(kind() for kind in MEASURES.values()), *SETTINGS], ids=repr)
def test_every_measure_obeys(measure: Any) -> None:
    assert gs.check_measure(measure) == LAWS


class State(NamedTuple):
    total: Tensor
    examples: Tensor


def nothing(self: Any) -> State:
    return State(torch.tensor(0.0, dtype=torch.float64), torch.tensor(0))


def added(self: Any, left: State, right: State) -> State:
    return State(left.total + right.total, left.examples + right.examples)


def taken(self: Any, state: State, batch: MicroBatch) -> State:
    return added(self, state, State(batch.losses.sum(), torch.tensor(len(batch.ids))))


def mean(self: Any, state: State) -> Estimates:
    n = int(state.examples)
    value = float(state.total) / n if n else float("nan")
    return {("mean", "all"): gs.Estimate(value, float("nan"), n, "estimator", "mean_loss/v1", "1")}


@dataclass(frozen=True)
class MeanLoss:
    """The mean loss: what is broken below."""

    name = "mean_loss"
    summary = "mean loss; no pass of its own; nobody"
    needs = frozenset()
    init, update, merge, compute = nothing, taken, added, mean


def updated_with_mean(self: Any, state: State, batch: MicroBatch) -> State:
    part = batch.losses.mean() if len(batch.ids) else torch.tensor(0.0, dtype=torch.float64)
    return added(self, state, State(part, torch.tensor(len(batch.ids))))


def overwritten(self: Any, state: State, batch: MicroBatch) -> State:
    return State(batch.losses.sum(), torch.tensor(len(batch.ids)))


def in_place(self: Any, state: State, batch: MicroBatch) -> State:
    state.total.add_(batch.losses.sum())
    return State(state.total, state.examples + len(batch.ids))


def averaged(self: Any, left: State, right: State) -> State:
    return State((left.total + right.total) / 2, left.examples + right.examples)


def differing(self: Any, left: State, right: State) -> State:
    return State(left.total - right.total, left.examples + right.examples)


def estimated(**changed: Any) -> Callable[[Any, State], Estimates]:
    key = changed.pop("key", ("mean", "all"))
    return lambda self, state: {key: mean(self, state)["mean", "all"]._replace(**changed)}


def broken(**methods: Any) -> Any:
    return type("Broken", (MeanLoss,), methods)()


BROKEN = {
    "mean of a microbatch": ({"update": updated_with_mean}, "for two microbatches at once as for one after the other"),
    "overwriting": (
        {"update": overwritten},
        r"update\(a, batch\) as by merge\(a, update\(init\(\), batch\)\), got total",
    ),
    "in place": ({"update": in_place}, "leave its arguments untouched, got the state a changed in place"),
    "no unit": ({"merge": averaged}, r"leave a state as it is when it is merged with init\(\), got total"),
    "not commutative": ({"merge": differing}, r"leave a state as it is when it is merged with init\(\)"),
    "a list": (
        {"init": lambda self: [0.0], "update": lambda self, s, b: s},
        "must be a NamedTuple of tensors, got list",
    ),
    "a number": ({"init": lambda self: State(0.0, 0)}, "must have a tensor, or a mapping .* in field total"),
    "status": ({"compute": estimated(status="sure")}, "have one of the statuses .* got 'sure'"),
    "error": ({"compute": estimated(stderr=-1.0)}, "have a stderr of at least 0, .* got -1.0"),
    "tensor": ({"compute": estimated(value=torch.tensor(1.0))}, "have a number for a value, got tensor"),
    "scope": ({"compute": estimated(key=("mean", "some"))}, "have the scope all, .* got 'some'"),
    "key": ({"compute": estimated(key="mean")}, r"have a key \(name, scope\), got 'mean'"),
    "count": ({"compute": estimated(n=-1)}, "count examples in n, got -1"),
    "no estimate": ({"compute": lambda self, s: {("mean", "all"): 1.0}}, "be an Estimate, got float"),
}


def test_the_measure_that_is_broken_below_is_sound() -> None:
    assert gs.check_measure(MeanLoss()) == LAWS
    assert gs.check_measure(MeanLoss(), Regression()) == LAWS


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_law_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    methods, message = BROKEN[name]
    measure = broken(**methods)
    monkeypatch.setattr(sys.modules[__name__], "Broken", type(measure), raising=False)
    type(measure).__module__ = __name__
    with pytest.raises(gs.GradscaleError, match=message):
        gs.check_measure(measure)


class Unfrozen(MeanLoss):
    """Equal to nothing but itself, by its identity."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__
    __repr__ = object.__repr__


def test_settings_that_do_not_pickle_are_found() -> None:
    with pytest.raises(
        gs.GradscaleError, match=r"must be equal to its pickled copy, and have its repr, got .*frozen=True"
    ):
        gs.check_measure(Unfrozen())
    with pytest.raises(gs.GradscaleError, match=r"must be hashable and picklable, got .*Error"):
        gs.check_measure(broken())  # a class that no module has


def test_a_task_that_is_too_small_is_refused() -> None:
    with pytest.raises(gs.GradscaleError, match=r"task must have at least 22 examples .* got 21"):
        gs.check_measure(MeanLoss(), Regression(rows=21))


def test_states_are_told_apart() -> None:
    one = State(torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor(3))
    assert difference(one, one) == ""
    assert difference(one, one._replace(total=one.total + 1e-12)) == ""
    assert difference(one, one._replace(total=one.total + 1e-12), bits=True).startswith("total = [1, 2] and [1, 2]")
    assert difference(one, one._replace(total=one.total + 1e-12), exact=["total"])
    assert difference(one, one._replace(examples=torch.tensor(4))) == "examples = 3 and 4"
    assert "float64 (2,) and as torch.float32 (2,)" in difference(one, one._replace(total=one.total.float()))
    nan = one._replace(total=one.total * float("nan"))
    assert difference(nan, nan, bits=True) == ""
    assert difference(one, nan)


def test_microbatches_of_different_blocks_are_not_joined() -> None:
    empty = MicroBatch(torch.arange(0), torch.zeros(0), None, ("w",), torch.zeros(0, 1), {}, {}, 0)
    assert joined(empty, empty).block == 0
    with pytest.raises(gs.GradscaleError, match=r"must be of one block to be joined, got 0 and 1"):
        joined(empty, empty._replace(block=1))


SOURCE = """
from dataclasses import dataclass
@dataclass(frozen=True)
class Mine:
    k: int = 3
    name = "mine"
    summary = "mine"
    def compute(self, state):
        return {}
NOTHING = 3
"""


def test_a_measure_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "measures_of_mine.py").write_text(SOURCE)
    path = tmp_path / "measures_of_mine.py"
    (found,) = parse_measures(f"{path}:Mine:k=5")
    assert repr(found) == "Mine(k=5)"
    assert parse_measures("measures_of_mine:Mine:k=5") == (found,)
    monkeypatch.chdir(tmp_path)
    assert parse_measures("measures_of_mine.py:Mine:k=5") == (found,)
    with pytest.raises(gs.GradscaleError, match=r"must exist, got no attribute 'Yours' in measures_of_mine"):
        parse_measures(f"{path}:Yours")
    with pytest.raises(gs.GradscaleError, match=r"must be a class or make a measure when called, got 3"):
        parse_measures(f"{path}:NOTHING")
    with pytest.raises(gs.GradscaleError, match=r"could not be made from .*unexpected keyword argument 'l'"):
        parse_measures(f"{path}:Mine:l=5")


def test_a_file_that_cannot_be_imported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(gs.GradscaleError, match=r"measure file must exist, got .*nothing.py"):
        parse_measures(f"{tmp_path}/nothing.py:Mine")
    (tmp_path / "json.py").write_text(SOURCE)
    with pytest.raises(gs.GradscaleError, match=r"must have a name that no other module has, got .*json.py beside"):
        parse_measures(f"{tmp_path}/json.py:Mine")
    (tmp_path / "of_what_is_not_there.py").write_text("import not_there_at_all")
    with pytest.raises(
        gs.GradscaleError, match=r"must import what is installed, got No module named 'not_there_at_all'"
    ):
        parse_measures(f"{tmp_path}/of_what_is_not_there.py:Mine")


def test_every_setting_has_a_meaning() -> None:
    """A new setting needs a line in `_MEANINGS`, or a `field(metadata={"meaning": ...})`."""
    unexplained = [f"{m}:{s.name}" for m, kind in MEASURES.items() for s in settings_taken(kind) if not s.meaning]
    assert not unexplained
