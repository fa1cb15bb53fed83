"""The sketches of one step as they lie in a run's files, read row group by row group.

A row group holds at most 16 MiB of sketches, so a scan of a million sketches of 4096 float32 (16.4 GB) holds
16 MiB of them at a time, two or three times as much while Parquet decodes them, and 24 bytes an example for ids
and norms.

Shapes: n finite examples of a step, m of them chosen, K sketch.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradscale.errors import GradscaleError
from gradscale.sketches import differing_fields
from gradscale.store.files import Files


class RowGroup(NamedTuple):
    """Row group `number` of the file `name`: the sketches at the positions `start` to `stop` of the n."""

    name: str
    number: int
    start: int
    stop: int


@dataclass(frozen=True)
class StoredSketches:
    """Where the sketches of one step are, and what is exact about their examples. `positions` count them by id."""

    files: Files
    step: int
    scheme: Mapping[str, Any]
    groups: tuple[RowGroup, ...]
    ids: np.ndarray  # [n] int64, ascending
    sq_norms: np.ndarray  # [n] float64: of the gradients
    measured: np.ndarray  # int64, ascending: the ids of all examples, finite or not

    def positions(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """[m] where the examples `ids` are, in their order.

        Raises: GradscaleError naming the first that is unknown or not finite.
        """
        asked = np.asarray(ids).reshape(-1)
        if asked.dtype.kind not in "iu" and len(asked):
            raise GradscaleError(f"example ids must be whole numbers, got {asked.dtype}")
        asked = asked.astype(np.int64)
        found = np.searchsorted(self.ids, asked)
        missing = asked[~_holds(self.ids, asked, found)]
        if len(missing):
            raise self._no_sketch(int(missing[0]))
        return found

    def blocks(self) -> Iterator[tuple[RowGroup, np.ndarray]]:
        """Every row group with its matrix [rows, K] in the stored type, which is Arrow's memory: nothing is copied."""
        for group in self.groups:
            yield group, self._read(group)

    def take(self, positions: np.ndarray) -> np.ndarray:
        """[m, K] in the stored type: a copy of the sketches at `positions`. Reads every row group that holds one."""
        return self._taken(positions, self._read)

    def scan(self, positions: np.ndarray, rows: int) -> Iterator[np.ndarray]:
        """[rows, K] in the stored type: the sketches at the ascending `positions`, in order; the last may be shorter.

        Where a block ends depends on `rows` alone, not on the files. Every row group is read once and held until the
        next one is.
        """
        held: dict[RowGroup, np.ndarray] = {}

        def read(group: RowGroup) -> np.ndarray:
            if group not in held:
                held.clear()
                held[group] = self._read(group)
            return held[group]

        for start in range(0, len(positions), rows):
            yield self._taken(positions[start : start + rows], read)

    def _taken(self, positions: np.ndarray, read: Callable[[RowGroup], np.ndarray]) -> np.ndarray:
        out: np.ndarray | None = None
        lowest, highest = (int(positions.min()), int(positions.max())) if len(positions) else (0, -1)
        first = bisect_right(self.groups, lowest, key=lambda group: group.stop)
        last = bisect_right(self.groups, highest, key=lambda group: group.start)
        for group in self.groups[first:last]:
            (chosen,) = np.nonzero((positions >= group.start) & (positions < group.stop))
            if len(chosen):
                part = read(group)[positions[chosen] - group.start]
                out = np.empty((len(positions), part.shape[1]), part.dtype) if out is None else out
                out[chosen] = part
        return np.empty((0, int(self.scheme["dim"])), np.float32) if out is None else out

    def _read(self, group: RowGroup) -> np.ndarray:
        with self.files.system.open_input_file(self.files.path(group.name)) as source:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            column = file.read_row_group(group.number, columns=["sketch"])["sketch"]
        return as_matrix(column)

    def _no_sketch(self, example_id: int) -> GradscaleError:
        where = f"at step {self.step} of {self.files.root}"
        if example_id in self.measured:
            return GradscaleError(
                f"example {example_id} must have a finite loss and gradient to have a sketch, got one that is not "
                f"finite {where}; leave it out: run.rows() has the column finite"
            )
        known = f"{self.measured[0]} to {self.measured[-1]}" if len(self.measured) else "none"
        return GradscaleError(
            f"example id must be one of those measured {where} ({known}), got {example_id}; run.rows() has them"
        )


