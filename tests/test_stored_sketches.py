"""Promise: sketches are read a few at a time, whatever their number, and say which examples pull the same way.

Most runs here are written by the store itself, with sketches made up for the purpose; the last section measures.
"""

from __future__ import annotations

import json
import logging
import math
import tracemalloc
import weakref
from collections.abc import Mapping
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from run_problems import Given, Regression

import gradscale as gs
from gradscale.run.plan import Plan
from gradscale.store import products
from gradscale.store.files import Files
from gradscale.store.narrow import narrowed
from gradscale.store.results import Run, open_run
from gradscale.store.sketches import RowGroup, StoredSketches, as_matrix
from gradscale.store.store import PLAN, ShardColumns, Store

N, DIM = 300, 40
SCHEME = {"name": "gaussian", "version": 1, "seed": 0, "dim": DIM}
SHAPES = {"weight": {"shape": [3, 5], "dtype": "float32", "rule": "linear"}}


def write_run(
    folder: Path,
    steps: Mapping[int, np.ndarray],
    *,
    shard: int = 100,
    nonfinite: tuple[int, ...] = (),
    scheme: Mapping[str, object] = SCHEME,
    shapes: Mapping[str, object] = SHAPES,
    sq_norms: np.ndarray | None = None,
) -> Run:
    """Sketches [n, K] by step, in shards; where no squared norms are given, they are twice those of the sketches."""
    store = Store(Files(str(folder)))
    n = len(next(iter(steps.values())))
    dtype = str(next(iter(steps.values())).dtype)
    about = dict(  # noqa: C408
        task="t", task_options={}, data_fingerprint="", params=None, excluded=[], labels=True, measures={}
    )
    sizes = dict(  # noqa: C408
        seed=0, shard_size=shard, microbatch=8, threads_per_worker=1, device="cpu", versions={}, examples=n
    )
    checkpoints = {str(step): {"path": None, "fingerprint": None} for step in steps}
    plan = Plan(**about, **sizes, checkpoints=checkpoints, parameters=shapes, sketch=dict(scheme), sketch_dtype=dtype)
    store.files.write(PLAN, plan.to_json().encode())
    for step, matrix in steps.items():
        norms = torch.tensor(2 * np.square(matrix.astype(float)).sum(1) if sq_norms is None else sq_norms)
        for unit in (unit for unit in plan.units() if unit.step == step):
            ids = torch.arange(unit.start, unit.stop)
            finite = ~torch.isin(ids, torch.tensor(nonfinite, dtype=torch.int64))
            part = norms[unit.start : unit.stop].where(finite, math.nan)
            columns = ShardColumns(
                ids,
                ids % 3,
                ids.double() / 10,
                part,
                part[:, None],
                finite,
                torch.tensor(matrix[unit.start : unit.stop]),
            )
            files = store.write_shard(step, unit.shard, columns, {}, ["weight"], scheme)
            store.commit(step, unit.shard, {"files": [list(file) for file in files]})
    return open_run(str(folder))


