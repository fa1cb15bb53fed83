"""What is measured: a model, a dataset and one loss per example.

Shapes: B examples of one batch, C classes.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gradscale.errors import GradscaleError

Batch = Mapping[str, Tensor]


@runtime_checkable
class Examples(Protocol):
    """A dataset whose examples are numbered from 0 to len - 1."""

    def __len__(self) -> int: ...

    def batch(self, ids: range) -> Batch:
        """The examples `ids` (consecutive), each tensor with B = len(ids) rows, on the CPU."""
        ...


@runtime_checkable
class Task(Protocol):
    """What is measured. Any importable or picklable object with these three methods.

    Optional methods, called only by the measures that need them:

    - `labels(batch) -> [B]` integer classes: per-class estimates, the `label` column, and targets where there are none.
    - `features(model, batch) -> [B, F]`, what the last layer is given: the featurizer width.
    - `outputs(model, batch) -> [B, C]`, the scores f(x) that the loss is a function of, as logits: tangent kernels.
      Where an example's outputs are of several positions, these come one after another, and C may grow with the longest
      example of a batch as long as it has zeros where others are shorter.
    - `inputs(model, batch) -> [B, ...]`, the numbers x that f is a function of: pixels, or embeddings of tokens; and
      `outputs_of(model, inputs, batch) -> [B, C]`, f of such inputs, where what else f takes (masks) is from the batch.
      `outputs_of(model, inputs(model, batch), batch)` is `outputs(model, batch)`. Geometric complexity.
    - `input_vectors(model, batch) -> [B, d]`, where examples lie in input space (pixels, the mean embedding of a
      sequence): stiffness against distance.
    - `losses_of(outputs, batch) -> [B]`, the losses as a function of the outputs: `gs.tangent_spectrum`. Without it,
      what the model returns is held fixed, which serves where the outputs are entries of that.
    - `targets(batch) -> [B, C]`, what the outputs are fitted to: alignment. Without it, the labels one-hot.

    The batch of `labels` is on the host; that of the others is on the model's device.
    """

    def model(self, checkpoint: str | None) -> nn.Module:
        """The model at `checkpoint` (a path or URI), or at its initial weights for None.

        It must be in the mode in which it is to be measured: normally `.eval()`.
        """
        ...

    def examples(self) -> Examples: ...

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """One loss per example, [B], NOT reduced over the batch."""
        ...


class TensorExamples:
    """Examples held in memory: one row of every tensor is one example.

    >>> examples = TensorExamples(x=torch.zeros(5, 3), y=torch.arange(5))
    >>> len(examples), examples.batch(range(1, 3))["y"].tolist()
    (5, [1, 2])
    """

    def __init__(self, **tensors: Tensor) -> None:
        if not tensors:
            raise GradscaleError("TensorExamples must hold at least one tensor, got none; pass x=..., y=...")
        lengths = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(lengths.values())) != 1:
            raise GradscaleError(f"TensorExamples must have equally many rows in every tensor, got {lengths}")
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def batch(self, ids: range) -> Batch:
        return {name: tensor[ids.start : ids.stop] for name, tensor in self.tensors.items()}

    def fingerprint(self) -> str:
        return _digest(self.tensors)


def batch_size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def check_rows(found: Any, batch: Batch, method: str, columns: str, advice: str) -> Tensor:
    """What the task's `method` returned. Raises: GradscaleError unless it is floating point, [B, any number]."""
    right = isinstance(found, Tensor) and found.dim() == 2 and found.is_floating_point()
    if not right or len(found) != batch_size(batch):
        raise GradscaleError(
            f"task.{method} must return floating-point numbers of shape ({batch_size(batch)}, {columns}), got "
            f"{described(found)}; {advice}"
        )
    assert isinstance(found, Tensor)
    return found


def described(found: Any) -> str:
    return f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__


def fingerprint(examples: Examples) -> str:
    """A hash that changes when the data do: the dataset's own `fingerprint()`, or of its first and last rows."""
    own = getattr(examples, "fingerprint", None)
    if callable(own):
        return str(own())
    n = len(examples)
    head, tail = examples.batch(range(min(8, n))), examples.batch(range(max(0, n - 8), n))
    return f"{n}:{_digest(head)}:{_digest(tail)}"


def _digest(tensors: Batch) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def load_task(spec: str, **options: Any) -> Task:
    """The task that `spec` names: a ready name, or `module:attribute` (an instance, a class or a factory).

    `options` go to the ready task, class or factory as keyword arguments; None values are left out.
    Raises: GradscaleError if there is no such task, or it does not take the options.
    """
    from gradscale.tasks import READY

    given = {name: value for name, value in options.items() if value is not None}
    if ":" in spec:
        made = import_attribute(spec, "task")
    elif spec in READY:
        made = import_attribute(READY[spec].path, "task")
    else:
        raise GradscaleError(
            f"task must be one of {', '.join(READY)} or module:attribute, got {spec!r}; see `gradscale tasks`"
        )
    if isinstance(made, type) or not isinstance(made, Task):
        made = _construct(spec, made, given)
    elif given:
        raise GradscaleError(f"task {spec} is an instance and takes no options, got {', '.join(given)}")
    return check_task(made, spec)


def check_task(task: object, name: str) -> Task:
    missing = [m for m in ("model", "examples", "losses") if not callable(getattr(task, m, None))]
    if missing:
        raise GradscaleError(f"task {name} must have the methods model, examples and losses, got none named {missing}")
    assert isinstance(task, Task)
    return task


def _construct(spec: str, made: Any, options: Mapping[str, Any]) -> Any:
    if not callable(made):
        raise GradscaleError(f"task {spec} must be a Task or make one when called, got {type(made).__name__}")
    try:
        return made(**options)
    except TypeError as error:
        raise GradscaleError(f"task {spec} could not be made with the options {dict(options)}: {error}") from error


def import_attribute(path: str, what: str) -> Any:
    """The attribute that `module:attribute` names.

    Raises: GradscaleError if it cannot be imported; `what` it is goes into the message.
    """
    module_name, _, attribute = path.partition(":")
    try:
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise GradscaleError(
            f"{what} module {module_name!r} must be importable, got {error}; run from its folder or install it"
        ) from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise GradscaleError(f"{what} {path} must exist, got no attribute {part!r} in {module_name}")
        value = getattr(value, part)
    return value
