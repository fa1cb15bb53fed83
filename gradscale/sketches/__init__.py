"""Fixed linear maps from gradients to a few numbers, the same on every machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.grads.readings import LinearMap
from gradscale.sketches.count import CountSketch
from gradscale.sketches.gaussian import GaussianSketch
from gradscale.sketches.identity import IdentitySketch
from gradscale.sketches.kronecker import KroneckerSketch
from gradscale.sketches.rademacher import RademacherSketch
from gradscale.sketches.sjlt import SjltSketch
from gradscale.sketches.srht import SrhtSketch


@runtime_checkable
class BoundSketch(LinearMap, Protocol):
    """A linear map R^P -> R^K that keeps inner products in expectation; equal fields mean the same map."""

    @property
    def scheme(self) -> Mapping[str, object]:
        """name, version, seed, dim and what else the map depends on: see `check_comparable`."""
        ...

    def materialize(self, parameter: str, shape: tuple[int, int]) -> Tensor:
        """[R C, K] float32, for a parameter seen as R rows and C columns: the definition."""
        ...


@runtime_checkable
class Sketch(Protocol):
    """The settings of a sketch, which become a map once the parameters are known."""

    def bind(self, sizes: Mapping[str, int]) -> BoundSketch:
        """The map of these parameters, of so many entries each.

        Raises: GradscaleError if K does not fit them.
        """
        ...


SKETCHES: dict[str, Callable[[int, int], Sketch]] = {
    "count": CountSketch,
    "gaussian": GaussianSketch,
    "rademacher": RademacherSketch,
    "sjlt": SjltSketch,
    "srht": SrhtSketch,
    "kronecker": KroneckerSketch,
    "identity": IdentitySketch,
    "default": CountSketch,
}


def parse_sketch(text: str, seed: int) -> Sketch:
    """The sketch that `NAME:K` names, or plain `identity`.

    Raises: GradscaleError if there is no such scheme or K is not a positive number.
    """
    name, _, dim = text.partition(":")
    if text == "identity":
        return IdentitySketch(seed=seed)
    if name not in SKETCHES or not dim.isdecimal():
        raise GradscaleError(f"sketch must be NAME:K with NAME in {', '.join(SKETCHES)}, got {text!r}")
    return SKETCHES[name](int(dim), seed)


def check_comparable(a: Mapping[str, object], b: Mapping[str, object]) -> None:
    """Raises: GradscaleError naming the fields in which the schemes differ: products of such sketches mean nothing."""
    differing = [f"{field} {a.get(field)} and {b.get(field)}" for field in differing_fields(a, b)]
    if differing:
        raise GradscaleError(
            f"sketches that are compared must be of the same scheme, got {', '.join(differing)}; "
            "measure again with the same --sketch and --seed"
        )


def differing_fields(a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    """In what two schemes differ; empty if sketches of the two may be compared."""
    return [field for field in {**a, **b} if a.get(field) != b.get(field)]
