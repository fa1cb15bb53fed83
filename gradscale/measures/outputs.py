"""What a task says of the function that it fits: its outputs f(x), their inputs, what they are fitted to.

Shapes: B examples, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gradscale.errors import GradscaleError
from gradscale.grads.subject import Subject
from gradscale.sketches.philox import key_of
from gradscale.sketches.words import signs_of
from gradscale.task import Batch, batch_size, check_rows, described

VERSION = 1
_SIGNATURES = {
    "outputs": "outputs(model, batch) -> [B, C]",
    "inputs": "inputs(model, batch) -> [B, ...]",
    "outputs_of": "outputs_of(model, inputs, batch) -> [B, C]",
}


def outputs(subject: Subject, batch: Batch, measure: str) -> Tensor:
    """[B, C]: f(x), in the graph of the model's parameters."""
    return checked(_method(subject, "outputs", measure)(subject.model, batch), batch, "outputs")


def inputs(subject: Subject, batch: Batch, measure: str) -> Tensor:
    """[B, ...]: x, detached. Raises: GradscaleError also where outputs_of is missing, which has to take it."""
    _method(subject, "outputs_of", measure)
    with torch.no_grad():
        found = _method(subject, "inputs", measure)(subject.model, batch)
    if not isinstance(found, Tensor) or found.shape[:1] != (batch_size(batch),) or not found.is_floating_point():
        raise GradscaleError(
            f"task.inputs must return floating-point numbers with {batch_size(batch)} rows, got {described(found)}; "
            "give embeddings where the batch holds token ids"
        )
    return found.detach()


def outputs_of(subject: Subject, points: Tensor, batch: Batch, measure: str) -> Tensor:
    """[B, C]: f at `points`, which require grad. Raises: GradscaleError if it does not depend on them."""
    found = checked(_method(subject, "outputs_of", measure)(subject.model, points, batch), batch, "outputs_of")
    if not found.requires_grad:
        raise independent()
    return found


def independent() -> GradscaleError:
    return GradscaleError(
        "task.outputs_of must depend on the inputs that it is given, got outputs without a gradient; compute them from "
        "`inputs`, not from the batch, and without torch.no_grad()"
    )


def targets(subject: Subject, batch: Batch, size: int, measure: str) -> Tensor:
    """[B, C] float64: task.targets(batch), or the labels one-hot among the C = `size` outputs."""
    given: Callable[[Batch], Tensor] | None = getattr(subject.task, "targets", None)
    if given is not None:
        found = given(batch)
        if found.shape != (batch_size(batch), size):
            raise GradscaleError(
                f"task.targets must return shape ({batch_size(batch)}, {size}), that of the outputs, got "
                f"{tuple(found.shape)}; give one target for each output"
            )
        return found.detach().double()
    labels: Callable[[Batch], Tensor] | None = getattr(subject.task, "labels", None)
    if labels is None:
        raise GradscaleError(
            f"the measure {measure} needs task.targets(batch) -> [B, C] or task.labels(batch) -> [B] for alignment, "
            "got a task with neither; add one, or leave alignment out"
        )
    classes = labels({name: tensor.cpu() for name, tensor in batch.items()}).long()
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < size:
        raise GradscaleError(
            f"labels must be from 0 to {size - 1} to be one-hot among the {size} outputs, got {int(classes.min())} to "
            f"{int(classes.max())}; add task.targets(batch) -> [B, C]"
        )
    return F.one_hot(classes, size).double().to(next(iter(batch.values())).device)


def output_signs(ids: range, probe: int, seed: int, like: Tensor) -> Tensor:
    """[B, C] of +1 and -1: v of an example depends on the seed, the example's id and the probe alone."""
    rows = torch.arange(ids.start, ids.stop, device=like.device)
    return signs_of(key_of("rademacher", VERSION, seed, "outputs"), rows, like.shape[1], probe).to(like.dtype)


def checked(found: Any, batch: Batch, name: str) -> Tensor:
    """Raises: GradscaleError if `found` is not a floating-point tensor [B, C]."""
    return check_rows(found, batch, name, "C", "flatten what belongs to one example into one row")


def _method(subject: Subject, name: str, measure: str) -> Callable[..., Any]:
    found: Callable[..., Any] | None = getattr(subject.task, name, None)
    if found is None:
        raise GradscaleError(
            f"the measure {measure} needs task.{_SIGNATURES[name]}, got a task without it; add it, or leave the "
            f"measure {measure} out"
        )
    return found
