"""The run directory: commit a shard, list what is committed, read it back.

A worker writes a shard's rows, sketches and states; the driver then writes the commit record. A shard
exists once its record is there, so that work done twice is counted once. `results.py` is the reader's side.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import safetensors
import safetensors.torch
import xxhash
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.store import schema
from gradscale.store.files import Files
from gradscale.store.parquet import ROW_GROUP, encode_rows, encode_table

PLAN = "run.json"
ESTIMATES = "estimates.parquet"
_ROW_GROUP_BYTES = 16 << 20  # of sketches: 1024 of 4096 float32


class ShardColumns(NamedTuple):
    """What `Store.write_shard` stores; see gradscale.run.shard.Columns. CPU tensors with n rows."""

    example_id: Tensor
    label: Tensor | None
    loss: Tensor
    grad_sq_norm: Tensor
    layer_sq_norms: Tensor
    finite: Tensor
    sketch: Tensor | None  # of the type that it is stored in


class StoredFile(NamedTuple):
    name: str
    size: int
    xxh3_64: str


@dataclass(frozen=True)
class Store:
    """Reads and writes one run directory."""

    files: Files

    def write_shard(
        self,
        step: int,
        shard: int,
        columns: ShardColumns,
        states: Mapping[str, Mapping[str, Tensor]],
        parameters: Sequence[str],
        scheme: Mapping[str, object] | None,
    ) -> list[StoredFile]:
        """Write the files of one shard, without its commit record; `states` is measure key -> flat tensors."""
        rows = encode_table(_rows(step, shard, columns, parameters))
        written = [self._write(file_name("rows", step, shard, "parquet"), rows)]
        if columns.sketch is not None:
            assert scheme is not None
            table = _sketches(step, columns, scheme)
            row_group = max(1, min(ROW_GROUP, _ROW_GROUP_BYTES // columns.sketch[:1].nbytes))
            written.append(self._write(file_name("sketches", step, shard, "parquet"), encode_table(table, row_group)))
        written.append(self._write(file_name("states", step, shard, "safetensors"), encode_states(states)))
        return written

    def commit(self, step: int, shard: int, record: Mapping[str, Any]) -> None:
        """Write the commit record, the last file of a shard: from now on the shard exists.

        Raises: GradscaleError if a file of the shard is not there in full.
        """
        for name, size, _ in record["files"]:
            if self.files.size(name) != size:
                raise GradscaleError(
                    f"run directory {self.files.root} must be storage that every worker and the driver share, got no "
                    f"complete {name} after a worker had written it; use a shared folder or a URI such as s3://"
                )
        self.files.delete(file_name("failures", step, shard, "json"))
        self.files.write(file_name("commits", step, shard, "json"), json.dumps(record, indent=2).encode())

    def record_failure(self, step: int, shard: int, record: Mapping[str, Any]) -> None:
        self.files.write(file_name("failures", step, shard, "json"), json.dumps(record, indent=2).encode())

    def committed(self) -> set[tuple[int, int]]:
        """(step, shard) of every committed shard."""
        return {_step_and_shard(name) for name in self.files.list("commits") if name.endswith(".json")}

    def commit_record(self, step: int, shard: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.files.read(file_name("commits", step, shard, "json")).to_pybytes())
        return found

    def read_states(self, step: int, shard: int) -> dict[str, dict[str, Tensor]]:
        return decode_states(self._read_committed(file_name("states", step, shard, "safetensors"), step, shard))

    def write_merged(self, step: int, states: Mapping[str, Mapping[str, Tensor]], shards: int) -> None:
        """Write a step's states folded over its shards and a record of them, then drop the shards' own."""
        written = self._write(_merged(step, "safetensors"), encode_states(states))
        self.files.write(_merged(step, "json"), json.dumps(list(written)).encode())
        for shard in range(shards):
            self.files.delete(file_name("states", step, shard, "safetensors"))

    def read_merged(self, step: int) -> dict[str, dict[str, Tensor]] | None:
        """A step's folded states, or None if its shards have not been folded yet."""
        if not self.files.exists(_merged(step, "json")):
            return None
        stored = StoredFile(*json.loads(self.files.read(_merged(step, "json")).to_pybytes()))
        remedy = f"delete the folders {_folder('states', step)} and {_folder('commits', step)}"
        return decode_states(self._read_checked(stored, remedy))

    def write_estimates(self, rows: Iterable[tuple[Any, ...]]) -> None:
        """Write estimates.parquet: one tuple a row, in the order of the schema's fields."""
        self.files.write(ESTIMATES, encode_rows(rows, schema.estimates()))

    def _write(self, name: str, content: bytes | pa.Buffer) -> StoredFile:
        return StoredFile(name, self.files.write(name, content), xxhash.xxh3_64_hexdigest(content))

    def _read_committed(self, name: str, step: int, shard: int) -> bytes:
        stored = next(StoredFile(*f) for f in self.commit_record(step, shard)["files"] if f[0] == name)
        return self._read_checked(stored, f"delete {file_name('commits', step, shard, 'json')}")

    def _read_checked(self, stored: StoredFile, remedy: str) -> bytes:
        """The content of a file.

        Raises: GradscaleError if it is not what was written.
        """
        content = self.files.read(stored.name).to_pybytes() if self.files.exists(stored.name) else b""
        if xxhash.xxh3_64_hexdigest(content) != stored.xxh3_64:
            raise GradscaleError(
                f"{stored.name} must be as it was written, got other content; {remedy} in {self.files.root} and run "
                "the same command again"
            )
        return content


