"""Promise: stiffness against distance is that of every pair of examples, by where their inputs lie.

Runs are written by the store itself, with sketches and inputs made up for the purpose. Shapes: n examples, M bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import Toy
from test_stored_sketches import write_run
from torch import Tensor, nn

import gradscale as gs
from gradscale.run import stiffness_distance
from gradscale.run.stiffness_distance import Binned, crossing, merge_binned
from gradscale.tasks.digits import Digits
from gradscale.tasks.pretrained import mean_embedding

N, P, DIM = 60, 12, 5
EXACT = {"name": "identity", "version": 1, "seed": 0, "dim": P}
Array = np.ndarray[Any, np.dtype[np.float64]]


class Unnamed(gs.TensorExamples):
    """Of the fingerprint that runs made up by `write_run` have."""

    def fingerprint(self) -> str:
        return ""


@dataclass(frozen=True, eq=False)
class Points:
    """Examples that lie at `x`."""

    x: Tensor

    def model(self, checkpoint: str | None) -> nn.Module:
        return nn.Identity()

    def examples(self) -> gs.TensorExamples:
        return Unnamed(x=self.x)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def input_vectors(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["x"]


def data(seed: int = 0) -> tuple[Array, Array]:
    """Gradients [n, P] that fall off with the distance of the inputs [n, DIM]."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((N, DIM))
    g = np.concatenate([x, generator.standard_normal((N, P - DIM))], axis=1)
    return g.astype("float32").astype(float), x


def written(folder: Path, g: Array, **settings: Any) -> gs.Run:
    norms = np.square(g).sum(axis=1)
    return write_run(folder, {0: g.astype("float32")}, scheme=EXACT, sq_norms=norms, shard=25, **settings)


def pairs(g: Array, x: Array, kept: Array) -> dict[str, Array]:
    """Every pair of kept examples once: its distance, cosine, sign, and whether it is of one class (id mod 3)."""
    first, second = (kept[part] for part in np.triu_indices(len(kept), 1))
    inner = (g[first] * g[second]).sum(axis=1)
    lengths = np.linalg.norm(g, axis=1)
    far = (x[first] * x[second]).sum(axis=1) / np.linalg.norm(x[first], axis=1) / np.linalg.norm(x[second], axis=1)
    return {
        "distance": 1 - far,
        "cos": inner / (lengths[first] * lengths[second]),
        "sign": np.sign(inner),
        "within": first % 3 == second % 3,
    }


@pytest.mark.parametrize("block", [7, 1024])
def test_bins_are_those_of_every_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(stiffness_distance, "BLOCK", block)
    g, x = data()
    g[[4, 30]], x[[11, 30]], x[12] = 0.0, 0.0, math.nan
    run = written(tmp_path / "run", g, nonfinite=(7,))
    kept = np.flatnonzero(~np.isin(np.arange(N), [4, 7, 11, 12, 30]))
    exact = pairs(g, x, kept)
    found = gs.stiffness_by_distance(run, Points(torch.from_numpy(1e3 * x)), 0, bins=8, draws=50)
    assert (found.n, found.zero_gradients, found.zero_inputs) == (len(kept), 2, 2)
    assert len(found.bins) == 2 * 2 * 8
    for one in found.bins:
        inside = (exact["distance"] >= one.low) & (exact["distance"] < one.high)
        inside &= exact["within"] if one.pairs == "within" else True
        assert one.number == inside.sum()
        if one.number:
            assert one.distance == pytest.approx(exact["distance"][inside].mean())
            assert one.stiffness == pytest.approx(exact[one.kind][inside].mean())
    for kind, length in found.critical_length.items():
        own = exact["within"]
        slope, intercept = np.polyfit(exact["distance"][own], exact[kind][own], 1)
        assert (length.slope, length.intercept) == (pytest.approx(slope), pytest.approx(intercept))
        assert length.length.value == pytest.approx(-intercept / slope)
        assert length.observed == pytest.approx((exact["distance"][own].min(), exact["distance"][own].max()))
        assert length.interval[0] < length.length.value < length.interval[1]
        assert length.length.stderr is not None
        assert 0 < length.length.stderr < 1
        assert (length.length.n, length.length.status) == (len(kept), "heuristic")


def test_distance_is_that_of_inputs_not_of_gradients(tmp_path: Path) -> None:
    """A trap: with 1 - cos(g_1, g_2) for the distance, stiffness would be compared with itself."""
    x = np.concatenate([np.eye(DIM), -np.eye(DIM)])  # distances 1 and 2
    run = written(tmp_path / "run", np.ones((len(x), P)))
    found = gs.stiffness_by_distance(run, Points(torch.from_numpy(x)), 0, bins=4, draws=5)
    counts = {(one.low, one.pairs): one.number for one in found.bins if one.kind == "cos" and one.number}
    assert counts[1.0, "all"] == 40
    assert counts[1.5, "all"] == 5  # a distance of 2 is in the last bin
    assert all(one.stiffness == pytest.approx(1.0) for one in found.bins if one.number)
    for length in found.critical_length.values():
        assert math.isnan(length.length.value)  # a line at 1 crosses nowhere
        assert all(math.isnan(end) for end in length.interval)
        assert length.without_crossing == 1.0


