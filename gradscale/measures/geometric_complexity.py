"""Geometric complexity: how steep the fitted function is at the data.

Shapes: B examples, C outputs, N probes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradscale.grads.subject import Subject
from gradscale.measures.measure import Estimate, Estimates, MicroBatch, Observation
from gradscale.measures.outputs import independent, inputs, output_signs, outputs_of
from gradscale.measures.probe_means import ProbeMeans, add_means, means, means_of, no_means
from gradscale.sketches.dimensions import check_dim
from gradscale.task import Batch

UNIT = "output unit^2 / input unit^2"


@dataclass(frozen=True)
class InputGradients:
    """|grad_x <v, f(x_b)>|^2 for N Rademacher v of every example: [B, N] float64, without bias for |grad_x f(x_b)|_F^2.

    Cost: a forward pass from the inputs, and N backward passes to them.
    """

    num_probes: int
    seed: int

    @property
    def cost(self) -> str:
        return f"a forward pass and {self.num_probes} backward passes to task.inputs"

    def observe(self, subject: Subject, batch: Batch, ids: range) -> Tensor:
        """Raises: GradscaleError if the task lacks inputs or outputs_of, or these are not as `Task` says."""
        points = inputs(subject, batch, GeometricComplexity.name).clone().requires_grad_()
        with torch.enable_grad():
            found = outputs_of(subject, points, batch, GeometricComplexity.name)
            columns = [self._sq_norms(found, points, ids, probe) for probe in range(self.num_probes)]
        return torch.stack(columns, dim=1)

    def _sq_norms(self, found: Tensor, points: Tensor, ids: range, probe: int) -> Tensor:
        v = output_signs(ids, probe, self.seed, found)
        last = probe == self.num_probes - 1
        (grad,) = torch.autograd.grad((found * v).sum(), points, retain_graph=not last, allow_unused=True)
        if grad is None:
            raise independent()
        return grad.double().square().flatten(1).sum(dim=1)


@dataclass(frozen=True)
class GeometricComplexity:
    """(1/n) sum_i |grad_x f(x_i)|_F^2: the squared Frobenius norm of the scores' Jacobian, averaged over the data.

    f is `task.outputs_of`, scores before a softmax, x `task.inputs`: pixels, or embeddings of tokens. By Hutchinson,
    |J|_F^2 = E |J^T v|^2 over v of independent signs, N for every example, drawn by (seed, example id, probe). The
    variance of a probe is 2 (|J J^T|_F^2 - sum_c (J J^T)_cc^2): none for a single output.

    `gc` is for the examples as a sample of a population, its standard error over examples, with the probes' noise in
    it; `gc_sample` is the same value for the n examples measured, its standard error over probes (NaN for N = 1; the
    examples' probes are independent, so that it falls with n as well). Examples with a gradient that is not finite are
    left out and not counted. No bit depends on how the examples were cut into shards of whole microbatches.

    Scaling the inputs by c scales it by 1 / c^2; measure it on inputs of one scale. Cost: a forward pass and N backward
    passes to the inputs; state 97 numbers.
    Source: Dherin, Munn, Rosca and Barrett (2022), arXiv 2209.13083, the definition of geometric complexity; here also
    for embeddings of tokens.
    """

    num_probes: int = 8
    seed: int = 0

    name = "geometric_complexity"
    summary = "mean |grad_x f|_F^2, f the scores, by N sign probes; 1 + N passes; Dherin et al., arXiv 2209.13083"

    def __post_init__(self) -> None:
        check_dim("num_probes", self.num_probes)

    @property
    def needs(self) -> frozenset[Observation]:
        return frozenset({self.observation})

    @property
    def observation(self) -> InputGradients:
        return InputGradients(self.num_probes, self.seed)

    def init(self) -> ProbeMeans:
        return no_means()

    def update(self, state: ProbeMeans, batch: MicroBatch) -> ProbeMeans:
        return add_means(state, means_of(batch.observations[self.observation]))

    def merge(self, left: ProbeMeans, right: ProbeMeans) -> ProbeMeans:
        return add_means(left, right)

    def compute(self, state: ProbeMeans) -> Estimates:
        value, over_examples, over_probes, n = means(state, self.num_probes)
        errors = {"gc": over_examples, "gc_sample": over_probes}
        return {
            (name, "all"): Estimate(value, error, n, "estimator", f"{self.name}/{name}/v1", UNIT)
            for name, error in errors.items()
        }
