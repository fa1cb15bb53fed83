"""What checkpoints on one path say together: its complexity, from the tangent features' norms and the steps' lengths.

Shapes: T checkpoints, S training steps, P entries of the measured parameters, n examples, C outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from gradscale.checkpoints import fingerprint
from gradscale.errors import GradscaleError
from gradscale.measures.measure import Estimate
from gradscale.store.results import Run
from gradscale.task import Task, load_task

if TYPE_CHECKING:
    import pandas as pd

INTERPOLATIONS = ("trapezoid", "step")
UNIT = "output units"
Array = np.ndarray[Any, np.dtype[np.float64]]


class SquaredNorm(NamedTuple):
    """|Phi|_F^2 and its standard error over probes."""

    value: float
    stderr: float

    @property
    def root(self) -> tuple[float, float]:
        """|Phi|_F and its standard error, by the delta method; biased down by about stderr^2 / (8 |Phi|_F^3)."""
        norm = math.sqrt(self.value) if self.value >= 0 else math.nan
        return norm, self.stderr / (2 * norm) if norm > 0 else math.nan


class FeatureNorms(NamedTuple):
    """Of the tangent features Phi [n C, P] of n examples at one checkpoint: of all parameters, and of each."""

    n: int
    whole: SquaredNorm
    layers: Mapping[str, SquaredNorm]


class Stretch(NamedTuple):
    """The path from one checkpoint to the next."""

    first: int  # step
    last: int
    length: float
    complexity: float


class PathComplexity(NamedTuple):
    complexity: Estimate
    length: Estimate
    stretches: tuple[Stretch, ...]


def feature_norms(run: Run) -> dict[int, FeatureNorms]:
    """|Phi_t|_F^2 of every step that has estimates, as `tangent_kernel/frobenius` has them.

    Cost: reads the run's table of estimates.
    Source: Baratin et al. (2021), arXiv 2008.00938.
    Raises: GradscaleError if the run was not measured with `tangent_kernel`, or has no estimates.
    """
    measured = run.plan["measures"]
    if "tangent_kernel" not in measured:
        raise GradscaleError(
            f"run {run.path} must have been measured with tangent_kernel, got {', '.join(measured) or 'none'}; measure "
            "it again with --measures tangent_kernel"
        )
    frame = run.estimates()
    rows = frame[(frame["measure"] == "tangent_kernel") & (frame["name"] == "frobenius")]
    found: dict[int, FeatureNorms] = {}
    for step in sorted(set(rows["step"].tolist())):
        part = rows[rows["step"] == step]
        numbers = zip(part["value"].tolist(), part["stderr"].tolist(), strict=True)
        by_scope = dict(zip(part["scope"].tolist(), (SquaredNorm(*pair) for pair in numbers), strict=True))
        whole, n = by_scope.pop("all"), max(part["n"].tolist())
        found[step] = FeatureNorms(n, whole, {scope.removeprefix("layer:"): v for scope, v in by_scope.items()})
    return found


def path_complexity(
    run: Run,
    task: Task | None = None,
    lengths: pd.DataFrame | Array | Sequence[tuple[int, float]] | None = None,
    interpolation: str = "trapezoid",
) -> PathComplexity:
    """C = sum_t |w_{t+1} - w_t| |Phi_t|_F along the run's checkpoints, over the measured parameters.

    |Phi_t|_F is that of `tangent_kernel/frobenius` of the n examples measured. Without `lengths`, |delta w| is the
    distance of consecutive checkpoints: a lower bound of the length of the path between them, by the triangle
    inequality, so that C comes out too small; the closer the checkpoints, the less. `lengths` [S, 2], or a table with
    the columns step and length, holds instead |w_{s+1} - w_s| of every training step s from the first checkpoint to
    before the last, as realised by the optimizer, over the same parameters; other steps are left out. The definition
    says which. Between checkpoints |Phi| is interpolated: `trapezoid`, linearly in the step (without `lengths`, the
    mean of both ends), or `step`, as at the earlier one: the definition's, where every step is a checkpoint.

    Heuristic, as the quantity itself is. Standard error: of the probes of |Phi|, those of several checkpoints added
    and not their squares, since they share their probes: an upper bound that is reached where errors are the same at
    all checkpoints. NaN for a single probe. The error of |delta w| and of interpolation is not in it.

    `task` None is the run's own, by the name and options in run.json; weights are read by its `model(checkpoint)`, in
    the dtype in which it has them. Cost: T models, one after another; memory for a model and a copy of P numbers. With
    `lengths`, none.
    Raises: GradscaleError if the run has no `tangent_kernel` or fewer than two steps with it, a checkpoint is not as it
    was when measured or holds other parameters, or `lengths` has not every step once.
    Source: Baratin et al. (2021), arXiv 2008.00938, section 4: the heuristic for their bound.
    """
    if interpolation not in INTERPOLATIONS:
        raise GradscaleError(
            f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}; trapezoid is the default"
        )
    norms = feature_norms(run)
    steps = sorted(norms)
    if len(steps) < 2:
        raise GradscaleError(
            f"run {run.path} must have at least two measured checkpoints to be a path, got {steps}; measure more"
        )
    if lengths is None:
        ways = [
            _Way(first, last, length, length / 2)
            for (first, last), length in zip(pairwise(steps), _distances(run, steps, task), strict=True)
        ]
        about = "coarse |Delta w| between checkpoints, a lower bound of sum |delta w_t|"
    else:
        ways, about = list(_logged(lengths, steps)), "logged |delta w_t| of every step"
    if interpolation == "step":
        ways = [way._replace(late=0.0) for way in ways]
    return _complexity(norms, ways, f"{interpolation} interpolation/{about}")


class _Way(NamedTuple):
    """From one checkpoint to the next, `late` of whose length counts with |Phi| of the later one."""

    first: int
    last: int
    length: float
    late: float


def _complexity(norms: Mapping[int, FeatureNorms], ways: Sequence[_Way], about: str) -> PathComplexity:
    stretches, errors = [], []
    for first, last, length, late in ways:
        (norm, error), (norm_after, error_after) = norms[first].whole.root, norms[last].whole.root
        stretches.append(Stretch(first, last, length, _both(length - late, norm, late, norm_after)))
        errors.append(_both(length - late, error, late, error_after))
    n = min(norms[step].n for way in ways for step in (way.first, way.last))
    value, length = math.fsum(part.complexity for part in stretches), math.fsum(part.length for part in stretches)
    whole = f"path_complexity/length/{about.partition('/')[2]}/v1"
    return PathComplexity(
        Estimate(value, math.fsum(errors), n, "heuristic", f"path_complexity/C/{about}/v1", UNIT),
        Estimate(length, None, n, "heuristic", whole, "parameter units"),
        tuple(stretches),
    )


def _both(early: float, first: float, late: float, last: float) -> float:
    """early first + late last, where a number of weight 0 has no part though it be NaN."""
    return (early * first if early else 0.0) + (late * last if late else 0.0)


def _distances(run: Run, steps: Sequence[int], task: Task | None) -> Iterator[float]:
    """|w_b - w_a| over the measured parameters of consecutive checkpoints, tensor by tensor, in float64."""
    plan = run.plan
    task = load_task(plan["task"], **plan["task_options"]) if task is None else task
    before: dict[str, Tensor] = {}
    for step in steps:
        found = _weights(task, plan, step)
        if before:
            squares = [(w.double() - before[name].double()).square().sum() for name, w in found.items()]
            yield math.sqrt(math.fsum(float(square) for square in squares))
        for name, w in found.items():  # copies: a task may give the same module every time
            before[name] = before[name].copy_(w) if name in before else w.clone()


def _weights(task: Task, plan: Mapping[str, Any], step: int) -> dict[str, Tensor]:
    """The measured parameters at a checkpoint.

    Raises: GradscaleError if it is not the one that was measured, or the task's model lacks one of them.
    """
    checkpoint = plan["checkpoints"][str(step)]
    path = checkpoint["path"]
    if path is not None and fingerprint(path) != checkpoint["fingerprint"]:
        raise GradscaleError(
            f"checkpoint {path} must be as it was when it was measured, got other content; put it back, or give lengths"
        )
    there = dict(task.model(path).named_parameters())
    wrong = [
        name
        for name, about in plan["parameters"].items()
        if name not in there or [*there[name].shape] != about["shape"]
    ]
    if wrong:
        raise GradscaleError(
            f"task.model must have the parameters that were measured, got none such named {', '.join(wrong[:3])}; pass "
            "the task of the run"
        )
    return {name: there[name].detach() for name in plan["parameters"]}


def _logged(lengths: Any, steps: Sequence[int]) -> Iterator[_Way]:
    """Raises: GradscaleError unless every step from the first checkpoint to before the last has one length."""
    if hasattr(lengths, "columns"):
        lengths = lengths[["step", "length"]].to_numpy()
    table = np.asarray(lengths, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != 2:
        raise GradscaleError(f"lengths must be a table of (step, length), [S, 2], got shape {table.shape}; pair them")
    table = table[(table[:, 0] >= steps[0]) & (table[:, 0] < steps[-1])]
    expected = np.arange(steps[0], steps[-1])
    if not np.array_equal(np.sort(table[:, 0]), expected):
        raise GradscaleError(
            f"lengths must have every step from {steps[0]} to {steps[-1] - 1} once, got {len(table)} rows for "
            f"{len(expected)} steps; log |delta w| at every optimizer step, or leave lengths out"
        )
    if not (table[:, 1] >= 0).all() or not np.isfinite(table[:, 1]).all():
        raise GradscaleError(f"lengths must be finite and not negative, got {table[:, 1].min()}; log |delta w|, a norm")
    for first, last in pairwise(steps):
        mine = table[(table[:, 0] >= first) & (table[:, 0] < last)]
        late = mine[:, 1] * (mine[:, 0] - first) / (last - first)
        yield _Way(first, last, math.fsum(mine[:, 1]), math.fsum(late))
