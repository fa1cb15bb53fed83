"""Sketches narrowed to the type that they are stored in: overflow is refused, underflow is counted.

Sketches are not scaled: in a file a number is what it is, in every reader, and inner products across files,
steps and runs need no factors. What float16 cannot hold is therefore refused, never stored as infinity.

Shapes: n examples, K sketch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.errors import GradscaleError

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16}


class Narrowed(NamedTuple):
    """`matrix` [n, K] as it is stored. float16 holds 11 bits from 6.1e-5 to 65504, fewer below, none below 3e-8."""

    matrix: Tensor
    zeroed: Tensor  # [n] int64: entries that are not zero and are stored as zero
    coarse: int  # entries that are stored with fewer bits than the type has, those stored as zero included


def check_dtype(dtype: str) -> str:
    """Raises: GradscaleError if sketches cannot be stored as `dtype`."""
    if dtype not in DTYPES:
        raise GradscaleError(f"sketch_dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return dtype


def narrowed(sketches: Tensor, ids: Tensor, finite: Tensor, dtype: str) -> Narrowed:
    """The sketches [n, K] of the examples `ids` in `dtype`; those that are not `finite` become zero.

    Raises: GradscaleError naming the largest entry, if the type cannot hold it.
    """
    wide = sketches.where(finite[:, None], 0.0)
    matrix = wide.to(DTYPES[dtype])
    if not matrix.isfinite().all():
        raise _overflow(wide, ids, dtype)
    zeroed = ((matrix == 0) & (wide != 0)).sum(dim=1)
    smallest = torch.finfo(matrix.dtype).smallest_normal
    return Narrowed(matrix, zeroed, int(((wide != 0) & (wide.abs() < smallest)).sum()))


def _overflow(wide: Tensor, ids: Tensor, dtype: str) -> GradscaleError:
    largest = int(wide.abs().argmax())
    row, entry = divmod(largest, wide.shape[1])
    remedy = (
        "store them with --sketch-dtype float32 (in Python sketch_dtype='float32') in another --out"
        if dtype == "float16"
        else "scale the task's losses down"
    )
    return GradscaleError(
        f"sketch entries must be at most {torch.finfo(DTYPES[dtype]).max:.6g} in magnitude to be stored as {dtype}, "
        f"got {float(wide[row, entry]):.6g}, the largest, in the sketch of example {int(ids[row])}; {remedy}"
    )
