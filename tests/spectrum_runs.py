"""Spectrum runs as `gradscale spectrum` leaves them, from real quadratures and eigenvalues of dense operators."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from krylov_problems import Drawn, rotated
from torch import Tensor

from gradscale.curvature.density import Quadrature
from gradscale.curvature.lanczos import Ritz, lanczos
from gradscale.curvature.operator import DenseOperator
from gradscale.curvature.quadrature import quadratures
from gradscale.curvature.stability import descent_threshold
from gradscale.curvature.trace import frobenius, group_traces, trace, trace_samples
from gradscale.store.files import Files
from gradscale.store.spectra import Spectrum, SpectrumRow, write_spectra
from gradscale.store.store import Store

STEPS = (0, 64, 256)
LAYERS = {"embed.weight": [8, 10], "blocks.0.attn.weight": [10, 6], "blocks.0.mlp.weight": [10, 5], "head.bias": [10]}
P = 200
MEASURES = {"hessian": "curvature", "ggn": "gauss_newton", "covariance": "covariance"}
UNIT = "loss units / parameter unit^2"


def spectrum_at(k: int, operator: str) -> list[float]:
    """P eigenvalues of the k-th checkpoint: outliers that grow, a bulk that narrows, and of a Hessian negative ones."""
    outliers = [2.0 * 3**k, 1.2 * 2**k, 0.9 * 1.6**k, 0.7]
    bulk = 0.4 * np.linspace(0, 1, P - len(outliers)) ** 3 / (1 + k)
    negative = -0.25 * np.linspace(1, 0, 20) if operator == "hessian" else np.zeros(20)
    return [*outliers, *np.concatenate([bulk[20:], negative]).tolist()]


def matrix_at(k: int, operator: str = "hessian") -> Tensor:
    """[P, P]"""
    return rotated(spectrum_at(k, operator), seed=k)


def plan_of_spectrum(operator: str = "hessian", steps: Sequence[int] = STEPS, **settings: Any) -> dict[str, Any]:
    layers = settings.pop("layers", LAYERS)
    return {
        "kind": "spectrum",
        "task": "digits",
        "task_options": {},
        "checkpoints": {
            str(s): {"path": f"checkpoints/step{s}.safetensors", "fingerprint": f"{s:016x}"} for s in steps
        },
        "examples": 512,
        "data_fingerprint": "0123456789abcdef0123",
        "parameters": {name: {"shape": shape, "dtype": "float32"} for name, shape in layers.items()},
        "params": None,
        "excluded": [],
        "operator": operator,
        "top": 6,
        "which": "largest",
        "tolerance": 1e-6,
        "max_steps": 300,
        "basis_cap": None,
        "trace": {"probes": 16, "kind": "gaussian", "stderr": None, "relative": None},
        "density": {"probes": 8, "steps": 40},
        "stability": None,
        "backend": "auto",
        "seed": 0,
        "shard_size": 256,
        "microbatch": 32,
        "threads_per_worker": 1,
        "device": "cpu",
        "versions": {"torch": torch.__version__},
    } | settings


def eigenvalue_rows(step: int, operator: str, found: Ritz) -> list[SpectrumRow]:
    columns = (found.values, found.residuals, found.errors, found.converged)
    return [
        SpectrumRow(step, operator, "eigenvalue", None, i, value, None, residual, error, converged)
        for i, (value, residual, error, converged) in enumerate(zip(*(c.tolist() for c in columns), strict=True))
    ]


def node_rows(step: int, operator: str, found: Quadrature) -> list[SpectrumRow]:
    rows = []
    for probe in np.unique(found.probe).tolist():
        chosen = np.flatnonzero(found.probe == probe)
        for i, at in enumerate(chosen[np.argsort(found.value[chosen])].tolist()):
            value, weight, residual = float(found.value[at]), float(found.weight[at]), float(found.residual[at])
            rows.append(SpectrumRow(step, operator, "node", probe, i, value, weight, residual, None, None))
    return rows


def save_spectrum(folder: Path, plan: dict[str, Any], rows: Sequence[SpectrumRow], estimates: list[tuple]) -> Spectrum:
    files = Files(str(folder))
    files.write("run.json", json.dumps(plan).encode())
    write_spectra(files, rows)
    Store(files).write_estimates(estimates)
    return Spectrum(files)


def spectrum_run(
    folder: Path, operator: str = "hessian", steps: Sequence[int] = STEPS, max_steps: int = 40, **settings: Any
) -> Spectrum:
    """Everything that can be asked for, of matrices `matrix_at`; with few `max_steps` not all has converged."""
    plan = plan_of_spectrum(operator, steps, max_steps=max_steps, **settings)
    rows: list[SpectrumRow] = []
    estimates: list[tuple] = []
    for k, step in enumerate(steps):
        dense = DenseOperator(matrix_at(k, operator))
        if plan["top"]:
            ritz = lanczos(dense, Drawn(P, 1)(range(1))[0], plan["top"], max_steps, which=plan["which"], basis_cap=60)
            rows += eigenvalue_rows(step, operator, ritz)
            values, errors = ritz.values.tolist(), ritz.errors.tolist()
            estimates.append(estimate(step, operator, "lambda_max", values[0], errors[0]))
            estimates += stability_estimates(step, plan, values[0], errors[0])
        if plan["density"]:
            asked = plan["density"]
            rows += node_rows(step, operator, quadratures(dense, Drawn(P, 3), range(asked["probes"]), asked["steps"]))
        if plan["trace"]:
            estimates += trace_estimates(step, operator, dense, plan)
        way = f"{MEASURES[operator]}/backend_error/{operator}/double_backward/v1"
        estimates.append(estimate(step, operator, "backend_error", 2.1e-7, None, definition=way))
    return save_spectrum(folder, plan, rows, estimates)


def trace_estimates(step: int, operator: str, dense: DenseOperator, plan: dict[str, Any]) -> list[tuple]:
    samples = trace_samples(dense, Drawn(P, 2), range(plan["trace"]["probes"]), groups_of(plan))
    found = [("trace", "all", trace(samples)), ("frobenius", "all", frobenius(samples))]
    found += [("trace", f"layer:{name}", of_group) for name, of_group in group_traces(samples).items()]
    return [estimate(step, operator, name, of.value, of.stderr, scope) for name, scope, of in found]


def stability_estimates(step: int, plan: dict[str, Any], value: float, error: float) -> list[tuple]:
    if not plan["stability"]:
        return []
    threshold = descent_threshold(plan["stability"]["eta"])
    about = [("sharpness", value, error), ("sharpness_threshold", threshold, None)]
    return [(step, "stability", name, "all", v, e, 512, "identity", f"{name}/v1", UNIT) for name, v, e in about]


def groups_of(plan: dict[str, Any]) -> dict[str, range]:
    groups, start = {}, 0
    for name, about in plan["parameters"].items():
        groups[name] = range(start, start + math.prod(about["shape"]))
        start = groups[name].stop
    return groups


def estimate(
    step: int, operator: str, name: str, value: float, stderr: float | None, scope: str = "all", definition: str = ""
) -> tuple:
    told = definition or f"{MEASURES[operator]}/{name}/v1"
    return (step, MEASURES[operator], name, scope, value, stderr, 512, "estimator", told, UNIT)
