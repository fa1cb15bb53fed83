"""Promise: sharpness is what the loss does around the weights: closed forms on quadratics, the best point of a ball.

Shapes: n examples, m of a microbatch, P entries of all parameters, N draws.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from conftest import contents
from problems import ModelAtHand
from run_problems import Regression
from test_measure_laws import assert_honest
from test_probing import agrees, measured
from torch import Tensor, nn

import gradscale as gs
from gradscale.errors import GradscaleError
from gradscale.measures.perturbation import batch_of, mean_of_batches
from gradscale.measures.probe_means import error_of_mean
from gradscale.measures.settings import parse_measures
from gradscale.measures.sharpness import Sharpness
from gradscale.measures.worst_case import WorstCase
from gradscale.run.shard import prepare, run_shard
from gradscale.task import TensorExamples

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Squares:
    """Half the squares of <w, x_i> - y_i at the weights `at`, with rows drawn by `seed`; y = <x, minimum>."""

    rows: int = 24
    at: tuple[float, ...] = (0.3, -1.2, 0.7, 2.0)
    minimum: tuple[float, ...] = (0.5, 0.1, -0.4, 1.0)
    seed: int = 0

    def model(self, checkpoint: str | None) -> nn.Module:
        model = nn.Linear(len(self.at), 1, bias=False).double().eval()
        model.weight.data[:] = torch.tensor(self.at, dtype=torch.float64)
        return model

    def examples(self) -> TensorExamples:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.rows, len(self.at), dtype=torch.float64, generator=generator)
        x = x * torch.linspace(0.5, 2, len(self.at), dtype=torch.float64)
        return TensorExamples(x=x, y=x @ torch.tensor(self.minimum, dtype=torch.float64))

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return (model(batch["x"])[:, 0] - batch["y"]).square() / 2

    def batches(self, m: int) -> list[tuple[Array, Array]]:
        """Gradient and Hessian of the mean loss of every batch of m."""
        x, apart = self.examples().tensors["x"].numpy(), np.array(self.at) - np.array(self.minimum)
        hessians = [part.T @ part / m for part in np.split(x, self.rows // m)]
        return [(h @ apart, h) for h in hessians]


def rise(g: Array, h: Array, v: Array) -> float:
    return float(g @ v + v @ h @ v / 2)


def highest_in_ball(g: Array, h: Array, epsilon: float) -> float:
    """max of <g, v> + v^T H v / 2 over |v| <= epsilon, H positive: (mu I - H) v = g, mu >= lambda_max, |v| = epsilon.

    More and Sorensen (1983); g must have a part along the leading eigenvector, or be zero.
    """
    values, vectors = np.linalg.eigh(h)
    if not g.any():
        return float(epsilon**2 * values[-1] / 2)
    parts, top = vectors.T @ g, values[-1]

    def excess(mu: float) -> float:
        return float(np.linalg.norm(parts / (mu - values)) - epsilon)

    low = top + abs(parts[-1]) / epsilon  # the leading part alone fills the ball
    mu = scipy.optimize.brentq(excess, low, top + np.linalg.norm(g) / epsilon + 1e-12, xtol=1e-14)
    return rise(g, h, vectors @ (parts / (mu - values)))


# --- one step along the gradient --------------------------------------------------------------------------------------


def test_one_step_is_its_closed_form_on_every_batch() -> None:
    """rho |g| + rho^2 g^T H g / (2 |g|^2), and the same of D g with D = diag |w|."""
    task, rho = Squares(), 0.2
    d = np.abs(np.array(task.at))
    for adaptive, name in ((False, "sam"), (True, "asam")):
        exact = []
        for g, h in task.batches(8):
            length = np.linalg.norm(d * g) if adaptive else np.linalg.norm(g)
            step = d**2 * g if adaptive else g
            exact.append(rho * length + rho**2 * step @ h @ step / (2 * length**2))
        found = measured(task, Sharpness(rho=rho, num_draws=1, adaptive=adaptive), 8, 24)
        assert found[name, "all"].value == pytest.approx(np.mean(exact), rel=1e-12)
        assert found[name, "all"].stderr == pytest.approx(np.std(exact, ddof=1) / math.sqrt(3), rel=1e-9)
        assert found[name, "all"][2:5] == (3, "estimator", f"sharpness/{name}/m=8/rho=0.2/v1")
        assert set(found) == {("average", "all"), (name, "all"), ("weight_norm", "all")}


def test_the_adaptive_step_is_that_of_the_reference_code() -> None:
    """e = rho w^2 g / ||w| g|, of all parameters together, on a net that is no quadratic."""
    task, rho = Regression(rows=6), 0.1
    subject = prepare(task, None, None)
    batch = subject.examples.batch(range(6))
    parameters = list(subject.parameters.values())
    before = task.losses(subject.model, batch).mean()
    grads = torch.autograd.grad(before, parameters)
    norm = torch.stack([(p.abs() * g).norm(p=2) for p, g in zip(parameters, grads, strict=True)]).norm(p=2)
    model = task.model(None)
    with torch.no_grad():
        for p, q, g in zip(model.parameters(), parameters, grads, strict=True):
            p.add_(q.square() * g * rho / (norm + 1e-12))
        exact = float(task.losses(model, batch).mean() - before)
    found = measured(task, Sharpness(rho=rho, num_draws=1, adaptive=True), 6, 6)["asam", "all"]
    assert found.value == pytest.approx(exact, rel=1e-9)


def test_no_gradient_is_no_rise() -> None:
    at = Squares().minimum
    for adaptive, name in ((False, "sam"), (True, "asam")):
        found = measured(Squares(at=at), Sharpness(rho=0.3, num_draws=1, adaptive=adaptive), 24, 24)
        assert found[name, "all"].value == 0.0


# --- the worst case in a ball -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 3.0])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_worst_case_is_the_best_point_of_the_ball(epsilon: float, adaptive: bool) -> None:
    task = Squares()
    d = np.diag(np.abs(task.at)) if adaptive else np.eye(4)
    exact = [highest_in_ball(d @ g, d @ h @ d, epsilon) for g, h in task.batches(8)]
    found = measured(task, WorstCase(epsilon, num_steps=40, adaptive=adaptive), 8, 24)["epsilon_sharpness", "all"]
    assert found.value == pytest.approx(np.mean(exact), rel=1e-3)
    assert found.value <= np.mean(exact) * (1 + 1e-12)
    assert found.stderr == pytest.approx(np.std(exact, ddof=1) / math.sqrt(3), rel=1e-2)
    ball = "adaptive l2" if adaptive else "l2"
    definition = f"worst_case/epsilon_sharpness/{ball}/m=8/epsilon={epsilon:g}/steps=40/v1"
    assert found[2:5] == (3, "heuristic", definition)


def test_at_a_minimum_it_is_half_the_leading_eigenvalue() -> None:
    task, epsilon = Squares(at=Squares().minimum), 0.1
    ((_, h),) = task.batches(24)
    found = measured(task, WorstCase(epsilon, num_steps=40), 24, 24)["epsilon_sharpness", "all"]
    assert found.value == pytest.approx(epsilon**2 * np.linalg.eigvalsh(h)[-1] / 2, rel=1e-3)


@pytest.mark.parametrize("adaptive", [False, True])
def test_in_a_cube_it_is_the_best_corner(adaptive: bool) -> None:
    """A convex function is largest at a corner; with the gradient in the lead every step makes for it."""
    task, epsilon = Squares(), 0.05
    d = np.diag(np.abs(task.at)) if adaptive else np.eye(4)
    corners = [epsilon * np.array(signs) for signs in itertools.product((-1.0, 1.0), repeat=4)]
    exact = [max(rise(d @ g, d @ h @ d, v) for v in corners) for g, h in task.batches(8)]
    found = measured(task, WorstCase(epsilon, norm="linf", adaptive=adaptive), 8, 24)["epsilon_sharpness", "all"]
    assert found.value == pytest.approx(np.mean(exact), rel=1e-9)
    assert f"epsilon_sharpness/{'adaptive ' if adaptive else ''}linf/m=8" in found.definition


def test_in_a_landscape_with_hills_the_highest_is_not_exceeded_and_one_is_reached() -> None:
    """sin(3 a) + sin(5 b) + a b: a grid over the ball is the oracle, far from convex, whose hills lie inside."""

    def height(a: Any, b: Any) -> Any:
        module = torch if isinstance(a, Tensor) else np
        return module.sin(3 * a) + module.sin(5 * b) + a * b

    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        a, b = model(batch["x"])[:, :, 0].unbind(dim=1)
        return height(a, b)

    net = nn.Linear(2, 1, bias=False).double().eval()
    net.weight.data[:] = torch.tensor([-0.3, -0.1])
    a, b = np.meshgrid(np.linspace(-1, 1, 801), np.linspace(-1, 1, 801))
    inside = a**2 + b**2 <= 1
    highest = float((height(a - 0.3, b - 0.1) - height(-0.3, -0.1))[inside].max())
    task = ModelAtHand(
        net,
        {"x": torch.eye(2, dtype=torch.float64).expand(3, 2, 2), "label": torch.zeros(3, dtype=torch.int64)},
        losses,
    )
    found = measured(task, WorstCase(1.0, num_steps=60), 3, 3)["epsilon_sharpness", "all"].value
    assert found <= highest + 1e-4
    assert found == pytest.approx(highest, rel=1e-2)


def test_where_the_loss_only_falls_it_is_zero() -> None:
    """The weights are at a peak: v = 0 is in the ball."""

    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return -model(batch["x"])[:, 0].square()

    net = nn.Linear(3, 1, bias=False).double().eval()
    nn.init.zeros_(net.weight)
    found = measured(
        ModelAtHand(
            net, {"x": torch.eye(4, 3, dtype=torch.float64) + 1, "label": torch.zeros(4, dtype=torch.int64)}, losses
        ),
        WorstCase(1.0),
        4,
        4,
    )
    assert found["epsilon_sharpness", "all"].value == 0.0


def test_the_worst_case_is_at_least_every_step_and_the_average() -> None:
    """Of the same radius: what a draw of that length gives, and what one step along the gradient does."""
    task, epsilon = Regression(rows=12), 0.3
    worst = measured(task, WorstCase(epsilon), 12, 12)["epsilon_sharpness", "all"].value
    steps = measured(task, Sharpness(sigma=1e-3, rho=epsilon, num_draws=1), 12, 12)
    assert worst >= steps["sam", "all"].value > 0


# --- what a rescaling does --------------------------------------------------------------------------------------------


def two_layers(factor: float) -> ModelAtHand:
    """A ReLU net whose first layer is multiplied by `factor`, and whose second is divided by it: one function."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 1, bias=False)).double().eval()
    x, y = torch.randn(10, 4, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    with torch.no_grad():
        net[0].weight *= factor
        net[2].weight /= factor

    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return (model(batch["x"])[:, 0] - batch["y"]).square() / 2

    return ModelAtHand(net, {"x": x, "y": y, "label": torch.zeros(10, dtype=torch.int64)}, losses)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("average", lambda adaptive: Sharpness(0.1, num_draws=3, adaptive=adaptive)),
        ("sam", lambda adaptive: Sharpness(rho=0.3, num_draws=1, adaptive=adaptive)),
        ("epsilon_sharpness", lambda adaptive: WorstCase(0.3, 10, adaptive=adaptive)),
        ("epsilon_sharpness", lambda adaptive: WorstCase(0.1, 10, norm="linf", adaptive=adaptive)),
    ],
)
def test_only_the_adaptive_are_the_functions_own(name: str, make: Callable[[bool], Any]) -> None:
    """Dinh et al. (2017): the same function with other weights. A power of two changes no bit but the exponent."""
    for adaptive in (True, False):
        key = ("asam" if name == "sam" and adaptive else name, "all")
        values = [measured(two_layers(factor), make(adaptive), 5, 10)[key].value for factor in (1.0, 4.0)]
        if adaptive:
            assert values[1] == pytest.approx(values[0], rel=1e-9)
            assert abs(values[0]) > 1e-3
        else:
            assert abs(values[1] / values[0] - 1) > 0.2


