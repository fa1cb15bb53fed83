"""How far the stored sketches of a run are off, measured against exact inner products of a few gradients.

In the first shard of every step, the microbatches it begins with are passed through the model once more, and the
exact Gram matrix of up to 16 of their examples is added up parameter by parameter, tile by tile. What comes out
depends on the data, the microbatch size and the sketch alone, not on the number of workers.

Cost a step: one microbatch more (several, if it is smaller than 16), and 256 products an entry of a parameter.

Shapes: B examples of a microbatch, b of them compared, R x C entries of a parameter, r rows in a tile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradscale.grads.capture import capture
from gradscale.grads.layer import LayerGrads
from gradscale.grads.readings import Reading
from gradscale.grads.subject import Subject, load_batch
from gradscale.measures.gaussian_width import mean_and_error
from gradscale.measures.measure import Estimate, Estimates, MicroBatch
from gradscale.run.memory import explaining_memory
from gradscale.store.narrow import Narrowed
from gradscale.store.sketches import cosine_error
from gradscale.task import batch_size

EXAMPLES = 16
_TILE_ENTRIES = 1 << 22  # of all examples together: 16 MB of float32


class ErrorState(NamedTuple):
    """Of every example compared, sums over its partners: those with which it has a cosine, in its microbatch."""

    partners: Tensor  # [n] float64: how many
    squares: Tensor  # [n] float64: (sketched cosine - exact cosine)^2
    expected: Tensor  # [n] float64: the variance that the scheme states
    ratios: Tensor  # [n] float64: |Sx|^2 / |x|^2; NaN of a zero gradient
    zeroed: Tensor  # [n] float64: the share of the sketch's nonzero entries that are stored as zero


@dataclass(frozen=True)
class SketchError:
    """The error of cosines <Sx, Sy> / (|x| |y|), with exact norms, of stored sketches of the scheme `name`:`dim`.

    cosine_rms_error = sqrt(mean over pairs of (sketched - exact cosine)^2), rounding to the stored type included;
    its standard error is that of the delete-one-example jackknife. cosine_expected_error = sqrt(mean (1 + c^2) / K)
    over the same pairs, c the exact cosine: the dense Gaussian's. norm_bias = mean of |Sx|^2 / |x|^2, less 1. A
    zero gradient has no cosine and no ratio: it is left out and counted.
    """

    scheme: str
    dim: int

    name = "sketch_error"
    summary = "error of the stored sketches' cosines, on 16 examples against exact products; one microbatch more"

    @property
    def needs(self) -> frozenset[Reading]:
        return frozenset()

    def init(self) -> ErrorState:
        return ErrorState(*(torch.zeros(0, dtype=torch.float64) for _ in ErrorState._fields))

    def update(self, state: ErrorState, batch: MicroBatch) -> ErrorState:
        """Readings of a microbatch hold no products of pairs: `sample` has a pass of its own."""
        return state

    def merge(self, left: ErrorState, right: ErrorState) -> ErrorState:
        return ErrorState(*(torch.cat(pair) for pair in zip(left, right, strict=True)))

    def compute(self, state: ErrorState) -> Estimates:
        pairs, n = int(state.partners.sum()) // 2, len(state.partners)
        ratios = state.ratios[~state.ratios.isnan()]
        zeros = n - len(ratios)
        expected = _rms(state.expected, state.partners)
        found = {
            "cosine_rms_error": Estimate(*_rms_and_error(state), pairs, "estimator", _definition("pairs"), "1"),
            "cosine_expected_error": Estimate(expected, None, pairs, "estimator", _definition("pairs"), "1"),
            "norm_bias": Estimate(*mean_and_error(ratios - 1), len(ratios), "estimator", _definition("examples"), "1"),
            "zero_gradients": Estimate(float(zeros), None, n, "identity", _definition("examples"), "examples"),
            "entries_underflown": Estimate(_mean(state.zeroed), None, n, "identity", _definition("examples"), "1"),
        }
        return {(name, "all"): estimate for name, estimate in found.items()}

    def sample(self, subject: Subject, ids: range, microbatch: int, finite: Tensor, sketches: Narrowed) -> ErrorState:
        """The state of the first EXAMPLES finite examples of a shard `ids`; its sketches are `sketches` [n, K]."""
        states = [self.init()]
        for start in range(0, min(len(ids), EXAMPLES), microbatch):
            part = slice(start, min(start + microbatch, len(ids)))
            kept = finite[part].nonzero()[:, 0][: EXAMPLES - start]
            if len(kept):
                with explaining_memory(microbatch):
                    exact = exact_gram(subject, ids[part], finite[part], kept)
                rows = kept + start
                states.append(self._compared(exact, sketches.matrix[rows].double(), sketches.zeroed[rows]))
        return reduce(self.merge, states)

    def _compared(self, exact: Tensor, sketches: Tensor, zeroed: Tensor) -> ErrorState:
        """Of b examples with exact products [b, b] and sketches [b, K]."""
        sq_norms = exact.diagonal()
        lengths = sq_norms.sqrt()
        directed = sq_norms > 0
        paired = (directed[:, None] & directed).fill_diagonal_(False)
        scale = torch.outer(lengths, lengths)
        products = sketches @ sketches.mT
        errors = ((products - exact) / scale).square().where(paired, 0.0)
        variance = cosine_error({"name": self.scheme, "dim": self.dim}, 0.0) ** 2
        expected = (variance * (1 + (exact / scale).square())).where(paired, 0.0)
        ratios = (products.diagonal() / sq_norms).where(directed, math.nan)
        nonzero = (sketches != 0).sum(dim=1) + zeroed
        lost = zeroed.double() / nonzero.clamp(min=1)
        return ErrorState(paired.sum(dim=1).double(), errors.sum(dim=1), expected.sum(dim=1), ratios, lost)


def exact_gram(subject: Subject, ids: range, finite: Tensor, kept: Tensor) -> Tensor:
    """[b, b] float64 on the CPU: inner products of the gradients of the examples `ids`, those `kept` of them.

    Examples that are not `finite` [B] are read as zero, as in the pass that the sketches come from.
    """
    batch = load_batch(subject, ids)
    rows = kept.to(subject.device)
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=subject.device)

    def losses(model: nn.Module) -> Tensor:
        return subject.task.losses(model, batch)

    def add(name: str, grads: LayerGrads) -> None:
        _add_gram(grads, rows, int(kept[-1]) + 1, total)

    exclude = None if finite.all() else ~finite.to(subject.device)
    capture(subject.model, subject.sites, losses, batch_size(batch), add, exclude)
    return total.cpu()


def _add_gram(grads: LayerGrads, rows: Tensor, stop: int, total: Tensor) -> None:
    """Add the inner products of the examples `rows`, all below `stop`, to `total` [b, b]."""
    _, height, columns = grads.shape
    most = max(1, _TILE_ENTRIES // (stop * columns))
    for start in range(0, height, most):
        part = slice(start, min(start + most, height))
        tile = torch.empty(stop, part.stop - part.start, columns, dtype=grads.dtype, device=grads.device)
        grads.tile(slice(0, stop), part, tile)
        dense = tile.flatten(1)[rows].double()
        total.addmm_(dense, dense.mT)


def sketch_error(scheme: Mapping[str, Any]) -> SketchError:
    """The diagnostic of sketches of `scheme`."""
    return SketchError(str(scheme["name"]), int(scheme["dim"]))


def _rms_and_error(state: ErrorState) -> tuple[float, float]:
    """sqrt(sum of squares / pairs) and its jackknife over examples: without one, its pairs are gone on both sides."""
    n, total, pairs = len(state.partners), state.squares.sum() / 2, state.partners.sum() / 2
    without = ((total - state.squares) / (pairs - state.partners)).clamp(min=0).sqrt()
    spread = (without - without.mean()).square().sum() * (n - 1) / n if n > 2 else torch.tensor(math.nan)
    return _rms(state.squares, state.partners), float(spread.sqrt())


def _rms(squares: Tensor, partners: Tensor) -> float:
    return float((squares.sum() / partners.sum()).sqrt())


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan


def _definition(counted: str) -> str:
    return f"sketch_error/v1, n {counted}"
