"""The folder of a spectrum run: eigenvalues and quadratures in spectra.parquet, and its reader.

    run.json             the plan, with "kind": "spectrum"
    estimates.parquet    as a run's
    spectra.parquet      a row per eigenvalue and per quadrature node

Shapes: P measured entries, k eigenvalues, r nodes, x points of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradscale.curvature.density import Density, Quadrature, density, trace_of_function
from gradscale.curvature.trace import TraceEstimate
from gradscale.errors import GradscaleError
from gradscale.store import schema
from gradscale.store.files import Files
from gradscale.store.folder import estimates_of, name_of, plan_of, read_table, steps_of
from gradscale.store.parquet import encode_rows
from gradscale.store.store import ESTIMATES

if TYPE_CHECKING:
    import pandas as pd

KIND = "spectrum"  # in run.json
SPECTRA = "spectra.parquet"
OPERATORS = ("hessian", "ggn", "covariance")
EIGENVALUE, NODE = "eigenvalue", "node"
_UNIT_WEIGHT = 1e-6  # that the weights of a probe may be off 1
_POINTS, _MOST_POINTS = 1000, 20_000  # of a grid


class SpectrumRow(NamedTuple):
    """An eigenvalue, or a node of a probe's quadrature; see `schema.spectra`."""

    step: int
    operator: str  # hessian, ggn or covariance
    kind: str  # eigenvalue or node
    probe: int | None  # None of an eigenvalue
    index: int  # type: ignore[assignment]  # not tuple.index: 0 is the largest eigenvalue, of nodes the smallest
    value: float
    weight: float | None  # tau: sums to 1 over the nodes of a probe; None of an eigenvalue
    residual: float  # |A y - theta y|
    error: float | None  # min(r, r^2 / gap); None of a node
    converged: bool | None  # None of a node


def write_spectra(files: Files, rows: Sequence[SpectrumRow]) -> None:
    """Write spectra.parquet whole, sorted by step, kind, probe and index.

    Raises: GradscaleError if a row is of no known kind or operator, is twice, has what its kind does not have or lacks
    what it has, or the weights of a probe do not sum to 1.
    """
    order = sorted(rows, key=lambda row: (row.step, row.kind, -1 if row.probe is None else row.probe, row.index))
    _check_rows(order)
    files.write(SPECTRA, encode_rows(order, schema.spectra()))


@dataclass(frozen=True)
class Spectrum:
    """A finished spectrum run. Open one with `gradscale.open_run`."""

    files: Files

    @property
    def path(self) -> str:
        return self.files.root

    @property
    def name(self) -> str:
        return name_of(self.files)

    @property
    def plan(self) -> dict[str, Any]:
        """The contents of run.json."""
        return plan_of(self.files)

    @property
    def steps(self) -> list[int]:
        return steps_of(self.plan)

    @property
    def size(self) -> int:
        """P: the entries of the measured parameters."""
        return size_of(self.plan)

    def estimates(self) -> pd.DataFrame:
        """One row per (step, measure, name, scope), as of any run.

        Raises: GradscaleError if the run was interrupted before it came to its estimates, or the file is damaged.
        """
        return estimates_of(self.files)

    def spectra(self) -> pd.DataFrame:
        """One row per eigenvalue and quadrature node; see `SpectrumRow`. `probe` and `converged` have missing values.

        Raises: GradscaleError if the run was interrupted before it came to them, or the file is damaged.
        """
        plan = self.plan
        if not self.files.exists(SPECTRA) and (plan.get("top") or plan.get("density")):
            raise GradscaleError(f"run {self.path} must be complete to have spectra, got none; run its command again")
        asked = self.files.exists(SPECTRA)
        table = read_table(self.files, SPECTRA) if asked else schema.spectra().empty_table()
        if table.schema.names != schema.spectra().names:
            raise GradscaleError(
                f"{SPECTRA} of {self.path} must have the columns {', '.join(schema.spectra().names)}, got "
                f"{', '.join(table.schema.names)}; read it with the gradscale that wrote it"
            )
        frame: pd.DataFrame = table.to_pandas()
        return frame.astype({"probe": "Int64", "converged": "boolean", "weight": float, "error": float})

    def eigenvalues(self, step: int | None = None) -> np.ndarray:
        """[k] float64, descending. Their errors, and which have not converged, are in `spectra()`.

        Raises: GradscaleError if the step is unknown or left out where there are several, or no eigenvalues were
        asked for.
        """
        chosen = self._rows(EIGENVALUE, step, "top", "eigenvalues", "--top K (in Python top=K)")
        found: np.ndarray = chosen.sort_values("value", ascending=False, kind="stable")["value"].to_numpy()
        return found

    def quadrature(self, step: int | None = None) -> Quadrature:
        """What the probes of one step say of the spectrum, for `gradscale.curvature.density`.

        Raises: GradscaleError as `eigenvalues`, of the density.
        """
        return quadrature_of(
            self._rows(NODE, step, "density", "a density", "--density (in Python density=True)"), self.size
        )

    def density(self, step: int | None = None, grid: np.ndarray | None = None, width: float | None = None) -> Density:
        """The density of eigenvalues on `grid` [x], with its standard error over probes; see `density_of`.

        Raises: GradscaleError as `quadrature`, or if the width is not positive.
        """
        return density_of(self.quadrature(step), grid, width)

    def trace_of(self, function: Callable[[np.ndarray], np.ndarray], step: int | None = None) -> TraceEstimate:
        """tr f(A) of a function of an array of eigenvalues, with its standard error over probes.

        Raises: GradscaleError as `quadrature`, or if f of a node is not finite.
        """
        return trace_of_function(self.quadrature(step), function)

    def sql(self, query: str) -> pd.DataFrame:
        """A DuckDB query over the tables `estimates` and `spectra`."""
        import duckdb

        with duckdb.connect() as connection:
            for name, file in (("estimates", ESTIMATES), ("spectra", SPECTRA)):
                if self.files.exists(file):
                    connection.register(name, read_table(self.files, file))
            frame: pd.DataFrame = connection.execute(query).df()
        return frame

    def _rows(self, kind: str, step: int | None, setting: str, what: str, remedy: str) -> pd.DataFrame:
        """The rows of one kind of the step, or of the only one that there is."""
        plan = self.plan
        steps = steps_of(plan)
        if step is None and len(steps) > 1:
            raise GradscaleError(f"step must be given where a run has several, {steps}, got None; pass one of them")
        at = steps[0] if step is None else step
        if at not in steps:
            raise GradscaleError(f"step must be one of {steps}, got {at}; run.steps has them")
        if not plan.get(setting):
            raise GradscaleError(
                f"run {self.path} must have been asked for {what}, got a run without; run gradscale spectrum with "
                f"{remedy} into another folder"
            )
        frame = self.spectra()
        chosen = frame[(frame["kind"] == kind) & (frame["step"] == at)]
        if not len(chosen):
            raise GradscaleError(
                f"run {self.path} must be complete to have {what} at step {at}, got none; run its command again"
            )
        return chosen


