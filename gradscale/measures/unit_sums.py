"""Sums of unit gradients g / |g| by jackknife block and class: what cosine stiffness is made of.

The sum of the cosines over all pairs of two sets of examples is the inner product of their sums of unit gradients, so
that no pair has to be formed. An example of zero gradient has no direction: it is counted and has no part in a sum.

Shapes: J jackknife blocks, C classes, P entries of one parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.grads.readings import GradientSums, Reading
from gradscale.measures.grouped import ALL, SEPARATOR, added, group_key, members, widened
from gradscale.measures.measure import MicroBatch

_ENTRIES = 1 << 22  # of the sums that are widened side by side at a time


class UnitState(NamedTuple):
    """Keys are `block|class` (class `*` for all), and `block|class|parameter` for the sums. A commutative monoid."""

    counts: Mapping[str, Tensor]  # [] int64: examples with a direction
    zeros: Mapping[str, Tensor]  # [] int64: examples of zero gradient
    sums: Mapping[str, Tensor]  # [P] float64: of g / |g|, |g| over all measured parameters


class UnitRows(NamedTuple):
    """The rows of a state, block by block and within a block class by class; blocks without a direction left out."""

    keys: tuple[str, ...]  # [J C]
    counts: Tensor  # [J, C] float64


@dataclass(frozen=True)
class UnitSumsStatistic:
    """Counts and sums of unit gradients. State: J (C + 1) P numbers in float64, with C = 0 unless `by_class`."""

    by_class: bool = False

    @property
    def needs(self) -> frozenset[Reading]:
        everyone: frozenset[Reading] = frozenset({GradientSums(unit=True)})
        return everyone | {GradientSums(by_class=True, unit=True)} if self.by_class else everyone

    def init(self) -> UnitState:
        return UnitState({}, {}, {})

    def update(self, state: UnitState, batch: MicroBatch) -> UnitState:
        return self.merge(state, self._of(batch))

    def merge(self, left: UnitState, right: UnitState) -> UnitState:
        return UnitState(*(added(a, b) for a, b in zip(left, right, strict=True)))

    def _of(self, batch: MicroBatch) -> UnitState:
        counts: dict[str, Tensor] = {}
        zeros: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        for reading in self.needs:
            assert isinstance(reading, GradientSums)
            for group, by_parameter in batch.sums[reading].items():
                member, key = members(batch, group), group_key(batch.block, group)
                counts[key] = (member & batch.directed).sum()
                zeros[key] = (member & ~batch.directed).sum()
                sums |= widened(key, by_parameter)
        return UnitState(counts, zeros, sums)


def classes_of(state: UnitState) -> list[int]:
    """The classes with an example that has a direction, ascending."""
    found = {key.split(SEPARATOR)[1] for key, count in state.counts.items() if int(count)}
    return sorted(int(group) for group in found - {ALL})


def rows_of(state: UnitState, groups: Sequence[int | None]) -> UnitRows:
    """The rows of `groups` in every block; None is the row of all examples. A class that a block lacks counts 0."""
    blocks = sorted({key.split(SEPARATOR)[0] for key, count in state.counts.items() if int(count)})
    keys = tuple(group_key(int(block), group) for block in blocks for group in groups)
    counts = torch.tensor([int(state.counts.get(key, 0)) for key in keys], dtype=torch.float64)
    return UnitRows(keys, counts.view(len(blocks), len(groups)))


def products(left: UnitState, rows: UnitRows, right: UnitState, columns: UnitRows) -> Tensor:
    """[J, C, J', C'] float64: the inner products of sums of unit gradients of two states of the same parameters.

    Memory beside the states: 64 MiB, or eight entries of every row.
    """
    total = torch.zeros(len(rows.keys), len(columns.keys), dtype=torch.float64)
    for name, size in _parameters(left).items():
        step = max(8, _ENTRIES // max(1, len(rows.keys) + len(columns.keys)))
        for start in range(0, size, step):
            part = slice(start, min(start + step, size))
            above = _stacked(left, rows, name, part)
            total += above @ (above if columns is rows else _stacked(right, columns, name, part)).mT
    return total.view(*rows.counts.shape, *columns.counts.shape)


def zero_gradients(state: UnitState) -> int:
    return sum(int(count) for key, count in state.zeros.items() if key.split(SEPARATOR)[1] == ALL)


def _stacked(state: UnitState, rows: UnitRows, name: str, part: slice) -> Tensor:
    """[J C, entries of the part]"""
    empty = torch.zeros(part.stop - part.start, dtype=torch.float64)
    found = (state.sums.get(f"{key}{SEPARATOR}{name}") for key in rows.keys)
    stacked = [empty if row is None else row[part] for row in found]
    return torch.stack(stacked) if stacked else empty.new_zeros(0, len(empty))


def _parameters(state: UnitState) -> dict[str, int]:
    """Entries by parameter, sorted by name: the order in which products are added up."""
    sizes = {key.split(SEPARATOR, 2)[2]: total.numel() for key, total in state.sums.items()}
    return dict(sorted(sizes.items()))
