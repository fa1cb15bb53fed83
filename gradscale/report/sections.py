"""The section of one measure in the report: figures, what they mean, the numbers. Any measure has one, known or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import pandas as pd

from gradscale.report.criteria import MEASURE, verdict_sentence
from gradscale.report.measured import Measured
from gradscale.report.quantities import beside, curve_of, drawn, with_scopes
from gradscale.report.quantity import Quantity
from gradscale.report.sentences import layers_sentence, limit_sentence, sentence
from gradscale.report.style import swatch
from gradscale.report.tables import Grid, by_scope, by_step

_TITLES = {
    "grad_norm": "Gradient norm", "effective_gram": "Effective Gram", "gauss_newton": "Gauss-Newton matrix",
    "covariance": "Gradient covariance",
}  # fmt: skip
BARRED = ("curvature/trace", "gauss_newton/trace", "covariance/trace")  # drawn as bars by parameter


def measure_section(anchor: str, runs: Sequence[Measured], measure: str, quantities: Sequence[Quantity]) -> str:
    """All that there is of one measure, whose `quantities` the runs have; `anchor` is the id that links lead to."""
    shown = [quantity for quantity in drawn(runs) if quantity in quantities]
    figures = [_figure(q.title, _plot(runs, q), _said(runs, q)) for q in shown] + _maps(runs, quantities)
    entries = "\n".join(_entry(runs, quantity) for quantity in quantities)
    return (
        f'<section id="{anchor}">\n<h2>{escape(title_of(measure))}</h2>\n{_verdicts(runs, measure)}'
        f'<div class="figures">{"".join(figures)}</div>\n'
        f"<dl>{entries}</dl>\n{_numbers(runs, measure)}\n</section>"
    )


def _verdicts(runs: Sequence[Measured], measure: str) -> str:
    """Of stability: what the criteria say together."""
    held = [(k, run, run.levels) for k, run in enumerate(runs) if run.levels is not None and measure == MEASURE]
    said = [(k, verdict_sentence(run.label, levels)) for k, run, levels in held]
    return "".join(f"<p>{swatch(k)}{escape(verdict)}</p>" for k, verdict in said if verdict)


def title_of(measure: str) -> str:
    return _TITLES.get(measure, measure[:1].upper() + measure[1:].replace("_", " "))


def _plot(runs: Sequence[Measured], quantity: Quantity) -> str:
    """The curves; nothing where there is one number: the sentence below says it."""
    from gradscale.report.plots import step_svg

    points = sum(len(curve_of(run, quantity)) + len(beside(run, quantity)) for run in runs)
    return step_svg(runs, quantity) if points > 1 else ""


def _maps(runs: Sequence[Measured], quantities: Sequence[Quantity]) -> list[str]:
    """Heat maps: by parameter and by class of the first quantity that has such scopes, and every matrix of classes."""
    from gradscale.report.heat import NAMES, class_svg, heat_svg

    figures = []
    for kind, title in (("layer", "of every parameter"), ("class", "of every class")):
        for quantity in with_scopes(runs, quantities, kind)[:1]:
            said = layers_sentence(quantity.noun, _curves(runs, quantity, kind), NAMES[kind])
            numbers = _by_scope(runs, quantity, kind)
            if kind == "layer" and quantity.key in BARRED:
                figures.append(_bars(runs, quantity, said, numbers))
                if not _several_steps(runs, quantity):
                    continue
                said, numbers = "The same at every step.", ""
            drawing = heat_svg(runs, quantity, kind) or ""
            figures.append(_figure(f"{quantity.title} {title}", drawing, said, wide=True, below=numbers))
    for quantity in with_scopes(runs, quantities, "pair"):
        said = layers_sentence(quantity.noun, _curves(runs, quantity, "pair"), NAMES["pair"])
        title = f"{quantity.title} between classes, last step"
        figures.append(_figure(title, class_svg(runs, quantity) or "", said, wide=True))
    return figures


def _bars(runs: Sequence[Measured], quantity: Quantity, said: str, numbers: str) -> str:
    """The last step's values by parameter, and what is not shown of them."""
    from gradscale.report.bars import MOST_BARS, bars_svg, last_bars

    found = {run.label: last_bars(run, quantity)[1] for run in runs}
    cut = {label: len(bars) for label, bars in found.items() if len(bars) > MOST_BARS}
    shown = "".join(f" Of {label} the {MOST_BARS} largest of {count} are drawn." for label, count in cut.items())
    wide = sum(1 for bars in found.values() if bars) > 1
    title = f"{quantity.title} of every parameter, last step"
    return _figure(title, bars_svg(runs, quantity) or "", f"{said}{shown}", wide=wide, below=numbers)


