"""From Arrow columns to tensors.

Shapes: B rows of one table, D entries of one list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gradscale.errors import GradscaleError

if TYPE_CHECKING:
    import pyarrow as pa


class BadRow(Exception):
    """A decode step refuses row `row` of its table; the dataset says which example that is.

    `problem` completes "example 17 of FILE ...": `must be <expected>, got <actual>; <remedy>`.
    """

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(row, problem)
        self.row = row
        self.problem = problem


def to_tensors(table: pa.Table) -> dict[str, Tensor]:
    """Every column as a tensor: numbers and booleans [B], lists of equal length [B, D], nested ones [B, D, E, …].

    Unsigned integers of more than 8 bits become int64; every other type is kept.
    Raises: GradscaleError for a column of another type or of unequal lists; BadRow for a null.
    """
    return {name: to_tensor(table, name) for name in table.column_names}


def to_tensor(table: pa.Table, name: str) -> Tensor:
    """Column `name` as a tensor, as in `to_tensors`."""
    import pyarrow as pa

    column = table.column(name).combine_chunks()
    leaves = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
    shape = [len(leaves)]
    if isinstance(leaves, pa.FixedShapeTensorArray):
        refuse_nulls(leaves, name)
        return _copied(leaves.to_numpy_ndarray())
    while is_list(leaves.type):
        refuse_nulls(leaves, name, per_row=_per_row(shape))
        shape.append(_common_length(leaves, name))
        leaves = leaves.flatten()
    refuse_nulls(leaves, name, per_row=_per_row(shape))
    if not (pa.types.is_integer(leaves.type) or pa.types.is_floating(leaves.type) or pa.types.is_boolean(leaves.type)):
        raise GradscaleError(
            f"column {name} must hold numbers or lists of numbers, got {table.schema.field(name).type}; "
            "name the columns to read with columns=[...], or pass decode=..."
        )
    return _copied(leaves.to_numpy(zero_copy_only=False)).reshape(shape)


def is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_integer(kind: Any) -> bool:
    """An integer type, or the null type that JSON lines without a value have."""
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_null(kind))


def is_text(kind: Any) -> bool:
    """A string type, or the null type that JSON lines without a value have."""
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def refuse_nulls(values: Any, name: str, per_row: int = 1) -> None:
    """Raises BadRow for the first null of an array with `per_row` values a row."""
    if values.null_count:
        first = values.is_null().index(True).as_py()
        raise BadRow(first // per_row, f"must have a value in column {name}, got null; fill it in or drop the row")


def _per_row(shape: list[int]) -> int:
    return max(1, int(np.prod(shape[1:])))


def _common_length(lists: Any, name: str) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_fixed_size_list(lists.type):
        return int(lists.type.list_size)
    if not len(lists):
        return 0
    bounds = pc.min_max(pc.list_value_length(lists)).as_py()
    if bounds["min"] != bounds["max"]:
        raise GradscaleError(
            f"column {name} must hold lists of one length, got {bounds['min']} to {bounds['max']} entries; "
            "pass decode=... that pads them"
        )
    return int(bounds["min"])


def _copied(values: np.ndarray[Any, Any]) -> Tensor:
    wide = values.dtype.kind == "u" and values.dtype.itemsize > 1
    return torch.from_numpy(np.array(values, dtype=np.int64 if wide else values.dtype, order="C"))
