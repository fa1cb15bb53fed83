"""Every Arrow schema that gradscale writes, with the unit of each column in the field's metadata.

`loss units` are those of the task's losses (nats for cross-entropy); a gradient has loss units per unit
of the parameters, so its squared norm has loss units squared per unit squared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import pyarrow as pa

SCHEMA_VERSION = "1"


def _field(name: str, kind: pa.DataType, unit: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"unit": unit})


def rows(parameters: Sequence[str], *, labels: bool) -> pa.Schema:
    """One row per example. `layer_sq_norms[j]` belongs to `parameters[j]`, kept in the schema's metadata."""
    label = [_field("label", pa.int64(), "class")] if labels else []
    return pa.schema(
        [
            _field("example_id", pa.int64(), "index in the dataset"),
            _field("step", pa.int64(), "optimizer step"),
            _field("shard", pa.int32(), "index"),
            *label,
            _field("loss", pa.float64(), "loss units"),
            _field("grad_sq_norm", pa.float64(), "(loss units / parameter unit)^2"),
            _field("layer_sq_norms", pa.list_(pa.float64(), len(parameters)), "(loss units / parameter unit)^2"),
            _field("finite", pa.bool_(), "false: kept out of every sum"),
        ],
        metadata=_metadata(parameters=json.dumps(list(parameters))),
    )


def sketches(dim: int, scheme: Mapping[str, object], dtype: str) -> pa.Schema:
    """One fixed-size row per finite example; the scheme that made it (name, version, seed, dim) is in the metadata."""
    kind = {"float32": pa.float32(), "float16": pa.float16()}[dtype]
    return pa.schema(
        [
            _field("example_id", pa.int64(), "index in the dataset"),
            _field("step", pa.int64(), "optimizer step"),
            _field("sketch", pa.list_(kind, dim), "loss units / parameter unit"),
        ],
        metadata=_metadata(sketch=json.dumps(dict(scheme), sort_keys=True), sketch_dtype=dtype),
    )


def estimates() -> pa.Schema:
    """One row per (step, measure, name, scope). `stderr` is null where the value is exact, NaN where it is unknown."""
    return pa.schema(
        [
            _field("step", pa.int64(), "optimizer step"),
            _field("measure", pa.string(), ""),
            _field("name", pa.string(), ""),
            _field("scope", pa.string(), "all | union | layer:<parameter> | class:<a>[,<b>]"),
            _field("value", pa.float64(), "see column unit"),
            _field("stderr", pa.float64(), "see column unit", nullable=True),
            _field("n", pa.int64(), "examples; pairs of examples where the definition says so"),
            _field("status", pa.string(), "identity | estimator | heuristic | conditional"),
            _field("definition", pa.string(), ""),
            _field("unit", pa.string(), ""),
        ],
        metadata=_metadata(),
    )


def spectra() -> pa.Schema:
    """One row per eigenvalue or quadrature node of a step. Null is what a kind of row does not have.

    Eigenvalues have loss units per squared unit of the parameters, those of the gradient covariance the square of loss
    units per unit.
    """
    unit = "loss units / parameter unit^2; covariance: (loss units / parameter unit)^2"
    return pa.schema(
        [
            _field("step", pa.int64(), "optimizer step"),
            _field("operator", pa.string(), "hessian | ggn | covariance"),
            _field("kind", pa.string(), "eigenvalue | node"),
            _field("probe", pa.int64(), "index; null of an eigenvalue", nullable=True),
            _field("index", pa.int64(), "eigenvalue: 0 is the largest; node: 0 is the smallest of its probe"),
            _field("value", pa.float64(), unit),
            _field("weight", pa.float64(), "1: sums to 1 over a probe; null of an eigenvalue", nullable=True),
            _field("residual", pa.float64(), unit),
            _field("error", pa.float64(), f"{unit}; a bound, null of a node", nullable=True),
            _field("converged", pa.bool_(), "to the tolerance asked for; null of a node", nullable=True),
        ],
        metadata=_metadata(),
    )


def _metadata(**entries: str) -> dict[str, str]:
    return {"gradscale.schema_version": SCHEMA_VERSION} | {f"gradscale.{k}": v for k, v in entries.items()}
