"""Examples in Parquet or JSON-lines files, read a piece at a time.

Row i of the files, taken in sorted order of their paths, is example i. Nothing is opened before it is
needed and pickling keeps only the settings, so an object made on a driver reads on every worker from
that worker's own file system.

Shapes: B examples of one batch, D entries of one list.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gradscale.errors import GradscaleError
from gradscale.task import Batch
from gradscale.tasks import table_files
from gradscale.tasks.columns import BadRow, to_tensors

if TYPE_CHECKING:
    import pyarrow as pa

Decode = Callable[["pa.Table"], Batch]

CACHED_ROW_GROUPS = 2
EDGE = 64 * 1024  # bytes of a JSONL file's start and end that its fingerprint covers


class ParquetExamples:
    """The rows of Parquet files as examples, read by row group.

    `path` is a file, a folder (its own Parquet files, not those of its subfolders) or a glob. `columns`
    are those to read (None: all). `decode(table) -> {name: tensor with B rows}` must be picklable;
    without it numeric columns become [B] and lists of equal length [B, D] (`columns.to_tensors`).

    Memory: the footers, and the last two row groups of the columns asked for.
    Raises: GradscaleError, at the first use, if no file matches, a file is truncated or not Parquet, the
    files' columns differ, or a column is missing.
    """

    def __init__(self, path: str, columns: Sequence[str] | None = None, decode: Decode | None = None) -> None:
        self.path = path
        self.columns = None if columns is None else tuple(columns)
        self.decode = decode
        self._decoded: OrderedDict[int, Any] = OrderedDict()  # row group -> its pyarrow.Table

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.columns, self.decode)

    def __len__(self) -> int:
        return self._index.stops[-1] if self._index.stops else 0

    def batch(self, ids: range) -> Batch:
        """The examples `ids` (consecutive); reads the row groups that overlap them."""
        import pyarrow as pa

        _check_ids(ids, len(self), self.path)
        index = self._index
        pieces: list[Any] = []
        group = bisect_right(index.stops, ids.start)
        while group < len(index.stops) and (start := index.stops[group - 1] if group else 0) < ids.stop:
            first = max(ids.start - start, 0)
            pieces.append(self._row_group(group).slice(first, min(ids.stop, index.stops[group]) - start - first))
            group += 1
        return _decoded(pa.concat_tables(pieces or [index.schema.empty_table()]), ids, self.decode, self.path)

    def fingerprint(self) -> str:
        """A hash of the files' names, sizes, numbers of rows and footers (which hold every column's statistics)."""
        digest = hashlib.blake2b(digest_size=16)
        for file, footer in zip(self._index.files, self._index.footers, strict=True):
            digest.update(f"{file.name}:{file.stat().st_size}:{footer.num_rows};".encode())
            digest.update(table_files.footer_bytes(file))
        return digest.hexdigest()

    @cached_property
    def _index(self) -> _ParquetIndex:
        import pyarrow as pa

        files = table_files.data_files(self.path, table_files.PARQUET_SUFFIXES)
        footers = [table_files.read_footer(file) for file in files]
        schemas = [footer.schema.to_arrow_schema() for footer in footers]
        columns = table_files.chosen_columns(self.columns, schemas[0].names, files[0])
        schema = pa.schema([pa.field(name, schemas[0].field(name).type) for name in columns])
        for file, other in zip(files, schemas, strict=True):
            table_files.check_same_types(schema, other, files[0], file, every_column=self.columns is None)
        sizes = {
            (f, g): footer.row_group(g).num_rows
            for f, footer in enumerate(footers)
            for g in range(footer.num_row_groups)
        }
        groups = [group for group, size in sizes.items() if size]
        return _ParquetIndex(tuple(files), footers, schema, groups, list(accumulate(sizes[group] for group in groups)))

    def _row_group(self, number: int) -> Any:
        if number in self._decoded:
            self._decoded.move_to_end(number)
        else:
            self._decoded[number] = self._index.read(number)
            while len(self._decoded) > CACHED_ROW_GROUPS:
                self._decoded.popitem(last=False)
        return self._decoded[number]


class JsonlExamples:
    """The lines of JSON-lines files as examples: one JSON object a line, blank lines left out.

    `path`, `columns` and `decode` as in `ParquetExamples`; `columns=None` means the keys of the first
    line. A key that a later line lacks is null there. Numbers without a fraction become integers, so
    give a `decode` for a float column that may hold whole numbers.

    Cost: the first use reads every file once to find its lines. Memory: 8 bytes a line.
    Raises: GradscaleError, at the first use, if no file matches or a column is missing; from `batch` if a
    line is not a JSON object.
    """

    def __init__(self, path: str, columns: Sequence[str] | None = None, decode: Decode | None = None) -> None:
        self.path = path
        self.columns = None if columns is None else tuple(columns)
        self.decode = decode

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.columns, self.decode)

    def __len__(self) -> int:
        return self._index.stops[-1]

    def batch(self, ids: range) -> Batch:
        """The examples `ids` (consecutive); seeks to each of their lines."""
        import pyarrow as pa

        _check_ids(ids, len(self), self.path)
        rows = list(self._rows(ids))
        try:
            table = pa.table({name: [row.get(name) for row in rows] for name in self._index.columns})
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise GradscaleError(
                f"data {self.path} must hold one type in every column, got {error} "
                f"in examples {ids.start} to {ids.stop - 1}; make the column's values alike"
            ) from error
        return _decoded(table, ids, self.decode, self.path)

    def fingerprint(self) -> str:
        """A hash of the files' names, sizes, numbers of lines and first and last 64 KiB."""
        digest = hashlib.blake2b(digest_size=16)
        for file, offsets in zip(self._index.files, self._index.offsets, strict=True):
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}:{len(offsets)};".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(EDGE))
                stream.seek(max(0, size - EDGE))
                digest.update(stream.read())
        return digest.hexdigest()

    @cached_property
    def _index(self) -> _JsonlIndex:
        files = table_files.data_files(self.path, table_files.JSONL_SUFFIXES)
        offsets = [table_files.line_offsets(file) for file in files]
        filled = next((file for file, starts in zip(files, offsets, strict=True) if starts), None)
        first = None if filled is None else table_files.first_object(filled)
        names = tuple(self.columns or ()) if first is None else tuple(first)  # without a line there are no names
        columns = table_files.chosen_columns(self.columns, names, filled or files[0])
        return _JsonlIndex(tuple(files), columns, offsets, list(accumulate(map(len, offsets))))

    def _rows(self, ids: range) -> Iterator[dict[str, Any]]:
        index, position = self._index, ids.start
        while position < ids.stop:
            number = bisect_right(index.stops, position)
            start = index.stops[number - 1] if number else 0
            stop = min(ids.stop, index.stops[number])
            with index.files[number].open("rb") as stream:
                for offset in index.offsets[number][position - start : stop - start]:
                    stream.seek(offset)
                    yield table_files.parse_line(stream.readline(), index.files[number], offset)
            position = stop


