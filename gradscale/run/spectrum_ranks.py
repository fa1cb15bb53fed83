"""The parts of a spectrum run that a gang solves, as one of its ranks does. No Ray.

Every method is called by all ranks alike and gives all of them the same numbers: what they decide, they decide from
sums over processes. Shapes: P entries in all, p of them here, N probes, L parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradscale.curvature.covariance_trace import covariance_traces
from gradscale.curvature.deflated import hutch_plus_plus, xnystrace, xtrace
from gradscale.curvature.krylov import LanczosState
from gradscale.curvature.lanczos import Ritz, lanczos
from gradscale.curvature.operator import Operator
from gradscale.curvature.probes import FlatProbes
from gradscale.curvature.processes import Sharded
from gradscale.curvature.quadrature import quadratures
from gradscale.curvature.share import ShardedCovariance, half_operators, operator_of
from gradscale.curvature.slices import row_dots
from gradscale.curvature.stability_of_gang import stability_of_gang
from gradscale.curvature.stability_rows import stability_rows
from gradscale.curvature.stream import Stream
from gradscale.run.lanczos_commits import LanczosCommits
from gradscale.run.spectrum_choice import choice_of
from gradscale.run.spectrum_plan import SpectrumPlan
from gradscale.store.files import Files

_START = 1 << 30  # the number of the probe that Lanczos starts from: of none that the traces take
_DEFLATED = {"hutch++": hutch_plus_plus, "xtrace": xtrace, "xnystrace": xnystrace}


class Said(NamedTuple):
    """What a process is at: `done` products of at most `total` of a part, and how it goes."""

    part: str
    done: int
    total: int
    note: str


@dataclass(frozen=True, eq=False)
class Rank:
    plan: SpectrumPlan
    step: int
    stream: Stream  # of all examples; a rank takes its share
    files: Files
    commit_seconds: float
    say: Callable[[Said], None]

    def eigenvalues(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        """The plan's `top` by `lanczos`, going on from what has been committed."""
        plan, operator = self.plan, self._operator(choice, "lambda_max" if self.plan.which == "largest" else "vector")
        commits = LanczosCommits(self.files, self.step, operator.here, self.commit_seconds)
        start: Tensor | LanczosState | None = commits.read(self.stream.subject.device)
        resumed_from = 0
        if isinstance(start, LanczosState):
            resumed_from = start.step
        else:
            start = self._probes(operator, "gaussian")(range(_START, _START + 1))
        held, start = [start], None  # given away, for a basis must not be held twice
        began = time.monotonic()

        def on_step(state: LanczosState) -> None:
            commits.commit(state)
            times = f"{state.restarts} restart{'' if state.restarts == 1 else 's'}"
            self.say(Said("eigenvalues", state.products, plan.max_steps, times))

        found = lanczos(
            operator,
            held.pop(),
            plan.top,
            plan.max_steps,
            plan.tolerance,
            plan.basis_cap,
            plan.which,
            plan.seed,
            on_step,
        )
        return {
            **_ritz_record(found),
            "resumed_from": resumed_from,
            "seconds": time.monotonic() - began,
            "stability": self._stability(operator, found),
        }

    def _stability(self, operator: Operator, found: Ritz) -> dict[str, Any] | None:
        """The report's rows and verdict, where it was asked for."""
        asked, plan = self.plan.stability, self.plan
        if asked is None:
            return None
        assert isinstance(operator, Sharded)
        self.say(Said("stability", 0, 1, ""))
        report = stability_of_gang(
            operator,
            found,
            len(self.stream.subject.examples),
            plan.examples,
            asked["eta"],
            asked["batch_size"],
            asked["momentum"],
            asked["example_norms"],
            plan.seed,
        )
        return {"verdict": report.verdict, "rows": [list(row) for row in stability_rows(report)]}

    def nodes(self, choice: Mapping[str, Any], first: int, last: int) -> dict[str, Any]:
        """The quadratures of the probes `first` to `last` - 1."""
        asked, operator = self.plan.density or {}, self._operator(choice, "vector")
        counted = _Counted(operator, lambda done: self._said("density", done, (last - first) * asked["steps"]))
        found = quadratures(
            counted,
            self._probes(operator, asked["probes"]),
            range(first, last),
            asked["steps"],
            reorthogonalize=asked["reorthogonalize"],
        )
        return {name: getattr(found, name).tolist() for name in ("probe", "value", "weight", "residual")}

    def norms(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        """[N] of each: |A v|^2 of all examples, and <A_1 v, A_2 v> of two halves of them (None of one example)."""
        asked = self.plan.norms or {}
        halves = half_operators(self.stream, choice_of(choice["ways"]["trace"]))
        operator = halves[0][0]
        probes, total = self._probes(operator, asked["probes"]), asked["num_probes"]
        whole: list[float] = []
        between: list[float] = []
        for probe in range(total):
            vector = probes(range(probe, probe + 1))
            products = [half.products(vector) for half, _ in halves]
            mean = torch.stack([share * product for (_, share), product in zip(halves, products, strict=True)]).sum(0)
            whole += row_dots(operator, mean, mean).tolist()
            between += row_dots(operator, products[0], products[1]).tolist() if len(products) > 1 else []
            self._said("norms", probe + 1, total)
        return {"whole": whole, "between": between or None}

    def deflated(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        asked, operator = self.plan.trace or {}, self._operator(choice, "trace")
        counted = _Counted(operator, lambda done: self._said(asked["method"], done, asked["products"]))
        found = _DEFLATED[asked["method"]](counted, self._probes(operator, asked["probes"]), asked["products"])
        return {**found.estimate._asdict(), "products": found.products}

    def covariance_trace(self) -> dict[str, Any]:
        """Exact, of every parameter: it takes no probes."""
        operator = self._operator({}, "trace")
        assert isinstance(operator, ShardedCovariance)
        return {"by_parameter": covariance_traces(operator, self.stream.layout, self.stream.subject.device)}

    def _operator(self, choice: Mapping[str, Any], quantity: str) -> Operator:
        ways = choice.get("ways", {})
        return operator_of(self.plan.operator, self.stream, choice_of(ways[quantity]) if ways else None)

    def _probes(self, operator: Operator, kind: str) -> FlatProbes:
        dtype = getattr(torch, self.plan.vectors)
        return FlatProbes(operator.here, self.plan.seed, kind, dtype, str(self.stream.subject.device))

    def _said(self, part: str, done: int, total: int) -> None:
        self.say(Said(part, done, total, ""))


class _Counted:
    """An operator that tells how many vectors it has multiplied."""

    def __init__(self, operator: Operator, tell: Callable[[int], None]) -> None:
        self.operator, self._tell, self._done = operator, tell, 0

    @property
    def size(self) -> int:
        return self.operator.size

    @property
    def here(self) -> range:
        return self.operator.here

    def products(self, vectors: torch.Tensor) -> torch.Tensor:
        found = self.operator.products(vectors)
        self._done += len(vectors)
        self._tell(self._done)
        return found

    def all_sum(self, parts: torch.Tensor) -> torch.Tensor:
        return self.operator.all_sum(parts)


def _ritz_record(found: Ritz) -> dict[str, Any]:
    return {
        **{name: getattr(found, name).tolist() for name in ("values", "residuals", "errors", "converged")},
        **{name: getattr(found, name) for name in ("complete", "steps", "products", "restarts", "noise")},
        "orthogonality": found.orthogonality,
        "world": dist.get_world_size(),
    }
