"""Hessian, Gauss-Newton and gradient covariance of a model over a stream of examples, as operators in one process.

Each is a mean over the stream's examples: sums over microbatches are added up in float64 and divided once, whatever
type the vectors have, so that the same stream gives the same bits. `sums` is that sum, for processes that share the
data to add up among them.

Shapes: n examples, P entries, k vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.curvature.backends import Choice, choose_gauss_newton, choose_hessian
from gradscale.curvature.gradient_covariance import add_weighted_sums, inner_products, not_finite
from gradscale.curvature.stream import Stream
from gradscale.errors import GradscaleError

_TOGETHER = 8  # vectors that share a graph, and are held in float64


@dataclass(frozen=True, eq=False)
class CurvatureOperator:
    """v -> (1 / sum w) sum_i w_i M_i v, the M_i being what the chosen way multiplies with.

    Made by `hessian`, H_i of example i's loss, or by `gauss_newton`, J_i^T Lambda_i J_i, see `gauss_newton.py`. Status:
    identity for an exact way, up to `choice.error`; estimator for finite differences.
    """

    stream: Stream
    choice: Choice

    @property
    def size(self) -> int:
        return self.stream.layout.size

    @property
    def here(self) -> range:
        return range(self.size)

    def products(self, vectors: Tensor) -> Tensor:
        _check_vectors(vectors, self.size)
        return _by_eight(vectors, lambda part: self.sums(part).div_(self.stream.total_weight))

    def sums(self, vectors: Tensor) -> Tensor:
        """[k, P] float64: sum_i w_i M_i v."""
        _check_vectors(vectors, self.size)
        total = _zeros(vectors)
        self.choice.backend.add(self.stream, vectors, total)
        if not bool(torch.stack(total.aminmax()).isfinite().all()):
            raise _why_not_finite(self.stream)
        return total

    def all_sum(self, parts: Tensor) -> Tensor:
        return parts

    def on(self, stream: Stream) -> CurvatureOperator:
        """The same way over other examples of the model."""
        return replace(self, stream=stream)


@dataclass(frozen=True, eq=False)
class CovarianceOperator:
    """v -> (1 / (n - 1)) sum_i (g_i - g) <g_i - g, v>, g the mean of the examples' gradients g_i.

    With `centred=False`, the second moment (1 / n) sum_i g_i <g_i, v>: the empirical Fisher matrix. Inner products of k
    vectors come from one pass over the per-example gradients, sums weighted by them from a second. Status: identity.
    Cost: a forward pass and 1 + k backward passes beside it, k at most 8 at a time.
    Raises: GradscaleError if the examples are weighted, or a single one is to be centred.
    """

    stream: Stream
    centred: bool = True

    def __post_init__(self) -> None:
        if self.stream.weights is not None:
            raise GradscaleError("weights must be None for the covariance of gradients, got some; leave them out")
        if self.centred and len(self.stream.ids) < 2:
            raise GradscaleError("examples must be two or more for a covariance, got 1; take more, or centred=False")

    @property
    def size(self) -> int:
        return self.stream.layout.size

    @property
    def here(self) -> range:
        return range(self.size)

    def products(self, vectors: Tensor) -> Tensor:
        _check_vectors(vectors, self.size)
        n = len(self.stream.ids)
        return _by_eight(vectors, lambda part: self._sums(part).div_(n - 1 if self.centred else n))

    def _sums(self, vectors: Tensor) -> Tensor:
        weights = inner_products(self.stream, vectors)
        if self.centred:
            weights = weights - weights.mean(dim=0)  # sum_i c_i = 0, so that sum c_i g_i is sum c_i (g_i - g)
        total = _zeros(vectors)
        add_weighted_sums(self.stream, weights, total)
        return total

    def all_sum(self, parts: Tensor) -> Tensor:
        return parts

    def on(self, stream: Stream) -> CovarianceOperator:
        return replace(self, stream=stream)


def hessian(stream: Stream, backend: str = "auto", quantity: str = "vector", seed: int = 0) -> CurvatureOperator:
    """The Hessian by the way that `choose_hessian` settles on.

    Raises: GradscaleError as `choose_hessian`.
    """
    return CurvatureOperator(stream, choose_hessian(stream, backend, quantity, seed))


def gauss_newton(stream: Stream, seed: int = 0) -> CurvatureOperator:
    """The generalized Gauss-Newton matrix, positive semidefinite where the losses are convex in the outputs.

    Raises: GradscaleError as `choose_gauss_newton`.
    Source: Schraudolph (2002), "Fast curvature matrix-vector products for second-order gradient descent".
    """
    return CurvatureOperator(stream, choose_gauss_newton(stream, seed))


class ExampleProducts(NamedTuple):
    """Of every example i and vector v."""

    quadratics: Tensor  # [n, k] float64: v^T H_i v
    sq_norms: Tensor  # [n, k] float64: |H_i v|^2


def example_products(operator: CurvatureOperator, vectors: Tensor) -> ExampleProducts:
    """One example after another: n products of a batch of one, for small problems and few vectors.

    Not weighted: H_i is that of example i's own loss.
    """
    stream, rows = replace(operator.stream, weights=None), []
    for i in stream.ids:
        found = operator.on(replace(stream, ids=range(i, i + 1))).sums(vectors)
        rows.append(((found * vectors).sum(dim=1), found.square().sum(dim=1)))
    quadratics, sq_norms = zip(*rows, strict=True)
    return ExampleProducts(torch.stack(quadratics), torch.stack(sq_norms))


def _by_eight(vectors: Tensor, products: Callable[[Tensor], Tensor]) -> Tensor:
    found = torch.empty_like(vectors)
    for part, result in zip(vectors.split(_TOGETHER), found.split(_TOGETHER), strict=True):
        result.copy_(products(part))
    return found


def _zeros(vectors: Tensor) -> Tensor:
    return torch.zeros(vectors.shape, dtype=torch.float64, device=vectors.device)


def _check_vectors(vectors: Tensor, size: int) -> None:
    if vectors.dim() != 2 or vectors.shape[1] != size or vectors.dtype not in (torch.float32, torch.float64):
        raise GradscaleError(
            f"vectors must be float32 or float64 of shape (k, {size}), got {vectors.dtype} of shape "
            f"{tuple(vectors.shape)}; one row is one vector, as `Layout.flatten` gives it"
        )


def _why_not_finite(stream: Stream) -> GradscaleError:
    """Names the first example whose loss is not finite, else the first one."""
    with torch.no_grad():
        for microbatch in stream:
            finite = stream.subject.task.losses(stream.subject.model, microbatch.batch).isfinite()
            if not bool(finite.all()):
                return not_finite(microbatch.ids[int((~finite).nonzero()[0])], "loss")
    return GradscaleError(
        "products must be finite, got infinities or NaN from losses that are finite; measure in float32 or float64, or "
        "scale the vectors down"
    )
