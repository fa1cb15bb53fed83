"""The criteria of a stability report as rows of numbers, each with its error, status and definition."""

from __future__ import annotations

import math
from typing import NamedTuple

from gradscale.curvature.stability_at_scale import Judged, ScaleReport

_CURVATURE, _STEP = "loss units / parameter unit^2", "parameter unit^2 / loss units"
_DEFINED = {
    "sharpness": ("largest eigenvalue of H, a Ritz value", "2 / eta", _CURVATURE),
    "sharpness_momentum": ("largest eigenvalue of H, a Ritz value", "2 (1 + beta) / eta", _CURVATURE),
    "sharpness_adam": (
        "largest eigenvalue of D^-1/2 H D^-1/2, a Ritz value",
        "2 (1 + beta_1) / ((1 - beta_1) eta)",
        "1 / parameter unit",
    ),
    "bound_along": ("eta", "2 a / (a^2 + p Var v'H_i v), a = v'H v: no eta above it is stable", _STEP),
    "bound_of_traces": (
        "eta",
        "2 tr H / ((1 - p) |H|_F^2 + p mean |H_i|_F^2): no eta above it is stable",
        _STEP,
    ),
    "non_uniformity": ("lower bound of s along one direction", "1 / (eta sqrt(p))", _CURVATURE),
}


class Row(NamedTuple):
    """A row of `estimates.parquet`, without step, measure and scope."""

    name: str
    value: float
    stderr: float | None  # None where exact; the bound of the error where nothing is sampled
    n: int
    status: str  # identity, estimator, conditional or heuristic
    definition: str
    unit: str


def stability_rows(report: ScaleReport) -> list[Row]:
    """`<criterion>` and `<criterion>_threshold` of each, the error at the one that is estimated.

    A bound is conditional, as of a minimum of all examples, unless it is heuristic.
    """
    return [row for each in report.criteria for row in _rows(each, report)]


def _rows(found: Judged, report: ScaleReport) -> list[Row]:
    value, threshold, unit = _DEFINED[found.name]
    setting = f"eta = {report.eta:g}, B = {report.batch_size}; {found.source}"
    stderr = found.stderr or (found.error if math.isfinite(found.error) else math.nan)
    status = "conditional" if found.name.startswith("bound") and found.status != "heuristic" else found.status
    told, exact = (stderr or None, status), (None, "identity")
    of_value, of_threshold = (told, exact) if found.estimated == "value" else (exact, told)
    return [
        Row(found.name, found.value, of_value[0], found.n, of_value[1], f"{value}; {setting}", unit),
        Row(
            f"{found.name}_threshold",
            found.threshold,
            of_threshold[0],
            found.n,
            of_threshold[1],
            f"{threshold}; {setting}",
            unit,
        ),
    ]
