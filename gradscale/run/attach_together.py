"""What all ranks of a training do alike: nobody goes on alone after a failure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gradscale.errors import GradscaleError

T = TypeVar("T")
Name = TypeVar("Name", bound=Hashable)


def gathered(value: T) -> list[T]:
    """The values of all ranks, in their order; small ones, they are pickled. A collective."""
    if not dist.is_initialized():
        return [value]
    found: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found  # type: ignore[return-value]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def together(function: Callable[[], T]) -> T:
    """`function()`, in which there must be no collective. A collective.

    Raises: on all ranks, if it raises on one: what it raised there, and on the others a GradscaleError saying so.
    """
    result, problem = None, None
    try:
        result = function()
    except Exception as raised:
        problem = raised
    said = gathered(None if problem is None else f"{type(problem).__name__}: {problem}")
    if problem is not None:
        raise problem
    failed = [(i, each) for i, each in enumerate(said) if each is not None]
    if failed:
        ranks = ", ".join(str(i) for i, _ in failed)
        raise GradscaleError(f"all ranks must succeed, got a failure on rank {ranks}: {failed[0][1]}")
    return result  # type: ignore[return-value]


def at_first(tensors: Mapping[Name, Tensor], device: torch.device) -> Iterator[dict[Name, Tensor]]:
    """The tensors of all ranks in their order, on the first rank alone, on the CPU; nothing on the others.

    A collective, of which nothing may be left out: the first rank must go through it to its end. A rank's tensors are
    held at a time, one is on the `device` at a time.
    """
    described = gathered({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
    if rank():
        for tensor in tensors.values():
            if tensor.numel():
                dist.send(tensor.to(device).contiguous(), 0)
        return
    yield {name: tensor.cpu() for name, tensor in tensors.items()}
    for other in range(1, len(described)):
        received: dict[Name, Tensor] = {}
        for name, (shape, dtype) in described[other].items():
            arriving = torch.empty(shape, dtype=dtype, device=device)
            if arriving.numel():
                dist.recv(arriving, other)
            received[name] = arriving.cpu()
        yield received
