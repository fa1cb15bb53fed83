"""Promise: the leave-one-out gap of small problems, what makes and contracts it, and the effective Gram matrix."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import FOLDER, contents
from problems import ModelAtHand, Toy
from run_problems import WithLock
from torch import Tensor, nn

import gradscale as gs
from gradscale.grads.subject import load_batch
from gradscale.measures.effective_gram_dense import (
    EffectiveGramMatrix,
    Linearized,
    effective_gram,
    perturbation_matrix,
)
from gradscale.measures.leave_out_path import (
    GapPath,
    gap_path,
    gram_estimate,
    path_estimates,
    rates_for_gram,
    sampling_error,
)
from gradscale.run.leave_out_plan import check_gram_size, choose_blocks
from gradscale.run.leave_out_training import Training, describe, train_for_gram, train_full, train_without
from gradscale.run.linearize import check_by_outputs, linearize
from gradscale.run.shard import prepare
from gradscale.task import TensorExamples

TOLERANCE = 1e-12


@dataclass(frozen=True)
class Linear:
    """A linear model from weights zero, with loss (f - y)^2 / 2."""

    rows: tuple[tuple[float, ...], ...]
    targets: tuple[float, ...]

    def model(self, checkpoint: str | None) -> nn.Module:
        model = nn.Linear(len(self.rows[0]), 1, bias=False).double().eval()
        nn.init.zeros_(model.weight)
        return model

    def examples(self) -> TensorExamples:
        wide = torch.float64
        return TensorExamples(x=torch.tensor(self.rows, dtype=wide), y=torch.tensor(self.targets, dtype=wide))

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return (model(batch["x"])[:, 0] - batch["y"]).square() / 2


@dataclass(frozen=True)
class Classes:
    """A network with C = 3 outputs and cross-entropy; `penalty` of its weights goes into the losses."""

    n: int = 6
    penalty: float = 0.0
    single: bool = False  # in float32

    def model(self, checkpoint: str | None) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(3)
            net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
        return net if self.single else net.double()

    def examples(self) -> TensorExamples:
        x = torch.randn(self.n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        return TensorExamples(x=x.float() if self.single else x, label=torch.arange(self.n) * 5 % 7 % 3)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        losses = nn.functional.cross_entropy(model(batch["x"]), batch["label"], reduction="none")
        return losses + self.penalty * sum(p.square().sum() for p in model.parameters())


@dataclass(frozen=True)
class Twice(Classes):
    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return super().losses(model, batch) + model(batch["x"]).square().sum(dim=1)


@dataclass(frozen=True)
class TwoOutputs(Classes):
    def model(self, checkpoint: str | None) -> nn.Module:
        return Pair()

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["x"])[0].square().sum(dim=1)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), x


@dataclass(frozen=True)
class Dying:
    """`Classes`, whose process dies in the middle of a training, the first `times` times."""

    folder: str
    times: int

    def model(self, checkpoint: str | None) -> nn.Module:
        return Classes().model(checkpoint)

    def examples(self) -> TensorExamples:
        return Classes().examples()

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        dead = len(list(Path(self.folder).glob("dead-*")))
        if len(batch["x"]) == 5 and dead < self.times:  # without one of the six
            (Path(self.folder) / f"dead-{os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Classes().losses(model, batch)


def regression(n: int, p: int, seed: int = 0) -> Linear:
    values = np.random.default_rng(seed).uniform(-1.7, 1.7, size=(n, p + 1))
    return Linear(tuple(map(tuple, values[:, :p].tolist())), tuple(values[:, p].tolist()))


def run_here(task: object, eta: float, steps: int, blocks: Sequence[Sequence[int]] | None = None) -> GapPath:
    """The trainings in this process, one after another."""
    n = len(task.examples())
    chosen = tuple(map(tuple, blocks)) if blocks is not None else tuple((i,) for i in range(n))
    training = Training(task, None, n, eta, steps, chosen)
    left_out = [train_without(training, b) for b in range(len(chosen))]
    return gap_path(train_full(training), left_out, n, len(chosen[0]), eta, TOLERANCE)


def gram_here(task: object, path: GapPath, eta: float, steps: int) -> EffectiveGramMatrix:
    rates, lost = rates_for_gram(path, TOLERANCE)
    assert lost is None
    return train_for_gram(Training(task, None, len(task.examples()), eta, steps), rates)


# The definition, by a loop: one backward pass an example, n + 1 models side by side.


def gradients(task: object, model: nn.Module) -> tuple[Tensor, Tensor]:
    """[n] losses and [n, P] gradients."""
    examples, rows, losses = task.examples(), [], []
    for i in range(len(examples)):
        (loss,) = task.losses(model, examples.batch(range(i, i + 1)))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
        losses.append(loss.detach())
    return torch.stack(losses), torch.stack(rows)


def descend(model: nn.Module, gradient: Tensor, eta: float) -> None:
    with torch.no_grad():
        for p, part in zip(model.parameters(), gradient.split([p.numel() for p in model.parameters()]), strict=True):
            p -= eta * part.view_as(p)


def by_definition(task: object, eta: float, steps: int, blocks: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
    """At every step: delta, tr Sigma / n, eps_bar and c_bar delta of the blocks."""
    n = len(task.examples())
    full = task.model(None)
    models = [copy.deepcopy(full) for _ in blocks]
    found = []
    for _ in range(steps + 1):
        losses, g = gradients(task, full)
        covariance = float(((g - g.mean(dim=0)) ** 2).sum()) / (n - 1)
        rows = []
        for block, model in zip(blocks, models, strict=True):
            inside, others = list(block), [i for i in range(n) if i not in block]
            l_minus, g_minus = gradients(task, model)
            mine, rest = g[inside].mean(dim=0), g[others].mean(dim=0)
            gap = float((l_minus - losses)[inside].mean())
            source = len(inside) / n * float(mine @ (mine - rest))
            sink = float(g_minus[inside].mean(dim=0) @ g_minus[others].mean(dim=0) - mine @ rest)
            rows.append((gap, source, sink))
            descend(model, g_minus[others].mean(dim=0), eta)
        gap, source, sink = np.mean(rows, axis=0)
        found.append((gap, covariance / n, source, sink))
        descend(full, g.mean(dim=0), eta)
    return found


@pytest.mark.parametrize("blocks", [[(i,) for i in range(6)], [(1, 4), (0, 3)], [(5, 0, 2)]])
def test_every_column_is_the_definition(blocks):
    eta, steps = 0.3, 7
    path = run_here(Classes(), eta, steps, blocks)
    expected = torch.tensor(by_definition(Classes(), eta, steps, blocks), dtype=torch.float64)
    found = torch.stack([path.gap, path.perturbation, path.perturbation_left_out, path.contraction * path.gap], dim=1)
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(found[0, :3], expected[0, :3], rtol=1e-9, atol=1e-13)
    assert path.contraction[0].isnan()  # 0 / 0
    assert expected[0, 3] == pytest.approx(0, abs=1e-15)
    sums = eta * expected[:steps].sum(dim=0)
    assert path.perturbation_integral[-1] == pytest.approx(float(sums[1]))
    assert path.perturbation_left_out_integral[-1] == pytest.approx(float(sums[2]))
    assert path.contraction_integral[-1] == pytest.approx(float(sums[3]))
    assert path.closure_error[-1] == pytest.approx(abs(float(expected[-1, 0] - sums[2] + sums[3])))


def test_data_and_weights_in_float32_are_trained_in_float64():
    wide = Classes(single=True)
    path = run_here(wide, 0.3, 3)
    model, x = wide.model(None).double(), wide.examples().tensors["x"].double()
    losses = wide.losses(model, {"x": x, "label": wide.examples().tensors["label"]})
    assert path.loss[0] == pytest.approx(float(losses.mean().detach()), rel=1e-14)
    assert path.gap[0] == 0


# Golden values.


def test_orthonormal_inputs_contract_nothing():
    """c = 0, delta(t) = (sum y^2 / 2n) (1 - e^(-2t/n)), K_inf = I / 2n; their exact values at finite steps."""
    y, n, eta, steps = (1.0, -0.5, 2.0), 3, 0.02, 250
    task = Linear(tuple(map(tuple, torch.eye(3, 4).tolist())), y)
    path = run_here(task, eta, steps)
    energy = sum(v * v for v in y) / (2 * n)
    times = torch.arange(steps + 1, dtype=torch.float64)
    kept = (1 - eta / n) ** (2 * times)
    torch.testing.assert_close(path.gap, energy * (1 - kept), rtol=1e-10, atol=1e-13)
    flow = energy * (1 - torch.exp(-2 * eta * times / n))
    torch.testing.assert_close(path.gap, flow, rtol=0, atol=energy * eta / n)
    assert path.contraction[1:].abs().max() < 1e-12

    gram = gram_here(task, path, eta, steps)
    level = float((1 - kept[-1]) / (1 - eta / (2 * n))) / (2 * n)  # I / 2n as T grows and eta falls
    torch.testing.assert_close(gram.matrix, level * torch.eye(n, dtype=torch.float64), rtol=1e-10, atol=1e-13)
    assert level == pytest.approx((1 - math.exp(-2 * eta * steps / n)) / (2 * n), rel=2 * eta)
    assert gram.gap == pytest.approx(float(path.perturbation_integral[-1]), rel=1e-10)
    torch.testing.assert_close(gram.residual, -torch.tensor(y, dtype=torch.float64))
    assert gram.shares.sum() == pytest.approx(1)


def test_a_duplicate_takes_the_place_of_what_is_left_out():
    """Leaving out one of two equal examples leaves no gap in the end, leaving out both does."""
    y = (1.0, -0.5, 1.0, -0.5)
    task = Linear(((1.0, 0.0), (0.0, 1.0)) * 2, y)
    single = run_here(task, 0.5, 150)
    assert single.gap.max() > 0.01
    assert single.gap[-1] < 1e-12
    both = run_here(task, 0.5, 150, [(0, 2), (1, 3)])
    assert both.gap[-1] == pytest.approx((1 + 0.25) / 4)


@pytest.mark.parametrize(("kind", "end"), [("real", 1 / 32), ("random", 1 / 2)])
def test_toys_of_equal_perturbation_differ_by_contraction(kind, end):
    path = run_here(Toy(kind), 0.5, 120)
    assert path.perturbation[0] == pytest.approx(0.25)
    assert path.gap[-1] == pytest.approx(end, rel=1e-6)
    assert (abs(float(path.contraction_integral[-1])) > 1e-12) == (kind == "real")


def test_regression_closes_and_is_the_quadratic_form():
    """|delta - r0' K r0| and the closure error at time 3 fall as eta, and are a few percent at the smallest."""
    task, time = regression(6, 4), 3.0
    closures, forms = [], []
    for steps in (30, 60, 120):
        path = run_here(task, time / steps, steps)
        gram = gram_here(task, path, time / steps, steps)
        gap = float(path.gap[-1])
        closures.append(float(path.closure_error[-1]) / gap)
        forms.append(abs(gram.gap - gap) / gap)
    assert closures[2] < 0.05
    assert forms[2] < 0.05
    for errors in (closures, forms):
        ratios = [before / after for before, after in itertools.pairwise(errors)]
        assert ratios == [pytest.approx(2, rel=0.25)] * 2, errors


