"""Passes that weigh a task's outputs: sum_i J_i^T v_i and |J_i^T v_i|^2, J_i the Jacobian of the outputs at example i.

The scalar <v_i, f(x_i)> takes the place of the loss, so that the same hooks and rules read its gradient J_i^T v_i.

Shapes: B examples, C outputs, L parameters, P entries of one parameter, N probes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradscale.errors import GradscaleError
from gradscale.grads.readings import GradientSums, Reading, Readings, SquaredNorms
from gradscale.grads.subject import Subject, read_batch
from gradscale.measures.grouped import SEPARATOR, added
from gradscale.measures.outputs import output_signs, outputs, targets
from gradscale.measures.probe_means import ProbeMeans, add_means, means_of
from gradscale.task import Batch

NAME = "tangent_kernel"
TARGET = "target"  # the vector y among the vectors of weights


class TangentState(NamedTuple):
    """A commutative monoid. The keys of `totals` and `examples` are scopes, of the others vectors of weights.

    A vector w gives every example a weight w_i [C]; it is the target y, a probe, or a single output's one.
    """

    totals: Mapping[str, Tensor]  # [3, D], see `ProbeMeans`, of |J_i^T v|^2
    examples: Mapping[str, Tensor]  # [] int64
    gradients: Mapping[str, Tensor]  # `vector|parameter`: [P] float64, sum_i J_i^T w_i
    weights: Mapping[str, Tensor]  # [C] float64, sum_i w_i
    products: Mapping[str, Tensor]  # [] float64, sum_i <w_i, y_i>


@dataclass(frozen=True)
class TangentPasses:
    """N probes, keyed by (seed, example id, probe); with `alignment` also the target, if `centred` each output too.

    Cost: N forward and backward passes; with alignment 1 more, and C more if centred, and as many times P numbers.
    """

    num_probes: int
    seed: int
    alignment: bool
    centred: bool

    @property
    def cost(self) -> str:
        passes = f"{self.num_probes + self.alignment} forward and backward passes"
        more = ", one more for each output," if self.alignment and self.centred else ""
        return f"{passes}{more} of task.outputs" + (" and as many sums of gradients" if self.alignment else "")

    def gather(self, subject: Subject, batch: Batch, ids: range, keep: Tensor) -> TangentState:
        """Raises: GradscaleError if the task lacks outputs, or targets and labels where there is alignment."""
        vectors = dict(self._vectors(subject, batch, ids))
        found = {name: self._read(subject, batch, weigh, keep) for name, weigh in vectors.items()}
        finite = torch.stack([pair.readings.finite for pair in found.values()]).all(dim=0)
        if bool((keep & ~finite).any()):
            return self.gather(subject, batch, ids, keep & finite)
        probes = [found[probe_name(j)] for j in range(self.num_probes)]
        means = _means(tuple(subject.parameters), [pair.readings.sq_norms[keep] for pair in probes])
        totals = {scope: part.totals for scope, part in means.items()}
        state = TangentState(totals, {scope: part.examples for scope, part in means.items()}, {}, {}, {})
        return state._replace(**self._sums(found, keep)) if self.alignment else state

    def merge(self, left: TangentState, right: TangentState) -> TangentState:
        scopes = left.totals.keys() | right.totals.keys()
        both = {scope: _merged_means(left, right, scope) for scope in sorted(scopes)}
        return TangentState(
            {scope: part.totals for scope, part in both.items()},
            {scope: part.examples for scope, part in both.items()},
            _added(left.gradients, right.gradients),
            _added(left.weights, right.weights),
            _added(left.products, right.products),
        )

    def _vectors(self, subject: Subject, batch: Batch, ids: range) -> Iterator[tuple[str, _Weigh]]:
        """Of every pass, its name and what makes its weights [B, C] from the outputs."""
        for probe in range(self.num_probes):
            yield probe_name(probe), partial(output_signs, ids, probe, self.seed)
        if not self.alignment:
            return
        with torch.no_grad():
            size = outputs(subject, batch, NAME).shape[1]
        y = targets(subject, batch, size, NAME)
        yield TARGET, partial(_as, y)
        for c in range(size if self.centred else 0):
            yield output_name(c), partial(_one_output, c)

    def _read(self, subject: Subject, batch: Batch, weigh: _Weigh, keep: Tensor) -> _Pass:
        used: list[Tensor] = []

        def scores(model: nn.Module) -> Tensor:
            found = outputs(subject, batch, NAME)
            used[:] = [weigh(found)]
            return (found * used[0]).sum(dim=1)

        asked: set[Reading] = {SquaredNorms(), GradientSums()} if self.alignment else {SquaredNorms()}
        readings = read_batch(subject, batch, asked, exclude=~keep, scalars=scores)
        return _Pass(readings, used[0].double())

    def _sums(self, found: Mapping[str, _Pass], keep: Tensor) -> dict[str, dict[str, Tensor]]:
        y = found[TARGET].weights
        gradients = {
            f"{name}{SEPARATOR}{parameter}": total.double().cpu()
            for name, pair in found.items()
            for parameter, total in pair.readings.sums[GradientSums()][None].items()
        }
        vectors = {name: pair.weights[keep] for name, pair in found.items() if not name.startswith(_OUTPUT)}
        weights = {name: w.sum(dim=0).cpu() for name, w in vectors.items()} if self.centred else {}
        products = {name: (w * y[keep]).sum().cpu() for name, w in vectors.items()}
        return {"gradients": gradients, "weights": weights, "products": products}


class _Pass(NamedTuple):
    readings: Readings
    weights: Tensor  # [B, C] float64


_Weigh = Callable[[Tensor], Tensor]
_OUTPUT = "output:"


def probe_name(probe: int) -> str:
    return f"probe:{probe:04d}"


def output_name(output: int) -> str:
    return f"{_OUTPUT}{output:04d}"


def no_tangents() -> TangentState:
    return TangentState({}, {}, {}, {}, {})


def _as(weights: Tensor, found: Tensor) -> Tensor:
    return weights.to(found.dtype)


def _one_output(output: int, found: Tensor) -> Tensor:
    chosen = torch.zeros_like(found)
    chosen[:, output] = 1
    return chosen


def _means(names: tuple[str, ...], sq_norms: list[Tensor]) -> dict[str, ProbeMeans]:
    """Of the squared norms [B, L] of each probe, by scope."""
    stacked = torch.stack(sq_norms, dim=2)  # [B, L, N]
    layers = {f"layer:{name}": means_of(stacked[:, j]) for j, name in enumerate(names)}
    return {"all": means_of(stacked.sum(dim=1)), **layers}


def _merged_means(left: TangentState, right: TangentState, scope: str) -> ProbeMeans:
    parts = [ProbeMeans(s.totals[scope], s.examples[scope]) for s in (left, right) if scope in s.totals]
    return parts[0] if len(parts) == 1 else add_means(*parts)


def _added(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for key in left.keys() & right.keys():
        if left[key].shape != right[key].shape:
            raise GradscaleError(
                f"outputs must be as many for every example for a centred alignment, got {len(left[key])} and "
                f"{len(right[key])}; set centred=false"
            )
    return added(left, right)
