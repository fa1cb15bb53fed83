"""Promise: a run whose states, rows and products contradict one another raises, and no other run does.

Shapes: J blocks, n examples, P entries, N probes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_problems import Regression
from torch import Tensor

import gradscale as gs
from gradscale.errors import GradscaleError
from gradscale.grads.readings import GradientSums, Projected
from gradscale.measures.identities import Recorded, check_moments, check_products, check_sums
from gradscale.measures.measure import MicroBatch
from gradscale.measures.moments import MomentsState, MomentsStatistic
from gradscale.run.fold import estimate_step
from gradscale.run.plan import Plan
from gradscale.run.shard import prepare, run_shard
from gradscale.sketches.gaussian import GaussianProbes
from gradscale.store.files import Files
from gradscale.store.store import Store

STATISTIC, n = MomentsStatistic(), 24
DECOMPOSITION = r"the identity sum_l f_l alpha_l = alpha must hold at step 7 .*expected .*, got .*; the states"


def measured() -> tuple[MomentsState, Recorded]:
    """The moments of a small problem in three blocks, and what its rows say."""
    subject = prepare(Regression(), None, None)
    state, q = STATISTIC.init(), 0.0
    for block in range(3):
        columns, states = run_shard(subject, range(8 * block, 8 * block + 8), block, 4, [STATISTIC], None)
        state, q = STATISTIC.merge(state, states[STATISTIC]), q + float(columns.grad_sq_norm.sum())
    return state, Recorded(n, q)


def test_a_sound_run_holds_to_the_identities() -> None:
    check_moments(*measured(), step=7)


def scaled(found: Mapping[str, Tensor], by: float, ending: str = "") -> dict[str, Tensor]:
    return {key: t * by if key.startswith("0001") and key.endswith(ending) else t for key, t in found.items()}


CORRUPTIONS: dict[str, tuple[Callable[[MomentsState], MomentsState], str]] = {
    "squares too large": (lambda s: s._replace(sq_norms=scaled(s.sq_norms, 1.001)), DECOMPOSITION),
    "squares too small": (
        lambda s: s._replace(sq_norms=scaled(s.sq_norms, 0.01)),
        r"the identity \|sum g\|\^2 / \(n sum \|g\|\^2\) <= 1 of a block of shards must hold at step 7",
    ),
    "a block too long": (
        lambda s: s._replace(sums=scaled(s.sums, 100.0)),
        r"the identity \|sum g\|\^2 .*<= 1 of a block.*expected 1, got",
    ),
    "an example more": (
        lambda s: s._replace(counts={key: c + (key == "0001|*") for key, c in s.counts.items()}),
        "the number of examples in the states must hold at step 7 to 0.0e.00, expected 24, got 25",
    ),
    "a block lost": (
        lambda s: MomentsState(*({k: t for k, t in field.items() if not k.startswith("0001")} for field in s)),
        "the number of examples in the states must hold at step 7 .*expected 24, got 16",
    ),
    "not a number": (
        lambda s: s._replace(sums=scaled(s.sums, float("nan"), "0.weight")),
        r"<= 1 of a block of shards must hold at step 7 .*got nan",
    ),
}


@pytest.mark.parametrize(("corrupt", "message"), CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_corrupted_states_raise(corrupt: Callable[[MomentsState], MomentsState], message: str) -> None:
    state, recorded = measured()
    with pytest.raises(GradscaleError, match=message):
        check_moments(corrupt(state), recorded, step=7)


def test_the_perturbation_is_held_to_the_dispersion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums within and between blocks that do not add up: as a Gram matrix that is off would have it."""
    state, recorded = measured()
    from gradscale.measures import identities

    true = identities._direct

    def off(counts: Tensor, sums: Tensor) -> Any:
        return true(counts, sums)._replace(between=1.0001 * true(counts, sums).between)

    monkeypatch.setattr(identities, "_direct", off)
    message = r"q \(1 - alpha\) / \(n - 1\) = tr Sigma / n must hold at step 7 .*expected .*got"
    with pytest.raises(GradscaleError, match=message):
        check_moments(state, recorded, step=7)


