"""The HTML report: one self-contained file without scripts, the same bytes for the same runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from gradscale.errors import GradscaleError
from gradscale.report.measured import Measured, Run, read
from gradscale.report.plans import plan_table
from gradscale.report.quantities import Quantity, absent, beside, curve_of, drawn, present
from gradscale.report.sentences import layers_sentence, sentence
from gradscale.report.style import CSS
from gradscale.report.tables import Grid, by_scope, by_step, measures

HEAT_TITLE = "coherence/alpha by layer"
FOLDED_ROWS = 24


def write_report(runs: Sequence[Run], output: str | Path) -> Path:
    """Write the report on `runs`, side by side, to `output`, which is overwritten; it appears whole or not at all.

    Raises: GradscaleError if there is no run, or if matplotlib is not installed.
    """
    if not runs:
        raise GradscaleError("runs must hold at least one run, got none; pass the run directories to report on")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise GradscaleError(
            "matplotlib must be installed for the HTML report, got none; run: pip install 'gradscale[report]'"
        ) from error
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page(read(runs)), encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def page(runs: Sequence[Measured]) -> str:
    """The whole document."""
    title = f"Gradients of {' and '.join(run.label for run in runs) if len(runs) < 3 else f'{len(runs)} runs'}"
    heads = [f"{_swatch(k)}{escape(run.label)}" for k, run in enumerate(runs)]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(_lead(runs))}</p>',
        _section("What was measured", plan_table(runs, heads)),
        _section("What was found", _figures(runs)),
        _section("Estimates", _tables(runs)),
        _section("How to read this", _reading(runs)),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}<title>{escape(title)}</title>\n<style>{CSS}</style></head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def _lead(runs: Sequence[Measured]) -> str:
    steps = sorted({int(step) for run in runs for step in run.estimates["step"]})
    if not steps:
        return "No estimates yet."
    where = f"{len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
    return f"Per-example gradients at {where}. Every number stands with one standard error."


def _figures(runs: Sequence[Measured]) -> str:
    from gradscale.report.plots import class_curves, class_svg, heat_svg, layer_curves, step_svg

    figures = [_figure(quantity.title, step_svg(runs, quantity), _said(runs, quantity)) for quantity in drawn(runs)]
    if (heat := heat_svg(runs)) is not None:
        said = layers_sentence("coherence α", {run.label: layer_curves(run) for run in runs})
        figures.append(_figure("Coherence α of every parameter", heat, said, wide=True, below=_by_layer(runs)))
    if (matrix := class_svg(runs)) is not None:
        said = layers_sentence("cosine stiffness", {run.label: class_curves(run) for run in runs}, "pairs of classes")
        figures.append(_figure("Cosine stiffness between classes, last step", matrix, said, wide=True))
    if not figures:
        return '<p class="soft">Nothing to draw yet.</p>'
    missing = ", ".join(quantity.noun for quantity in absent(runs))
    note = f'<p class="legend">Not measured: {escape(missing)}.</p>' if missing else ""
    bars = (
        "Bars (bands, where there are many steps) are one standard error. The wide band of the gradient norm goes from "
        "the 5 % to the 95 % quantile over examples."
    )
    return f'<p class="soft">{bars}</p><div class="figures">{"".join(figures)}</div>{note}'


def _figure(title: str, svg: str, said: str, *, wide: bool = False, below: str = "") -> str:
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}><h3>{escape(title)}</h3>{svg}<figcaption>{escape(said)}</figcaption>{below}</figure>\n"


def _by_layer(runs: Sequence[Measured]) -> str:
    """The numbers behind the heat map, folded."""
    grids = [(k, run, grid) for k, run in enumerate(runs) for grid in by_scope(run.estimates, "coherence")]
    tables = [_table(g, f"{_swatch(k)}{escape(run.label)}") for k, run, g in grids if g.title == HEAT_TITLE]
    return f'<details><summary>The numbers, with errors</summary><div class="tables">{"".join(tables)}</div></details>'


def _said(runs: Sequence[Measured], quantity: Quantity) -> str:
    """What the plot shows; and, of each run, how it compares with what it is measured against."""
    said = [sentence(quantity.noun, {run.label: curve_of(run, quantity) for run in runs})]
    if quantity.beside is not None:
        against = quantity.beside[1]
        compared = [(run.label, curve_of(run, quantity), beside(run, quantity)) for run in runs]
        said += [sentence(quantity.noun, {label: own, against: other}) for label, own, other in compared if len(other)]
    return " ".join(said)


def _tables(runs: Sequence[Measured]) -> str:
    names = dict.fromkeys(name for run in runs for name in measures(run.estimates))
    blocks = []
    for name in names:
        grids = [(k, run.label, by_step(run.estimates, name)) for k, run in enumerate(runs)]
        tables = [_table(grid, f"{_swatch(k)}{escape(label)}") for k, label, grid in grids if grid.rows]
        legend = dict.fromkeys(escape(line) for _, _, grid in grids for line in grid.legend)
        if tables:
            blocks.append(f'<div class="block"><h3>{escape(name)}</h3><div class="tables">{"".join(tables)}</div>')
            blocks.append(f'<p class="legend">{"<br>".join(legend)}</p></div>')
    return "\n".join(blocks) or '<p class="soft">No estimates yet.</p>'


def _table(grid: Grid, title: str) -> str:
    heads = "".join(f"<th>{escape(column)}</th>" for column in grid.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in grid.rows)
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    if len(grid.rows) > FOLDED_ROWS:
        table = f"<details><summary>{len(grid.rows)} steps</summary>{table}</details>"
    return f'<div class="scroll"><p class="run">{title}</p>{table}</div>'


def _reading(runs: Sequence[Measured]) -> str:
    general = (
        "Every estimate stands as value ± one standard error; how that was got is said below for each quantity. “± 0” "
        "is exact for the examples that were measured; “± ?” means that no error is known. A difference is called one "
        "only beyond two combined standard errors, √(a² + b²), as if the two errors were independent; runs and "
        "checkpoints that share examples or probes are not quite. n is the number of finite examples."
    )
    statuses = (
        "The status says what kind of number it is: an identity holds exactly, an estimator converges to its "
        "definition, a heuristic is indicative, and a conditional value holds under stated assumptions. None of "
        "them is a certified generalization bound."
    )
    entries = "\n".join(_entry(runs, quantity) for quantity in present(runs))
    return f"<p>{general}</p><p>{statuses}</p><dl>{entries}</dl>"


def _entry(runs: Sequence[Measured], quantity: Quantity) -> str:
    equation = f'<dd class="equation">{escape(quantity.equation)}</dd>' if quantity.equation else ""
    source = f' Source: <a href="{quantity.source[1]}">{escape(quantity.source[0])}</a>.' if quantity.source else ""
    text = " ".join(part for part in (quantity.text, quantity.error) if part)
    given = dict.fromkeys(line for run in runs for line in _definitions(run, quantity))
    lines = "".join(f"<dd class='legend'>Definition: {escape(line)}</dd>" for line in given)
    return f"<dt>{escape(quantity.title)}</dt>{equation}<dd><p>{escape(text)}{source}</p></dd>{lines}"


def _definitions(run: Measured, quantity: Quantity) -> list[str]:
    frame = run.estimates
    chosen = frame[(frame["measure"] == quantity.measure) & (frame["name"] == quantity.name)]
    chosen = chosen[chosen["scope"].isin(["all", "union"])]
    return [f"{d} ({s})" for d, s in zip(chosen["definition"], chosen["status"], strict=True)]


def _swatch(k: int) -> str:
    from gradscale.report.plots import COLOURS

    return f'<span class="swatch" style="background:{COLOURS[k % len(COLOURS)]}"></span>'
