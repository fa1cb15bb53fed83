"""A model of low precision computed in float32: what beside its weights must be widened for the time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree


def coarsest(dtypes: Iterable[torch.dtype], wide: bool) -> torch.dtype:
    """The one with the largest rounding unit; float32 at most if computed `wide`."""
    found = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.promote_types(found, torch.float32) if wide else found


def widened_tensor(tensor: Tensor) -> Tensor:
    """In float32 if it is bfloat16 or float16, else itself."""
    return tensor.detach().float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor


def widened_batch(batch: Any) -> Any:
    """The same with its tensors widened, in whatever dictionaries, lists and tuples they are."""
    return _pytree.tree_map_only(Tensor, widened_tensor, batch)


@contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """With its buffers widened; then with their own again."""
    low = [
        (each, name, buffer)
        for each in module.modules()
        for name, buffer in each.named_buffers(recurse=False, remove_duplicate=False)
        if widened_tensor(buffer) is not buffer
    ]
    try:
        for each, name, buffer in low:
            setattr(each, name, buffer.float())
        yield
    finally:
        for each, name, buffer in low:
            setattr(each, name, buffer)
