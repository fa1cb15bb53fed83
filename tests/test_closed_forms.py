"""Measured through `gs.measure` on a real Ray, small problems give the values that their definitions give by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
from problems import Toy
from run_problems import Given

import gradscale as gs

pytestmark = pytest.mark.usefixtures("local_ray")

NAN = math.nan
PROBES = 20_000
# alpha, m_coherence, alpha_unbiased, alpha_above, trace_covariance, noise_scale, v_within, perturbation
TOYS = {
    ("real", 4): (0.625, 2.5, 0.5, 0.625, 1.0, 1.0, 0.125, 0.25),
    ("real", 5): (0.6, 3.0, 0.5, 0.6, 1.0, 1.0, 0.125, 0.2),
    ("random", 4): (0.25, 1.0, 0.0, 0.25, 1.0, NAN, 0.125, 0.25),
    ("random", 5): (0.2, 1.0, 0.0, 0.2, 1.0, NAN, 0.125, 0.2),
}
NAMES = (
    ("coherence", "alpha"),
    ("coherence", "m_coherence"),
    ("coherence", "alpha_unbiased"),
    ("coherence", "alpha_above"),
    ("dispersion", "trace_covariance"),
    ("dispersion", "noise_scale"),
    ("dispersion", "v_within"),
    ("effective_gram", "perturbation"),
)
WIDTH = 1.0293754  # E of the largest of four independent standard normals
SYMMETRIZED = {"real": 1.9377, "random": 1.4642}


def measured(task: object, out: Path, **settings: object) -> pd.DataFrame:
    """The estimates at step 0, by measure, name and scope."""
    moments = [gs.Coherence(min_norm=0.5), gs.Dispersion(batch_size=8), gs.EffectiveGram()]
    measures = [*moments, gs.GaussianWidth(num_probes=PROBES)]
    run = gs.measure(task, str(out), measures=measures, **({"workers": 1, "shard_size": 2} | settings))
    return run.estimates().set_index(["measure", "name", "scope"])


@pytest.fixture(scope="module", params=TOYS, ids=lambda toy: f"{toy[0]}-{toy[1]}")
def toy(request, tmp_path_factory) -> tuple[str, int, pd.DataFrame]:
    kind, rows = request.param
    return kind, rows, measured(Toy(kind, rows), tmp_path_factory.mktemp("toy") / "run")


def test_toy_moments(toy):
    kind, rows, estimates = toy
    found = [estimates.loc[(*name, "all"), "value"] for name in NAMES]
    assert found == pytest.approx(TOYS[kind, rows], abs=1e-14, nan_ok=True)
    assert set(estimates["n"]) == {rows}


def test_one_layer_is_all_layers(toy):
    *_, estimates = toy
    for name in NAMES:
        whole, layer = (estimates.loc[(*name, scope), "value"] for scope in ("all", "layer:weight"))
        assert whole == pytest.approx(layer, nan_ok=True)


def test_toy_widths(toy):
    kind, rows, estimates = toy
    if rows == 4:
        assert_within(estimates, "width", WIDTH)
        assert_within(estimates, "symmetrized", SYMMETRIZED[kind])


@pytest.mark.parametrize(("shard_size", "microbatch"), [(1, 32), (2, 1), (5, 2), (5, 32)])
def test_the_split_into_shards_and_microbatches_changes_no_value(tmp_path, shard_size, microbatch):
    estimates = measured(Toy("real", 5), tmp_path / "run", shard_size=shard_size, microbatch=microbatch, workers=2)
    found = [estimates.loc[(*name, "all"), "value"] for name in NAMES]
    assert found == pytest.approx(TOYS["real", 5], abs=1e-14)


SETS = {
    "two points": (((1.0, 2.0, 0.0), (-1.0, 0.0, 0.5)), math.sqrt(8.25) / math.sqrt(2 * math.pi)),
    "two orthonormal": (((1.0, 0.0), (0.0, 1.0)), 1 / math.sqrt(math.pi)),
    "three orthonormal": (((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)), 3 / (2 * math.sqrt(math.pi))),
}


@pytest.mark.parametrize(("gradients", "width"), SETS.values(), ids=SETS)
def test_widths_of_sets(tmp_path, gradients, width):
    assert_within(measured(Given(gradients), tmp_path / "run"), "width", width)


@pytest.mark.parametrize("shard_size", [1, 5])
def test_coherence_of_copies(tmp_path, shard_size):
    """k copies of d orthogonal gradients, of any lengths that are equal: alpha = 1/d and m_coherence = k."""
    k, d = 3, 4
    gradients = tuple(tuple(2.0 * (i % d == j) for j in range(d)) for i in range(k * d))
    estimates = measured(Given(gradients), tmp_path / "run", shard_size=shard_size)
    assert estimates.loc[("coherence", "alpha", "all"), "value"] == pytest.approx(1 / d)
    assert estimates.loc[("coherence", "m_coherence", "all"), "value"] == pytest.approx(k)


def test_zero_gradients_dilute_coherence_by_the_share_of_the_others(tmp_path):
    """arXiv 2203.10036: a share p of gradients that are not zero has alpha / p."""
    gradients = ((1.0, 0.5), (0.0, 0.0), (0.2, -1.0), (0.0, 0.0), (3.0, 0.0), (0.0, 0.0), (0.0, 0.0), (1.0, 2.0))
    task = Given(gradients)
    run = gs.measure(task, str(tmp_path / "run"), measures=[gs.Coherence(min_norm=0)], workers=1, shard_size=3)
    estimates = run.estimates().set_index(["name", "scope"])
    whole, above = estimates.loc[("alpha", "all")], estimates.loc[("alpha_above", "all")]
    assert (whole["n"], above["n"]) == (8, 4)
    assert whole["value"] == pytest.approx(0.5 * above["value"], rel=1e-14)
    assert above["definition"] == "coherence/alpha_above/min_norm=0.0/v1"


def assert_within(estimates: pd.DataFrame, name: str, expected: float) -> None:
    """Four standard errors, which are themselves as small as the number of probes says."""
    row = estimates.loc[("gaussian_width", name, "all")]
    assert 0 < row["stderr"] < 4 / math.sqrt(PROBES)
    assert abs(row["value"] - expected) < 4 * row["stderr"]
