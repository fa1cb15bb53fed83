"""The model at weights near its own: moved, read, and put back bit for bit; and means of what is read there.

Shapes: B examples, N draws, D digits of an exact sum, P entries of one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradscale.errors import GradscaleError
from gradscale.grads.subject import Subject
from gradscale.measures.exact_sum import add_totals, total_of, value_of, zero_total
from gradscale.measures.probe_means import error_of_mean
from gradscale.sketches.dimensions import check_dim
from gradscale.sketches.gaussian import TOGETHER, GaussianProbes
from gradscale.task import Batch

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
            first = draw - draw % TOGETHER
            normals = GaussianProbes(self.num_draws, self.seed).columns(
                f"perturbation/{name}", first, first + TOGETHER, parameter.numel(), parameter.device
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
    over_draws = math.sqrt(float(by_draw.var()) / len(by_draw))
    return value, math.hypot(over_draws, error_of_mean(n * value, squares, n))


def gradient_of(subject: Subject, batch: Batch, keep: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss, [] float64, of the examples for which `keep` [B] holds, and its gradient by parameter."""
    with torch.enable_grad():
        loss = subject.task.losses(subject.model, batch)[keep].mean()
        found = torch.autograd.grad(loss, list(subject.parameters.values()), allow_unused=True, materialize_grads=True)
    return loss.detach().double(), dict(zip(subject.parameters, found, strict=True))


def norm_of(parts: Iterable[Tensor]) -> float:
    """Of the parts as one vector, in float64."""
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))


class BatchMeans(NamedTuple):
    """Exact sums of a number d of every microbatch and of d^2, by the number of its examples, which d depends on."""

    batches: Mapping[str, Tensor]  # [] int64
    totals: Mapping[str, Tensor]  # [2, D], see `exact_sum`


class BatchMean(NamedTuple):
    """Over the `batches` microbatches of `size` examples, the largest that there is."""

    value: float
    stderr: float  # over batches; NaN of one
    batches: int
    size: int


def no_batches() -> BatchMeans:
    return BatchMeans({}, {})


def batch_of(d: Tensor, size: int) -> BatchMeans:
    """Of one microbatch, left out if its d [] is not finite."""
    value = d.detach().double().cpu()
    if not bool(value.isfinite()):
        return no_batches()
    key = f"{size:06d}"
    return BatchMeans({key: torch.tensor(1)}, {key: total_of(torch.stack([value, value.square()])[None])})


def add_batches(left: BatchMeans, right: BatchMeans) -> BatchMeans:
    batches, totals = {**left.batches}, {**left.totals}
    for size, count in right.batches.items():
        there = size in batches
        batches[size] = batches[size] + count if there else count
        totals[size] = add_totals(totals[size], right.totals[size]) if there else right.totals[size]
    return BatchMeans(batches, totals)


def mean_of_batches(state: BatchMeans) -> BatchMean:
    if not state.batches:
        return BatchMean(math.nan, math.nan, 0, 0)
    size = max(state.batches)
    count = int(state.batches[size])
    total, squares = value_of(state.totals[size]).tolist()
    return BatchMean(total / count, error_of_mean(total, squares, count), count, int(size))
