"""The largest rise of a batch's loss in a ball around the weights, by projected gradient ascent.

Shapes: P entries of all parameters, D digits of an exact sum. A point u of the ball stands for the weights w + v, with
v = u, or v = |w| u entry by entry where the ball is adaptive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradscale.errors import GradscaleError
from gradscale.grads.subject import Subject
from gradscale.measures.measure import Estimate, Estimates, Gathering, MicroBatch
from gradscale.measures.perturbation import (
    BatchMeans,
    GaussianNoise,
    add_batches,
    batch_of,
    gradient_of,
    losses_at,
    mean_of_batches,
    moved,
    no_batches,
    norm_of,
)
from gradscale.measures.sharpness import UNIT
from gradscale.sketches.dimensions import check_dim
from gradscale.task import Batch

NORMS = ("l2", "linf")
_FIRST_STEP = 2.0  # in radii, as in APGD

Point = Mapping[str, Tensor]  # by parameter, of its shape and dtype


class _Reached(NamedTuple):
    point: Point
    loss: float
    slope: Point  # the gradient with respect to the point


@dataclass(frozen=True)
class BallAscent:
    """max of L(w + v) - L(w) over S + 1 points of the ball, L the mean loss of a microbatch.

    From a point on the boundary, drawn by (seed, parameter, position) for all batches alike, S normalised steps with
    projection, the first of two radii; a step that does not rise is halved and taken anew. 0 if no point is higher.
    Cost: a forward pass, S + 1 forward and backward passes; 5 P numbers.
    """

    epsilon: float
    num_steps: int
    norm: str
    adaptive: bool
    seed: int

    @property
    def cost(self) -> str:
        return f"a forward pass and {1 + self.num_steps} forward and backward passes at moved weights"

    def gather(self, subject: Subject, batch: Batch, ids: range, keep: Tensor) -> BatchMeans:
        if not bool(keep.any()):
            return no_batches()
        center = losses_at(subject, batch)[keep].mean()
        there, step = self._reach(subject, batch, keep, self._start(subject)), _FIRST_STEP * self.epsilon
        for _ in range(self.num_steps):
            tried = self._reach(subject, batch, keep, self._ahead(there, step))
            if math.isfinite(tried.loss) and tried.loss > there.loss:
                there = tried
            else:
                step /= 2
        rise = torch.tensor(there.loss, dtype=torch.float64, device=center.device) - center
        return batch_of(rise.clamp(min=0.0), int(keep.sum()))

    def merge(self, left: BatchMeans, right: BatchMeans) -> BatchMeans:
        return add_batches(left, right)

    def _start(self, subject: Subject) -> Point:
        noise = GaussianNoise(1, 1.0, self.seed).of(0)
        drawn = {name: noise(name, parameter) for name, parameter in subject.parameters.items()}
        if self.adaptive:  # a zero weight does not move
            drawn = {name: u * (subject.parameters[name].detach() != 0) for name, u in drawn.items()}
        return _scaled(self._steepest(drawn), self.epsilon)

    def _reach(self, subject: Subject, batch: Batch, keep: Tensor, point: Point) -> _Reached:
        def change(name: str, parameter: nn.Parameter) -> Tensor:
            return point[name] * parameter.detach().abs() if self.adaptive else point[name]

        with moved(subject.parameters, change):
            loss, slope = gradient_of(subject, batch, keep)
        if self.adaptive:
            slope = {name: g * subject.parameters[name].detach().abs() for name, g in slope.items()}
        return _Reached(point, float(loss), slope)

    def _ahead(self, there: _Reached, step: float) -> Point:
        direction = self._steepest(there.slope)
        return self._projected({name: u + step * direction[name] for name, u in there.point.items()})

    def _steepest(self, slope: Point) -> Point:
        """Of the points of norm 1, that with the largest product with `slope`."""
        if self.norm == "linf":
            return {name: g.sign() for name, g in slope.items()}
        length = norm_of(slope.values())
        return _scaled(slope, 1 / length if length > 0 and math.isfinite(length) else 0.0)

    def _projected(self, point: Point) -> Point:
        if self.norm == "linf":
            return {name: u.clamp(-self.epsilon, self.epsilon) for name, u in point.items()}
        return _scaled(point, min(1.0, self.epsilon / max(norm_of(point.values()), self.epsilon)))


@dataclass(frozen=True)
class WorstCase:
    """`epsilon_sharpness`: max of L_B(w + v) - L_B(w) over |v| <= epsilon, L_B the mean loss of a microbatch B.

    The mean over microbatches, whose size m is part of the definition (`epsilon_sharpness/l2/m=32/...`), since the
    smaller the batch, the sharper: those with m finite examples, m the largest there is; n counts them, standard error
    over them. `norm` is l2 or linf. With `adaptive`, the ball is of v / |w|, entry by entry, so that zero weights stay:
    a rescaling that leaves the function as it is leaves the value too, as it does not without.

    Heuristic: the maximum is that of projected gradient ascent with S = `num_steps` normalised steps, a lower bound of
    the ball's; never below 0, which v = 0 has. On a convex loss no step goes down, and at the minimum of a quadratic
    it tends to epsilon^2 lambda_max / 2 in l2. Take epsilon so that changes stand out from the rounding of the losses'
    dtype. The projection of an adaptive ball is along u = v / |w|, in which it is round: on the way the points are not
    those of the reference code, which projects along v; nor is there its momentum, nor its restarts.

    Cost: a forward pass, S + 1 forward and backward passes; 5 P numbers. The weights are put back bit for bit.
    Source: Keskar et al. (2017), arXiv 1609.04836 (without their normalisation by 1 + L); Andriushchenko et al. (2023),
    arXiv 2302.07011 (adaptive, APGD).
    """

    epsilon: float = 0.05
    num_steps: int = 20
    norm: str = "l2"
    adaptive: bool = False
    seed: int = 0

    name = "worst_case"
    summary = (
        "max L(w + v) - L(w) over |v| <= epsilon (adaptive: |v / w|) on microbatches, by S steps of ascent; 2 + S "
        "passes; Keskar et al., 1609.04836, Andriushchenko et al., 2302.07011"
    )

    def __post_init__(self) -> None:
        check_dim("num_steps", self.num_steps)
        if not 0 < self.epsilon < math.inf:
            raise GradscaleError(f"epsilon must be a positive number, got {self.epsilon}; 0.05 is the default")
        if self.norm not in NORMS:
            raise GradscaleError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}; l2 is the default")

    @property
    def needs(self) -> frozenset[Gathering[BatchMeans]]:
        return frozenset({self.gathering})

    @property
    def gathering(self) -> BallAscent:
        return BallAscent(self.epsilon, self.num_steps, self.norm, self.adaptive, self.seed)

    def init(self) -> BatchMeans:
        return no_batches()

    def update(self, state: BatchMeans, batch: MicroBatch) -> BatchMeans:
        return self.merge(state, batch.gathered[self.gathering])

    def merge(self, left: BatchMeans, right: BatchMeans) -> BatchMeans:
        return add_batches(left, right)

    def compute(self, state: BatchMeans) -> Estimates:
        value, stderr, batches, size = mean_of_batches(state)
        ball = f"{'adaptive ' if self.adaptive else ''}{self.norm}"
        definition = f"{self.name}/epsilon_sharpness/{ball}/m={size}/epsilon={self.epsilon:g}/steps={self.num_steps}/v1"
        return {("epsilon_sharpness", "all"): Estimate(value, stderr, batches, "heuristic", definition, UNIT)}


def _scaled(point: Point, factor: float) -> Point:
    return {name: factor * u for name, u in point.items()}
