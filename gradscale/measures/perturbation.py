"""The model at weights near its own: moved, read, and put back bit for bit.

Shapes: B examples, N draws, D digits of an exact sum, P entries of one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradscale.errors import GradscaleError
from gradscale.grads.subject import Subject
from gradscale.measures.exact_sum import add_totals, total_of, value_of, zero_total
from gradscale.sketches.dimensions import check_dim
from gradscale.sketches.gaussian import GaussianProbes
from gradscale.task import Batch

_TOGETHER = 4  # draws: a call of Philox gives four numbers

Change = Callable[[str, nn.Parameter], Tensor]  # what is added to a parameter, of its shape and dtype


@dataclass(frozen=True)
class GaussianNoise:
    """N draws of xi ~ N(0, sigma^2 I) over the measured parameters, keyed by (seed, parameter, position, draw).

    The same for every example, shard and machine. With `adaptive`, every entry is scaled by that of |w|.
    """

    num_draws: int
    sigma: float
    seed: int
    adaptive: bool = False

    def __post_init__(self) -> None:
        check_dim("num_draws", self.num_draws)
        if not 0 < self.sigma < math.inf:
            raise GradscaleError(f"sigma must be a positive number, got {self.sigma}; 0.01 is the default")

    def of(self, draw: int) -> Change:
        def change(name: str, parameter: nn.Parameter) -> Tensor:
            first = draw - draw % _TOGETHER
            normals = GaussianProbes(self.num_draws, self.seed).columns(
                f"perturbation/{name}", first, first + _TOGETHER, parameter.numel(), parameter.device
            )
            noise = self.sigma * normals[:, draw - first].reshape(parameter.shape).to(parameter.dtype)
            return noise * parameter.detach().abs() if self.adaptive else noise

        return change


@contextmanager
def moved(parameters: Mapping[str, nn.Parameter], change: Change) -> Iterator[None]:
    """While it lasts, the parameters are w + change; then w again, bit for bit, whatever happens. Memory: P numbers."""
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(change(name, parameter))
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])


def losses_at(subject: Subject, batch: Batch) -> Tensor:
    """[B] float64, without a graph."""
    with torch.no_grad():
        losses: Tensor = subject.task.losses(subject.model, batch)
    return losses.double()


class DrawMeans(NamedTuple):
    """Exact sums over examples of a number d_ij for every draw j that all examples share, and of (mean_j d_ij)^2."""

    totals: Tensor  # [N + 1, D] int64, see `exact_sum`
    examples: Tensor  # [] int64


def no_draws(num_draws: int) -> DrawMeans:
    return DrawMeans(zero_total(num_draws + 1), torch.tensor(0))


def draws_of(values: Tensor) -> DrawMeans:
    """Of [B, N] values; examples with one that is not finite are left out."""
    kept = values[values.isfinite().all(dim=1)].cpu().double()
    if not len(kept):
        return no_draws(values.shape[1])
    return DrawMeans(
        total_of(torch.cat([kept, kept.mean(dim=1, keepdim=True).square()], dim=1)), torch.tensor(len(kept))
    )


def add_draws(left: DrawMeans, right: DrawMeans) -> DrawMeans:
    return DrawMeans(add_totals(left.totals, right.totals), left.examples + right.examples)


def mean_of_draws(state: DrawMeans) -> tuple[float, float]:
    """The mean over examples and draws; its standard error, s_draws^2 / N + s_examples^2 / n under the root.

    It speaks of both as samples: the noise that is each pair's own is in both terms, which makes it a little too large.
    NaN for a single draw or example.
    """
    n = int(state.examples)
    if not n:
        return math.nan, math.nan
    sums = value_of(state.totals)
    by_draw, squares = sums[:-1] / n, float(sums[-1])
    value = float(by_draw.mean())
    if n < 2 or len(by_draw) < 2:
        return value, math.nan
    over_examples = max(0.0, squares - n * value * value) / (n - 1) / n
    return value, math.sqrt(float(by_draw.var()) / len(by_draw) + over_examples)
