"""Measure one shard: a range of examples at one checkpoint, in fixed microbatches. No Ray, no files.

What comes back depends on the shard, the microbatch size, the weights and the device type alone, so that it
does not matter which worker did it, or how often.

Shapes: B examples of a microbatch, n of the shard, L parameters, K sketch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradscale.errors import GradscaleError
from gradscale.grads.coverage import select_parameters, sites
from gradscale.grads.modes import check_mode
from gradscale.grads.readings import Projected, Reading, Readings, SquaredNorms, Totals
from gradscale.grads.subject import Subject, fetched_batch, load_batch, read_batch, sent_batch
from gradscale.grads.waiting import Doubts
from gradscale.measures.identities import check_products, check_sums
from gradscale.measures.measure import Gathering, MicroBatch, Observation, Statistic
from gradscale.run.forward import finite_products, forward_products, probes_in
from gradscale.run.memory import explaining_memory
from gradscale.run.observations import Beside, BesideReader
from gradscale.sketches import BoundSketch, Sketch
from gradscale.sketches.gaussian import GaussianProbes
from gradscale.task import Batch, Task, batch_size


class Columns(NamedTuple):
    """The rows of a shard, column by column, in the order of the example ids; CPU tensors."""

    example_id: Tensor  # [n] int64
    label: Tensor | None  # [n] int64
    loss: Tensor  # [n] float64
    grad_sq_norm: Tensor  # [n] float64
    layer_sq_norms: Tensor  # [n, L] float64
    finite: Tensor  # [n] bool
    sketch: Tensor | None  # [n, K] float64; meaningless where not finite


class ShardResult(NamedTuple):
    columns: Columns
    states: dict[Statistic[Any], Any]  # on the CPU


def prepare(
    task: Task, checkpoint: str | None, params: str | None, device: str = "cpu", exclude: Sequence[str] = ()
) -> Subject:
    """Load the model of `checkpoint` and settle which module accounts for which parameter.

    Raises: GradscaleError if a parameter is not covered, or the model's mode makes examples depend on one another
    or on chance (BatchNorm or dropout in training mode).
    """
    model = task.model(checkpoint)
    if not isinstance(model, nn.Module):
        raise GradscaleError(f"task.model must return a torch.nn.Module, got {type(model).__name__}")
    check_mode(model)
    model = model.to(device)
    parameters = select_parameters(model, params, exclude)
    return Subject(task, model, task.examples(), parameters, sites(model, parameters))


def bound(sketch: Sketch | None, subject: Subject) -> BoundSketch | None:
    """The map of the subject's parameters.

    Raises: GradscaleError if K does not fit them.
    """
    return sketch.bind({name: p.numel() for name, p in subject.parameters.items()}) if sketch is not None else None


def run_shard(
    subject: Subject,
    ids: range,
    block: int,
    microbatch: int,
    statistics: Sequence[Statistic[Any]],
    sketch: BoundSketch | None,
    forward: bool = False,
) -> ShardResult:
    """The rows and the measures' states of the examples `ids`; `block` is their jackknife block.

    With `forward`, products with probes come from forward mode, which takes passes of its own over the examples.
    Raises: OutOfMemory with the microbatch size to try; GradscaleError as `read_gradients`, `forward_products`,
    `check_products` and `check_sums`.
    """
    needs = needs_of(statistics, sketch)
    probes = probes_in(needs) if forward else {}
    readings, labels = _read_range(subject, ids, microbatch, needs - probes.keys())
    readings = _with_products(subject, ids, microbatch, readings, probes)
    beside = _read_beside(subject, ids, microbatch, statistics, readings.finite)
    batch = finite_part(subject, ids, readings, labels, block, beside)
    check_products(batch, ids)
    check_sums(batch, ids, max(torch.finfo(parameter.dtype).eps for parameter in subject.parameters.values()))
    states = {statistic: statistic.update(statistic.init(), batch) for statistic in statistics}
    return ShardResult(_columns(ids, readings, labels, sketch), pytree.tree_map_only(Tensor, Tensor.cpu, states))


def labels_of(task: Task, batch: Batch) -> Tensor | None:
    """[B] int64 classes, or None if the task has no labels.

    Raises: GradscaleError if they are not one integer per example.
    """
    method: Callable[[Batch], Tensor] | None = getattr(task, "labels", None)
    if method is None:
        return None
    labels = method(batch)
    if labels.shape != (batch_size(batch),) or labels.is_floating_point():
        expected = f"integers of shape ({batch_size(batch)},)"
        raise GradscaleError(f"labels must be {expected}, got {labels.dtype} of shape {tuple(labels.shape)}")
    return labels.long()


def needs_of(statistics: Sequence[Statistic[Any]], sketch: BoundSketch | None) -> frozenset[Reading]:
    """What is read from the gradients of every microbatch."""
    beside = (Observation, Gathering)
    needs = [need for statistic in statistics for need in statistic.needs if not isinstance(need, beside)]
    return frozenset({SquaredNorms(), *needs, *([Projected(sketch)] if sketch is not None else [])})


def _read_range(
    subject: Subject, ids: range, microbatch: int, needs: frozenset[Reading]
) -> tuple[Readings, Tensor | None]:
    """The readings and labels of all examples `ids`. If some are not finite, all are read anew without them.

    The device is waited for where its first batch decides something, and at the end. If it turns out there that a
    later batch should not have relied on the first, the pass is made again with every check at once: it raises, or
    decides anew at every call.
    """
    exclude = torch.zeros(len(ids), dtype=torch.bool, device=subject.device)
    found = doubted = False
    while True:
        doubts = None if doubted else Doubts()
        totals: Totals = {}
        parts: list[Readings] = []
        labels: list[Tensor] = []
        for start in range(0, len(ids), microbatch):
            part = slice(start, min(start + microbatch, len(ids)))
            with explaining_memory(microbatch):
                on_host = fetched_batch(subject, ids[part])
                classes = labels_of(subject.task, on_host)
                labels += [classes] if classes is not None else []
                left_out = exclude[part] if found else None
                parts.append(
                    read_batch(subject, sent_batch(subject, on_host), needs, classes, left_out, totals, doubts)
                )
        if doubts is not None and doubts.justified():
            doubted = True
            continue
        readings = _joined(parts)
        spoilt = ~readings.finite & ~exclude
        if not spoilt.any():
            return readings, torch.cat(labels).to(subject.device) if labels else None
        exclude, found = exclude | spoilt, True


def _with_products(
    subject: Subject, ids: range, microbatch: int, readings: Readings, probes: Mapping[Projected, GaussianProbes]
) -> Readings:
    """`readings` and the products with `probes` by forward mode. The shard's batches are held on the host meanwhile."""
    if not probes:
        return readings
    with explaining_memory(microbatch):
        batches = [fetched_batch(subject, ids[start : start + microbatch]) for start in range(0, len(ids), microbatch)]
        found = {
            reading: finite_products(forward_products(subject, batches, vectors), readings.finite, ids)
            for reading, vectors in probes.items()
        }
    return readings._replace(projections={**readings.projections, **found})


