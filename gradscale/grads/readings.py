"""What may be read from per-example gradients while they exist, and the passes that read it.

A reading is a frozen setting. A measure names the readings that it needs; one forward and backward pass
takes the union of them, parameter by parameter. Sums that weigh gradients by their norms alone need another pass,
since a gradient's norm is known only when the first is over.

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
from gradscale.grads.sweep import Fold, Request, empty_sums, read
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


@runtime_checkable
class TiledMap(LinearMap, Protocol):
    """A linear map that reads the gradients' entries in the same sweep as everything else."""

    def fold(self, parameter: str, shape: tuple[int, int], device: torch.device) -> Fold:
        """The part of the map that belongs to `parameter`, of R x C entries."""
        ...


@dataclass(frozen=True)
class SquaredNorms:
    """The squared norm of every example's gradient, per parameter: [B, L]. Always taken."""


@dataclass(frozen=True)
class GradientSums:
    """The sum of the examples' gradients, per parameter: [P]; by class where asked for.

    With `unit`, of their directions g_b / |g_b|, where |g_b| is the norm over all measured parameters. Examples of
    zero gradient have none and add nothing; `has_direction` tells which have one. With `min_norm`, only of the examples
    with |g_b| > min_norm; `has_norm_above` tells which these are. Cost of either: one forward and backward pass more,
    in which nothing else is read, however many such sums are asked for.
    """

    by_class: bool = False
    unit: bool = False
    min_norm: float | None = None

    @property
    def weighs_by_norm(self) -> bool:
        """Whether an example's weight is known only when its norm is: when the first pass is over."""
        return self.unit or self.min_norm is not None


@dataclass(frozen=True)
class Projected:
    """The image of every example's gradient under a linear map: [B, K]."""

    map: LinearMap


Reading = SquaredNorms | GradientSums | Projected
Sums = Mapping[int | None, Mapping[str, Tensor]]  # class (None: all) -> parameter -> [P]
Totals = dict[GradientSums, dict[int | None, dict[str, Tensor]]]
Weights = dict[GradientSums, dict[int | None, Tensor | None]]  # [B] of each sum; None: one each


class Readings(NamedTuple):
    """What has been read from B examples. Non-finite examples have finite=False and no part in the sums."""

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
    """Take `readings` of the B gradients in one forward and backward pass, or in two: see `passes`.

    An example counts as finite if its loss and the squared norm of its gradient are. Examples flagged in `exclude`
    [B] are read as zero and not finite. Sums are added to `totals`, which may hold those of other examples; if an
    example that was not excluded turns out not to be finite, they are spoilt, and the caller begins anew; likewise if
    the `doubts` turn out justified. With `doubts`, and `labels` that are on the host, nothing waits for the device but
    what a module's first call has to decide. `losses` must give the same in both passes.
    Raises: GradscaleError as `capture`.
    """
    asked, totals = frozenset(readings), {} if totals is None else totals
    reader = reader_of(parameters, batch_size, asked, labels, totals)
    values = capture(model, sites, losses, batch_size, reader.read, exclude, doubts)
    finite = values.isfinite() & reader.sq_norms.sum(dim=1).isfinite()
    if exclude is not None:
        finite &= ~exclude
    if passes(asked) > 1:
        classes = _members(asked, labels, finite.device)
        sums = _Sums(parameters, _weights(asked, classes, _Norms(reader.sq_norms, finite)), totals)
        capture(model, sites, losses, batch_size, sums.read, exclude, doubts)
    return Readings(values.double(), finite, reader.sq_norms, totals, reader.projections)


def passes(readings: Iterable[Reading]) -> int:
    """How many forward and backward passes it takes to read them: two with sums that weigh by norms, else one."""
    return 2 if any(isinstance(reading, GradientSums) and reading.weighs_by_norm for reading in readings) else 1


def has_direction(sq_norms: Tensor) -> Tensor:
    """[B]: which of the gradients with these squared norms [B, L] have a part in the sums of unit gradients.

    Those of zero gradient have none, nor those whose squares are too small for the dtype that the gradients are in:
    in float32, with entries below 1e-22.
    """
    return (sq_norms > 0).any(dim=1)


def has_norm_above(sq_norms: Tensor, min_norm: float) -> Tensor:
    """[B]: which of the gradients with these squared norms [B, L] have a part in the sums of those above `min_norm`.

    In float32, a gradient with entries below 1e-22 has norm zero, which is above nothing.
    """
    total = torch.zeros_like(sq_norms[:, 0])
    for part in sq_norms.unbind(dim=1):  # one after another: the same bits for any layout of the rows
        total += part
    return total > min_norm**2