def size_of(plan: dict[str, Any]) -> int:
    """P of a plan: the entries of its parameters."""
    return sum(math.prod(about["shape"]) for about in plan["parameters"].values())


def quadrature_of(nodes: pd.DataFrame, size: int) -> Quadrature:
    """Of the nodes [r] of one step, as they are in `Spectrum.spectra`."""
    ordered = nodes.sort_values(["probe", "index"], kind="stable")
    probe = ordered["probe"].to_numpy(dtype=np.int64)
    return Quadrature(size, probe, *(ordered[name].to_numpy(dtype=float) for name in ("value", "weight", "residual")))


def density_of(quadrature: Quadrature, grid: np.ndarray | None = None, width: float | None = None) -> Density:
    """As `gradscale.curvature.density.density`; without a `grid` over all nodes, ten points a width or more.

    The grid ends four widths beyond the outermost nodes, so that nothing of the density is cut off; of a width below
    a two-thousandth of the range it has 20,000 points.
    """
    if grid is not None:
        return density(quadrature, grid, width)
    settled = density(quadrature, np.empty(0), width).width
    low, high = float(quadrature.value.min()) - 4 * settled, float(quadrature.value.max()) + 4 * settled
    points = min(max(_POINTS, math.ceil(10 * (high - low) / settled)), _MOST_POINTS)
    return density(quadrature, np.linspace(low, high, points), settled)


def _check_rows(rows: Sequence[SpectrumRow]) -> None:
    weights: dict[tuple[int, str, int], float] = {}
    seen: set[tuple[Any, ...]] = set()
    for row in rows:
        own = row[:5]
        if row.kind not in (EIGENVALUE, NODE) or row.operator not in OPERATORS:
            raise GradscaleError(
                f"row of a spectrum must be of kind {EIGENVALUE} or {NODE} and of operator {', '.join(OPERATORS)}, got "
                f"{row.kind!r} of {row.operator!r}; name it so"
            )
        if own in seen:
            raise GradscaleError(f"row of a spectrum must be there once, got {own} twice; merge each part once")
        seen.add(own)
        absent = [row.probe is None, row.weight is None, row.error is not None, row.converged is not None]
        if absent != [row.kind == EIGENVALUE] * 4:
            raise GradscaleError(
                f"{EIGENVALUE}s must have error and converged, {NODE}s probe and weight, and neither what the other "
                f"has, got {row}; set the others to None"
            )
        if not math.isfinite(row.value):
            raise GradscaleError(f"value of a row must be finite, got {row}; look at the operator's products")
        if row.probe is not None and row.weight is not None:
            key = (row.step, row.operator, row.probe)
            weights[key] = weights.get(key, 0.0) + row.weight
    for key, total in weights.items():
        if not abs(total - 1) <= _UNIT_WEIGHT:
            raise GradscaleError(
                f"weights of a probe must sum to 1, got {total:.9g} of (step, operator, probe) {key}; write all its "
                "nodes"
            )