# --- averages, and the errors of all ----------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_average_is_exact_for_a_quadratic(adaptive: bool) -> None:
    """sigma^2 tr H / 2, and sigma^2 tr(D H D) / 2."""
    task, sigma = Squares(), 0.2
    ((_, h),) = task.batches(24)
    d = np.abs(task.at) if adaptive else np.ones(4)
    found = measured(task, Sharpness(sigma, num_draws=600, adaptive=adaptive), 24, 24)["average", "all"]
    exact = float(sigma**2 * (d**2 * np.diag(h)).sum() / 2)
    agrees(found, exact)
    assert found.stderr == pytest.approx(0.0, abs=0.3 * exact)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_errors_of_the_average_are_honest(adaptive: bool) -> None:
    """Examples and draws anew in every run; the truth is the population's, with H = diag(scale^2)."""
    N, n, sigma, P = 24, 60, 0.3, 12
    at = tuple(np.linspace(-1.5, 1.5, P))
    scale, w = np.linspace(0.5, 2, P), np.abs(at) if adaptive else np.ones(P)
    truth = float(sigma**2 * (w**2 * scale**2).sum() / 2)
    scores = []
    for seed in range(250):
        task = Squares(n, at, at, seed)
        found = measured(task, Sharpness(sigma, num_draws=N, adaptive=adaptive, seed=seed), n, n)["average", "all"]
        assert found.stderr is not None
        scores.append((found.value - truth) / found.stderr)
    assert_honest(scores, N - 1)


