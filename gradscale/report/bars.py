"""A quantity of every parameter at each run's last step, as bars with errors: inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gradscale.report.canvas import INK, drawing, svg_of
from gradscale.report.heat import scope_curves
from gradscale.report.measured import Measured
from gradscale.report.numbers import number_text
from gradscale.report.quantities import unit_of
from gradscale.report.quantity import Quantity
from gradscale.report.style import COLOURS
from gradscale.report.tables import shortened

MOST_BARS = 24
_MOST_APART = 20  # the largest bars of runs that share a scale


class Bar(NamedTuple):
    name: str
    value: float
    stderr: float


def bars_svg(runs: Sequence[Measured], quantity: Quantity) -> str | None:
    """One panel for each run, the parameters in the model's order; None where no run has it.

    The panels have one scale unless one run's bars would be too short to be read on it.
    """
    held = [(k, run, *found) for k, run in enumerate(runs) if (found := last_bars(run, quantity))[1]]
    if not held:
        return None
    rows = max(len(largest(bars)) for *_, bars in held)
    columns = min(len(held), 2)
    lines = math.ceil(len(held) / columns)
    with drawing(f"bars-{quantity.key}"):
        figure = Figure(figsize=(5.4 * columns, lines * (1.0 + 0.19 * rows)), layout="constrained")
        tops = [max(abs(bar.value) for bar in bars) for *_, bars in held]
        shared = max(tops) <= _MOST_APART * min(tops)
        panels = list(np.ravel(figure.subplots(lines, columns, squeeze=False, sharex=shared)))
        for spare in panels[len(held) :]:
            spare.set_axis_off()
        for axes, (k, run, step, bars) in zip(panels, held, strict=False):
            _draw(axes, largest(bars), COLOURS[k % len(COLOURS)])
            axes.set_title(f"{shortened(run.label, 34)}, step {step}", fontsize=9)
            unit = unit_of([run], quantity)
            axes.set_xlabel(f"{quantity.noun}{f' [{unit}]' if unit else ''}")
        return svg_of(figure, f"bars-{quantity.key}", f"{quantity.title} of every parameter")


def last_bars(run: Measured, quantity: Quantity) -> tuple[int, list[Bar]]:
    """The last step with a finite value, and the parameters at it."""
    curves = {name: frame[np.isfinite(frame["value"])] for name, frame in scope_curves(run, quantity, "layer").items()}
    steps = {int(step) for frame in curves.values() for step in frame["step"]}
    if not steps:
        return 0, []
    last = max(steps)
    at = {name: frame[frame["step"] == last] for name, frame in curves.items()}
    return last, [Bar(name, *row.iloc[0][["value", "stderr"]]) for name, row in at.items() if len(row)]


def largest(bars: Sequence[Bar], most: int = MOST_BARS) -> list[Bar]:
    """Those of the largest size, in the order they are in."""
    if len(bars) <= most:
        return list(bars)
    least = sorted((abs(bar.value) for bar in bars), reverse=True)[most - 1]
    return [bar for bar in bars if abs(bar.value) >= least][:most]


def _draw(axes: Axes, bars: Sequence[Bar], colour: str) -> None:
    errors = [bar.stderr if math.isfinite(bar.stderr) else 0.0 for bar in bars]
    places, values = range(len(bars)), [bar.value for bar in bars]
    bars_of_error = {"elinewidth": 1.0, "capsize": 2}
    axes.barh(places, values, xerr=errors, color=colour, alpha=0.75, height=0.7, ecolor=INK, error_kw=bars_of_error)
    axes.set_yticks(list(places), [shortened(bar.name, 34) for bar in bars], fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))
    axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.6)
