"""The generalization gap of leave-out trainings along their paths, and the equation that it obeys.

Shapes: n examples, K blocks of s examples left out, T steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.measures.measure import Estimate, Estimates

NAME = "leave_out"
LOSS = "loss units"
RATE = "loss units / time"


class FullPath(NamedTuple):
    """What is recorded of the training on all n examples, at steps 0 to T. float64.

    Of block b, l_b and g_b are the mean loss and gradient of its s examples; those of the others are L_-b, grad L_-b.
    """

    loss: Tensor  # [T + 1]: L(w_t)
    trace_covariance: Tensor  # [T + 1]: tr Sigma(t) of the n gradients, over n - 1
    losses: Tensor  # [T + 1, K]: l_b(w_t)
    changes: Tensor  # [T + 1, K]: <g_b(w_t), the step taken from w_t>
    changes_without: Tensor  # [T + 1, K]: <g_b(w_t), the step -eta grad L_-b(w_t) that was not taken>


class LeftOutPath(NamedTuple):
    """What is recorded of the training without one block, at steps 0 to T. float64."""

    losses: Tensor  # [T + 1]: l_b(w_t^-b)
    changes: Tensor  # [T + 1]: <g_b(w_t^-b), the step taken from w_t^-b>


class GapPath(NamedTuple):
    """Everything at steps 0 to T, float64; integrals up to the step. NaN where a number cannot be told."""

    loss: Tensor  # [T + 1]
    gaps: Tensor  # [T + 1, K]: delta_b
    gap: Tensor  # [T + 1]: delta, their mean
    gap_stderr: Tensor | None  # [T + 1]; None: exact
    perturbation: Tensor  # [T + 1]: tr Sigma / n
    perturbation_left_out: Tensor  # [T + 1]: the same of the blocks left out, whose expectation over blocks it is
    contraction: Tensor  # [T + 1]: c_bar; NaN until the gap first exceeds the tolerance, and wherever it does not
    contraction_stderr: Tensor | None
    perturbation_integral: Tensor  # [T + 1]
    perturbation_left_out_integral: Tensor  # [T + 1]
    contraction_integral: Tensor  # [T + 1]: of c_bar delta
    contraction_integral_stderr: Tensor | None
    closure_error: Tensor  # [T + 1]


def gap_path(
    full: FullPath, left_out: list[LeftOutPath], n: int, block_size: int, learning_rate: float, tolerance: float
) -> GapPath:
    """delta(t), and both sides of delta' = eps_bar - c_bar delta, from the increments that the steps have made.

    An increment is the first-order change <g, step> of a loss along a step. Of block b, its loss's along the path
    without it less that along the path of all is eps_b - (c delta)_b, with eps_b from the two steps at w_t alone.
    """
    gaps = torch.stack([path.losses for path in left_out], dim=1) - full.losses
    realized = torch.stack([path.changes for path in left_out], dim=1) - full.changes
    sources = full.changes_without - full.changes  # eta eps_b
    sinks = sources - realized  # eta (c delta)_b
    gap = gaps.mean(dim=1)
    contraction = torch.where(gap > tolerance, sinks.mean(dim=1) / learning_rate / gap, torch.nan)
    spread = (sinks / learning_rate - contraction[:, None] * gaps) / gap[:, None]  # of a ratio, to first order
    perturbation = full.trace_covariance / n
    sunk = _integral(sinks)
    return GapPath(
        full.loss,
        gaps,
        gap,
        sampling_error(gaps, n, block_size),
        perturbation,
        sources.mean(dim=1) / learning_rate,
        contraction,
        sampling_error(spread, n, block_size),
        _integral(learning_rate * perturbation),
        _integral(sources.mean(dim=1)),
        sunk.mean(dim=1),
        sampling_error(sunk, n, block_size),
        (gap - _integral(realized).mean(dim=1)).abs(),
    )


def sampling_error(values: Tensor, n: int, block_size: int) -> Tensor | None:
    """Standard error [...] of the mean of `values` [..., K] over K random blocks, disjoint, of the n examples.

    For the mean over all blocks of that size, given the data and the initial weights. None where all n were left out
    one by one: there is no other. Of single examples it is that of sampling without replacement, (1 - K / n) S^2 / K.
    Of larger blocks it is S^2 / K: what the values owe to pairs of examples within a block does not fall as the blocks
    use the examples up, so that no such factor is right, and this is too large rather than too small. As any error from
    a sample it is too small where a few examples, seldom drawn, hold much of the sum. NaN for K = 1.
    """
    K = values.shape[-1]
    if is_exhaustive(K, n, block_size):
        return None
    if K == 1:
        return torch.full(values.shape[:-1], math.nan, dtype=torch.float64)
    left = 1 - K / n if block_size == 1 else 1.0
    return (values.var(dim=-1) * left / K).sqrt()


def is_exhaustive(blocks: int, n: int, block_size: int) -> bool:
    """Whether every example is left out, by itself: there is then nothing that was sampled."""
    return block_size == 1 and blocks == n


def rates_for_gram(path: GapPath, tolerance: float) -> tuple[Tensor, int | None]:
    """c_bar [T] for K_n, 0 before the gap first exceeds `tolerance`; and the first step after it where it does not.

    At step 0 both paths have the same weights, c_bar delta is 0, and before the gap can be told from 0 so is it.
    """
    rates = path.contraction[:-1]
    begun = (path.gap[:-1] > tolerance).cumsum(dim=0) > 0
    lost = (begun & rates.isnan()).nonzero().flatten()
    return torch.where(begun, rates, 0.0), int(lost[0]) if len(lost) else None


def path_estimates(path: GapPath, n: int, block_size: int, settings: str) -> Estimates:
    """The estimates at the last step; `settings` go into their definitions. Those of `gs.leave_out_gap`."""
    status = "identity" if is_exhaustive(path.gaps.shape[1], n, block_size) else "estimator"
    left_out = n if status == "identity" else path.gaps.shape[1] * block_size

    def last(values: Tensor | None) -> float | None:
        return None if values is None else float(values[-1])

    def estimate(value: Tensor, error: Tensor | None, count: int, kind: str, about: str, unit: str = LOSS) -> Estimate:
        return Estimate(float(value[-1]), last(error), count, kind, f"{NAME}/{about}/{settings}/v1", unit)

    rebuilt = "reconstructed"
    return {
        ("gap", "all"): estimate(path.gap, path.gap_stderr, left_out, status, "gap/found"),
        ("perturbation", "all"): estimate(path.perturbation, None, n, "identity", f"perturbation/{rebuilt}", RATE),
        ("perturbation_integral", "all"): estimate(
            path.perturbation_integral, None, n, "identity", f"perturbation_integral/{rebuilt}"
        ),
        ("contraction", "all"): estimate(
            path.contraction, path.contraction_stderr, left_out, status, f"contraction/{rebuilt}", "1 / time"
        ),
        ("contraction_integral", "all"): estimate(
            path.contraction_integral,
            path.contraction_integral_stderr,
            left_out,
            status,
            f"contraction_integral/{rebuilt}",
        ),
        ("closure_error", "all"): estimate(path.closure_error, None, left_out, "identity", f"closure_error/{rebuilt}"),
    }


def gram_estimate(gap: float, path: GapPath, n: int, block_size: int, settings: str) -> Estimates:
    """r(0)^T K_n r(0): conditional on small steps, and of sampled blocks with an error that cannot be told."""
    error = None if is_exhaustive(path.gaps.shape[1], n, block_size) else math.nan
    definition = f"{NAME}/gram_gap/found; K_n reconstructed/{settings}/v1"
    return {("gram_gap", "all"): Estimate(gap, error, n, "conditional", definition, LOSS)}


def _integral(increments: Tensor) -> Tensor:
    """[T + 1, ...]: the sums of the increments before each step; that of the last step was not taken."""
    return torch.cat([torch.zeros_like(increments[:1]), increments[:-1].cumsum(dim=0)])