def test_the_error_over_batches_is_honest() -> None:
    """250 runs of 30 numbers, one for a batch."""
    generator, scores = np.random.default_rng(0), []
    for _ in range(250):
        values = 2 + generator.standard_normal(30)
        total, squares = values.sum(), (values**2).sum()
        scores.append((total / 30 - 2) / error_of_mean(total, squares, 30))
    assert_honest(scores, 29)
    assert math.isnan(error_of_mean(1.0, 1.0, 1))


# --- batches, weights, runs -------------------------------------------------------------------------------------------

EVERY = (Sharpness(num_draws=2, adaptive=True), WorstCase(0.1, num_steps=3), WorstCase(0.1, 3, "linf", adaptive=True))


@pytest.mark.parametrize("measure", EVERY)
def test_the_weights_come_back_bit_for_bit(measure: Any) -> None:
    subject = prepare(Regression(rows=8, nan=3), None, None)
    before = {name: p.detach().clone() for name, p in subject.parameters.items()}
    run_shard(subject, range(8), 0, 4, [measure], None)
    assert all(torch.equal(p, before[name]) for name, p in subject.parameters.items())


def test_batches_of_the_largest_size_count_and_those_not_finite_do_not() -> None:
    worst = WorstCase(0.1, num_steps=2)
    whole = measured(Regression(rows=8), worst, 4, 8)["epsilon_sharpness", "all"]
    assert (whole.n, "m=4/" in whole.definition) == (2, True)
    spoilt = measured(Regression(rows=8, nan=5), worst, 4, 8)["epsilon_sharpness", "all"]
    assert (spoilt.n, "m=4/" in spoilt.definition) == (1, True)
    assert math.isnan(float(spoilt.stderr or 0))
    nothing = worst.compute(worst.init())["epsilon_sharpness", "all"]
    assert (math.isnan(nothing.value), nothing.n) == (True, 0)
    assert mean_of_batches(batch_of(torch.tensor(math.inf), 4)).batches == 0


