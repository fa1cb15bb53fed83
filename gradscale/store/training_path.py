"""path.parquet: what training did at every optimizer step, measured or not; a row each, written by one process."""

from __future__ import annotations

import time
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from gradscale.errors import GradscaleError
from gradscale.store.files import Files
from gradscale.store.folder import read_table
from gradscale.store.parquet import encode_table

PATH = "path.parquet"
_SECONDS = 30.0  # between two writings
_SHARE = 0.01  # of the time that may go into them


class PathRow(NamedTuple):
    """Of one optimizer step; see `schema`."""

    step: int
    length: float
    length_trained: float
    skipped: bool
    learning_rates: tuple[float, ...]
    gradient_norm: float | None
    loss: float
    seconds: float


def schema() -> pa.Schema:
    """One row per optimizer step, by step. NaN is what could not be told."""
    columns = [
        ("step", pa.int64(), "optimizer step"),
        ("length", pa.float64(), "parameter units: |w_(t+1) - w_t| over the measured parameters"),
        ("length_trained", pa.float64(), "parameter units: the same over all that are trained"),
        ("skipped", pa.bool_(), "true: the gradient was not finite and no step was taken"),
        ("learning_rates", pa.list_(pa.float64()), "parameter unit^2 / loss units, of every group: the step's own"),
        ("gradient_norm", pa.float64(), "loss units / parameter unit: DeepSpeed's, before clipping; null: it has none"),
        ("loss", pa.float64(), "loss units: mean over the microbatches of all ranks"),
        ("seconds", pa.float64(), "since the end of the step before, or since attach"),
    ]
    return pa.schema(
        [
            pa.field(name, kind, nullable=name == "gradient_norm", metadata={"unit": unit})
            for name, kind, unit in columns
        ],
        metadata={"gradscale.schema_version": "1"},
    )


def read_path(files: Files) -> pa.Table:
    """Raises: GradscaleError if there is no path.parquet, or it has other columns or is damaged."""
    if not files.exists(PATH):
        raise GradscaleError(
            f"run {files.root} must have the path of a training, got no {PATH}; train under gs.attach with path=True"
        )
    table = read_table(files, PATH)
    if table.schema.names != schema().names:
        raise GradscaleError(
            f"{PATH} of {files.root} must have the columns {', '.join(schema().names)}, got "
            f"{', '.join(table.schema.names)}; read it with the gradscale that wrote it"
        )
    return table


class PathTable:
    """The rows of `files`' path.parquet before step `first`, and those added since. Later ones are dropped at once.

    The file is written whole: by `flush`, and of its own accord at most every 30 seconds and so seldom that it takes a
    hundredth of the time. Memory: some 80 bytes a row.
    Raises: GradscaleError as `read_path`, but for there being none.
    """

    def __init__(self, files: Files, first: int) -> None:
        self._files, self._added = files, list[PathRow]()
        self._kept = schema().empty_table()
        self._took, self._tried = 0.0, time.perf_counter()
        if files.exists(PATH):
            old = read_path(files)
            self._kept = old.filter(pc.less(old["step"], first))
            if len(self._kept) < len(old):
                self._write(self._kept)

    def add(self, row: PathRow) -> None:
        """Raises: OSError if it is time to write the file and it cannot be; its rows are kept for the next time."""
        self._added.append(row)
        if time.perf_counter() - self._tried > max(_SECONDS, self._took / _SHARE):
            self.flush()

    def flush(self) -> None:
        """Raises: OSError as `add`."""
        if self._added:
            columns = zip(zip(*self._added, strict=True), schema(), strict=True)
            arrays = [pa.array(column, field.type) for column, field in columns]
            added = pa.Table.from_arrays(arrays, schema=schema())
            whole = pa.concat_tables([self._kept, added]).combine_chunks()
            self._write(whole)
            self._kept, self._added = whole, []

    def _write(self, table: pa.Table) -> None:
        start = self._tried = time.perf_counter()
        self._files.write(PATH, encode_table(table))
        self._took = time.perf_counter() - start
