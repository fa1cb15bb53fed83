"""From the parts of a spectrum run to its rows: estimates with their errors, eigenvalues and nodes. No Ray, no files.

Shapes: n examples, N probes, L parameters, S shards of the examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from gradscale.curvature.density import Quadrature, effective_dimension, log_determinant, outliers
from gradscale.curvature.trace import TraceEstimate, mean_of_samples
from gradscale.errors import GradscaleError
from gradscale.measures.curvature import SQUARED, UNIT, Traced, root_and_error, trace_of
from gradscale.measures.exact_sum import total_of
from gradscale.run.fold import EstimateRow
from gradscale.run.spectrum_plan import TOGETHER, SpectrumPlan
from gradscale.store.spectra import SpectrumRow

COVARIANCE_UNIT = "(loss units / parameter unit)^2"


class TraceSums(NamedTuple):
    """sums[j, l, s] = sum_i v_jl^T (M_i v_j)_l over the examples of shard s; whole blocks of TOGETHER probes."""

    sums: torch.Tensor  # [N, L, S] float64
    counts: torch.Tensor  # [S] float64, examples


def traced(found: TraceSums, layer: int | None = None) -> Traced:
    """tr A, or the trace of the diagonal block of parameter `layer`."""
    sums = found.sums.sum(dim=1) if layer is None else found.sums[:, layer]
    return trace_of([total_of(sums[:, shard][None]) for shard in range(sums.shape[1])], found.counts)


def enough(found: TraceSums, asked: Mapping[str, Any]) -> bool:
    """Whether the standard error over probes is what was asked for, or `max_probes` are there."""
    N = len(found.sums)
    if asked["max_probes"] <= N:
        return True
    if max(2, asked["min_probes"]) > N or (asked["stderr"] is None and asked["relative"] is None):
        return False
    trace = traced(found)
    limit = asked["stderr"] if asked["stderr"] is not None else asked["relative"] * abs(trace.value)
    return bool(trace.over_probes <= limit)


def probe_blocks(asked: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(first, last + 1) of each block of probes that may be taken."""
    most: int = asked["max_probes"]
    return [(first, min(first + TOGETHER, most)) for first in range(0, most, TOGETHER)]


def step_rows(plan: SpectrumPlan, step: int, parts: Mapping[str, Mapping[str, Any]]) -> list[EstimateRow]:
    """The estimates of one step, from its parts by name; `trace` holds TraceSums."""
    rows: list[EstimateRow] = list(_ways(plan, step, parts["choice"]["ways"]))
    if "eigenvalues" in parts:
        rows += _extremes(plan, step, parts["eigenvalues"], parts["choice"])
    if "trace" in parts:
        rows += _traces(plan, step, parts["trace"]["sums"])
    if "deflated" in parts:
        rows.append(_deflated(plan, step, parts["deflated"]))
    if "covariance_trace" in parts:
        rows += _exact_traces(plan, step, parts["covariance_trace"]["by_parameter"])
    if "norms" in parts:
        rows += _norms(plan, step, parts["norms"])
    if "nodes" in parts:
        rows += _functions(plan, step, parts["nodes"]["quadrature"])
    report = parts.get("eigenvalues", {}).get("stability")
    if report is not None:
        rows += [EstimateRow(step, "stability", name, "all", *rest) for name, *rest in report["rows"]]
    return rows


def spectrum_rows(plan: SpectrumPlan, step: int, parts: Mapping[str, Mapping[str, Any]]) -> list[SpectrumRow]:
    """The eigenvalues of one step, then the nodes of its quadratures."""
    rows: list[SpectrumRow] = []
    if (found := parts.get("eigenvalues")) is not None:
        columns = zip(*(found[name] for name in ("values", "residuals", "errors", "converged")), strict=True)
        for index, (value, residual, error, converged) in enumerate(columns):
            rows.append(
                SpectrumRow(step, plan.operator, "eigenvalue", None, index, value, None, residual, error, converged)
            )
    if "nodes" in parts:
        q: Quadrature = parts["nodes"]["quadrature"]
        for probe in np.unique(q.probe):
            own = np.flatnonzero(q.probe == probe)
            for index, at in enumerate(own[np.argsort(q.value[own], kind="stable")]):
                numbers = float(q.value[at]), float(q.weight[at]), float(q.residual[at])
                rows.append(SpectrumRow(step, plan.operator, "node", int(probe), index, *numbers, None, None))
    return rows


def quadrature_of(plan: SpectrumPlan, parts: Sequence[Mapping[str, Any]]) -> Quadrature:
    """Of the node parts of one step, in the order of their probes."""
    columns = [np.concatenate([np.asarray(part[name]) for part in parts]) for name in ("probe", "value", "weight")]
    residual = np.concatenate([np.asarray(part["residual"]) for part in parts])
    return Quadrature(plan.size, columns[0].astype(np.int64), columns[1], columns[2], residual)


def _extremes(plan: SpectrumPlan, step: int, found: Mapping[str, Any], choice: Mapping[str, Any]) -> list[EstimateRow]:
    """lambda_max and, where both ends were asked for, lambda_min, with the bound on the error as it is known.

    With an exact way of products and a converged pair the value is an identity, up to that bound; the error of finite
    differences is beside it.
    """
    values, errors, n = found["values"], found["errors"], plan.examples
    quantity, exact = "lambda_max" if plan.which == "largest" else "vector", {"backend": "exact", "error": 0.0}
    way: Mapping[str, Any] = choice["ways"].get(quantity, exact)  # the covariance has one way, and it is exact
    approximate = way["backend"] == "finite_differences"
    unit, rows = COVARIANCE_UNIT if plan.operator == "covariance" else UNIT, []
    for name, at in _places(plan.which, values).items():
        value = abs(values[at]) if name == "spectral_norm" else values[at]
        error = math.hypot(errors[at], way["error"] * abs(value) if approximate else 0.0)
        status = "identity" if found["converged"][at] and not approximate else "estimator"
        rows.append(_row(plan, step, name, "all", value, error, n, status, f"lanczos/{plan.which}", unit))
    return rows


