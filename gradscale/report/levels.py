"""What a report reads from a spectrum run beside its estimates: eigenvalues and quadratures of every step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from gradscale.curvature.density import Quadrature, moment, trace_of_function
from gradscale.store.parts import Parts
from gradscale.store.spectra import EIGENVALUE, NODE, Spectrum, quadrature_of, size_of

OPERATORS = {"hessian": "Hessian", "ggn": "Gauss-Newton matrix", "covariance": "gradient covariance"}
MEASURES = {"hessian": "curvature", "ggn": "gauss_newton", "covariance": "covariance"}
WANTED = {"largest": "largest", "both": "from both ends", "magnitude": "largest in magnitude"}


class Levels(NamedTuple):
    """The spectra of one run. `eigenvalues` has step, index, value, residual, error, converged."""

    plan: Mapping[str, Any]
    eigenvalues: pd.DataFrame
    quadratures: Mapping[int, Quadrature]  # by step
    verdicts: Mapping[int, str] = {}  # of stability, by step

    @property
    def operator(self) -> str:
        """As it is called in sentences."""
        return OPERATORS.get(str(self.plan["operator"]), str(self.plan["operator"]))

    @property
    def unit(self) -> str:
        """Of eigenvalues."""
        covariance = self.plan["operator"] == "covariance"
        return "(loss units / parameter unit)^2" if covariance else "loss units / parameter unit^2"

    @property
    def steps(self) -> list[int]:
        """Those with eigenvalues, ascending."""
        return sorted({int(step) for step in self.eigenvalues["step"]})

    def at(self, step: int) -> pd.DataFrame:
        """The eigenvalues of a step, descending."""
        chosen = self.eigenvalues[self.eigenvalues["step"] == step]
        return chosen.sort_values("index", kind="stable").reset_index(drop=True)


def levels_of(run: Spectrum) -> Levels:
    plan, frame = run.plan, run.spectra()
    eigenvalues = frame[frame["kind"] == EIGENVALUE]
    columns = ["step", "index", "value", "residual", "error", "converged"]
    nodes = frame[frame["kind"] == NODE]
    steps = [int(step) for step in nodes["step"].unique()]
    quadratures = {step: quadrature_of(nodes[nodes["step"] == step], size_of(plan)) for step in steps}
    settled = eigenvalues[columns].astype({"converged": bool}).reset_index(drop=True)
    return Levels(plan, settled, quadratures, _verdicts(run) if plan.get("stability") else {})


def _verdicts(run: Spectrum) -> dict[int, str]:
    """Those of the parts that are there; of a run that was copied without its parts there are none."""
    parts = Parts(run.files)
    steps = [step for step in run.steps if "eigenvalues" in parts.names(step)]
    reports = {step: parts.read(step, "eigenvalues").get("stability") for step in steps}
    return {step: str(report["verdict"]) for step, report in reports.items() if report}


def asked_text(levels: Levels) -> str:
    """What list was asked for, as `10 largest`."""
    which = str(levels.plan.get("which") or "largest")
    return f"{levels.plan.get('top')} {WANTED.get(which, which)}"


def mean_square(levels: Levels) -> pd.DataFrame:
    """The root mean square of all eigenvalues against step, a curve: exact but for the probes."""
    rows = []
    for step, quadrature in sorted(levels.quadratures.items()):
        if np.unique(quadrature.probe, return_counts=True)[1].min() < 2:
            continue
        square = moment(quadrature, 2)
        root = math.sqrt(square.value)
        rows.append((step, root, square.stderr / (2 * root) if root else 0.0, square.n))
    return pd.DataFrame(rows, columns=["step", "value", "stderr", "n"])


def shares(quadrature: Quadrature, width: float) -> tuple[float, float, float, float]:
    """The share of eigenvalues within `width` of zero and its error, and of those below -`width`, as nodes show it."""
    near = trace_of_function(quadrature, lambda theta: (np.abs(theta) <= width).astype(float))
    below = trace_of_function(quadrature, lambda theta: (theta < -width).astype(float))
    return tuple(x / quadrature.size for x in (near.value, near.stderr, below.value, below.stderr))  # type: ignore[return-value]
