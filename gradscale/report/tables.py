"""Tables of estimates: for the terminal as rich tables, and as plain grids of text for the HTML report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from gradscale.errors import GradscaleError
from gradscale.report.criteria import MEASURE, columns_of, criteria, setting_text, verdict_legend
from gradscale.report.legends import legend
from gradscale.report.levels import MEASURES, Levels, asked_text
from gradscale.report.measured import Run, curve, read, scopes
from gradscale.report.numbers import estimate_text, number_text
from gradscale.store.spectra import Spectrum

WIDTH = 100
MOST_STEPS = 8  # in a table by layer or class
LONGEST_NAME = 44
WHOLE = ("all", "union")
_OF_PRODUCTS = "backend_error"
_BOUND = (
    "± is a bound, not a standard error: min(r, r²/gap) of the residual r = |Ay − θy|, and the noise of the products; "
    "the second of the two holds if no eigenvalue that has not been seen lies within the gap"
)
_MARKED = "*: not converged"


class Grid(NamedTuple):
    """A table as text. `columns[0]` labels the rows; `legend` has one line for each quantity."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    legend: tuple[str, ...]


def estimate_tables(run: Run | Spectrum, measure: str | None = None, width: int = WIDTH) -> list[Table]:
    """One table per measure, by step; for a given `measure` also by layer and by class. `width` characters at most.

    Eigenvalues come last, or with the `measure` of their operator.
    Raises: GradscaleError if the run has no such measure.
    """
    measured = read([run])[0]
    estimates, levels = measured.estimates, measured.levels
    present = measures(estimates)
    if measure is not None and measure not in present:
        raise GradscaleError(
            f"measure must be one of those in {run.name} ({', '.join(present) or 'none'}), got {measure!r}"
        )
    chosen = present if measure is None else [measure]
    grids = []
    for name in chosen:
        whole = stability_grid(estimates, levels) if levels and name == MEASURE else by_step(estimates, name)
        grids += [whole] if whole.rows else []
        grids += by_scope(estimates, name) if measure is not None or not whole.rows else []
    if levels is not None and len(levels.eigenvalues) and measure in (None, MEASURES[str(levels.plan["operator"])]):
        grids.append(eigenvalue_grid(levels))
    return [_rich(part) for grid in grids for part in fitted(grid, min(width, WIDTH))]


def measures(estimates: pd.DataFrame) -> list[str]:
    """The measures in the order in which they were written."""
    return [str(measure) for measure in estimates["measure"].unique()]


def by_step(estimates: pd.DataFrame, measure: str) -> Grid:
    """Steps by names, for the scopes `all` and `union`."""
    chosen = estimates[(estimates["measure"] == measure) & estimates["scope"].isin(WHOLE)]
    chosen = chosen.sort_values("step", kind="stable")
    pairs = [(n, s) for s in WHOLE for n in _last(chosen[chosen["scope"] == s]["name"].unique().tolist())]
    steps = [int(step) for step in chosen["step"].unique()]
    columns = ["step", *(_header(name, scope) for name, scope in pairs)]
    curves = {pair: curve(chosen, measure, *pair) for pair in pairs}
    cells = [(_bare_cells if name == _OF_PRODUCTS else _cells)(found, steps) for (name, _), found in curves.items()]
    for scope in WHOLE:
        if (chosen["scope"] == scope).any():
            columns.append(_header("n", scope))
            cells.append([_counts(chosen[(chosen["scope"] == scope) & (chosen["step"] == step)]) for step in steps])
    rows = zip([str(step) for step in steps], *cells, strict=True)
    return Grid(measure, tuple(columns), tuple(rows), legend(chosen))


def stability_grid(estimates: pd.DataFrame, levels: Levels) -> Grid:
    """Every criterion beside its threshold, and the verdict, by step."""
    chosen = estimates[estimates["measure"] == MEASURE].sort_values("step", kind="stable")
    steps = [int(step) for step in chosen["step"].unique()]
    columns = columns_of(chosen, levels, steps)
    rows = zip([str(step) for step in steps], *columns.values(), strict=True)
    said = (*legend(chosen[chosen["name"].isin(criteria(chosen))]), *legend(_thresholds(chosen)))
    title = f"{MEASURE}: {setting_text(levels.plan)}"
    return Grid(title, ("step", *columns), tuple(rows), (*said, *verdict_legend(levels)))


def _thresholds(chosen: pd.DataFrame) -> pd.DataFrame:
    return chosen[chosen["name"].str.endswith("_threshold")]


def by_scope(estimates: pd.DataFrame, measure: str) -> list[Grid]:
    """Layers (and classes) by steps, one grid for each name; at most eight steps, evenly chosen."""
    chosen = estimates[estimates["measure"] == measure]
    grids = []
    for name in chosen["name"].unique():
        for kind in ("layer", "class"):
            if found := scopes(chosen, measure, name, kind):
                grids.append(_scope_grid(chosen, measure, str(name), kind, found))
    return grids


