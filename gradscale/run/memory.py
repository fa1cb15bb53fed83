"""Running out of memory, as an error that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gradscale.errors import OutOfMemory


@contextmanager
def explaining_memory(microbatch: int) -> Iterator[None]:
    """Turns running out of memory into an error that says which microbatch size to try."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(memory_message(microbatch)) from error


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def memory_message(microbatch: int) -> str:
    if microbatch > 1:
        return f"a worker ran out of memory with microbatch {microbatch}; try --microbatch {microbatch // 2}"
    return "a worker ran out of memory with microbatch 1; give it more memory, or measure fewer parameters by --params"
