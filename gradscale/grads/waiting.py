"""How the host does without waiting for the device: doubts that are settled later, copies that are left under way.

A check that raises and a choice that depends on the data both need a number from the device, and so everything that
the device was told to do before. In a pass over many batches, what is chosen at a module's first call is therefore
taken over by its later calls, and whether that was right is gathered on the device and asked for once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradscale.errors import GradscaleError

_T = TypeVar("_T")


class Doubts:
    """What a pass over many batches has taken for granted, and whether any of it was wrong."""

    def __init__(self) -> None:
        self.decided: dict[Hashable, Any] = {}  # at the first call, by the rule, the module and what else decides
        self._wrong: Tensor | None = None  # a bool on the device

    def add(self, wrong: Tensor) -> None:
        """`wrong` is a bool on the device, which stays there."""
        self._wrong = wrong if self._wrong is None else self._wrong | wrong

    def justified(self) -> bool:
        """Whether anything was wrong since this was last asked; the pass is then to be made again without doubts.

        Waits for the device.
        """
        wrong, self._wrong = self._wrong, None
        return wrong is not None and bool(wrong)


def refuse(wrong: Tensor, error: Callable[[], GradscaleError], doubts: Doubts | None) -> None:
    """Raise `error()` if `wrong`; with `doubts`, leave it to them."""
    if doubts is not None:
        doubts.add(wrong)
    elif wrong:
        raise error()


def once(key: Hashable, decide: Callable[[], _T], doubts: Doubts | None) -> _T:
    """What `decide()` gives; with `doubts`, what it gave the first time."""
    if doubts is None:
        return decide()
    if key not in doubts.decided:
        doubts.decided[key] = decide()
    decided: _T = doubts.decided[key]
    return decided


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. From the host to a GPU without waiting, which takes page-locked memory."""
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor.to(device)
    source = tensor.contiguous().pin_memory() if device.type == "cuda" else tensor
    return source.to(device, non_blocking=True)
