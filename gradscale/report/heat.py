"""Heat maps of the report as inline SVG: a quantity of every parameter, or class, by step; and between classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from gradscale.report.canvas import drawing, svg_of
from gradscale.report.measured import Measured, class_matrix, curve
from gradscale.report.numbers import number_text
from gradscale.report.quantities import scopes_of, unit_of
from gradscale.report.quantity import Quantity
from gradscale.report.tables import evenly, shortened

WIDEST = 11.0  # inches: a page
DECADES = 1.0  # beyond this spread a scale of positive values is logarithmic
MOST_LABELS = 40
LEAST_ROWS = 6  # that the label of the colours has room beside
_FAINTEST = 1e-4  # of the largest value: what is below, as what is zero but for rounding, has the lowest colour
Curves = Mapping[str, pd.DataFrame]


def heat_svg(runs: Sequence[Measured], quantity: Quantity, kind: str = "layer") -> str | None:
    """Every parameter (or class) by step, one panel for each run on one scale; None where no run has it."""
    held = [(run, found) for run in runs if (found := scope_curves(run, quantity, kind))]
    if not held:
        return None
    rows, steps = (max(counted) for counted in zip(*(_size(found) for _, found in held), strict=True))
    grid = (len(held), 1) if len(held) > 3 else (1, len(held))
    width = min(WIDEST, 3.4 + grid[1] * max(1.6, 0.45 * steps))
    with drawing(f"heat-{quantity.key}-{kind}"):
        height = 1.1 + 0.19 * min(max(rows, LEAST_ROWS), MOST_LABELS)
        figure = Figure(figsize=(width, grid[0] * height), layout="constrained")
        panels = list(np.ravel(figure.subplots(*grid, squeeze=False)))
        scale, colours = _scale([frame for _, found in held for frame in found.values()], quantity)
        for k, (axes, (run, found)) in enumerate(zip(panels, held, strict=True)):
            same = k > 0 and grid[0] == 1 and list(found) == list(held[0][1])
            mesh = _draw_heat(axes, run.label, found, scale, colours, not same)
        _label(figure.colorbar(mesh, ax=panels, shrink=0.9, pad=0.01, aspect=30), runs, quantity, scale)
        return svg_of(figure, f"heat-{quantity.key}-{kind}", f"{quantity.title} by {NAMES[kind]} and step")


def class_svg(runs: Sequence[Measured], quantity: Quantity) -> str | None:
    """Between classes at each run's last step, side by side on one scale; None where no run has it."""
    held = [(run, table) for run in runs if len(table := class_matrix(run.estimates, *quantity[:2]))]
    if not held:
        return None
    grid = (len(held), 1) if len(held) > 3 else (1, len(held))
    values = [pd.DataFrame({"value": table.to_numpy().ravel(), "n": 1}) for _, table in held]
    with drawing(f"classes-{quantity.key}"):
        scale, colours = _scale(values, quantity)
        figure = Figure(figsize=(min(WIDEST, 1.2 + 3.7 * grid[1]), 3.6 * grid[0]), layout="constrained")
        panels = list(np.ravel(figure.subplots(*grid, squeeze=False)))
        for axes, (run, table) in zip(panels, held, strict=True):
            mesh = _draw_classes(axes, run.label, table, scale, colours)
        _label(figure.colorbar(mesh, ax=panels, shrink=0.9, pad=0.01, aspect=30), runs, quantity, scale)
        return svg_of(figure, f"classes-{quantity.key}", f"{quantity.title} between classes")


NAMES = {"layer": "parameter", "class": "class", "pair": "pairs of classes"}


def scope_curves(run: Measured, quantity: Quantity, kind: str) -> dict[str, pd.DataFrame]:
    """The curve of every parameter (`layer`), of every `class`, or of every `pair` of classes, by name."""
    found = scopes_of(run, quantity, kind)
    return {_name(scope, kind): curve(run.estimates, *quantity[:2], scope) for scope in found}


def _name(scope: str, kind: str) -> str:
    name = scope.partition(":")[2]
    return name if kind == "layer" else f"class {name}" if kind == "class" else f"classes {name.replace(',', ' and ')}"


def _size(found: Curves) -> tuple[int, int]:
    return len(found), len({int(step) for frame in found.values() for step in frame["step"]})


def _draw_heat(axes: Axes, label: str, layers: Curves, scale: Normalize, colours: str, labelled: bool) -> QuadMesh:
    steps = sorted({int(step) for frame in layers.values() for step in frame["step"]})
    columns = [frame.set_index("step")["value"].reindex(steps) for frame in layers.values()]
    table = np.ma.masked_invalid(np.array([column.to_numpy(dtype=float) for column in columns]))
    mesh = axes.pcolormesh(table, cmap=colours, norm=scale, rasterized=table.size > 1000)
    axes.set_title(shortened(label, 40), fontsize=9)
    names = list(layers)
    shown = range(0, len(names), math.ceil(len(names) / MOST_LABELS))
    labels = [shortened(names[j], 34) if labelled else "" for j in shown]
    axes.set_yticks([j + 0.5 for j in shown], labels, fontsize=7.5)
    ticks = evenly(range(len(steps)), 8)
    axes.set_xticks([j + 0.5 for j in ticks], [number_text(steps[j], 5) for j in ticks], fontsize=8)
    axes.set_xlabel("step")
    _bare(axes)
    return mesh


def _draw_classes(axes: Axes, label: str, table: pd.DataFrame, scale: Normalize, colours: str) -> QuadMesh:
    values = np.ma.masked_invalid(table.to_numpy(dtype=float))
    mesh = axes.pcolormesh(values, cmap=colours, norm=scale, rasterized=table.size > 1000)
    axes.set_title(shortened(label, 40), fontsize=9)
    ticks = evenly(range(len(table)), 12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([j + 0.5 for j in ticks], [str(table.index[j]) for j in ticks], fontsize=8)
    axes.set_xlabel("class")
    axes.set_aspect("equal")
    _bare(axes)
    return mesh


def _scale(frames: Sequence[pd.DataFrame], quantity: Quantity) -> tuple[Normalize, str]:
    """The scale and the colours: around 0 where values have both signs, logarithmic where positive ones spread far.

    Coherence begins at 1/n, where orthogonal gradients lie.
    """
    whole = pd.concat(frames)
    values = [float(value) for value in whole["value"] if math.isfinite(value)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    if low < 0:
        top = max(-low, high)
        return Normalize(-top, top), "RdBu_r"
    floor = 1.0 / max(int(whole["n"].max()), 1) if quantity.key == "coherence/alpha" else low
    if floor > 0 and high > floor and (floor != low or math.log10(high / floor) > DECADES):
        return LogNorm(max(floor, _FAINTEST * high), high), "cividis"
    return Normalize(0.0, max(high, 1e-300)), "cividis"


def _label(bar: Colorbar, runs: Sequence[Measured], quantity: Quantity, scale: Normalize) -> None:
    unit = unit_of(runs, quantity)
    from_below = ", from 1/n or less" if quantity.key == "coherence/alpha" else ""
    line = "\n" if len(quantity.noun) + len(unit) > 40 else " "
    bar.set_label(f"{quantity.noun}{from_below}{f'{line}[{unit}]' if unit else ''}")
    if isinstance(scale, LogNorm):
        decades = math.log10(float(scale.vmax or 1.0) / float(scale.vmin or 1.0))
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.outline.set_linewidth(0.0)


def _bare(axes: Axes) -> None:
    """The first row on top; no ticks, no frame."""
    axes.invert_yaxis()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
