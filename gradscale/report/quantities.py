"""Which quantities there are in runs: those that the report knows, and those of measures that it does not."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from gradscale.report.known_gradients import GRADIENTS
from gradscale.report.known_probed import PROBED
from gradscale.report.known_spectra import SPECTRA
from gradscale.report.measured import Measured, curve, scopes
from gradscale.report.quantity import Quantity

KNOWN: tuple[Quantity, ...] = (*GRADIENTS, *PROBED, *SPECTRA)


def present(runs: Sequence[Measured]) -> list[Quantity]:
    """Those in any of the runs, the known ones first, then the others in the order in which they were written."""
    found: dict[tuple[str, str], set[str]] = {}
    for run in runs:
        frame = run.estimates[["measure", "name", "scope"]].astype(str).drop_duplicates()
        for measure, name, scope in frame.itertuples(index=False):
            found.setdefault((measure, name), set()).add(scope)
    scoped = {pair: {"union"} & some | ({"all"} if some - {"union"} else set()) for pair, some in found.items()}
    known = [quantity for quantity in KNOWN if quantity.scope in scoped.get(quantity[:2], ())]
    keys = {(quantity.measure, quantity.name) for quantity in KNOWN}
    return known + [_unknown(*pair) for pair in found if pair not in keys and pair[0] != "grad_norm"]


def by_measure(runs: Sequence[Measured]) -> dict[str, list[Quantity]]:
    """Of each measure, in the order in which they were written, its quantities."""
    found: dict[str, list[Quantity]] = {str(m): [] for run in runs for m in run.estimates["measure"].unique()}
    for quantity in present(runs):
        found[quantity.measure].append(quantity)
    return found


def absent(runs: Sequence[Measured]) -> list[Quantity]:
    """What is usual of per-example gradients and is in none of the runs; nothing where all are of spectra."""
    if all(run.levels is not None for run in runs):
        return []
    keys = {quantity.key for quantity in present(runs)}
    return [quantity for quantity in KNOWN if quantity.key not in keys and quantity.plotted and not quantity.apart]


def drawn(runs: Sequence[Measured]) -> list[Quantity]:
    """Those present that have a plot: one over checkpoints (scope `union`) only where there are two of them."""
    least = {"all": 1, "union": 2}
    return [q for q in present(runs) if q.plotted and any(_defined(run, q) >= least[q.scope] for run in runs)]


def _defined(run: Measured, quantity: Quantity) -> int:
    """The checkpoints at which it has a value."""
    return int(curve_of(run, quantity)["value"].notna().sum())


def with_scopes(runs: Sequence[Measured], quantities: Sequence[Quantity], kind: str) -> list[Quantity]:
    """Those of `quantities` that have scopes of parameters (`layer`), of single classes (`class`) or of a `pair`."""
    return [quantity for quantity in quantities if any(scopes_of(run, quantity, kind) for run in runs)]


def scopes_of(run: Measured, quantity: Quantity, kind: str) -> list[str]:
    """The scopes of parameters (`layer`), of single classes (`class`), or of a `pair` of classes."""
    found = scopes(run.estimates, quantity.measure, quantity.name, "layer" if kind == "layer" else "class")
    return [scope for scope in found if kind == "layer" or ("," in scope) == (kind == "pair")]


def curve_of(run: Measured, quantity: Quantity) -> pd.DataFrame:
    return curve(run.estimates, quantity.measure, quantity.name, quantity.scope)


def beside(run: Measured, quantity: Quantity) -> pd.DataFrame:
    """The curve that stands beside it: that over the union of checkpoints, or of the quantity it is measured against.

    Empty where there is none. What something is measured against has no error of its own: it is worked out from what
    was compared. What is expected of an exact sketch, 0, is nothing to measure against.
    """
    if quantity.beside is None:
        union = curve(run.estimates, quantity.measure, quantity.name, "union")
        return union if quantity.scope == "all" else union[:0]
    found = curve(run.estimates, quantity.measure, quantity.beside[0], quantity.scope)
    return found[found["value"] > 0].assign(stderr=0.0).reset_index(drop=True)


def unit_of(runs: Sequence[Measured], quantity: Quantity) -> str:
    """The unit that the runs give, or an empty string for pure numbers."""
    for run in runs:
        frame = run.estimates
        units = frame[(frame["measure"] == quantity.measure) & (frame["name"] == quantity.name)]["unit"]
        if len(units):
            unit = str(units.iloc[0])
            return "" if unit == "1" else unit
    return ""


def _unknown(measure: str, name: str) -> Quantity:
    title = f"{measure} / {name}".replace("_", " ")
    return Quantity(measure, name, title, title, "", "See the definition that the run gives.")
