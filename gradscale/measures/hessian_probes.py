"""Products of the Hessian of a microbatch's losses with random probes, by differentiating its gradient once more.

Shapes: B examples, N probes, P entries of one parameter, D digits of an exact sum.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.grads.functional import (
    NotTwiceDifferentiable,
    differentiable_attention,
    gradient_graph,
    hessian_products,
)
from gradscale.grads.subject import Subject
from gradscale.measures.exact_sum import add_totals, total_of
from gradscale.measures.grouped import SEPARATOR, added
from gradscale.sketches.blocks import kept
from gradscale.sketches.gaussian import TOGETHER, GaussianProbes
from gradscale.sketches.philox import key_of
from gradscale.sketches.words import entry_signs
from gradscale.task import Batch

HALVES = 2
KINDS = ("rademacher", "gaussian")
VERSION = 1
_PIECE = 1 << 18  # entries widened to float64 at a time
_TWICE = re.compile(r"differentiate twice|double backward|derivative for .* is not implemented")


class HessianState(NamedTuple):
    """A commutative monoid, of the examples taken in: H_i their Hessians, (v_j)_l the part of a parameter l of a probe.

    `totals` and `counts` have the same bits whatever the order and grouping; `products` are added in float64.
    """

    totals: Mapping[str, Tensor]  # parameter: [N, D], see `exact_sum`, of sum_i (v_j)_l^T (H_i v_j)_l
    counts: Tensor  # [2] int64: examples of even and of odd id
    products: Mapping[str, Tensor]  # `half|probe|parameter`: [P] float64, sum_i (H_i v_j)_l; empty without frobenius


def no_products() -> HessianState:
    return HessianState({}, torch.zeros(HALVES, dtype=torch.int64), {})


@dataclass(frozen=True)
class HessianProbes:
    """N probes v over the measured parameters, the same for all examples, keyed by (seed, probe, parameter, position).

    With `frobenius`, the products themselves are added up, for the examples of even and of odd id apart.
    Attention is by torch's plain kernel, which alone can be differentiated twice.
    """

    num_probes: int
    kind: str
    seed: int
    frobenius: bool

    @property
    def cost(self) -> str:
        sums = f", and {HALVES * self.num_probes} sums of products" if self.frobenius else ""
        return f"a forward pass, a backward pass that keeps its graph and {self.num_probes} through both{sums}"

    def gather(self, subject: Subject, batch: Batch, ids: range, keep: Tensor) -> HessianState:
        """Raises: GradscaleError if the losses cannot be differentiated twice."""
        examples = torch.arange(ids.start, ids.stop)[keep.cpu()]
        rows = keep.nonzero()[:, 0]
        if not self.frobenius:
            return self._of(subject, batch, rows, examples)
        state = no_products()
        for half in range(HALVES):
            mine = examples % HALVES == half
            state = self.merge(state, self._of(subject, batch, rows[mine.to(rows.device)], examples[mine]))
        return state

    def merge(self, left: HessianState, right: HessianState) -> HessianState:
        totals = dict(left.totals)
        for name, total in right.totals.items():
            totals[name] = add_totals(totals[name], total) if name in totals else total
        return HessianState(totals, left.counts + right.counts, added(left.products, right.products))

    def vectors(self, subject: Subject, probe: int) -> list[Tensor]:
        """The parts of a probe, of the parameters' shapes and dtypes."""
        return [
            self.entries(name, probe, parameter.numel(), parameter.device).reshape(parameter.shape).to(parameter.dtype)
            for name, parameter in subject.parameters.items()
        ]

    def entries(self, name: str, probe: int, size: int, device: torch.device) -> Tensor:
        """[P] float32: the part of a probe of the parameter `name`."""
        if self.kind == "rademacher":
            key = key_of("curvature", VERSION, self.seed, probe, name)
            return kept(("curvature", key, size, str(device)), lambda: entry_signs(key, 0, size, device))
        first = probe - probe % TOGETHER
        columns = GaussianProbes(self.num_probes, self.seed).columns(
            f"curvature/{name}", first, first + TOGETHER, size, device
        )
        return columns[:, probe - first]

    def _of(self, subject: Subject, batch: Batch, rows: Tensor, examples: Tensor) -> HessianState:
        """Of the rows of a batch, of one half where halves are asked. A row with a product not finite is left out."""
        if not len(rows):
            return no_products()
        values: list[Tensor] = []
        products: dict[str, Tensor] = {}
        part = batch if len(rows) == len(next(iter(batch.values()))) else {k: t[rows] for k, t in batch.items()}
        for probe, (vectors, found) in enumerate(self._products(subject, part)):
            values.append(torch.stack([_dot(v, h) for v, h in zip(vectors, found, strict=True)]))
            if self.frobenius:
                for name, h in zip(subject.parameters, found, strict=True):
                    key = SEPARATOR.join((str(int(examples[0]) % HALVES), f"{probe:04d}", name))
                    products[key] = h.flatten().double().cpu()
        stacked = torch.stack(values, dim=1).cpu()  # [L, N]
        if not bool(stacked.isfinite().all()) or not all(bool(h.isfinite().all()) for h in products.values()):
            return self._halved(subject, batch, rows, examples)
        totals = {name: total_of(stacked[j][None]) for j, name in enumerate(subject.parameters)}
        return HessianState(totals, torch.bincount(examples % HALVES, minlength=HALVES), products)

    def _halved(self, subject: Subject, batch: Batch, rows: Tensor, examples: Tensor) -> HessianState:
        middle = len(rows) // 2
        if not middle:
            return no_products()
        left = self._of(subject, batch, rows[:middle], examples[:middle])
        return self.merge(left, self._of(subject, batch, rows[middle:], examples[middle:]))

    def _products(self, subject: Subject, batch: Batch) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
        """Every probe v, and sum_i H_i v: both by parameter. The graph of the gradient is made once."""
        parameters = list(subject.parameters.values())
        try:
            with differentiable_attention(), torch.enable_grad():
                loss = subject.task.losses(subject.model, batch).sum()
                gradient = gradient_graph([loss], parameters)
            probes = (self.vectors(subject, probe) for probe in range(self.num_probes))
            yield from hessian_products(loss, gradient, parameters, probes, self.num_probes)
        except RuntimeError as error:
            if not isinstance(error, NotTwiceDifferentiable) and not _TWICE.search(str(error)):
                raise
            raise GradscaleError(
                f"losses must be twice differentiable for the measure curvature, got {error}; have the model use "
                "operations that are (attn_implementation='eager', no torch.compile), or leave curvature out"
            ) from error


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """[] float64, added up in float64, a piece after another."""
    total = torch.zeros((), dtype=torch.float64, device=left.device)
    for a, b in zip(left.flatten().split(_PIECE), right.flatten().split(_PIECE), strict=True):
        total += (a.double() * b.double()).sum()
    return total
