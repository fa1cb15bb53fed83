"""What one process of a spectrum run does, alone or as a rank of a gang. No Ray: `pool` and `gang` make it an actor.

A rank takes its share of the examples and its slice of every vector; all ranks of a gang call the same methods in the
same order. Shapes: P entries, p of them here, k probes of a unit, L parameters.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradscale.curvature.backends import choose_gauss_newton, choose_hessian
from gradscale.curvature.check import self_test
from gradscale.curvature.layout import Layout
from gradscale.curvature.operators import CovarianceOperator, CurvatureOperator
from gradscale.curvature.probes import FlatProbes
from gradscale.curvature.stream import Stream
from gradscale.errors import GradscaleError
from gradscale.grads.subject import Subject
from gradscale.run.memory import explaining_memory
from gradscale.run.shard import prepare
from gradscale.run.spectrum_choice import choice_of, record_of
from gradscale.run.spectrum_plan import SpectrumPlan, TraceUnit
from gradscale.run.spectrum_ranks import Rank, Said
from gradscale.run.worker import set_up, unpacked, versions
from gradscale.store.files import Files
from gradscale.task import Task, fingerprint

_TIMEOUT = timedelta(minutes=30)  # of a collective


@dataclass(frozen=True)
class SpectrumJob:
    """What every worker needs to know before there is a plan."""

    task: Task
    out: str
    params: str | None
    excluded: tuple[str, ...]
    microbatch: int
    threads: int
    device: str
    commit_seconds: float


class Described(NamedTuple):
    examples: int
    data_fingerprint: str
    parameters: dict[str, Any]
    versions: dict[str, str]


class SpectrumWorker:
    """Holds one loaded checkpoint at a time. Made as `Worker` is."""

    def __init__(self, job: bytes, path: Sequence[str], folder: str) -> None:
        self._job: SpectrumJob = unpacked(job, path, folder)
        set_up(self._job.threads, self._job.device)
        self._loaded: tuple[str | None, Subject] | None = None
        self._said = Said("", 0, 0, "")

    def ready(self) -> int:
        """The process id: the worker is up."""
        return os.getpid()

    def describe(self, checkpoint: str | None) -> Described:
        """Load `checkpoint` and say what the task is. Raises: GradscaleError if it cannot be measured."""
        subject = self._load(checkpoint)
        if not len(subject.examples):
            raise GradscaleError("the dataset must have at least one example, got 0; check --data")
        return Described(
            len(subject.examples), fingerprint(subject.examples), _parameters(subject), versions(self._job.device)
        )

    def choose(self, plan: SpectrumPlan, step: int, quantities: Sequence[str]) -> dict[str, Any]:
        """The way of products for each of `quantities`, and the self-test of that for whole vectors.

        Raises: GradscaleError naming what is wrong with the model; see `self_test`.
        """
        stream = self._stream(plan, step)
        with explaining_memory(plan.microbatch):
            if plan.operator == "covariance":
                # not centred, for a first microbatch may be of one example
                tested = self_test(CovarianceOperator(stream, centred=False))
                return {"self_test": tested._asdict(), "ways": {}}
            if plan.operator == "ggn":
                choice = choose_gauss_newton(stream, plan.seed)
                ways = dict.fromkeys(quantities, choice)
                tested = self_test(CurvatureOperator(stream, choice))
            else:
                ways = {quantity: choose_hessian(stream, plan.backend, quantity, plan.seed) for quantity in quantities}
                whole = ways.get("vector") or choose_hessian(stream, plan.backend, "vector", plan.seed)
                # a step that suits sharp directions is too coarse for the others
                tested = self_test(CurvatureOperator(stream, whole))
        return {
            "self_test": tested._asdict(),
            "ways": {quantity: record_of(choice) for quantity, choice in ways.items()},
        }

    def trace_sums(self, plan: SpectrumPlan, choice: Mapping[str, Any], unit: TraceUnit) -> tuple[TraceUnit, list[Any]]:
        """The unit, and [k, L]: sum_i v_l^T (M_i v)_l over its examples, for its probes and every parameter l."""
        whole = self._stream(plan, unit.step)
        stream = Stream(whole.subject, unit.ids, plan.microbatch)
        vectors = self._probes(plan, range(stream.layout.size), plan.trace or {})(range(unit.first, unit.last))
        with explaining_memory(plan.microbatch):
            sums = CurvatureOperator(stream, choice_of(choice["ways"]["trace"])).sums(vectors)
        return unit, _by_parameter(stream.layout, vectors, sums).tolist()

    def join(self, address: str, port: int, rank: int, world: int) -> None:
        backend = "gloo" if self._job.device == "cpu" else "nccl"
        dist.init_process_group(backend, f"tcp://{address}:{port}", _TIMEOUT, world_size=world, rank=rank)

    def progress(self) -> Said:
        """What this process is at; may be asked while it works."""
        return self._said

    def solve(self, part: str, plan: SpectrumPlan, step: int, *arguments: Any) -> Any:
        """A part of the run by all ranks of the gang together: a method of `Rank`. Every rank gets the same."""
        rank = Rank(plan, step, self._stream(plan, step), Files(self._job.out), self._job.commit_seconds, self._say)
        with explaining_memory(plan.microbatch):
            return getattr(rank, part)(*arguments)

    def _say(self, said: Said) -> None:
        self._said = said

    def _stream(self, plan: SpectrumPlan, step: int) -> Stream:
        subject = self._load(plan.checkpoints[str(step)]["path"])
        found = _parameters(subject)
        other = [name for name in {**plan.parameters, **found} if found.get(name) != plan.parameters.get(name)]
        if other or list(found) != list(plan.parameters):
            raise GradscaleError(
                f"every checkpoint must have the parameters of the first one, got others at step {step}: "
                f"{', '.join(other[:3]) or 'another order'}; measure it into a run of its own"
            )
        return Stream(subject, range(plan.examples), plan.microbatch)

    def _probes(self, plan: SpectrumPlan, here: range, asked: Mapping[str, Any]) -> FlatProbes:
        return FlatProbes(here, plan.seed, asked["probes"], getattr(torch, plan.vectors), self._job.device)

    def _load(self, checkpoint: str | None) -> Subject:
        if self._loaded is None or self._loaded[0] != checkpoint:
            self._loaded = None  # free the one before
            job = self._job
            self._loaded = checkpoint, prepare(job.task, checkpoint, job.params, job.device, job.excluded)
        return self._loaded[1]


def _parameters(subject: Subject) -> dict[str, Any]:
    """As a plan has them."""
    return {
        name: {"shape": list(p.shape), "dtype": str(p.dtype).removeprefix("torch.")}
        for name, p in subject.parameters.items()
    }


def _by_parameter(layout: Layout, vectors: Tensor, sums: Tensor) -> Tensor:
    """[k, L] float64: the inner products of the rows, parameter by parameter."""
    parts = zip(vectors.split(layout.sizes, 1), sums.split(layout.sizes, 1), strict=True)
    found = [(v.double() * s).sum(dim=1) for v, s in parts]
    return torch.stack(found, dim=1).cpu()
