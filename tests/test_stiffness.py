"""Promise: stiffness is the mean cosine, or sign, over pairs of different examples, with an honest error over examples.

The oracle is dense: per-example gradients by autograd on single examples, in float64, and every pair of them. Shapes:
n examples, C classes, P entries of all parameters, J jackknife blocks, K sketch.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from conftest import contents
from problems import ModelAtHand, SelfAttention, Toy, gradients_one_by_one
from run_problems import Regression
from test_stored_sketches import write_run
from torch import Tensor, nn
from torch.nn import functional as F

import gradscale as gs
from gradscale.grads.readings import GradientSums
from gradscale.measures.jackknife import jackknife_errors
from gradscale.measures.measure import Estimate, MicroBatch
from gradscale.measures.pairs import means_within
from gradscale.measures.stiffness import Stiffness, cosines_between
from gradscale.measures.unit_sums import UnitState, UnitSumsStatistic
from gradscale.report.html import write_report
from gradscale.run.sample import bottom_k
from gradscale.run.shard import prepare, run_shard
from gradscale.tasks.digits import Digits

Array = np.ndarray[Any, np.dtype[np.float64]]
Value = Callable[[Array, Array], float]  # of a matrix of pair values [n, n] and the classes [n]


# --- the oracle: every pair -------------------------------------------------------------------------------------------


def whole(values: Array, labels: Array) -> float:
    return mean_of(values[~np.eye(len(values), dtype=bool)])


def entry(values: Array, labels: Array, a: int, b: int) -> float:
    part = values[np.ix_(labels == a, labels == b)]
    return mean_of(part[~np.eye(len(part), dtype=bool)] if a == b else part)


def within(values: Array, labels: Array) -> float:
    return mean_of([entry(values, labels, a, a) for a in np.unique(labels)])


def between(values: Array, labels: Array) -> float:
    classes = np.unique(labels)
    return mean_of([entry(values, labels, a, b) for a in classes for b in classes if a != b])


def mean_of(found: Any) -> float:
    kept = np.asarray(found, dtype=float)
    kept = kept[~np.isnan(kept)]
    return float(kept.mean()) if len(kept) else math.nan


def cosines(g: Array) -> Array:
    units = g / np.linalg.norm(g, axis=1, keepdims=True)
    return units @ units.T


def values_of(values: Array, labels: Array, name: str) -> dict[tuple[str, str], Value]:
    classes = np.unique(labels)
    found: dict[tuple[str, str], Value] = {
        (name, "all"): whole,
        (f"{name}_within", "all"): within,
        (f"{name}_between", "all"): between,
    }
    return found | {(name, f"class:{a},{b}"): partial(entry, a=a, b=b) for a in classes for b in classes if a <= b}


def busing(value: Value, values: Array, labels: Array, blocks: Array, relevant: Array) -> float:
    """Busing, Meijer, van der Leeden (1999), equations 3 and 4, by deleting rows and columns of every block."""
    names = np.unique(blocks[relevant])
    if len(names) < 2:
        return math.nan
    n, J, full = relevant.sum(), len(names), value(values, labels)
    m = np.array([(relevant & (blocks == j)).sum() for j in names])
    kept = [blocks != j for j in names]
    without = np.array([value(values[np.ix_(k, k)], labels[k]) for k in kept])
    jackknifed = J * full - ((1 - m / n) * without).sum()
    h = n / m
    return math.sqrt((((h * full - (h - 1) * without) - jackknifed) ** 2 / (h - 1)).mean())


def relevant_to(scope: str, labels: Array) -> Array:
    if scope == "all":
        return np.ones(len(labels), dtype=bool)
    return np.isin(labels, [int(c) for c in scope.removeprefix("class:").split(",")])


def expect_pairs(
    found: Mapping[tuple[str, str], Estimate], values: Array, labels: Array, blocks: Array, name: str = "cos",
    tolerance: float = 1e-9,
) -> None:  # fmt: skip
    exact = values_of(values, labels, name)
    assert {key for key in found if key[0].startswith(name)} == set(exact)
    for key, value in exact.items():
        relevant = relevant_to(key[1], labels)
        assert found[key].value == pytest.approx(value(values, labels), abs=tolerance, nan_ok=True), key
        error = busing(value, values, labels, blocks, relevant)
        assert found[key].stderr == pytest.approx(error, rel=1e-5, abs=tolerance, nan_ok=True), key
        assert found[key].n == relevant.sum(), key
        assert (found[key].status, found[key].unit) == ("estimator", "1")


# --- cosine stiffness of dense gradients ------------------------------------------------------------------------------


def state_of(g: Array, labels: Array, blocks: Array) -> UnitState:
    statistic = UnitSumsStatistic(by_class=True)
    return reduce(statistic.update, [micro(g, labels, blocks, j) for j in np.unique(blocks)], statistic.init())


def micro(g: Array, labels: Array, blocks: Array, block: int) -> MicroBatch:
    grads, classes = torch.from_numpy(g[blocks == block]), torch.from_numpy(labels[blocks == block])
    norms = grads.norm(dim=1, keepdim=True)
    units = torch.where(norms > 0, grads / norms, 0.0)
    sums = {c: {"w": units[classes == c].sum(dim=0)} for c in classes.unique().tolist()}
    return MicroBatch(
        torch.arange(len(grads)), torch.zeros(len(grads)), classes, ("w",), norms.square(),
        {GradientSums(unit=True): {None: {"w": units.sum(dim=0)}}, GradientSums(by_class=True, unit=True): sums},
        {}, block,
    )  # fmt: skip


def random(seed: int, sizes: list[int], P: int = 6, C: int = 3) -> tuple[Array, Array, Array]:
    generator = np.random.default_rng(seed)
    blocks = np.repeat(np.arange(len(sizes)), sizes)
    labels = generator.integers(0, C, len(blocks))
    centres = generator.standard_normal((C, P))
    return 0.7 * centres[labels] + generator.standard_normal((len(blocks), P)), labels, blocks


@pytest.mark.parametrize("sizes", [[12, 12, 12], [20, 6, 9, 13], [30], [25, 1, 7]])
def test_values_and_errors_are_those_of_all_pairs(sizes: list[int]) -> None:
    g, labels, blocks = random(1, sizes)
    expect_pairs(Stiffness(by_class=True).compute(state_of(g, labels, blocks)), cosines(g), labels, blocks)


def test_classes_of_one_example_and_blocks_without_a_class() -> None:
    """Class 4 has one example, so no pair; class 5 is in one block alone, so its errors are unknown."""
    g, labels, blocks = random(2, [8, 8, 8])
    labels[3], labels[9:12] = 4, 5
    found = Stiffness(by_class=True).compute(state_of(g, labels, blocks))
    expect_pairs(found, cosines(g), labels, blocks)
    assert math.isnan(found["cos", "class:4,4"].value)
    assert not math.isnan(found["cos_within", "all"].value)
    assert math.isnan(found["cos", "class:5,5"].stderr or 0.0)
    assert not math.isnan(found["cos", "class:0,5"].value)


def test_zero_gradients_have_no_cosine_and_are_counted_not_taken_as_zero() -> None:
    """A trap: code of the literature has 0 for their cosines, which would pull the mean to 0."""
    g, labels, blocks = random(3, [8, 8, 8])
    zero = np.isin(np.arange(24), [0, 5, 17])
    found = Stiffness(by_class=True).compute(state_of(np.where(zero[:, None], 0.0, g), labels, blocks))
    expect_pairs(found, cosines(g[~zero]), labels[~zero], blocks[~zero])
    assert found["zero_gradients", "all"][:4] == (3.0, None, 24, "identity")
    nothing = Stiffness().compute(state_of(np.zeros((4, 6)), np.zeros(4, int), np.arange(4) % 2))
    assert math.isnan(nothing["cos", "all"].value)
    assert (nothing["cos", "all"].n, nothing["zero_gradients", "all"].value) == (0, 4.0)
    assert math.isnan(Stiffness().compute(UnitSumsStatistic().init())["cos", "all"].value)


def test_lengths_of_gradients_do_not_matter() -> None:
    g, labels, blocks = random(4, [10, 10])
    lengths = 10.0 ** np.random.default_rng(0).uniform(-4, 4, (20, 1))
    ours, theirs = (Stiffness(by_class=True).compute(state_of(a, labels, blocks)) for a in (g, lengths * g))
    for key, estimate in ours.items():
        assert theirs[key].value == pytest.approx(estimate.value, abs=1e-12)


def test_two_classes_of_orthogonal_blocks() -> None:
    """Within 1, between 0, over all pairs the share of pairs within a class."""
    g = np.zeros((8, 4))
    labels = np.arange(8) % 2
    g[labels == 0, :2], g[labels == 1, 2:] = [3.0, 4.0], [1.0, -1.0]
    found = Stiffness(by_class=True).compute(state_of(g, labels, np.arange(8) // 4))
    assert found["cos_within", "all"].value == pytest.approx(1.0)
    assert found["cos_between", "all"].value == pytest.approx(0.0)
    assert found["cos", "all"].value == pytest.approx(24 / 56)
    assert found["cos_within", "all"].stderr == pytest.approx(0.0, abs=1e-7)


def test_between_two_sets_every_pair_counts() -> None:
    """Errors: the jackknife over either set's blocks with the other held."""
    (g, labels, blocks), (h, others, other_blocks) = random(5, [9, 6, 8], C=2), random(6, [7, 11])
    found = cosines_between(state_of(g, labels, blocks), state_of(h, others, other_blocks), True)
    units = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (g, h)]
    values = units[0] @ units[1].T

    def value(rows: Array, columns: Array, a: int | None, b: int | None) -> float:
        left = rows & (True if a is None else labels == a)
        return mean_of(values[np.ix_(left, columns & (True if b is None else others == b))])

    def error(a: int | None, b: int | None) -> float:
        total = 0.0
        for side, (mine, of) in enumerate(((blocks, labels), (other_blocks, others))):
            relevant = np.ones(len(mine), bool) if (a, b)[side] is None else of == (a, b)[side]
            names = [j for j in np.unique(mine) if (relevant & (mine == j)).any()]
            h = np.array([relevant.sum() / (relevant & (mine == j)).sum() for j in names])
            rest = [[np.ones(len(labels), bool), np.ones(len(others), bool)] for _ in names]
            for kept, j in zip(rest, names, strict=True):
                kept[side] = mine != j
            without, full = np.array([value(*kept, a, b) for kept in rest]), value(*everyone, a, b)
            jackknifed = len(names) * full - ((1 - 1 / h) * without).sum()
            total += float((((h * full - (h - 1) * without) - jackknifed) ** 2 / (h - 1)).mean())
        return math.sqrt(total)

    everyone = np.ones(len(labels), bool), np.ones(len(others), bool)
    assert found["cos", "all"].value == pytest.approx(values.mean())
    assert found["cos", "all"].stderr == pytest.approx(error(None, None))
    assert found["cos", "all"].n == len(g) + len(h)
    matrix = {(a, b): value(*everyone, a, b) for a in range(2) for b in range(3)}
    for (a, b), exact in matrix.items():
        assert found["cos", f"class:{a},{b}"].value == pytest.approx(exact, nan_ok=True)
        assert found["cos", f"class:{a},{b}"].stderr == pytest.approx(error(a, b), nan_ok=True)
    assert found["cos_within", "all"].value == pytest.approx((matrix[0, 0] + matrix[1, 1]) / 2)
    off = [matrix[0, 1], matrix[0, 2], matrix[1, 0], matrix[1, 2]]
    assert found["cos_between", "all"].value == pytest.approx(np.mean(off))


