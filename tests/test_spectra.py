"""Promise: spectra.parquet holds what was found, opens in every reader, and `Spectrum` gives it back."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from krylov_problems import Drawn
from spectrum_runs import P, matrix_at, node_rows, plan_of_spectrum, save_spectrum, spectrum_run

import gradscale as gs
from gradscale.curvature.density import density
from gradscale.curvature.operator import DenseOperator
from gradscale.curvature.quadrature import quadratures
from gradscale.store.files import Files
from gradscale.store.spectra import SPECTRA, Spectrum, SpectrumRow, write_spectra

COLUMNS = ["step", "operator", "kind", "probe", "index", "value", "weight", "residual", "error", "converged"]
EIGENVALUE = SpectrumRow(0, "hessian", "eigenvalue", None, 0, 3.0, None, 1e-3, 1e-6, True)
NODE = SpectrumRow(0, "hessian", "node", 0, 0, 3.0, 1.0, 1e-3, None, None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Spectrum:
    return spectrum_run(tmp_path_factory.mktemp("spectra") / "run", max_steps=14)


def save(folder: Path, **settings: object) -> Spectrum:
    """A run of one step with two eigenvalues and a quadrature."""
    rows = [EIGENVALUE, EIGENVALUE._replace(index=1, value=-1.0), *node_rows(0, "hessian", some_quadrature())]
    return save_spectrum(folder, plan_of_spectrum(steps=(0,), **settings), rows, [])


def some_quadrature():
    return quadratures(DenseOperator(matrix_at(0)), Drawn(P, 3), range(3), 10)


# what was written is read


def test_a_run_is_opened_as_what_it_is(run: Spectrum, tmp_path: Path) -> None:
    found = gs.open_run(run.path)
    assert isinstance(found, Spectrum)
    assert (found.name, found.steps, found.size) == ("run", [0, 64, 256], P)
    Files(str(tmp_path)).write("run.json", b'{"checkpoints": {"0": {}}}')
    assert isinstance(gs.open_run(str(tmp_path)), gs.Run)


def test_eigenvalues_are_those_of_the_operator(run: Spectrum) -> None:
    for k, step in enumerate(run.steps):
        found, exact = run.eigenvalues(step), torch.linalg.eigvalsh(matrix_at(k)).flip(0).numpy()
        rows = run.sql(f"from spectra where kind = 'eigenvalue' and step = {step} order by index")
        np.testing.assert_array_equal(rows["value"], found)
        assert (np.diff(found) < 0).all()
        good = rows["converged"].to_numpy(dtype=bool)
        assert 0 < good.sum() < len(good) == 6
        np.testing.assert_allclose(found[good], exact[:6][good], atol=1e-6)
        nearest = np.abs(found[:, None] - exact).min(axis=1)
        assert (nearest <= rows["error"] + 1e-12).all()


def test_quadratures_come_back_bit_for_bit(run: Spectrum) -> None:
    for k, step in enumerate(run.steps):
        exact = quadratures(DenseOperator(matrix_at(k)), Drawn(P, 3), range(8), 40)
        for a, b in zip(run.quadrature(step), exact, strict=True):
            np.testing.assert_array_equal(a, b)


def test_traces_of_functions(run: Spectrum) -> None:
    """The square within its error of the truth, and equal to the sum over nodes by hand."""
    found, frame = run.trace_of(np.square, 64), run.spectra()
    nodes = frame[(frame["step"] == 64) & (frame["kind"] == "node")]
    by_hand = [P * (part["weight"] * part["value"] ** 2).sum() for _, part in nodes.groupby("probe")]
    assert found.value == pytest.approx(np.mean(by_hand), rel=1e-12)
    assert found.stderr == pytest.approx(np.std(by_hand, ddof=1) / np.sqrt(8), rel=1e-12)
    assert abs(found.value - float(matrix_at(1).square().sum())) < 4 * found.stderr


def test_the_density_is_whole_on_its_own_grid(run: Spectrum) -> None:
    found = run.density(256)
    spacing = found.grid[1] - found.grid[0]
    assert found.value.sum() * spacing == pytest.approx(1, abs=1e-4)
    assert spacing <= found.width / 9
    again = density(run.quadrature(256), found.grid, found.width)
    for a, b in zip(found, again, strict=True):
        np.testing.assert_array_equal(a, b)
    grid = np.linspace(0, 1, 5)
    np.testing.assert_array_equal(run.density(256, grid, 0.3).value, density(run.quadrature(256), grid, 0.3).value)
    narrow = run.density(256, width=found.width / 10)
    assert narrow.value.sum() * (narrow.grid[1] - narrow.grid[0]) == pytest.approx(1, abs=1e-4)
    assert len(run.density(256, width=found.width / 1e6).grid) == 20_000


def test_one_step_need_not_be_named(tmp_path: Path) -> None:
    run = save(tmp_path)
    np.testing.assert_array_equal(run.eigenvalues(), [3.0, -1.0])
    assert run.quadrature().size == P
    assert run.density().grid.shape == run.density(0).grid.shape


def test_sql_has_both_tables(run: Spectrum) -> None:
    query = """
        select count(*) as n from spectra join estimates using (step)
        where kind = 'eigenvalue' and index = 0 and name = 'lambda_max' and spectra.value = estimates.value
    """
    assert run.sql(query)["n"].tolist() == [3]
    sums = run.sql("select sum(weight) as total from spectra where kind = 'node' group by step, probe")["total"]
    np.testing.assert_allclose(sums, np.ones(24), atol=1e-9)
    assert set(run.estimates()["measure"]) == {"curvature"}


# any reader


def test_every_reader_opens_it(run: Spectrum) -> None:
    path = f"{run.path}/{SPECTRA}"
    expected = 3 * (6 + 8 * 40)
    in_pandas, in_polars, in_duckdb = pd.read_parquet(path), pl.read_parquet(path), duckdb.sql(f"from '{path}'")
    assert list(in_pandas) == in_polars.columns == in_duckdb.columns == COLUMNS
    assert len(in_pandas) == len(in_polars) == len(in_duckdb.fetchall()) == expected
    kinds = [str(kind) for kind in in_duckdb.types]
    assert kinds == ["BIGINT", "VARCHAR", "VARCHAR", "BIGINT", "BIGINT", *["DOUBLE"] * 4, "BOOLEAN"]
    assert in_polars.schema["probe"] == in_polars.schema["step"] == pl.Int64
    tops = "where kind = 'eigenvalue' and index = 0 order by step"
    top = duckdb.sql(f"select value from '{path}' {tops}").fetchnumpy()["value"]
    np.testing.assert_array_equal(top, [run.eigenvalues(step)[0] for step in run.steps])


def test_missing_is_null_and_nothing_else_is(run: Spectrum) -> None:
    nulls = duckdb.sql(f"select kind, {', '.join(f'count({c}) as {c}' for c in COLUMNS[3:])}, count(*) as n "
                       f"from '{run.path}/{SPECTRA}' group by kind order by kind").df()  # fmt: skip
    eigenvalue, node = nulls.iloc[0], nulls.iloc[1]
    assert [c for c in COLUMNS[3:] if eigenvalue[c] == 0] == ["probe", "weight"]
    assert [c for c in COLUMNS[3:] if node[c] == 0] == ["error", "converged"]
    assert all(row[c] in (0, row["n"]) for row in (eigenvalue, node) for c in COLUMNS[3:])
    frame = run.spectra()
    assert (str(frame["probe"].dtype), str(frame["converged"].dtype)) == ("Int64", "boolean")
    assert len(frame[frame["converged"].fillna(False)]) < 18


def test_the_schema_has_units_and_the_rows_are_sorted(run: Spectrum) -> None:
    schema = pq.read_schema(f"{run.path}/{SPECTRA}")
    assert schema.metadata[b"gradscale.schema_version"] == b"1"
    assert schema.field("value").metadata[b"unit"].startswith(b"loss units / parameter unit^2")
    assert schema.field("index").type == pa.int64()
    frame = run.spectra()
    keys = list(zip(frame["step"], frame["kind"], frame["probe"].fillna(-1), frame["index"], strict=True))
    assert keys == sorted(keys)


def test_order_of_writing_does_not_matter(tmp_path: Path) -> None:
    rows = [EIGENVALUE, *node_rows(0, "hessian", some_quadrature())]
    for name, order in (("a", rows), ("b", rows[::-1])):
        write_spectra(Files(str(tmp_path / name)), order)
    assert (tmp_path / "a" / SPECTRA).read_bytes() == (tmp_path / "b" / SPECTRA).read_bytes()


def test_a_run_of_traces_alone_has_no_rows(tmp_path: Path) -> None:
    run = save_spectrum(tmp_path, plan_of_spectrum(top=0, density=None), [], [])
    assert len(run.spectra()) == 0
    (tmp_path / SPECTRA).unlink()
    assert list(run.spectra().columns) == COLUMNS


# what cannot be had


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda run: run.eigenvalues(), r"step must be given where a run has several, \[0, 64, 256\], got None; pass"),
        (lambda run: run.quadrature(7), r"step must be one of \[0, 64, 256\], got 7; run.steps has them"),
        (lambda run: run.density(0, width=0.0), "width of a density must be positive, got 0.0; a hundredth"),
        (lambda run: run.trace_of(np.log, 0), "f must be finite on the spectrum, got nan of node -.*; shift"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in log")
def test_bad_questions(run: Spectrum, ask, message: str) -> None:
    with pytest.raises(gs.GradscaleError, match=message):
        ask(run)


def test_what_was_not_asked_for(tmp_path: Path) -> None:
    run = save(tmp_path, top=0, density=None)
    with pytest.raises(gs.GradscaleError, match=r"asked for eigenvalues, got a run without; .* --top K"):
        run.eigenvalues()
    with pytest.raises(gs.GradscaleError, match=r"asked for a density, got a run without; .* --density"):
        run.quadrature(0)


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    run = save_spectrum(tmp_path, plan_of_spectrum(), [EIGENVALUE], [])
    with pytest.raises(gs.GradscaleError, match="complete to have eigenvalues at step 64, got none; run its command"):
        run.eigenvalues(64)
    (tmp_path / SPECTRA).unlink()
    with pytest.raises(gs.GradscaleError, match="complete to have spectra, got none; run its command again"):
        run.spectra()
    (tmp_path / "estimates.parquet").unlink()
    with pytest.raises(gs.GradscaleError, match="complete to have estimates, got none; run its command again"):
        run.estimates()


@pytest.mark.parametrize("name", [SPECTRA, "estimates.parquet"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    run = spectrum_run(tmp_path, steps=(0,), density={"probes": 2, "steps": 10})
    path = tmp_path / name
    whole = path.read_bytes()
    column = pq.ParquetFile(path).metadata.row_group(0).column(COLUMNS.index("value"))
    at = column.data_page_offset + column.total_compressed_size - 5
    for damaged in (whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], whole[: len(whole) // 2], b""):
        path.write_bytes(damaged)
        message = rf"{name} of {tmp_path} must be as it was written, got what cannot be read: .*; delete it and run"
        with pytest.raises(gs.GradscaleError, match=message):
            run.spectra() if name == SPECTRA else run.estimates()
        with pytest.raises(gs.GradscaleError, match=message):
            run.sql("select 1")


def test_other_columns_are_refused(tmp_path: Path) -> None:
    run = save(tmp_path)
    pq.write_table(pa.table({"step": [0], "value": [1.0]}), tmp_path / SPECTRA)
    with pytest.raises(gs.GradscaleError, match=r"must have the columns step, operator, .*, got step, value; read it"):
        run.spectra()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([EIGENVALUE._replace(kind="ritz")], "of kind eigenvalue or node and of operator .*, got 'ritz' of 'hessian'"),
        ([NODE._replace(operator="fisher")], "hessian, ggn, covariance, got 'node' of 'fisher'; name it so"),
        ([EIGENVALUE, EIGENVALUE], "must be there once, got .*'eigenvalue', None, 0.* twice; merge each part once"),
        ([EIGENVALUE._replace(probe=3)], "eigenvalues must have error and converged, .* got SpectrumRow.*; set"),
        ([EIGENVALUE._replace(error=None)], "eigenvalues must have error and converged, nodes probe and weight"),
        ([NODE._replace(weight=None)], "nodes probe and weight, and neither what the other has, got"),
        ([NODE._replace(converged=True)], "nodes probe and weight, and neither what the other has, got"),
        ([NODE._replace(value=float("nan"))], "value of a row must be finite, got .*; look at the operator's products"),
        ([NODE._replace(weight=0.4)], r"sum to 1, got 0.4 of \(step, operator, probe\) \(0, 'hessian', 0\); write all"),
    ],
)
def test_bad_rows_are_not_written(tmp_path: Path, rows: list[SpectrumRow], message: str) -> None:
    with pytest.raises(gs.GradscaleError, match=message):
        write_spectra(Files(str(tmp_path)), rows)
    assert not (tmp_path / SPECTRA).exists()


# the documentation


def test_the_documented_queries(run: Spectrum, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "run-directory.md").read_text(encoding="utf-8")
    block = next(part for part in text.split("```sql\n") if "'spectra.parquet'" in part).partition("```")[0]
    monkeypatch.chdir(run.path)
    largest, traces = duckdb.extract_statements(block.replace("3454464", str(P)))
    top = duckdb.sql(largest).df()
    np.testing.assert_array_equal(top["value"], np.concatenate([run.eigenvalues(step)[:3] for step in run.steps]))
    for row, step in zip(duckdb.sql(traces).fetchall(), run.steps, strict=True):
        expected = run.trace_of(np.square, step)
        assert row == pytest.approx((step, expected.value, expected.stderr), rel=1e-9)
    frame = pd.read_parquet("spectra.parquet")
    table = frame[frame.kind == "eigenvalue"].pivot(index="step", columns="index", values="value")
    np.testing.assert_array_equal(table.loc[64], run.eigenvalues(64))
