"""Gradient domination along a run's checkpoints: how far the loss is above its optimum, against |grad L|^alpha.

Shapes: T checkpoints, J jackknife blocks, V values, A exponents.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.measures import MEASURES
from gradscale.measures.jackknife import jackknife_errors
from gradscale.measures.measure import Estimate, Measure, statistic_of
from gradscale.measures.moments import Moments, MomentsStatistic, moments
from gradscale.run.fold import unflatten
from gradscale.run.plan import Plan
from gradscale.run.stiffness_between import check_same_weights
from gradscale.store.results import Run
from gradscale.store.store import Store

MEASURED_WITH = ("coherence", "dispersion", "effective_gram")
SQUARES = ("plug_in", "unbiased")
_LEAST = 3  # checkpoints of a slope


class StepMoments(NamedTuple):
    """Of the finite examples at one checkpoint, by jackknife block: the gradients' moments and the losses' sums."""

    step: int
    moments: Moments
    losses: Tensor  # [J] float64


class DominationPoint(NamedTuple):
    step: int
    gap: float  # L_t - optimum
    plug_in: float  # |grad L_t|^2 as |S|^2 / n^2, too large by tr Sigma / n; 0 makes a ratio infinite
    unbiased: float  # (|S|^2 - Q) / (n (n - 1)), which may be negative


class GradientDomination(NamedTuple):
    constants: Mapping[tuple[str, float], Estimate]  # by (plug_in or unbiased, alpha): c_alpha
    slopes: Mapping[str, Estimate]  # of log gap by log |grad|: the alpha that the path itself shows
    points: tuple[DominationPoint, ...]
    without_gradient: int  # checkpoints whose unbiased square is not positive: NaN there


def gradient_domination(
    run: Run,
    held_out: Run | None = None,
    optimum: float = 0.0,
    alphas: Sequence[float] = (1.0, 1.5, 2.0),
) -> GradientDomination:
    """c_alpha = max_t (L_t - L*) / |grad L_t|^alpha over the checkpoints, and the least-squares slope of
    log (L_t - L*) by log |grad L_t|; L_t is the mean loss of the examples measured, the gradient in the measured
    parameters.

    The condition is one on the population's loss: give as `held_out` a run at the same weights over examples that the
    training has not seen, of which both L_t and the gradient then are; without it they are of `run` itself, and of the
    training loss if that is what it measured. |grad L_t|^2 is taken as it is, `plug_in`, and `unbiased`, from the
    U-statistic; where the latter is not positive, the gradient cannot be told from zero: there the ratio is NaN, the
    checkpoint counted in `without_gradient`, and the maximum and the slope are over the others.

    Conditional, and empirical: on `optimum` L*, which is not estimated but assumed (0 of losses that vanish); and a
    maximum along a path is a lower bound of the constant of the condition, never a certificate. On a quadratic
    alpha = 2 and c is at most 1 / (2 lambda), lambda the smallest positive eigenvalue of the Hessian. Standard errors:
    delete-one-block jackknife over the same blocks of examples at all checkpoints together, for the examples as a
    sample and these weights; how well a line fits is not in that of the slope, nor is the choice of the maximum where
    two checkpoints come close. NaN of fewer than two blocks, or if leaving one out leaves no gradient or gap.

    Cost: the states of T steps, one after another, J P numbers each; J^2 P operations a step.
    Raises: GradscaleError if the run lacks a measure that sums gradients, or complete steps; if there are fewer than
    three checkpoints; if a loss is below the optimum; or as `stiffness_between`, of two runs.
    Source: Foster, Sekhari and Sridharan (2018), arXiv 1810.11059 (the condition); Banerjee et al. (2024), arXiv
    2406.07712 (alpha from 1 to 2). The estimates are ours.
    """
    if not alphas or not all(0 < alpha < math.inf for alpha in alphas):
        raise GradscaleError(f"alphas must be positive numbers, got {list(alphas)}; 1, 1.5 and 2 are the default")
    data = run if held_out is None else held_out
    if len(data.steps) < _LEAST:
        raise GradscaleError(
            f"run {data.path} must have at least {_LEAST} checkpoints for a slope, got {data.steps}; measure more"
        )
    if held_out is not None:
        for step in held_out.steps:
            check_same_weights(run, held_out, step)
    gradients = {step: _moments(data, step) for step in data.steps}
    losses = _losses(data)
    found = [StepMoments(step, part, losses[step]) for step, part in gradients.items()]
    return domination(found, optimum, alphas, "held-out" if held_out is not None else "the run's own")


def domination(
    found: Sequence[StepMoments], optimum: float, alphas: Sequence[float], examples: str
) -> GradientDomination:
    """From the moments of every checkpoint, in the same blocks.

    Raises: GradscaleError if a mean loss is below the optimum, or a block has finite examples at some of them only.
    """
    blocks = [len(part.losses) for part in found]
    if len(set(blocks)) != 1:
        raise GradscaleError(
            f"all checkpoints must have finite examples in the same blocks, got {blocks} blocks with any; measure "
            "again without the checkpoints, or the examples, that are not finite"
        )
    gaps, plug_in, unbiased = (torch.stack(part, dim=1) for part in zip(*map(_replicates, found), strict=True))
    gaps = gaps - optimum  # [1 + J, T], first of all examples, then of those outside a block
    if bool((gaps[0] < 0).any()):
        t = int(gaps[0].argmin())
        raise GradscaleError(
            f"optimum must be at most every mean loss, got {optimum:g} and {float(gaps[0, t]) + optimum:g} at step "
            f"{found[t].step}; give a lower one"
        )
    squares = dict(zip(SQUARES, (plug_in, unbiased.where(unbiased > 0, torch.nan)), strict=True))
    keys = [(kind, alpha) for kind in SQUARES for alpha in alphas]
    columns = [_highest(gaps / squares[kind] ** (alpha / 2)) for kind, alpha in keys]
    columns += [_slope(gaps, squares[kind]) for kind in SQUARES]
    values = torch.stack(columns, dim=1)  # [1 + J, V]
    counts = torch.stack([part.moments.counts for part in found]).mean(dim=0)  # [J]
    taken = counts[:, None].expand(len(counts), values.shape[1])
    errors = jackknife_errors(values[0], [(values[1:], taken)], taken.sum(dim=0))
    n, about = found[0].moments.n, f"optimum={optimum:g}/{examples} examples/empirical/v1"

    def estimate(v: int, name: str, unit: str) -> Estimate:
        return Estimate(float(values[0, v]), float(errors[v]), n, "conditional", f"{name}/{about}", unit)

    head = "gradient_domination"
    constants = {
        (kind, alpha): estimate(
            v, f"{head}/c/{kind}/alpha={alpha:g}", f"loss units^{1 - alpha:g} parameter units^{alpha:g}"
        )
        for v, (kind, alpha) in enumerate(keys)
    }
    slopes = {kind: estimate(len(keys) + v, f"{head}/slope/{kind}", "1") for v, kind in enumerate(SQUARES)}
    points = tuple(
        DominationPoint(part.step, float(gaps[0, t]), float(plug_in[0, t]), float(unbiased[0, t]))
        for t, part in enumerate(found)
    )
    return GradientDomination(constants, slopes, points, int((unbiased[0] <= 0).sum()))


def _replicates(part: StepMoments) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss and both |grad L|^2, each [1 + J]: of all examples, and of those outside each block."""
    counts, squares, gram = part.moments

    def left_out(sums: Tensor) -> Tensor:
        return torch.cat([sums.sum()[None], sums.sum() - sums])

    n, q, losses = left_out(counts), left_out(squares), left_out(part.losses)
    norm = gram.sum() - torch.cat([torch.zeros(1), 2 * gram.sum(dim=1) - gram.diagonal()])
    return losses / n, norm.clamp(min=0) / n**2, (norm - q) / (n * (n - 1))


