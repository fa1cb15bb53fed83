"""The check before anything is computed from an engine's operator: is it symmetric, the same twice, and of its weights?

Shapes: p entries here, k vectors.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from gradscale.curvature.check import SelfTest
from gradscale.curvature.processes import all_summed
from gradscale.errors import GradscaleError
from gradscale.run.engine_calibrate import Weights, global_norm
from gradscale.run.engine_losses import Share
from gradscale.run.engine_order import NamedProbes

_ASYMMETRY = 1e-3  # of random vectors, relative; what rounding and finite differences do is allowed beside it
_SLACK = 0.05
_MOVE = 1e-2  # of the weights, relative
_QUADRATIC = 0.05  # how far the gradient's change may be from the product with the move, relative


class Tested(Protocol):
    """What the test asks of an `EngineHessian`."""

    @property
    def size(self) -> int: ...

    @property
    def error(self) -> float: ...

    @property
    def weights(self) -> Weights: ...

    def probes(self, seed: int = 0, kind: str = "gaussian", dtype: torch.dtype = torch.float32) -> NamedProbes: ...

    def products_of(self, vectors: Tensor, share: Share, shift: Tensor | None) -> Tensor: ...


def engine_self_test(operator: Tested, first: Share, seed: int = 0) -> SelfTest:
    """Tests the operator on the first batches of the ranks, as `self_test` does one of a single process.

    Cost: six products, four of them of two vectors and two at weights that are moved by 1 %, and four gradients.
    A product that does not change with the weights is right for a quadratic loss only.
    Raises: GradscaleError if products are zero, not the same twice, not symmetric, or do not change with the weights.
    """
    vectors = operator.probes(seed, dtype=torch.float64)(range(2))
    slack = min(operator.error, _SLACK)
    made = operator.products_of(vectors, first, None)
    scale = global_norm(made)
    if not scale:
        raise GradscaleError(
            "products with random vectors must not all be zero, got zero; the loss is linear in the weights, or is "
            "not computed with the module that is passed"
        )
    repeat = global_norm(operator.products_of(vectors, first, None) - made) / scale
    if not repeat <= max(1e-5, 4 * slack):
        raise GradscaleError(
            f"the product must be the same twice, got a relative difference of {repeat:.3g}; turn off dropout and "
            "shuffling, and set torch.use_deterministic_algorithms(True)"
        )
    crossed = torch.stack([vectors[0] @ made[1], vectors[1] @ made[0]])
    asymmetry = float(all_summed(crossed).diff().abs()) / scale
    if not asymmetry <= max(_ASYMMETRY, 8 * slack):
        raise GradscaleError(
            f"the operator must be symmetric, got u'Hv and v'Hu a share of {asymmetry:.3g} apart; some operation of "
            "the model has a wrong second derivative, or keeps weights from before they moved"
        )
    return SelfTest(asymmetry, repeat, _change(operator, first, vectors, made, seed))


def _change(operator: Tested, first: Share, vectors: Tensor, made: Tensor, seed: int) -> float:
    weights = operator.weights
    direction = operator.probes(seed, "rademacher", torch.float64)(range(1))[0]
    length = float(all_summed(weights.sq_norm())) ** 0.5 or 1.0
    shift = direction * (_MOVE * length / operator.size**0.5)
    change = global_norm(operator.products_of(vectors, first, shift) - made) / global_norm(made)
    if change > 1e-5:
        return change
    turned = weights.gradient(first, shift) - weights.gradient(first)
    expected = operator.products_of(shift[None], first, None)[0]
    if not global_norm(turned - expected) <= _QUADRATIC * global_norm(turned):
        raise GradscaleError(
            f"the product must change with the weights, got a relative change of {change:.3g} when they move by "
            f"{_MOVE:.0%} while the gradient changes otherwise; compute the losses with the module that is passed"
        )
    return change