def sums_of(distance: Array, stiffness: Array) -> Tensor:
    columns = [np.ones_like(distance), distance, distance**2, stiffness, stiffness * distance]
    return torch.tensor([column.sum() for column in [*columns, *columns[3:]]], dtype=torch.float64)


@pytest.mark.parametrize(("slope", "low", "high", "zero"), [(-0.5, 0.2, 1.5, 1.2), (-0.5, 0.2, 1.0, math.nan)])
def test_a_crossing_lies_within_the_observed_distances(slope: float, low: float, high: float, zero: float) -> None:
    distance = np.linspace(low, high, 9)
    ends = (torch.tensor(end, dtype=torch.float64) for end in (low, high))
    found = crossing(sums_of(distance, 0.6 + slope * distance), 1, *ends)
    assert float(found) == pytest.approx(zero, nan_ok=True)


def test_pairs_at_one_distance_have_no_line() -> None:
    one = torch.tensor(0.5, dtype=torch.float64)
    assert math.isnan(float(crossing(sums_of(np.full(5, 0.5), np.linspace(-1, 1, 5)), 0, one, one)))


def binned_of(g: Array, x: Array, blocks: int) -> Binned:
    """Of one class, by the sums that streaming makes."""
    first, second = np.triu_indices(len(g), 1)
    exact = pairs(g, x, np.arange(len(g)))
    place = torch.from_numpy((first * blocks // len(g)) * blocks + second * blocks // len(g))
    distance, cos, sign = (torch.from_numpy(exact[name]) for name in ("distance", "cos", "sign"))
    everyone = torch.ones(len(distance), dtype=torch.bool)
    halves = [slice(None, len(distance) // 3), slice(len(distance) // 3, None)]
    parts = [
        stiffness_distance._one_block(distance[h], (cos[h], sign[h]), place[h], everyone[h], blocks, 4) for h in halves
    ]
    return merge_binned(*parts)


def test_intervals_hold_the_true_crossing() -> None:
    """Inputs on a circle, the gradient at twice the angle: over fresh samples, 95 % of the intervals, or nearly."""

    def draw(n: int) -> tuple[Array, Array]:
        angle = generator.uniform(0, math.pi, n)
        noise = 0.5 * generator.standard_normal((n, 3))
        g = np.stack([np.cos(2 * angle), np.sin(2 * angle), np.zeros(n)], axis=1) + noise
        return g, np.stack([np.cos(angle), np.sin(angle)], axis=1)

    generator = np.random.default_rng(0)
    many = binned_of(*draw(1500), 1)
    truth = float(crossing(many.sums[1].sum(dim=(0, 1, 2)), 0, many.lowest, many.highest))
    inside = 0
    for seed in range(200):
        binned = binned_of(*draw(60), 30)
        repeated = list(stiffness_distance._repeated(binned.sums, 200, seed))
        low, high = stiffness_distance._critical_length(binned, repeated, 0, 60).interval
        inside += low <= truth <= high
    assert 179 <= inside < 200  # 190 less three and a half binomial deviations; not all of them


def test_a_run_without_labels_and_chosen_examples(local_ray: None, tmp_path: Path) -> None:
    class Placed(Toy):
        def input_vectors(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            return batch["x"]

    run = gs.measure(Toy(), str(tmp_path / "run"), measures=[], sketch="identity", microbatch=2, shard_size=2)
    found = gs.stiffness_by_distance(run, Placed(), 0, bins=4, ids=[0, 1, 3], draws=3)
    assert found.critical_length == {}
    assert found.n == 3
    kept = [one for one in found.bins if one.number and one.kind == "cos"]
    assert sum(one.number for one in kept) == 3
    assert {one.pairs for one in kept} == {"all"}
    assert all(one.stiffness == pytest.approx(0.5) for one in kept)


def test_what_is_refused(tmp_path: Path) -> None:
    g, x = data()
    run, points = written(tmp_path / "run", g), torch.from_numpy(x)

    class Flat(Points):
        def input_vectors(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            return batch["x"][:, 0]

    class WithoutInputs:
        model, examples, losses = Points.model, Points.examples, Points.losses
        x = points

    for message, ask in {
        r"needs task.input_vectors\(model, batch\) -> \[B, d\], got a task without it": (WithoutInputs(), {}),
        r"task must have the examples that were measured in .*, got others": (Points(points[:50]), {}),
        r"task.input_vectors must return floating-point numbers of shape \(32, d\), got torch.float64 .*\(32,\)": (
            Flat(points),
            {},
        ),
        r"inputs must have a direction, got none": (Points(0 * points), {}),
        r"bins must be a whole number of at least 1, got 0": (Points(points), {"bins": 0}),
    }.items():
        task, settings = ask
        with pytest.raises(gs.GradscaleError, match=message):
            gs.stiffness_by_distance(run, task, 0, **settings)  # type: ignore[arg-type]


def test_inputs_of_ready_tasks() -> None:
    images = torch.randn(3, 8, 8)
    assert torch.equal(Digits().input_vectors(nn.Identity(), {"image": images}), images.reshape(3, 64))

    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 2)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

    model = Embedding()
    ids, mask = torch.tensor([[1, 2, 0], [3, 3, 4]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    found = mean_embedding(model, ids, mask)
    torch.testing.assert_close(found[0], model.table.weight[[1, 2]].mean(dim=0))
    torch.testing.assert_close(found[1], model.table.weight[[3, 3, 4]].mean(dim=0))
