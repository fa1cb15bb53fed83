"""A finished (or unfinished) run, read back: estimates, rows, sketches, Gram matrices, SQL."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from gradscale.errors import GradscaleError
from gradscale.store.files import Files
from gradscale.store.store import ESTIMATES, PLAN, Store, file_name

if TYPE_CHECKING:
    import pandas as pd


def open_run(path: str) -> Run:
    """The run in the folder or at the URI `path`.

    Raises: GradscaleError if there is no run.
    """
    files = Files(str(path))
    if not files.exists(PLAN):
        raise GradscaleError(
            f"run must be a folder that gradscale has written, got {path} without {PLAN}; check the path"
        )
    return Run(files)


@dataclass(frozen=True)
class Run:
    """Reads committed shards only. Open one with `gradscale.open_run`."""

    files: Files

    @property
    def path(self) -> str:
        return self.files.root

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def plan(self) -> dict[str, Any]:
        """The contents of run.json."""
        found: dict[str, Any] = json.loads(self.files.read(PLAN).to_pybytes())
        return found

    @property
    def steps(self) -> list[int]:
        return [int(step) for step in self.plan["checkpoints"]]

    def estimates(self) -> pd.DataFrame:
        """One row per (step, measure, name, scope); steps without all their shards have none.

        `stderr` is NaN where the value is exact or its error unknown.
        Raises: GradscaleError if the run was interrupted before it came to its estimates.
        """
        if not self.files.exists(ESTIMATES):
            raise GradscaleError(f"run {self.path} must be complete to have estimates, got none; run its command again")
        frame: pd.DataFrame = self._table(ESTIMATES).to_pandas()
        return frame

    def rows(self) -> ds.Dataset:
        """One row per example and step; `to_table()` gives them by step, then by example_id."""
        return self._dataset("rows")

    def sketches(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids [n] and sketches [n, K] of the finite examples at `step`, by id.

        Raises: GradscaleError if the run has no such step or stored no sketches.
        """
        self._check_step(step)
        if self.plan["sketch"] is None:
            raise GradscaleError(
                f"run {self.path} must have been measured with sketch=NAME:K, got a run without sketches"
            )
        table = self._dataset("sketches", step).to_table()
        column = table["sketch"]
        whole = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies
        matrix = whole.flatten().to_numpy(zero_copy_only=True).reshape(len(table), -1)
        return table["example_id"].to_numpy(), matrix

    def gram(self, step: int) -> np.ndarray:
        """[n, n] float64 inner products of the finite examples' gradients at `step`, by id.

        Off the diagonal they are estimated from the sketches; the diagonal holds the exact squared norms.
        """
        _, matrix = self.sketches(step)
        wide = matrix.astype(np.float64)
        gram: np.ndarray = wide @ wide.T
        condition = (ds.field("step") == step) & ds.field("finite")
        exact = self._dataset("rows", step).to_table(columns=["grad_sq_norm"], filter=condition)
        np.fill_diagonal(gram, exact["grad_sq_norm"].to_numpy())
        return gram

    def sql(self, query: str) -> pd.DataFrame:
        """A DuckDB query over the tables `rows`, `estimates` and, where stored, `sketches`."""
        import duckdb

        with duckdb.connect() as connection:
            connection.register("rows", self.rows())
            if self.files.exists(ESTIMATES):
                connection.register("estimates", self._table(ESTIMATES))
            if self.plan["sketch"] is not None:
                connection.register("sketches", self._dataset("sketches"))
            frame: pd.DataFrame = connection.execute(query).df()
        return frame

    def failures(self) -> list[dict[str, Any]]:
        """What is recorded of the shards that failed on every attempt."""
        names = self.files.list("failures")
        return [json.loads(self.files.read(name).to_pybytes()) for name in names]

    def _dataset(self, folder: str, step: int | None = None) -> ds.Dataset:
        """The committed files below `folder`, in the order of steps and shards."""
        shards = [unit for unit in sorted(Store(self.files).committed()) if step is None or unit[0] == step]
        if not shards:
            raise GradscaleError(f"run {self.path} must have a committed shard, got none; run its command again")
        paths = [self.files.path(file_name(folder, s, shard, "parquet")) for s, shard in shards]
        options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        return ds.dataset(
            paths, filesystem=self.files.system, format=ds.ParquetFileFormat(default_fragment_scan_options=options)
        )

    def _table(self, name: str) -> pa.Table:
        return pq.read_table(pa.BufferReader(self.files.read(name)), page_checksum_verification=True)

    def _check_step(self, step: int) -> None:
        if step not in self.steps:
            raise GradscaleError(f"step must be one of {self.steps}, got {step}")
