"""gradscale as a library that the cases of `curvature_cases` are run through: what an adapter looks like."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from curvature_cases import Library, Trace
from curvature_problems import Problem
from torch import Tensor, nn

from gradscale.curvature.check import self_test
from gradscale.curvature.lanczos import lanczos
from gradscale.curvature.operators import CurvatureOperator, hessian
from gradscale.curvature.probes import FlatProbes
from gradscale.curvature.stream import Stream
from gradscale.curvature.trace import hutchinson, trace
from gradscale.grads.coverage import select_parameters
from gradscale.grads.subject import Subject
from gradscale.task import TensorExamples


@dataclass(frozen=True, eq=False)
class AsTask:
    """A problem as a task: its losses one an example."""

    problem: Problem

    def model(self, checkpoint: str | None) -> nn.Module:
        return self.problem.model

    def examples(self) -> TensorExamples:
        x, y = (torch.cat(parts) for parts in zip(*self.problem.batches, strict=True))
        return TensorExamples(x=x, y=y)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        criterion = copy.copy(self.problem.criterion)
        criterion.reduction = "none"
        losses: Tensor = criterion(model(batch["x"]), batch["y"])
        return losses.reshape(len(losses), -1).mean(dim=1)


def adapter(name: str = "gradscale", backend: str = "auto") -> Library:
    def operator(problem: Problem, quantity: str = "vector", weights: Tensor | None = None) -> CurvatureOperator:
        task = AsTask(problem)
        subject = Subject(task, problem.model, task.examples(), select_parameters(problem.model, None), ())
        stream = Stream(subject, range(problem.rows), len(problem.batches[0][1]), weights)
        found = hessian(stream, backend, quantity)
        self_test(found)
        return found

    def product(problem: Problem, v: Tensor) -> Tensor:
        return operator(problem).products(v[None])[0]

    def eigenvalues(problem: Problem, k: int) -> Sequence[float]:
        start = FlatProbes(range(problem.size), dtype=problem.parameters[0].dtype)(range(k))
        cap = min(problem.size, 20 * k)
        found = lanczos(operator(problem, "lambda_max"), start, k, 1000, 1e-8, basis_cap=cap, which="magnitude")
        return found.values.tolist()

    def traces(problem: Problem, seed: int, most: int) -> Trace:
        probes = FlatProbes(range(problem.size), seed, "rademacher", problem.parameters[0].dtype)
        found = trace(hutchinson(operator(problem, "trace"), probes, most, relative=0.1))
        return Trace(found.value, found.stderr)

    def weighted(problem: Problem, weights: Tensor, v: Tensor) -> Tensor:
        return operator(problem, weights=weights).products(v[None])[0]

    return Library(name, product, eigenvalues, traces, weighted)
