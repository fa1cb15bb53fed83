"""Which entry of an engine's sliced vectors belongs to which parameter: for random vectors and traces by parameter.

Shapes: P entries in all, p of them here, W ranks, k probes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradscale.curvature.layout import Layout, Part, gaussian, rademacher
from gradscale.curvature.probes import check_kind
from gradscale.curvature.processes import slice_of
from gradscale.curvature.trace import TraceSamples

_MARK = "@rank"


class Order(NamedTuple):
    """Of the entries of all vectors, the same on every rank."""

    size: int  # P
    slices: tuple[tuple[Part, ...], ...]  # of every rank: its parts, with their place in its slice

    def here(self, rank: int) -> range:
        ends = [0, *accumulate(_length(parts) for parts in self.slices)]
        return range(ends[rank], ends[rank + 1])

    def groups(self) -> dict[str, range]:
        """A range of entries for every part, by parameter and rank: for `trace_samples`, then `by_parameter`."""
        return {
            f"{part.name}{_MARK}{rank}": range(first + part.place.start, first + part.place.stop)
            for rank, parts in enumerate(self.slices)
            for first in (self.here(rank).start,)
            for part in parts
        }


def flat_order(layout: Layout, world: int) -> Order:
    """The parameters one after another, cut into W slices of ceil(P / W) entries wherever that falls: ZeRO-0, 1, 2.

    Raises: GradscaleError if that leaves a rank without any.
    """
    return Order(layout.size, tuple(tuple(layout.parts(slice_of(layout.size, rank, world))) for rank in range(world)))


def rank_major_order(layout: Layout, world: int) -> Order:
    """For one rank after another its partitions of all parameters, without their padding: ZeRO-3.

    Rank r has the entries from r ceil(n / W) of a parameter of n entries, so many of them as there are.
    """
    return Order(layout.size, tuple(tuple(_partitions(layout, rank, world)) for rank in range(world)))


@dataclass(frozen=True)
class NamedProbes:
    """Random vectors keyed by (seed, probe, parameter, position in it): those of `layout.gaussian`, whatever the order.

    So the same probe has the same entry for the same weight under every ZeRO stage, in one process and in a gang.
    Raises: GradscaleError if `kind` is neither gaussian nor rademacher.
    """

    parts: tuple[Part, ...]
    seed: int = 0
    kind: str = "gaussian"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_kind(self.kind)

    def __call__(self, ids: range) -> Tensor:
        """[k, p]: the entries here of the probes `ids`."""
        draw = gaussian if self.kind == "gaussian" else rademacher
        made = torch.empty(len(ids), _length(self.parts), dtype=self.dtype, device=self.device)
        for name, entries, place in self.parts:
            alone = Layout((name,), ((entries.stop,),))
            made[:, place] = draw(alone, entries, self.seed, ids, made.device).to(self.dtype)
        return made


def by_parameter(samples: TraceSamples) -> TraceSamples:
    """Samples of the groups of `Order.groups`, added up over the ranks that hold a part of the same parameter."""
    rows: dict[str, np.ndarray] = {}
    for column, group in zip(samples.by_group.T, samples.groups, strict=True):
        name = group.rpartition(_MARK)[0] or group
        rows[name] = rows[name] + column if name in rows else column
    return samples._replace(groups=tuple(rows), by_group=np.stack(list(rows.values()), axis=1))


def in_parameters(order: Order, layout: Layout, slices: Sequence[Tensor]) -> Mapping[str, Tensor]:
    """Of the slices [p] of all ranks, a tensor for each parameter: for looking at a vector, in one process."""
    whole = {name: slices[0].new_empty(size) for name, size in zip(layout.names, layout.sizes, strict=True)}
    for parts, vector in zip(order.slices, slices, strict=True):
        for name, entries, place in parts:
            whole[name][entries.start : entries.stop] = vector[place]
    return {name: whole[name].view(shape) for name, shape in zip(layout.names, layout.shapes, strict=True)}


def _partitions(layout: Layout, rank: int, world: int) -> Iterator[Part]:
    place = 0
    for name, size in zip(layout.names, layout.sizes, strict=True):
        width = -(-size // world)
        first, last = min(rank * width, size), min((rank + 1) * width, size)
        if first < last:
            yield Part(name, range(first, last), slice(place, place + last - first))
            place += last - first


def _length(parts: Sequence[Part]) -> int:
    return parts[-1].place.stop if parts else 0
