"""A method of one object, replaced for a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Method = Callable[..., Any]


@contextmanager
def replaced(thing: Any, name: str, made: Callable[[Method], Method]) -> Iterator[None]:
    """With a method of this object alone in place of its own."""
    before = vars(thing).get(name)
    setattr(thing, name, made(getattr(thing, name)))
    try:
        yield
    finally:
        if before is None:
            delattr(thing, name)
        else:
            setattr(thing, name, before)
