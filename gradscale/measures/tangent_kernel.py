"""The tangent kernel of a task's outputs: its trace, and its alignment with the targets.

Shapes: N probes, C outputs, P entries of one parameter, V = 1 + N (+ C) vectors of weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradscale.measures.grouped import SEPARATOR
from gradscale.measures.measure import Estimate, Estimates, Gathering, MicroBatch
from gradscale.measures.probe_means import ProbeMeans, means
from gradscale.measures.tangent_passes import (
    NAME,
    TARGET,
    TangentPasses,
    TangentState,
    no_tangents,
    output_name,
    probe_name,
)
from gradscale.sketches.dimensions import check_dim

UNIT = "output unit^2 / parameter unit^2"
_ROUNDING = 1e-5  # of sums of gradients in float32, relative
_NOTHING = 1e-7  # of the largest parameter's: gradients that are rounding alone


@dataclass(frozen=True)
class TangentKernel:
    """Of K = Phi Phi^T [nC, nC], Phi the Jacobians J_i = d f(x_i) / d theta of the task's outputs below one another.

    `frobenius` is |Phi|_F^2 = tr K = sum_i E |J_i^T v|^2 over v of independent signs, N for every example, drawn by
    (seed, example id, probe): squared, of the n examples measured, with its standard error over probes (NaN for N = 1).
    `trace` is tr K / n, for the examples as a sample of a population: standard error over examples, with the probes'
    noise in it. Both for all parameters and for each. No bit of the two depends on how the examples were cut into
    shards of whole microbatches.

    With `alignment`: y^T K y / (|K|_F |y|^2) in [-1, 1], y the targets (`task.targets`, or the labels one-hot); with
    `centred` y less its mean over examples, and the features too: from each output's Jacobian its mean over examples is
    taken, K becoming H K H. Both are exact, since sum_i J_i^T (w_i - mean w) = sum_i J_i^T w_i - (sum_i J_i)^T mean w.
    The numerator is |sum_i J_i^T y_i|^2, exact. |K|_F^2 is estimated without bias: with u = y / |y| and probes w
    orthogonal to u,

        |K|_F^2 = (u^T K u)^2 + 2 E (w^T K u)^2 + E (w^T K w')^2,

    the last over pairs of independent probes, a U-statistic. The part along y, where kernels of trained networks are
    largest, is therefore exact, and K = y y^T gives 1 without error. Every w^T K w' is an inner product of two sums
    of gradients. The ratio has a bias of the order of the squared error. Standard error: delete-one-probe jackknife
    (NaN for N < 3); it speaks of the n examples measured.

    Cost: N forward and backward passes; alignment 1 more and, centred, C more, and V P numbers of state a shard.
    Source: Baratin et al. (2021), arXiv 2008.00938, for both; the estimates of trace and |K|_F are derived here.
    """

    num_probes: int = 8
    seed: int = 0
    alignment: bool = False
    centred: bool = True

    name = NAME
    summary = (
        "|Phi|_F^2 = tr K of the outputs' tangent kernel, y'Ky / (|K|_F |y|^2) with alignment; N (+ 1 + C) passes; "
        "Baratin et al., 2008.00938"
    )

    def __post_init__(self) -> None:
        check_dim("num_probes", self.num_probes)

    @property
    def needs(self) -> frozenset[Gathering[TangentState]]:
        return frozenset({self.gathering})

    @property
    def gathering(self) -> TangentPasses:
        return TangentPasses(self.num_probes, self.seed, self.alignment, self.alignment and self.centred)

    def init(self) -> TangentState:
        return no_tangents()

    def update(self, state: TangentState, batch: MicroBatch) -> TangentState:
        return self.merge(state, batch.gathered[self.gathering])

    def merge(self, left: TangentState, right: TangentState) -> TangentState:
        return self.gathering.merge(left, right)

    def compute(self, state: TangentState) -> Estimates:
        found: dict[tuple[str, str], Estimate] = {}
        for scope in state.totals or ("all",):
            found |= self._traces(state, scope)
        return {**found, **self._alignments(state)} if self.alignment and state.gradients else found

    def _traces(self, state: TangentState, scope: str) -> Estimates:
        if scope not in state.totals:
            nothing = Estimate(math.nan, math.nan, 0, "estimator", f"{NAME}/frobenius/v1", UNIT)
            return {("frobenius", scope): nothing, ("trace", scope): nothing._replace(definition=f"{NAME}/trace/v1")}
        mean, over_examples, over_probes, n = means(
            ProbeMeans(state.totals[scope], state.examples[scope]), self.num_probes
        )
        return {
            ("frobenius", scope): Estimate(n * mean, n * over_probes, n, "estimator", f"{NAME}/frobenius/v1", UNIT),
            ("trace", scope): Estimate(mean, over_examples, n, "estimator", f"{NAME}/trace/v1", UNIT),
        }

    def _alignments(self, state: TangentState) -> Estimates:
        n = int(state.examples["all"])
        square, change = change_of_vectors(state, self.num_probes, self.centred)
        grams = grams_of(state, change)
        definition = f"{NAME}/alignment/{'centred' if self.centred else 'uncentred'}/v1"
        return {
            ("alignment", scope): Estimate(*alignment(gram, square), n, "estimator", definition, "1")
            for scope, gram in {"all": torch.stack(list(grams.values())).sum(dim=0), **grams}.items()
        }


def change_of_vectors(state: TangentState, probes: int, centred: bool) -> tuple[float, Tensor]:
    """|y|^2, and the [1 + N, V] matrix from the vectors as they were taken to y and the probes orthogonal to it.

    The vectors are the target, the probes and, if centred, the outputs; y and the probes are then centred too.
    """
    names = [TARGET, *(probe_name(j) for j in range(probes))]
    products = torch.stack([state.products[name] for name in names])
    change = torch.eye(1 + probes, dtype=torch.float64)
    if centred:
        mean = torch.stack([state.weights[name] for name in names]) / int(state.examples["all"])  # [1 + N, C]
        products = products - int(state.examples["all"]) * mean @ mean[0]
        change = torch.cat([change, -mean], dim=1)
    square = float(products[0])
    along = products / square if square > 0 else torch.zeros_like(products)
    along[0] = 0.0
    return square, change - along[:, None] * change[0]


def grams_of(state: TangentState, change: Tensor) -> dict[str, Tensor]:
    """[1 + N, 1 + N] of every parameter, by its scope: the products w^T K w' of y and the probes.

    Zero where all there is, or all that centring leaves, is rounding beside the largest parameter or what was centred:
    outputs do not depend on an attention's key bias, and the bias of a last layer has one Jacobian for all examples.
    """
    outputs = change.shape[1] - change.shape[0]
    names = [TARGET, *(probe_name(j) for j in range(len(change) - 1)), *(output_name(c) for c in range(outputs))]
    prefix = TARGET + SEPARATOR
    found: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    for layer in sorted(key.removeprefix(prefix) for key in state.gradients if key.startswith(prefix)):
        before = torch.stack([state.gradients[f"{name}{SEPARATOR}{layer}"] for name in names])
        sums = change @ before
        found[f"layer:{layer}"] = sums @ sums.mT
        scales[f"layer:{layer}"] = float(before.norm(dim=1).max())
    largest = max(math.sqrt(float(gram.diagonal().max())) for gram in found.values())
    for scope, gram in found.items():
        if gram.diagonal().max() <= max(_ROUNDING * scales[scope], _NOTHING * largest) ** 2:
            gram.zero_()
    return found


def alignment(gram: Tensor, square: float) -> tuple[float, float]:
    """y^T K y / (|K|_F |y|^2) from the products of y and the probes, and its delete-one-probe jackknife error."""
    probes = len(gram) - 1
    if probes < 2 or not square > 0:
        return math.nan, math.nan
    along = float(gram[0, 0]) / square  # u^T K u
    beside = gram[1:, 0].square() / square  # [N], (w^T K u)^2
    pairs = gram[1:, 1:].square().fill_diagonal_(0.0)
    rows = pairs.sum(dim=1)

    def value(first: float, second: float, count: int) -> float:
        norm = along**2 + 2 * first / count + second / (count * (count - 1))
        return along / math.sqrt(norm) if norm > 0 else math.nan

    full = value(float(beside.sum()), float(pairs.sum()), probes)
    if probes < 3:
        return full, math.nan
    left_out = torch.tensor(
        [value(float(beside.sum() - beside[j]), float(pairs.sum() - 2 * rows[j]), probes - 1) for j in range(probes)],
        dtype=torch.float64,
    )
    return full, math.sqrt((probes - 1) / probes * float((left_out - left_out.mean()).square().sum()))