def open_examples(path: str, columns: Sequence[str], decode: Decode) -> ParquetExamples | JsonlExamples:
    """`ParquetExamples` or `JsonlExamples`, by the suffix of the files; a folder with Parquet files is Parquet."""
    kind = ParquetExamples if table_files.is_parquet(path) else JsonlExamples
    return kind(path, columns, decode)


def column_names(path: str) -> tuple[str, ...]:
    """The columns of the first Parquet file, or the keys of the first JSON line, at `path`."""
    if table_files.is_parquet(path):
        footer = table_files.read_footer(table_files.data_files(path, table_files.PARQUET_SUFFIXES)[0])
        return tuple(footer.schema.to_arrow_schema().names)
    objects = map(table_files.first_object, table_files.data_files(path, table_files.JSONL_SUFFIXES))
    return tuple(next((found for found in objects if found is not None), {}))


class _ParquetIndex(NamedTuple):
    files: tuple[Path, ...]
    footers: list[Any]  # pyarrow.parquet.FileMetaData of each file
    schema: Any  # pyarrow.Schema of the columns that are read
    groups: list[tuple[int, int]]  # (file, row group in it)
    stops: list[int]  # examples up to and with each group

    def read(self, number: int) -> Any:
        file, group = self.groups[number]
        return table_files.read_row_group(self.files[file], self.footers[file], group, self.schema)


class _JsonlIndex(NamedTuple):
    files: tuple[Path, ...]
    columns: tuple[str, ...]
    offsets: list[array[int]]  # of each file: the byte at which each line starts
    stops: list[int]  # examples up to and with each file


def _check_ids(ids: range, count: int, path: str) -> None:
    if ids.step != 1 or not 0 <= ids.start <= ids.stop <= count:
        raise GradscaleError(f"ids must be consecutive and within 0 to {count} of {path}, got {ids}; ask for fewer")


def _decoded(table: pa.Table, ids: range, decode: Decode | None, path: str) -> Batch:
    """The table's tensors, with a BadRow told as the example that it is."""
    try:
        return (decode or to_tensors)(table)
    except BadRow as bad:
        raise GradscaleError(f"example {ids.start + bad.row} of {path} {bad.problem}") from bad
