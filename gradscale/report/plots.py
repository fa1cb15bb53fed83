"""Figures of the report as inline SVG: one quantity against step, and coherence by parameter.

Error bars are one standard error. Text stays text, and what is drawn in INK takes the colour of the
page, so that a figure reads on light and on dark ground. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from gradscale.report.measured import Measured, class_matrix, curve, scopes
from gradscale.report.numbers import number_text, power_text
from gradscale.report.quantities import Quantity, beside, curve_of, unit_of
from gradscale.report.tables import evenly, shortened

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D", "v", "P")
INK = "#1a2b3c"  # stands for currentColor
DECADES = 1.3  # beyond this spread an axis of positive values is logarithmic
HEAT = ("coherence", "alpha")
MATRIX = ("stiffness", "cos")  # of classes
MOST_HEAT_LABELS = 40
DENSE = 40  # steps beyond which errors are a band
EVEN = 10  # steps from which even spacing makes the axis linear

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False,
    "font.size": 9.0, "font.family": ["DejaVu Sans"], "text.color": INK, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.linewidth": 0.7, "axes.spines.top": False,
    "axes.spines.right": False, "lines.linewidth": 1.5, "lines.markersize": 4.5, "errorbar.capsize": 2.5,
    "legend.frameon": False, "axes.unicode_minus": True, "figure.facecolor": "none", "axes.facecolor": "none",
}  # fmt: skip


def step_svg(runs: Sequence[Measured], quantity: Quantity) -> str:
    """One quantity of every run against step; what stands beside it, such as the union of checkpoints, is dashed."""
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": quantity.key}):
        figure = Figure(figsize=(5.4, 3.2), layout="constrained")
        axes = figure.subplots()
        held = [(k, run) for k, run in enumerate(runs) if len(curve_of(run, quantity))]
        if len({int(s) for _, run in held for s in curve_of(run, quantity)["step"]}) == 1:
            _legend(figure, _draw_single(axes, held, quantity), least=1)
        else:
            _legend(figure, _draw_curves(axes, held, quantity))
        axes.set_ylabel(_axis_label(runs, quantity))
        _scale_values(axes, [curve_of(run, quantity) for _, run in held])
        return _svg(figure, quantity.key, f"{quantity.title} against step")


def heat_svg(runs: Sequence[Measured]) -> str | None:
    """Coherence of every parameter by step, one panel for each run on one scale; None where no run has it."""
    held = [(run, layers) for run in runs if (layers := layer_curves(run))]
    if not held:
        return None
    rows = max(len(layers) for _, layers in held)
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": "heat"}):
        height = 1.1 + 0.19 * min(rows, MOST_HEAT_LABELS)
        figure = Figure(figsize=(11.0, height * len(held) if _stacked(held) else height), layout="constrained")
        grid = (len(held), 1) if _stacked(held) else (1, len(held))
        panels = list(np.ravel(figure.subplots(*grid, squeeze=False)))
        scale = _heat_scale([frame for _, layers in held for frame in layers.values()])
        for k, (axes, (run, layers)) in enumerate(zip(panels, held, strict=True)):
            same = k > 0 and not _stacked(held) and list(layers) == list(held[0][1])
            mesh = _draw_heat(axes, run.label, layers, scale, not same)
        bar = figure.colorbar(mesh, ax=panels, shrink=0.9, pad=0.01, aspect=30)
        bar.set_label("coherence α, from 1/n or less")
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.outline.set_linewidth(0.0)
        return _svg(figure, "heat", "Coherence of every parameter by step")


def class_svg(runs: Sequence[Measured]) -> str | None:
    """Stiffness between classes at each run's last step, side by side on one scale; None where no run has it."""
    held = [(run, table) for run in runs if len(table := class_matrix(run.estimates, *MATRIX))]
    if not held:
        return None
    top = max((abs(v) for _, table in held for v in table.to_numpy().flat if math.isfinite(v)), default=0.0)
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": "classes"}):
        grid = (len(held), 1) if _stacked(held) else (1, len(held))
        figure = Figure(figsize=(11.0, 3.6 * grid[0]), layout="constrained")
        panels = list(np.ravel(figure.subplots(*grid, squeeze=False)))
        for axes, (run, table) in zip(panels, held, strict=True):
            mesh = _draw_classes(axes, run.label, table, Normalize(-top or -1.0, top or 1.0))
        bar = figure.colorbar(mesh, ax=panels, shrink=0.9, pad=0.01, aspect=30)
        bar.set_label("mean cosine of gradients")
        bar.outline.set_linewidth(0.0)
        return _svg(figure, "classes", "Stiffness between classes")


