"""What figures of spectra show, a sentence or two for each run, computed from the numbers with their errors.

Errors of eigenvalues are bounds, so that two of them are told apart beyond the sum of their bounds; errors over probes
are standard errors, as everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from gradscale.curvature.density import moment
from gradscale.report.legends import way_of
from gradscale.report.levels import Levels, asked_text, mean_square, shares
from gradscale.report.measured import Measured, curve
from gradscale.report.numbers import estimate_text, number_text
from gradscale.report.sentences import sentence
from gradscale.store.spectra import density_of

Held = Sequence[tuple[int, Measured, Levels]]
ASKED = {"auto": "chosen by the model's operations"}


def way_sentence(run: Measured, levels: Levels) -> str:
    """What the operator is, and how its products were had."""
    plan = levels.plan
    entries = sum(int(np.prod(about["shape"])) for about in plan["parameters"].values())
    examples = f"{plan['examples']:,} examples" if isinstance(plan.get("examples"), int) else "its examples"
    said = f"The {levels.operator} of the mean loss in {entries:,} parameter entries, over {examples}."
    if plan["operator"] == "covariance":
        said = f"The {levels.operator} in {entries:,} parameter entries, over {examples}."
    return f"{said} {_products_sentence(run, str(plan.get('backend') or ''))}"


def density_sentences(held: Held) -> list[str]:
    """Where the eigenvalues lie: what the moments say exactly, then what the nodes say of the bulk."""
    clauses = [sentence("root mean square of all eigenvalues", {run.label: mean_square(of) for _, run, of in held})]
    return [*clauses, *(_where(run.label, levels) for _, run, levels in held), _drawn_as(held)]


def eigenvalue_sentences(held: Held) -> list[str]:
    """How the largest went, and which of the list have not converged."""
    return [f"{_largest(run.label, levels)} {_unconverged(run.label, levels)}" for _, run, levels in held]


def _products_sentence(run: Measured, asked: str) -> str:
    """How products were had, and their estimated error, wherever the run has it."""
    frame = run.estimates[run.estimates["name"] == "backend_error"]
    chosen = f", {ASKED[asked]}" if asked in ASKED else ""
    if not len(frame):
        return f"Products: {asked or 'exact'}{chosen}. No error of the products was estimated."
    found = curve(run.estimates, str(frame["measure"].iloc[0]), "backend_error")
    worst = float(found["value"].max())
    where = f", the largest of {len(found)} checkpoints" if len(found) > 1 else ""
    ways = ", ".join(dict.fromkeys(way_of(str(definition)) for definition in frame["definition"]))
    return f"Products by {ways}{chosen}; estimated relative error of one: {number_text(worst, 2)}{where}."


def _where(label: str, levels: Levels) -> str:
    step = max(levels.quadratures)
    quadrature = levels.quadratures[step]
    width = density_of(quadrature, np.empty(0)).width
    near, near_error, below, below_error = shares(quadrature, width)
    mean = moment(quadrature, 1)
    ends = " to ".join(number_text(float(pick(quadrature.value))) for pick in (np.min, np.max))
    beyond = f", {_percent(below, below_error)} farther below it" if quadrature.value.min() < -width else ""
    return (
        f"At step {step} the nodes of the quadrature of {label} go from {ends}; the mean eigenvalue is "
        f"{estimate_text(mean.value, mean.stderr)}, and about {_percent(near, near_error)} of the eigenvalues lie "
        f"within {number_text(width, 2)} of 0, one width of the drawing{beyond}."
    )


def _drawn_as(held: Held) -> str:
    widths = sorted({density_of(q, np.empty(0)).width for *_, of in held for q in of.quadratures.values()})
    counts = sorted({len(np.unique(q.probe)) for *_, of in held for q in of.quadratures.values()})
    of_width = " to ".join(number_text(width, 2) for width in dict.fromkeys((widths[0], widths[-1])))
    probes = "/".join(str(count) for count in counts)
    bands = "no bands: one probe has no known error" if counts == [1] else "bands: one standard error over probes"
    return (
        f"Drawn with Gaussians of standard deviation {of_width}, a hundredth of the range of nodes, from {probes} "
        f"probe{'s' if probes != '1' else ''}; {bands}. The axis ends below the peak of a single eigenvalue."
    )


def _largest(label: str, levels: Levels) -> str:
    tops = levels.eigenvalues[levels.eigenvalues["index"] == 0].sort_values("step")
    noun = f"largest eigenvalue of {label} ({levels.operator})"
    first, last = tops.iloc[0], tops.iloc[-1]
    if len(tops) == 1:
        return f"At step {int(last['step'])} the {noun} is {_text(last)}{_next(levels, int(last['step']))}."
    start, end = (f"{_text(row)} at step {int(row['step'])}" for row in (first, last))
    went = f"{'rises' if last['value'] > first['value'] else 'falls'} from {start} to {end}"
    if abs(last["value"] - first["value"]) <= first["error"] + last["error"]:
        went = f"is {start} and {end}, equal within their bounds"
    return f"The {noun} {went}{_peak(tops)}{_next(levels, int(last['step']))}."


def _peak(tops: pd.DataFrame) -> str:
    """A maximum between the ends that its bound tells from both of them."""
    best = tops.iloc[int(np.argmax(tops["value"].to_numpy()))]
    ends = (tops.iloc[0], tops.iloc[-1])
    if any(best["value"] - end["value"] <= best["error"] + end["error"] for end in ends):
        return ""
    return f", with a maximum of {_text(best)} at step {int(best['step'])} in between"


def _next(levels: Levels, step: int) -> str:
    rows = levels.at(step)
    if len(rows) < 2:
        return ""
    if levels.plan.get("which") == "both":
        return f"; the smallest is {_text(rows.iloc[-1])}"
    return f"; the last of the {asked_text(levels)} asked for is {_text(rows.iloc[-1])}"


def _unconverged(label: str, levels: Levels) -> str:
    frame = levels.eigenvalues
    lacking = int((~frame["converged"]).sum())
    if not lacking:
        return f"All {len(frame)} of {label} have converged."
    steps = sorted({int(step) for step in frame[~frame["converged"]]["step"]})
    where = f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps, the last of them {steps[-1]}"
    return (
        f"{lacking} of the {len(frame)} eigenvalues of {label} have not converged, at {where}: they are drawn hollow, "
        "some eigenvalue lies within their bar, and others may be missing from the list."
    )


def _text(row: pd.Series) -> str:
    return estimate_text(float(row["value"]), float(row["error"]))


def _percent(share: float, error: float) -> str:
    return f"{estimate_text(100 * share, 100 * error)} %"
