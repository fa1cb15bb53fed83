"""The perturbation of the effective Gram matrix: what leaving an example out adds to the generalization gap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gradscale.measures.dispersion import SQUARED, trace_covariance
from gradscale.measures.measure import Estimate, Estimates
from gradscale.measures.moments import Moments, MomentsState, MomentsStatistic, jackknife, moments


@dataclass(frozen=True)
class EffectiveGram:
    """`perturbation` eps_bar = tr Sigma / n = q (1 - alpha) / (n - 1), with q the mean of |g_i|^2: the gap's source.

    Let w follow the gradient flow of the mean loss of all n examples and w^-i that of all but example i, from one
    start. The average generalization gap delta(t) = (1/n) sum_i [l_i(w^-i) - l_i(w)] then obeys
    delta' = eps_bar - c_bar delta with eps_bar = (1/n^2) sum_i <g_i, g_i - grad L_-i> at w(t): an identity for any
    model and loss.

    Found in the source, in what could be read of it: the differential equation with eps_bar_n(t) and c_bar_n(t), and
    gap = r_n(0)^T K_n r_n(0). Reconstructed here: the formula of eps_bar, derived for leave-one-out gradient flow; it
    may differ from the paper's by a convention. The contraction c_bar, and so K_n, needs trainings,
    `gs.leave_out_gap`: eps_bar alone does not tell gaps apart. Status `conditional`: it speaks of that gap only if the
    checkpoint lies on the path of all the data that are measured, and the examples measured are all n.

    Standard error: that of tr Sigma by n, delete-one-block jackknife over blocks of shards, n being no estimate. NaN of
    fewer than two examples. In squared loss units by squared parameter units: loss units by time of the gradient flow.

    Exact per parameter, and these add up to that of all. Cost: none beside coherence, with which it shares its state.
    Source: Yang and Chaudhari (2025), arXiv 2504.16450; no equation number, see above.
    """

    name = "effective_gram"
    summary = "tr Sigma / n, what drives the leave-one-out gap; one backward pass; after Yang & Chaudhari, 2504.16450"

    @property
    def statistic(self) -> MomentsStatistic:
        return MomentsStatistic()

    def compute(self, state: MomentsState) -> Estimates:
        return {(name, scope): e for scope, parts in moments(state).items() for name, e in _estimates(parts)}


def _estimates(parts: Moments) -> Iterator[tuple[str, Estimate]]:
    n = parts.n
    value, error = jackknife(parts, trace_covariance)
    definition = "effective_gram/perturbation/leave-one-out flow, reconstructed/v1"
    yield "perturbation", Estimate(value / max(n, 1), error / max(n, 1), n, "conditional", definition, SQUARED)
