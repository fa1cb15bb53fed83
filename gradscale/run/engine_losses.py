"""The losses of a rank's batches on an engine's module, and what ranks must agree on before the next collective."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradscale.errors import GradscaleError

T = TypeVar("T")
Losses = Callable[[nn.Module, Any], Tensor]


class Batches(Protocol):
    """A list, or a DataLoader that does not shuffle: read again at every product."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


@dataclass(frozen=True, eq=False)
class Share:
    """This rank's batches, and how many examples all ranks have in theirs."""

    batches: Batches
    n: int = 0


@dataclass(frozen=True, eq=False)
class RankLosses:
    """`losses(module, batch)` [B], in the autocast of the engine if it has one."""

    engine: Any
    losses: Losses
    lockstep: bool  # passes gather weights from all ranks: ZeRO-3

    @property
    def device(self) -> torch.device:
        return torch.device(self.engine.device)

    def __call__(self, module: nn.Module, batch: Any) -> Tensor:
        """[]: the sum over the batch's examples. Raises: GradscaleError unless there is one loss an example."""
        found = self.each(module, batch)
        if torch.is_grad_enabled() and not found.requires_grad:
            raise GradscaleError(
                "losses must depend on the engine's parameters, got losses without a gradient; compute them with the "
                "module that is passed, without torch.no_grad() and without .detach()"
            )
        return found.double().sum() if found.dtype == torch.float64 else found.float().sum()

    def each(self, module: nn.Module, batch: Any) -> Tensor:
        """[B]."""
        enabled = bool(getattr(self.engine, "torch_autocast_enabled", bool)())
        dtype = self.engine.torch_autocast_dtype() if enabled else None
        with torch.autocast(self.device.type, dtype=dtype, enabled=enabled):
            found = self.losses(module, batch)
        if not isinstance(found, Tensor) or found.dim() != 1 or not len(found):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise GradscaleError(
                f"losses must be one number for each example, of shape (B,), got {shape}; do not reduce them"
            )
        return found


def counted(losses: RankLosses, batches: Batches) -> tuple[Share, Share]:
    """All batches, and the first of every rank, with the numbers of their examples, by a forward pass.

    Raises: GradscaleError if `batches` cannot be read again and again, there are none, or, where ranks go in lockstep,
    their numbers differ.
    """
    agreed(_unreadable(batches), losses.device)
    passes = of_all_ranks(len(batches), losses.device)
    if not max(passes) or (losses.lockstep and min(passes) != max(passes)):
        raise GradscaleError(
            f"batches must be {'as many on every rank' if max(passes) else 'one or more'}, got {passes} on the "
            "ranks; under ZeRO-3 a pass of one needs the others: give each rank as many, the last ones smaller"
        )

    def lengths() -> list[int]:
        with torch.no_grad():
            return [len(run(losses, batch, losses.each)) for batch in read(losses, batches)]

    own = together(losses, lengths)
    n, first = (sum(of_all_ranks(sum(part), losses.device)) for part in (own, own[:1]))
    return Share(batches, n), Share(_First(batches), first)


def _unreadable(batches: Any) -> GradscaleError | None:
    if hasattr(batches, "__len__") and hasattr(batches, "__iter__") and not hasattr(batches, "__next__"):
        return None
    return GradscaleError(
        f"batches must be a sequence, which every product reads again, got {type(batches).__name__}; pass a list"
    )


@dataclass(frozen=True)
class _First:
    """The first batch of a sequence, or none."""

    batches: Batches

    def __len__(self) -> int:
        return min(1, len(self.batches))

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.batches), 1)


def read(losses: RankLosses, batches: Batches) -> Iterator[Any]:
    """Every batch; in lockstep, a rank whose data fails tells the others before they start a pass."""
    if not losses.lockstep:
        yield from batches
        return
    iterator = iter(batches)
    for _ in range(len(batches)):
        batch: Any = None
        problem: Exception | None = None
        try:
            batch = next(iterator)
        except StopIteration:
            problem = GradscaleError(f"batches must be the {len(batches)} of their len(), got fewer; pass a list")
        except Exception as found:
            problem = found
        agreed(problem, losses.device)
        yield batch


def run(losses: RankLosses, batch: Any, function: Callable[[nn.Module, Any], Tensor]) -> Tensor:
    """`function` of the engine's module; in lockstep, if it fails outside the module's forward pass, then on all ranks.

    Inside it, ranks may be in different collectives already: there it fails on this rank alone, and the others find
    out when its process ends, or by the process group's timeout.
    """
    module = losses.engine.module
    if not losses.lockstep:
        return function(module, batch)
    found, problem = None, None
    with _depth(module) as depth:
        try:
            found = function(module, batch)
        except Exception as raised:
            if depth[0]:
                raise
            problem = raised
    agreed(problem, losses.device)
    assert found is not None
    return found


def together(losses: RankLosses, function: Callable[[], T]) -> T:
    """`function`, which runs without collectives unless in lockstep; if it fails on one rank, then on all."""
    if losses.lockstep:
        return function()
    found, problem = None, None
    try:
        found = function()
    except Exception as raised:
        problem = raised
    agreed(problem, losses.device)
    return cast(T, found)


def agreed(problem: Exception | None, device: torch.device) -> None:
    """Raises: `problem` on the ranks that have one; RuntimeError on the others.

    GradscaleError on all other ranks if one rank's problem is neither a RuntimeError nor a NotImplementedError: what is
    tried next after torch's errors is then tried on none.
    """
    severity = 0 if problem is None else 1 if isinstance(problem, RuntimeError | NotImplementedError) else 2
    found = of_all_ranks(severity, device)
    worst = max(found)
    if problem is not None and severity == worst:
        raise problem
    if worst:
        kind = RuntimeError if worst == 1 else GradscaleError
        raise kind(
            f"all ranks must succeed, got failures on ranks {[rank for rank, each in enumerate(found) if each]}; see "
            "what they raised"
        ) from problem


def of_all_ranks(count: int, device: torch.device) -> list[int]:
    found = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    found[dist.get_rank()] = count
    dist.all_reduce(found)
    return [int(each) for each in found]


@contextmanager
def _depth(module: nn.Module) -> Iterator[list[int]]:
    """How many forward passes of the module have begun and not ended."""
    depth = [0]

    def begin(*_: Any) -> None:
        depth[0] += 1

    def end(*_: Any) -> None:
        depth[0] -= 1

    handles = [module.register_forward_pre_hook(begin, prepend=True), module.register_forward_hook(end)]
    try:
        yield depth
    finally:
        for handle in handles:
            handle.remove()
