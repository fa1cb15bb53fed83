"""Measured through `gs.measure` on a real Ray, small problems give the values that their definitions give by hand.

Sets of gradients that are given, as the checkpoints of one run; a flow that is known; piecewise linear functions. The
values that are known of the five-row toy are in `test_golden_table`.

Shapes: n examples, P entries, C outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from problems import Toy
from run_problems import Given
from torch import Tensor, nn

import gradscale as gs

pytestmark = pytest.mark.usefixtures("local_ray")

Array = np.ndarray
n, P, HALF = 12, 14, 7
PROBES = 5000
TARGETS = np.where(np.arange(n) % 2, 1.0, -1.0)


# --- given sets -------------------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """f(i) = <w, g_i>, w in two parameters of seven entries; the g_i are a buffer, so that a checkpoint brings them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(HALF, 1, bias=False), nn.Linear(P - HALF, 1, bias=False)
        self.register_buffer("rows", torch.zeros(n, P))

    def forward(self, row: Tensor) -> Tensor:
        g = self.rows[row]
        return self.first(g[:, :HALF]) + self.second(g[:, HALF:])


@dataclass(frozen=True)
class Sets:
    """The loss is f: its gradients are the rows of the checkpoint. Classes alternate."""

    def model(self, checkpoint: str | None) -> nn.Module:
        assert checkpoint is not None
        model = Rows().double().eval()
        model.load_state_dict(safetensors.torch.load_file(checkpoint))
        return model

    def examples(self) -> gs.TensorExamples:
        return gs.TensorExamples(row=torch.arange(n), y=torch.from_numpy(TARGETS))

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["row"])[:, 0]

    def labels(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["row"] % 2

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["row"])

    def targets(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["y"][:, None]


def points(*given: tuple[float, ...]) -> Array:
    """These points, each as often as it takes to make n rows."""
    rows = np.zeros((len(given), P))
    for row, point in zip(rows, given, strict=True):
        row[: len(point)] = point
    return rows.repeat(n // len(given), axis=0)


def random(seed: int = 0) -> Array:
    return 0.5 + np.random.default_rng(seed).standard_normal((n, P))


def one_half_zero() -> Array:
    return random() * (np.arange(n) < n / 2)[:, None]


def halves_apart() -> Array:
    """The even rows have entries in the first half alone, the odd ones in the second."""
    return random() * (np.arange(P) // HALF == np.arange(n)[:, None] % 2)


def block_orthogonal() -> Array:
    """All gradients of a class point the same way, those of two classes are orthogonal; lengths are not equal."""
    rows = np.zeros((n, P))
    rows[::2, :2], rows[1::2, 2:4] = [3.0, 4.0], [1.0, -1.0]
    return rows * np.linspace(1, 2, n)[:, None]


ORTHONORMAL = np.eye(n, P)
SETS: dict[str, Array] = {
    "copies": 2.0 * np.tile(np.eye(4, P), (3, 1)),  # k = 3 of each of d = 4
    "orthonormal": ORTHONORMAL,
    "orthogonal": ORTHONORMAL * np.arange(1, n + 1)[:, None],
    "equal": points((1.0, -2.0, 0.5)),
    "opposite": np.concatenate([random()[: n // 2], -random()[: n // 2]]),
    "random": random(),
    "seven times": 7.0 * random(),
    "weighted": random() * np.linspace(0.1, 3.0, n)[:, None],
    "moved": random() + 10.0,
    "half zero": one_half_zero(),
    "halves apart": halves_apart(),
    "block orthogonal": block_orthogonal(),
    "two points": points((1.0, 2.0, 0.0), (-1.0, 0.0, 0.5)),
    "two orthonormal": points((1.0,), (0.0, 1.0)),
    "three orthonormal": points((1.0,), (0.0, 1.0), (0.0, 0.0, 1.0)),
    "along the targets": np.outer(TARGETS, [1.0, -0.5, *[0.1] * (P - 2)]),
}
STEPS = {name: step for step, name in enumerate(SETS)}


@pytest.fixture(scope="module")
def run(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> gs.Run:
    folder, paths = tmp_path_factory.mktemp("sets"), {}
    for name, rows in SETS.items():
        paths[STEPS[name]] = str(folder / f"step{STEPS[name]}.safetensors")
        tensors = {"first.weight": torch.ones(1, HALF), "second.weight": torch.ones(1, P - HALF)}
        tensors = {key: tensor.double() for key, tensor in tensors.items()} | {"rows": torch.from_numpy(rows.copy())}
        safetensors.torch.save_file(tensors, paths[STEPS[name]])
    measures = [
        gs.Coherence(by_class=True, min_norm=0),
        gs.Dispersion(batch_size=4),
        gs.Stiffness(by_class=True),
        gs.GaussianWidth(PROBES),
        gs.TangentKernel(16, alignment=True, centred=False),
    ]
    settings = {"checkpoints": paths, "sketch": "identity", "shard_size": 4, "microbatch": 3, "workers": 1}
    return gs.measure(Sets(), str(folder / "run"), measures=measures, **settings)


@pytest.fixture(scope="module")
def frame(run: gs.Run) -> pd.DataFrame:
    return run.estimates().set_index(["step", "measure", "name", "scope"]).sort_index()


def value(frame: pd.DataFrame, of: str, measure: str, name: str, scope: str = "all") -> float:
    return float(frame.loc[(STEPS[of], measure, name, scope), "value"])


def alpha(frame: pd.DataFrame, of: str, scope: str = "all", name: str = "alpha") -> float:
    return value(frame, of, "coherence", name, scope)


def test_gradients_are_the_given_rows(run: gs.Run) -> None:
    for name, rows in SETS.items():
        np.testing.assert_allclose(run.gram(step=STEPS[name]), rows @ rows.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("of", "coherence", "unbiased"),
    [("copies", 1 / 4, 2 / 11), ("orthogonal", 1 / 12, 0.0), ("orthonormal", 1 / 12, 0.0), ("equal", 1.0, 1.0)],
)
def test_coherence_of_copies(frame: pd.DataFrame, of: str, coherence: float, unbiased: float) -> None:
    """k copies of d orthogonal gradients: 1 / d, and k after multiplication by n. Orthogonal: 1 / n for any lengths."""
    assert alpha(frame, of) == pytest.approx(coherence)
    assert alpha(frame, of, name="m_coherence") == pytest.approx(n * coherence)
    assert alpha(frame, of, name="alpha_unbiased") == pytest.approx(unbiased, abs=1e-14)


def test_coherence_is_zero_only_of_a_mean_that_is(frame: pd.DataFrame) -> None:
    assert alpha(frame, "opposite") == pytest.approx(0.0, abs=1e-14)
    assert all(1e-3 < alpha(frame, name) <= 1 + 1e-14 for name in SETS if name not in ("opposite", "along the targets"))


def test_the_scale_of_the_loss_does_not_matter_and_weights_of_examples_do(frame: pd.DataFrame) -> None:
    for measure, name, power in (
        ("coherence", "alpha", 0),
        ("stiffness", "cos", 0),
        ("tangent_kernel", "alignment", 0),
        ("gaussian_width", "width", 1),
        ("dispersion", "trace_covariance", 2),
    ):
        scaled, plain = (value(frame, of, measure, name) for of in ("seven times", "random"))
        assert scaled == pytest.approx(7**power * plain), name
    assert abs(alpha(frame, "weighted") - alpha(frame, "random")) > 0.01
    assert value(frame, "weighted", "stiffness", "cos") == pytest.approx(value(frame, "random", "stiffness", "cos"))


def test_zero_gradients_dilute_coherence_by_the_share_of_the_others(frame: pd.DataFrame) -> None:
    """arXiv 2203.10036: a share p of gradients that are not zero has alpha / p."""
    above = frame.loc[(STEPS["half zero"], "coherence", "alpha_above", "all")]
    assert above["n"] == n / 2
    assert alpha(frame, "half zero") == pytest.approx(above["value"] / 2, rel=1e-14)
    assert above["definition"] == "coherence/alpha_above/min_norm=0.0/v1"
    assert alpha(frame, "half zero", name="alpha_above") == pytest.approx(coherence_of(random()[: n // 2]))


def test_zero_gradients_have_no_part_in_stiffness(frame: pd.DataFrame) -> None:
    rows = random()[: n // 2]
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = units @ units.T
    found = frame.loc[(STEPS["half zero"], "stiffness", "cos", "all")]
    assert found["n"] == n / 2
    assert found["value"] == pytest.approx((cosines.sum() - n / 2) / (n / 2 * (n / 2 - 1)))
    assert value(frame, "half zero", "stiffness", "zero_gradients") == n / 2


def coherence_of(g: Array) -> float:
    return float(np.square(g.mean(axis=0)).sum() / np.square(g).sum(axis=1).mean())


def test_an_orthogonal_mixture_is_at_most_as_coherent_as_its_parts_on_average(frame: pd.DataFrame) -> None:
    """arXiv 2203.10036: alpha <= p alpha(U) + (1 - p) alpha(V); the parts are the classes here, p = 1/2."""
    parts = [alpha(frame, "halves apart", f"class:{c}") for c in (0, 1)]
    assert parts == pytest.approx([coherence_of(halves_apart()[c::2]) for c in (0, 1)])
    assert alpha(frame, "halves apart") <= sum(parts) / 2
    assert alpha(frame, "halves apart") == pytest.approx(coherence_of(halves_apart()))


def test_coherence_is_that_of_the_layers_by_their_share_of_the_squares(frame: pd.DataFrame, run: gs.Run) -> None:
    """sum_l f_l alpha_l = alpha with f_l from the rows of the examples."""
    for name in ("random", "orthogonal", "halves apart"):
        table = run.rows().to_table().to_pandas()
        squares = np.stack(table[table["step"] == STEPS[name]]["layer_sq_norms"]).sum(axis=0)
        layers = [alpha(frame, name, f"layer:{layer}.weight") for layer in ("first", "second")]
        assert alpha(frame, name) == pytest.approx(float(squares / squares.sum() @ layers))


@pytest.mark.parametrize("of", ["random", "weighted", "copies", "half zero"])
def test_two_gradients_lie_as_near_as_coherence_says(frame: pd.DataFrame, run: gs.Run, of: str) -> None:
    """arXiv 2203.10036: E |v - v'| <= sqrt(2 (1 - alpha) E |v|^2) over independent pairs."""
    gram = run.gram(step=STEPS[of])
    squares = gram.diagonal()
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * gram, 0.0))
    assert distances.mean() <= math.sqrt(2 * (1 - alpha(frame, of)) * squares.mean()) * (1 + 1e-6)


@pytest.mark.parametrize("k", [2, 8])
def test_the_coherence_of_independent_batches(k: int) -> None:
    """arXiv 2203.10036: beta = k alpha / (1 + (k - 1) alpha)."""
    generator, count = np.random.default_rng(3), 500
    rows = 0.3 + generator.standard_normal((k * count, 5))
    exact = 5 * 0.3**2 / (5 * 0.3**2 + 5)
    found = gs.batch_coherence(Given(tuple(map(tuple, rows.tolist()))), batch_size=k)["beta", "all"]
    assert found.stderr is not None
    assert found.stderr < 0.05
    assert abs(found.value - k * exact / (1 + (k - 1) * exact)) < 4 * found.stderr


# --- stiffness --------------------------------------------------------------------------------------------------------


def test_two_classes_of_orthogonal_blocks(frame: pd.DataFrame) -> None:
    """Within 1, between 0, over all pairs the share of pairs within a class."""
    found = {name: value(frame, "block orthogonal", "stiffness", name) for name in ("cos", "cos_within", "cos_between")}
    assert found == pytest.approx({"cos": 60 / 132, "cos_within": 1.0, "cos_between": 0.0}, abs=1e-12)
    matrix = [value(frame, "block orthogonal", "stiffness", "cos", f"class:{c}") for c in ("0,0", "0,1", "1,1")]
    assert matrix == pytest.approx([1.0, 0.0, 1.0], abs=1e-12)


@pytest.mark.parametrize(("of", "sign", "between"), [("block orthogonal", 60 / 132, 0.0), ("orthogonal", 0.0, 0.0)])
def test_signs(run: gs.Run, of: str, sign: float, between: float) -> None:
    found = gs.sign_stiffness(run, STEPS[of])
    assert found["sign", "all"].value == pytest.approx(sign)
    assert found["sign_between", "all"].value == pytest.approx(between)


# --- widths -----------------------------------------------------------------------------------------------------------

WIDTHS = {
    "two points": math.sqrt(8.25) / math.sqrt(2 * math.pi),  # |a - b| / sqrt(2 pi)
    "two orthonormal": 1 / math.sqrt(math.pi),
    "three orthonormal": 3 / (2 * math.sqrt(math.pi)),
    "equal": 0.0,
}


@pytest.mark.parametrize("of", WIDTHS)
def test_widths_of_sets(frame: pd.DataFrame, of: str) -> None:
    row = frame.loc[(STEPS[of], "gaussian_width", "width", "all")]
    assert row["stderr"] < 3 / math.sqrt(PROBES)
    assert abs(row["value"] - WIDTHS[of]) <= 4 * row["stderr"] + 1e-12


def test_a_common_component_is_seen_by_the_symmetrized_width_alone(frame: pd.DataFrame) -> None:
    plain, moved = (value(frame, of, "gaussian_width", "width") for of in ("random", "moved"))
    assert moved == pytest.approx(plain, rel=1e-9)
    plain, moved = (value(frame, of, "gaussian_width", "symmetrized") for of in ("random", "moved"))
    assert moved > 2 * plain


@pytest.mark.parametrize("of", ["random", "weighted", "orthogonal", "copies"])
def test_the_width_lies_between_its_bounds(frame: pd.DataFrame, run: gs.Run, of: str) -> None:
    """diam / sqrt(2 pi) <= w <= max |g - mean g| sqrt(2 log n)."""
    rows = SETS[of]
    found = value(frame, of, "gaussian_width", "width")
    diameter = max(float(np.linalg.norm(a - b)) for a in rows for b in rows)
    radius = float(np.linalg.norm(rows - rows.mean(axis=0), axis=1).max())
    assert diameter / math.sqrt(2 * math.pi) < found < radius * math.sqrt(2 * math.log(n))


# --- tangent kernels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", SETS)
def test_the_trace_of_a_linear_models_kernel(frame: pd.DataFrame, of: str) -> None:
    """|Phi|_F^2 = sum_i |x_i|^2, without error for a single output."""
    row = frame.loc[(STEPS[of], "tangent_kernel", "frobenius", "all")]
    assert row["value"] == pytest.approx(float(np.square(SETS[of]).sum()))
    assert row["stderr"] == pytest.approx(0.0, abs=1e-6 * row["value"])


def test_a_kernel_along_the_targets_has_alignment_one(frame: pd.DataFrame) -> None:
    """K = y y^T."""
    row = frame.loc[(STEPS["along the targets"], "tangent_kernel", "alignment", "all")]
    assert row["value"] == pytest.approx(1.0)
    assert row["stderr"] == pytest.approx(0.0, abs=1e-7)


def test_the_identity_kernel_has_alignment_one_over_root_n(frame: pd.DataFrame) -> None:
    row = frame.loc[(STEPS["orthonormal"], "tangent_kernel", "alignment", "all")]
    assert row["stderr"] < 0.1
    assert abs(row["value"] - 1 / math.sqrt(n)) < 4 * row["stderr"]


# --- the perturbation along a flow ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flowing(Toy):
    """Four orthonormal inputs; a checkpoint is the weights that the gradient flow has reached."""

    kind: str = "random"

    def model(self, checkpoint: str | None) -> nn.Module:
        model = super().model(None)
        if checkpoint is not None:
            model.load_state_dict(safetensors.torch.load_file(checkpoint))
        return model


def test_the_perturbation_adds_up_to_the_leave_one_out_gap(tmp_path: Path) -> None:
    """Orthonormal inputs, half the square: w(t) = (1 - e^(-t/n)) y, no contraction, gap (1 - e^(-2t/n)) |y|^2 / 2n.

    An example that is left out of such a flow is not learned at all: its loss stays y_i^2 / 2.
    """
    rows, until = 4, 6.0
    nodes, weights = np.polynomial.legendre.leggauss(6)
    times, weights = until * (nodes + 1) / 2, until * weights / 2
    y = Flowing().examples().tensors["y"]
    paths = {}
    for step, t in enumerate(times):
        w = torch.cat([(1 - math.exp(-t / rows)) * y, torch.zeros(2)])[None].double()
        paths[step] = str(tmp_path / f"step{step}.safetensors")
        safetensors.torch.save_file({"weight": w}, paths[step])
    settings = {"checkpoints": paths, "workers": 1, "measures": [gs.EffectiveGram(), gs.Coherence()]}
    frame = gs.measure(Flowing(), str(tmp_path / "run"), **settings).estimates()
    found = frame[(frame["name"] == "perturbation") & (frame["scope"] == "all")].sort_values("step")["value"].to_numpy()
    assert found == pytest.approx(np.exp(-2 * times / rows) / rows)  # sum r^2 / n^2
    gap = (1 - math.exp(-2 * until / rows)) / 2
    assert float(weights @ found) == pytest.approx(gap, rel=1e-7)


# --- geometric complexity ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piecewise:
    """f(x) = relu(x) - 3 relu(x - 1), with a bias: of slope 0, 1 and -2; `linear`: three outputs of four inputs."""

    linear: bool = False

    def model(self, checkpoint: str | None) -> nn.Module:
        if self.linear:
            model: nn.Module = nn.Linear(4, 3).double().eval()
            with torch.no_grad():
                model.weight.copy_(torch.arange(12.0).view(3, 4) - 5)
            return model
        model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double().eval()
        with torch.no_grad():
            for parameter, given in zip(model.parameters(), ([[1.0], [1.0]], [0, -1], [[1, -3]], [0.7]), strict=True):
                parameter.copy_(torch.tensor(given))
        return model

    def examples(self) -> gs.TensorExamples:
        x = torch.tensor([-2.0, -1.0, 0.5, 0.6, 0.7, 3.0, 4.0, 5.0], dtype=torch.float64)[:, None]
        return gs.TensorExamples(x=x + torch.arange(4.0) if self.linear else x)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["x"]).square().sum(dim=1)

    def inputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["x"]

    def outputs_of(self, model: nn.Module, inputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return model(inputs)


@pytest.mark.parametrize("linear", [False, True])
def test_the_complexity_of_piecewise_linear_functions(tmp_path: Path, linear: bool) -> None:
    """The mean over examples of their regions' squared slopes; |W|_F^2 of a linear function, whatever its inputs.

    At most min(C, d) times the square of the Lipschitz constant.
    """
    task, N = Piecewise(linear), 300
    run = gs.measure(task, str(tmp_path / "run"), measures=[gs.GeometricComplexity(N)], workers=1)
    row = run.estimates().set_index("name").loc["gc_sample"]
    weight = (np.arange(12.0) - 5).reshape(3, 4)
    exact = np.square(weight).sum() if linear else (2 * 0 + 3 * 1 + 3 * 4) / 8
    lipschitz = np.linalg.norm(weight, 2) if linear else 2.0
    assert row["stderr"] <= (0.05 * exact if linear else 1e-12)
    assert abs(row["value"] - exact) <= 4 * row["stderr"] + 1e-12
    assert row["value"] <= (3 if linear else 1) * lipschitz**2
