"""What a report reads from a run: its plan, its estimates, and the loss and gradient norms of its rows.

A curve is a DataFrame of one quantity: step, value, stderr, n, ascending in step. A stderr of 0 means
exact, NaN that no error is known; a value of NaN is a quantity that is undefined at that checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import pandas as pd

from gradscale.report.levels import Levels, levels_of
from gradscale.store.spectra import Spectrum

QUANTILES = (0.05, 0.5, 0.95)
COLUMNS = ["step", "measure", "name", "scope", "value", "stderr", "n", "status", "definition", "unit"]


class Run(Protocol):
    """The part of `gradscale.store.results.Run` that a report needs."""

    @property
    def path(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def plan(self) -> Mapping[str, Any]: ...

    def estimates(self) -> pd.DataFrame: ...

    def rows(self) -> Any: ...

    def sql(self, query: str) -> pd.DataFrame: ...


class Measured(NamedTuple):
    """One run, read once. `estimates` holds those of the run and those of its rows; exact errors are 0."""

    label: str
    plan: Mapping[str, Any]
    estimates: pd.DataFrame
    nonfinite: int  # rows kept out of every sum
    levels: Levels | None = None  # of a spectrum run


def read(runs: Sequence[Run | Spectrum]) -> list[Measured]:
    """Read every run; the label is its name, or its path where two names are the same."""
    names = [run.name for run in runs]
    return [_read(run, run.name if names.count(run.name) == 1 else run.path) for run in runs]


def curve(estimates: pd.DataFrame, measure: str, name: str, scope: str = "all") -> pd.DataFrame:
    """One quantity against step."""
    chosen = estimates[(estimates["measure"] == measure) & (estimates["name"] == name) & (estimates["scope"] == scope)]
    return chosen.sort_values("step", kind="stable")[["step", "value", "stderr", "n"]].reset_index(drop=True)


def scopes(estimates: pd.DataFrame, measure: str, name: str, kind: str) -> list[str]:
    """The scopes `kind:...` of a quantity, in the order in which they were written."""
    chosen = estimates[(estimates["measure"] == measure) & (estimates["name"] == name)]["scope"]
    return [str(scope) for scope in chosen.unique() if str(scope).startswith(f"{kind}:")]


def class_matrix(estimates: pd.DataFrame, measure: str, name: str) -> pd.DataFrame:
    """[C, C] by class: a quantity of scope `class:<a>,<b>` at the last step that has it.

    Where only one of (a, b) and (b, a) is there, it stands for both. Empty where there are no pairs.
    """
    chosen = estimates[(estimates["measure"] == measure) & (estimates["name"] == name)]
    chosen = chosen[chosen["scope"].str.match(r"class:[^,]*,[^,]*$").astype(bool)]
    last = chosen[chosen["step"] == chosen["step"].max()]
    pairs = [tuple(str(scope).partition(":")[2].split(",")) for scope in last["scope"]]
    at = dict(zip(pairs, last["value"], strict=True))
    classes = sorted({c for pair in pairs for c in pair}, key=lambda c: (len(c), c) if c.isdigit() else (math.inf, c))
    values = [[float(at.get((a, b), at.get((b, a), math.nan))) for b in classes] for a in classes]
    return pd.DataFrame(values, index=classes, columns=classes, dtype=float)


def _read(run: Run | Spectrum, label: str) -> Measured:
    own = _with_exact(run)
    own = own.sort_values("step", kind="stable")
    if isinstance(run, Spectrum):
        return Measured(label, run.plan, own.reset_index(drop=True), 0, levels_of(run))
    if "loss" not in run.rows().schema.names:
        return Measured(label, run.plan, own.reset_index(drop=True), 0)
    of_rows = _of_rows(run)
    of_rows = of_rows[~of_rows["measure"].isin(own["measure"])]
    frames = [frame for frame in (of_rows, own) if len(frame)]
    nonfinite = int(run.sql("select count(*) as n from rows where not finite")["n"].iloc[0])
    return Measured(label, run.plan, pd.concat(frames, ignore_index=True) if frames else own, nonfinite)


def _with_exact(run: Run | Spectrum) -> pd.DataFrame:
    """The run's estimates, an exact value's error 0: pandas cannot tell its null from NaN, which SQL can."""
    own = run.estimates()[COLUMNS].copy()
    if not len(own):
        return own.astype({"value": float, "stderr": float})
    exact = run.sql("select stderr is null as exact from estimates")["exact"].to_numpy(dtype=bool)
    own["value"] = pd.to_numeric(own["value"]).astype(float)
    own["stderr"] = pd.to_numeric(own["stderr"]).astype(float).mask(exact, 0.0)
    return own


def _of_rows(run: Run) -> pd.DataFrame:
    """Mean loss and gradient norm, and quantiles of the norm, of the finite examples of every step.

    A mean's error is s / sqrt(n). A quantile's is half the distance between the order statistics at
    np -+ sqrt(np(1 - p)), unknown where those lie outside the sample. Time: one sort of the rows.
    """
    table = run.sql(_ROWS_QUERY)
    parts = [_part(table, "loss", "mean", "loss", "mean over examples", "loss units")]
    unit = "loss units / parameter unit"
    parts.append(_part(table, "grad_norm", "mean", "norm", "mean over examples of |g_i|", unit))
    for p in QUANTILES:
        parts.append(_part(table, "grad_norm", _q(p), _q(p), f"{p:.0%} quantile over examples of |g_i|", unit))
    return pd.concat(parts, ignore_index=True)


def _part(table: pd.DataFrame, measure: str, name: str, column: str, definition: str, unit: str) -> pd.DataFrame:
    given = {"measure": measure, "name": name, "scope": "all"}
    about = {"status": "estimator", "definition": definition, "unit": unit}
    value, stderr = (_settled(table[f"{column}_{part}"]) for part in ("value", "stderr"))
    return pd.DataFrame({"step": table["step"], **given, "value": value, "stderr": stderr, "n": table["n"], **about})


def _settled(column: pd.Series) -> list[float]:
    """Ten digits: a sum over threads may differ in its last bits, and a report must not."""
    return [math.nan if pd.isna(x) else float(f"{x:.9e}") for x in column]


def _q(p: float) -> str:
    return f"q{round(100 * p):02d}"


def _quantile_sql(p: float) -> str:
    spread = f"sqrt(n * {p} * {1 - p:.2f})"
    upper = f"min(norm) filter (where rank = ceil(n * {p} + {spread}))"
    lower = f"min(norm) filter (where rank = floor(n * {p} - {spread}))"
    return f"quantile_cont(norm, {p}) as {_q(p)}_value, ({upper} - {lower}) / 2 as {_q(p)}_stderr"


_ROWS_QUERY = f"""
with ranked as (
    select step, loss, sqrt(grad_sq_norm) as norm,
        row_number() over (partition by step order by grad_sq_norm) as rank,
        count(*) over (partition by step) as n
    from rows where finite
)
select step, count(*) as n,
    avg(loss) as loss_value, stddev_samp(loss) / sqrt(count(*)) as loss_stderr,
    avg(norm) as norm_value, stddev_samp(norm) / sqrt(count(*)) as norm_stderr,
    {", ".join(_quantile_sql(p) for p in QUANTILES)}
from ranked group by step order by step
"""