@pytest.mark.parametrize("scale", [0.0, 1e-180, 1e-12, 1e12, 1e140])
def test_gradients_of_any_length_hold_to_the_identities(scale: float) -> None:
    state, recorded = measured()
    lengths = MomentsState(
        state.counts,
        {key: t * scale * scale for key, t in state.sq_norms.items()},
        {key: t * scale for key, t in state.sums.items()},
    )
    check_moments(lengths, Recorded(n, recorded.sq_norm * scale * scale), step=7)


def test_a_corrupted_run_has_no_estimates(tmp_path: Path, local_ray: None) -> None:
    """A state that was stored as it is, checksum and all, but is not that of the rows."""
    measures = [gs.Coherence(), gs.Dispersion(), gs.EffectiveGram()]
    run = gs.measure(Regression(), str(tmp_path / "run"), measures=measures, workers=1, shard_size=8)
    assert len(run.estimates())
    store = Store(Files(str(tmp_path / "run")))
    plan = Plan.from_json((tmp_path / "run" / "run.json").read_text())
    estimate_step(store, plan, measures, 0)
    record = store.commit_record(0, 1)
    store.commit(0, 1, {**record, "files": [], "sq_norm": record["sq_norm"] * 1.01})
    with pytest.raises(GradscaleError, match="sum_l f_l alpha_l = alpha must hold at step 0 "):
        estimate_step(store, plan, measures, 0)
    record.pop("sq_norm")  # as of before there was one
    store.commit(0, 1, {**record, "files": []})
    estimate_step(store, plan, measures, 0)


# --- products with probes ---------------------------------------------------------------------------------------------


def with_products(grads: np.ndarray[Any, Any], N: int, seed: int, factor: float = 1.0) -> MicroBatch:
    """A microbatch of these gradients [n, P]; the products are `factor` times what they should be."""
    g = torch.from_numpy(grads)
    probes = GaussianProbes(N, seed)
    products = factor * g @ probes.materialize("w", (g.shape[1], 1)).double()
    sq_norms = g.square().sum(dim=1, keepdim=True)
    return MicroBatch(
        torch.arange(len(g)), sq_norms[:, 0], None, ("w",), sq_norms, {}, {Projected(probes): products}, 0
    )


@pytest.mark.parametrize("N", [1, 4, 64, 1000])
@pytest.mark.parametrize("kind", ["one gradient", "independent", "lengths apart", "zero"])
def test_products_of_a_sound_run_hold_to_the_norms(kind: str, N: int) -> None:
    """However dependent the examples are: n copies of one are no more evidence than one."""
    generator = np.random.default_rng(1)
    grads = {
        "one gradient": np.ones((50, 1)) * generator.standard_normal((1, 30)),
        "independent": generator.standard_normal((50, 30)),
        "lengths apart": 10.0 ** generator.uniform(-9, 9, (50, 1)) * generator.standard_normal((50, 30)),
        "zero": np.zeros((50, 30)),
    }[kind]
    for seed in range(40):
        check_products(with_products(grads, N, seed), range(50))


@pytest.mark.parametrize("factor", [0.0, 0.25, 4.0, np.nan, np.inf])
def test_products_that_are_off_raise(factor: float) -> None:
    grads = np.random.default_rng(1).standard_normal((8, 30))
    with pytest.raises(
        GradscaleError, match=r"mean_j <g_i, v_j>\^2 ~ \|g_i\|\^2 must hold for examples 8 to 15 .*expected .*got .*"
    ):
        check_products(with_products(grads, 64, 0, factor), range(8, 16))


def test_more_probes_see_smaller_errors() -> None:
    grads = np.random.default_rng(1).standard_normal((8, 30))
    check_products(with_products(grads, 64, 0, 1.2), range(8))
    with pytest.raises(GradscaleError, match=r"over 10000 probes"):
        check_products(with_products(grads, 10_000, 0, 1.2), range(8))


def test_chance_goes_no_further_than_the_bound_says() -> None:
    """P(r beyond x) <= exp(-N (x - 1 - log x) / 2), at levels that can be seen: 5000 draws of a mixture's mean."""
    generator, N = np.random.default_rng(0), 16
    for weights in ([1.0], [0.7, 0.3], [0.1] * 10):
        r = (generator.standard_normal((5000, N, len(weights))) ** 2 @ np.array(weights)).mean(axis=1)
        surprise = N * (r - 1 - np.log(r)) / 2
        for level in (1.0, 2.0, 3.0):
            for side in (r > 1, r < 1):
                bound = np.exp(-level)
                assert (side & (surprise > level)).mean() <= bound + 4 * np.sqrt(bound / 5000)


