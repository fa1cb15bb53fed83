"""The tables of a run open in pyarrow, DuckDB, pandas and polars, typed as they were the way a stranger would try."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from run_problems import FewDigits, save_digits

import gradscale as gs

pytestmark = pytest.mark.usefixtures("local_ray")

ROWS, DIM, STEPS = 100, 16, [10, 20]
N = ROWS * len(STEPS)
COLUMNS = ["example_id", "step", "shard", "label", "loss", "grad_sq_norm", "layer_sq_norms", "finite"]
ESTIMATES = ["step", "measure", "name", "scope", "value", "stderr", "n", "status", "definition", "unit"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> gs.Run:
    """Two steps of three shards each."""
    folder = tmp_path_factory.mktemp("digits")
    checkpoints = save_digits(folder, ROWS)
    task, out = FewDigits(str(folder)), str(folder / "run")
    return gs.measure(task, out, checkpoints=checkpoints, shard_size=40, sketch=f"gaussian:{DIM}", workers=2)


@pytest.fixture(scope="module", params=["rows", "sketches"])
def table(run, request) -> Path:
    return Path(run.path) / request.param


def test_pandas(table):
    (first, *_) = sorted(table.rglob("*.parquet"))
    assert len(pd.read_parquet(first)) == 40
    frame = pd.read_parquet(table)
    assert len(frame) == N
    assert frame["step"].dtype == np.int64
    assert sorted(frame["step"].unique()) == STEPS


@pytest.mark.parametrize("hive", [None, True, False])
@pytest.mark.parametrize("where", ["", "/**/*.parquet"])
def test_polars(table, where, hive):
    frame = pl.scan_parquet(f"{table}{where}", hive_partitioning=hive).collect()
    assert len(frame) == N
    assert frame.schema["step"] == pl.Int64
    if table.name == "sketches":
        assert frame.schema["sketch"] == pl.Array(pl.Float32, DIM)


@pytest.mark.parametrize("hive", ["", ", hive_partitioning=true", ", hive_partitioning=false"])
def test_duckdb(table, hive):
    relation = duckdb.sql(f"select * from read_parquet('{table}/**/*.parquet'{hive})")
    assert relation.columns[:2] == ["example_id", "step"]
    assert [str(kind) for kind in relation.types[:2]] == ["BIGINT", "BIGINT"]
    assert duckdb.sql(f"select count(*) from '{table}/**/*.parquet' where step = 20").fetchall() == [(ROWS,)]


@pytest.mark.parametrize("partitioning", [None, "hive"])
def test_pyarrow(table, partitioning):
    assert ds.dataset(table, partitioning=partitioning).count_rows() == N
    assert pq.read_table(table).num_rows == N


def test_a_dataset_joined_in_duckdb(run):
    """Rows and sketches by example and step, without gradscale."""
    query = f"""
        select count(*), avg(array_inner_product(sketch::float[{DIM}], sketch::float[{DIM}])) / avg(grad_sq_norm)
        from '{run.path}/rows/**/*.parquet' join '{run.path}/sketches/**/*.parquet' using (step, example_id)
    """
    ((matched, ratio),) = duckdb.sql(query).fetchall()
    assert matched == N
    assert 0.5 < ratio < 2  # the squared norms of sketches are those of the gradients, on average


def test_estimates(run):
    path = f"{run.path}/estimates.parquet"
    tables = [pd.read_parquet(path), pl.read_parquet(path).to_pandas(), duckdb.sql(f"from '{path}'").df()]
    for frame in [*tables, run.estimates()]:
        assert list(frame.columns) == ESTIMATES
        assert len(frame) == len(tables[0]) > 0
    assert pq.read_schema(path).field("value").metadata == {b"unit": b"see column unit"}
    kinds = dict(zip(ESTIMATES, pq.read_schema(path).types, strict=True))
    assert (kinds["step"], kinds["n"], kinds["value"], kinds["stderr"]) == (pa.int64(), pa.int64(), *[pa.float64()] * 2)
    assert set(run.estimates()["scope"].str.partition(":")[0]) == {"all", "union", "layer"}


def test_schema_of_rows(run):
    schema = run.rows().schema
    assert schema.names == COLUMNS
    units = {field.name: field.metadata[b"unit"].decode() for field in schema}
    assert units["loss"] == "loss units"
    assert units["grad_sq_norm"] == units["layer_sq_norms"] == "(loss units / parameter unit)^2"
    parameters = json.loads(schema.metadata[b"gradscale.parameters"])
    assert parameters == list(run.plan["parameters"])
    assert schema.field("layer_sq_norms").type == pa.list_(pa.float64(), len(parameters))
    assert not any(field.nullable for field in schema)


def test_schema_of_sketches(run):
    (first, *_) = sorted((Path(run.path) / "sketches").rglob("*.parquet"))
    schema = pq.read_schema(first)
    assert schema.field("sketch").type == pa.list_(pa.float32(), DIM)
    scheme = json.loads(schema.metadata[b"gradscale.sketch"])
    assert scheme == {"name": "gaussian", "version": 1, "seed": 0, "dim": DIM} == run.plan["sketch"]


def test_rows_are_sorted(run):
    rows = run.rows().to_table()
    assert rows["step"].to_pylist() == [step for step in STEPS for _ in range(ROWS)]
    assert rows["example_id"].to_pylist() == [*range(ROWS)] * 2
    norms = np.stack(rows["layer_sq_norms"].to_numpy())
    np.testing.assert_allclose(norms.sum(axis=1), rows["grad_sq_norm"].to_numpy(), rtol=1e-12)


def test_sketches(run):
    ids, matrix = run.sketches(20)
    assert ids.tolist() == [*range(ROWS)]
    assert matrix.shape == (ROWS, DIM)
    assert matrix.dtype == np.float32
    assert not matrix.flags.owndata  # it is Arrow's memory
    stored = pd.read_parquet(f"{run.path}/sketches/step-00000020")
    np.testing.assert_array_equal(matrix, np.stack(stored["sketch"]))


def test_gram_has_the_exact_diagonal(run):
    gram = run.gram(10)
    _, matrix = run.sketches(10)
    exact = run.sql("select grad_sq_norm from rows where step = 10 order by example_id")["grad_sq_norm"]
    np.testing.assert_array_equal(np.diag(gram), exact)
    off = ~np.eye(ROWS, dtype=bool)
    np.testing.assert_allclose(gram[off], (matrix.astype(np.float64) @ matrix.T.astype(np.float64))[off], rtol=1e-12)
    np.testing.assert_array_equal(gram, gram.T)


def test_sql(run):
    frame = run.sql("select step, count(*) as n, avg(loss) as loss from rows group by step order by step")
    assert frame["step"].tolist() == STEPS
    assert frame["n"].tolist() == [ROWS] * 2
    joined = run.sql("select count(*) as n from rows join sketches using (step, example_id)")
    assert joined["n"].tolist() == [N]
    alpha = run.sql("select value from estimates where name = 'alpha' and scope = 'all' order by step")["value"]
    assert len(alpha) == 2


@pytest.mark.parametrize("name", ["rows", "sketches"])
def test_a_flipped_bit_is_noticed(run, name):
    """In the middle of the first column that is stored, whatever the reader asks for afterwards."""
    path = Path(run.path) / name / "step-00000010" / "shard-00001.parquet"
    whole = path.read_bytes()
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    at = column.data_page_offset + column.total_compressed_size - 5
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    try:
        with pytest.raises(OSError, match="CRC checksum"):
            run.rows().to_table() if name == "rows" else run.sketches(10)
    finally:
        path.write_bytes(whole)


def test_steps_that_the_run_lacks(run):
    with pytest.raises(gs.GradscaleError, match=r"step must be one of \[10, 20\], got 0"):
        run.sketches(0)
