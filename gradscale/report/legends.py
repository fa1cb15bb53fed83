"""What the lines below a table say: each quantity in words, its error, and why a number is undefined."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from gradscale.report.levels import OPERATORS
from gradscale.report.quantities import KNOWN

_UNKNOWN = "± ?: the standard error is not known"
_SHIFTED = ("log_determinant", "effective_dimension")
_NOT_POSITIVE = (
    "undefined: some eigenvalue lies at or below −s, where A + s I is not positive; take a larger --shift, or ggn, "
    "whose eigenvalues are not negative"
)
_NAMED = {(quantity.measure, quantity.name): quantity for quantity in KNOWN}


def legend(chosen: pd.DataFrame) -> tuple[str, ...]:
    """`name: definition (status; unit)`, once for each that differs; where the status differs, with its steps."""
    lines = []
    for (measure, name, definition, unit), rows in chosen.groupby(
        ["measure", "name", "definition", "unit"], sort=False
    ):
        units = [] if unit in ("", "1") else [str(unit)]
        about = "; ".join([*_statuses(rows), *units])
        lines.append(f"{name}: {in_words(str(measure), str(name), str(definition))} ({about})")
    if (chosen["stderr"].isna() & chosen["value"].notna() & (chosen["name"] != "backend_error")).any():
        lines.append(_UNKNOWN)
    if (chosen["value"].isna() & chosen["name"].isin(_SHIFTED)).any():
        lines.append(_NOT_POSITIVE)
    return tuple(dict.fromkeys(lines))


def in_words(measure: str, name: str, definition: str) -> str:
    """A definition of a spectrum run, which reads like a path, as noun, equation and method; any other as it is.

    >>> in_words("curvature", "trace", "curvature/trace/hessian/hutchinson/rademacher/v1")
    'trace of the Hessian, tr H = E vᵀHv, by hutchinson/rademacher'
    >>> in_words("coherence", "alpha", "coherence/alpha/v1")
    'coherence/alpha/v1'
    """
    known, parts = _NAMED.get((measure, name)), definition.split("/")
    if known is None or len(parts) < 5 or parts[:2] != [measure, name] or parts[2] not in OPERATORS:
        return definition
    equation = f", {known.equation}" if known.equation else ""
    return f"{known.noun}{equation}, by {'/'.join(parts[3:-1])}"


def way_of(definition: str) -> str:
    """The way of products that the definition of a `backend_error` names, in words.

    >>> way_of("curvature/backend_error/hessian/finite_differences eps=0.001/v1")
    'finite differences eps=0.001'
    """
    parts = definition.split("/")
    return (parts[3] if len(parts) == 5 else definition).replace("_", " ")


def _statuses(rows: pd.DataFrame) -> Sequence[str]:
    found = {str(status): sorted({int(step) for step in of["step"]}) for status, of in rows.groupby("status")}
    if len(found) < 2:
        return [status for status in found if status]
    return [
        f"{status} at step{'s' if len(steps) > 1 else ''} {', '.join(str(step) for step in steps)}"
        for status, steps in found.items()
    ]
