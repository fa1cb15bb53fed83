"""Promise: a run that stores sketches says how far they are off, measured against exact inner products."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from problems import ModelAtHand
from run_problems import FewDigits, Given, Regression, save_digits
from test_before_a_run import run_command

import gradscale as gs
from gradscale.grads.subject import load_batch
from gradscale.run.check import autograd
from gradscale.run.shard import prepare, run_shard
from gradscale.run.sketch_error import ErrorState, SketchError, exact_gram, sketch_error
from gradscale.sketches import parse_sketch
from gradscale.store.narrow import narrowed

ROWS = 40
NAMES = ["cosine_rms_error", "cosine_expected_error", "norm_bias", "zero_gradients", "entries_underflown"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> FewDigits:
    folder = tmp_path_factory.mktemp("digits")
    save_digits(folder, ROWS)
    return FewDigits(str(folder))


def sampled(task: object, sketch: str, microbatch: int = 32, dtype: str = "float32") -> tuple[SketchError, ErrorState]:
    """As a worker does, for the whole dataset as one shard."""
    subject = prepare(task, None, None)
    ids, dense = range(len(subject.examples)), parse_sketch(sketch, 0)
    columns = run_shard(subject, ids, 0, microbatch, [], dense).columns
    stored = narrowed(columns.sketch, columns.example_id, columns.finite, dtype)
    diagnostic = sketch_error(dense.scheme)
    return diagnostic, diagnostic.sample(subject, ids, microbatch, columns.finite, stored)


def values(diagnostic: SketchError, state: ErrorState) -> dict[str, float]:
    return {name: estimate.value for (name, _), estimate in diagnostic.compute(state).items()}


def test_the_exact_products_are_those_of_autograd(digits):
    subject = prepare(digits, None, None)
    kept = torch.tensor([0, 3, 4, 9])
    found = exact_gram(subject, range(12), torch.ones(12, dtype=torch.bool), kept)
    plain = [autograd(subject, load_batch(subject, range(i, i + 1))).sums for i in kept.tolist()]
    vectors = torch.stack([torch.cat(list(sums.values())) for sums in plain])
    torch.testing.assert_close(found, vectors @ vectors.mT, rtol=1e-5, atol=1e-6)


def test_tiles_of_any_size_give_the_same_products(digits, monkeypatch):
    subject = prepare(digits, None, None)
    arguments = (subject, range(8), torch.ones(8, dtype=torch.bool), torch.arange(8))
    whole = exact_gram(*arguments)
    monkeypatch.setattr("gradscale.run.sketch_error._TILE_ENTRIES", 100)
    torch.testing.assert_close(exact_gram(*arguments), whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dim", [16, 1024])
def test_the_error_is_as_large_as_expected(digits, dim):
    diagnostic, state = sampled(digits, f"gaussian:{dim}")
    found = diagnostic.compute(state)
    rms, expected = (found[name, "all"] for name in NAMES[:2])
    assert rms.n == expected.n == 16 * 15 // 2
    assert 1 / math.sqrt(dim) <= expected.value <= math.sqrt(2 / dim)
    assert 0.5 < rms.value / expected.value < 1.6  # one map: its pairs depend on one another
    assert 0 < rms.stderr < rms.value / 2
    assert abs(found["norm_bias", "all"].value) < 4 * math.sqrt(2 / dim)
    assert found["zero_gradients", "all"].value == 0


def test_the_numbers_by_hand():
    """Sketches that double one gradient of three, with K = 2."""
    exact = torch.tensor([[4.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    sketches = torch.tensor([[4.0, 0.0], [1.0, math.sqrt(3)], [0.0, 0.0]], dtype=torch.float64)
    diagnostic = SketchError("gaussian", 2)
    state = diagnostic._compared(exact, sketches, torch.tensor([0, 2, 0]))
    found = diagnostic.compute(state)
    assert found["cosine_rms_error", "all"].value == pytest.approx(0.5)  # 4 / 4 against 2 / 4
    assert math.isnan(found["cosine_rms_error", "all"].stderr)
    assert found["cosine_expected_error", "all"].value == pytest.approx(math.sqrt((1 + 0.25) / 2))
    assert found["norm_bias", "all"].value == pytest.approx(1.5)  # of 16 / 4 and 4 / 4
    assert found["zero_gradients", "all"].value == 1
    assert found["entries_underflown", "all"].value == pytest.approx((0 + 2 / 4 + 0) / 3)
    assert [found[name, "all"].n for name in NAMES] == [1, 1, 2, 3, 3]
    assert values(SketchError("identity", 2), diagnostic._compared(exact, sketches, torch.zeros(3)))


def test_the_standard_error_is_that_of_the_jackknife():
    cosines = torch.rand(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = (cosines + cosines.mT).square().fill_diagonal_(0)
    ones = torch.ones(6, dtype=torch.float64)
    state = ErrorState(5 * ones, errors.sum(1), ones, ones, ones)
    without = []
    for left_out in range(6):
        kept = [i for i in range(6) if i != left_out]
        without.append(math.sqrt(errors[kept][:, kept].sum() / (5 * 4)))
    expected = math.sqrt(5 * np.var(without))
    found = SketchError("gaussian", 8).compute(state)["cosine_rms_error", "all"]
    assert found.stderr == pytest.approx(expected)
    assert found.value == pytest.approx(math.sqrt(errors.sum() / (6 * 5)))


@pytest.mark.parametrize(("microbatch", "pairs"), [(32, 120), (16, 120), (5, 3 * 10), (4, 4 * 6), (1, 0)])
def test_pairs_lie_within_a_microbatch(microbatch, pairs):
    diagnostic, state = sampled(Regression(), "gaussian:8", microbatch)
    found = diagnostic.compute(state)
    assert found["cosine_rms_error", "all"].n == pairs
    assert math.isnan(found["cosine_rms_error", "all"].value) == (pairs == 0)
    assert found["norm_bias", "all"].n == 16


def test_examples_that_are_not_finite_are_left_out():
    healthy, without = sampled(Regression(nan=3), "gaussian:8"), sampled(Regression(without=3), "gaussian:8")
    assert values(*healthy) == pytest.approx(values(*without), rel=1e-5)
    assert int(healthy[1].partners.sum()) == 16 * 15


def test_zero_gradients_are_counted_and_not_compared():
    gradients = ((1.0, 2.0, 0.0), (0.0, 0.0, 0.0), (0.0, 1.0, 1.0), (2.0, 1.0, 0.0))
    diagnostic, state = sampled(Given(gradients), "gaussian:8")
    found = diagnostic.compute(state)
    assert found["zero_gradients", "all"].value == 1
    assert [found[name, "all"].n for name in NAMES[:3]] == [3, 3, 3]
    assert 0 < found["cosine_rms_error", "all"].value < 3 * math.sqrt(2 / 8)
    every = diagnostic.compute(sampled(Given(((0.0, 0.0),) * 3), "gaussian:8")[1])
    assert math.isnan(every["cosine_rms_error", "all"].value)
    assert (every["cosine_rms_error", "all"].n, every["zero_gradients", "all"].value) == (0, 3)


def test_rounding_to_the_stored_type_counts():
    single, half = (values(*sampled(Regression(), "gaussian:8", dtype=dtype)) for dtype in ("float32", "float16"))
    assert single["cosine_rms_error"] != half["cosine_rms_error"]
    assert single["cosine_rms_error"] == pytest.approx(half["cosine_rms_error"], rel=1e-2)


@pytest.mark.parametrize("bias", [False, True])
def test_a_parameter_used_twice(bias):
    """The cross-terms of its uses are in the exact products: with K large, the sketches agree with them."""
    torch.manual_seed(0)
    shared = torch.nn.Linear(6, 6, bias=bias)
    model = torch.nn.Sequential(shared, torch.nn.Tanh(), shared)
    batch = {"x": torch.randn(8, 6), "label": torch.zeros(8).long()}
    task = ModelAtHand(model, batch, lambda model, batch: model(batch["x"]).square().sum(dim=1))
    found = values(*sampled(task, "gaussian:4096"))
    assert found["cosine_rms_error"] < 2 * found["cosine_expected_error"] < 0.05
    assert abs(found["norm_bias"]) < 0.1


@pytest.mark.usefixtures("local_ray")
def test_every_run_with_sketches_has_it(digits, tmp_path):
    checkpoints = [f"{digits.folder}/step{step}.safetensors" for step in (10, 20)]
    settings = {"checkpoints": checkpoints, "measures": [gs.Coherence()], "shard_size": 20}
    run = gs.measure(digits, str(tmp_path / "run"), workers=2, sketch="gaussian:64", **settings)
    found = run.estimates()
    found = found[found["measure"] == "sketch_error"]
    assert found["step"].tolist() == [10] * 5 + [20] * 5
    assert found["name"].tolist() == NAMES * 2
    assert set(found["scope"]) == {"all"}
    assert found["status"].tolist() == ["estimator"] * 3 + ["identity"] * 2 + ["estimator"] * 3 + ["identity"] * 2
    assert found["stderr"].isna().tolist() == [False, True, False, True, True] * 2
    by_name = found[found["step"] == 10].set_index("name")["value"]
    assert 0.5 < by_name["cosine_rms_error"] / by_name["cosine_expected_error"] < 2
    assert "sketch_error" not in run.plan["measures"]
    other = gs.measure(digits, str(tmp_path / "other"), workers=1, **settings)
    assert set(other.estimates()["measure"]) == {"coherence"}


def test_plan_tells_the_expected_error_and_the_bytes(monkeypatch, capsys):
    settings = ("--task", "digits", "--steps", "9", "--sketch", "gaussian:400", "--measures", "coherence")
    assert run_command(monkeypatch, "plan", *settings, "--sketch-dtype", "float16") == 0
    printed = capsys.readouterr().out
    assert "sketches 10.4 MB, 1.15 MB for each checkpoint" in printed  # 2 bytes x 400 x 1438
    assert "standard error of a cosine, with exact norms: 0.05 near 0, 0.0707 near 1 or -1" in printed
    assert run_command(monkeypatch, "plan", *settings, "--sketch-dtype", "int8") == 2
    assert "sketch_dtype must be one of float32, float16, got 'int8'" in capsys.readouterr().err
