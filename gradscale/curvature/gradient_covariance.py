"""Products of the covariance of per-example gradients: inner products with all, then sums weighted by them.

Shapes: B examples of a microbatch, n of all, P entries, k vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradscale.curvature.layout import Layout
from gradscale.curvature.products import own_gradients
from gradscale.curvature.stream import Stream
from gradscale.errors import GradscaleError
from gradscale.grads.layer import LayerGrads
from gradscale.grads.readings import Projected
from gradscale.grads.subject import read_batch
from gradscale.sketches.blocks import apply_rows


@dataclass(frozen=True, eq=False)
class Vectors:
    """The linear map g -> (<g, v_1>, ..., <g, v_k>) of the rows of `vectors` [k, P]: a `DenseMap`."""

    layout: Layout
    vectors: Tensor

    @property
    def dim(self) -> int:
        return len(self.vectors)

    def rows(self, parameter: str, start: int, stop: int, device: torch.device) -> Tensor:
        offset = self.layout.offsets[self.layout.names.index(parameter)]
        return self.vectors[:, offset + start : offset + stop].mT.to(device)

    def apply(self, parameter: str, grads: LayerGrads) -> Tensor:
        return apply_rows(self, parameter, grads)


def inner_products(stream: Stream, vectors: Tensor) -> Tensor:
    """[n, k] float64: <g_i, v_j>. Cost: a forward and backward pass and P k products an example.

    Raises: GradscaleError naming the first example whose loss or gradient is not finite.
    """
    asked, parts = Projected(Vectors(stream.layout, vectors)), []
    for microbatch in stream:
        readings = read_batch(stream.subject, microbatch.batch, frozenset({asked}))
        if not bool(readings.finite.all()):
            raise not_finite(microbatch.ids[int((~readings.finite).nonzero()[0])], "gradient")
        parts.append(readings.projections[asked])
    return torch.cat(parts)


def add_weighted_sums(stream: Stream, weights: Tensor, total: Tensor) -> None:
    """Add sum_i c_ij g_i to row j of `total` [k, P] float64, for `weights` c [n, k].

    Cost: a forward pass and k backward passes.
    """
    rows, start = [row.split(stream.layout.sizes) for row in total], stream.ids.start
    model = stream.subject.model
    with own_gradients(model), torch.enable_grad():
        for microbatch in stream:
            losses = stream.subject.task.losses(model, microbatch.batch)
            own = weights[microbatch.ids.start - start : microbatch.ids.stop - start].to(losses.dtype)
            for j, parts in enumerate(rows):
                losses.backward(own[:, j], retain_graph=j + 1 < len(rows))
                for part, parameter in zip(parts, stream.parameters, strict=True):
                    if parameter.grad is not None:
                        part.add_(parameter.grad.to_dense().reshape(-1))
                model.zero_grad(set_to_none=True)


def not_finite(example: int, what: str) -> GradscaleError:
    return GradscaleError(
        f"the loss and its derivatives must be finite for every example, got a {what} that is not for example "
        f"{example}; take it out of the data, or measure in float32"
    )
