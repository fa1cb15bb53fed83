"""Operators of a gang: every process has a share of the examples, and a slice of every vector.

Shapes: n examples of all processes, P entries in all, p of them here, k vectors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from gradscale.curvature.backends import Choice
from gradscale.curvature.gradient_covariance import add_weighted_sums, inner_products
from gradscale.curvature.operator import Operator
from gradscale.curvature.operators import CurvatureOperator
from gradscale.curvature.processes import Sharded, all_summed, gathered, reduce_scattered, slice_of
from gradscale.curvature.stream import Stream
from gradscale.errors import GradscaleError

OPERATORS = ("hessian", "ggn", "covariance")
_TOGETHER = 8  # vectors gathered at a time


def share_of(stream: Stream, rank: int, world: int) -> Stream | None:
    """The microbatches of process `rank` of `world`: consecutive ones, as many for each; None if there are none left.

    Microbatches are those of the whole stream, so that the same are computed however many processes there are.
    """
    count = -(-len(stream.ids) // stream.microbatch)
    first, last = rank * count // world * stream.microbatch, (rank + 1) * count // world * stream.microbatch
    ids = stream.ids[first:last]
    weights = None if stream.weights is None else stream.weights[first:last]
    return replace(stream, ids=ids, weights=weights) if len(ids) else None


def operator_of(kind: str, stream: Stream, choice: Choice | None, group: dist.ProcessGroup | None = None) -> Operator:
    """The operator `kind` of OPERATORS over all examples of `stream`, of which this process takes its share.

    Raises: GradscaleError if there is no such operator.
    """
    if kind not in OPERATORS:
        raise GradscaleError(f"operator must be one of {', '.join(OPERATORS)}, got {kind!r}")
    share = share_of(stream, dist.get_rank(group), dist.get_world_size(group))
    if kind == "covariance":
        return ShardedCovariance(share, stream.layout.size, len(stream.ids), group)
    assert choice is not None
    own = () if share is None else (share,)
    return Sharded(MeanPart(own, choice, stream.layout.size, stream.total_weight), group)


def half_operators(
    stream: Stream, choice: Choice, group: dist.ProcessGroup | None = None
) -> list[tuple[Operator, float]]:
    """The operator over each of two halves of the examples, every second microbatch, with the half's share of them.

    A single microbatch is cut in two; of a single example there is one half, itself.
    """
    step = stream.microbatch if len(stream.ids) > stream.microbatch else -(-len(stream.ids) // 2)
    pieces = [replace(stream, ids=stream.ids[first : first + step]) for first in range(0, len(stream.ids), step)]
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    found: list[tuple[Operator, float]] = []
    for half in (pieces[::2], pieces[1::2]):
        count = sum(len(piece.ids) for piece in half)
        own = tuple(half[rank * len(half) // world : (rank + 1) * len(half) // world])
        part = MeanPart(own, choice, stream.layout.size, float(count))
        found += [(Sharded(part, group), count / len(stream.ids))] if count else []
    return found


@dataclass(frozen=True, eq=False)
class MeanPart:
    """v -> (1 / sum w) sum_i w_i M_i v over a process's own examples, the sum of weights being that of all processes.

    An operator on whole vectors, to be summed over processes by `Sharded`.
    """

    shares: tuple[Stream, ...]
    choice: Choice
    size: int
    total: float

    @property
    def here(self) -> range:
        return range(self.size)

    def operators(self) -> list[CurvatureOperator]:
        """Of each of the process's own streams."""
        return [CurvatureOperator(share, self.choice) for share in self.shares]

    def products(self, vectors: Tensor) -> Tensor:
        total = torch.zeros(vectors.shape, dtype=torch.float64, device=vectors.device)
        for own in self.operators():
            total += own.sums(vectors)
        return (total / self.total).to(vectors.dtype)

    def all_sum(self, parts: Tensor) -> Tensor:
        return parts


@dataclass(frozen=True, eq=False)
class ShardedCovariance:
    """v -> (1 / (n - 1)) sum_i (g_i - g) <g_i - g, v> of the gradients of all processes' examples, g their mean.

    Centred by the mean of the inner products over all processes, so that sum_i c_i g_i is sum_i c_i (g_i - g).
    """

    share: Stream | None
    size: int
    examples: int  # n
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.examples < 2:
            raise GradscaleError(f"examples must be two or more for a covariance, got {self.examples}; take more")

    @property
    def here(self) -> range:
        return slice_of(self.size, dist.get_rank(self.group), dist.get_world_size(self.group))

    def products(self, vectors: Tensor) -> Tensor:
        parts = [self._products(gathered(part, self.size, self.group)) for part in vectors.split(_TOGETHER)]
        return torch.cat(parts)

    def _products(self, vectors: Tensor) -> Tensor:
        found = vectors.new_zeros(0, len(vectors), dtype=torch.float64)
        if self.share is not None:
            found = inner_products(self.share, vectors)
        mean = self.all_sum(found.sum(dim=0)) / self.examples
        total = torch.zeros(vectors.shape, dtype=torch.float64, device=vectors.device)
        if self.share is not None:
            add_weighted_sums(self.share, found - mean, total)
        return reduce_scattered(total.div_(self.examples - 1).to(vectors.dtype), self.group)

    def all_sum(self, parts: Tensor) -> Tensor:
        return all_summed(parts, self.group)
