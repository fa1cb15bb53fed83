"""A measure held to its laws before anyone relies on it: one call, on a network of 39 parameters. No Ray, no files.

Shapes: B examples, C outputs, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from gradscale.errors import GradscaleError
from gradscale.grads.subject import Subject, load_batch, read_batch
from gradscale.measures.measure import Estimate, Estimates, Measure, MicroBatch, OverSteps, Statistic, statistic_of
from gradscale.measures.settings import check_measures
from gradscale.run import laws
from gradscale.run.observations import BesideReader
from gradscale.run.shard import finite_part, labels_of, needs_of, prepare
from gradscale.task import Batch, Task, TensorExamples

_SIZES = (4, 3, 1, 5, 2, 4, 3)  # of the microbatches
_BLOCKS = (0, 0, 1, 1, 1, 2, 2)
_EMPTY = 4  # the microbatch of which no example is finite
_STATUSES = ("identity", "estimator", "heuristic", "conditional")
_SCOPES = ("all", "union", "layer", "class")


def check_measure(measure: Measure, task: Task | None = None) -> tuple[str, ...]:
    """Hold a measure to the laws that let a run be cut into shards, merged, stored and resumed; their names, all held.

    On a small network for three classes, with every optional method that a `Task` can have; or on the first 22 examples
    of `task`, for measures that ask for more. That the estimates are those of the definition no law can tell: hold them
    to it in a test of your own.

    Cost: about 25 passes over 22 examples, for each pass that the measure takes.
    Raises: GradscaleError naming the law that is broken and the part of the state where it is.
    Source: Izbicki (2013), ICML, "Algebraic classifiers": what is a monoid can be computed in parts, in parallel.

    >>> from gradscale.measures.coherence import Coherence
    >>> check_measure(Coherence())[:4]
    ('settings', 'state', 'arguments left untouched', 'unit')
    """
    (checked,) = check_measures([measure])
    return tuple(_held(checked, statistic_of(checked), task or _Problem()))


def _held(measure: Measure, statistic: Statistic[Any], task: Task) -> Iterator[str]:
    """The name of every law once it has been held."""
    for settings in (measure, statistic):
        laws.hold_pickling(settings)
    yield "settings"
    batches = microbatches(prepare(task, None, None), statistic)
    empty = statistic.init()
    a = [statistic.update(empty, batch) for batch in batches]
    for state in (empty, *a):
        _check_state(statistic, state)
    yield "state"
    for name, hold in _laws(statistic, a, batches).items():
        for k in range(len(a)):
            hold(k)
        yield name
    for state in (a[_EMPTY], a[0], reduce(statistic.merge, a)):
        _check_estimates(measure, measure.compute(state))
    if isinstance(measure, OverSteps):
        _check_estimates(measure, measure.compute_over_steps(a[:2]))
    yield "estimates"


def _laws(
    statistic: Statistic[Any], a: Sequence[Any], batches: Sequence[MicroBatch]
) -> dict[str, Callable[[int], None]]:
    """Each law of the k-th state, and those after it in a ring."""
    J = len(a)

    def split(k: int) -> None:
        if k + 1 < J and batches[k].block == batches[k + 1].block:
            laws.hold_splitting(statistic, a[0], batches[k], batches[k + 1])

    return {
        "arguments left untouched": lambda k: laws.hold_arguments(statistic, a[k], a[(k + 1) % J], batches[k]),
        "unit": lambda k: laws.hold_unit(statistic, a[k]),
        "commutativity": lambda k: laws.hold_commutativity(statistic, a[k], a[(k + 1) % J]),
        "associativity": lambda k: laws.hold_associativity(statistic, a[k], a[(k + 1) % J], a[(k + 2) % J]),
        "exchange of update and merge": lambda k: laws.hold_exchange(
            statistic, a[k], a[(k + 1) % J], batches[(k + 2) % J]
        ),
        "splitting of microbatches": split,
        "storage": lambda k: laws.hold_storage({statistic: a[k]}),
    }


def microbatches(subject: Subject, statistic: Statistic[Any]) -> list[MicroBatch]:
    """Seven microbatches in three blocks, as a run reads them, of consecutive examples; one has no finite example.

    Raises: GradscaleError if the task has fewer examples, or lacks what the statistic needs.
    """
    if len(subject.examples) < sum(_SIZES):
        raise GradscaleError(
            f"task must have at least {sum(_SIZES)} examples to hold a measure to its laws, got "
            f"{len(subject.examples)}; leave the task out, or give a larger one"
        )
    return [
        _microbatch(subject, statistic, range(sum(_SIZES[:j]), sum(_SIZES[: j + 1])), _BLOCKS[j], finite=j != _EMPTY)
        for j in range(len(_SIZES))
    ]


def _microbatch(subject: Subject, statistic: Statistic[Any], ids: range, block: int, *, finite: bool) -> MicroBatch:
    batch = load_batch(subject, ids)
    labels = labels_of(subject.task, batch)
    left_out = None if finite else torch.ones(len(ids), dtype=torch.bool, device=subject.device)
    readings = read_batch(subject, batch, needs_of([statistic], None), labels, left_out)
    reader = BesideReader(subject, [statistic])
    reader.read(batch, ids, readings.finite)
    return finite_part(subject, ids, readings, labels, block, reader.found())


def _check_state(statistic: Statistic[Any], state: Any) -> None:
    """Raises: GradscaleError unless it is a NamedTuple of tensors, or of mappings from string to tensor, on the CPU."""
    name, fields = type(statistic).__name__, getattr(state, "_fields", None)
    if fields is None:
        raise GradscaleError(
            f"state of {name} must be a NamedTuple of tensors, got {type(state).__name__}; make it one"
        )
    for field in fields:
        value = getattr(state, field)
        parts = value.values() if isinstance(value, Mapping) else [value]
        keys = [key for key in value if not isinstance(key, str)] if isinstance(value, Mapping) else []
        if keys or not all(isinstance(part, Tensor) for part in parts):
            raise GradscaleError(
                f"state of {name} must have a tensor, or a mapping from string to tensor, in field {field}, got "
                f"{value!r}; wrap numbers in torch.tensor"
            )


def _check_estimates(measure: Measure, estimates: Estimates) -> None:
    """Raises: GradscaleError unless the estimates can be written as rows of estimates.parquet."""
    for key, estimate in estimates.items():
        wrong = _wrong_with(key, estimate)
        if wrong:
            raise GradscaleError(f"estimate {key} of {measure.name} must {wrong}; see gradscale.Estimate")


def _wrong_with(key: Any, estimate: Any) -> str:
    """What an estimate must be and is not, and what it is; empty if nothing is wrong."""
    if not (isinstance(key, tuple) and len(key) == 2 and all(isinstance(part, str) for part in key)):
        return f"have a key (name, scope), got {key!r}"
    if key[1].partition(":")[0] not in _SCOPES:
        return f"have the scope all, union, layer:<parameter> or class:<a>[,<b>], got {key[1]!r}"
    if not isinstance(estimate, Estimate):
        return f"be an Estimate, got {type(estimate).__name__}"
    if not isinstance(estimate.value, float | int):
        return f"have a number for a value, got {estimate.value!r}"
    error = estimate.stderr
    if error is not None and not (isinstance(error, float | int) and (math.isnan(error) or error >= 0)):
        return f"have a stderr of at least 0, NaN if it is unknown or None if the value is exact, got {error!r}"
    if estimate.status not in _STATUSES:
        return f"have one of the statuses {', '.join(_STATUSES)}, got {estimate.status!r}"
    if not isinstance(estimate.n, int) or estimate.n < 0:
        return f"count examples in n, got {estimate.n!r}"
    return ""


@dataclass(frozen=True)
class _Problem:
    """Random rows in three classes, scored by a network of 39 parameters: 5 -> 4 -> 3."""

    def model(self, checkpoint: str | None) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()

    def examples(self) -> TensorExamples:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(sum(_SIZES), 5, dtype=torch.float64, generator=generator)
        return TensorExamples(x=x, label=torch.randint(3, (len(x),), generator=generator))

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.losses_of(model(batch["x"]), batch)

    def losses_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch["label"], reduction="none")

    def labels(self, batch: Batch) -> Tensor:
        return batch["label"]

    def inputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return batch["x"]

    def input_vectors(self, model: nn.Module, batch: Batch) -> Tensor:
        return batch["x"]

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.outputs_of(model, batch["x"], batch)

    def outputs_of(self, model: nn.Module, inputs: Tensor, batch: Batch) -> Tensor:
        scores: Tensor = model(inputs)
        return scores

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """[B, 4]: what the last layer is given."""
        assert isinstance(model, nn.Sequential)
        states: Tensor = model[:2](batch["x"])
        return states