def _several_steps(runs: Sequence[Measured], quantity: Quantity) -> bool:
    curves = (frame for by_name in _curves(runs, quantity, "layer").values() for frame in by_name.values())
    return any(len(frame) > 1 for frame in curves)


def _curves(runs: Sequence[Measured], quantity: Quantity, kind: str) -> Mapping[str, Mapping[str, pd.DataFrame]]:
    from gradscale.report.heat import scope_curves

    return {run.label: scope_curves(run, quantity, kind) for run in runs}


def _figure(title: str, svg: str, said: str, *, wide: bool = False, below: str = "") -> str:
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}><h3>{escape(title)}</h3>{svg}<figcaption>{escape(said)}</figcaption>{below}</figure>\n"


def _by_scope(runs: Sequence[Measured], quantity: Quantity, kind: str) -> str:
    """The numbers behind a heat map, folded."""
    title = f"{quantity.key} by {kind}"
    grids = [(k, run, grid) for k, run in enumerate(runs) for grid in by_scope(run.estimates, quantity.measure)]
    tables = [_table(grid, f"{swatch(k)}{escape(run.label)}") for k, run, grid in grids if grid.title == title]
    return f'<details><summary>The numbers, with errors</summary><div class="tables">{"".join(tables)}</div></details>'


def _said(runs: Sequence[Measured], quantity: Quantity) -> str:
    """What the plot shows; and, of each run, how it compares with what it is measured against."""
    runs = _told_of(runs, quantity)
    said = [sentence(quantity.noun, {run.label: curve_of(run, quantity) for run in runs})]
    if quantity.beside is not None:
        against = quantity.beside[1]
        compared = [(run.label, curve_of(run, quantity), beside(run, quantity)) for run in runs]
        if quantity.limit:
            held = [(label, own, limit) for label, own, limit in compared if len(own) and len(limit)]
            return " ".join(
                said[:1] + [limit_sentence(quantity.noun, label, own, against, limit) for label, own, limit in held]
            )
        name = against.removeprefix("of ")  # sentences say `of` themselves
        said += [sentence(quantity.noun, {label: own, name: other}) for label, own, other in compared if len(other)]
    return " ".join(said)


def _told_of(runs: Sequence[Measured], quantity: Quantity) -> list[Measured]:
    """Those of which a sentence may say that they have none: of another kind or operator, nobody expects it."""
    having = [run for run in runs if (run.estimates["measure"] == quantity.measure).any()]
    if any(run.levels is not None for run in having):
        return having
    return [run for run in runs if run.levels is None or run in having]


def _numbers(runs: Sequence[Measured], measure: str) -> str:
    """The tables by step; legends are in the entries above them."""
    grids = [(k, run.label, by_step(run.estimates, measure)) for k, run in enumerate(runs)]
    tables = [_table(grid, f"{swatch(k)}{escape(label)}") for k, label, grid in grids if grid.rows]
    if not tables:
        return ""
    shown = f'<div class="tables">{"".join(tables)}</div>'
    return f"<details><summary>The numbers by step, with errors</summary>{shown}</details>"


def _table(grid: Grid, title: str) -> str:
    heads = "".join(f"<th>{escape(column)}</th>" for column in grid.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in grid.rows)
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll"><p class="run">{title}</p>{table}</div>'


def _entry(runs: Sequence[Measured], quantity: Quantity) -> str:
    """What a quantity is: its equation, what it says, how its error was got; then status, definition and unit."""
    equation = f'<dd class="equation">{escape(quantity.equation)}</dd>' if quantity.equation else ""
    source = f' Source: <a href="{quantity.source[1]}">{escape(quantity.source[0])}</a>.' if quantity.source else ""
    text = " ".join(part for part in (quantity.text, quantity.error) if part)
    given = dict.fromkeys(line for run in runs for line in _definitions(run, quantity))
    lines = "".join(f"<dd class='legend'>{escape(line)}</dd>" for line in given)
    return f"<div><dt>{escape(quantity.title)}</dt>{equation}<dd><p>{escape(text)}{source}</p></dd>{lines}</div>"


def _definitions(run: Measured, quantity: Quantity) -> list[str]:
    frame = run.estimates
    chosen = frame[(frame["measure"] == quantity.measure) & (frame["name"] == quantity.name)]
    columns = zip(chosen["name"], chosen["definition"], chosen["status"], chosen["unit"], strict=True)
    return [
        f"{name}: {status}, definition {definition}{'' if unit in ('', '1') else f', unit {unit}'}"
        for name, definition, status, unit in dict.fromkeys(columns)
    ]