def encode_states(states: Mapping[str, Mapping[str, Tensor]]) -> bytes:
    """Tensors keyed `measure/field` or `measure/field/key`, as safetensors."""
    flat = {f"{key}/{field}": t.contiguous() for key, fields in states.items() for field, t in fields.items()}
    return safetensors.torch.save(flat)


def decode_states(content: bytes) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in safetensors.torch.load(content).items():
        key, _, field = name.partition("/")
        found.setdefault(key, {})[field] = tensor
    return found


def _rows(step: int, shard: int, columns: ShardColumns, parameters: Sequence[str]) -> pa.Table:
    n = len(columns.example_id)
    kind = schema.rows(parameters, labels=columns.label is not None)
    arrays = {
        "example_id": columns.example_id.numpy(),
        "step": np.full(n, step, dtype=np.int64),
        "shard": np.full(n, shard, dtype=np.int32),
        "loss": columns.loss.numpy(),
        "grad_sq_norm": columns.grad_sq_norm.numpy(),
        "layer_sq_norms": _fixed_size_list(columns.layer_sq_norms),
        "finite": columns.finite.numpy(),
    }
    if columns.label is not None:
        arrays["label"] = columns.label.numpy()
    return pa.Table.from_arrays([pa.array(arrays[name]) for name in kind.names], schema=kind)


def _sketches(step: int, columns: ShardColumns, scheme: Mapping[str, object]) -> pa.Table:
    assert columns.sketch is not None
    matrix = columns.sketch[columns.finite]
    ids = columns.example_id[columns.finite].numpy()
    kind = schema.sketches(matrix.shape[1], scheme, str(matrix.dtype).removeprefix("torch."))
    steps = np.full(len(ids), step, dtype=np.int64)
    return pa.Table.from_arrays([pa.array(ids), pa.array(steps), _fixed_size_list(matrix)], schema=kind)


def _fixed_size_list(matrix: Tensor) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1).numpy()), matrix.shape[1])


def file_name(folder: str, step: int, shard: int, extension: str) -> str:
    return f"{_folder(folder, step)}/shard-{shard:05d}.{extension}"


def _folder(folder: str, step: int) -> str:
    """Not step=…: of such a name readers make a second column `step`, of another type than the file's own."""
    return f"{folder}/step-{step:08d}"


def _merged(step: int, extension: str) -> str:
    return f"{_folder('states', step)}/merged.{extension}"


def _step_and_shard(name: str) -> tuple[int, int]:
    _, step, shard = name.split("/")
    return int(step.removeprefix("step-")), int(shard.removeprefix("shard-").removesuffix(".json"))
