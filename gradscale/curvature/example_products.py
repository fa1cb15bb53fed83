"""What the matrices M_i of single examples are along given vectors: v^T M_i v of all of them, |M_i v|^2 of a sample.

A quadratic form of every example costs a few forward passes of a microbatch, a vector M_i v a product for each example.
M_i is the Hessian or Gauss-Newton matrix of example i's own loss, whatever the weights of the stream, or what the
example adds to the covariance of gradients.

Shapes: B examples of a microbatch, n of all, m of a sample, P entries, k vectors, N probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.curvature.backends import GAUSS_NEWTON
from gradscale.curvature.layout import rademacher
from gradscale.curvature.operators import CovarianceOperator, CurvatureOperator
from gradscale.curvature.quadratic_forms import (
    WAYS,
    calibrated_differences,
    forward_jacobian,
    nested_forward,
    squared_slopes,
    transposed_jacobian,
    triple_backward,
)
from gradscale.curvature.stream import Stream
from gradscale.errors import GradscaleError
from gradscale.sketches.philox import key_of
from gradscale.sketches.words import words

_VERSION = 1
_WRONG = 1e-3  # relative, beside rounding and what is known of the products that are the reference

Forms = Callable[[Stream, Tensor], Tensor]  # [n, k] float64 of unit vectors [k, P]


class ExampleQuadratics(NamedTuple):
    """v^T M_i v of every example and vector, and how it was got."""

    values: Tensor  # [n, k] float64
    way: str
    error: float  # relative to the root of the sum of squares over a microbatch, estimated
    refused: Mapping[str, str]  # the ways tried before it, and why each does not serve


def example_quadratics(
    operator: CurvatureOperator | CovarianceOperator,
    vectors: Tensor,
    way: str = "auto",
    seed: int = 0,
) -> ExampleQuadratics:
    """q_i = v^T M_i v for every example of the stream and row v of `vectors` [k, P], which are whole, not slices.

    `way` is one of `WAYS`; "auto" takes the first that passes a test on the first microbatch and these vectors: the sum
    of the q_i with random weights against v^T M v of the operator, weighted alike. So a wrong second derivative of some
    operation is not taken over. For a Gauss-Newton operator the way is that of the operator, q_i = t^T Lambda_i t with
    t = J_i v; of a covariance, <g_i - g, v>^2 n / (n - 1), or <g_i, v>^2 not centred, g the mean of this stream.

    Status: identity, up to `error`; for forward differences an estimator.
    Cost: for each vector and microbatch, in forward passes F, as measured on a GPT-2 of 3 million weights: 9 F nested
    forward, 12 F triple backward with twice the memory of a product, 5 F forward differences, 7 F a product, which
    one by one takes 27 F.
    Raises: GradscaleError if `way` is not one of these, or does not serve; as `products`, of vectors and losses.
    """
    if isinstance(operator, CovarianceOperator):
        return ExampleQuadratics(squared_slopes(operator, vectors), "inner_products", 0.0, {})
    if way not in ("auto", *WAYS):
        raise GradscaleError(f"way must be auto or one of {', '.join(WAYS)}, got {way!r}")
    here = operator.on(replace(operator.stream, weights=None))
    reference = _Reference.of(here, vectors, seed)
    refused: dict[str, str] = {}
    for name in _candidates(here, way):
        try:
            forms, error = _prepared(here, name, reference.units)
            error = max(error, reference.error(forms(here.stream.first, reference.units)))
        except (RuntimeError, NotImplementedError) as problem:  # torch's; a GradscaleError is neither
            refused[name] = f"{problem}".strip().splitlines()[0][:200]
            continue
        if error <= reference.tolerance or name == "one_by_one":
            values = forms(here.stream, reference.units) * reference.lengths.square()
            return ExampleQuadratics(_finite(values, here.stream), name, error, refused)
        refused[name] = f"its sum is a share of {error:.3g} off the product of the operator"
    raise GradscaleError(
        "quadratic forms of examples must be possible in one of the ways tried, got "
        + "; ".join(f"{name}: {why}" for name, why in refused.items())
        + "; take way auto"
    )


class SampledProducts(NamedTuple):
    """Of a sample of examples, in the order of their ids."""

    ids: tuple[int, ...]
    along: Tensor  # [m, k] float64: |M_i v|^2
    squares: Tensor  # [m, N] float64: |M_i u|^2 of N probes that each example has of its own, E = |M_i|_F^2


def sampled_ids(population: range, count: int, seed: int = 0) -> tuple[int, ...]:
    """`count` of the ids, without replacement, ascending: those with the smallest random words.

    They depend on the ids and the seed alone, so that processes with shares of the population agree on the sample.
    Raises: GradscaleError unless `count` is from 1 to the number of ids.
    """
    if not 1 <= count <= len(population):
        raise GradscaleError(
            f"a sample must be of 1 to {len(population)} examples, got {count}; 64 with 2 probes are usual"
        )
    key = key_of("sampled products", _VERSION, seed)
    drawn = words(key, population.start, population.stop, torch.device("cpu"))
    order = torch.argsort(drawn, stable=True)[:count]
    return tuple(sorted(population[i] for i in order.tolist()))


def sampled_products(
    operator: CurvatureOperator,
    ids: Sequence[int],
    vectors: Tensor | None = None,
    probes: int = 2,
    seed: int = 0,
) -> SampledProducts:
    """|M_i v|^2 for the rows of `vectors` [k, P], and of `probes` vectors of random signs, keyed by seed and example.

    Exact for each example and vector. Cost: m products of a single example with k + N vectors, which share its graph;
    2 (k + N) P numbers. With 2 probes the part of the error that is the probes' can be told from the examples'.
    Raises: GradscaleError if `probes` is negative, or an id is not of the stream; as `products`.
    """
    stream = replace(operator.stream, weights=None)
    outside = [i for i in ids if i not in stream.ids]
    if outside or probes < 0:
        raise GradscaleError(
            f"sampled examples must be of {stream.ids} with at least 0 probes, got {outside[:3]} and {probes}; pass "
            "this process's share of the sample"
        )
    layout, device = stream.layout, stream.subject.device
    given = torch.zeros(0, layout.size, device=device) if vectors is None else vectors
    rows = torch.zeros(len(ids), len(given) + probes, dtype=torch.float64, device=device)
    for row, i in zip(rows, ids, strict=True):
        own = rademacher(layout, range(layout.size), seed, range(i * probes, (i + 1) * probes), device)
        alone = operator.on(replace(stream, ids=range(i, i + 1)))
        row.copy_(alone.sums(torch.cat([given, own.to(given)])).square().sum(dim=1))
    return SampledProducts(tuple(ids), rows[:, : len(given)], rows[:, len(given) :])


class _Reference(NamedTuple):
    """What the forms of the first microbatch must add up to."""

    units: Tensor  # [k, P], of length 1 (or 0)
    lengths: Tensor  # [k] float64
    weights: Tensor  # [B] float64
    sums: Tensor  # [k] float64
    tolerance: float

    @classmethod
    def of(cls, operator: CurvatureOperator, vectors: Tensor, seed: int) -> _Reference:
        stream = operator.stream.first
        drawn = words(key_of("quadratics", _VERSION, seed), 0, len(stream.ids), torch.device("cpu"))
        weights = 0.5 + drawn.double() / 2**32
        lengths = vectors.double().norm(dim=-1)
        units = vectors / torch.where(lengths > 0, lengths, 1.0).to(vectors)[..., None]
        found = operator.on(replace(stream, weights=weights)).sums(units)
        rounding = max(torch.finfo(parameter.dtype).eps for parameter in stream.parameters)
        tolerance = max(_WRONG, 10 * rounding, 8 * min(operator.choice.error, 1e-2))
        return cls(units, lengths, weights.to(found.device), (found * units).sum(dim=1), tolerance)

    def error(self, forms: Tensor) -> float:
        """The largest of the vectors'; infinite where a form is not finite."""
        weighted = self.weights[:, None] * forms
        apart, scale = (weighted.sum(dim=0) - self.sums).abs(), weighted.norm(dim=0)
        share = torch.where(apart > 0, apart / scale, 0.0).max()
        return float(share) if bool(share.isfinite()) else math.inf


