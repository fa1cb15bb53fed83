"""The Measure protocol, and what a measure is given and gives back.

A `Statistic` is what is added up over the data: a commutative monoid (`init` is its unit, `merge` its
operation) with `update`, which takes in one microbatch. A `Measure` computes estimates from the final
state of one statistic. Two measures whose `statistic` is equal share one state, so that coherence and
dispersion together hold the sum of gradients once. A class with all five methods is both at once.

Shapes: B examples, L parameters, P entries of one parameter, K outputs of a linear map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from gradscale.grads.readings import GradientSums, Projected, Reading, has_direction
from gradscale.grads.subject import Subject
from gradscale.task import Batch

S = TypeVar("S", bound=NamedTuple)


class Estimate(NamedTuple):
    """One number with its error.

    `stderr` is None where the value is exact, NaN where the error cannot be told (a single block).
    `status` is identity, estimator, heuristic or conditional.
    `scope` is `all`, `union`, `layer:<parameter>` or `class:<a>[,<b>]`.
    """

    value: float
    stderr: float | None
    n: int
    status: str
    definition: str
    unit: str


@runtime_checkable
class Observation(Protocol):
    """What a measure reads from the task beside the gradients of the losses, in passes of its own: a row an example.

    Frozen, hashable settings; what they give depends on the example and its id alone, not on its batch. `cost` is a
    line for `gradscale plan`. It is tried on the first example before anything is measured: what the task lacks is to
    be told there.
    """

    @property
    def cost(self) -> str: ...

    def observe(self, subject: Subject, batch: Batch, ids: range) -> Tensor:
        """[B, ...] of the examples `ids`, whose batch is on the subject's device."""
        ...


@runtime_checkable
class Gathering(Protocol[S]):
    """As an `Observation`, where a row an example would not do: sums of P numbers, or what a whole batch gives.

    S is a commutative monoid, as the state of a `Statistic`; that of a shard is merged from those of its microbatches,
    in their order.
    """

    @property
    def cost(self) -> str: ...

    def gather(self, subject: Subject, batch: Batch, ids: range, keep: Tensor) -> S:
        """What the examples `ids` for which `keep` [B] holds give; the others have a loss or gradient not finite.

        The batch and `keep` are on the subject's device, S on the CPU.
        """
        ...

    def merge(self, left: S, right: S) -> S: ...


class MicroBatch(NamedTuple):
    """The readings of the finite examples of one shard; those with a non-finite loss or gradient are left out.

    `block` numbers the jackknife block (a contiguous run of shards) that the microbatch belongs to.
    `sums[reading][class or None][parameter]` is [P]; `projections[reading]` is [B, K]; `observations[observation]` is
    [B, ...], and `gathered[gathering]` its S.
    """

    ids: Tensor  # [B] int64
    losses: Tensor  # [B] float64
    labels: Tensor | None  # [B] int64
    layers: tuple[str, ...]  # L parameter names, the columns of sq_norms
    sq_norms: Tensor  # [B, L] float64
    sums: Mapping[GradientSums, Mapping[int | None, Mapping[str, Tensor]]]
    projections: Mapping[Projected, Tensor]
    block: int
    observations: Mapping[Observation, Tensor] = {}
    gathered: Mapping[Gathering[Any], Any] = {}

    @property
    def directed(self) -> Tensor:
        """[B] bool: the examples that have a part in sums of unit gradients; the others have zero gradients."""
        return has_direction(self.sq_norms)


@runtime_checkable
class Statistic(Protocol[S]):
    """What is added up. S is a NamedTuple of tensors or of mappings from string to tensor.

    Instances are frozen, hashable settings; `update` and `merge` leave their arguments untouched.
    """

    @property
    def needs(self) -> frozenset[Reading | Observation | Gathering[Any]]: ...

    def init(self) -> S: ...

    def update(self, state: S, batch: MicroBatch) -> S: ...

    def merge(self, left: S, right: S) -> S: ...


Estimates = Mapping[tuple[str, str], Estimate]  # (name, scope) -> Estimate


@runtime_checkable
class Measure(Protocol):
    """Settings only: a frozen dataclass. `statistic` defaults to the measure itself.

    `summary` is one line for `gradscale measures`: definition, cost, source.
    """

    @property
    def name(self) -> str: ...

    @property
    def summary(self) -> str: ...

    def compute(self, state: Any) -> Estimates: ...


@runtime_checkable
class OverSteps(Protocol):
    """A measure that also has a value for several checkpoints together."""

    def compute_over_steps(self, states: Sequence[Any]) -> Estimates:
        """Estimates for the union of the checkpoints, `states` in step order; their scope is `union`."""
        ...


def statistic_of(measure: Measure) -> Statistic[Any]:
    statistic = getattr(measure, "statistic", measure)
    assert isinstance(statistic, Statistic), f"{measure} has no statistic"
    return statistic
