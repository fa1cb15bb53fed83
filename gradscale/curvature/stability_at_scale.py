"""Stability of SGD from what can be had of a large model: Ritz pairs, quadratic forms, probes, each with its error.

The criteria are those of `stability.py`, and so are their names. There, all is exact and in one process; here a
criterion that the errors leave open is neither met nor not met. What is known comes from `stability_inputs.py`, alike
on all processes; from there on it is a few numbers.

The bounds (15) and (16) are 2 <X, C X> / <X, D X> at X = v v^T and X = I, and eta* = 2 / lambda_max(C^+ D) is the least
value of that quotient: at any v of length one, not at v_1 alone, (15) is a bound, so that a vector that has not
converged makes it less tight and never wrong. What must be true of the examples is H_i >= 0, as at a minimum of each.
A direction chosen on the same examples is no danger where these are all there are; of a sample of them it is.

Shapes: n examples of the training set, m measured, N probes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from gradscale.curvature.mean_square import batch_factor, bound_along, bound_of_traces
from gradscale.curvature.stability import descent_threshold
from gradscale.curvature.stability_inputs import Pair, QuadraticMoments
from gradscale.curvature.trace import TraceEstimate, TraceSamples, frobenius_sq, trace
from gradscale.errors import GradscaleError

_ROUNDING = 1e-9  # relative, by which a value may exceed its threshold
_COHEN, _ADAM = "arXiv 2103.00065", "arXiv 2207.14484"
_WU, _PAPER = "Wu, Ma and E (2018)", "arXiv 2306.07850"


class Known(NamedTuple):
    """What is known of a training set of n examples, of which H is the mean over `examples`; None is not known."""

    n: int
    examples: int
    leading: Pair | None = None
    preconditioned: Pair | None = None  # of D^-1/2 H D^-1/2, see `preconditioned_pair`
    along: QuadraticMoments | None = None  # along the vector of `leading`, or any other
    length_sq: TraceEstimate | None = None  # (1/n) sum_i |H_i v|^2, of the vector of `leading`
    traces: TraceSamples | None = None  # of H
    squares: TraceEstimate | None = None  # (1/n) sum_i |H_i|_F^2
    independent: bool = False  # the vector was found without the examples of `along`


class Judged(NamedTuple):
    """One condition `value <= threshold`; `met` is None where the error of the one estimated does not decide."""

    name: str
    value: float
    threshold: float
    met: bool | None
    role: str  # exact, necessary, sufficient or neither, as of `stability.Criterion`
    status: str  # identity, upper bound (of the largest step size), estimator, conditional or heuristic
    source: str
    estimated: str  # which of both the errors belong to: value or threshold
    stderr: float  # over examples or probes; 0 where neither is sampled, NaN where it cannot be told
    error: float  # what it may be off by beside that
    n: int  # examples


class ScaleReport(NamedTuple):
    eta: float
    batch_size: int
    criteria: tuple[Judged, ...]
    verdict: str  # stable, unstable or undecided, of the linearized dynamics


def stability_at_scale(
    known: Known, eta: float, batch_size: int, momentum: float = 0.0, deviations: float = 2.0
) -> ScaleReport:
    """Every criterion that what is known decides or leaves open, for step size `eta` on batches without replacement.

    A criterion is decided where the distance from its threshold is more than the error, and `deviations` standard
    errors. `sharpness` is a Ritz value, no larger than lambda_max: above the threshold it decides, below it only once
    it has converged. `non_uniformity` is a lower bound of s, from one direction: it can be not met, never met. As in
    `stability_report`, bounds are of SGD without momentum, and Adam's sharpness has beta_1 = momentum.

    Heuristic, and without a part in the verdict, are: sharpness and `bound_of_traces` of a sample of the examples (the
    first is too large), `bound_along` of a direction from the same sample, and both bounds where an example has a
    negative curvature along the direction. Otherwise a sample's bound is estimated for the training set, with
    p' = (p - c) / (1 - c) for p, c = (n - m) / (m (n - 1)): without the bias that a sample's own H makes.

    Raises: GradscaleError as `descent_threshold` and `batch_factor`, or unless examples and deviations are in range.
    Source: as `stability_report`; the estimates, their errors and p' are derived here.
    """
    if not 1 <= known.examples <= known.n or not deviations > 0:
        raise GradscaleError(
            f"examples must be 1 to n = {known.n} and deviations positive, got {known.examples} and {deviations}; n is "
            "that of the training set"
        )
    p, found = batch_factor(known.n, batch_size), _descent(known, eta, batch_size, momentum)
    if not momentum:
        found += [_along(known, eta, batch_size), _of_traces(known, eta, batch_size), _non_uniformity(known, eta, p)]
    criteria = tuple(_judged(each, deviations) for each in found if each is not None)
    return ScaleReport(eta, batch_size, criteria, _verdict(criteria))


def _descent(known: Known, eta: float, batch_size: int, momentum: float) -> list[Judged | None]:
    limit, limit_adam = descent_threshold(eta, momentum), descent_threshold(eta, momentum, averaged=True)
    whole = known.examples == known.n
    role = ("exact" if batch_size == known.n else "necessary") if whole else "neither"
    name, status = "sharpness_momentum" if momentum else "sharpness", "identity" if whole else "heuristic"
    return [
        _of_pair(known, known.leading, name, limit, role, status, _COHEN),
        _of_pair(known, known.preconditioned, "sharpness_adam", limit_adam, "neither", "conditional", _ADAM),
    ]


def _of_pair(
    known: Known, pair: Pair | None, name: str, limit: float, role: str, status: str, source: str
) -> Judged | None:
    if pair is None:
        return None
    high, low = pair.value + pair.error, pair.value - pair.excess
    met = _decided(high - limit, low - limit, limit)
    return Judged(name, pair.value, limit, met, role, status, source, "value", 0.0, pair.error, known.examples)


def _along(known: Known, eta: float, batch_size: int) -> Judged | None:
    q = known.along
    p = None if q is None else _sampled_factor(known.n, q.examples, batch_size)
    if q is None or p is None:
        return None
    below = q.mean**2 + p * q.second
    if q.mean <= 0 or below <= 0:
        bound, stderr, error = math.inf, 0.0, 0.0
    else:
        bound = bound_along(q.mean, q.second, p)
        by_mean, by_second = (2 - 2 * bound * q.mean) / below, -bound * p / below
        scatter = by_mean**2 * q.second + 2 * by_mean * by_second * q.third
        scatter += by_second**2 * (q.fourth - q.second**2)
        stderr = math.sqrt(max(scatter, 0.0) * (1 - q.examples / known.n) / max(q.examples - 1, 1))
        size = q.mean**2 + q.second
        error = q.error * (abs(by_mean) * math.sqrt(size) + 2 * abs(by_second) * size)
    whole = q.examples == known.n
    status = "upper bound" if whole else ("estimator" if known.independent else "heuristic")
    return _bound("bound_along", "(15)", known, eta, bound, status, stderr, error, q.examples)


def _of_traces(known: Known, eta: float, batch_size: int) -> Judged | None:
    p = _sampled_factor(known.n, known.examples, batch_size)
    if known.traces is None or known.squares is None or p is None:
        return None
    tr, whole, parts = trace(known.traces).value, frobenius_sq(known.traces).value, known.squares
    bound, below = bound_of_traces(tr, whole, parts.value, p), (1 - p) * whole + p * parts.value
    stderr = 0.0
    if below > 0:
        slopes = np.array([2, -bound * (1 - p)]) / below
        pairs = np.stack([known.traces.quadratic, known.traces.square])
        n = pairs.shape[1]
        own = float(slopes @ (np.cov(pairs) / n) @ slopes) if n > 1 else math.nan
        stderr = math.sqrt(own + (bound * p / below * parts.stderr if p else 0.0) ** 2)
    status = "estimator" if known.examples == known.n and tr > 0 else "heuristic"
    return _bound("bound_of_traces", "(16)", known, eta, bound, status, stderr, 0.0, known.examples)


def _bound(
    name: str, equation: str, known: Known, eta: float, bound: float, status: str, stderr: float, error: float, n: int
) -> Judged:
    convex = known.along is None or not known.along.negative
    role, status = ("necessary", status) if convex and status != "heuristic" else ("neither", "heuristic")
    source = f"{_PAPER}, {equation}"
    return Judged(name, eta, bound, None, role, status, source, "threshold", stderr, error, n)


def _non_uniformity(known: Known, eta: float, p: float) -> Judged | None:
    """s^2 >= v^T Sigma v = (1/n) sum_i |H_i v|^2 - |H v|^2 >= (1/n) sum_i (q_i - v^T H v)^2."""
    if known.length_sq is not None and known.leading is not None:
        whole = known.leading.value**2 + known.leading.residual**2
        spread, stderr, n = known.length_sq.value - whole, known.length_sq.stderr, known.length_sq.n
    elif known.along is not None:
        q, n = known.along, known.along.examples
        spread = q.second
        stderr = math.sqrt(max(q.fourth - q.second**2, 0.0) * (1 - n / known.n) / max(n - 1, 1))
    else:
        return None
    value = math.sqrt(max(spread, 0.0))
    limit, stderr = (1 / (eta * math.sqrt(p)) if p else math.inf), (stderr / (2 * value) if value else stderr)
    status = "conditional" if known.examples == known.n else "heuristic"
    return Judged("non_uniformity", value, limit, None, "neither", status, _WU, "value", stderr, 0.0, n)


def _sampled_factor(n: int, examples: int, batch_size: int) -> float | None:
    """p', which makes (1 - p') X + p' Y of a sample's |mean|^2 X and mean square Y unbiased for that of all with p.

    E over samples of |mean|^2 is (1 - c) |mean of all|^2 + c Y with the factor c of a batch of that size. None of a
    single example of several, which does not show how they differ.
    """
    p, c = batch_factor(n, batch_size), batch_factor(n, examples)
    return (p - c) / (1 - c) if c < 1 else None


def _judged(found: Judged, deviations: float) -> Judged:
    if found.met is not None or found.name.startswith("sharpness"):
        return found
    gap, off = found.value - found.threshold, found.error + deviations * found.stderr
    highest = math.inf if found.name == "non_uniformity" else gap + off  # a lower bound may be too small by anything
    return found._replace(met=_decided(highest, gap - off, found.threshold))


def _decided(highest: float, lowest: float, threshold: float) -> bool | None:
    """Whether value - threshold is at most 0, of which both ends are given; up to rounding."""
    if threshold == math.inf:
        return True
    slack = _ROUNDING * abs(threshold)
    return True if highest <= slack else (False if lowest > slack else None)


def _verdict(criteria: tuple[Judged, ...]) -> str:
    if any(each.met is False and each.role in ("exact", "necessary") for each in criteria):
        return "unstable"
    return "stable" if any(each.met and each.role in ("exact", "sufficient") for each in criteria) else "undecided"