def locate(
    files: Files, step: int, names: Sequence[str], rows: pa.Table, scheme: Mapping[str, Any], dtype: str
) -> StoredSketches:
    """The sketches in the files `names`, in the order of their shards; `rows` are those of the same shards.

    Raises: GradscaleError if a file is of another scheme or type than the run.
    """
    groups: list[RowGroup] = []
    ids: list[np.ndarray] = []
    position = 0
    for name in names:
        with files.system.open_input_file(files.path(name)) as source:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            check_file(name, file.schema_arrow, scheme, dtype)
            ids.append(file.read(columns=["example_id"])["example_id"].to_numpy())
            for index in range(file.num_row_groups):
                length = file.metadata.row_group(index).num_rows
                groups.append(RowGroup(name, index, position, position + length))
                position += length
    finite = rows["finite"].to_numpy()
    found = np.concatenate(ids) if ids else np.empty(0, np.int64)
    measured = rows["example_id"].to_numpy()
    if not np.array_equal(found, measured[finite]):
        raise GradscaleError(
            f"sketches must be those of the finite rows of step {step} in {files.root}, got other examples; measure "
            "the run again into another folder"
        )
    return StoredSketches(files, step, scheme, tuple(groups), found, rows["grad_sq_norm"].to_numpy()[finite], measured)


def check_file(name: str, schema: pa.Schema, scheme: Mapping[str, Any], dtype: str) -> None:
    """Raises: GradscaleError if the file `name` with this schema is of another scheme or type than its run."""
    found = json.loads((schema.metadata or {}).get(b"gradscale.sketch", b"{}"))
    kind = schema.field("sketch").type.value_type
    stored = {pa.float32(): "float32", pa.float16(): "float16"}.get(kind, str(kind))
    wrong = scheme_differences(scheme, found)
    wrong += [f"type {dtype} here and {stored} there"] if stored != dtype else []
    if wrong:
        raise GradscaleError(
            f"sketches in {name} must be of the scheme in run.json, got others: {'; '.join(wrong)}; sketches of "
            "different schemes cannot be compared, measure the run again into another folder"
        )


def scheme_differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """What differs between two schemes, `name here and there`; empty if sketches of the two may be compared."""
    return [f"{name} {here.get(name)!r} here and {there.get(name)!r} there" for name in differing_fields(here, there)]


def cosine_error(scheme: Mapping[str, Any], cosine: float) -> float:
    """The standard error of a cosine <Sx, Sy> / (|x| |y|) with exact norms: sqrt((1 + cosine^2) / K).

    That of a dense Gaussian map, which bounds those of dense signs and sparse signs; 0 for the identity. No bound for
    kronecker, whose error depends on the gradients: what it was is measured (`sketch_error` in the estimates).
    """
    return 0.0 if scheme["name"] == "identity" else math.sqrt((1 + cosine * cosine) / int(scheme["dim"]))


def error_is_stated(scheme: Mapping[str, Any]) -> bool:
    """Whether `cosine_error` is the scheme's own, or a bound of it."""
    return str(scheme["name"]) != "kronecker"


def as_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """[rows, K]: a column of fixed-size lists; without a copy where it is in one piece."""
    whole = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    matrix: np.ndarray = whole.flatten().to_numpy(zero_copy_only=True).reshape(len(column), -1)
    return matrix


def _holds(values: np.ndarray, asked: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Which of `asked` are in the ascending `values`, given where they would be."""
    inside = found < len(values)
    inside[inside] = values[found[inside]] == asked[inside]
    return inside
