"""Finding Parquet and JSON-lines files, and reading pieces of them, with errors that name the file."""

from __future__ import annotations

import glob
import json
from array import array
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from gradscale.errors import GradscaleError

PARQUET_SUFFIXES = (".parquet", ".pq")
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
MAGIC = b"PAR1"  # a Parquet file starts with it and ends with: footer, its length in 4 bytes, PAR1


def data_files(path: str, suffixes: Sequence[str]) -> list[Path]:
    """The files at `path` (a file, a folder or a glob), sorted. Of a folder: its own visible files with a suffix.

    Raises: GradscaleError if there is none, or `path` is a URI.
    """
    if "://" in path:
        raise GradscaleError(f"data must be a local file, folder or glob, got {path}; mount or download it")
    root = Path(path).expanduser()
    if root.is_dir():
        files = [f for f in root.iterdir() if f.suffix in suffixes and f.is_file() and f.name[0] not in "._"]
    elif root.is_file():
        files = [root]
    else:
        files = [Path(match) for match in glob.glob(str(root), recursive=True) if Path(match).is_file()]
    if not files:
        raise GradscaleError(
            f"data must be an existing file, folder or glob of {' or '.join(suffixes)} files, "
            f"got {path} which matches no file; check the path (subfolders need a glob such as 'DIR/**/*{suffixes[0]}')"
        )
    return sorted(files)


def is_parquet(path: str) -> bool:
    """Whether the files at `path` are Parquet by their suffix; a folder with both kinds counts as Parquet."""
    known = (*PARQUET_SUFFIXES, *JSONL_SUFFIXES)
    files = data_files(path, known)
    for file in files:
        if file.suffix not in known:
            raise GradscaleError(f"data must be {', '.join(known)} files, got {file}; convert or decompress it")
    return any(file.suffix in PARQUET_SUFFIXES for file in files)


def chosen_columns(asked: Sequence[str] | None, present: Sequence[str], file: Path) -> tuple[str, ...]:
    """`asked`, or every column that is present."""
    for name in asked or ():
        check_column(name, present, str(file))
    return tuple(present if asked is None else asked)


def check_column(name: str, present: Collection[str], source: str) -> None:
    if name not in present:
        raise GradscaleError(
            f"column must be one of those in {source} ({', '.join(present)}), got {name}; name one of them"
        )


def footer_bytes(file: Path) -> bytes:
    """The serialized metadata at the end of a Parquet file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(4)
        stream.seek(max(0, size - 8))
        tail = stream.read(8)
        length = int.from_bytes(tail[:4], "little")
        if size < 12 or head != MAGIC or tail[4:] != MAGIC or length > size - 12:
            raise _not_parquet(file, f"{size} bytes that start with {head!r} and end with {tail[4:]!r}")
        stream.seek(size - 8 - length)
        return stream.read(length)


def read_footer(file: Path) -> Any:
    """The `pyarrow.parquet.FileMetaData` of a file: schema, rows, row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    footer_bytes(file)
    try:
        return pq.read_metadata(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise _not_parquet(file, str(error)) from error


def read_row_group(file: Path, footer: Any, group: int, schema: Any) -> Any:
    """The columns of `schema` of one row group, as a `pyarrow.Table`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file, metadata=footer, page_checksum_verification=True) as parquet:
            table = parquet.read_row_group(group, columns=schema.names, use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise OSError(f"row group {group} of {file} could not be read: {error}") from error
    return table.select(schema.names).cast(schema)


def _not_parquet(file: Path, actual: str) -> GradscaleError:
    return GradscaleError(
        f"data file {file} must be a whole Parquet file, got {actual}; it is truncated or not Parquet: write it again"
    )


def check_same_types(expected: Any, other: Any, first: Path, file: Path, *, every_column: bool) -> None:
    """That `other` has the columns of `expected` with the same types and, where asked, no further columns."""
    here = {field.name: field.type for field in other if every_column or field.name in expected.names}
    there = {field.name: field.type for field in expected}
    if here != there:
        names = [name for name in there | here if there.get(name) != here.get(name)]
        raise GradscaleError(
            f"data files must have one schema, got {_types(names, there)} in {first} "
            f"but {_types(names, here)} in {file}; write them with one schema, or name only columns that agree"
        )


def _types(names: Sequence[str], types: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {types.get(name, 'absent')}" for name in names)


def line_offsets(file: Path) -> array[int]:
    """The byte at which each line that is not blank starts; one pass over the file, 8 bytes a line."""
    offsets, position = array("q"), 0
    with file.open("rb") as stream:
        for line in stream:
            if not line.isspace():
                offsets.append(position)
            position += len(line)
    return offsets


def first_object(file: Path) -> dict[str, Any] | None:
    """The object of the first line that is not blank, or None if there is no such line."""
    position = 0
    with file.open("rb") as stream:
        for line in stream:
            if not line.isspace():
                return parse_line(line, file, position)
            position += len(line)
    return None


def parse_line(line: bytes, file: Path, offset: int) -> dict[str, Any]:
    """The JSON object on the line of `file` that starts at byte `offset`."""
    try:
        value = json.loads(line)
        actual = type(value).__name__
    except ValueError as error:
        value, actual = None, str(error)
    if not isinstance(value, dict):
        raise GradscaleError(
            f"line {_line_number(file, offset)} of {file} must be a JSON object, got {actual}; write one object a line"
        )
    return value


def _line_number(file: Path, offset: int) -> int:
    count, left = 1, offset
    with file.open("rb") as stream:
        while left > 0 and (piece := stream.read(min(left, 1 << 20))):
            count, left = count + piece.count(b"\n"), left - len(piece)
    return count
