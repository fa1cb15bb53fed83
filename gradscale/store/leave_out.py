"""The folder of `gs.leave_out_gap`: its plan, a record of every finished training, and the tables.

    leave_out.json               the plan, written first
    trainings/full.safetensors   the record of the training on all examples; without-00003: without block 3
    trajectory.parquet           a row per recorded step
    estimates.parquet            as a run's; `step` is the last step of the trainings
    gram.parquet                 a row per eigenvalue of K_n, if it was asked for

A record appears whole or not at all, and is written by the driver alone: a training is done once it is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.store.files import Files
from gradscale.store.store import Store, decode_states, encode_states

if TYPE_CHECKING:
    import pandas as pd

PLAN = "leave_out.json"
TRAJECTORY, GRAM = "trajectory.parquet", "gram.parquet"
_LOSS = "loss units"
_UNITS = {
    "step": "steps of gradient descent",
    "time": "steps x learning rate",
    "perturbation": "loss units / time",
    "perturbation_left_out": "loss units / time",
    "contraction": "1 / time",
    "index": "0 is the largest",
    "eigenvalue": "output unit^2 / loss units",
    "share": "1",
}
_WHOLE = ("step", "index")


@dataclass(frozen=True)
class LeaveOutFolder:
    files: Files

    def adopt(self, plan: Mapping[str, Any]) -> None:
        """Make `plan` the folder's, or check that it is the one that the folder has.

        A plan under which no training has been finished may be replaced.
        Raises: GradscaleError if the folder holds anything else, or listing the differences.
        """
        list(self.files.delete_leftovers())
        if not self.files.exists(PLAN):
            if self.files.size("") >= 0 or self.files.list():
                raise GradscaleError(
                    f"out must be a new folder, an empty one or one of leave_out_gap, got {self.files.root} without a "
                    f"{PLAN}; choose another folder"
                )
        else:
            old = json.loads(self.files.read(PLAN).to_pybytes())
            changed = [line for name in plan for line in _difference(name, old.get(name), plan[name])]
            if changed and self.files.list("trainings"):
                raise GradscaleError(
                    f"the settings must be those of the trainings that {self.files.root} already holds, got\n  "
                    + "\n  ".join(changed)
                    + "\nuse them again, or another out"
                )
        self.files.write(PLAN, (json.dumps(dict(plan), indent=2) + "\n").encode())

    def finished(self, name: str) -> bool:
        return self.files.exists(_record(name))

    def write(self, name: str, record: Mapping[str, Tensor]) -> None:
        self.files.write(_record(name), encode_states({name: record}))

    def read(self, name: str) -> dict[str, Tensor]:
        return decode_states(self.files.read(_record(name)).to_pybytes())[name]

    def write_tables(self, tables: Mapping[str, pa.Table], estimates: Iterable[tuple[Any, ...]]) -> None:
        for name, table in tables.items():
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink, compression="zstd", use_dictionary=False, write_page_checksum=True)
            self.files.write(name, sink.getvalue())
        Store(self.files).write_estimates(estimates)


def table_of(columns: Mapping[str, Tensor | None]) -> pa.Table:
    """Columns with their units in the fields' metadata. NaN: a number that cannot be told; None, all null: exact."""
    rows = max(len(column) for column in columns.values() if column is not None)
    fields = [
        pa.field(
            name,
            pa.int64() if name in _WHOLE else pa.float64(),
            nullable=column is None,
            metadata={"unit": _UNITS.get(name, _LOSS)},
        )
        for name, column in columns.items()
    ]
    arrays = [
        pa.nulls(rows, pa.float64()) if column is None else pa.array(column.numpy()) for column in columns.values()
    ]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def frame_of(table: pa.Table) -> pd.DataFrame:
    frame: pd.DataFrame = table.to_pandas()
    return frame


def _record(name: str) -> str:
    return f"trainings/{name}.safetensors"


def _difference(name: str, before: Any, after: Any) -> list[str]:
    return [] if before == after else [f"{name}: {before!r} in the folder, {after!r} now"]