# --- the online identity ----------------------------------------------------------------------------------------------

IDENTITY = (
    "must satisfy the identity that the cosine of all pairs recovered from the class sums is that of the sum over"
)


def test_a_corrupted_state_breaks_the_identity() -> None:
    state = state_of(*random(7, [10, 10]))
    sums, counts = dict(state.sums), dict(state.counts)
    sums["0001|2|w"] = -sums["0001|2|w"]
    with pytest.raises(gs.GradscaleError, match=IDENTITY):
        Stiffness(by_class=True).compute(state._replace(sums=sums))
    counts["0000|1"] = counts["0000|1"] + 1
    with pytest.raises(gs.GradscaleError, match=IDENTITY):
        Stiffness(by_class=True).compute(state._replace(counts=counts))
    Stiffness().compute(state._replace(sums=sums))  # asks for no class, and holds nothing to it


# --- real models ------------------------------------------------------------------------------------------------------


class SmallGPT(nn.Module):
    """Token ids [B, T] -> scores [B, T, V]; the output head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(7, 8), nn.Embedding(5, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.block, self.norm, self.head = layer, nn.LayerNorm(8), nn.Linear(8, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=self.norm.weight.dtype)
        states = self.embedding(ids) + self.positions(torch.arange(ids.shape[1])).expand(len(ids), -1, -1)
        scores: Tensor = self.head(self.norm(self.block(states, src_mask=mask)))
        return scores


def classify(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["label"], reduction="none")


def predict_next(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    losses = F.cross_entropy(model(batch["x"])[:, :-1].mT, batch["x"][:, 1:], reduction="none")
    return losses.mean(dim=1)


def models() -> dict[str, ModelAtHand]:
    torch.manual_seed(0)
    n = 18
    labels = torch.arange(n) % 3
    return {
        "linear": ModelAtHand(nn.Linear(6, 3).eval(), {"x": torch.randn(n, 6), "label": labels}, classify),
        "attention": ModelAtHand(SelfAttention().eval(), {"x": torch.randn(n, 3, 4), "label": labels}, classify),
        "digits": ModelAtHand(
            Digits(width=16, depth=1).model(None), {"x": torch.randn(n, 8, 8), "label": labels}, classify
        ),
        "gpt": ModelAtHand(SmallGPT().eval(), {"x": torch.randint(7, (n, 5)), "label": labels}, predict_next),
    }


@pytest.mark.parametrize("case", ["linear", "attention", "digits", "gpt"])
def test_models_against_every_pair_of_dense_gradients(case: str) -> None:
    task = models()[case]
    subject, statistic = prepare(task, None, None), UnitSumsStatistic(by_class=True)
    parts = [run_shard(subject, range(j, j + 6), j // 6, 4, [statistic], None).states[statistic] for j in (0, 6, 12)]
    found = Stiffness(by_class=True).compute(reduce(statistic.merge, parts))
    net = copy.deepcopy(task.net).double()
    tensors = {k: t.double() if t.is_floating_point() else t for k, t in task.tensors.items()}
    grads = gradients_one_by_one(task, dict(net.named_parameters()), net, tensors)
    g = torch.cat(list(grads.values()), dim=1).detach().numpy()
    expect_pairs(found, cosines(g), tensors["label"].numpy(), np.arange(18) // 6, tolerance=3e-6)


def measure(task: Any, out: Path, **settings: Any) -> gs.Run:
    given = {"workers": 1, "microbatch": 2, "shard_size": 4, "measures": [gs.Stiffness()], **settings}
    return gs.measure(task, str(out), **given)


@pytest.mark.parametrize(("kind", "cos", "sign"), [("real", 0.5, 1.0), ("random", 0.0, 0.0)])
def test_the_toy_table(local_ray: None, tmp_path: Path, kind: str, cos: float, sign: float) -> None:
    run = measure(Toy(kind), tmp_path / "run", sketch="identity", shard_size=1, microbatch=1)
    frame = run.estimates()
    (row,) = frame[(frame["measure"] == "stiffness") & (frame["name"] == "cos")].itertuples()
    assert (row.scope, row.n, row.status, row.unit) == ("all", 4, "estimator", "1")
    assert row.value == pytest.approx(cos, abs=1e-12)
    found = gs.sign_stiffness(run, 0)
    assert found["sign", "all"][:3] == (sign, 0.0, 4)
    assert found["undetermined", "all"][:2] == (0.0, 0.0)
    assert set(found) == {("sign", "all"), ("undetermined", "all"), ("zero_gradients", "all")}


def test_one_worker_and_three_leave_the_same_files(local_ray: None, tmp_path: Path) -> None:
    measures = [gs.Stiffness(by_class=True)]
    one = measure(Regression(nan=7), tmp_path / "one", measures=measures)
    three = measure(Regression(nan=7), tmp_path / "three", measures=measures, workers=3)
    assert contents(one.path) == contents(three.path)
    assert "cos_between" in set(one.estimates()["name"])
    page = write_report([one], tmp_path / "report.html").read_text()
    assert "Cosine stiffness between classes, last step" in page
    assert "The cosine stiffness by pairs of classes: at step 0 of one it is highest in classes" in page


def test_classes_need_labels(local_ray: None, tmp_path: Path) -> None:
    with pytest.raises(gs.GradscaleError, match=r"estimates by class need task\.labels"):
        measure(Toy(), tmp_path / "run", measures=[gs.Stiffness(by_class=True)])


# --- two runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part(Regression):
    """Rows start to stop of the regression, and weights that the seed draws."""

    start: int = 0
    stop: int = 12
    seed: int = 0

    def model(self, checkpoint: str | None) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double().eval()

    def examples(self) -> gs.TensorExamples:
        return gs.TensorExamples(**super().examples().batch(range(self.start, self.stop)))


def dense(task: Part) -> Array:
    net = task.model(None)
    batch = task.examples().batch(range(len(task.examples())))
    grads = gradients_one_by_one(task, dict(net.named_parameters()), net, batch)  # type: ignore[arg-type]
    return torch.cat(list(grads.values()), dim=1).detach().numpy()


@pytest.fixture(scope="module")
def two(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[gs.Run, gs.Run]:
    """Training rows 0 to 11 and validation rows 12 to 23, with identity sketches."""
    folder = tmp_path_factory.mktemp("two")
    settings = {"measures": [gs.Stiffness(by_class=True)], "sketch": "identity"}
    return measure(Part(), folder / "train", **settings), measure(Part(start=12, stop=24), folder / "val", **settings)


def test_training_and_validation(two: tuple[gs.Run, gs.Run]) -> None:
    g, h = dense(Part()), dense(Part(start=12, stop=24))
    values = cosines(np.concatenate([g, h]))
    labels = np.arange(24) % 3
    found = gs.stiffness_between(*two, 0)
    expect_pairs(found.first, values[:12, :12], labels[:12], np.arange(12) // 4)
    expect_pairs(found.second, values[12:, 12:], labels[12:], np.arange(12) // 4)
    assert found.between["cos", "all"].value == pytest.approx(values[:12, 12:].mean())
    for a in range(3):
        for b in range(3):
            exact = values[:12, 12:][np.ix_(labels[:12] == a, labels[12:] == b)].mean()
            assert found.between["cos", f"class:{a},{b}"].value == pytest.approx(exact)
    frame = two[0].estimates()
    stored = frame[(frame["measure"] == "stiffness") & (frame["scope"] == "all")].set_index("name")["value"]
    assert found.first["cos_within", "all"].value == stored["cos_within"]


def test_the_same_run_twice_is_its_pairs_of_different_examples(two: tuple[gs.Run, gs.Run]) -> None:
    again = gs.open_run(two[0].path)
    found = gs.stiffness_between(two[0], again, 0)
    assert found.between == found.first == found.second
    ours, theirs = gs.sign_stiffness(two[0], 0, other=again), gs.sign_stiffness(two[0], 0)
    assert ours == theirs


def test_signs_between_training_and_validation(two: tuple[gs.Run, gs.Run]) -> None:
    values = np.sign(dense(Part()) @ dense(Part(start=12, stop=24)).T)
    found = gs.sign_stiffness(two[0], 0, other=two[1])
    assert found["sign", "all"].value == pytest.approx(values.mean())
    variance = sum((np.var(values.mean(axis=axis), ddof=1) / 12) for axis in (0, 1))
    assert found["sign", "all"].stderr == pytest.approx(math.sqrt(variance))
    labels = np.arange(12) % 3
    assert found["sign", "class:2,0"].value == pytest.approx(values[np.ix_(labels == 2, labels == 0)].mean())
    assert found["sign", "all"].n == 24


def test_estimates_become_a_table_like_a_runs_own(two: tuple[gs.Run, gs.Run], tmp_path: Path) -> None:
    train = two[0]
    frame = gs.estimates_frame(gs.stiffness_between(train, train, 0).first, "stiffness")
    frame.to_parquet(tmp_path / "first.parquet")
    stored = duckdb.sql(f"select * from '{tmp_path}/first.parquet' order by name, scope").df()
    own = train.estimates()
    own = own[own["measure"] == "stiffness"]
    assert list(stored.columns) == list(own.columns)
    own = own.sort_values(["name", "scope"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(stored, own, check_dtype=False, rtol=1e-12)
    assert len(stored[stored["scope"].str.startswith("class:")]) == 6  # of three classes


def test_runs_that_cannot_be_paired(two: tuple[gs.Run, gs.Run], tmp_path: Path) -> None:
    train = two[0]
    other_weights = measure(Part(start=12, stop=24, seed=1), tmp_path / "weights")
    same_data = measure(Part(), tmp_path / "same")
    fewer = measure(Part(start=12, stop=24), tmp_path / "fewer", params="0\\..*")
    without = measure(Part(start=12, stop=24), tmp_path / "without", measures=[gs.Coherence()])
    for message, other in {
        "both runs must be of the same weights at step 0, got initial weights of seed 0": other_weights,
        "runs must be of different examples to be paired, got the same data in": same_data,
        "gradients must be of the same parameters to be compared, got 2.weight": fewer,
        "must have been measured with stiffness, got coherence; measure it again with": without,
    }.items():
        with pytest.raises(gs.GradscaleError, match=message):
            gs.stiffness_between(train, other, 0)
    with pytest.raises(gs.GradscaleError, match="both runs must be of the same weights"):
        gs.sign_stiffness(train, 0, other=other_weights)
    with pytest.raises(gs.GradscaleError, match=r"step must be one of \[0\] of .*, got 3"):
        gs.stiffness_between(*two, 3)


def test_a_run_without_all_its_shards_has_no_stiffness_between(two: tuple[gs.Run, gs.Run], tmp_path: Path) -> None:
    shutil.copytree(two[0].path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "states")
    with pytest.raises(gs.GradscaleError, match="must have all its shards at step 0, got some missing"):
        gs.stiffness_between(gs.open_run(str(tmp_path / "run")), two[1], 0)


# --- signs from sketches ----------------------------------------------------------------------------------------------

EXACT = {"name": "identity", "version": 1, "seed": 0, "dim": 15}


def stored(folder: Path, g: Array, scheme: Mapping[str, object] = EXACT, **settings: Any) -> gs.Run:
    norms = np.square(g).sum(axis=1)
    return write_run(folder, {0: g.astype("float32")}, scheme=scheme, sq_norms=norms, **settings)


def test_signs_are_those_of_all_pairs(tmp_path: Path) -> None:
    g = random(8, [40], P=15)[0].astype("float32").astype(float)
    g[[4, 9]] = 0.0
    kept = np.flatnonzero(~np.isin(np.arange(40), [4, 7, 9]))
    run = stored(tmp_path / "run", g, shard=16, nonfinite=(7,))
    found = gs.sign_stiffness(run, 0)
    values = np.sign(g @ g.T)[np.ix_(kept, kept)]
    expect_pairs(found, values, kept % 3, np.arange(len(kept)), "sign")
    assert found["zero_gradients", "all"][:3] == (2.0, None, 39)
    assert found["undetermined", "all"].value == 0
    assert found["sign", "all"].definition == "stiffness/identity:15/sign/v1"


def test_blocks_and_shards_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = random(9, [40], P=15)[0]
    expected = gs.sign_stiffness(stored(tmp_path / "a", g, shard=40), 0)
    monkeypatch.setattr("gradscale.run.sign_stiffness.BLOCK", 7)
    monkeypatch.setattr("gradscale.measures.pairs._ENTRIES", 20)
    found = gs.sign_stiffness(stored(tmp_path / "b", g, shard=11), 0)
    assert found.keys() == expected.keys()
    for key, estimate in expected.items():
        assert found[key].value == estimate.value
        if estimate.stderr is not None:
            assert found[key].stderr == pytest.approx(estimate.stderr)


def test_pairs_too_close_to_orthogonal_are_reported(tmp_path: Path) -> None:
    g = random(10, [30], P=15)[0].astype("float32").astype(float)
    run = stored(tmp_path / "run", g, {**EXACT, "name": "gaussian"})
    values = (np.abs(cosines(g)) < 2 / math.sqrt(15)).astype(float)
    found = gs.sign_stiffness(run, 0)["undetermined", "all"]
    assert 0 < found.value < 1
    assert found.value == pytest.approx(whole(values, np.zeros(30)))
    assert found.stderr == pytest.approx(busing(whole, values, np.zeros(30), np.arange(30), np.ones(30, bool)))


def test_chosen_examples_and_samples(tmp_path: Path) -> None:
    g = random(11, [50], P=15)[0]
    run = stored(tmp_path / "run", g, shard=20)
    ids = [3, 40, 21, 8, 8]
    kept = np.unique(ids)
    found = gs.sign_stiffness(run, 0, ids=ids)
    assert found["sign", "all"].n == 4
    assert found["sign", "all"].value == pytest.approx(whole(np.sign(g @ g.T)[np.ix_(kept, kept)], kept))
    sample = bottom_k(np.arange(50), 12, seed=5)
    assert gs.sign_stiffness(run, 0, most=12, seed=5) == gs.sign_stiffness(run, 0, ids=sample.tolist())
    for message, ask in {
        "most must be a whole number of at least 1, got 0": lambda: gs.sign_stiffness(run, 0, most=0),
        "example id must be one of those measured": lambda: gs.sign_stiffness(run, 0, ids=[99]),
        "ids must name at least one finite example with a gradient": lambda: gs.sign_stiffness(run, 0, ids=[]),
    }.items():
        with pytest.raises(gs.GradscaleError, match=message):
            ask()


def test_a_sample_is_the_same_for_every_sharding() -> None:
    ids = np.random.default_rng(0).permutation(1000)
    whole_sample = bottom_k(ids, 100, seed=1)
    parts = np.concatenate([bottom_k(part, 100, seed=1) for part in np.array_split(ids, 7)])
    np.testing.assert_array_equal(bottom_k(parts, 100, seed=1), whole_sample)
    assert len(set(whole_sample.tolist())) == 100
    assert bottom_k(ids, 100, seed=2).tolist() != whole_sample.tolist()
    assert bottom_k(ids, 2000, seed=1).tolist() == list(range(1000))
    far = np.array([1, 1 + (1 << 32), 1 + (1 << 33)])
    assert len(bottom_k(far, 2, seed=0)) == 2
    assert abs(whole_sample.mean() - 500) < 100
    assert bottom_k(np.arange(1000), 6, seed=0).tolist() == [117, 303, 353, 504, 557, 884]  # on every machine


# --- honest errors ----------------------------------------------------------------------------------------------------

RUNS = 300


def test_errors_are_honest() -> None:
    """Over fresh samples of a population the true values lie within the errors as often as a t distribution has it."""
    J, size, P = 8, 9, 5
    blocks = np.repeat(np.arange(J), size)
    labels = np.arange(len(blocks)) % 2
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((2, P))

    def draw(n: int) -> tuple[Array, Array]:
        of = np.arange(n) % 2
        return centres[of] + generator.standard_normal((n, P)), of

    many, of = draw(400_000)
    units = many / np.linalg.norm(many, axis=1, keepdims=True)
    u = [units[of == c].mean(axis=0) for c in range(2)]
    inside, across = (u[0] @ u[0] + u[1] @ u[1]) / 2, u[0] @ u[1]
    n = len(blocks)
    share = (n / 2 - 1) / (n - 1)  # of pairs within a class, with n/2 of each
    truth = {"cos": share * inside + (1 - share) * across, "cos_within": inside, "cos_between": across}
    scores: dict[str, list[float]] = {name: [] for name in truth}
    for _ in range(RUNS):
        found = Stiffness(by_class=True).compute(state_of(draw(n)[0], labels, blocks))
        for name, exact in truth.items():
            estimate = found[name, "all"]
            assert estimate.stderr is not None
            scores[name].append((estimate.value - exact) / estimate.stderr)
    for parts in scores.values():
        assert_honest(parts, J - 1)


def test_errors_over_examples_are_honest() -> None:
    """Of signs, by the jackknife over examples."""
    generator = np.random.default_rng(1)
    n, P = 60, 4
    many = 0.5 + generator.standard_normal((4000, P))
    truth = whole(np.sign(many @ many.T), np.zeros(4000))
    scores = []
    for _ in range(RUNS):
        g = 0.5 + generator.standard_normal((n, P))
        signs = torch.from_numpy(np.sign(g @ g.T)).fill_diagonal_(0)
        means = means_within(signs.sum(dim=1, keepdim=True), torch.zeros(n, dtype=torch.int64), 1)
        scores.append(float((means.values[0] - truth) / means.errors[0]))
    assert_honest(scores, n - 1)


def assert_honest(scores: list[float], degrees: int) -> None:
    """68 % and 95 % of the scores lie within the t distribution's quantiles, up to three binomial deviations."""
    for share in (0.68, 0.95):
        bound = scipy.stats.t.ppf((1 + share) / 2, degrees)
        inside = float((np.abs(scores) <= bound).mean())
        assert abs(inside - share) <= 3 * math.sqrt(share * (1 - share) / len(scores)), (share, inside)


def test_equal_blocks_give_the_classical_jackknife() -> None:
    values = torch.tensor([[1.0], [2.0], [4.0], [9.0]], dtype=torch.float64)
    sizes, full = torch.full((4, 1), 5.0, dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)
    error = jackknife_errors(full, [(values[:3], sizes[:3]), (values[3:], sizes[3:])], torch.tensor([20.0]))
    assert float(error) == pytest.approx(math.sqrt(3 / 4 * float((values - values.mean()).square().sum())))
