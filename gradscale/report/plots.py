"""Figures of the report as inline SVG: one quantity against step. Error bars are one standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from gradscale.report.canvas import INK, MARKERS, drawing, svg_of
from gradscale.report.measured import Measured, curve
from gradscale.report.numbers import number_text, power_text
from gradscale.report.quantities import beside, curve_of, unit_of
from gradscale.report.quantity import Quantity
from gradscale.report.style import COLOURS
from gradscale.report.tables import shortened

DECADES = 1.3  # beyond this spread an axis of positive values is logarithmic
DENSE = 40  # steps beyond which errors are a band
EVEN = 10  # steps from which even spacing makes the axis linear


def step_svg(runs: Sequence[Measured], quantity: Quantity) -> str:
    """One quantity of every run against step; what stands beside it, such as the union of checkpoints, is dashed."""
    with drawing(quantity.key):
        figure = Figure(figsize=(5.4, 3.2), layout="constrained")
        axes = figure.subplots()
        held = [(k, run) for k, run in enumerate(runs) if len(curve_of(run, quantity))]
        if len({int(s) for _, run in held for s in curve_of(run, quantity)["step"]}) == 1:
            _legend(figure, _draw_single(axes, held, quantity), least=1)
        else:
            _legend(figure, _draw_curves(axes, held, quantity))
        if unit := unit_of(runs, quantity):
            axes.set_ylabel(f"[{unit}]")
        _scale_values(axes, [curve_of(run, quantity) for _, run in held])
        return svg_of(figure, quantity.key, f"{quantity.title} against step")


def _draw_curves(axes: Axes, held: Sequence[tuple[int, Measured]], quantity: Quantity) -> dict[str, Any]:
    """Draws every run; gives back what the legend shows: label -> artist."""
    steps: set[int] = set()
    shown: dict[str, Any] = {}
    for k, run in held:
        frame, other = curve_of(run, quantity), beside(run, quantity)
        steps |= {int(step) for step in frame["step"]}
        shown[shortened(run.label, 34)] = _draw(axes, k, frame)
        if len(other) and quantity.beside is None:
            _draw(axes, k, other, dashed=True)
        elif len(other):
            axes.plot(other["step"], other["value"], color=_colour(k), linestyle="--", linewidth=1.2)
        if (band := _band(run, quantity)) is not None:
            axes.fill_between(band["step"], band["low"], band["high"], color=_colour(k), alpha=0.16, linewidth=0)
    scale_steps(axes, sorted(steps))
    if any(len(beside(run, quantity)) for _, run in held):
        shown[_beside_text(quantity)] = Line2D([], [], color=INK, linestyle="--")
    return shown


def _beside_text(quantity: Quantity) -> str:
    return "union of checkpoints so far" if quantity.beside is None else quantity.beside[1]


def _legend(figure: Figure, shown: Mapping[str, Any], least: int = 2) -> None:
    """Above the plot, in as many columns as there is room for; none for fewer than `least` entries."""
    if len(shown) >= least:
        columns = max(1, min(len(shown), 72 // (6 + max(len(label) for label in shown))))
        figure.legend(
            list(shown.values()), list(shown), loc="outside upper left", ncols=columns, fontsize=8.5, handlelength=1.8,
            columnspacing=1.4,
        )  # fmt: skip


def _draw(axes: Axes, k: int, frame: pd.DataFrame, *, dashed: bool = False) -> Any:
    errors = [error if math.isfinite(error) else 0.0 for error in frame["stderr"]]
    finite = [value if math.isfinite(value) else math.nan for value in frame["value"]]
    if len(frame) > DENSE:
        low, high = np.subtract(finite, errors), np.add(finite, errors)
        axes.fill_between(frame["step"], low, high, color=_colour(k), alpha=0.25, linewidth=0)
        (line,) = axes.plot(frame["step"], finite, color=_colour(k), linestyle="--" if dashed else "-", linewidth=1.2)
        return line
    return axes.errorbar(
        frame["step"], finite, yerr=errors, color=_colour(k), linestyle="--" if dashed else "-",
        marker=MARKERS[k % len(MARKERS)], elinewidth=1.0,
        markerfacecolor="none" if dashed else _colour(k),
    )  # fmt: skip


def _draw_single(axes: Axes, held: Sequence[tuple[int, Measured]], quantity: Quantity) -> dict[str, Any]:
    """All runs at one step: the runs stand side by side, with what they are measured against as a dashed line."""
    shown: dict[str, Any] = {}
    for place, (k, run) in enumerate(held):
        frame = curve_of(run, quantity).assign(step=place)
        if quantity.beside is not None and len(other := beside(run, quantity)):
            axes.hlines(other["value"], place - 0.25, place + 0.25, color=_colour(k), linestyle="--", linewidth=1.2)
            shown[_beside_text(quantity)] = Line2D([], [], color=INK, linestyle="--")
        if (band := _band(run, quantity)) is not None:
            axes.vlines(place, band["low"], band["high"], color=_colour(k), alpha=0.25, linewidth=9)
        _draw(axes, k, frame)
    axes.set_xticks(range(len(held)), [shortened(run.label, 60 // len(held)) for _, run in held])
    axes.set_xlim(-0.6, len(held) - 0.4)
    axes.set_xlabel(f"step {int(curve_of(held[0][1], quantity)['step'].iloc[0])}")
    return shown


def _band(run: Measured, quantity: Quantity) -> pd.DataFrame | None:
    """The 5 % and 95 % quantiles that go with a median."""
    if quantity.name != "q50":
        return None
    low, high = (curve(run.estimates, quantity.measure, q) for q in ("q05", "q95"))
    joined = low.merge(high, on="step", suffixes=("_low", "_high"))
    return pd.DataFrame({"step": joined["step"], "low": joined["value_low"], "high": joined["value_high"]})


def scale_steps(axes: Axes, steps: Sequence[int]) -> None:
    """Symlog, linear up to the first step after 0, or linear where many steps are evenly spaced.

    A tick stands at every measured step that has room for its label, the last among them.
    """
    gaps = np.diff(steps)
    if len(steps) < EVEN or gaps.max() > 2 * gaps.min():
        first = next((step for step in steps if step > 0), 1)
        axes.set_xscale("symlog", linthresh=first, linscale=0.35)
    places = axes.xaxis.get_transform().transform(np.asarray(steps, dtype=float))
    span, ticks = float(places[-1] - places[0]), [0]
    for j in range(1, len(steps)):
        if places[j] - places[ticks[-1]] >= 0.085 * span:
            ticks.append(j)
    if ticks[-1] != len(steps) - 1:
        ticks[-1:] = [len(steps) - 1]
    axes.xaxis.set_major_locator(FixedLocator([steps[j] for j in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: number_text(step, 5)))
    axes.set_xlabel("step")


def _scale_values(axes: Axes, frames: Sequence[pd.DataFrame]) -> None:
    low, high = axes.dataLim.intervaly
    values = [value for frame in frames for value in frame["value"] if math.isfinite(value)]
    spread = math.log10(max(values) / min(values)) if values and min(values) > 0 else 0.0
    if spread > DECADES:
        axes.set_yscale("log", nonpositive="clip")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if spread < 2.5 else (1.0,)))
        axes.yaxis.set_minor_locator(NullLocator())
    elif 0 <= low < 0.5 * high:
        axes.set_ylim(bottom=0)
    powers = spread > 2.5 and (min(values) < 1e-3 or max(values) > 1e4)
    axes.yaxis.set_major_formatter(FuncFormatter(_power if powers else lambda value, _: number_text(value)))
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)


def _power(value: float, _: int) -> str:
    return power_text(round(math.log10(value)))


def _colour(k: int) -> str:
    return COLOURS[k % len(COLOURS)]
