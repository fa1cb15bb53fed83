"""What may be read from per-example gradients while they exist, and the pass that reads it.

A reading is a frozen setting. A measure names the readings that it needs; one forward and backward pass
takes the union of them, parameter by parameter.

Shapes: B examples, L parameters, P entries of one parameter, K outputs of a linear map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gradscale.grads.capture import capture
from gradscale.grads.coverage import Site
from gradscale.grads.layer import LayerGrads, wide_dtype
from gradscale.grads.sweep import Request, read
from gradscale.grads.waiting import Doubts, sent


@runtime_checkable
class LinearMap(Protocol):
    """A fixed linear map from gradients to K numbers, additive over parameters. Frozen and hashable."""

    @property
    def dim(self) -> int: ...

    def apply(self, parameter: str, grads: LayerGrads) -> Tensor:
        """[B, K]: the part of the map that belongs to `parameter`."""
        ...


@runtime_checkable
class DenseMap(LinearMap, Protocol):
    """A linear map given by its matrix, which is read in blocks in the same sweep as everything else."""

    def rows(self, parameter: str, start: int, stop: int, device: torch.device) -> Tensor:
        """[stop - start, K]: the rows of the matrix that belong to these entries of `parameter`."""
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


Totals = dict[GradientSums, dict[int | None, dict[str, Tensor]]]


class Readings(NamedTuple):
    """What one pass over B examples has read. Non-finite examples have finite=False and no part in the sums."""

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
    exclude: Tensor | None = None,
    totals: Totals | None = None,
    doubts: Doubts | None = None,
) -> Readings:
    """Take `readings` of the B gradients in one forward and backward pass.

    An example counts as finite if its loss and the squared norm of its gradient are. Examples flagged in `exclude`
    [B] are read as zero and not finite. Sums are added to `totals`, which may hold those of other examples; if an
    example that was not excluded turns out not to be finite, they are spoilt, and the caller begins anew; likewise if
    the `doubts` turn out justified. With `doubts`, and `labels` that are on the host, nothing waits for the device but
    what a module's first call has to decide.
    Raises: GradscaleError as `capture`.
    """
    reader = _Reader(parameters, batch_size, frozenset(readings), labels, {} if totals is None else totals)
    values = capture(model, sites, losses, batch_size, reader.read, exclude, doubts)
    finite = values.isfinite() & reader.sq_norms.isfinite().all(dim=1)
    if exclude is not None:
        finite &= ~exclude
    return Readings(values.double(), finite, reader.sq_norms, reader.totals, reader.projections)


class _Reader:
    """Takes the readings of one parameter after another."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        batch_size: int,
        readings: frozenset[Reading],
        labels: Tensor | None,
        totals: Totals,
    ) -> None:
        device = next(iter(parameters.values())).device
        self.totals = totals
        self._weights = _weights(readings, labels, device)
        for reading, groups in self._weights.items():
            for group in groups:
                _fill(totals.setdefault(reading, {}).setdefault(group, {}), parameters)
        self._norms = torch.zeros(len(parameters), batch_size, dtype=torch.float64, device=device)
        self._row = {name: j for j, name in enumerate(parameters)}
        self.projections = {
            reading: torch.zeros(batch_size, reading.map.dim, dtype=torch.float64, device=device)
            for reading in readings
            if isinstance(reading, Projected)
        }

    @property
    def sq_norms(self) -> Tensor:
        return self._norms.T

    def read(self, name: str, grads: LayerGrads) -> None:
        sums = tuple(
            (weights, self.totals[reading][group][name])
            for reading, groups in self._weights.items()
            for group, weights in groups.items()
        )
        products = tuple(
            (partial(_rows, reading.map, name, grads.device), total)
            for reading, total in self.projections.items()
            if isinstance(reading.map, DenseMap)
        )
        read(grads, Request(self._norms[self._row[name]], sums, products))
        for reading, total in self.projections.items():
            if not isinstance(reading.map, DenseMap):
                total += reading.map.apply(name, grads)


def _rows(dense: DenseMap, name: str, device: torch.device, start: int, stop: int) -> Tensor:
    return dense.rows(name, start, stop, device)


def _fill(sums: dict[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if name not in sums:
            dtype = wide_dtype(parameter.dtype)
            sums[name] = torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)


def _weights(
    readings: frozenset[Reading], labels: Tensor | None, device: torch.device
) -> dict[GradientSums, dict[int | None, Tensor | None]]:
    """The weights [B] of every sum asked for: None for one each, or those that pick the examples of a class."""
    found: dict[GradientSums, dict[int | None, Tensor | None]] = {}
    for reading in readings:
        if isinstance(reading, GradientSums) and reading.by_class:
            assert labels is not None, "sums by class need labels"
            there = sent(labels, device)
            found[reading] = {c: (there == c).float() for c in labels.unique().tolist()}
        elif isinstance(reading, GradientSums):
            found[reading] = {None: None}
    return found
