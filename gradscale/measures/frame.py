"""Estimates as a table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradscale.measures.measure import Estimate, Estimates

if TYPE_CHECKING:
    import pandas as pd


def estimates_frame(estimates: Estimates, measure: str, step: int = 0) -> pd.DataFrame:
    """Estimates that a function gave, as the rows of estimates.parquet: its columns, sorted by name and scope.

    `stderr` is NaN where the value is exact or its error unknown, as in `run.estimates()`. A class matrix, say, becomes
    a file by `gs.estimates_frame(gs.stiffness_between(a, b, step).between, "stiffness", step).to_parquet(path)`.
    """
    import pandas as pd

    rows = []
    for (name, scope), estimate in sorted(estimates.items()):
        error = math.nan if estimate.stderr is None else estimate.stderr
        rows.append((step, measure, name, scope, *estimate._replace(stderr=error)))
    return pd.DataFrame(rows, columns=["step", "measure", "name", "scope", *Estimate._fields])
