"""Tables as Parquet, all written alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP = 8192  # rows


def encode_table(table: pa.Table, row_group: int = ROW_GROUP) -> pa.Buffer:
    """zstd, page checksums, and a dictionary only for strings: float columns do not repeat."""
    text = [field.name for field in table.schema if pa.types.is_string(field.type)]
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression="zstd", use_dictionary=text, row_group_size=row_group, write_page_checksum=True
    )
    return sink.getvalue()


def encode_rows(rows: Iterable[tuple[Any, ...]], schema: pa.Schema) -> pa.Buffer:
    """One tuple a row, in the order of the schema's fields."""
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    arrays = [pa.array(column, type=field.type) for column, field in zip(columns, schema, strict=True)]
    return encode_table(pa.Table.from_arrays(arrays, schema=schema))