def _candidates(operator: CurvatureOperator, way: str) -> tuple[str, ...]:
    if way != "auto":
        return (way,)
    return WAYS if not _is_gauss_newton(operator) else (operator.choice.backend.name, "one_by_one")


def _is_gauss_newton(operator: CurvatureOperator) -> bool:
    return operator.choice.backend in GAUSS_NEWTON


def _prepared(operator: CurvatureOperator, name: str, units: Tensor) -> tuple[Forms, float]:
    """The way of this name, and what is known of its error."""
    if name == "one_by_one":
        return lambda stream, vectors: _one_by_one(operator.on(stream), vectors), 0.0
    if _is_gauss_newton(operator):
        ways: dict[str, Forms] = {"forward_jacobian": forward_jacobian, "backward_jacobian": transposed_jacobian}
    else:
        ways = {"nested_forward": nested_forward, "triple_backward": triple_backward}
    if name in ways:
        return ways[name], 0.0
    if name != "forward_differences" or _is_gauss_newton(operator):
        raise NotImplementedError("it is no way for this operator")
    return calibrated_differences(operator.stream.first, units)


def _one_by_one(operator: CurvatureOperator, units: Tensor) -> Tensor:
    stream, rows = operator.stream, []
    for i in stream.ids:
        found = operator.on(replace(stream, ids=range(i, i + 1))).sums(units)
        rows.append((found * units).sum(dim=1))
    return torch.stack(rows)


def _finite(values: Tensor, stream: Stream) -> Tensor:
    wrong = ~values.isfinite().all(dim=1)
    if bool(wrong.any()):
        raise GradscaleError(
            f"quadratic forms must be finite, got one that is not for example {stream.ids[int(wrong.nonzero()[0])]}; "
            "take it out of the data, or measure in float32"
        )
    return values
