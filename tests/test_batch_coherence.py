"""Promise: coherence from batch gradients inverts exactly over partitions, and needs no example's own gradient.

Shapes: m examples in batches of k, P entries.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
import scipy.stats
import torch
from problems import ModelAtHand, Toy
from run_problems import Given, Regression
from torch import Tensor, nn

import gradscale as gs
from gradscale.errors import GradscaleError
from gradscale.measures.moments import Moments
from gradscale.run.batch_gradients import _both, example_coherence


@pytest.mark.parametrize(("kind", "beta", "alpha"), [("real", 5 / 6, 0.625), ("random", 0.5, 0.25)])
@pytest.mark.parametrize("rows", [4, 5])
def test_the_toy(kind: str, beta: float, alpha: float, rows: int) -> None:
    """math.md, section 12. The fifth row fills no batch and is left out."""
    found = gs.batch_coherence(Toy(kind, rows), batch_size=2)
    assert found["beta", "all"].value == pytest.approx(beta, abs=1e-15)
    assert found["alpha", "all"].value == pytest.approx(alpha, abs=1e-15)
    assert (found["beta", "all"].n, found["alpha", "all"].n) == (2, 4)
    assert found["alpha", "layer:weight"].value == pytest.approx(alpha)
    assert (found["beta", "all"].status, found["alpha", "all"].status) == ("estimator", "conditional")


@pytest.mark.parametrize("k", [2, 3])
def test_the_inversion_is_exact_over_all_partitions(k: int) -> None:
    m = 6
    g = np.random.default_rng(0).standard_normal((m, 4)) + 0.4
    orders = list(itertools.permutations(range(m)))
    q_b = np.mean([(g[list(order)].reshape(m // k, k, 4).mean(1) ** 2).sum(1).mean() for order in orders])
    beta = (g.mean(0) ** 2).sum() / q_b
    alpha = (g.mean(0) ** 2).sum() / (g**2).sum(1).mean()
    assert example_coherence(beta, m // k, k) == pytest.approx(alpha, rel=1e-12)
    naive = beta / (k - (k - 1) * beta)
    assert abs(naive - alpha) > 0.02


def test_batches_of_one_are_examples() -> None:
    task = Regression()
    found = gs.batch_coherence(task, batch_size=1)
    g = dense(task)
    exact = (g.mean(0) ** 2).sum() / (g**2).sum(1).mean()
    for name in ("alpha", "beta"):
        assert found[name, "all"].value == pytest.approx(float(exact), rel=1e-12)


def dense(task: Regression) -> Tensor:
    """[n, P]"""
    model = task.model(None)
    losses = task.losses(model, task.examples().batch(range(24)))
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


class Normed(ModelAtHand):
    """BatchNorm in training mode."""


def normed() -> Normed:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)).double().train()
    x, y = torch.randn(22, 4, dtype=torch.float64), torch.randn(22, dtype=torch.float64)

    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return (model(batch["x"])[:, 0] - batch["y"]).square()

    return Normed(net, {"x": x, "y": y}, losses)


def test_batch_statistics_are_measured_as_they_are_and_left_alone() -> None:
    task = normed()
    before, oracle = copy.deepcopy(task.net.state_dict()), copy.deepcopy(task.net)
    found = gs.batch_coherence(task, batch_size=4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.net.state_dict().items())
    assert all(parameter.grad is None for parameter in task.net.parameters())
    rows = []
    for start in range(0, 20, 4):
        batch = {name: tensor[start : start + 4] for name, tensor in task.tensors.items()}
        grads = torch.autograd.grad(task.loss(oracle, batch).mean(), list(oracle.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    g = torch.stack(rows)
    beta = float((g.mean(0) ** 2).sum() / (g**2).sum(1).mean())
    assert found["beta", "all"].value == pytest.approx(beta, rel=1e-12)
    assert found["alpha", "all"].value == pytest.approx(example_coherence(beta, 5, 4), rel=1e-12)
    assert found["alpha", "all"].n == 20
    left_out = np.array([float((h.mean(0) ** 2).sum() / (h**2).sum(1).mean()) for h in leave_one_out(g)])
    classical = math.sqrt(4 / 5 * ((left_out - left_out.mean()) ** 2).sum())
    assert found["beta", "all"].stderr == pytest.approx(classical, rel=1e-9)
    inverted = np.array([example_coherence(value, 4, 4) for value in left_out])
    assert found["alpha", "all"].stderr == pytest.approx(
        math.sqrt(4 / 5 * ((inverted - inverted.mean()) ** 2).sum()), rel=1e-9
    )


def leave_one_out(g: Tensor) -> list[Tensor]:
    return [torch.cat([g[:i], g[i + 1 :]]) for i in range(len(g))]


def test_batches_that_are_not_finite_are_left_out() -> None:
    found = gs.batch_coherence(Regression(nan=9), batch_size=4)
    assert (found["beta", "all"].n, found["alpha", "all"].n) == (5, 20)
    with pytest.raises(GradscaleError, match="at least two batches must have a finite loss and gradient, got 1"):
        gs.batch_coherence(Regression(nan=9), batch_size=12)


@pytest.mark.parametrize("batch_size", [13, 24, 100])
def test_there_must_be_two_batches(batch_size: int) -> None:
    with pytest.raises(
        GradscaleError, match=f"batch_size must be at most half the number of examples, 24, got {batch_size}"
    ):
        gs.batch_coherence(Regression(), batch_size=batch_size)


def test_dropout_is_refused() -> None:
    task = ModelAtHand(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1)).train(), {"x": torch.ones(8, 4)}, lambda *_: _)
    with pytest.raises(GradscaleError, match=r"dropout 0 must be off, got p=0\.5"):
        gs.batch_coherence(task, batch_size=2)


def test_a_class_of_one_batch_has_no_inversion() -> None:
    assert math.isnan(example_coherence(1.0, 1, 8))


def test_gradients_that_are_given() -> None:
    """Two batches of opposite means: no coherence at all."""
    found = gs.batch_coherence(Given(((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))), batch_size=2)
    assert found["beta", "all"].value == found["alpha", "all"].value == 0.0


@pytest.mark.parametrize("blocks", [20, 5])
def test_errors_are_honest(blocks: int) -> None:
    """300 samples of 20 batches of 8 Gaussian gradients with a known mean and covariance."""
    runs, count, k, P = 300, 20, 8, 12
    generator = np.random.default_rng(4)
    mean, scales = np.linspace(0.2, 0.8, P), np.linspace(0.3, 1.2, P)
    signal, trace = (mean**2).sum(), (scales**2).sum()
    truth = {"alpha": signal / (signal + trace), "beta": signal / (signal + trace / k)}
    scores: dict[str, list[float]] = {name: [] for name in truth}
    for _ in range(runs):
        g = mean + scales / math.sqrt(k) * generator.standard_normal((count, P))
        sums = torch.from_numpy(g.reshape(blocks, count // blocks, P).sum(1))
        squares = torch.from_numpy((g**2).sum(1).reshape(blocks, -1).sum(1))
        parts = Moments(torch.full((blocks,), count / blocks, dtype=torch.float64), squares, sums @ sums.mT)
        for name, estimate in _both(parts, k):
            # the plug-in values lie (1 - beta) / 20 above the population's, as their definition says
            bias = (1 - truth["beta"]) / count if name == "beta" else (1 - truth["alpha"]) / (count * k)
            assert estimate.stderr is not None
            scores[name].append((estimate.value - truth[name] - bias) / estimate.stderr)
    for parts_ in scores.values():
        for bound in (1, 2):
            nominal = float(2 * scipy.stats.t.cdf(bound, blocks - 1) - 1)
            tolerance = 4 * math.sqrt(nominal * (1 - nominal) / runs)
            assert abs((np.abs(parts_) <= bound).mean() - nominal) < tolerance