def _highest(ratios: Tensor) -> Tensor:
    """[1 + J] over the checkpoints at which the first row is not NaN."""
    kept = ~ratios[0].isnan()
    return ratios[:, kept].amax(dim=1) if bool(kept.any()) else ratios.new_full((len(ratios),), torch.nan)


def _slope(gaps: Tensor, squares: Tensor) -> Tensor:
    """[1 + J]: over the checkpoints at which the first row has a gap and a gradient; NaN of fewer than three."""
    kept = (gaps[0] > 0) & (squares[0] > 0)
    if int(kept.sum()) < _LEAST:
        return gaps.new_full((len(gaps),), torch.nan)
    x, y = squares[:, kept].log() / 2, gaps[:, kept].log()
    x = x - x.mean(dim=1, keepdim=True)
    return (x * y).sum(dim=1) / x.square().sum(dim=1)


def _moments(run: Run, step: int) -> Moments:
    """Raises: GradscaleError if the run does not sum gradients, or the step is not complete."""
    statistic = _statistic(run)
    merged = Store(run.files).read_merged(step)
    if merged is None:
        raise GradscaleError(
            f"run {run.path} must have all its shards at step {step}, got some missing; run its command again"
        )
    (state,) = unflatten([statistic], merged).values()
    return moments(state)["all"]


def _losses(run: Run) -> dict[int, Tensor]:
    """By step, [J] float64: the sums of the losses of the finite examples of the blocks that have one, well rounded."""
    plan = Plan.from_json(json.dumps(run.plan))
    rows = run.rows().to_table(columns=["step", "shard", "loss", "finite"]).to_pandas()
    rows = rows[rows["finite"]]
    blocks = rows["shard"].map({shard: plan.unit(0, shard).block for shard in range(plan.shards)})
    found: dict[int, list[float]] = {step: [] for step in run.steps}
    for (step, _), part in rows.groupby([rows["step"], blocks]):  # sorted by both
        found[step].append(math.fsum(part["loss"]))
    return {step: torch.tensor(sums, dtype=torch.float64) for step, sums in found.items()}


def _statistic(run: Run) -> MomentsStatistic:
    measured: Mapping[str, Any] = run.plan["measures"]
    name = next((name for name in MEASURED_WITH if name in measured), None)
    if name is None:
        raise GradscaleError(
            f"run {run.path} must have been measured with one of {', '.join(MEASURED_WITH)}, got "
            f"{', '.join(measured) or 'none'}; measure it again with --measures coherence"
        )
    settings = {key: value for key, value in measured[name].items() if key != "class"}
    measure: Measure = MEASURES[name](**settings)
    statistic = statistic_of(measure)
    assert isinstance(statistic, MomentsStatistic)
    return statistic
