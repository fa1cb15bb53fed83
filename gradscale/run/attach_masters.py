"""What the optimizer of an engine moves: the float32 masters where there are any, else the weights themselves.

Every rank has its share: its own partition, or of what all ranks hold alike a slice. No collectives, no copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.run.attach_together import rank


class Piece(NamedTuple):
    """This rank's entries of one parameter, without padding."""

    name: str | None  # None: of no parameter of the module
    values: Tensor  # [p], on whatever device they are kept


def pieces(engine: Any) -> list[Piece]:
    """Views, in an order that stays; over all ranks every trained entry is there once.

    Raises: GradscaleError if they are not all in memory, or not moved within engine.step.
    """
    optimizer = engine.optimizer
    _check(engine)
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        found = _partitions(optimizer)
    elif hasattr(optimizer, "bit16_groups") or hasattr(optimizer, "bf16_groups"):
        found = _fragments(optimizer)
    else:
        world = dist.get_world_size() if dist.is_initialized() else 1
        found = ((p, _slice(values.detach().reshape(-1), rank(), world)) for p, values in _replicas(optimizer))
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    return [Piece(names.get(id(p)), values.detach()) for p, values in found]


def sq_distance(before: Tensor, after: Tensor) -> Tensor:
    """[] float64: |after - before|^2. Spends `before`, whose memory takes the difference.

    In float32 the difference is rounded once an entry, which leaves the norm a relative error of at most 6e-8.
    """
    wide = torch.promote_types(before.dtype, torch.float32)
    apart = before.to(wide).sub_(after.to(wide))
    norm: Tensor = torch.linalg.vector_norm(apart, dtype=torch.float64)
    return norm.square()


def _partitions(optimizer: Any) -> Iterator[tuple[Any, Tensor]]:
    """ZeRO-3: of each parameter the entries from rank x width on, padded where it does not divide."""
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        start = 0
        for p in group:
            width = int(p.partition_numel())
            if flat.numel() < start + width or dist.get_world_size(p.ds_process_group) != dist.get_world_size():
                raise GradscaleError(
                    "masters must be in memory and partitioned over all ranks for path, got another way under ZeRO-3; "
                    "leave out NVMe and MiCS, or path"
                )
            real = min(width, int(p.ds_numel) - width * dist.get_rank(p.ds_process_group))
            if real > 0:
                yield p, flat[start : start + real]
            start += width


def _fragments(optimizer: Any) -> Iterator[tuple[Any, Tensor]]:
    """ZeRO-1 and 2, and bfloat16 with float32 accumulation: a cut of the flat group may go through a parameter."""
    groups = optimizer.bit16_groups if hasattr(optimizer, "bit16_groups") else optimizer.bf16_groups
    for p in (p for group in groups for p in group):
        if p._hp_mapping is not None:
            yield p, p._hp_mapping.hp_fragment


def _replicas(optimizer: Any) -> Iterator[tuple[Any, Tensor]]:
    """ZeRO-0: every rank holds everything; masters of low-precision weights are one by one, or flat by group."""
    if hasattr(optimizer, "fp32_groups_flat"):
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            yield from zip(group, flat.split([p.numel() for p in group]), strict=True)
    elif hasattr(optimizer, "fp32_groups"):
        for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            yield from zip(group, masters, strict=True)
    else:
        yield from ((p, p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad)


def _slice(flat: Tensor, number: int, world: int) -> Tensor:
    """Of `world` slices of ceil(n / world) entries, the last ones shorter or empty."""
    width = -(-len(flat) // world)
    return flat[number * width : (number + 1) * width]


def _check(engine: Any) -> None:
    late = [name for name in ("zenflow", "super_offload") if _is_on(engine, name)]
    if late:
        raise GradscaleError(
            f"weights must be moved within engine.step for path, got {late[0]}, which moves some later; leave it out "
            "of the settings, or path"
        )


def _is_on(engine: Any, name: str) -> bool:
    found = getattr(engine, name, False)
    return bool(found() if callable(found) else found)
