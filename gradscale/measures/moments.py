"""The first two moments of per-example gradients, by jackknife block: what coherence and dispersion are made of.

For every block of examples b: the count n_b, the sums of squared norms Q_b per parameter and the sum of
gradients S_b per parameter. Everything else follows from n, Q and the Gram matrix <S_a, S_b> of the
blocks, leave-one-block-out values included.

Shapes: J blocks, L parameters, P entries of one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.grads.readings import GradientSums, Reading, SquaredNorms, has_norm_above
from gradscale.measures.grouped import ALL, SEPARATOR, added, group_key, group_name, members, widened
from gradscale.measures.jackknife import jackknife_errors
from gradscale.measures.measure import MicroBatch

ABOVE = ">"  # the group of examples with a gradient norm above the threshold


class MomentsState(NamedTuple):
    """Keys are `block|group`, and `block|group|parameter` for the sums. A commutative monoid.

    A group is a class, `*` for all examples, or `>` for those with a gradient norm above the threshold.
    """

    counts: Mapping[str, Tensor]  # [] int64
    sq_norms: Mapping[str, Tensor]  # [L] float64, the parameters sorted by name
    sums: Mapping[str, Tensor]  # [P] float64


class Moments(NamedTuple):
    """The moments of one group of examples in J blocks, for one scope (a parameter, or all of them)."""

    counts: Tensor  # [J] float64
    sq_norms: Tensor  # [J] float64
    gram: Tensor  # [J, J] float64, <S_a, S_b>

    @property
    def n(self) -> int:
        return int(self.counts.sum())


@dataclass(frozen=True)
class MomentsStatistic:
    """Counts, squared norms and exact sums of gradients. State: J (C + 1) P numbers in float64, C for by_class.

    With `min_norm`, also of the examples with |g_i| > min_norm: J P numbers and a pass over the data more.
    """

    by_class: bool = False
    min_norm: float | None = None

    @property
    def needs(self) -> frozenset[Reading]:
        by_class = {GradientSums(by_class=True)} if self.by_class else set()
        above = {GradientSums(min_norm=self.min_norm)} if self.min_norm is not None else set()
        return frozenset({SquaredNorms(), GradientSums(), *by_class, *above})

    def init(self) -> MomentsState:
        return MomentsState({}, {}, {})

    def update(self, state: MomentsState, batch: MicroBatch) -> MomentsState:
        return self.merge(state, self._of(batch))

    def merge(self, left: MomentsState, right: MomentsState) -> MomentsState:
        return MomentsState(*(added(a, b) for a, b in zip(left, right, strict=True)))

    def _of(self, batch: MicroBatch) -> MomentsState:
        counts: dict[str, Tensor] = {}
        sq_norms: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        columns = sorted(range(len(batch.layers)), key=batch.layers.__getitem__)  # as `layers_of` sorts them
        for reading in self.needs:
            if not isinstance(reading, GradientSums):
                continue
            for group, by_parameter in batch.sums[reading].items():
                if reading.min_norm is None:
                    key, member = group_key(batch.block, group), members(batch, group)
                else:
                    key, member = group_key(batch.block, ABOVE), has_norm_above(batch.sq_norms, reading.min_norm)
                counts[key] = member.sum()
                sq_norms[key] = batch.sq_norms[member].sum(dim=0)[columns]
                sums |= widened(key, by_parameter)
        return MomentsState(counts, sq_norms, sums)


def classes(state: MomentsState) -> list[int]:
    """The classes that `state` has sums for, ascending."""
    groups = {key.split(SEPARATOR)[1] for key in state.counts}
    return sorted(int(group) for group in groups - {ALL, ABOVE})


def moments(state: MomentsState, group: int | str | None = None) -> dict[str, Moments]:
    """The moments of all parameters together (scope `all`) and of each (scope `layer:<parameter>`).

    Of all examples, of a class, or of those `ABOVE` the threshold. Blocks without such an example are left out.
    """
    keys = _keys(state, group)
    counts = torch.stack([state.counts[key] for key in keys]).double()
    sq_norms = torch.stack([state.sq_norms[key] for key in keys])
    found = {
        f"layer:{name}": Moments(counts, sq_norms[:, j], sums @ sums.mT)
        for j, (name, sums) in enumerate(_block_sums(state, keys))
    }
    total = torch.stack([part.gram for part in found.values()]).sum(dim=0)
    return {"all": Moments(counts, sq_norms.sum(dim=1), total), **found}


def block_sums(state: MomentsState, group: int | str | None = None) -> Iterator[tuple[str, Tensor]]:
    """The sums of gradients [J, P] over the blocks of `moments`, one parameter after another."""
    return _block_sums(state, _keys(state, group))


def layers_of(state: MomentsState) -> list[str]:
    """The parameters that `state` has sums for, sorted: the order in which they are added up."""
    first = min(state.counts) + SEPARATOR
    return sorted(key.removeprefix(first) for key in state.sums if key.startswith(first))


Value = Callable[[float, float, float], float]  # of n, Q = sum |g_i|^2 and |S|^2 = |sum g_i|^2


def jackknife(parts: Moments, value: Value) -> tuple[float, float]:
    """value(n, Q, |S|^2) over all blocks, and its standard error: see `jackknife_errors`. NaN of a single block."""
    n, q, norm = parts.counts.sum(), parts.sq_norms.sum(), parts.gram.sum()
    full = value(float(n), float(q), float(norm))
    rest = torch.stack(
        [n - parts.counts, q - parts.sq_norms, norm - 2 * parts.gram.sum(dim=1) + parts.gram.diagonal()], dim=1
    )
    if len(rest) < 2:
        return full, math.nan
    left_out = torch.tensor([[value(*without)] for without in rest.tolist()], dtype=torch.float64)
    error = jackknife_errors(torch.tensor([full], dtype=torch.float64), [(left_out, parts.counts[:, None])], n[None])
    return full, float(error)


def _keys(state: MomentsState, group: int | str | None) -> list[str]:
    """The blocks that have an example of the group; one of them if none has."""
    ours = sorted(key for key in state.counts if key.split(SEPARATOR)[1] == group_name(group))
    return [key for key in ours if int(state.counts[key])] or ours[:1]


def _block_sums(state: MomentsState, keys: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    for name in layers_of(state):
        yield name, torch.stack([state.sums[f"{key}{SEPARATOR}{name}"] for key in keys])