def _read_beside(
    subject: Subject, ids: range, microbatch: int, statistics: Sequence[Statistic[Any]], keep: Tensor
) -> Beside:
    """What is observed and gathered of the examples `ids`; of the latter, those for which `keep` [n] holds."""
    reader = BesideReader(subject, statistics)
    for start in range(0, len(ids) if reader.asked else 0, microbatch):
        part = slice(start, min(start + microbatch, len(ids)))
        with explaining_memory(microbatch):
            reader.read(load_batch(subject, ids[part]), ids[part], keep[part])
    return reader.found()


def _joined(parts: Sequence[Readings]) -> Readings:
    """The readings of consecutive microbatches as one; they share their sums."""
    return Readings(
        torch.cat([part.losses for part in parts]),
        torch.cat([part.finite for part in parts]),
        torch.cat([part.sq_norms for part in parts]),
        parts[-1].sums,
        {name: torch.cat([part.projections[name] for part in parts]) for name in parts[0].projections},
    )


def finite_part(
    subject: Subject,
    ids: range,
    readings: Readings,
    labels: Tensor | None,
    block: int,
    beside: Beside,
) -> MicroBatch:
    """What the measures are given of the examples `ids`: those that are finite."""
    keep = readings.finite
    return MicroBatch(
        torch.arange(ids.start, ids.stop, device=keep.device)[keep],
        readings.losses[keep],
        labels[keep] if labels is not None else None,
        tuple(subject.parameters),
        readings.sq_norms[keep],
        readings.sums,
        {reading: products[keep] for reading, products in readings.projections.items()},
        block,
        {observation: found[keep.to(found.device)] for observation, found in beside.observations.items()},
        beside.gathered,
    )


def _columns(ids: range, readings: Readings, labels: Tensor | None, sketch: BoundSketch | None) -> Columns:
    keep = readings.finite
    on_cpu: Columns = pytree.tree_map_only(
        Tensor,
        Tensor.cpu,
        Columns(
            torch.arange(ids.start, ids.stop),
            labels,
            readings.losses,
            readings.sq_norms.sum(dim=1).where(keep, torch.nan),
            readings.sq_norms.where(keep[:, None], torch.nan),
            keep,
            readings.projections[Projected(sketch)] if sketch is not None else None,
        ),
    )
    return on_cpu
