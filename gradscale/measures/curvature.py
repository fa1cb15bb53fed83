"""Trace and Frobenius norm of the Hessian of the mean loss, and the mean length of what it makes of a Gaussian.

Shapes: n examples, N probes, J jackknife blocks, P entries of all parameters, D digits of an exact sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.measures.exact_sum import add_totals, value_of
from gradscale.measures.gaussian_width import mean_and_error
from gradscale.measures.grouped import SEPARATOR, added
from gradscale.measures.hessian_probes import HALVES, KINDS, HessianProbes, HessianState
from gradscale.measures.jackknife import jackknife_errors
from gradscale.measures.measure import Estimate, Estimates, Gathering, MicroBatch
from gradscale.sketches.dimensions import check_dim

NAME = "curvature"
UNIT = "loss units / parameter unit^2"
SQUARED = "(loss units / parameter unit^2)^2"


class CurvatureState(NamedTuple):
    """A commutative monoid: a `HessianState` for every jackknife block, its products those of all blocks together."""

    totals: Mapping[str, Tensor]  # `block|parameter`: [N, D], see `exact_sum`, of sum_i (v_j)_l^T (H_i v_j)_l
    counts: Mapping[str, Tensor]  # `block`: [2] int64, examples of even and of odd id
    products: Mapping[str, Tensor]  # `half|probe|parameter`: [P] float64, sum_i (H_i v_j)_l


@dataclass(frozen=True)
class Curvature:
    """Of H = (1/n) sum_i H_i, the Hessian of the mean loss: `trace` tr H by Hutchinson's estimator, E v^T H v = tr H.

    v are N probes of independent signs (or Gaussian) over the measured parameters, shared by all examples. The variance
    of a probe is 2 (|H|_F^2 - sum_p H_pp^2), or 2 |H|_F^2. `trace` is for examples and probes as samples: its standard
    error is that of both, delete-one-block jackknife over examples and probes' spread, what each pair has of its own
    counted once (two-way analysis of variance). `trace_sample` is the same value for the n examples measured, its
    standard error over probes (NaN for N = 1). Both of a single parameter l, too: v_l^T (H v)_l, whose mean is tr H_ll,
    with the noise of H's other blocks in it; these add up to that of all.

    With `frobenius`, from the products H_A v and H_B v of two halves of the data (even and odd ids):

        frobenius_sq      |H|_F^2 = E <H_A v, H_B v>: without bias for the population's H, may be negative
        frobenius         its root, with the error to first order; NaN where it is not positive
        frobenius_sample  |H|_F of the examples measured: for the population's biased up, by the noise of H v
        ellipsoid         E |H g|, g ~ N(0, I), mean over probes of the root of <H_A g, H_B g>, where that is positive:
                          for the population, biased low to second order in the noise of these products
        ellipsoid_sample  the same of the examples measured, mean |H g|: for the population's biased up

    so that the population's lies, but for the probes' noise, between `ellipsoid` and `ellipsoid_sample`; the latter
    two only with Gaussian probes. R E |H g| is the Gaussian width of {g + H x, |x| <= R}, the gradients in a ball of
    radius R to first order, and sqrt(2/pi) |H|_F <= E |H g| <= |H|_F. Their standard errors are over probes and do not
    hold the noise of the data.

    Second derivatives are exact, by differentiating the gradient's graph once more, which the probes share. Examples
    with a product that is not finite are left out. No bit of a trace depends on how the examples were cut into shards
    of whole microbatches; its error depends on the blocks.

    Cost: 1 forward, 1 + N backward passes, the N of two to three times the length; the memory of the gradient's graph.
    With `frobenius` 2 N P numbers of state a shard.
    Source: Hutchinson (1990), Commun. Stat. Simul. Comput. 19; Pearlmutter (1994), Neural Computation 6 (products);
    the halves and E |H g| are derived here.
    """

    num_probes: int = 8
    probes: str = "rademacher"
    frobenius: bool = False
    seed: int = 0

    name = NAME
    summary = (
        "tr H of the mean loss by probes v'Hv, |H|_F and E|Hg| with frobenius; 1 + N backward passes, N of them long; "
        "Hutchinson (1990), Pearlmutter (1994)"
    )

    def __post_init__(self) -> None:
        check_dim("num_probes", self.num_probes)
        if self.probes not in KINDS:
            raise GradscaleError(
                f"probes must be one of {', '.join(KINDS)}, got {self.probes!r}; rademacher has less noise"
            )

    @property
    def needs(self) -> frozenset[Gathering[HessianState]]:
        return frozenset({self.gathering})

    @property
    def gathering(self) -> HessianProbes:
        return HessianProbes(self.num_probes, self.probes, self.seed, self.frobenius)

    def init(self) -> CurvatureState:
        return CurvatureState({}, {}, {})

    def update(self, state: CurvatureState, batch: MicroBatch) -> CurvatureState:
        found: HessianState = batch.gathered[self.gathering]
        if not bool(found.counts.any()):
            return state
        key = f"{batch.block:04d}"
        totals = {f"{key}{SEPARATOR}{name}": total for name, total in found.totals.items()}
        return self.merge(state, CurvatureState(totals, {key: found.counts}, found.products))

    def merge(self, left: CurvatureState, right: CurvatureState) -> CurvatureState:
        totals = dict(left.totals)
        for key, total in right.totals.items():
            totals[key] = add_totals(totals[key], total) if key in totals else total
        return CurvatureState(totals, added(left.counts, right.counts), added(left.products, right.products))

    def compute(self, state: CurvatureState) -> Estimates:
        blocks = sorted(state.counts)
        counts = torch.tensor([int(state.counts[block].sum()) for block in blocks], dtype=torch.float64)
        layers = sorted({key.split(SEPARATOR, 1)[1] for key in state.totals})
        found: dict[tuple[str, str], Estimate] = {}
        for scope, names in {"all": layers, **{f"layer:{name}": [name] for name in layers}}.items():
            sums = [_total(state, block, names) for block in blocks]
            value, over_both, over_probes = trace_of(sums, counts)
            for name, error in (("trace", over_both), ("trace_sample", over_probes)):
                definition = f"{NAME}/{name}/hessian/{self.probes}/v1"
                found[name, scope] = Estimate(value, error, int(counts.sum()), "estimator", definition, UNIT)
        return {**found, **self._lengths(state)} if self.frobenius else found

    def _lengths(self, state: CurvatureState) -> Estimates:
        """What is made of the products of the halves, of all parameters together."""
        counts = sum(state.counts.values(), torch.zeros(HALVES, dtype=torch.int64)).double()
        products = half_products(state, self.num_probes)
        whole = products.sum(dim=(1, 2)) / counts.sum() ** 2  # [N] |H v|^2
        between = products[:, 0, 1] / counts.prod()  # [N] <H_A v, H_B v>
        square, error = mean_and_error(between)
        rows = {
            "frobenius_sq": (square, error, SQUARED),
            "frobenius": (*root_and_error(square, error), UNIT),
            "frobenius_sample": (*root_and_error(*mean_and_error(whole)), UNIT),
        }
        if self.probes == "gaussian":
            rows["ellipsoid"] = (*mean_and_error(between.clamp(min=0).sqrt()), UNIT)
            rows["ellipsoid_sample"] = (*mean_and_error(whole.sqrt()), UNIT)
        return {
            (name, "all"): Estimate(
                value, stderr, int(counts.sum()), "estimator", f"{NAME}/{name}/hessian/{self.probes}/v1", unit
            )
            for name, (value, stderr, unit) in rows.items()
        }


class Traced(NamedTuple):
    value: float
    over_both: float  # standard error for examples and probes as samples; NaN of one block or one probe
    over_probes: float  # for the examples measured; NaN of one probe


def trace_of(sums: Sequence[Tensor], counts: Tensor) -> Traced:
    """From every block's exact sums [N, D] of sum_i v_j^T H_i v_j, and its number of examples [J].

    With A the variance over probes of their means over examples, by N; B the jackknife's of the mean over probes; C the
    mean over probes of the jackknife's variance of each: (C - B) / (N - 1) is the part of A and of B that is neither
    the examples' nor the probes' alone, and A + B less that is the variance of the mean.
    Source: Searle, Casella and McCulloch (1992), "Variance components", on crossed two-way layouts.
    """
    n = counts.sum()
    if not len(counts):
        return Traced(math.nan, math.nan, math.nan)
    by_probe = value_of(reduce(add_totals, sums))
    value = float(by_probe.mean() / n)
    N = len(by_probe)
    if N < 2:
        return Traced(value, math.nan, math.nan)
    over_probes = float(by_probe.var()) / N / float(n) ** 2
    by_block = torch.stack([value_of(total) for total in sums])  # [J, N]
    rest, taken = by_probe - by_block, counts[:, None].expand(-1, N + 1)
    left_out = torch.cat([rest, rest.mean(dim=1, keepdim=True)], dim=1) / (n - taken)
    full = torch.cat([by_probe, by_probe.mean(dim=0, keepdim=True)]) / n
    squares = jackknife_errors(full, [(left_out, taken)], n.expand(N + 1)).square()
    mean, each = float(squares[-1]), float(squares[:-1].mean())
    shared = min(max((each - mean) / (N - 1), 0.0), mean, over_probes) if math.isfinite(mean) else math.nan
    return Traced(value, math.sqrt(over_probes + mean - shared), math.sqrt(over_probes))


def half_products(state: CurvatureState, num_probes: int) -> Tensor:
    """[N, 2, 2] float64: the products of the sums of H_i v_j over the examples of even and of odd id."""
    found = torch.zeros(num_probes, HALVES, HALVES, dtype=torch.float64)
    tails = sorted({key.split(SEPARATOR, 1)[1] for key in state.products})
    for tail in tails:
        parts = [state.products.get(f"{half}{SEPARATOR}{tail}") for half in range(HALVES)]
        there = next(part for part in parts if part is not None)
        both = torch.stack([torch.zeros_like(there) if part is None else part for part in parts])
        found[int(tail.split(SEPARATOR)[0])] += both @ both.mT
    return found


def _total(state: CurvatureState, block: str, names: Sequence[str]) -> Tensor:
    return reduce(add_totals, [state.totals[f"{block}{SEPARATOR}{name}"] for name in names])


def root_and_error(square: float, error: float) -> tuple[float, float]:
    """sqrt and its error to first order; NaN where there is none."""
    return (math.sqrt(square), error / (2 * math.sqrt(square))) if square > 0 else (math.nan, math.nan)