def random(n: int = N, dim: int = DIM, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(dtype)


@pytest.fixture(scope="module", params=["float32", "float16"])
def run(tmp_path_factory, request) -> Run:
    """Two steps of three shards; examples 7 and 150 are not finite."""
    steps = {10: random(dtype=request.param), 20: random(seed=1, dtype=request.param)}
    return write_run(tmp_path_factory.mktemp("run") / "run", steps, nonfinite=(7, 150))


def whole(blocks) -> tuple[np.ndarray, np.ndarray]:
    """The matrix of an upper triangle of blocks, and its ids."""
    found = list(blocks)
    ids = np.unique(np.concatenate([block.ids_b for block in found]))
    gram = np.full((len(ids), len(ids)), np.nan)
    for ids_a, ids_b, block in found:
        rows, columns = np.searchsorted(ids, ids_a), np.searchsorted(ids, ids_b)
        gram[np.ix_(rows, columns)] = block
        gram[np.ix_(columns, rows)] = block.T
    return ids, gram


# inner products


def test_gram_is_that_of_the_sketches_with_exact_norms(run):
    ids, matrix = run.sketches(10)
    assert len(ids) == N - 2
    gram = run.gram(10)
    wide = matrix.astype(np.float64)
    expected = wide @ wide.T
    np.fill_diagonal(expected, 2 * np.square(wide).sum(1))
    np.testing.assert_allclose(gram, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(gram, gram.T)


@pytest.mark.parametrize("size", [1, 7, 128, 130, 1000])
def test_blocks_of_any_size_have_the_same_bits(run, size):
    gram = run.gram(10)
    if size == 1:  # as many files are read as there are pairs
        ids = np.array([3, 99, 100, 299])
        found, blocks = whole(run.gram_blocks(10, size=1, ids=ids))
        assert found.tolist() == ids.tolist()
        rows = np.searchsorted(run.sketches(10)[0], ids)
        np.testing.assert_array_equal(blocks, gram[np.ix_(rows, rows)])
    else:
        np.testing.assert_array_equal(whole(run.gram_blocks(10, size=size))[1], gram)


def test_examples_are_picked_in_any_order(run):
    ids, gram = run.sketches(10)[0], run.gram(10)
    asked, beside = [299, 3, 100, 3], [3, 4]
    rows, columns = np.searchsorted(ids, asked), np.searchsorted(ids, beside)
    np.testing.assert_array_equal(run.gram(10, ids=asked), gram[np.ix_(rows, rows)])
    np.testing.assert_array_equal(run.gram(10, ids=asked, beside=beside), gram[np.ix_(rows, columns)])
    assert run.gram(10, ids=[]).shape == (0, 0)


def test_a_matrix_that_does_not_fit_is_refused(run, monkeypatch):
    monkeypatch.setattr(products, "MATRIX_BYTES", 8 * 100 * 100)
    message = r"a matrix of inner products must be of at most 0 MiB, got 298 x 298 .*; pass ids=, or iterate"
    with pytest.raises(gs.GradscaleError, match=message):
        run.gram(10)
    with pytest.raises(gs.GradscaleError, match=r"298 x 298 .* iterate over run.cross_gram_blocks\(other, step\)"):
        run.cross_gram(run, 10, 20)
    assert sum(1 for _ in run.cross_gram_blocks(run, 10, 20, size=100)) == 9
    assert run.gram(10, ids=range(8, 100)).shape == (92, 92)
    assert sum(1 for _ in run.gram_blocks(10, size=100)) == 6


def test_what_cannot_be_asked_for(run):
    for message, ask in {
        r"example id must be one of those measured at step 10 of .* \(0 to 299\), got 300": lambda: run.gram(
            10, [3, 300]
        ),
        r"example 7 must have a finite loss and gradient to have a sketch": lambda: run.gram(10, ids=[7]),
        r"example ids must be whole numbers, got float64": lambda: run.gram(10, ids=[1.5]),
        r"size must be a whole number of at least 1, got 0": lambda: run.gram_blocks(10, size=0),
        r"size must be a whole number of at least 1, got 1.5": lambda: run.cross_gram_blocks(run, 10, size=1.5),
        r"step must be one of \[10, 20\], got 30": lambda: run.neighbours(3, step=30),
        r"step must be given where a run has several, \[10, 20\], got None": lambda: run.neighbours(3),
        r"example id must be one of those measured .*, got -1": lambda: run.neighbours(-1, step=10),
        r"example 150 must have a finite loss": lambda: run.neighbours(150, step=10),
        r"by must be one of cosine, inner product, got 'angle'": lambda: run.neighbours(3, step=10, by="angle"),
        r"k must be a whole number of at least 1, got 0": lambda: run.neighbours(3, step=10, k=0),
    }.items():
        with pytest.raises(gs.GradscaleError, match=message):
            ask()


@pytest.mark.parametrize("rows", [1, 3, 64, 1000])
def test_a_scan_reads_every_row_group_once_and_ends_blocks_where_it_is_told(run, rows):
    """Whatever the files; of chosen examples, only the groups that hold one. One group is held."""

    class Counting(StoredSketches):
        def _read(self, group: RowGroup) -> np.ndarray:
            assert all(reference() is None for _, reference in read)
            matrix = super()._read(group)
            read.append((group, weakref.ref(matrix)))
            return matrix

    read: list[tuple[RowGroup, weakref.ref]] = []
    stored = Counting(**vars(run.stored_sketches(10)))
    matrix = run.sketches(10)[1]
    for positions, groups in ((np.arange(298), [0, 1, 2]), (np.array([2, 90, 250, 251, 297]), [0, 2])):
        blocks = list(stored.scan(positions, rows))
        assert {len(block) for block in blocks[:-1]} <= {rows}
        np.testing.assert_array_equal(np.concatenate(blocks), matrix[positions])
        assert [stored.groups.index(group) for group, _ in read] == groups
        read.clear()
    assert list(stored.scan(np.arange(0), rows)) == []


# two checkpoints, two runs


def test_two_checkpoints(run):
    (ids, first), (_, second) = run.sketches(10), run.sketches(20)
    cross = run.cross_gram(run, 10, 20)
    np.testing.assert_allclose(cross, first.astype(float) @ second.astype(float).T, rtol=1e-12, atol=1e-12)
    picked = run.cross_gram(run, 10, 20, ids=[5], other_ids=[3, 9])
    np.testing.assert_array_equal(picked, cross[np.ix_(ids == 5, np.isin(ids, [3, 9]))])
    np.testing.assert_array_equal(run.cross_gram(run, 10), run.gram(10))  # with its exact diagonal


@pytest.mark.parametrize("size", [7, 128, 1000])
def test_blocks_between_two_checkpoints_have_the_same_bits(run, size):
    for there, asked, beside in ((20, None, None), (20, [299, 3, 100], [5]), (10, None, range(3, 7)), (20, [], [5])):
        expected = run.cross_gram(run, 10, there, ids=asked, other_ids=beside)
        found = list(run.cross_gram_blocks(run, 10, there, size, ids=asked, other_ids=beside))
        rows = -(-expected.shape[0] // size)
        assert len(found) == rows * -(-expected.shape[1] // size)
        if not found:
            continue
        whole_rows = [found[i : i + len(found) // rows] for i in range(0, len(found), len(found) // rows)]
        np.testing.assert_array_equal(np.block([[block for _, _, block in row] for row in whole_rows]), expected)
        ids = run.sketches(10)[0]
        ids_a = np.concatenate([row[0].ids_a for row in whole_rows])
        np.testing.assert_array_equal(ids_a, ids if asked is None else asked)
        ids_b = np.concatenate([block.ids_b for block in whole_rows[0]])
        np.testing.assert_array_equal(ids_b, ids if beside is None else list(beside))


def test_only_what_is_comparable_is_compared(run, tmp_path):
    same = write_run(tmp_path / "same", {10: random(20)})
    assert same.cross_gram(run, 10, 20).shape == (20, 298)
    seed = write_run(tmp_path / "seed", {10: random(20)}, scheme=SCHEME | {"seed": 1})
    with pytest.raises(gs.GradscaleError, match=r"must be of one scheme to be compared, got seed 0 here and 1 there"):
        run.cross_gram(seed, 10)
    other = write_run(tmp_path / "other", {10: random(20, 8)}, scheme=SCHEME | {"name": "sjlt", "dim": 8})
    with pytest.raises(gs.GradscaleError, match=r"name 'gaussian' here and 'sjlt' there; dim 40 here and 8 there"):
        run.cross_gram(other, 10)
    shapes = {"weight": SHAPES["weight"] | {"shape": [5, 3]}, "bias": {"shape": [3]}}
    model = write_run(tmp_path / "model", {10: random(20)}, shapes=shapes)
    message = r"same parameters to be compared, got weight \(3, 5\) here and \(5, 3\) there; bias not measured here"
    for ask in (run.cross_gram, run.cross_gram_blocks):
        with pytest.raises(gs.GradscaleError, match=message):
            ask(model, 10)


@pytest.mark.parametrize("what", ["seed", "type"])
def test_a_file_of_another_run_is_noticed(tmp_path, what):
    run = write_run(tmp_path / "run", {0: random()})
    dtype, scheme = ("float32", SCHEME | {"seed": 5}) if what == "seed" else ("float16", SCHEME)
    write_run(tmp_path / "stray", {0: random(dtype=dtype)}, scheme=scheme)
    name = "sketches/step-00000000/shard-00001.parquet"
    (tmp_path / "run" / name).write_bytes((tmp_path / "stray" / name).read_bytes())
    difference = "seed 0 here and 5 there" if what == "seed" else "type float32 here and float16 there"
    message = f"sketches in {name} must be of the scheme in run.json, got others: {difference}"
    for ask in (run.sketches, run.gram, run.gram_blocks, lambda _: run.sql("select 1 from sketches")):
        with pytest.raises(gs.GradscaleError, match=message):
            ask(0)


# neighbours


def test_neighbours(run):
    ids, matrix = run.sketches(10)
    wide = matrix.astype(float)
    norms = np.sqrt(2 * np.square(wide).sum(1))
    here = int(np.searchsorted(ids, 30))
    inner = wide @ wide[here]
    cosine = inner / norms / norms[here]
    others = [i for i in range(len(ids)) if i != here]
    for by, score in {"cosine": cosine, "inner product": inner}.items():
        for most_opposed in (False, True):
            frame = run.neighbours(30, step=10, k=5, by=by, most_opposed=most_opposed)
            best = sorted(others, key=lambda i: score[i] if most_opposed else -score[i])[:5]
            assert frame["example_id"].tolist() == ids[best].tolist()
            assert frame.columns.tolist() == [
                *("example_id", "label", "loss", "inner_product", "inner_product_stderr", "cosine", "cosine_stderr")
            ]
            np.testing.assert_allclose(frame["cosine"], cosine[best])
            np.testing.assert_allclose(frame["inner_product"], inner[best])
            np.testing.assert_allclose(frame["cosine_stderr"], np.sqrt((1 + cosine[best] ** 2) / DIM))
            stated = np.sqrt((norms[best] ** 2 * norms[here] ** 2 + inner[best] ** 2) / DIM)
            np.testing.assert_allclose(frame["inner_product_stderr"], stated)
            np.testing.assert_array_equal(frame["label"], ids[best] % 3)
            np.testing.assert_array_equal(frame["loss"], ids[best] / 10)
            assert math.isnan(frame.attrs.pop("sketch_error"))
            assert frame.attrs == {"zero_gradients": 0, "stderr_is": "stated"}


def test_zero_gradients_have_no_cosine_and_are_never_first(tmp_path):
    matrix = random(6)
    matrix[[1, 4]] = 0
    run = write_run(tmp_path / "run", {0: matrix}, shard=4)
    for most_opposed in (False, True):
        frame = run.neighbours(0, k=9, most_opposed=most_opposed)
        assert frame["example_id"].tolist()[3:] == [1, 4]
        assert frame["cosine"].isna().tolist() == [False] * 3 + [True] * 2
        assert frame["cosine_stderr"].isna().tolist() == [False] * 3 + [True] * 2
        assert frame["inner_product"].tolist()[3:] == frame["inner_product_stderr"].tolist()[3:] == [0, 0]
        assert frame.attrs["zero_gradients"] == 2
    message = r"example 1 must have a gradient other than zero to have a cosine with others, got a zero .*; use by="
    with pytest.raises(gs.GradscaleError, match=message):
        run.neighbours(1)
    assert (run.neighbours(1, by="inner product")["inner_product"] == 0).all()


def test_the_identity_has_no_error(tmp_path):
    run = write_run(tmp_path / "run", {0: random(6)}, scheme=SCHEME | {"name": "identity"})
    assert (run.neighbours(0)["cosine_stderr"] == 0).all()


def test_kronecker_sketches_have_the_measured_error_or_none(tmp_path):
    matrix = random(6)
    matrix[4] = 0
    run = write_run(tmp_path / "run", {0: matrix, 8: matrix}, scheme=SCHEME | {"name": "kronecker"})
    unknown = run.neighbours(0, step=0)
    assert unknown["cosine_stderr"].isna().all()
    assert unknown["inner_product_stderr"].tolist()[4] == 0  # with the zero gradient
    assert unknown["inner_product_stderr"][:4].isna().all()
    assert unknown.attrs["stderr_is"] == "measured"
    assert math.isnan(unknown.attrs["sketch_error"])
    about = ("all", 0.3, 0.01, 120, "estimator", "", "1")
    Store(run.files).write_estimates([(0, "sketch_error", "cosine_rms_error", *about)])
    measured = run.neighbours(0, step=0)
    assert measured.attrs["sketch_error"] == 0.3
    assert measured["cosine_stderr"][:4].tolist() == [0.3] * 4
    lengths = measured["inner_product"][:4] / measured["cosine"][:4]
    np.testing.assert_allclose(measured["inner_product_stderr"][:4], 0.3 * lengths)
    assert math.isnan(run.neighbours(0, step=8).attrs["sketch_error"])  # that of another step is another one


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("name", ["kronecker", "count"])
def test_the_measured_error_comes_with_the_neighbours_of_a_run(tmp_path, name):
    run = gs.measure(Regression(), str(tmp_path / "run"), workers=1, measures=[], sketch=f"{name}:16")
    found = run.estimates().set_index(["measure", "name"])["value"]
    frame = run.neighbours(3)
    assert frame.attrs["sketch_error"] == found["sketch_error", "cosine_rms_error"] > 0
    assert frame.attrs["stderr_is"] == ("measured" if name == "kronecker" else "stated")
    stated = np.sqrt((1 + np.clip(frame["cosine"], -1, 1) ** 2) / 16)
    expected = np.full(10, frame.attrs["sketch_error"]) if name == "kronecker" else stated
    np.testing.assert_allclose(frame["cosine_stderr"], expected)


# files


def test_row_groups_hold_16_mib_at_most(tmp_path):
    run = write_run(tmp_path / "run", {0: random(1100, 4096)}, shard=1100, scheme=SCHEME | {"dim": 4096})
    (path,) = (tmp_path / "run" / "sketches").rglob("*.parquet")
    metadata = pq.ParquetFile(path).metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [1024, 76]
    assert run.gram(0, ids=[0, 1023, 1024, 1099]).shape == (4, 4)


def test_a_scan_holds_little_in_memory(tmp_path):
    """128 MiB of sketches are scanned within 80 MiB: a row group, what Parquet needs to decode it, and a block."""
    n, dim = 65536, 512
    run = write_run(tmp_path / "run", {0: random(n, dim)}, shard=16384, scheme=SCHEME | {"dim": dim})
    limit = 80 << 20
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        assert len(run.neighbours(5)) == 10
        assert run.gram(0, ids=range(0, n, 2000)).shape == (33, 33)
        ids_a, ids_b, block = next(run.gram_blocks(0, size=512))
        assert (len(ids_a), len(ids_b), block.shape) == (512, 512, (512, 512))
        held = pool.max_memory() + tracemalloc.get_traced_memory()[1]
        run.sketches(0)
        assert pool.max_memory() + tracemalloc.get_traced_memory()[1] > 2 * limit  # as all at once would need
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    assert held < limit


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_column_of_sketches_is_not_copied(tmp_path, dtype):
    write_run(tmp_path / "run", {0: random(dtype=dtype)}, shard=N)
    (path,) = (tmp_path / "run" / "sketches").rglob("*.parquet")
    column = pq.read_table(path)["sketch"]
    matrix = as_matrix(column)
    assert matrix.dtype == np.dtype(dtype)
    assert matrix.ctypes.data == column.chunk(0).flatten().buffers()[1].address
    np.testing.assert_array_equal(matrix, random(dtype=dtype))


def test_float16_in_every_reader(tmp_path):
    expected = random(dtype="float16")
    write_run(tmp_path / "run", {0: expected})
    table = f"{tmp_path}/run/sketches"
    (first, *_) = sorted(Path(table).rglob("*.parquet"))
    schema = pq.read_schema(first)
    assert schema.field("sketch").type == pa.list_(pa.float16(), DIM)
    assert schema.metadata[b"gradscale.sketch_dtype"] == b"float16"
    assert json.loads(schema.metadata[b"gradscale.sketch"]) == SCHEME
    np.testing.assert_array_equal(np.stack(pd.read_parquet(table)["sketch"]), expected)
    np.testing.assert_array_equal(pl.scan_parquet(f"{table}/**/*.parquet").collect()["sketch"].to_numpy(), expected)
    query = f"select sketch from '{table}/**/*.parquet' order by example_id"
    np.testing.assert_array_equal(np.stack(duckdb.sql(query).df()["sketch"]).astype("float16"), expected)
    ((product,),) = duckdb.sql(
        f"select array_inner_product(sketch::float[{DIM}], sketch::float[{DIM}]) from '{first}' limit 1"
    ).fetchall()
    assert product == pytest.approx(np.square(expected[0].astype(float)).sum(), rel=1e-5)


def test_plans_of_before_the_choice_have_float32(tmp_path):
    run = write_run(tmp_path / "run", {0: random()})
    path = tmp_path / "run" / PLAN
    plan = json.loads(path.read_text())
    del plan["sketch_dtype"]
    path.write_text(json.dumps(plan))
    assert Plan.from_json(path.read_text()).sketch_dtype == "float32"
    assert run.gram(0, ids=[1]).shape == (1, 1)


# narrowing


def test_what_a_type_cannot_hold_is_refused():
    ids, finite = torch.tensor([10, 11, 12]), torch.tensor([True, True, False])
    wide = torch.tensor([[1.0, 2.0], [7e4, -8e4], [math.nan, math.inf]], dtype=torch.float64)
    message = (
        r"sketch entries must be at most 65504 in magnitude to be stored as float16, got -80000, the largest, "
        r"in the sketch of example 11; store them with --sketch-dtype float32"
    )
    with pytest.raises(gs.GradscaleError, match=message):
        narrowed(wide, ids, finite, "float16")
    assert narrowed(wide, ids, finite, "float32").matrix.tolist() == [[1, 2], [7e4, -8e4], [0, 0]]
    with pytest.raises(gs.GradscaleError, match=r"stored as float32, got 8e\+59.*; scale the task's losses down"):
        narrowed(wide * -1e55, ids, finite, "float32")


def test_what_is_lost_below_is_counted():
    wide = torch.tensor([[1e-9, 1e-6, 1.0, 0.0], [65504.0, 6.2e-5, 1e-8, -1e-8]], dtype=torch.float64)
    found = narrowed(wide, torch.arange(2), torch.ones(2, dtype=torch.bool), "float16")
    assert found.zeroed.tolist() == [1, 2]
    assert found.coarse == 4
    assert found.matrix[0, 1] == pytest.approx(1e-6, rel=0.05)


# measured


@pytest.mark.usefixtures("local_ray")
def test_float16_measured(tmp_path):
    settings = {"workers": 1, "measures": [gs.Coherence()], "sketch": "gaussian:20"}
    half = gs.measure(Regression(), str(tmp_path / "half"), sketch_dtype="float16", **settings)
    single = gs.measure(Regression(), str(tmp_path / "single"), **settings)
    assert (half.plan["sketch_dtype"], single.plan["sketch_dtype"]) == ("float16", "float32")
    np.testing.assert_array_equal(half.sketches(0)[1], single.sketches(0)[1].astype("float16"))
    assert half.cross_gram(single, 0).shape == (24, 24)
    before = sorted((tmp_path / "half").rglob("*"))
    message = r"(?s)the settings must be those of the run .*sketch_dtype: 'float16' in the run, 'float32' now"
    with pytest.raises(gs.GradscaleError, match=message):
        gs.measure(Regression(), str(tmp_path / "half"), **settings)
    assert sorted((tmp_path / "half").rglob("*")) == before


@pytest.mark.usefixtures("local_ray")
def test_overflow_measured(tmp_path):
    task = Given(((1.0, 2.0), (3e6, -1e6)))
    message = r"shard 0 .*sketch entries must be at most 65504 .*in the sketch of example 1; store them with"
    with pytest.raises(gs.ShardsFailed, match=message):
        gs.measure(task, str(tmp_path / "run"), workers=1, sketch="gaussian:2", sketch_dtype="float16")
    assert not (tmp_path / "run" / "sketches").exists()


@pytest.mark.usefixtures("local_ray")
def test_underflow_measured(tmp_path, caplog):
    task = Given(((1e-9, 1e-9), (1.0, -1.0)))
    with caplog.at_level(logging.WARNING, logger="gradscale"):
        run = gs.measure(task, str(tmp_path / "run"), workers=1, sketch="gaussian:2", sketch_dtype="float16")
    assert (
        "2 entries of sketches are too small for all the digits of float16, and 2 of them are stored as 0"
        in caplog.text
    )
    found = run.estimates().set_index(["measure", "name"]).loc[("sketch_error", "entries_underflown")]
    assert (found["value"], found["n"]) == (0.5, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sketch": "gaussian:8", "sketch_dtype": "bfloat16"}, "sketch_dtype must be one of float32, float16, got 'bf"),
        ({"sketch_dtype": "float16"}, "sketch_dtype must come with a sketch, got float16 without one; add --sketch"),
    ],
)
def test_types_that_make_no_sense(tmp_path, settings, message):
    with pytest.raises(gs.GradscaleError, match=message):
        gs.measure(Regression(), str(tmp_path / "run"), workers=1, **settings)
    assert not (tmp_path / "run").exists()
