"""The section of the report on spectrum runs: how products were had, densities, eigenvalues; and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from gradscale.report.levels import Levels
from gradscale.report.measured import Measured
from gradscale.report.spectrum_sentences import density_sentences, eigenvalue_sentences, way_sentence
from gradscale.report.style import swatch
from gradscale.report.tables import Grid, eigenvalue_grid

ANCHOR, TITLE = "spectra", "Spectra"


def spectra_section(runs: Sequence[Measured]) -> str:
    """All spectrum runs side by side; nothing where there is none."""
    held = [(k, run, run.levels) for k, run in enumerate(runs) if run.levels is not None]
    if not held:
        return ""
    said = [(f"{swatch(k)}<b>{escape(run.label)}</b>", way_sentence(run, levels)) for k, run, levels in held]
    ways = "".join(f"<p>{head}: {escape(way)}</p>" for head, way in said)
    dense = [each for each in held if each[2].quadratures]
    listed = [each for each in held if len(each[2].eigenvalues)]
    return (
        f'<section id="{ANCHOR}">\n<h2>{TITLE}</h2>\n{ways}<div class="figures spectra">{_densities(dense)}'
        f"{_eigenvalues(listed)}</div>\n</section>"
    )


def _densities(held: Sequence[tuple[int, Measured, Levels]]) -> str:
    from gradscale.report.spectrum_plots import density_svg

    return _figure("Density of eigenvalues", density_svg(held), density_sentences(held), len(held)) if held else ""


def _eigenvalues(held: Sequence[tuple[int, Measured, Levels]]) -> str:
    from gradscale.report.spectrum_plots import eigenvalue_svg

    if not held:
        return ""
    tables = "".join(_table(eigenvalue_grid(of), f"{swatch(k)}{escape(run.label)}: ") for k, run, of in held)
    below = f"<details><summary>The eigenvalues, with errors and residuals</summary>{tables}</details>"
    return _figure("Eigenvalues", eigenvalue_svg(held), eigenvalue_sentences(held), len(held), below)


def _figure(title: str, svg: str, said: Sequence[str], panels: int, below: str = "") -> str:
    kind = ' class="wide"' if panels > 1 else ""
    caption = "".join(f"<p>{escape(sentence)}</p>" for sentence in said)
    return f"<figure{kind}><h3>{title}</h3>{svg}<figcaption>{caption}</figcaption>{below}</figure>\n"


def _table(grid: Grid, lead: str) -> str:
    heads = "".join(f"<th>{escape(column)}</th>" for column in grid.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in grid.rows)
    legend = "".join(f'<p class="legend">{escape(line)}</p>' for line in grid.legend)
    return (
        f'<div class="scroll"><p class="run">{lead}{escape(grid.title)}</p><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table>{legend}</div>"
    )