def eigenvalue_grid(levels: Levels) -> Grid:
    """Eigenvalues with their error bounds: by step, at most eight of them; residuals too where there is one step."""
    title = f"eigenvalues of the {levels.operator}, {asked_text(levels)}"
    steps = levels.steps
    unit = f"unit {levels.unit}"
    if len(steps) == 1:
        rows = levels.at(steps[0])
        columns = zip(rows["index"], rows["value"], rows["error"], rows["residual"], rows["converged"], strict=True)
        cells = [
            (str(i + 1), estimate_text(value, error), number_text(residual, 2), "yes" if good else "no")
            for i, value, error, residual, good in columns
        ]
        heads = ("place", f"step {steps[0]}", "residual", "converged")
        return Grid(title, heads, tuple(cells), (_BOUND, unit))
    shown = evenly(steps, MOST_STEPS)
    at = {step: _eigenvalue_cells(levels, step) for step in shown}
    places = sorted({place for cells in at.values() for place in cells})
    by_place = [(str(place + 1), *(at[step].get(place, "") for step in shown)) for place in places]
    legend = [_BOUND, *([_MARKED] if not levels.eigenvalues["converged"].all() else []), unit]
    legend += [f"{len(shown)} of {len(steps)} steps shown; run.spectra() has all"] if len(shown) < len(steps) else []
    return Grid(title, ("place", *(f"step {step}" for step in shown)), tuple(by_place), tuple(legend))


def _eigenvalue_cells(levels: Levels, step: int) -> dict[int, str]:
    rows = levels.at(step)
    columns = zip(rows["index"], rows["value"], rows["error"], rows["converged"], strict=True)
    return {int(place): estimate_text(value, error) + ("" if good else "*") for place, value, error, good in columns}


def fitted(grid: Grid, width: int = WIDTH) -> list[Grid]:
    """The grid in parts of at most `width` characters, each with the first column again."""
    lengths = [max(len(cell) for cell in column) + 2 for column in zip(grid.columns, *grid.rows, strict=True)]
    parts, used = [[0]], lengths[0]
    for j in range(1, len(lengths)):
        if used + lengths[j] > width and len(parts[-1]) > 1:
            parts.append([0])
            used = lengths[0]
        parts[-1].append(j)
        used += lengths[j]
    return [
        Grid(
            f"{grid.title} ({k + 1} of {len(parts)})" if len(parts) > 1 else grid.title,
            tuple(grid.columns[j] for j in part),
            tuple(tuple(row[j] for j in part) for row in grid.rows),
            grid.legend if k == len(parts) - 1 else (),
        )
        for k, part in enumerate(parts)
    ]


def _scope_grid(estimates: pd.DataFrame, measure: str, name: str, kind: str, found: Sequence[str]) -> Grid:
    chosen = estimates[(estimates["name"] == name) & estimates["scope"].isin(found)]
    every = sorted(int(step) for step in chosen["step"].unique())
    steps = evenly(every, MOST_STEPS)
    rows = [(shortened(s.partition(":")[2]), *_cells(curve(chosen, measure, name, s), steps)) for s in found]
    some = (f"{len(steps)} of {len(every)} steps shown; run.estimates() has all",) if len(steps) < len(every) else ()
    columns = (kind, *(f"step {step}" for step in steps))
    return Grid(f"{measure}/{name} by {kind}", columns, tuple(rows), (*legend(chosen), *some))


def evenly(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the steps, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(k * (len(steps) - 1) / (most - 1))] for k in range(most)]


def shortened(name: str, longest: int = LONGEST_NAME) -> str:
    """Long names lose their middle: the ends tell layers apart."""
    if len(name) <= longest:
        return name
    head = (longest - 1) // 2
    return f"{name[:head]}…{name[len(name) - (longest - 1 - head) :]}"


def _header(name: str, scope: str) -> str:
    return name if scope == "all" else f"{name}, {scope}"


def _cells(values: pd.DataFrame, steps: Sequence[int]) -> list[str]:
    triples = zip(values["step"], values["value"], values["stderr"], strict=True)
    at = {int(step): estimate_text(value, stderr) for step, value, stderr in triples}
    return [at.get(step, "") for step in steps]


def _bare_cells(values: pd.DataFrame, steps: Sequence[int]) -> list[str]:
    """Of what is an error itself."""
    at = {int(step): number_text(value, 2) for step, value in zip(values["step"], values["value"], strict=True)}
    return [at.get(step, "") for step in steps]


def _last(names: Sequence[str]) -> list[str]:
    """What was measured comes before the error of its products."""
    return sorted(names, key=lambda name: name == _OF_PRODUCTS)


def _counts(chosen: pd.DataFrame) -> str:
    return "/".join(str(n) for n in sorted({int(n) for n in chosen["n"]}))


def _rich(grid: Grid) -> Table:
    """Title, table and legend below each other, so that the legend may be wider than the table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for j, column in enumerate(grid.columns):
        table.add_column(Text(column), justify="left" if j == 0 and column != "step" else "right", no_wrap=True)
    for row in grid.rows:
        table.add_row(*(Text(cell) for cell in row))
    whole = Table.grid()
    whole.add_row(Text(grid.title, style="bold"))
    whole.add_row(table)
    whole.add_row(Text("".join(f"{line}\n" for line in grid.legend), style="dim"))
    return whole
