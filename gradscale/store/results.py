"""A finished (or unfinished) run, read back: estimates, rows, sketches, Gram matrices, SQL."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from gradscale.errors import GradscaleError
from gradscale.store.files import Files
from gradscale.store.folder import estimates_of, name_of, plan_of, read_table, steps_of
from gradscale.store.neighbours import neighbours
from gradscale.store.products import (
    BLOCK,
    GramBlock,
    check_comparable,
    check_same_parameters,
    cross_gram,
    cross_gram_blocks,
    gram,
    gram_blocks,
)
from gradscale.store.sketches import StoredSketches, as_matrix, check_file, locate
from gradscale.store.spectra import KIND, Spectrum
from gradscale.store.store import ESTIMATES, PLAN, Store, file_name

if TYPE_CHECKING:
    import pandas as pd


def open_run(path: str) -> Run | Spectrum:
    """The run in the folder or at the URI `path`: a `Spectrum` where `gradscale spectrum` has written it.

    Raises: GradscaleError if there is no run.
    """
    files = Files(str(path))
    if not files.exists(PLAN):
        raise GradscaleError(
            f"run must be a folder that gradscale has written, got {path} without {PLAN}; check the path"
        )
    return Spectrum(files) if plan_of(files).get("kind") == KIND else Run(files)


@dataclass(frozen=True)
class Run:
    """Reads committed shards only. Open one with `gradscale.open_run`."""

    files: Files

    @property
    def path(self) -> str:
        return self.files.root

    @property
    def name(self) -> str:
        return name_of(self.files)

    @property
    def plan(self) -> dict[str, Any]:
        """The contents of run.json."""
        return plan_of(self.files)

    @property
    def steps(self) -> list[int]:
        return steps_of(self.plan)

    def estimates(self) -> pd.DataFrame:
        """One row per (step, measure, name, scope); steps without all their shards have none.

        `stderr` is NaN where the value is exact or its error unknown.
        Raises: GradscaleError if the run was interrupted before it came to its estimates.
        """
        return estimates_of(self.files)

    def rows(self) -> ds.Dataset:
        """One row per example and step; `to_table()` gives them by step, then by example_id."""
        return self._dataset("rows")

    def sketches(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids [n] and sketches [n, K] of the finite examples at `step`, by id, in the stored type.

        All of them in memory: `stored_sketches` has a few at a time.
        Raises: GradscaleError if the run has no such step or stored no sketches, or files of another scheme.
        """
        self._check_sketches([step])
        table = self._dataset("sketches", step).to_table()
        return table["example_id"].to_numpy(), as_matrix(table["sketch"])

    def stored_sketches(self, step: int) -> StoredSketches:
        """Where the sketches of the finite examples at `step` are, by id, to be read a row group at a time.

        `ids` [n] and `sq_norms` [n] are the examples'; `blocks()`, `scan(positions, rows)` and `take(positions)` read.
        Memory: a row group, at most 16 MiB, two or three times as much while Parquet decodes it, and 24 bytes an
        example.
        Raises: GradscaleError as `sketches`.
        """
        self._check_step(step)
        plan = self.plan
        self._check_sketched(plan)
        rows = self._dataset("rows", step).to_table(columns=["example_id", "grad_sq_norm", "finite"])
        names = self._names("sketches", step)
        return locate(self.files, step, names, rows, plan["sketch"], _dtype(plan))

    def gram(
        self, step: int, ids: Sequence[int] | np.ndarray | None = None, beside: Sequence[int] | np.ndarray | None = None
    ) -> np.ndarray:
        """[n, n] float64 inner products of the finite examples' gradients at `step`, by id.

        `ids` picks examples, in that order; with `beside` the columns are those of other examples. Between different
        examples the products are estimated from the sketches; an example with itself has its exact squared norm. An
        entry has the same bits whatever else is asked for. Memory: the matrix, of 1 GiB (11,585 examples) at most,
        and the sketches of 2048 examples.
        Raises: GradscaleError if the matrix would be larger, an id is unknown or not finite, or as `sketches`.
        """
        stored = self.stored_sketches(step)
        rows = _chosen(stored, ids)
        if beside is not None:
            return cross_gram(stored, stored, rows, stored.positions(beside), same=True)
        return gram(stored, rows)

    def gram_blocks(
        self, step: int, size: int = BLOCK, ids: Sequence[int] | np.ndarray | None = None
    ) -> Iterator[GramBlock]:
        """The matrix `gram` in blocks (ids_a, ids_b, block) of at most `size` examples a side, of any n.

        They are those of the upper triangle, the diagonal included; the others are their transposes. Memory: the
        sketches of 2 `size` examples and a block, 48 MB for 1024 of 4096 float32, and a row group. Time: every sketch
        is read n / (2 size) times.
        Raises: GradscaleError as `gram`, but for size.
        """
        _check_size(size)
        stored = self.stored_sketches(step)
        return gram_blocks(stored, _chosen(stored, ids), size)

    def cross_gram(
        self,
        other: Run,
        step: int,
        other_step: int | None = None,
        ids: Sequence[int] | np.ndarray | None = None,
        other_ids: Sequence[int] | np.ndarray | None = None,
    ) -> np.ndarray:
        """[n, m] float64 inner products of this run's gradients at `step` with those of `other` at `other_step`.

        `other` may be this run at another step; `other_step` None is `step`. Rows and columns are the finite examples
        by id, or `ids` and `other_ids`. Both runs must have sketched the same parameters with the same scheme.
        Raises: GradscaleError naming what differs, or as `gram`.
        """
        left, right, same = self._beside(other, step, other_step)
        return cross_gram(left, right, _chosen(left, ids), _chosen(right, other_ids), same)

    def cross_gram_blocks(
        self,
        other: Run,
        step: int,
        other_step: int | None = None,
        size: int = BLOCK,
        ids: Sequence[int] | np.ndarray | None = None,
        other_ids: Sequence[int] | np.ndarray | None = None,
    ) -> Iterator[GramBlock]:
        """The matrix `cross_gram` in blocks (ids_a, ids_b, block) of at most `size` examples a side, of any n and m.

        All of its blocks, row by row: ids_a are this run's, ids_b the other's. Memory: as `gram_blocks`. Time: the
        sketches of `other` are read n / size times, this run's once.
        Raises: GradscaleError as `cross_gram`, but for size.
        """
        _check_size(size)
        left, right, same = self._beside(other, step, other_step)
        return cross_gram_blocks(left, right, _chosen(left, ids), _chosen(right, other_ids), same, size)

    def neighbours(
        self, example_id: int, step: int | None = None, k: int = 10, by: str = "cosine", most_opposed: bool = False
    ) -> pd.DataFrame:
        """The k examples whose gradients point most the same way as that of `example_id`, the most aligned first.

        One row each: example_id, label (if the run has them), loss, inner_product, inner_product_stderr, cosine and
        cosine_stderr. `by` is "cosine" or "inner product"; `most_opposed` gives the lowest first. `step` may be left
        out where the run has only one. Inner products are estimated from the sketches; the norms in the cosine are
        exact, so that it may come out a little above 1. Beside a zero gradient the cosine is undefined: NaN, and last;
        `frame.attrs["zero_gradients"]` counts them.

        Standard errors: sqrt((1 + cosine^2) / K), the dense Gaussian's, which those of count, rademacher and srht do
        not exceed; 0 of the identity. That is no bound for kronecker: there every cosine is given the error measured
        at this step, `sketch_error/cosine_rms_error` of the estimates, or NaN where the run has none.
        `frame.attrs["stderr_is"]` says "stated" or "measured" accordingly; `frame.attrs["sketch_error"]` is the
        measured error, or NaN, of any scheme: the root mean square over pairs of 16 examples or fewer, not of the pair
        asked about. None of them says how far being the most extreme of many estimates has biased the first ones.

        Cost: one scan of the step's sketches, a row group in memory at a time.
        Raises: GradscaleError if the example is unknown, not finite, or has a zero gradient and no cosine; or as
        `sketches`.
        """
        if step is None and len(self.steps) > 1:
            raise GradscaleError(f"step must be given where a run has several, {self.steps}, got None")
        stored = self.stored_sketches(self.steps[0] if step is None else step)
        (position,) = stored.positions([example_id])
        found = neighbours(stored, int(position), k, by, most_opposed, self._measured_error(stored.step))
        rows = self._dataset("rows", stored.step)
        about = [name for name in ("example_id", "label", "loss") if name in rows.schema.names]
        table = rows.to_table(columns=about, filter=ds.field("example_id").isin(found["example_id"].tolist()))
        merged: pd.DataFrame = table.to_pandas().merge(found, on="example_id").set_index("example_id", drop=False)
        merged = merged.loc[found["example_id"]].reset_index(drop=True)
        merged.attrs = found.attrs
        return merged

    def sql(self, query: str) -> pd.DataFrame:
        """A DuckDB query over the tables `rows`, `estimates` and, where stored, `sketches`."""
        import duckdb

        with duckdb.connect() as connection:
            connection.register("rows", self.rows())
            if self.files.exists(ESTIMATES):
                connection.register("estimates", self._table(ESTIMATES))
            if self.plan["sketch"] is not None:
                self._check_sketches(sorted({step for step, _ in Store(self.files).committed()}))
                connection.register("sketches", self._dataset("sketches"))
            frame: pd.DataFrame = connection.execute(query).df()
        return frame

    def failures(self) -> list[dict[str, Any]]:
        """What is recorded of the shards that failed on every attempt."""
        names = self.files.list("failures")
        return [json.loads(self.files.read(name).to_pybytes()) for name in names]

    def _dataset(self, folder: str, step: int | None = None) -> ds.Dataset:
        """The committed files below `folder`, in the order of steps and shards."""
        paths = [self.files.path(name) for name in self._names(folder, step)]
        options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        return ds.dataset(
            paths, filesystem=self.files.system, format=ds.ParquetFileFormat(default_fragment_scan_options=options)
        )

    def _names(self, folder: str, step: int | None = None) -> list[str]:
        """Of the committed files below `folder`, in the order of steps and shards."""
        shards = [unit for unit in sorted(Store(self.files).committed()) if step is None or unit[0] == step]
        if not shards:
            raise GradscaleError(f"run {self.path} must have a committed shard, got none; run its command again")
        return [file_name(folder, s, shard, "parquet") for s, shard in shards]

    def _beside(self, other: Run, step: int, other_step: int | None) -> tuple[StoredSketches, StoredSketches, bool]:
        """The sketches of both, and whether they are the same ones.

        Raises: GradscaleError unless they may be compared.
        """
        there = step if other_step is None else other_step
        check_same_parameters(self.plan["parameters"], other.plan["parameters"], f"{self.path} and {other.path}")
        left, right = self.stored_sketches(step), other.stored_sketches(there)
        check_comparable(left, right)
        return left, right, self.files == other.files and step == there

    def _measured_error(self, step: int) -> float:
        """The `cosine_rms_error` of the sketches at `step`; NaN where the run has no estimate of it."""
        if not self.files.exists(ESTIMATES):
            return math.nan
        of_step = ds.field("step") == step
        chosen = of_step & (ds.field("measure") == "sketch_error") & (ds.field("name") == "cosine_rms_error")
        found = self._table(ESTIMATES).filter(chosen)["value"].to_pylist()
        return float(found[0]) if found else math.nan

    def _check_sketches(self, steps: Sequence[int]) -> None:
        """Raises: GradscaleError if the run has no such step or stored no sketches, or files of another scheme."""
        plan = self.plan
        for step in steps:
            self._check_step(step)
            self._check_sketched(plan)
            for name in self._names("sketches", step):
                with self.files.system.open_input_file(self.files.path(name)) as source:
                    check_file(name, pq.read_schema(source), plan["sketch"], _dtype(plan))

    def _check_sketched(self, plan: dict[str, Any]) -> None:
        if plan["sketch"] is None:
            raise GradscaleError(
                f"run {self.path} must have been measured with sketch=NAME:K, got a run without sketches"
            )

    def _table(self, name: str) -> pa.Table:
        return read_table(self.files, name)

    def _check_step(self, step: int) -> None:
        if step not in self.steps:
            raise GradscaleError(f"step must be one of {self.steps}, got {step}")


def _chosen(stored: StoredSketches, ids: Sequence[int] | np.ndarray | None) -> np.ndarray:
    """The positions of `ids`, or of all examples."""
    return np.arange(len(stored.ids)) if ids is None else stored.positions(ids)


def _check_size(size: int) -> None:
    if not isinstance(size, int) or size < 1:
        raise GradscaleError(f"size must be a whole number of at least 1, got {size!r}")


def _dtype(plan: dict[str, Any]) -> str:
    """Of the sketches; runs of before the choice have float32."""
    return str(plan.get("sketch_dtype") or "float32")
