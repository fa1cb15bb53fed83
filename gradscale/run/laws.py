"""The laws that a statistic has to obey for a run to be cut into shards, merged, stored and resumed.

A statistic is a commutative monoid: `init` is its unit, `merge` its operation, and `update` merges in what one
microbatch gives. Each law here holds two routes to a state beside each other and raises where they part;
`check_measure` holds a measure to all of them. No Ray, no files.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradscale.errors import GradscaleError
from gradscale.measures.measure import MicroBatch, Statistic
from gradscale.run.fold import flatten, unflatten
from gradscale.store.store import decode_states, encode_states

_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}  # else 1e-2


def hold_unit(statistic: Statistic[Any], state: Any) -> None:
    """merge(init(), a) = a = merge(a, init()), bit for bit."""
    for merged in (statistic.merge(statistic.init(), state), statistic.merge(state, statistic.init())):
        _hold(statistic, "leave a state as it is when it is merged with init()", state, merged, bits=True)


def hold_commutativity(statistic: Statistic[Any], a: Any, b: Any) -> None:
    """merge(a, b) = merge(b, a), bit for bit: a + b is b + a in floating point."""
    left, right = statistic.merge(a, b), statistic.merge(b, a)
    _hold(statistic, "merge two states in either order to the same bits", left, right, bits=True)


def hold_associativity(statistic: Statistic[Any], a: Any, b: Any, c: Any, exact: Sequence[str] = ()) -> None:
    """merge(merge(a, b), c) = merge(a, merge(b, c)), floats up to rounding, except of the fields `exact`."""
    left, right = statistic.merge(statistic.merge(a, b), c), statistic.merge(a, statistic.merge(b, c))
    _hold(statistic, "merge three states to the same, whichever two are merged first", left, right, exact=exact)


def hold_exchange(statistic: Statistic[Any], a: Any, b: Any, batch: MicroBatch, exact: Sequence[str] = ()) -> None:
    """Taking a microbatch in is merging what it gives alone, before a merge or after it: shards may be cut anywhere."""
    alone = statistic.merge(a, statistic.update(statistic.init(), batch))
    says = "give the same by update(a, batch) as by merge(a, update(init(), batch))"
    _hold(statistic, says, alone, statistic.update(a, batch), exact=exact)
    before, after = statistic.merge(statistic.update(a, batch), b), statistic.update(statistic.merge(a, b), batch)
    _hold(statistic, "give the same whether a microbatch comes before a merge or after it", before, after, exact=exact)


def hold_splitting(
    statistic: Statistic[Any], state: Any, first: MicroBatch, second: MicroBatch, exact: Sequence[str] = ()
) -> None:
    """Two microbatches of one block as one give what they give one after the other: the size of shards is no matter."""
    apart = statistic.update(statistic.update(state, first), second)
    together = statistic.update(state, joined(first, second))
    _hold(
        statistic, "give the same for two microbatches at once as for one after the other", apart, together, exact=exact
    )


def hold_arguments(statistic: Statistic[Any], a: Any, b: Any, batch: MicroBatch) -> None:
    """`update` and `merge` leave what they are given as it was, bit for bit."""
    copies = copy.deepcopy((a, b, batch))
    updated = statistic.update(a, batch)
    kept = copy.deepcopy(updated)
    statistic.update(statistic.merge(updated, b), batch)
    for name, now, before in zip(("a", "b", "batch", "updated"), (a, b, batch, updated), (*copies, kept), strict=True):
        if not _same_leaves(now, before):
            what = {"batch": "the microbatch", "updated": "a state that it had made"}.get(name, f"the state {name}")
            raise _broken(statistic, "leave its arguments untouched", f"{what} changed in place", "add out of place")


def hold_storage(states: Mapping[Statistic[Any], Any]) -> None:
    """States stored together come back bit for bit, each to its statistic: a run can be resumed."""
    stored = unflatten(list(states), decode_states(encode_states(flatten(states))))
    for statistic, state in states.items():
        _hold(statistic, "have a state that survives storage", state, stored[statistic], bits=True)


def hold_pickling(settings: Any) -> None:
    """Settings sent to a worker are equal there and look the same: states are stored under their repr."""
    try:
        hash(settings)
        there = pickle.loads(pickle.dumps(settings))
    except Exception as error:
        raise _broken(settings, "be hashable and picklable", f"{type(error).__name__}: {error}", _FREEZE) from error
    if there != settings or repr(there) != repr(settings):
        raise _broken(
            settings, "be equal to its pickled copy, and have its repr", f"{settings!r} and {there!r}", _FREEZE
        )


def joined(first: MicroBatch, second: MicroBatch) -> MicroBatch:
    """Two microbatches of one block as one, as the microbatches of a shard are."""
    if first.block != second.block:
        raise GradscaleError(f"microbatches must be of one block to be joined, got {first.block} and {second.block}")
    labels = None if first.labels is None or second.labels is None else torch.cat([first.labels, second.labels])
    return MicroBatch(
        torch.cat([first.ids, second.ids]),
        torch.cat([first.losses, second.losses]),
        labels,
        first.layers,
        torch.cat([first.sq_norms, second.sq_norms]),
        {reading: _added(sums, second.sums[reading]) for reading, sums in first.sums.items()},
        {reading: torch.cat([found, second.projections[reading]]) for reading, found in first.projections.items()},
        first.block,
        {each: torch.cat([found, second.observations[each]]) for each, found in first.observations.items()},
        {each: each.merge(found, second.gathered[each]) for each, found in first.gathered.items()},
    )


def difference(left: Any, right: Any, *, bits: bool = False, exact: Sequence[str] = ()) -> str:
    """Where two states differ, in words; empty if nowhere.

    Floats may differ by rounding: 1e-9 of their size in float64, 1e-5 in float32. Integers, with `bits` everything, and
    the fields `exact` may not; NaN is equal to NaN.
    """
    if type(left) is not type(right):
        return f"{type(left).__name__} and {type(right).__name__}"
    for field, a, b in zip(left._fields, left, right, strict=True):
        for name, ours, theirs in _pairs(field, a, b):
            if ours is None or theirs is None:
                return f"{name} in one of two states"
            if not _same_kind(ours, theirs):
                return f"{name} as {ours.dtype} {tuple(ours.shape)} and as {theirs.dtype} {tuple(theirs.shape)}"
            if not _equal(ours, theirs, bits or field in exact):
                return f"{name} = {_shown(ours, theirs)} and {_shown(theirs, ours)}"
    return ""


_FREEZE = "make it a dataclass with frozen=True, of plain settings, at the top level of a module"


def _hold(
    statistic: Statistic[Any], says: str, left: Any, right: Any, *, bits: bool = False, exact: Sequence[str] = ()
) -> None:
    if found := difference(left, right, bits=bits, exact=exact):
        raise _broken(statistic, says, found, "keep sums, counts, extrema or sketches in the state, never means")


def _broken(what: Any, says: str, got: str, remedy: str) -> GradscaleError:
    name = getattr(what, "name", None) or type(what).__name__
    return GradscaleError(f"{name} must {says}, got {got}; {remedy}")


def _pairs(field: str, left: Any, right: Any) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        yield field, left, right
        return
    for key in sorted(left.keys() | right.keys()):
        yield f"{field}[{key!r}]", left.get(key), right.get(key)


def _equal(left: Tensor, right: Tensor, bits: bool) -> bool:
    if bits or not left.is_floating_point():
        return bool(((left == right) | (left.isnan() & right.isnan())).all())
    rounding = _ROUNDING.get(left.dtype, 1e-2)
    return torch.allclose(left, right, rtol=rounding, atol=rounding, equal_nan=True)


def _shown(tensor: Tensor, other: Tensor) -> str:
    """The first entries in which it differs from the other."""
    if tensor.dim() == 0:
        return f"{tensor.item():.9g}"
    values = tensor[tensor != other]
    return f"[{', '.join(f'{value:.9g}' for value in values[:3].tolist())}{', …' if values.numel() > 3 else ''}]"


def _same_leaves(left: Any, right: Any) -> bool:
    leaves, structure = pytree.tree_flatten(left)
    others, other_structure = pytree.tree_flatten(right)
    tensors = [(a, b) for a, b in zip(leaves, others, strict=False) if isinstance(a, Tensor)]
    return structure == other_structure and all(_same_kind(a, b) and _equal(a, b, bits=True) for a, b in tensors)


def _same_kind(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape


def _added(left: Mapping[Any, Mapping[str, Tensor]], right: Mapping[Any, Mapping[str, Tensor]]) -> dict[Any, Any]:
    """Sums by class and parameter; a class may be in one of the two."""
    found: dict[Any, dict[str, Tensor]] = {group: dict(sums) for group, sums in left.items()}
    for group, sums in right.items():
        there = found.get(group)
        found[group] = dict(sums) if there is None else {name: there[name] + total for name, total in sums.items()}
    return found
