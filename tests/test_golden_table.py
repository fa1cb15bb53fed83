"""Promise: the five-row toy, measured through `gs.measure` on a real Ray, has the golden values that are known of it.

The toy is that of `problems.Toy`: rows x_i = (e_i, z_i), loss (f - y)^2 / 2, weights zero. Up to the signs of the first
five coordinates, on which nothing here depends, it is the table of T. Walker's report (2023).

Shapes: n rows, P = 6 entries, N probes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from problems import Toy
from torch import Tensor, nn

import gradscale as gs

pytestmark = pytest.mark.usefixtures("local_ray")

NAN, SIGMA, RHO = math.nan, 0.3, 0.2
PROBES = 20_000
EXACT = 0.0  # otherwise: the share of a value that its standard error may be
WIDTH = 1.0293754  # E of the largest of four independent standard normals
SYMMETRIZED = {"real": 1.9377, "random": 1.4642}
ROOT = math.sqrt(2 * math.pi)


@dataclass(frozen=True)
class GoldenToy(Toy):
    """The toy with everything that a measure asks for; `factor` 2 of the loss is that of torch.nn.MSELoss.

    A checkpoint is a file of weights. The features are x_i y_i, the gradients at zero weights but for their sign.
    """

    factor: float = 1.0

    def model(self, checkpoint: str | None) -> nn.Module:
        model = super().model(None)
        if checkpoint is not None:
            model.load_state_dict(safetensors.torch.load_file(checkpoint))
        return model

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return self.factor * super().losses(model, batch)

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["x"])

    def inputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["x"]

    def outputs_of(self, model: nn.Module, inputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return model(inputs)

    def targets(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["y"][:, None]

    def features(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["x"] * batch["y"][:, None]


MEASURES = (
    gs.Coherence(min_norm=0.5),
    gs.Dispersion(batch_size=8),
    gs.EffectiveGram(),
    gs.Stiffness(),
    gs.GaussianWidth(PROBES),
    gs.FeaturizerWidth(PROBES),
    gs.GeometricComplexity(2),
    gs.TangentKernel(100, alignment=True, centred=False),
    gs.Sensitivity(SIGMA, num_draws=100),
    gs.Sharpness(SIGMA, RHO, num_draws=100),
)


def measured(task: GoldenToy, out: Path, **settings: object) -> gs.Run:
    return gs.measure(task, str(out), **{"measures": [*MEASURES], "workers": 1, "sketch": "identity"} | settings)


class Golden(NamedTuple):
    kind: str
    rows: int
    measure: str
    name: str
    value: float
    error: float = EXACT


def both(
    measure: str, name: str, real: float, random: float, rows: int = 4, error: float | tuple[float, float] = EXACT
) -> list[Golden]:
    """The two columns of the table."""
    errors = error if isinstance(error, tuple) else (error, error)
    return [
        Golden("real", rows, measure, name, real, errors[0]),
        Golden("random", rows, measure, name, random, errors[1]),
    ]


def sam(norm: float, curvature: float) -> float:
    """rho |g| + rho^2 g^T H g / (2 |g|^2), g an eigenvector of H."""
    return RHO * norm + RHO**2 * curvature / 2


TABLE = [
    *both("coherence", "alpha", 0.625, 0.25),
    *both("coherence", "alpha", 0.6, 0.2, rows=5),
    *both("coherence", "m_coherence", 2.5, 1.0),
    *both("coherence", "m_coherence", 3.0, 1.0, rows=5),  # (n + 1) / 2 and 1
    *both("coherence", "alpha_unbiased", 0.5, 0.0),
    *both("coherence", "alpha_unbiased", 0.5, 0.0, rows=5),
    *both("coherence", "alpha_above", 0.625, 0.25),  # no gradient is short
    *both("stiffness", "cos", 0.5, 0.0),
    *both("stiffness", "cos", 0.5, 0.0, rows=5),
    *both("stiffness", "zero_gradients", 0.0, 0.0),
    *both("dispersion", "trace_covariance", 1.0, 1.0),
    *both("dispersion", "trace_covariance", 1.0, 1.0, rows=5),
    *both("dispersion", "noise_scale", 1.0, NAN),  # tr Sigma by the unbiased |g|^2, which is 1 or 0
    *both("dispersion", "v_within", 1 / 8, 1 / 8),
    *both("effective_gram", "perturbation", 1 / 4, 1 / 4),
    *both("effective_gram", "perturbation", 1 / 5, 1 / 5, rows=5),
    *both("gaussian_width", "width", WIDTH, WIDTH, error=0.01),  # blind to the common component
    *both("gaussian_width", "symmetrized", SYMMETRIZED["real"], SYMMETRIZED["random"], error=0.01),
    *both("featurizer", "width", WIDTH, WIDTH, error=0.01),
    *both("featurizer", "symmetrized", SYMMETRIZED["real"], SYMMETRIZED["random"], error=0.01),
    *both("tangent_kernel", "alignment", 0.944911, 0.5, error=0.03),
    *both("tangent_kernel", "frobenius", 8.0, 4.0),  # sum |x_i|^2, squared
    *both("tangent_kernel", "trace", 2.0, 1.0),
    *both("geometric_complexity", "gc", 0.0, 0.0),  # |w|^2
    # tr H = 2 and 1; the halves of even and odd rows have tr H_A H_B = 1 and 0
    *both("sensitivity", "value", SIGMA**2 * 2 / 2, SIGMA**2 * 1 / 2, error=0.6),
    *both("sensitivity", "gradient", SIGMA**2, 0.0, error=(0.3, EXACT)),
    *both("sharpness", "average", SIGMA**2 * 2 / 2, SIGMA**2 * 1 / 2, error=0.6),
    # the mean gradient is the first eigenvector: |g|^2 = 5/4 and 1/4, lambda_1 = 5/4 and 1/4
    *both("sharpness", "sam", sam(math.sqrt(1.25), 1.25), sam(0.5, 0.25)),
    *both("sharpness", "weight_norm", 0.0, 0.0),
]


@pytest.fixture(scope="module")
def runs(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], gs.Run]:
    """Four rows as one microbatch; five cut into shards and microbatches, which changes no value."""
    folder = tmp_path_factory.mktemp("golden")
    toys: dict[tuple[str, int], dict[str, object]] = {
        ("real", 4): {},
        ("random", 4): {},
        ("real", 5): {"measures": [*MEASURES[:4]], "workers": 2, "shard_size": 2, "microbatch": 1},
        ("random", 5): {"measures": [*MEASURES[:4]], "shard_size": 5, "microbatch": 2},
    }
    return {toy: measured(GoldenToy(*toy), folder / "{}{}".format(*toy), **settings) for toy, settings in toys.items()}


@pytest.fixture(scope="module")
def estimates(runs: dict[tuple[str, int], gs.Run]) -> dict[tuple[str, int], pd.DataFrame]:
    return {toy: run.estimates().set_index(["measure", "name", "scope"]) for toy, run in runs.items()}


def expect(row: pd.Series, value: float, error: float = EXACT) -> None:
    """To rounding if it is exact, else within four standard errors."""
    if error == EXACT:
        assert row["value"] == pytest.approx(value, abs=1e-12, nan_ok=True)
        return
    assert 0 < row["stderr"] <= error * value
    assert abs(row["value"] - value) <= 4 * row["stderr"] + 6e-5  # the digits that the table gives


@pytest.mark.parametrize("golden", TABLE, ids=lambda g: f"{g.measure}/{g.name}-{g.kind}-{g.rows}")
def test_table(estimates: dict[tuple[str, int], pd.DataFrame], golden: Golden) -> None:
    row = estimates[golden.kind, golden.rows].loc[golden.measure, golden.name, "all"]
    expect(row, golden.value, golden.error)
    if golden.name != "sam":  # which counts microbatches
        assert row["n"] == golden.rows


def test_the_table_has_every_measure() -> None:
    assert {golden.measure for golden in TABLE} == {measure.name for measure in MEASURES}


def test_one_layer_is_all_layers(estimates: dict[tuple[str, int], pd.DataFrame]) -> None:
    for frame in estimates.values():
        layers = frame[frame.index.get_level_values("scope") == "layer:weight"]
        assert len(layers) >= 4 + 3 + 1
        for (measure, name, _), row in layers.iterrows():
            assert row["value"] == pytest.approx(frame.loc[(measure, name, "all"), "value"], nan_ok=True)


# --- what is read from the sketches -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "gram"), [("real", np.eye(4) + 1), ("random", np.eye(4))])
def test_the_gram_matrix(runs: dict[tuple[str, int], gs.Run], kind: str, gram: np.ndarray) -> None:
    np.testing.assert_allclose(runs[kind, 4].gram(step=0), gram, atol=1e-12)
    found = gs.width_of_gram(torch.from_numpy(runs[kind, 4].gram(step=0)), draws=PROBES)
    for estimate, value in ((found.width, WIDTH), (found.symmetrized, SYMMETRIZED[kind])):
        assert estimate.stderr is not None
        assert abs(estimate.value - value) <= 4 * estimate.stderr + 6e-5


@pytest.mark.parametrize(("kind", "last"), [("real", 1.0), ("random", 0.0)])
def test_the_mean_gradient(runs: dict[tuple[str, int], gs.Run], kind: str, last: float) -> None:
    _, matrix = runs[kind, 4].sketches(step=0)
    assert np.abs(matrix.mean(axis=0)).tolist() == [0.25, 0.25, 0.25, 0.25, 0.0, last]


@pytest.mark.parametrize(("kind", "inner", "cosine"), [("real", 1.0, 0.632456), ("random", 0.0, 0.0)])
def test_the_fifth_row_beside_the_mean_of_the_others(
    runs: dict[tuple[str, int], gs.Run], kind: str, inner: float, cosine: float
) -> None:
    gram = runs[kind, 5].gram(step=0)
    assert gram[4, :4].mean() == pytest.approx(inner, abs=1e-12)
    lengths = math.sqrt(gram[4, 4] * gram[:4, :4].mean())
    assert gram[4, :4].mean() / lengths == pytest.approx(cosine, abs=5e-7)


@pytest.mark.parametrize("rows", [4, 5])
@pytest.mark.parametrize(("kind", "sign"), [("real", 1.0), ("random", 0.0)])
def test_sign_stiffness(runs: dict[tuple[str, int], gs.Run], kind: str, sign: float, rows: int) -> None:
    found = gs.sign_stiffness(runs[kind, rows], 0)
    assert found["sign", "all"][:3] == (sign, 0.0, rows)  # sign(0) = 0


@pytest.mark.parametrize(
    ("kind", "beta", "naive", "alpha"), [("real", 0.8333, 0.7143, 0.625), ("random", 0.5, 0.3333, 0.25)]
)
def test_batches_of_two(kind: str, beta: float, naive: float, alpha: float) -> None:
    found = gs.batch_coherence(Toy(kind), batch_size=2)
    b = found["beta", "all"].value
    assert b == pytest.approx(beta, abs=5e-5)
    assert b / (2 - b) == pytest.approx(naive, abs=5e-5)  # for independent batches: not what is reported
    assert found["alpha", "all"].value == pytest.approx(alpha, abs=1e-14)


# --- the path from zero weights to the interpolating ones of least norm -----------------------------------------------

LEAST = {"real": (0.2, -0.2, 0.2, -0.2, 0.0, 0.8), "random": (1.0, -1.0, 1.0, -1.0, 0.0, 0.0)}
MEAN = {"real": math.sqrt(1.25), "random": 0.5}  # |mean gradient| at zero weights
SQUARES = {"real": 2.0, "random": 1.0}  # mean |g_i|^2


@pytest.mark.parametrize("kind", LEAST)
def test_two_checkpoints(tmp_path: Path, kind: str) -> None:
    """At the second all gradients are zero: path and tuple are two points, whose width is |a - b| / sqrt(2 pi)."""
    paths = {}
    for step, weights in enumerate(((0.0,) * 6, LEAST[kind])):
        paths[step] = str(tmp_path / f"step{step}.safetensors")
        safetensors.torch.save_file({"weight": torch.tensor([weights], dtype=torch.float64)}, paths[step])
    measures = [gs.Coherence(), gs.Stiffness(), gs.GaussianWidth(PROBES), gs.GeometricComplexity(2), gs.Sharpness()]
    run = measured(GoldenToy(kind), tmp_path / "run", checkpoints=paths, measures=measures)
    frame = run.estimates().set_index(["step", "measure", "name", "scope"])
    expect(frame.loc[1, "gaussian_width", "path_width", "union"], MEAN[kind] / ROOT, 0.01)
    if kind == "random":
        expect(frame.loc[1, "gaussian_width", "width", "union"], positive_part_of_largest(4), 0.01)
    found = gs.tuple_width(run, draws=PROBES)
    assert found.width.stderr is not None
    assert abs(found.width.value - math.sqrt(SQUARES[kind]) / ROOT) < 4 * found.width.stderr
    assert found.lower == pytest.approx(math.sqrt(SQUARES[kind]) / ROOT)
    sq_norm = sum(w * w for w in LEAST[kind])
    assert sq_norm == pytest.approx({"real": 0.8, "random": 4.0}[kind])
    assert frame.loc[1, "geometric_complexity", "gc", "all"]["value"] == pytest.approx(sq_norm)
    assert frame.loc[1, "sharpness", "weight_norm", "all"]["value"] == pytest.approx(math.sqrt(sq_norm))
    assert frame.loc[1, "gaussian_width", "width", "all"]["value"] == pytest.approx(0.0, abs=1e-14)


def positive_part_of_largest(n: int) -> float:
    """E max(0, z_1, ..., z_n) of independent standard normals."""
    x = torch.linspace(0, 10, 10_001, dtype=torch.float64)
    return float(torch.trapezoid(1 - torch.special.ndtr(x) ** n, x))


# --- conventions of the loss ------------------------------------------------------------------------------------------

POWERS = {  # of the factor of the loss
    ("coherence", "alpha"): 0,
    ("stiffness", "cos"): 0,
    ("tangent_kernel", "alignment"): 0,
    ("gaussian_width", "width"): 1,
    ("sharpness", "average"): 1,
    ("sensitivity", "value"): 1,
    ("dispersion", "trace_covariance"): 2,
    ("effective_gram", "perturbation"): 2,
    ("sensitivity", "gradient"): 2,
}


def test_a_loss_without_the_half_scales_by_the_power_of_its_factor(
    estimates: dict[tuple[str, int], pd.DataFrame], tmp_path: Path
) -> None:
    run = measured(GoldenToy("real", factor=2.0), tmp_path / "run")
    doubled = run.estimates().set_index(["measure", "name", "scope"])
    for name, power in POWERS.items():
        half = estimates["real", 4].loc[(*name, "all"), "value"]
        assert doubled.loc[(*name, "all"), "value"] == pytest.approx(2**power * half, rel=1e-9), name
