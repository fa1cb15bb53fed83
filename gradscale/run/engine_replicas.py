"""Gradients and exact Hessian products on an engine whose ranks hold all weights: ZeRO-0, 1 and 2.

The engine's module is used, not the engine, and gradients are asked for, not accumulated: no hook of DeepSpeed runs,
and gradients that wait for a step stay as they are. Weights of low precision are taken from their float32 masters.

Shapes: P entries in all, p of them here, k vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn
from torch.func import functional_call

from gradscale.curvature.layout import Layout, Part
from gradscale.curvature.processes import gathered, reduce_scattered
from gradscale.curvature.products import add_parts
from gradscale.grads.functional import Caller, differentiable_attention
from gradscale.run.engine_losses import RankLosses, Share, agreed, read, together
from gradscale.run.engine_order import Order, flat_order
from gradscale.run.engine_partitions import differing
from gradscale.run.engine_precision import coarsest, widened, widened_batch, widened_tensor


@dataclass(frozen=True, eq=False)
class Replicas:
    """The parameters of an engine under ZeRO-0, 1 or 2 that have gradients, by their names."""

    losses: RankLosses
    parameters: dict[str, nn.Parameter]
    wide: bool = True  # compute in at least float32, at the masters

    @cached_property
    def layout(self) -> Layout:
        return Layout.of(self.parameters)

    @cached_property
    def order(self) -> Order:
        return flat_order(self.layout, dist.get_world_size())

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest that gradients are computed in."""
        return coarsest((p.dtype for p in self.parameters.values()), self.wide)

    @property
    def _low(self) -> bool:
        return any(p.dtype.itemsize < 4 for p in self.losses.engine.module.parameters())

    def sq_norm(self) -> Tensor:
        """[] float64: of this rank's slice of the weights."""
        masters = dict(zip(self.layout.names, self._masters(), strict=True))
        parts = self.order.slices[dist.get_rank()]
        return torch.stack(
            [masters[name].view(-1)[e.start : e.stop].double().square().sum() for name, e, _ in parts]
        ).sum()

    def check(self) -> None:
        """Raises: GradscaleError if the weights are not their masters, rounded."""
        problem = None
        for name, p in self.parameters.items():
            fragment = getattr(p, "_hp_mapping", None)
            if fragment is not None:
                start, size = fragment.lp_fragment_address.start, fragment.lp_fragment_address.numel
                held, master = p.detach().flatten()[start : start + size], fragment.hp_fragment.to(p.device, p.dtype)
                if not torch.equal(master, held):
                    entries = range(start, start + size)
                    problem = differing(Part(name, entries, slice(0, size)), int((master != held).sum()))
        agreed(problem, self.losses.device)

    def gradient(self, share: Share, shift: Tensor | None = None) -> Tensor:
        """[p] float64: of the mean loss over the examples of all ranks, at the weights plus `shift` [p].

        Weights of low precision are replaced by their masters for the time, others move in place, and are put back bit
        for bit whatever happens.
        """
        there = self._masters() if shift is None else self._at(shift)
        parameters = list(self.parameters.values())
        total = torch.zeros(1, self.layout.size, dtype=torch.float64, device=self.losses.device)

        def add() -> None:
            for batch in read(self.losses, share.batches):
                leaves = [weight.detach().requires_grad_() for weight in there]
                with torch.enable_grad():
                    loss = self._loss_with(leaves, batch)
                add_parts(self.layout, torch.autograd.grad(loss, leaves, allow_unused=True), total[0])

        def add_in_place() -> None:
            with _set(parameters, there), torch.enable_grad():
                for batch in read(self.losses, share.batches):
                    loss = self.losses(self.losses.engine.module, batch)
                    add_parts(self.layout, torch.autograd.grad(loss, parameters, allow_unused=True), total[0])

        together(self.losses, add if self._low and self.wide else add_in_place)
        return reduce_scattered(total)[0].div_(share.n)

    def products(self, share: Share, vectors: Tensor, shift: Tensor | None = None) -> Tensor:
        """[k, p] float64: of the mean loss's Hessian at the weights plus `shift` [p], by double backward.

        In the weights' type, but at least float32: of bfloat16 ones at their masters, the model computing in float32.
        """
        whole = gathered(vectors, self.layout.size)
        there = self._masters() if shift is None else self._at(shift)
        total = torch.zeros(whole.shape, dtype=torch.float64, device=whole.device)

        def add() -> None:
            for batch in read(self.losses, share.batches):
                self._add(batch, there, whole, total)

        together(self.losses, add)
        return reduce_scattered(total).div_(share.n)

    def _add(self, batch: Any, weights: Sequence[Tensor], vectors: Tensor, total: Tensor) -> None:
        leaves = [weight.detach().requires_grad_() for weight in weights]
        with torch.enable_grad(), differentiable_attention():
            loss = self._loss_with(leaves, batch)
            gradient = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            for k, vector in enumerate(vectors):
                pairs = [
                    (g, v.to(g.dtype))
                    for g, v in zip(gradient, self.layout.unflatten(vector), strict=True)
                    if g is not None and g.requires_grad
                ]
                if pairs:  # else the gradient is constant
                    slopes, along = zip(*pairs, strict=True)
                    found = torch.autograd.grad(
                        slopes, leaves, along, retain_graph=k + 1 < len(vectors), allow_unused=True
                    )
                    add_parts(self.layout, found, total[k])

    def _loss_with(self, weights: Sequence[Tensor], batch: Any) -> Tensor:
        """[]: with these weights, buffers and batch in at least float32."""
        caller = Caller(self.losses.engine.module, self.losses)
        values = dict(zip(self.parameters.values(), weights, strict=True))
        given = {}
        for path, module in caller.named_modules():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                given[f"{path}.{name}"] = values[parameter] if parameter in values else widened_tensor(parameter)
        with widened(self.losses.engine.module):
            wide_batch = widened_batch(batch) if self._low else batch
            loss: Tensor = functional_call(caller, given, (wide_batch,), tie_weights=False)
        return loss

    def _masters(self) -> list[Tensor]:
        """The weights in float32 at least, of low-precision ones the masters: a sum over ranks for each."""
        return [
            p.detach() if p.dtype.itemsize >= 4 else _first(safe_get_full_fp32_param(p), p.detach().float())
            for p in self.parameters.values()
        ]

    def _at(self, shift: Tensor) -> list[Tensor]:
        moves = self.layout.unflatten(gathered(shift[None].double(), self.layout.size)[0])
        return [(before.double() + move).to(before.dtype) for before, move in zip(self._masters(), moves, strict=True)]


@contextmanager
def _set(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """With these values, rounded; then with their own again. Graphs that hold the parameters stay valid."""
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data.copy_(value)
        yield
    finally:
        for parameter, before in zip(parameters, kept, strict=True):
            parameter.data.copy_(before)


def _first(found: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if found is None else found