def test_a_softmax_network_closes_as_the_steps_get_small():
    closures, forms = [], []
    for steps in (20, 40, 80):
        path = run_here(Classes(), 4.0 / steps, steps)
        closures.append(float(path.closure_error[-1]))
        gram = gram_here(Classes(), path, 4.0 / steps, steps)
        forms.append(abs(gram.gap - float(path.gap[-1])))
        assert gram.eigenvalues.min() > -1e-12
    assert closures[0] / closures[1] == pytest.approx(2, rel=0.2)
    assert closures[1] / closures[2] == pytest.approx(2, rel=0.1)
    assert forms[0] / forms[2] == pytest.approx(4, rel=0.4)


# The dense algebra.


def dense_point(task: object, model: nn.Module) -> Linearized:
    """By torch.func and finite shapes: the Jacobian of all outputs as one matrix."""
    batch = task.examples().batch(range(len(task.examples())))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    f = torch.func.functional_call(model, parameters, (batch["x"],))
    found = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (batch["x"],)))(parameters)
    jacobians = torch.cat([part.flatten(2) for part in found.values()], dim=2)
    labels = nn.functional.one_hot(batch["label"], f.shape[1]).double()
    s = f.softmax(dim=1)
    return Linearized(jacobians, s - labels, torch.diag_embed(s) - s[:, :, None] * s[:, None, :])


