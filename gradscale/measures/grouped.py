"""Sums kept for every jackknife block and group of examples: their keys, members and addition.

A group is a class, or all examples. Shapes: B examples, P entries of one parameter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gradscale.measures.measure import MicroBatch

ALL = "*"  # the group of all examples
SEPARATOR = "|"


def group_key(block: int, group: int | str | None) -> str:
    """`block|group`; None is the group of all examples."""
    return f"{block:04d}{SEPARATOR}{group_name(group)}"


def group_name(group: int | str | None) -> str:
    return ALL if group is None else str(group)


def members(batch: MicroBatch, group: int | None) -> Tensor:
    """[B]: which examples are in the class `group`, or all of them."""
    if group is None:
        return torch.ones(len(batch.ids), dtype=torch.bool, device=batch.ids.device)
    assert batch.labels is not None
    return batch.labels == group


def widened(key: str, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`key|parameter` -> the sum [P] in float64: copies, since states that share memory cannot be stored."""
    return {f"{key}{SEPARATOR}{name}": total.to(torch.float64, copy=True) for name, total in sums.items()}


def added(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of either, added where both have a key; touches neither."""
    return {**left, **{key: left[key] + value if key in left else value for key, value in right.items()}}
