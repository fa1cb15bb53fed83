"""What may be read from per-example gradients while they exist, and the pass that reads it.

A reading is a frozen setting. A measure names the readings that it needs; one forward and backward pass
takes the union of them.

Shapes: B examples, L parameters, P entries of one parameter, K outputs of a linear map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gradscale.grads.capture import capture
from gradscale.grads.coverage import Site
from gradscale.grads.layer import LayerGrads


@runtime_checkable
class LinearMap(Protocol):
    """A fixed linear map from gradients to K numbers, additive over parameters. Frozen and hashable."""

    @property
    def dim(self) -> int: ...

    def apply(self, parameter: str, grads: LayerGrads) -> Tensor:
        """[B, K]: the part of the map that belongs to `parameter`."""
        ...


@dataclass(frozen=True)
class SquaredNorms:
    """The squared norm of every example's gradient, per parameter: [B, L]. Always taken."""


@dataclass(frozen=True)
class GradientSums:
    """The sum of the examples' gradients, per parameter: [P]; by class where asked for."""

    by_class: bool = False


@dataclass(frozen=True)
class Projected:
    """The image of every example's gradient under a linear map: [B, K]."""

    map: LinearMap


Reading = SquaredNorms | GradientSums | Projected
Sums = Mapping[int | None, Mapping[str, Tensor]]  # class (None: all) -> parameter -> [P]


class Readings(NamedTuple):
    """What one pass over a microbatch has read. Non-finite examples have finite=False and no part in the sums."""

    losses: Tensor  # [B] float64
    finite: Tensor  # [B] bool
    sq_norms: Tensor  # [B, L] float64, in the order of the parameters asked for
    sums: Mapping[GradientSums, Sums]
    projections: Mapping[Projected, Tensor]  # [B, K] float64


def read_gradients(
    model: nn.Module,
    sites: Sequence[Site],
    parameters: Mapping[str, nn.Parameter],
    losses: Callable[[nn.Module], Tensor],
    batch_size: int,
    readings: Iterable[Reading],
    labels: Tensor | None = None,
) -> Readings:
    """Take `readings` of the B gradients in one pass; a second pass follows only if an example is not finite.

    An example counts as finite if its loss and the squared norm of its gradient are.
    Raises: GradscaleError as `capture`.
    """
    exclude: Tensor | None = None
    while True:
        reader = _Reader(parameters, batch_size, frozenset(readings), labels, exclude)
        values = capture(model, sites, losses, batch_size, reader.read, exclude)
        finite = values.isfinite() & reader.sq_norms.isfinite().all(dim=1)
        if exclude is not None:
            finite &= ~exclude
        if finite.all() or (exclude is not None and bool((finite == ~exclude).all())):
            return reader.result(values, finite)
        exclude = ~finite


class _Reader:
    """Adds up what is read from one parameter after another."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        batch_size: int,
        readings: frozenset[Reading],
        labels: Tensor | None,
        exclude: Tensor | None,
    ) -> None:
        device = next(iter(parameters.values())).device
        self._column = {name: j for j, name in enumerate(parameters)}
        self._parameters = parameters
        self._readings = readings
        self._exclude = exclude
        self._groups = _groups(readings, labels, batch_size, device)
        self.sq_norms = torch.zeros(batch_size, len(parameters), dtype=torch.float64, device=device)
        self.sums: dict[GradientSums, dict[int | None, dict[str, Tensor]]] = {
            reading: {group: {} for group in groups} for reading, groups in self._groups.items()
        }
        self.projections = {
            reading: torch.zeros(batch_size, reading.map.dim, dtype=torch.float64, device=device)
            for reading in readings
            if isinstance(reading, Projected)
        }

    def read(self, name: str, grads: LayerGrads) -> None:
        self.sq_norms[:, self._column[name]] = grads.sq_norms().double()
        for reading, groups in self._groups.items():
            for group, weights in groups.items():
                self.sums[reading][group][name] = grads.weighted_sum(weights)
        for projected, total in self.projections.items():
            total += projected.map.apply(name, grads)

    def result(self, losses: Tensor, finite: Tensor) -> Readings:
        for groups in self.sums.values():
            for sums in groups.values():
                for name, parameter in self._parameters.items():
                    if name not in sums:  # no part in these losses: its gradient is zero
                        sums[name] = torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
        return Readings(losses.double(), finite, self.sq_norms, self.sums, self.projections)


def _groups(
    readings: frozenset[Reading], labels: Tensor | None, batch_size: int, device: torch.device
) -> dict[GradientSums, dict[int | None, Tensor]]:
    """The weights [B] of every sum asked for: all examples, or those of one class."""
    everyone = torch.ones(batch_size, device=device)
    found: dict[GradientSums, dict[int | None, Tensor]] = {}
    for reading in readings:
        if isinstance(reading, GradientSums) and reading.by_class:
            assert labels is not None, "sums by class need labels"
            found[reading] = {int(c): (labels == c).to(everyone.dtype) for c in torch.unique(labels)}
        elif isinstance(reading, GradientSums):
            found[reading] = {None: everyone}
    return found
