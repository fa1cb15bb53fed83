"""The ways in which products can be had, and which of them a model allows.

Shapes: P entries, k vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gradscale.curvature.calibrate import QUANTITIES, calibrate
from gradscale.curvature.gauss_newton import add_gauss_newton, add_gauss_newton_backward, check_split
from gradscale.curvature.layout import gaussian
from gradscale.curvature.products import add_differences, add_double_backward, add_forward_over_backward
from gradscale.curvature.stream import Microbatch, Stream
from gradscale.errors import GradscaleError
from gradscale.grads.subject import Subject


class Backend(Protocol):
    @property
    def name(self) -> str: ...

    def add(self, stream: Stream, vectors: Tensor, total: Tensor) -> None:
        """Add sum_i w_i M_i v for every row v of `vectors` [k, P] to `total` [k, P] float64."""
        ...


@dataclass(frozen=True)
class Exact:
    """By derivatives of one microbatch after another, with a function of `products` or `gauss_newton`."""

    name: str
    of_microbatch: Callable[[Subject, Microbatch, Tensor, Tensor], None]

    def add(self, stream: Stream, vectors: Tensor, total: Tensor) -> None:
        for microbatch in stream:
            self.of_microbatch(stream.subject, microbatch, vectors, total)


DOUBLE_BACKWARD = Exact("double_backward", add_double_backward)
FORWARD_OVER_BACKWARD = Exact("forward_over_backward", add_forward_over_backward)
FORWARD_JACOBIAN = Exact("forward_jacobian", add_gauss_newton)
BACKWARD_JACOBIAN = Exact("backward_jacobian", add_gauss_newton_backward)
GAUSS_NEWTON = (FORWARD_JACOBIAN, BACKWARD_JACOBIAN)


@dataclass(frozen=True)
class FiniteDifferences:
    """`add_differences` with steps of `eps` |theta|. Raises: GradscaleError unless eps is from 0 to 1."""

    eps: float

    name = "finite_differences"

    def __post_init__(self) -> None:
        if not 0 < self.eps < 1:
            raise GradscaleError(
                f"eps must be a step relative to the norm of the weights, between 0 and 1, got {self.eps}; "
                "let `calibrate` choose it"
            )

    def add(self, stream: Stream, vectors: Tensor, total: Tensor) -> None:
        for vector, row in zip(vectors, total, strict=True):
            add_differences(stream, vector, self.eps, row)


_Attempt = Callable[[], tuple[Backend, float]]


class Choice(NamedTuple):
    """A way, and what is known of it; kept beside what is computed with it."""

    backend: Backend
    error: float  # estimated, relative: asymmetry of an exact way, of finite differences that for the quantity
    refused: Mapping[str, str]  # the ways tried before it, and why each does not serve


BACKENDS = ("auto", DOUBLE_BACKWARD.name, FORWARD_OVER_BACKWARD.name, FiniteDifferences.name)


def choose_hessian(stream: Stream, asked: str = "auto", quantity: str = "vector", seed: int = 0) -> Choice:
    """The way for Hessian products: `asked`, or for "auto" the first that the model allows, in the order of `BACKENDS`.

    It is tried on the first microbatch with two random vectors. A model whose attention, compiled code or checkpoints
    have no second derivative is left to finite differences, with the step that is best for `quantity`.
    Raises: GradscaleError if there is no such way, or the model does not allow it.
    """
    if asked not in BACKENDS:
        raise GradscaleError(f"backend must be one of {', '.join(BACKENDS)}, got {asked!r}")
    if quantity not in QUANTITIES:
        raise GradscaleError(f"quantity must be one of {', '.join(QUANTITIES)}, got {quantity!r}")

    def differences() -> tuple[Backend, float]:
        step = calibrate(stream.first, seed)[quantity]
        return FiniteDifferences(step.eps), step.error

    exact = {way.name: partial(_exact, stream, way, seed) for way in (DOUBLE_BACKWARD, FORWARD_OVER_BACKWARD)}
    ways: dict[str, _Attempt] = exact | {FiniteDifferences.name: differences}
    return _first(ways if asked == "auto" else {asked: ways[asked]}, "Hessian products")


def choose_gauss_newton(stream: Stream, seed: int = 0) -> Choice:
    """The way for Gauss-Newton products, forward mode where every operation has it.

    Raises: GradscaleError if the loss is not a function of the outputs, or the model has neither derivative.
    """

    def attempt(way: Exact) -> tuple[Backend, float]:
        check_split(stream.subject, next(iter(stream.first)))
        return _exact(stream, way, seed)

    ways = {way.name: partial(attempt, way) for way in GAUSS_NEWTON}
    return _first(ways, "Gauss-Newton products")


def _first(ways: Mapping[str, _Attempt], what: str) -> Choice:
    refused: dict[str, str] = {}
    for name, attempt in ways.items():
        try:
            backend, error = attempt()
        except (RuntimeError, NotImplementedError) as problem:  # torch's; a GradscaleError is neither
            refused[name] = f"{problem}".strip().splitlines()[0][:200]
        else:
            return Choice(backend, error, refused)
    raise GradscaleError(
        f"{what} must be possible in one of the ways tried, got "
        + "; ".join(f"{name}: {why}" for name, why in refused.items())
        + "; take another attention, leave torch.compile out, or backend auto"
    )


def _exact(stream: Stream, backend: Backend, seed: int) -> tuple[Backend, float]:
    return backend, asymmetry(stream.first, backend, seed)


def asymmetry(stream: Stream, backend: Backend, seed: int) -> float:
    """|u^T M v - v^T M u| / (|M u|^2 + |M v|^2)^(1/2) for standard normal u and v: relative, in the Frobenius norm.

    Given M v, u^T M v has the standard deviation |M v| over u, so that a part of M of relative size e that is not
    symmetric shows as about e, however large P is.
    """
    layout = stream.layout
    vectors = gaussian(layout, range(layout.size), seed, [0, 1], stream.subject.device)
    total = torch.zeros(vectors.shape, dtype=torch.float64, device=vectors.device)
    backend.add(stream, vectors, total)
    u, v = vectors.double()
    scale = float(total.norm())
    return float((u @ total[1] - v @ total[0]).abs()) / scale if scale else 0.0