def test_linearize_is_the_dense_derivative():
    subject = prepare(Classes(), None, None)
    found = linearize(subject, load_batch(subject, range(6)))
    for part, expected in zip(found, dense_point(Classes(), subject.model), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-14)


def test_the_perturbation_is_a_quadratic_form_of_the_residual():
    point = dense_point(Classes(), Classes().model(None))
    form = perturbation_matrix(point.jacobians)
    r = point.residuals.flatten()
    _, g = gradients(Classes(), Classes().model(None))
    assert float(r @ form @ r) == pytest.approx(float(((g - g.mean(dim=0)) ** 2).sum()) / (6 * 5))
    assert torch.linalg.eigvalsh(form).min() > -1e-12
    expected = torch.zeros(18, 18, dtype=torch.float64)  # entry by entry
    J = point.jacobians.reshape(18, -1)
    for a, b in itertools.product(range(18), repeat=2):
        expected[a, b] = float(J[a] @ J[b]) * ((a // 3 == b // 3) - 1 / 6) / 30
    torch.testing.assert_close(form, expected)


def test_the_gram_matrix_is_the_integral():
    """Against products of P and sums over steps written out, on random points that belong to no model."""
    draw = torch.Generator().manual_seed(0)
    n, C, P, T, eta = 3, 2, 5, 4, 0.2
    path = [
        Linearized(
            torch.randn(n, C, P, dtype=torch.float64, generator=draw),
            torch.randn(n, C, dtype=torch.float64, generator=draw),
            torch.stack([m @ m.mT for m in torch.randn(n, C, C, dtype=torch.float64, generator=draw)]),
        )
        for _ in range(T)
    ]
    rates = torch.rand(T, dtype=torch.float64, generator=draw)
    expected = torch.zeros(n * C, n * C, dtype=torch.float64)
    for t in range(T):
        carried = torch.eye(n * C, dtype=torch.float64)
        for point in path[:t]:
            J = point.jacobians.reshape(n * C, P)
            carried = (torch.eye(n * C) - eta / n * torch.block_diag(*point.hessians) @ J @ J.mT) @ carried
        decay = math.exp(-eta * float(rates[t + 1 :].sum()))
        expected += eta * decay * carried.mT @ perturbation_matrix(path[t].jacobians) @ carried
    found = effective_gram(path, rates, eta)
    torch.testing.assert_close(found.matrix, expected)
    r = path[0].residuals.flatten()
    assert found.gap == pytest.approx(float(r @ expected @ r))
    assert float((found.eigenvalues * found.shares).sum() * (r @ r)) == pytest.approx(found.gap)
    assert (found.eigenvalues.diff() <= 0).all()


# Blocks, and the error of their means.


def test_the_perturbation_of_a_random_block_has_the_same_expectation():
    task = regression(5, 3)
    for s in (1, 2, 3):
        found = [train_full(Training(task, None, 5, 0.1, 1, (block,))) for block in itertools.combinations(range(5), s)]
        of_blocks = [float(one.changes_without[1, 0] - one.changes[1, 0]) / 0.1 for one in found]
        assert np.mean(of_blocks) == pytest.approx(float(found[0].trace_covariance[1]) / 5)
        assert np.std(of_blocks) > 1e-3


def gaps_of_all_blocks(task: Linear, blocks: Sequence[Sequence[int]], eta: float, steps: int) -> Tensor:
    """[blocks]: the gap of every block, all trainings side by side; the model is linear."""
    x, y = task.examples().tensors["x"], task.examples().tensors["y"]
    inside = torch.zeros(len(blocks), len(y), dtype=torch.float64)
    for row, block in zip(inside, blocks, strict=True):
        row[list(block)] = 1
    weights = torch.cat([(1 - inside) / (1 - inside).sum(dim=1, keepdim=True), torch.full((1, len(y)), 1 / len(y))])
    w = torch.zeros(len(weights), x.shape[1], dtype=torch.float64)
    for _ in range(steps):
        w = w - eta * (weights * (w @ x.mT - y)) @ x
    losses = (w @ x.mT - y).square() / 2
    return ((losses[:-1] - losses[-1]) * inside).sum(dim=1) / inside.sum(dim=1)


def test_gaps_of_all_blocks_are_those_of_the_trainings():
    task, blocks = regression(6, 3), [(0, 4), (1, 5)]
    expected = run_here(task, 0.2, 9, blocks).gaps[-1]
    torch.testing.assert_close(gaps_of_all_blocks(task, blocks, 0.2, 9), expected)


@pytest.mark.parametrize(("n", "s", "K"), [(200, 1, 80), (100, 1, 50), (120, 2, 20), (120, 2, 60)])
def test_the_standard_error_covers_the_mean_over_all_blocks(n, s, K):
    """In 68 % and 95 % of 1000 seeds; more where blocks of two use most examples up. The truth: all n choose s."""
    task, seeds = regression(n, 4, seed=1), 1000
    blocks = list(itertools.combinations(range(n), s))
    gaps = dict(zip(blocks, gaps_of_all_blocks(task, blocks, 0.2, 20).tolist(), strict=True))
    truth = np.mean(list(gaps.values()))
    drawn = torch.tensor(
        [[gaps[block] for block in choose_blocks(n, K, s, seed)] for seed in range(seeds)], dtype=torch.float64
    )
    off = (drawn.mean(dim=1) - truth).abs() / sampling_error(drawn, n, s)
    for limit, rate in ((1, 0.683), (2, 0.954)):
        covered = float((off < limit).double().mean())
        allowed = 4 * math.sqrt(rate * (1 - rate) / seeds)
        assert rate - allowed < covered, (limit, covered)
        assert covered < rate + allowed or (s > 1 and s * K > n / 2), (limit, covered)


def test_blocks_are_disjoint_and_drawn_by_the_seed():
    drawn = choose_blocks(11, None, 3, 5)
    assert len(drawn) == 3
    assert all(block == tuple(sorted(block)) and len(block) == 3 for block in drawn)
    assert len({i for block in drawn for i in block}) == 9
    assert choose_blocks(11, 2, 3, 5) == drawn[:2]
    assert choose_blocks(11, None, 3, 6) != drawn
    assert choose_blocks(4, None, 1, 5) == ((0,), (1,), (2,), (3,)) == choose_blocks(4, 4, 1, 6)


def test_estimates_say_what_is_exact():
    exact = run_here(regression(4, 2), 0.1, 3)
    estimates = path_estimates(exact, 4, 1, "about") | gram_estimate(0.5, exact, 4, 1, "about")
    assert all(e.stderr is None and e.n == 4 for e in estimates.values())
    assert estimates["gap", "all"].status == "identity"
    assert estimates["gram_gap", "all"].status == "conditional"
    assert "found" in estimates["gap", "all"].definition
    assert "reconstructed" in estimates["contraction", "all"].definition

    sampled = run_here(regression(4, 2), 0.1, 3, [(2,), (0,)])
    estimates = path_estimates(sampled, 4, 1, "about") | gram_estimate(0.5, sampled, 4, 1, "about")
    gaps = sampled.gaps[-1]
    error = math.sqrt(float((gaps - gaps.mean()).square().sum()) / 2 * (1 - 2 / 4))
    assert estimates["gap", "all"][:4] == (pytest.approx(float(gaps.mean())), pytest.approx(error), 2, "estimator")
    assert estimates["perturbation", "all"].stderr is None
    assert math.isnan(estimates["gram_gap", "all"].stderr)
    assert sampling_error(torch.ones(3, 1), 4, 2).isnan().all()


# Whole runs on Ray.

SETTINGS = {"learning_rate": 0.3, "steps": 6, "every": 4, "gram": True}


@pytest.fixture(scope="module")
def undisturbed(local_ray, tmp_path_factory) -> tuple[gs.LeaveOutGap, dict[str, bytes]]:
    out = tmp_path_factory.mktemp("leave-out") / "one"
    return gs.leave_out_gap(Classes(), str(out), workers=1, **SETTINGS), contents(out)


def test_a_run_is_the_trainings(undisturbed):
    found, _ = undisturbed
    path = run_here(Classes(), 0.3, 6)
    assert found.trajectory["step"].tolist() == [0, 4, 6]
    assert found.trajectory["time"].tolist() == [0.0, pytest.approx(1.2), pytest.approx(1.8)]
    assert found.trajectory["gap"].tolist() == pytest.approx(path.gap[[0, 4, 6]].tolist(), rel=1e-9)
    assert found.estimates["gap", "all"].value == pytest.approx(float(path.gap[-1]), rel=1e-9)
    assert found.gaps.shape == (3, 6)
    assert found.gram is not None
    assert found.estimates["gram_gap", "all"].value == pytest.approx(found.gram.gap)


def test_the_tables_are_parquet_with_units(undisturbed, tmp_path):
    found, files = undisturbed
    for name in ("trajectory.parquet", "estimates.parquet", "gram.parquet"):
        (tmp_path / name).write_bytes(files[name])
    trajectory = pq.read_table(tmp_path / "trajectory.parquet")
    assert trajectory["gap"].to_pylist() == found.trajectory["gap"].tolist()
    assert trajectory["gap_stderr"].to_pylist() == [None] * 3
    assert math.isnan(trajectory["contraction"].to_pylist()[0])
    assert trajectory.schema.field("contraction").metadata[b"unit"] == b"1 / time"
    rows = pq.read_table(tmp_path / "estimates.parquet").to_pylist()
    assert {row["name"]: row["value"] for row in rows}["gap"] == found.estimates["gap", "all"].value
    assert {(row["measure"], row["step"]) for row in rows} == {("leave_out", 6)}
    assert pq.read_table(tmp_path / "gram.parquet")["share"].to_pylist() == found.gram.shares.tolist()


def test_two_workers_write_the_same_bytes(undisturbed, tmp_path):
    gs.leave_out_gap(Classes(), str(tmp_path / "two"), workers=2, **SETTINGS)
    assert contents(tmp_path / "two") == undisturbed[1]


def test_a_worker_that_dies_changes_nothing(undisturbed, tmp_path):
    found = gs.leave_out_gap(Dying(str(tmp_path), times=2), workers=2, **SETTINGS)
    assert len(list(tmp_path.glob("dead-*"))) >= 2
    assert torch.equal(found.gaps, undisturbed[0].gaps)
    assert found.trajectory.equals(undisturbed[0].trajectory)


@pytest.mark.slow
def test_a_training_that_kills_every_worker_is_given_up(local_ray, tmp_path):
    with pytest.raises(gs.GradscaleError, match=r"a task must outlive its item, got 4 processes that died of 0"):
        gs.leave_out_gap(Dying(str(tmp_path), times=99), workers=1, learning_rate=0.3, steps=1)


def test_what_is_finished_is_kept(undisturbed, tmp_path):
    out = tmp_path / "run"
    for name, content in undisturbed[1].items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    (out / "trainings" / "without-00003.safetensors").unlink()
    (out / "trainings" / "full.safetensors.123.tmp").write_bytes(b"half")
    (out / "gram.parquet").unlink()
    kept = (out / "trainings" / "full.safetensors").stat().st_mtime_ns
    told: list[tuple[int, int]] = []
    found = gs.leave_out_gap(Classes(), str(out), workers=2, on_progress=lambda *now: told.append(now), **SETTINGS)
    assert told == [(6, 7), (7, 7)]
    assert contents(out) == undisturbed[1]
    assert (out / "trainings" / "full.safetensors").stat().st_mtime_ns == kept
    assert torch.equal(found.gram.matrix, undisturbed[0].gram.matrix)


def test_another_plan_is_refused_with_the_difference(undisturbed, tmp_path):
    out = tmp_path / "run"
    gs.leave_out_gap(Classes(), str(out), workers=2, learning_rate=0.3, steps=1)
    before = contents(out)
    with pytest.raises(
        gs.GradscaleError, match=r"must be those of the trainings that .*\n  steps: 1 in the folder, 2 now"
    ):
        gs.leave_out_gap(Classes(), str(out), workers=2, learning_rate=0.3, steps=2)
    with pytest.raises(gs.GradscaleError, match=r"data_fingerprint: "):
        gs.leave_out_gap(Classes(single=True), str(out), workers=2, learning_rate=0.3, steps=1)
    assert contents(out) == before


def test_a_folder_of_something_else_is_refused(local_ray, tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(gs.GradscaleError, match=r"out must be a new folder, an empty one or one of leave_out_gap, got"):
        gs.leave_out_gap(Classes(), str(tmp_path), steps=1)


def test_a_task_that_cannot_be_pickled_is_refused(local_ray):
    with pytest.raises(
        gs.GradscaleError, match=r"task must be picklable, got TypeError: .*; open files and connections"
    ):
        gs.leave_out_gap(WithLock(), steps=1)


def test_divergence_names_the_step_and_the_training(local_ray):
    with pytest.raises(gs.GradscaleError, match=r"losses must stay finite, got .* at step \d+ of the training"):
        gs.leave_out_gap(regression(3, 2), learning_rate=1e200, steps=9, workers=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be a finite number above 0, got -1.0; "),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number above 0, got nan; "),
        ({"tolerance": -1.0}, "tolerance must be a finite number of at least 0, got -1.0; "),
        ({"every": 0}, "every must be a whole number of at least 1"),
        ({"block_size": 0}, "block_size must be a whole number of at least 1"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(wrong, message):
    with pytest.raises(gs.GradscaleError, match=message):
        gs.leave_out_gap(Classes(), **wrong)


@pytest.mark.parametrize(
    ("blocks", "size", "message"),
    [
        (None, 6, "block_size must be less than the number of examples, 6, got 6; "),
        (4, 2, "blocks must be at most 3, the disjoint blocks of 2 in 6 examples, got 4; "),
        (0, 2, "blocks must be a whole number of at least 1, got 0"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(blocks, size, message):
    with pytest.raises(gs.GradscaleError, match=message):
        choose_blocks(6, blocks, size, 0)


@pytest.mark.parametrize("examples", [1, 7])
def test_examples_that_are_not_there_are_refused(examples):
    with pytest.raises(
        gs.GradscaleError, match=f"examples must be from 2 to the 6 that the task has, got {examples}; "
    ):
        describe(Training(Classes(), None, examples, 0.1, 1), False)


def test_what_has_no_gram_matrix_is_refused():
    with pytest.raises(gs.GradscaleError, match="the losses must call the model once for K_n, got 2 calls; "):
        describe(Training(Twice(), None, None, 0.1, 1), True)
    with pytest.raises(gs.GradscaleError, match="the model must give one tensor with 1 rows for K_n, got tuple; "):
        describe(Training(TwoOutputs(), None, None, 0.1, 1), True)
    with pytest.raises(gs.GradscaleError, match=r"examples times outputs must be at most 2000 .* got 700 times 3; "):
        check_gram_size(700, 3)
    with pytest.raises(gs.GradscaleError, match=r"by the model's output alone for K_n, got a gradient .* off; "):
        train_for_gram(Training(Classes(penalty=0.1), None, 6, 0.1, 1), torch.zeros(1))
    subject = prepare(Classes(), None, None)
    point = linearize(subject, load_batch(subject, range(6)))
    check_by_outputs(point, gradients(Classes(), subject.model)[1].sum(dim=0))


def test_a_gap_that_vanishes_has_no_gram_matrix(local_ray):
    task = Linear(((1.0, 0.0), (0.0, 1.0)) * 2, (1.0, -0.5, 1.0, -0.5))
    with pytest.raises(gs.GradscaleError, match=r"gap must stay above tolerance 0.01 for K_n, got .* at step \d+: "):
        gs.leave_out_gap(task, learning_rate=0.5, steps=40, gram=True, tolerance=0.01)


def test_constant_residuals_have_no_curvature():
    """A loss linear in the output, whose residuals depend on nothing."""

    @dataclass(frozen=True)
    class Slope(Linear):
        def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            return model(batch["x"])[:, 0] * batch["y"]

    inner = regression(3, 2)
    subject = prepare(Slope(inner.rows, inner.targets), None, None)
    point = linearize(subject, load_batch(subject, range(3)))
    assert not point.hessians.any()
    torch.testing.assert_close(point.residuals[:, 0], inner.examples().tensors["y"])


def test_the_job_prints_what_it_found(local_ray, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("leave_out_job", FOLDER.parent / "jobs" / "leave_out.py")
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    arguments = ["--task", "problems:Toy", "--learning-rate", "0.5", "--steps", "20", "--every", "10", "--gram"]
    assert job.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "5/5 trainings" in printed
    assert "gram_gap" in printed
    assert "of r(0) in the lower half" in printed
    assert job.main([*arguments, "--steps", "0"]) == 2
    assert "steps must be a whole number" in capsys.readouterr().err


def test_the_models_of_a_task_are_not_trained():
    """Of a task, that is, which gives the same model at every call."""
    net, tensors = Classes().model(None), Classes().examples().tensors
    task = ModelAtHand(net, tensors, Classes().losses)
    before = copy.deepcopy(net.state_dict())
    found = run_here(task, 0.3, 3)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert torch.equal(found.gaps, run_here(Classes(), 0.3, 3).gaps)
