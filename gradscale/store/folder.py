"""What every run directory has, of gradients or of a spectrum: its name, its plan, its tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from gradscale.errors import GradscaleError
from gradscale.store.files import Files
from gradscale.store.store import ESTIMATES, PLAN

if TYPE_CHECKING:
    import pandas as pd


def name_of(files: Files) -> str:
    return files.root.rstrip("/").rpartition("/")[2]


def plan_of(files: Files) -> dict[str, Any]:
    """The contents of run.json."""
    found: dict[str, Any] = json.loads(files.read(PLAN).to_pybytes())
    return found


def steps_of(plan: Mapping[str, Any]) -> list[int]:
    return [int(step) for step in plan["checkpoints"]]


def read_table(files: Files, name: str) -> pa.Table:
    """The whole of one Parquet file, its page checksums verified.

    Raises: GradscaleError naming the file, if it is not as it was written.
    """
    try:
        return pq.read_table(pa.BufferReader(files.read(name)), page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        why = f"{error}".strip().splitlines()[0]
        raise GradscaleError(
            f"{name} of {files.root} must be as it was written, got what cannot be read: {why}; delete it and run "
            "the same command again, or restore it from a copy"
        ) from error


def estimates_of(files: Files) -> pd.DataFrame:
    """One row per (step, measure, name, scope).

    Raises: GradscaleError if the run was interrupted before it came to its estimates, or the file is damaged.
    """
    if not files.exists(ESTIMATES):
        raise GradscaleError(f"run {files.root} must be complete to have estimates, got none; run its command again")
    frame: pd.DataFrame = read_table(files, ESTIMATES).to_pandas()
    return frame
