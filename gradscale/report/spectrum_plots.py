"""Figures of spectra as inline SVG: densities, and eigenvalues against step. One panel for each run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from gradscale.curvature.density import Density, Quadrature
from gradscale.report.canvas import INK, drawing, svg_of
from gradscale.report.levels import Levels
from gradscale.report.measured import Measured
from gradscale.report.numbers import number_text, power_text
from gradscale.report.plots import DECADES, scale_steps
from gradscale.report.style import COLOURS
from gradscale.report.tables import evenly, shortened
from gradscale.store.spectra import density_of

MOST_CURVES = 4  # densities in a panel
_BELOW = 0.2  # of the peak of a single eigenvalue: where the axis of a density begins
_ROOM = 1.08  # beyond the outermost eigenvalue, of an axis that begins at 0
Held = Sequence[tuple[int, Measured, Levels]]


def density_svg(held: Held) -> str:
    """The density of every run's eigenvalues on a log axis, one curve a step, bands of one standard error."""
    with drawing("spectra-density"):
        figure, panels = _panels(len(held), 3.3)
        for axes, (k, run, levels) in zip(panels, held, strict=True):
            _draw_densities(axes, k, levels)
            axes.set_title(f"{shortened(run.label, 40)}: {levels.operator}", fontsize=9)
            axes.set_xlabel(f"eigenvalue [{levels.unit}]")
        panels[0].set_ylabel("density of eigenvalues")
        return svg_of(figure, "spectra-density", "Density of eigenvalues")


def eigenvalue_svg(held: Held) -> str:
    """Every run's eigenvalues against step, or against their place where there is one step; bars are error bounds."""
    with drawing("spectra-eigenvalues"):
        figure, panels = _panels(len(held), 3.3)
        for axes, (k, run, levels) in zip(panels, held, strict=True):
            (_draw_places if len(levels.steps) == 1 else _draw_steps)(axes, k, levels)
            axes.set_title(f"{shortened(run.label, 40)}: {levels.operator}", fontsize=9)
            _scale(axes, levels.eigenvalues["value"].to_numpy())
        one_unit = len({levels.unit for *_, levels in held}) == 1
        for axes, (*_, levels) in zip(panels[:: len(panels) if one_unit else 1], held, strict=False):
            axes.set_ylabel(f"eigenvalue [{levels.unit}]")
        if not all(levels.eigenvalues["converged"].all() for *_, levels in held):
            hollow = Line2D([], [], color=INK, marker="o", markersize=5.5, markerfacecolor="none", linestyle="none")
            figure.legend([hollow], ["not converged"], loc="outside upper right", fontsize=8.5)
        return svg_of(figure, "spectra-eigenvalues", "Eigenvalues")


def shown_steps(levels: Levels) -> list[int]:
    """Those of whose densities a curve is drawn."""
    return evenly(sorted(levels.quadratures), MOST_CURVES)


def least_density(quadrature: Quadrature, width: float) -> float:
    """Where the axis of a density begins: below the peak of an eigenvalue that is alone in its place."""
    return _BELOW / (quadrature.size * width * math.sqrt(2 * math.pi))


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Two of them in a row of the page's width, or one half as wide."""
    columns = min(count, 2)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(5.4 * columns, height * rows), layout="constrained")
    axes = list(np.ravel(figure.subplots(rows, columns, squeeze=False)))
    for spare in axes[count:]:
        spare.set_axis_off()
    return figure, axes[:count]


def _draw_densities(axes: Axes, k: int, levels: Levels) -> None:
    steps = shown_steps(levels)
    densities = {step: density_of(levels.quadratures[step]) for step in steps}
    floor = min(least_density(levels.quadratures[step], found.width) for step, found in densities.items())
    colours = [COLOURS[k % len(COLOURS)]] if len(steps) == 1 else _sequence(len(steps))
    for colour, (step, found) in zip(colours, densities.items(), strict=True):
        _draw_density(axes, found, floor, colour, f"step {number_text(step, 5)}")
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor)
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: power_text(round(math.log10(value)))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
    if len(steps) > 1:
        axes.legend(fontsize=8, handlelength=1.4)


def _draw_density(axes: Axes, found: Density, floor: float, colour: str, label: str) -> None:
    seen = np.maximum(found.value, floor / 10)
    if np.isfinite(found.stderr).all():
        low, high = (np.maximum(found.value + sign * found.stderr, floor / 10) for sign in (-1, 1))
        axes.fill_between(found.grid, low, high, color=colour, alpha=0.25, linewidth=0)
    axes.plot(found.grid, seen, color=colour, linewidth=1.2, label=label)


def _draw_steps(axes: Axes, k: int, levels: Levels) -> None:
    """One line for each place in the list; the largest is drawn boldest."""
    colour, frame = COLOURS[k % len(COLOURS)], levels.eigenvalues
    for place, rows in frame.groupby("index"):
        rows = rows.sort_values("step")
        alpha = 1.0 if place == 0 else 0.55
        axes.plot(rows["step"], rows["value"], color=colour, alpha=alpha, linewidth=1.6 if place == 0 else 0.7)
        _points(axes, rows["step"], rows, colour, alpha)
    scale_steps(axes, levels.steps)


def _draw_places(axes: Axes, k: int, levels: Levels) -> None:
    """At the one step, in their order."""
    rows = levels.at(levels.steps[0])
    _points(axes, rows["index"] + 1, rows, COLOURS[k % len(COLOURS)], 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlabel(f"place in the list, at step {levels.steps[0]}")


def _points(axes: Axes, places: pd.Series, rows: pd.DataFrame, colour: str, alpha: float) -> None:
    """With bars of their error bounds; hollow where not converged."""
    where, values, good = places.to_numpy(), rows["value"].to_numpy(), rows["converged"].to_numpy(dtype=bool)
    errors = np.nan_to_num(rows["error"].to_numpy(dtype=float))
    for chosen, face, size in ((good, colour, 3.6), (~good, "none", 5.5)):
        if chosen.any():
            axes.errorbar(
                where[chosen], values[chosen], yerr=errors[chosen], color=colour, alpha=alpha, linestyle="none",
                marker="o", markersize=size, markerfacecolor=face, elinewidth=1.0,
            )  # fmt: skip


def _scale(axes: Axes, values: np.ndarray) -> None:
    """Logarithmic where positive values spread far; else with a line at 0 where there are both signs."""
    if values.min() > 0 and math.log10(values.max() / values.min()) > DECADES:
        spread = math.log10(values.max() / values.min())
        axes.set_yscale("log", nonpositive="clip")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if spread < 2.5 else (1.0,)))
        axes.yaxis.set_minor_locator(NullLocator())
    elif values.min() < 0 < values.max():
        axes.axhline(0, color=INK, alpha=0.35, linewidth=0.7)
    elif values.min() >= 0:
        axes.set_ylim(0.0, _ROOM * values.max() or None)
    else:
        axes.set_ylim(_ROOM * values.min(), 0.0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)


def _sequence(count: int) -> list[str]:
    """From early to late; both ends read on light and on dark ground."""
    colours = matplotlib.colormaps["viridis"](np.linspace(0.2, 0.78, count))
    return [matplotlib.colors.to_hex(colour) for colour in colours]