def test_a_shard_with_wrong_products_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward mode that is wrong by a factor, as a custom operation's derivative may be."""
    from gradscale.run import shard

    true = shard.forward_products
    monkeypatch.setattr(shard, "forward_products", lambda *given: 5 * true(*given))
    subject = prepare(Regression(), None, None)
    with pytest.raises(GradscaleError, match="must hold for examples 0 to 7 to 8 standard deviations"):
        run_shard(subject, range(8), 0, 4, [gs.GaussianWidth(64)], None, forward=True)
    monkeypatch.undo()
    run_shard(subject, range(8), 0, 4, [gs.GaussianWidth(64)], None, forward=True)


# --- sums of products -------------------------------------------------------------------------------------------------


def with_sums(grads: np.ndarray[Any, Any], N: int, seed: int) -> MicroBatch:
    """A microbatch of these gradients [n, P], their products and their sum."""
    batch = with_products(grads, N, seed)
    return batch._replace(sums={GradientSums(): {None: {"w": torch.from_numpy(grads).sum(dim=0)}}})


@pytest.mark.parametrize("N", [1, 3, 64])
@pytest.mark.parametrize("length", [0.0, 1e-30, 1.0, 1e100])
def test_sums_of_products_of_a_sound_run_are_those_of_the_sum(N: int, length: float) -> None:
    grads = length * np.random.default_rng(2).standard_normal((50, 30))
    check_sums(with_sums(grads, N, 1), range(50), 1e-16)
    check_sums(with_products(grads, N, 1), range(50), 1e-16)  # no sums, nothing to hold
    check_sums(with_sums(grads[:0], N, 1), range(0), 1e-16)


@pytest.mark.parametrize("error", [1e-4, 1.0, np.nan])
@pytest.mark.parametrize("side", ["products", "sums"])
def test_sums_of_products_that_are_off_raise(side: str, error: float) -> None:
    """By what no comparison of squares over examples and probes would see."""
    batch = with_sums(np.random.default_rng(2).standard_normal((8, 30)), 64, 1)
    (reading,) = batch.projections
    if side == "products":
        products = batch.projections[reading].clone()
        products[3, 1] += error
        batch = batch._replace(projections={reading: products})
    else:
        batch.sums[GradientSums()][None]["w"][5] += error
    message = r"sum_i <g_i, v_j> = <sum_i g_i, v_j> must hold for examples 8 to 15 to .*expected .* of probe \d, got "
    with pytest.raises(GradscaleError, match=message):
        check_sums(batch, range(8, 16), 1e-16)


def test_sums_in_float32_may_be_of_factors_in_half_precision() -> None:
    batch = with_sums(np.random.default_rng(2).standard_normal((8, 30)), 64, 1)
    batch.sums[GradientSums()][None]["w"][:] *= 1 + 2.0**-9
    check_sums(batch, range(8), torch.finfo(torch.float32).eps)
    with pytest.raises(GradscaleError, match=r"must hold for examples 0 to 7"):
        check_sums(batch, range(8), torch.finfo(torch.float64).eps)


def test_a_forward_mode_that_loses_a_parameter_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias whose tangent is cut: its share of the squares is too small to be seen by the norms."""
    from gradscale.run import shard

    true = shard.forward_products

    def without_bias(subject: Any, *given: Any) -> Tensor:
        kept = {name: p for name, p in subject.parameters.items() if name != "2.bias"}
        return true(dataclasses.replace(subject, parameters=kept), *given)

    monkeypatch.setattr(shard, "forward_products", without_bias)
    subject = prepare(Regression(), None, None)
    with pytest.raises(GradscaleError, match=r"sum_i <g_i, v_j> = <sum_i g_i, v_j> must hold for examples 0 to 7"):
        run_shard(subject, range(8), 0, 4, [gs.GaussianWidth(4), STATISTIC], None, forward=True)
    monkeypatch.undo()
    run_shard(subject, range(8), 0, 4, [gs.GaussianWidth(4), STATISTIC], None, forward=True)
