"""The HTML report: one self-contained file without scripts, the same bytes for the same runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from gradscale.errors import GradscaleError
from gradscale.report.measured import Measured, Run, read
from gradscale.report.plans import plan_table
from gradscale.report.quantities import absent, by_measure
from gradscale.report.sections import measure_section, title_of
from gradscale.report.spectra import ANCHOR, TITLE, spectra_section
from gradscale.report.style import CSS, swatch
from gradscale.store.spectra import Spectrum


def write_report(runs: Sequence[Run | Spectrum], output: str | Path) -> Path:
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
    title = f"{_subject(runs)} of {' and '.join(run.label for run in runs) if len(runs) < 3 else f'{len(runs)} runs'}"
    heads = [f"{swatch(k)}{escape(run.label)}" for k, run in enumerate(runs)]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(_lead(runs))}</p>',
        _section("What was measured", plan_table(runs, heads)),
        _section("What was found", _overview(runs)),
        spectra_section(runs),
        *(measure_section(f"m{k}", runs, *found) for k, found in enumerate(by_measure(runs).items())),
        _section("How to read this", _READING),
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
    bounds = ", eigenvalues with a bound on theirs" if any(run.levels is not None for run in runs) else ""
    what = {"Gradients": "Per-example gradients", "Curvature": "Curvature of the loss"}.get(
        _subject(runs), "Per-example gradients, and curvature of the loss,"
    )
    return f"{what} at {where}. Every number stands with one standard error{bounds}."


def _subject(runs: Sequence[Measured]) -> str:
    kinds = {run.levels is not None for run in runs}
    return "Gradients and curvature" if len(kinds) > 1 else "Curvature" if True in kinds else "Gradients"


def _overview(runs: Sequence[Measured]) -> str:
    """How the figures are drawn, where each measure stands, and what there is none of."""
    found = by_measure(runs)
    spectra = any(run.levels is not None for run in runs)
    if not found and not spectra:
        return '<p class="soft">No estimates yet.</p>'
    entries = [f'<a href="#{ANCHOR}">{TITLE}</a>'] if spectra else []
    entries += [f'<a href="#m{k}">{escape(title_of(name))}</a>' for k, name in enumerate(found)]
    links = " · ".join(entries)
    missing = ", ".join(quantity.noun for quantity in absent(runs))
    note = f'<p class="legend">Not measured: {escape(missing)}.</p>' if missing else ""
    bars = f"{_BARS}{_NORM_BAND if any(run.levels is None for run in runs) else ''}{_BOUNDS if spectra else ''}"
    return f'<p class="soft">{bars}</p><p class="contents">{links}</p>{note}'


_BARS = "Bars (bands, where there are many steps) are one standard error."
_NORM_BAND = " The wide band of the gradient norm goes from the 5 % to the 95 % quantile over examples."
_BOUNDS = " Those of eigenvalues are bounds on the error instead."
_READING = (
    "<p>Every estimate stands as value ± one standard error; how that was got is said above for each quantity. “± 0” "
    "is exact for the examples that were measured; “± ?” means that no error is known. A difference is called one "
    "only beyond two combined standard errors, √(a² + b²), as if the two errors were independent; runs and "
    "checkpoints that share examples or probes are not quite. n is the number of finite examples.</p>"
    "<p>The status says what kind of number it is: an identity holds exactly, an estimator converges to its "
    "definition, a heuristic is indicative, and a conditional value holds under stated assumptions. None of "
    "them is a certified generalization bound.</p>"
)