def class_curves(run: Measured) -> dict[str, pd.DataFrame]:
    """Pair of classes -> its curve of stiffness."""
    found = scopes(run.estimates, *MATRIX, "class")
    return {f"classes {s.partition(':')[2].replace(',', ' and ')}": curve(run.estimates, *MATRIX, s) for s in found}


def layer_curves(run: Measured) -> dict[str, pd.DataFrame]:
    """Parameter -> its curve of coherence."""
    found = scopes(run.estimates, *HEAT, "layer")
    return {scope.partition(":")[2]: curve(run.estimates, *HEAT, scope) for scope in found}


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
    _scale_steps(axes, sorted(steps))
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


def _scale_steps(axes: Axes, steps: Sequence[int]) -> None:
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


def _axis_label(runs: Sequence[Measured], quantity: Quantity) -> str:
    unit = unit_of(runs, quantity)
    title = quantity.title if len(quantity.title) <= 34 else shortened(quantity.title, 34)
    return f"{title}\n[{unit}]" if unit else title


def _stacked(held: Sequence[object]) -> bool:
    return len(held) > 3


def _draw_heat(
    axes: Axes, label: str, layers: Mapping[str, pd.DataFrame], scale: Normalize, labelled: bool
) -> QuadMesh:
    steps = sorted({int(step) for frame in layers.values() for step in frame["step"]})
    columns = [frame.set_index("step")["value"].reindex(steps) for frame in layers.values()]
    table = np.ma.masked_invalid(np.array([column.to_numpy(dtype=float) for column in columns]))
    mesh = axes.pcolormesh(table, cmap="cividis", norm=scale, rasterized=table.size > 4000)
    axes.set_title(shortened(label, 40), fontsize=9)
    names = list(layers)
    shown = range(0, len(names), math.ceil(len(names) / MOST_HEAT_LABELS))
    labels = [shortened(names[j], 34) if labelled else "" for j in shown]
    axes.set_yticks([j + 0.5 for j in shown], labels, fontsize=7.5)
    ticks = evenly(range(len(steps)), 8)
    axes.set_xticks([j + 0.5 for j in ticks], [number_text(steps[j], 5) for j in ticks], fontsize=8)
    axes.set_xlabel("step")
    axes.invert_yaxis()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return mesh


def _draw_classes(axes: Axes, label: str, table: pd.DataFrame, scale: Normalize) -> QuadMesh:
    values = np.ma.masked_invalid(table.to_numpy(dtype=float))
    mesh = axes.pcolormesh(values, cmap="RdBu_r", norm=scale, rasterized=table.size > 4000)
    axes.set_title(shortened(label, 40), fontsize=9)
    ticks = evenly(range(len(table)), 12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([j + 0.5 for j in ticks], [str(table.index[j]) for j in ticks], fontsize=8)
    axes.set_xlabel("class")
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return mesh


def _heat_scale(frames: Sequence[pd.DataFrame]) -> Normalize:
    """Logarithmic from 1/n, where orthogonal gradients lie, to the largest value."""
    whole = pd.concat(frames)
    top = max((value for value in whole["value"] if math.isfinite(value)), default=0.0)
    floor = 1.0 / max(int(whole["n"].max()), 1)
    return LogNorm(floor, top) if top > floor else Normalize(0.0, max(top, 1e-300))


def _colour(k: int) -> str:
    return COLOURS[k % len(COLOURS)]


def _svg(figure: Figure, key: str, title: str) -> str:
    """Inline SVG: no prolog, every id prefixed so that figures on one page do not clash, ink as currentColor."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    prefix = re.sub(r"[^a-z0-9]", "-", key.lower())
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