def _ways(plan: SpectrumPlan, step: int, ways: Mapping[str, Mapping[str, Any]]) -> Iterator[EstimateRow]:
    """The estimated relative error of products by the way that was taken; the largest, where there are several."""
    if ways:
        way = max(ways.values(), key=lambda way: way["error"])
        how = f"{way['backend']} eps={way['eps']:.3g}" if "eps" in way else way["backend"]
        yield _row(plan, step, "backend_error", "all", way["error"], math.nan, plan.examples, "heuristic", how, "1")


def _places(which: str, values: Sequence[float]) -> dict[str, int]:
    """Which of the eigenvalues, descending, are estimates by a name."""
    last = len(values) - 1
    if which == "magnitude":
        return {"spectral_norm": 0 if abs(values[0]) >= abs(values[last]) else last}
    return {"lambda_max": 0} | ({"lambda_min": last} if which == "both" and last else {})


def _traces(plan: SpectrumPlan, step: int, found: TraceSums) -> list[EstimateRow]:
    rows, kind = [], (plan.trace or {})["probes"]
    for scope, layer in {"all": None, **{f"layer:{name}": j for j, name in enumerate(plan.parameters)}}.items():
        value, over_both, over_probes = traced(found, layer)
        for name, error in (("trace", over_both), ("trace_sample", over_probes)):
            rows.append(
                _row(plan, step, name, scope, value, error, plan.examples, "estimator", f"hutchinson/{kind}", UNIT)
            )
    return rows


def _exact_traces(plan: SpectrumPlan, step: int, found: Mapping[str, float]) -> list[EstimateRow]:
    by_scope = {"all": math.fsum(found.values()), **{f"layer:{name}": value for name, value in found.items()}}
    n, how = plan.examples, "sum_of_squares"
    return [
        _row(plan, step, "trace_sample", scope, value, None, n, "identity", how, COVARIANCE_UNIT)
        for scope, value in by_scope.items()
    ]


def _deflated(plan: SpectrumPlan, step: int, found: Mapping[str, Any]) -> EstimateRow:
    definition = f"{(plan.trace or {})['method']}/{found['products']} products, error {found['error']}"
    value, stderr = found["value"], found["stderr"]
    return _row(plan, step, "trace_sample", "all", value, stderr, plan.examples, found["status"], definition, UNIT)


def _norms(plan: SpectrumPlan, step: int, found: Mapping[str, Any]) -> list[EstimateRow]:
    """As the measure `curvature` has them: of the sample, and between two halves without the noise of the data."""
    kind = (plan.norms or {})["probes"]
    whole = mean_of_samples(np.asarray(found["whole"]))
    named: dict[str, tuple[float, float, str]] = {
        "frobenius_sample": (*root_and_error(whole.value, whole.stderr), UNIT)
    }
    if kind == "gaussian":
        named["ellipsoid_sample"] = _mean_root(found["whole"])
    if found["between"] is not None:
        between = mean_of_samples(np.asarray(found["between"]))
        named["frobenius_sq"] = between.value, between.stderr, SQUARED
        named["frobenius"] = *root_and_error(between.value, between.stderr), UNIT
        if kind == "gaussian":
            named["ellipsoid"] = _mean_root(found["between"])
    return [
        _row(plan, step, name, "all", value, stderr, plan.examples, "estimator", f"halves/{kind}", unit)
        for name, (value, stderr, unit) in named.items()
    ]


def _mean_root(squares: Sequence[float]) -> tuple[float, float, str]:
    e = mean_of_samples(np.sqrt(np.asarray(squares).clip(min=0)))
    return e.value, e.stderr, UNIT


def _functions(plan: SpectrumPlan, step: int, quadrature: Quadrature) -> list[EstimateRow]:
    asked = plan.density or {}
    shift, edge = asked["shift"], asked["edge"]
    named: dict[str, tuple[Callable[[Quadrature, float], TraceEstimate], float, str, str]] = {}
    if shift is not None:
        named["log_determinant"] = (log_determinant, shift, f"log det (A + {shift:g} I)", "1")
        named["effective_dimension"] = (effective_dimension, shift, f"tr A (A + {shift:g} I)^-1", "1")
    if edge is not None:
        named["outliers"] = (outliers, edge, f"eigenvalues above {edge:g}", "1")
    rows = []
    for name, (function, at, definition, unit) in named.items():
        try:
            e = function(quadrature, at)
        except GradscaleError:  # of an operator with negative eigenvalues: undefined, which NaN says
            e = TraceEstimate(math.nan, math.nan, 0, "estimator", "")
        rows.append(
            _row(plan, step, name, "all", e.value, e.stderr, plan.examples, e.status, f"slq/{definition}", unit)
        )
    return rows


def _row(
    plan: SpectrumPlan,
    step: int,
    name: str,
    scope: str,
    value: float,
    stderr: float | None,
    n: int,
    status: str,
    how: str,
    unit: str,
) -> EstimateRow:
    definition = f"{plan.measure}/{name}/{plan.operator}/{how}/v1"
    return EstimateRow(step, plan.measure, name, scope, value, stderr, n, status, definition, unit)
