"""The parts of a spectrum run, as they come: which there are, which are left, and the tables made of them.

A part is made once and kept. Products that sum over examples and probes are units that any worker takes; what spans a
Krylov space is solved by all workers of a gang together.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from gradscale.errors import ShardsFailed
from gradscale.run.gang import Gang
from gradscale.run.pool import Pool
from gradscale.run.spectrum_estimates import (
    TraceSums,
    enough,
    probe_blocks,
    quadrature_of,
    spectrum_rows,
    step_rows,
    traced,
)
from gradscale.run.spectrum_plan import TOGETHER, Hutchinson, SpectrumPlan, TraceUnit
from gradscale.run.spectrum_ranks import Said
from gradscale.store.parts import Parts
from gradscale.store.spectra import write_spectra
from gradscale.store.store import Store

_LOG = logging.getLogger("gradscale")
Asked = Mapping[str, Any] | None


class SpectrumProgress(NamedTuple):
    """What a spectrum run is at: `done` of at most `total` products of a part of a step, in `seconds`."""

    step: int
    part: str
    done: int
    total: int
    seconds: float
    note: str

    @property
    def seconds_left(self) -> float | None:
        """At most, for Lanczos and traces end once they are accurate enough. None before the first product."""
        return self.seconds * (self.total - self.done) / self.done if self.done else None


@dataclass
class SpectrumParts:
    plan: SpectrumPlan
    parts: Parts
    on_progress: Callable[[SpectrumProgress], None] | None
    began: float = field(default_factory=time.monotonic)
    products: int = 0  # of the step's trace that are there
    units: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)  # those of traces that have been read

    def choose(self, actors: Pool | Gang, step: int) -> None:
        """The way of products: a part of the run, so that a resumed one takes the same."""
        if "choice" not in self.parts.names(step):
            found = actors.call("choose", self.plan, step, _quantities(self.plan))
            self.parts.write(step, "choice", found)
        for quantity, way in self.parts.read(step, "choice")["ways"].items():
            _LOG.info("step %d, products for %s: %s", step, quantity, _described(way))

    def trace(self, actors: Pool | Gang, step: int, workers: int) -> None:
        """Hutchinson's units, block after block of probes, until the error is what was asked for."""
        plan, asked = self.plan, self.plan.trace
        if not _by_probes(plan) or asked is None:
            return
        choice = self.parts.read(step, "choice")
        together = max(1, -(-2 * workers // plan.shards))  # blocks at once, so that no worker waits for the last unit
        blocks = probe_blocks(asked)
        self.began = time.monotonic()
        for first in range(0, len(blocks), together):
            found = self._sums(step)
            if found is not None and enough(found, asked):
                break
            units = [unit for block in blocks[first : first + together] for unit in plan.units(step, *block)]
            there = self.parts.names(step)
            left = [unit for unit in units if unit.name not in there]
            self.products = sum(_products(name, asked["max_probes"]) for name in there)
            failures = actors.map("trace_sums", [(plan, choice, unit) for unit in left], self._keep)
            if failures:
                lines = [f"{failure.item[2]}, {failure.attempts} attempts: {failure.error}" for failure in failures]
                raise ShardsFailed(
                    f"{len(failures)} units of the trace failed; the others are kept. Run the same command again to "
                    "try them anew.\n  " + "\n  ".join(lines)
                ) from failures[0].error
        if (sums := self._sums(step)) is not None:
            value, _, error = traced(sums)
            _LOG.info("step %d: trace %.5g +- %.2g after %d probes", step, value, error, len(sums.sums))

    def solve(self, gang: Gang, step: int) -> None:
        """What a gang has to solve and has not."""
        there, choice = self.parts.names(step), self.parts.read(step, "choice")
        for name, method, arguments in _gang_parts(self.plan, choice):
            if name in there:
                continue
            self.began = time.monotonic()
            found = gang.call("solve", method, self.plan, step, *arguments, on_progress=self._said(step))
            self.parts.write(step, name, found)
            if name == "eigenvalues":
                self._forget(step)
        self._forget(step)  # of a driver that was killed before

    def _forget(self, step: int) -> None:
        self.parts.files.delete_folder(f"lanczos/step-{step:08d}")

    def write(self, store: Store) -> None:
        """The tables, from all parts."""
        estimates, rows = [], []
        for step in self.plan.steps:
            found = self._read(step)
            estimates += step_rows(self.plan, step, found)
            rows += spectrum_rows(self.plan, step, found)
        write_spectra(store.files, rows)
        store.write_estimates(estimates)

    def _read(self, step: int) -> dict[str, Mapping[str, Any]]:
        names = self.parts.names(step)
        found: dict[str, Mapping[str, Any]] = {
            name: self.parts.read(step, name)
            for name in ("choice", *(part for part, _, _ in _gang_parts(self.plan, {})))
            if name in names and not name.startswith("nodes-")
        }
        sums = self._sums(step)
        if sums is not None:
            found["trace"] = {"sums": sums}
        nodes = [self.parts.read(step, name) for name in sorted(names) if name.startswith("nodes-")]
        if nodes:
            found["nodes"] = {"quadrature": quadrature_of(self.plan, nodes)}
        return found

    def _sums(self, step: int) -> TraceSums | None:
        """Of the first blocks of probes all of whose units are there, no more than are enough."""
        asked = self.plan.trace
        if not _by_probes(self.plan) or asked is None:
            return None
        there, found = self.parts.names(step), None
        blocks: list[torch.Tensor] = []
        for block in probe_blocks(asked):
            units = self.plan.units(step, *block)
            if not all(unit.name in there for unit in units):
                break
            blocks.append(torch.stack([self._of_unit(step, unit.name) for unit in units], dim=2))
            counts = torch.tensor([float(len(unit.ids)) for unit in units], dtype=torch.float64)
            found = TraceSums(torch.cat(blocks), counts)
            if enough(found, asked):
                break
        return found

    def _of_unit(self, step: int, name: str) -> torch.Tensor:
        """[k, L] float64: the sums of a unit that is there. Read once."""
        if (step, name) not in self.units:
            self.units[step, name] = torch.tensor(self.parts.read(step, name)["sums"], dtype=torch.float64)
        return self.units[step, name]

    def _keep(self, result: tuple[TraceUnit, list[Any]]) -> None:
        unit, sums = result
        self.parts.write(unit.step, unit.name, {"unit": dataclasses.asdict(unit), "sums": sums})
        asked = self.plan.trace or {}
        self.products += unit.last - unit.first
        self._tell(unit.step, Said("trace", self.products, asked["max_probes"] * self.plan.shards, ""))

    def _said(self, step: int) -> Callable[[Said], None]:
        return lambda said: self._tell(step, said)

    def _tell(self, step: int, said: Said) -> None:
        if self.on_progress is not None and said.part:
            self.on_progress(
                SpectrumProgress(step, said.part, said.done, said.total, time.monotonic() - self.began, said.note)
            )


def needs_gang(top: int, operator: str, trace: Asked, norms: Asked, density: Asked, stability: Asked) -> bool:
    """Whether something is asked for that is not a sum over examples and probes."""
    return bool(top or norms or density or stability or not (trace is None or _is_sum(trace, operator)))


def _gang_parts(plan: SpectrumPlan, choice: Mapping[str, Any]) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(name of the part, method of `Rank`, its arguments) of what a gang solves at a step."""
    if plan.top:
        yield "eigenvalues", "eigenvalues", (choice,)
    if plan.trace is not None and plan.operator == "covariance":
        yield "covariance_trace", "covariance_trace", ()
    elif plan.trace is not None and not _by_probes(plan):
        yield "deflated", "deflated", (choice,)
    if plan.norms is not None:
        yield "norms", "norms", (choice,)
    if plan.density is not None:
        probes = plan.density["num_probes"]
        for first in range(0, probes, TOGETHER):
            yield f"nodes-{first:05d}", "nodes", (choice, first, min(first + TOGETHER, probes))


def _quantities(plan: SpectrumPlan) -> list[str]:
    """What products are taken for: finite differences have a step for each."""
    eigenvalues = ["lambda_max" if plan.which == "largest" else "vector"] if plan.top else []
    traces = ["trace"] if plan.trace is not None or plan.norms is not None else []
    return list(dict.fromkeys([*eigenvalues, *traces, *(["vector"] if plan.density is not None else [])]))


def _by_probes(plan: SpectrumPlan) -> bool:
    """Whether the trace is one of shard jobs."""
    return plan.trace is not None and _is_sum(plan.trace, plan.operator)


def _is_sum(trace: Mapping[str, Any], operator: str) -> bool:
    return trace["method"] == Hutchinson.method and operator != "covariance"


def _products(part: str, max_probes: int) -> int:
    """Of a unit of the trace, by its name; 0 of another part."""
    kind, _, rest = part.partition("-")
    return min(TOGETHER, max_probes - int(rest[:5])) if kind == "trace" else 0


def _described(way: Mapping[str, Any]) -> str:
    refused = "".join(f"; not {name}: {why}" for name, why in way["refused"].items())
    eps = f" with eps {way['eps']:.1e}" if "eps" in way else ""
    return f"{way['backend']}{eps}, relative error about {way['error']:.0e}{refused}"
