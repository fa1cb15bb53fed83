"""The check before anything is computed from an operator: is it symmetric, the same twice, and of this model?

Shapes: P entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.curvature.backends import FiniteDifferences
from gradscale.curvature.layout import gaussian, rademacher
from gradscale.curvature.operators import CovarianceOperator, CurvatureOperator
from gradscale.curvature.products import add_gradients, move, norm, restored
from gradscale.curvature.stream import Stream
from gradscale.errors import GradscaleError
from gradscale.grads.modes import check_mode

_ASYMMETRY = 1e-3  # of random vectors, relative; what finite differences and rounding do is allowed beside it
_SLACK = 1e-2
_MOVE = 1e-2  # of the weights, relative
_QUADRATIC = 0.05  # how far the gradient's change may be from the product with the move, relative


class SelfTest(NamedTuple):
    """Relative to the norm of a product."""

    asymmetry: float  # of u^T M v and v^T M u
    repeat: float  # of two products with the same vector
    change: float  # of the product when the weights move by 1 %


def self_test(operator: CurvatureOperator | CovarianceOperator, seed: int = 0) -> SelfTest:
    """Tests the operator on its first microbatch; moves the weights and puts them back bit for bit.

    A product that does not change with the weights is right for a quadratic loss only: there the gradient changes by
    the product with the move. Cost: six products of the first microbatch, and two gradients.
    Raises: GradscaleError naming what is wrong: dropout or BatchNorm in training mode, a loss that is not finite, a
    model that is not the same twice, an operator that is not symmetric, or not of the model's weights.
    """
    stream = operator.stream.first
    check_mode(stream.subject.model)
    here, layout = operator.on(stream), stream.layout
    u, v = gaussian(layout, range(layout.size), seed, [0, 1], stream.subject.device).double()
    first = here.products(torch.stack([u, v]))
    again = here.products(torch.stack([u, v]))
    scale = float(norm(first))
    if not scale:
        raise GradscaleError(
            "products with random vectors must not all be zero, got zero; the loss is linear in the measured "
            "parameters, or does not depend on them: measure others"
        )
    slack = _slack(operator)
    repeat = float(norm(again - first)) / scale
    if not repeat <= max(100 * _eps(stream), 4 * slack):
        raise GradscaleError(
            f"the product must be the same twice, got a relative difference of {repeat:.3g}; turn off dropout and what "
            "else is random in the model, and set torch.use_deterministic_algorithms(True)"
        )
    asymmetry = float((u @ first[1] - v @ first[0]).abs()) / scale
    if not asymmetry <= max(_ASYMMETRY, 10 * _eps(stream), 8 * slack) and not _is_rounded(operator):
        raise GradscaleError(
            f"the operator must be symmetric, got u'Mv and v'Mu a share of {asymmetry:.3g} apart; some operation of "
            "the model has a wrong second derivative: take backend finite_differences"
        )
    return SelfTest(asymmetry, repeat, _check_weights(here, torch.stack([u, v]), first, seed))


def _check_weights(here: CurvatureOperator | CovarianceOperator, vectors: Tensor, first: Tensor, seed: int) -> float:
    """How much the products change when the weights move."""
    stream = here.stream
    layout, parameters = stream.layout, stream.parameters
    direction = rademacher(layout, range(layout.size), seed, [0], stream.subject.device)[0]
    before = _gradient(stream)
    with restored(parameters) as kept:
        length = float(norm(layout.flatten(kept))) or 1.0
        move(parameters, kept, layout.unflatten(direction), _MOVE * length / layout.size**0.5)
        moved = here.products(vectors)
        after = _gradient(stream)
        step = layout.flatten([(p.detach() - k).double() for p, k in zip(parameters, kept, strict=True)])
    change = float(norm(moved - first)) / float(norm(first))
    if change > max(100 * _eps(stream), 4 * _slack(here)) or _is_rounded(here):
        return change
    turned = after - before
    expected = here.products(step[None])[0] if not isinstance(here, CovarianceOperator) else turned * 0
    if not float(norm(turned - expected)) <= _QUADRATIC * float(norm(turned)) + 100 * _eps(stream) * float(
        norm(before)
    ):
        raise GradscaleError(
            f"the product must change with the weights, got a relative change of {change:.3g} when they move by "
            f"{_MOVE:.0%} while the gradient changes otherwise; the model computes with other weights than those "
            "measured, or with detached ones"
        )
    return change


def _gradient(stream: Stream) -> Tensor:
    """[P] float64, of the mean loss."""
    layout = stream.layout
    total = torch.zeros(layout.size, dtype=torch.float64, device=stream.subject.device)
    add_gradients(stream, total.split(layout.sizes), 1 / stream.total_weight)
    return total


def _is_rounded(operator: CurvatureOperator | CovarianceOperator) -> bool:
    """Differences of rounded weights are of a symmetric matrix, but of a random vector rounding can be all there is."""
    differences = isinstance(operator, CurvatureOperator) and isinstance(operator.choice.backend, FiniteDifferences)
    return differences and _eps(operator.stream) > 1e-6


def _slack(operator: CurvatureOperator | CovarianceOperator) -> float:
    """What is known of the products' relative error, but no more than 1 %: of a model that is random it is large."""
    return 0.0 if isinstance(operator, CovarianceOperator) else min(operator.choice.error, _SLACK)


def _eps(stream: Stream) -> float:
    return max(torch.finfo(parameter.dtype).eps for parameter in stream.parameters)
