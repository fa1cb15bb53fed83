"""The readings of one training step on this rank, over its microbatches. No collectives.

Shapes: B examples of a microbatch, n of this rank's part of the step, P entries of one parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.grads.call import precision
from gradscale.grads.readings import Readings
from gradscale.grads.ride import Ride, joined, scaled
from gradscale.grads.waiting import Doubts
from gradscale.run.attach_plan import Blocks
from gradscale.run.attach_setup import Inputs, Setup, checked_labels, checked_losses
from gradscale.run.attach_together import rank


class Block(NamedTuple):
    """Of consecutive examples of a rank that the jackknife leaves out together: g_i W / N, see `Part`."""

    number: int
    readings: Readings
    labels: Tensor | None  # [n of the block]

    @property
    def n(self) -> int:
        return len(self.readings.losses)


class Part(NamedTuple):
    """Of one rank: g_i W / N, that is, its examples' shares in the step's gradient, times the number of ranks W."""

    blocks: tuple[Block, ...]
    by_rules: Mapping[str, Tensor]  # [P]: the sums of them all from the factors, where they are to be checked

    @property
    def n(self) -> int:
        return sum(block.n for block in self.blocks)


class StepReader:
    """Hooks on the engine's module from construction to `close`; whatever fails in them is kept for `finished`."""

    def __init__(self, setup: Setup, blocks: Blocks, check: bool) -> None:
        self._setup, self._blocks, self._check = setup, blocks, check
        self._doubts = Doubts()
        self._problem: Exception | None = None
        self._ride: Ride | None = None
        self._losses: Tensor | None = None  # of the microbatch under way
        self._labels: Tensor | None = None
        self._microbatches = 0
        self._found: list[Block] = []
        self._by_rules: dict[str, Tensor] = {}
        module = setup.module
        self._handles = [
            module.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            module.register_forward_hook(self._after_forward, with_kwargs=True),
        ]

    def close(self) -> None:
        self._drop()
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def backward(self, loss: Any, scale_wrt_gas: bool) -> Iterator[None]:
        """Around the engine's backward of `loss`, which divides it by the microbatches of a step if `scale_wrt_gas`."""
        ride, seen = self._ride, list[Tensor]()
        if self._problem is None and (ride is None or ride.finished):
            self._failed(
                GradscaleError(
                    "every backward must follow a call of the engine of its own, got another backward; add up the "
                    "losses and go backward once"
                )
            )
        if ride is None or self._problem is not None:
            yield
            return
        hooked = isinstance(loss, Tensor) and loss.requires_grad
        handle = loss.register_hook(lambda slope: seen.append(slope.detach().clone())) if hooked else None
        try:
            with ride.going_back():
                yield
        finally:
            if handle is not None:
                handle.remove()
        with self._guarded():
            self._take(ride, seen, scale_wrt_gas)

    def finished(self) -> Part:
        """Raises: what has failed; GradscaleError if there is nothing, or a gradient that is not finite."""
        with self._guarded():
            if not self._found:
                raise GradscaleError("a measured step must have a microbatch, got none; go backward by engine.backward")
            if self._doubts.justified():
                raise GradscaleError("what a module's first call decided must hold for the later ones, got another")
            part = Part(tuple(self._found), self._by_rules)
            spoilt = sum(int((~block.readings.finite).sum()) for block in part.blocks)
            if spoilt:
                raise GradscaleError(
                    f"gradients of a measured step must be finite, got {spoilt} of {part.n} examples that are not; the "
                    "step's sums hold them"
                )
        if self._problem is not None:
            raise self._problem
        return part

    def _before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._problem is not None or not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        if self._ride is not None and not self._ride.finished:
            return  # whose hooks see that there is a second call
        self._drop()
        with self._guarded(), torch.no_grad():
            setup, inputs = self._setup, Inputs(args, kwargs)
            packing = setup.packing(inputs)
            rows = setup.rows(inputs, packing)
            size = rows if packing is None else packing.examples
            self._labels = None if setup.labels is None else checked_labels(setup.labels(inputs), size)
            self._ride = Ride(
                module,
                setup.sites,
                setup.parameters,
                rows,
                setup.needs,
                self._failed,
                self._labels,
                self._doubts,
                packing,
                self._blocks.parts,
                self._check,
            )

    def _after_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._ride is None or self._ride.finished or not torch.is_grad_enabled():
            return
        self._ride.forward_is_over()
        with self._guarded(), torch.no_grad():
            self._losses = None
            if self._setup.losses is not None and "loss" in self._setup.columns:
                found = self._setup.losses(output, Inputs(args, kwargs))
                self._losses = checked_losses(found, self._ride.examples)

    def _take(self, ride: Ride, seen: list[Tensor], scale_wrt_gas: bool) -> None:
        if self._problem is not None:
            return
        if len(seen) != 1:
            raise GradscaleError(
                f"the loss must get one gradient in engine.backward, got {len(seen)}; pass it the loss itself, "
                "a tensor that requires grad"
            )
        microbatches = int(self._setup.engine.gradient_accumulation_steps()) if scale_wrt_gas else 1
        scale = float(seen[0]) * microbatches
        if scale == 0:
            raise GradscaleError("the gradient that the loss gets must not be zero, got 0; its examples have no share")
        first = self._blocks.first(rank(), self._microbatches)
        self._microbatches += 1
        with torch.no_grad(), precision(self._setup.device, None):
            start = 0
            for number, readings in enumerate(ride.finish(), first):
                part = slice(start, start + len(readings.losses))
                start = part.stop
                if self._losses is not None:
                    readings = readings._replace(losses=self._losses[part])
                labels = None if self._labels is None else self._labels[part]
                self._keep(Block(number, scaled(readings, 1 / scale), labels))
            if self._check:
                for name, total in ride.sums_by_rules().items():
                    before = self._by_rules.get(name)
                    self._by_rules[name] = total.div_(scale) if before is None else before.add_(total, alpha=1 / scale)

    def _keep(self, block: Block) -> None:
        """After the blocks of before, or as a part of the last one."""
        if self._found and self._found[-1].number == block.number:
            before = self._found.pop()
            labels = before.labels
            if labels is not None and block.labels is not None:
                labels = torch.cat([labels, block.labels])
            block = Block(block.number, joined([before.readings, block.readings]), labels)
        self._found.append(block)

    def _drop(self) -> None:
        if self._ride is not None:
            self._ride.stop()
            self._ride = None

    def _failed(self, problem: Exception) -> None:
        self._problem = self._problem or problem

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as problem:
            self._failed(problem)
