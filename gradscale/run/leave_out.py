"""The generalization gap of leave-one-out trainings and the effective Gram matrix: n + 1 trainings as Ray tasks.

Shapes: n examples, K blocks of s examples left out, C outputs of each, T steps, M recorded steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.measures.effective_gram_dense import EffectiveGramMatrix
from gradscale.measures.leave_out_path import (
    NAME,
    FullPath,
    GapPath,
    LeftOutPath,
    gap_path,
    gram_estimate,
    path_estimates,
    rates_for_gram,
)
from gradscale.measures.measure import Estimates
from gradscale.measures.settings import plain_fields
from gradscale.run.cluster import Resources, ray_session
from gradscale.run.leave_out_plan import check_gram_size, check_numbers, choose_blocks, plan_of
from gradscale.run.leave_out_training import Training, describe, train_for_gram, train_full, train_without
from gradscale.run.plan import check_positive
from gradscale.run.remote import run_tasks
from gradscale.store.files import Files
from gradscale.store.leave_out import GRAM, TRAJECTORY, LeaveOutFolder, frame_of, table_of
from gradscale.task import Task, check_task, load_task

if TYPE_CHECKING:
    import pandas as pd

_FULL, _GRAM = "full", "gram"  # the names of their records


class LeaveOutGap(NamedTuple):
    """What `leave_out_gap` found. The columns of `trajectory` are those of docs/effective-gram.md."""

    trajectory: pd.DataFrame  # a row for each of the M recorded steps
    estimates: Estimates  # at step T, by (name, scope)
    blocks: tuple[tuple[int, ...], ...]  # K, the ids of the examples left out
    gaps: Tensor  # [M, K] float64: mean over block b of l_i(w^-b) - l_i(w)
    gram: EffectiveGramMatrix | None


def leave_out_gap(
    task: Task | str,
    out: str | None = None,
    learning_rate: float = 0.1,
    steps: int = 100,
    every: int = 1,
    blocks: int | None = None,
    block_size: int = 1,
    gram: bool = False,
    examples: int | None = None,
    checkpoint: str | None = None,
    tolerance: float = 1e-12,
    seed: int = 0,
    workers: int = 2,
    threads_per_worker: int = 1,
    address: str | None = None,
    task_options: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LeaveOutGap:
    """Train on all examples and without each; the gap delta, what makes it and what contracts it, along the paths.

    w follows full-batch gradient descent on the mean loss of the first `examples` examples (None: all n), w^-i the
    same without example i, from the same weights, in float64, for `steps` steps of eta = `learning_rate`; time is
    t = eta x step. The gap is delta(t) = (1/n) sum_i [l_i(w^-i) - l_i(w)], and under the gradient flow

        delta' = eps_bar - c_bar delta,   eps_bar = tr Sigma / n at w(t),
        c_bar delta = (1/n) sum_i [<g_i, grad L_-i> at w^-i - <g_i, grad L_-i> at w],

    an identity for any model and loss. The increments are those of the steps taken; `closure_error` is
    |delta - (int eps_bar - int c_bar delta)|, what finite steps make of it: O(eta) at a given time. c_bar is NaN until
    delta first exceeds `tolerance` (0/0 at the start), and wherever it does not. Recorded at every `every`-th step.

    `block_size` s > 1 leaves out blocks of s examples at a time, `blocks` = K fewer than all of them: of a random
    partition, drawn by `seed`. eps_bar of a random block has expectation tr Sigma / n for every s, but w^-b is trained
    on n - s.
    Averaged over all n examples left out one by one, numbers are exact (status identity, stderr None); over sampled
    blocks they are estimators of the mean over all blocks, with a standard error given the data: `sampling_error`.

    With `gram`: K_n(T) [nC, nC] of the model's outputs, from Jacobians at every step, and r(0)^T K_n r(0) beside delta
    (`gram_gap`, conditional: of small steps). It needs losses that depend on the parameters by the model's one output.

    `out`: a folder or URI for the tables, in Parquet, and for every finished training, which is then not repeated; a
    folder made with other settings is refused. No bit depends on `workers`, or on `address`, the Ray cluster to join.

    Found in the source, in what could be read of it: the gap's equation with eps_bar_n(t) and c_bar_n(t), and gap =
    r_n(0)^T K_n r_n(0). Reconstructed: all three formulas. The `definition` of every estimate says which it is.

    Cost: (K + 1) (T + 1) forward and backward passes over n examples, those of all examples about ten times a plain one
    and with K P numbers; `gram`: T (n C)^2 P + T (n C)^3 operations beside.
    Raises: GradscaleError for what the user can put right, such as a learning rate that diverges.
    Source: Yang and Chaudhari (2025), arXiv 2504.16450; no equation number, see above.
    """
    check_positive(
        steps=steps, every=every, block_size=block_size, workers=workers, threads_per_worker=threads_per_worker
    )
    check_numbers(learning_rate, tolerance)
    options = dict(task_options or {})
    name, loaded = _resolved(task, options)
    training = Training(loaded, checkpoint, examples, float(learning_rate), steps)
    resources = Resources(threads_per_worker, 0)
    with ray_session(address, workers, resources):
        described = _alone(describe, training, gram, resources)
        n = described.examples
        training = replace(training, examples=n, blocks=choose_blocks(n, blocks, block_size, seed))
        check_gram_size(n, described.outputs)
        folder = LeaveOutFolder(Files(out)) if out is not None else None
        if folder is not None:
            options = options or plain_fields(loaded)
            folder.adopt(plan_of(name, options, training, described, block_size, seed, tolerance, resources))
        records = _train(training, folder, workers, resources, on_progress)
        path = _path(records, training, block_size, tolerance)
        matrix = _gram(training, path, tolerance, folder, resources) if gram else None
    return _result(training, path, matrix, block_size, every, folder)


def _train_one(training: Training, number: int | None) -> dict[str, Tensor]:
    """The record of the training without block `number`, or on all examples for None."""
    record = train_full(training) if number is None else train_without(training, number)
    return record._asdict()


def _train(
    training: Training,
    folder: LeaveOutFolder | None,
    workers: int,
    resources: Resources,
    on_progress: Callable[[int, int], None] | None,
) -> dict[str, dict[str, Tensor]]:
    """The records of all trainings by their names: those that the folder has, and the others, made now."""
    numbers: list[int | None] = [None, *range(len(training.blocks))]
    kept = [_record_name(b) for b in numbers if folder is not None and folder.finished(_record_name(b))]
    records = {name: folder.read(name) for name in kept} if folder is not None else {}

    def tell() -> None:
        if on_progress is not None:
            on_progress(len(records), len(numbers))

    def keep(number: int | None, record: dict[str, Tensor]) -> None:
        if folder is not None:
            folder.write(_record_name(number), record)
        records[_record_name(number)] = record
        tell()

    tell()
    left = [b for b in numbers if _record_name(b) not in records]
    if left:
        run_tasks(_train_one, training, left, workers, resources, keep)
    return records


def _alone(function: Callable[[Training, Any], Any], training: Training, item: Any, resources: Resources) -> Any:
    """`function(training, item)` in one Ray task: the driver loads no model."""
    results: list[Any] = []
    run_tasks(function, training, [item], 1, resources, lambda _, result: results.append(result))
    return results[0]


def _path(
    records: Mapping[str, Mapping[str, Tensor]], training: Training, block_size: int, tolerance: float
) -> GapPath:
    assert training.examples is not None
    full = FullPath(**records[_FULL])
    left_out = [LeftOutPath(**records[_record_name(b)]) for b in range(len(training.blocks))]
    return gap_path(full, left_out, training.examples, block_size, training.learning_rate, tolerance)


def _gram(
    training: Training, path: GapPath, tolerance: float, folder: LeaveOutFolder | None, resources: Resources
) -> EffectiveGramMatrix:
    rates, lost = rates_for_gram(path, tolerance)
    if lost is not None:
        raise GradscaleError(
            f"the gap must stay above tolerance {tolerance:g} for K_n, got {float(path.gap[lost]):.3g} at step {lost}: "
            "it has no contraction factor there; take fewer steps, a smaller tolerance, or leave out gram"
        )
    if folder is not None and folder.finished(_GRAM):
        return EffectiveGramMatrix(**folder.read(_GRAM))
    found: EffectiveGramMatrix = _alone(train_for_gram, training, rates, resources)
    if folder is not None:
        folder.write(_GRAM, found._asdict())
    return found


def _result(
    training: Training,
    path: GapPath,
    matrix: EffectiveGramMatrix | None,
    block_size: int,
    every: int,
    folder: LeaveOutFolder | None,
) -> LeaveOutGap:
    T, n = training.steps, training.examples
    assert n is not None
    recorded = torch.tensor(sorted({*range(0, T + 1, every), T}))
    settings = f"block_size={block_size}, learning_rate={training.learning_rate:g}, steps={T}"
    estimates = dict(path_estimates(path, n, block_size, settings))
    tables = {TRAJECTORY: table_of(_columns(path, recorded, training.learning_rate))}
    if matrix is not None:
        estimates |= gram_estimate(matrix.gap, path, n, block_size, settings)
        index = torch.arange(len(matrix.eigenvalues))
        tables[GRAM] = table_of({"index": index, "eigenvalue": matrix.eigenvalues, "share": matrix.shares})
    if folder is not None:
        folder.write_tables(tables, [(T, NAME, *key, *estimate) for key, estimate in estimates.items()])
    return LeaveOutGap(frame_of(tables[TRAJECTORY]), estimates, training.blocks, path.gaps[recorded], matrix)


def _columns(path: GapPath, recorded: Tensor, learning_rate: float) -> dict[str, Tensor | None]:
    columns = {
        "loss": path.loss,
        "gap": path.gap,
        "gap_stderr": path.gap_stderr,
        "perturbation": path.perturbation,
        "perturbation_left_out": path.perturbation_left_out,
        "contraction": path.contraction,
        "perturbation_integral": path.perturbation_integral,
        "perturbation_left_out_integral": path.perturbation_left_out_integral,
        "contraction_integral": path.contraction_integral,
        "closure_error": path.closure_error,
    }
    chosen = {name: None if column is None else column[recorded] for name, column in columns.items()}
    return {"step": recorded, "time": learning_rate * recorded, **chosen}


def _resolved(task: Task | str, options: Mapping[str, Any]) -> tuple[str, Task]:
    if isinstance(task, str):
        return task, load_task(task, **options)
    name = f"{type(task).__module__}:{type(task).__qualname__}"
    return name, check_task(task, name)


def _record_name(number: int | None) -> str:
    return _FULL if number is None else f"without-{number:05d}"
