"""Whether descent of a given step size and batch size stays where it is: every criterion with its value.

All speak of the dynamics to first order in the distance from a minimum w, which for SGD is one of every example
(interpolation): w <- w - eta H_B w. Away from such a minimum they say how the curvature stands to the step, no more.

Shapes: n examples, P entries of a vector, p of them here, k vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from gradscale.curvature.leading import leading_eigenpair
from gradscale.curvature.mean_square import (
    Threshold,
    batch_factor,
    bound_along,
    bound_of_traces,
    rows_of_gram,
    threshold_of_gram,
    threshold_of_matrices,
)
from gradscale.curvature.non_uniformity import (
    ExampleHessians,
    HessianSpread,
    MeanHessian,
    along,
    dense_hessians,
    non_uniformity,
    rank_one_hessians,
)
from gradscale.curvature.operator import Operator
from gradscale.errors import GradscaleError

_ROUNDING = 1e-9  # relative, by which a value may exceed its threshold


def descent_threshold(eta: float, momentum: float = 0.0, averaged: bool = False) -> float:
    """The largest eigenvalue under which w <- w - eta m, m <- beta m + H w does not diverge: 2 (1 + beta) / eta.

    With `averaged`, m <- beta m + (1 - beta) H w, as Adam has it: 2 (1 + beta) / ((1 - beta) eta), 38 / eta for 0.9.
    Raises: GradscaleError if eta is not positive, or beta not in [0, 1).
    Source: Cohen et al. (2021), arXiv 2103.00065 (momentum); Cohen et al. (2022), arXiv 2207.14484 (Adam).
    """
    if not 0 < eta < math.inf:
        raise GradscaleError(f"eta must be a positive number, got {eta}; give the learning rate")
    if not 0 <= momentum < 1:
        raise GradscaleError(f"momentum must be at least 0 and less than 1, got {momentum}; 0 is plain descent")
    return 2 * (1 + momentum) / (eta * ((1 - momentum) if averaged else 1))


@dataclass(frozen=True, eq=False)
class Preconditioned:
    """D^-1/2 A D^-1/2, D the diagonal [p] of a preconditioner, such as Adam's (sqrt(v / (1 - beta_2^t)) + eps).

    Its lambda_max against `descent_threshold(eta, beta_1, averaged=True)` is Adam's sharpness. The 1 - beta_1^t by
    which Adam also divides belongs to D early in training, as a factor.
    Raises: GradscaleError if an entry is not positive.
    Source: Cohen et al. (2022), arXiv 2207.14484.
    """

    operator: Operator
    diagonal: Tensor

    def __post_init__(self) -> None:
        if len(self.diagonal) != len(self.operator.here) or not bool((self.diagonal > 0).all()):
            raise GradscaleError(
                f"diagonal must be {len(self.operator.here)} positive numbers, got {len(self.diagonal)} from "
                f"{float(self.diagonal.min()):.3g}; add eps after the root"
            )

    @property
    def size(self) -> int:
        return self.operator.size

    @property
    def here(self) -> range:
        return self.operator.here

    def products(self, vectors: Tensor) -> Tensor:
        scale = self.diagonal.rsqrt().to(vectors)
        return self.operator.products(vectors * scale) * scale

    def all_sum(self, parts: Tensor) -> Tensor:
        return self.operator.all_sum(parts)


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """(I - eta H)^2 + eta^2 p Sigma = E (I - eta H_B)^2: a step multiplies E |w|^2 by lambda_max of it, at most.

    Source: Wu, Ma and E (2018), NeurIPS.
    """

    hessian: Operator
    spread: Operator
    eta: float
    p: float

    @property
    def size(self) -> int:
        return self.hessian.size

    @property
    def here(self) -> range:
        return self.hessian.here

    def products(self, vectors: Tensor) -> Tensor:
        once = vectors - self.eta * self.hessian.products(vectors)
        twice = once - self.eta * self.hessian.products(once)
        return twice + self.eta**2 * self.p * self.spread.products(vectors) if self.p else twice

    def all_sum(self, parts: Tensor) -> Tensor:
        return self.hessian.all_sum(parts)


class Curvatures(NamedTuple):
    """What is known of the Hessians H_i of n examples and their mean H; None is not known."""

    n: int
    sharpness: float | None = None  # a = lambda_max(H)
    along_curvature: float | None = None  # v^T H v of one direction, best v_1
    along_variance: float | None = None  # (1/n) sum_i (v^T H_i v - v^T H v)^2
    non_uniformity: float | None = None  # s
    trace: float | None = None
    frobenius_sq: float | None = None  # |H|_F^2
    mean_frobenius_sq: float | None = None  # (1/n) sum_i |H_i|_F^2
    preconditioned_sharpness: float | None = None  # lambda_max(D^-1/2 H D^-1/2)


class Criterion(NamedTuple):
    """One condition `value <= threshold` and what it means if it is met.

    `role`: `exact` (stays if and only if it is met), `necessary` (leaves if it is not), `sufficient` (stays if it is),
    or `neither`. `status`: identity, upper bound (of the largest step size), conditional or heuristic.
    """

    name: str
    value: float
    threshold: float
    met: bool
    role: str
    status: str
    source: str


class StabilityReport(NamedTuple):
    eta: float
    batch_size: int
    criteria: tuple[Criterion, ...]
    verdict: str  # stable, unstable or undecided


def stability_report(
    known: Curvatures,
    eta: float,
    batch_size: int,
    momentum: float = 0.0,
    second_moment: float | None = None,
    threshold: float | None = None,
) -> StabilityReport:
    """Every criterion that what is known decides, for SGD with step size `eta` on batches drawn without replacement.

    `second_moment` is lambda_max of `SecondMoment`, `threshold` the exact eta*. Bounds of SGD are of plain SGD: with
    momentum only the sharpness is compared, and Adam's is, where it is known, with beta_1 = momentum. `exact` where the
    batch is all of the data. `non_uniformity` is a condition for Wu's inequality, not for stability: rank-one Hessians
    can stay where it is not met, so that it has no part in the verdict. The verdict is on the linearized dynamics.

    Raises: GradscaleError as `descent_threshold` and `batch_factor`.
    Source: Cohen et al. (2021), arXiv 2103.00065; Wu, Ma and E (2018), NeurIPS; Mulayoff and Michaeli (2023), arXiv
    2306.07850.
    """
    p = batch_factor(known.n, batch_size)
    found = _descent(known, eta, batch_size, momentum)
    if not momentum:
        found += _sgd(known, eta, p, second_moment, threshold)
    return StabilityReport(eta, batch_size, tuple(found), _verdict(found))


def report_of_matrices(matrices: Tensor, eta: float, batch_size: int) -> StabilityReport:
    """Of Hessians [n, d, d] float64, everything computed. Raises: GradscaleError as `threshold_of_matrices`."""
    threshold = threshold_of_matrices(matrices, batch_size)
    sums = matrices.square().sum(dim=(1, 2)).mean(), matrices.mean(dim=0).square().sum()
    traces = float(matrices.mean(dim=0).trace()), float(sums[1]), float(sums[0])
    return _report(dense_hessians(matrices), traces, threshold, eta, batch_size)


def report_of_gram(gram: Tensor, eta: float, batch_size: int) -> StabilityReport:
    """Of rank-one Hessians H_i = j_i j_i^T from the products <j_i, j_k> [n, n] float64, everything computed.

    Gauss-Newton matrices of one output, or one of their sketches' Gram matrix. In the span of the rows, so that what H
    leaves alone has no part in `second_moment`. Raises: GradscaleError as `threshold_of_gram`.
    """
    rows, values = rows_of_gram(gram)
    traces = float(values.sum()), float(values.square().sum()), float(gram.diagonal().square().mean())
    return _report(rank_one_hessians(rows), traces, threshold_of_gram(gram, batch_size), eta, batch_size)


def _report(
    hessians: ExampleHessians, traces: tuple[float, float, float], threshold: Threshold, eta: float, batch_size: int
) -> StabilityReport:
    H, Sigma = MeanHessian(hessians), HessianSpread(hessians)
    top = leading_eigenpair(H)
    there = along(hessians, top.vectors[0])
    known = Curvatures(
        hessians.examples,
        float(top.values[0]),
        there.curvature,
        there.variance,
        non_uniformity(hessians).value,
        *traces,
    )
    moment = leading_eigenpair(SecondMoment(H, Sigma, eta, batch_factor(hessians.examples, batch_size)))
    return stability_report(known, eta, batch_size, 0.0, float(moment.values[0]), threshold.value)


def _descent(known: Curvatures, eta: float, batch_size: int, momentum: float) -> list[Criterion]:
    limit, found = descent_threshold(eta, momentum), []
    role = "exact" if batch_size == known.n else "necessary"
    if known.sharpness is not None:
        name = "sharpness" if not momentum else "sharpness_momentum"
        found.append(_criterion(name, known.sharpness, limit, role, "identity", "arXiv 2103.00065"))
    if known.preconditioned_sharpness is not None:
        limit = descent_threshold(eta, momentum, averaged=True)
        value = known.preconditioned_sharpness
        found.append(_criterion("sharpness_adam", value, limit, "neither", "conditional", "arXiv 2207.14484"))
    return found


def _sgd(
    known: Curvatures, eta: float, p: float, second_moment: float | None, threshold: float | None
) -> list[Criterion]:
    wu, paper, found = "Wu, Ma and E (2018)", "arXiv 2306.07850", []
    if threshold is not None:
        found.append(_criterion("mean_square", eta, threshold, "exact", "identity", f"{paper}, theorem 3"))
    if known.along_curvature is not None and known.along_variance is not None:
        bound = bound_along(known.along_curvature, known.along_variance, p)
        found.append(_criterion("bound_along", eta, bound, "necessary", "upper bound", f"{paper}, (15)"))
    if known.trace is not None and known.frobenius_sq is not None and known.mean_frobenius_sq is not None:
        bound = bound_of_traces(known.trace, known.frobenius_sq, known.mean_frobenius_sq, p)
        found.append(_criterion("bound_of_traces", eta, bound, "necessary", "upper bound", f"{paper}, (16)"))
    if second_moment is not None:
        found.append(_criterion("second_moment", second_moment, 1.0, "sufficient", "conditional", wu))
    if known.non_uniformity is not None:
        limit = 1 / (eta * math.sqrt(p)) if p else math.inf
        found.append(_criterion("non_uniformity", known.non_uniformity, limit, "neither", "conditional", wu))
    return found


def _criterion(name: str, value: float, threshold: float, role: str, status: str, source: str) -> Criterion:
    return Criterion(name, value, threshold, value <= threshold * (1 + _ROUNDING), role, status, source)


def _verdict(criteria: list[Criterion]) -> str:
    if any(not each.met and each.role in ("exact", "necessary") for each in criteria):
        return "unstable"
    return "stable" if any(each.met and each.role in ("exact", "sufficient") for each in criteria) else "undecided"
