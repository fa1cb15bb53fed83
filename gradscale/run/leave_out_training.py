"""The trainings of `gs.leave_out_gap`, each in one process: on all examples, and without a block. No Ray, no files.

All are full-batch gradient descent in float64 from the task's initial weights, with the examples in the order of their
ids, so that two of them differ by the examples left out alone. What comes back depends on the settings and the
number of threads alone, not on which process did it.

Shapes: n examples, B of a batch, C outputs of each, P entries of one parameter, T steps.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradscale.errors import GradscaleError
from gradscale.grads.readings import GradientSums, SquaredNorms
from gradscale.grads.subject import Subject, load_batch, read_batch
from gradscale.measures.effective_gram_dense import EffectiveGramMatrix, Linearized, effective_gram
from gradscale.measures.leave_out_path import FullPath, LeftOutPath
from gradscale.run.check import Plain, autograd, check_subject
from gradscale.run.linearize import check_by_outputs, linearize
from gradscale.run.shard import prepare
from gradscale.task import Batch, Examples, Task

_BY_BLOCK = GradientSums(by_class=True)
_TOGETHER = 8  # examples whose Jacobians are taken together: fewer passes, more zeros


@dataclass(frozen=True)
class Training:
    """What every training needs to know. `examples`: the first so many, None for all."""

    task: Task
    checkpoint: str | None
    examples: int | None
    learning_rate: float
    steps: int
    blocks: tuple[tuple[int, ...], ...] = ()


class Described(NamedTuple):
    """What a worker finds out about the task, for the plan."""

    examples: int
    outputs: int | None  # C, where it was asked for
    data_fingerprint: str
    weights_fingerprint: str
    versions: dict[str, str]


def describe(training: Training, gram: bool) -> Described:
    """Load the model, hold gradscale's gradients to autograd's, and say what the task is; C only for `gram`.

    Raises: GradscaleError if the task cannot be measured, or its losses are no function of one output for `gram`.
    """
    from gradscale import __version__

    subject = _subject(training)
    total = len(subject.examples)
    n = total if training.examples is None else training.examples
    if not 2 <= n <= total:
        raise GradscaleError(f"examples must be from 2 to the {total} that the task has, got {n}; take others")
    check_subject(subject)
    first = load_batch(subject, range(1))
    outputs = linearize(subject, first).residuals.shape[1] if gram else None
    weights = dict(subject.model.state_dict())
    data = load_batch(subject, range(n))
    versions = {"gradscale": __version__, "torch": torch.__version__}
    return Described(n, outputs, _digest(data), _digest(weights), versions)


def train_full(training: Training) -> FullPath:
    """Train on all examples, with the gradients of every block beside: K P numbers in float64.

    Cost: T + 1 passes of gradscale's, one of them about ten plain ones. Raises: GradscaleError if it diverges.
    """
    subject, batch, n = _start(training)
    size = torch.tensor([len(block) for block in training.blocks], dtype=torch.float64)
    labels = torch.full((n,), len(size), dtype=torch.int64)
    for b, block in enumerate(training.blocks):
        labels[list(block)] = b
    recorded = []
    for step in range(training.steps + 1):
        readings = read_batch(subject, batch, frozenset({SquaredNorms(), _BY_BLOCK}), labels)
        _check_finite(readings.losses, step, "on all examples")
        by_block = _rows(readings.sums[_BY_BLOCK], len(size), subject.parameters)
        total = by_block.sum(dim=0)
        mean, means = total / n, by_block[: len(size)] / size[:, None]
        others = (total - by_block[: len(size)]) / (n - size)[:, None]
        losses = torch.stack([readings.losses[list(block)].mean() for block in training.blocks])
        covariance = (readings.sq_norms.sum() - n * mean.square().sum()) / (n - 1)
        along, without = means @ mean, (means * others).sum(dim=1)
        eta = training.learning_rate
        recorded.append((readings.losses.mean(), covariance, losses, -eta * along, -eta * without))
        if step < training.steps:
            _move(subject.parameters, -eta * mean)
    return FullPath(*(torch.stack(column) for column in zip(*recorded, strict=True)))


def train_without(training: Training, number: int) -> LeftOutPath:
    """Train on all examples but those of one block, and record that block's mean loss and its change by each step.

    Cost: T + 1 forward and backward passes over the n examples. Raises: GradscaleError if it diverges.
    """
    subject, batch, n = _start(training)
    block = training.blocks[number]
    inside = _select(batch, block)
    others = _select(batch, [i for i in range(n) if i not in set(block)])
    recorded = []
    for step in range(training.steps + 1):
        kept, left_out = autograd(subject, others), autograd(subject, inside)
        _check_finite(torch.cat([kept.losses, left_out.losses]), step, f"without the examples {_named(block)}")
        change = -training.learning_rate * _flat(kept) / (n - len(block))
        recorded.append((left_out.losses.mean(), _flat(left_out) @ change / len(block)))
        if step < training.steps:
            _move(subject.parameters, change)
    return LeftOutPath(*(torch.stack(column) for column in zip(*recorded, strict=True)))


def train_for_gram(training: Training, contraction: Tensor) -> EffectiveGramMatrix:
    """Train on all examples once more, with the Jacobians of all outputs at every step; see `effective_gram`.

    Raises: GradscaleError if the losses depend on the parameters other than by the model's output.
    """
    return effective_gram(_linearized_path(training), contraction, training.learning_rate)


@dataclass(frozen=True)
class _Wide:
    """A task in float64, weights and data; its models are copies, which may be trained."""

    task: Task

    def model(self, checkpoint: str | None) -> nn.Module:
        model = self.task.model(checkpoint)
        return copy.deepcopy(model).double() if isinstance(model, nn.Module) else model

    def examples(self) -> Examples:
        return _WideExamples(self.task.examples())

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.task.losses(model, batch)


@dataclass(frozen=True)
class _WideExamples:
    narrow: Examples

    def __len__(self) -> int:
        return len(self.narrow)

    def batch(self, ids: range) -> Batch:
        found = self.narrow.batch(ids)
        return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def _subject(training: Training) -> Subject:
    return prepare(_Wide(training.task), training.checkpoint, None)


def _start(training: Training) -> tuple[Subject, Batch, int]:
    subject = _subject(training)
    n = len(subject.examples) if training.examples is None else training.examples
    return subject, load_batch(subject, range(n)), n


def _linearized_path(training: Training) -> Iterator[Linearized]:
    subject, batch, n = _start(training)
    for step in range(training.steps):
        parts = [linearize(subject, _select(batch, ids)) for ids in torch.arange(n).split(_TOGETHER)]
        point = Linearized(*(torch.cat(column) for column in zip(*parts, strict=True)))
        plain = autograd(subject, batch)
        _check_finite(plain.losses, step, "on all examples")
        check_by_outputs(point, _flat(plain))
        yield point
        _move(subject.parameters, -training.learning_rate * _flat(plain) / n)


def _check_finite(losses: Tensor, step: int, which: str) -> None:
    if not losses.isfinite().all():
        raise GradscaleError(
            f"the losses must stay finite, got {losses[~losses.isfinite()][0]} at step {step} of the training {which}; "
            "take a smaller learning_rate, or other examples"
        )


def _rows(sums: Mapping[int | None, Mapping[str, Tensor]], blocks: int, parameters: Mapping[str, Any]) -> Tensor:
    """[K + 1, all P] float64: the sum of gradients of every block, and of the examples in none."""
    zeros = {name: torch.zeros(parameter.numel()) for name, parameter in parameters.items()}
    return torch.stack(
        [torch.cat([sums.get(b, zeros)[name].reshape(-1).double() for name in parameters]) for b in range(blocks + 1)]
    )


def _flat(plain: Plain) -> Tensor:
    return torch.cat(list(plain.sums.values()))


def _move(parameters: Mapping[str, nn.Parameter], change: Tensor) -> None:
    with torch.no_grad():
        parts = change.split([parameter.numel() for parameter in parameters.values()])
        for parameter, part in zip(parameters.values(), parts, strict=True):
            parameter.add_(part.view_as(parameter))


def _select(batch: Batch, ids: Sequence[int] | Tensor) -> Batch:
    chosen = torch.as_tensor(ids, dtype=torch.int64)
    return {name: tensor[chosen] for name, tensor in batch.items()}


def _named(block: Sequence[int]) -> str:
    return ", ".join(str(i) for i in block[:8]) + (", …" if len(block) > 8 else "")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