@pytest.mark.usefixtures("local_ray")
def test_a_run_has_the_same_bits_for_one_worker_and_for_two(tmp_path: Path) -> None:
    runs = [tmp_path / f"{workers}" for workers in (1, 2)]
    for workers, path in enumerate(runs, start=1):
        gs.measure(
            Regression(rows=12), str(path), measures=EVERY[:2], workers=workers, shard_size=4, microbatch=2
        ).estimates()
    assert contents(runs[0]) == contents(runs[1])


def test_settings_from_the_command_line() -> None:
    expected = (Sharpness(rho=0.1, adaptive=True), WorstCase(0.02, num_steps=5, norm="linf", adaptive=True))
    assert (
        parse_measures("sharpness:rho=0.1:adaptive,worst_case:epsilon=0.02:num_steps=5:norm=linf:adaptive") == expected
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WorstCase(epsilon=0.0), "epsilon must be a positive number, got 0.0; 0.05 is the default"),
        (lambda: WorstCase(epsilon=math.nan), "epsilon must be a positive number, got nan"),
        (lambda: WorstCase(num_steps=0), "num_steps must be at least 1, got 0"),
        (lambda: WorstCase(norm="l1"), "norm must be one of l2, linf, got 'l1'; l2 is the default"),
        (lambda: Sharpness(rho=math.inf), "rho must be a positive number, got inf"),
    ],
)
def test_settings_are_checked(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(GradscaleError, match=message):
        make()
