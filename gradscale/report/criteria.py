"""Stability as a table and a sentence: every criterion against its threshold, and the verdict of each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from gradscale.report.levels import Levels
from gradscale.report.measured import curve
from gradscale.report.numbers import estimate_text, number_text

MEASURE = "stability"
_LIMIT = "_threshold"
_NEGLIGIBLE = 1e-5  # an error that the four digits of a cell do not show
MEANS = {
    "unstable": "a necessary criterion is not met: SGD leaves the neighbourhood",
    "stable": "a sufficient criterion is met: SGD stays",
    "undecided": "no necessary criterion fails beyond its error, and none that suffices is met",
}
NOT_AWAY = "The verdict is that of a minimum of all examples; away from one it says how curvature stands to the step"


def criteria(estimates: pd.DataFrame) -> list[str]:
    """The names of those that have a threshold, in the order in which they were written."""
    names = [str(name) for name in estimates[estimates["measure"] == MEASURE]["name"].unique()]
    return [name for name in names if f"{name}{_LIMIT}" in names]


def columns_of(estimates: pd.DataFrame, levels: Levels, steps: list[int]) -> dict[str, list[str]]:
    """A column of cells `value / threshold` of each criterion, and the verdicts where the run has them."""
    columns = {
        f"{name} / threshold": [
            " / ".join(_at(curve(estimates, MEASURE, each), step) for each in (name, f"{name}{_LIMIT}"))
            for step in steps
        ]
        for name in criteria(estimates)
    }
    return columns | ({"verdict": [levels.verdicts.get(step, "") for step in steps]} if levels.verdicts else {})


def setting_text(plan: Mapping[str, Any]) -> str:
    """`SGD with η = 0.1 and batches of 32`."""
    asked = plan.get("stability") or {}
    momentum = f", momentum {asked['momentum']:g}" if asked.get("momentum") else ""
    return f"SGD with η = {asked.get('eta'):g}{momentum} and batches of {asked.get('batch_size')}"


def verdict_sentence(label: str, levels: Levels) -> str:
    """At which steps SGD is unstable, stable or neither has been shown. Empty of a run without verdicts."""
    if not levels.verdicts:
        return ""
    said = []
    for verdict, meaning in MEANS.items():
        at = [str(step) for step, found in sorted(levels.verdicts.items()) if found == verdict]
        said += [f"{verdict} at step{'s' if len(at) > 1 else ''} {', '.join(at)} ({meaning})"] if at else []
    return f"{setting_text(levels.plan)}, of {label}: {'; '.join(said)}. {NOT_AWAY}."


def verdict_legend(levels: Levels) -> tuple[str, ...]:
    found = [verdict for verdict in MEANS if verdict in levels.verdicts.values()]
    return (*(f"{verdict}: {MEANS[verdict]}" for verdict in found), *([NOT_AWAY] if found else []))


def _at(values: pd.DataFrame, step: int) -> str:
    """With its error where that shows."""
    rows = values[values["step"] == step]
    if not len(rows):
        return ""
    value, stderr = float(rows["value"].iloc[0]), float(rows["stderr"].iloc[0])
    return number_text(value) if stderr <= _NEGLIGIBLE * abs(value) else estimate_text(value, stderr)
