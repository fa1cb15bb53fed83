"""What `stability_at_scale` is told of a model: a Ritz pair, moments of quadratic forms, means over a sample.

Vectors stay in slices, and whatever is of examples is each process's own: only a few numbers are added up.

Shapes: p entries here, n' examples here, m of all processes, N probes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.curvature.lanczos import Ritz, lanczos
from gradscale.curvature.operator import Operator
from gradscale.curvature.probes import FlatProbes
from gradscale.curvature.stability import Preconditioned
from gradscale.curvature.trace import TraceEstimate
from gradscale.errors import GradscaleError

_NEGATIVE = 1e-6  # of the root mean square of the forms, beside their own error


class Pair(NamedTuple):
    """A leading Ritz value a, and how far it may be from lambda_max: a - excess <= lambda_max <= a + error."""

    value: float
    residual: float  # |A v - a v|
    error: float  # infinite of a pair that has not converged
    excess: float  # of the products' noise alone: an exact Ritz value is never too large


class QuadraticMoments(NamedTuple):
    """Of q_i = v^T H_i v, |v| = 1, over m examples: their mean, and the mean powers of what they differ from it by."""

    examples: int
    mean: float
    second: float
    third: float
    fourth: float
    negative: int  # examples with q_i < 0 beyond its error: they are at no minimum of their own
    error: float  # of the q_i, relative to their root mean square


def leading_pair(ritz: Ritz) -> Pair:
    """The largest value of a list by `lanczos`. Its error is infinite unless it has converged."""
    error = float(ritz.errors[0]) if bool(ritz.converged[0]) else math.inf
    return Pair(float(ritz.values[0]), float(ritz.residuals[0]), error, ritz.noise)


def preconditioned_pair(
    operator: Operator, diagonal: Tensor, max_steps: int = 300, tolerance: float = 1e-6, seed: int = 0
) -> Pair:
    """The leading pair of D^-1/2 A D^-1/2, `diagonal` [p] the entries of D that this process holds.

    Cost: a product a step; 20 p numbers. Raises: GradscaleError as `Preconditioned` and `lanczos`.
    """
    probes = FlatProbes(operator.here, seed, dtype=diagonal.dtype, device=str(diagonal.device))
    start = probes(range(1))[0]
    return leading_pair(lanczos(Preconditioned(operator, diagonal), start, 1, max_steps, tolerance, seed=seed))


def quadratic_moments(operator: Operator, values: Tensor, error: float = 0.0) -> QuadraticMoments:
    """Of the forms [n'] of this process's examples, and those of all others. Two sums over processes.

    `error` is that of `example_quadratics`. Raises: GradscaleError if there is no example, or one is not finite.
    """
    q = values.double()
    m, total = operator.all_sum(torch.stack([q.new_tensor(float(len(q))), q.sum()])).tolist()
    if not m or not math.isfinite(total):
        raise GradscaleError(
            f"quadratic forms must be finite and at least one, got {m:.0f} of sum {total}; leave out the examples "
            "whose loss is not finite"
        )
    apart = q - total / m
    powers = [apart.square().sum(), (apart**3).sum(), (apart**4).sum(), q.square().sum()]
    second, third, fourth, size = (operator.all_sum(torch.stack(powers)) / m).tolist()
    least = -max(_NEGATIVE, 4 * error) * math.sqrt(size)
    negative = float(operator.all_sum((q < least).sum().double()))
    return QuadraticMoments(int(m), total / m, second, third, fourth, int(negative), error)


def mean_over_sample(operator: Operator, samples: Tensor, population: int, probed: bool = True) -> TraceEstimate:
    """The mean over `population` examples of E |M_i u|^2, from N probes [m', N] of each of this process's sampled ones.

    Examples are drawn without replacement, and probes are each example's own: with f = m / population, s^2 the variance
    between the m examples' means and w that within, the error is ((1 - f) s^2 / m + f w / m)^(1/2). Of one probe, w is
    not known, and s^2 / m is taken, which is no less in the mean. Not `probed` are numbers [m', 1] that are each
    example's own without error, such as |H_i v|^2 of one v: there w is 0.
    Raises: GradscaleError if there is no example, or more than the population.
    Source: Cochran (1977), "Sampling techniques", section 10.3 (sampling in two stages).
    """
    rows, probes = samples.double(), samples.shape[1]
    means = rows.mean(dim=1)
    m, total = operator.all_sum(torch.stack([rows.new_tensor(float(len(rows))), means.sum()])).tolist()
    if not 1 <= m <= population:
        raise GradscaleError(
            f"sampled examples must be 1 to {population}, got {m:.0f}; count each once, on one process"
        )
    apart = (means - total / m).square().sum()
    inside = (rows - means[:, None]).square().sum() / (max(probes - 1, 1) * probes)
    between, within = operator.all_sum(torch.stack([apart, inside])).tolist()
    f = m / population if probes > 1 or not probed else 0.0
    spread = between / (m - 1) / m if m > 1 else (0.0 if f == 1 else math.nan)
    variance = (1 - f) * spread + f * within / m**2
    return TraceEstimate(total / m, math.sqrt(variance), int(m), "estimator", "over examples and probes")