def reader_of(
    parameters: Mapping[str, Tensor],
    batch_size: int,
    readings: Iterable[Reading],
    labels: Tensor | None,
    totals: Totals,
) -> Reader:
    """What takes `readings` of one pass; of `parameters` only shapes, types and the device are asked for."""
    asked = frozenset(readings)
    classes = _members(asked, labels, next(iter(parameters.values())).device)
    return Reader(parameters, batch_size, asked, _Sums(parameters, _weights(asked, classes), totals))


class _Sums:
    """Adds up weighted gradients of one parameter after another."""

    def __init__(self, parameters: Mapping[str, Tensor], weights: Weights, totals: Totals) -> None:
        self._weights, self._totals = weights, totals
        for reading, groups in weights.items():
            for group in groups:
                _fill(totals.setdefault(reading, {}).setdefault(group, {}), parameters)

    def of(self, name: str, dtype: torch.dtype) -> tuple[tuple[Tensor | None, Tensor], ...]:
        """The weights [B] and the total [P] of every sum, for a `Request`."""
        return tuple(
            (None if weights is None else _narrowed(weights, dtype), self._totals[reading][group][name])
            for reading, groups in self._weights.items()
            for group, weights in groups.items()
        )

    def read(self, name: str, grads: LayerGrads) -> None:
        read(grads, Request(None, self.of(name, grads.dtype), ()))


class Reader:
    """Takes the readings of one parameter after another, `sums` among them."""

    def __init__(
        self, parameters: Mapping[str, Tensor], batch_size: int, readings: frozenset[Reading], sums: _Sums
    ) -> None:
        device = next(iter(parameters.values())).device
        self._sums = sums
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
        products = tuple(
            (partial(_rows, reading.map, name, grads.device), total)
            for reading, total in self.projections.items()
            if isinstance(reading.map, DenseMap)
        )
        tiled = {
            reading: reading.map.fold(name, grads.shape[1:], grads.device)
            for reading in self.projections
            if isinstance(reading.map, TiledMap)
        }
        folds = tuple((fold, empty_sums(fold, grads)) for fold in tiled.values())
        read(grads, Request(self._norms[self._row[name]], self._sums.of(name, grads.dtype), products, folds))
        for reading, (fold, sums) in zip(tiled, folds, strict=True):
            fold.finish(sums, self.projections[reading])
        for reading, total in self.projections.items():
            if not isinstance(reading.map, DenseMap | TiledMap):
                total += reading.map.apply(name, grads)


def _rows(dense: DenseMap, name: str, device: torch.device, start: int, stop: int) -> Tensor:
    return dense.rows(name, start, stop, device)


def _fill(sums: dict[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if name not in sums:
            dtype = wide_dtype(parameter.dtype)
            sums[name] = torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)


def _members(readings: frozenset[Reading], labels: Tensor | None, device: torch.device) -> dict[int, Tensor]:
    """Of every class, which examples [B] are in it; empty if no reading asks."""
    if not any(isinstance(reading, GradientSums) and reading.by_class for reading in readings):
        return {}
    assert labels is not None, "sums by class need labels"
    there = sent(labels, device)
    return {c: there == c for c in labels.unique().tolist()}


class _Norms(NamedTuple):
    """What the first pass has found out."""

    sq_norms: Tensor  # [B, L]
    finite: Tensor  # [B] bool


def _weights(readings: frozenset[Reading], members: Mapping[int, Tensor], norms: _Norms | None = None) -> Weights:
    """The weights of the sums that weigh by norms if `norms` are given, of the other sums if not."""
    found: Weights = {}
    for reading in readings:
        if isinstance(reading, GradientSums) and reading.weighs_by_norm == (norms is not None):
            weights = None if norms is None else _weights_of(reading, norms)
            by_class: dict[int | None, Tensor | None] = {
                c: member if weights is None else weights * member for c, member in members.items()
            }
            found[reading] = by_class if reading.by_class else {None: weights}
    return found


def _weights_of(reading: GradientSums, norms: _Norms) -> Tensor:
    """[B] float64: 1, or 1 / |g_b|; and 0 for gradients that are not finite or have no part in the sum."""
    sq_norms, has_part = norms
    weights = torch.ones_like(sq_norms[:, 0])
    if reading.unit:
        has_part = has_part & has_direction(sq_norms)
        weights = sq_norms.clamp(min=0).sum(dim=1).rsqrt()  # a Gram matrix may round below zero
    if reading.min_norm is not None:
        has_part = has_part & has_norm_above(sq_norms, reading.min_norm)
    return weights.where(has_part, 0.0)


def _narrowed(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """`weights` in the dtype of the tiles. Where 1 / |g| overflows it, the squares of g are zero in it: so is g."""
    return weights.to(dtype).nan_to_num(posinf=0.0)
