"""Fixed linear maps from gradients to a few numbers, the same on every machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from gradscale.errors import GradscaleError
from gradscale.grads.readings import LinearMap
from gradscale.sketches.gaussian import GaussianSketch


@runtime_checkable
class Sketch(LinearMap, Protocol):
    """A linear map R^P -> R^K that keeps inner products in expectation; equal fields mean the same map."""

    @property
    def scheme(self) -> Mapping[str, object]:
        """name, version, seed and dim: sketches of different schemes must not be compared."""
        ...


SKETCHES: dict[str, Callable[[int, int], Sketch]] = {"gaussian": GaussianSketch, "default": GaussianSketch}


def parse_sketch(text: str, seed: int) -> Sketch:
    """The sketch that `NAME:K` names.

    Raises: GradscaleError if there is no such scheme or K is not a positive number.
    """
    name, _, dim = text.partition(":")
    if name not in SKETCHES or not dim.isdecimal():
        raise GradscaleError(f"sketch must be NAME:K with NAME in {', '.join(SKETCHES)}, got {text!r}")
    return SKETCHES[name](int(dim), seed)
