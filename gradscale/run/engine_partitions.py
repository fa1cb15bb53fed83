"""Gradients on an engine under ZeRO-3, at moved weights: no rank holds more than its slice of a vector.

Four things are silently wrong there if they are left to DeepSpeed, and are seen to here: writing to the float32 master
does not change what the forward pass gathers, so the partitions are written; parameters that are gathered already keep
their old values, so all are released first; so do the small persistent ones; and gradients are added to those that
wait for a step, so they are taken in hooks and summed up apart from DeepSpeed's.

Shapes: p entries here, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_fp32_param
from torch import Tensor, nn

from gradscale.curvature.layout import Layout
from gradscale.errors import GradscaleError
from gradscale.run.engine_losses import RankLosses, Share, agreed, read, run
from gradscale.run.engine_order import Order, rank_major_order
from gradscale.run.engine_precision import coarsest, widened, widened_batch, widened_tensor

_BUCKET = 1 << 22  # entries of gradients that are summed up over ranks together


@dataclass(frozen=True, eq=False)
class Partitions:
    """The parameters of an engine under ZeRO-3 that have gradients, by their names."""

    losses: RankLosses
    parameters: dict[str, Any]  # of DeepSpeed's own kind
    wide: bool = True  # compute in at least float32, at the masters

    @cached_property
    def layout(self) -> Layout:
        return Layout(tuple(self.parameters), tuple(tuple(p.ds_shape) for p in self.parameters.values()))

    @cached_property
    def order(self) -> Order:
        return rank_major_order(self.layout, dist.get_world_size())

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest that gradients are computed in."""
        return coarsest((p.ds_tensor.dtype for p in self.parameters.values()), self.wide)

    def sq_norm(self) -> Tensor:
        """[] float64: of the weights here."""
        return torch.stack([master.double().square().sum() for _, master, _ in self._pieces()]).sum()

    def check(self) -> None:
        """Raises: GradscaleError if the partitions are not their masters, rounded, or are kept in a way not known."""
        problem = None
        for name, p in self.parameters.items():
            secondary = getattr(p, "ds_secondary_tensor", None) is not None
            if secondary or "nvme" in str(p.ds_tensor.final_location) or hasattr(p.ds_tensor, "ds_quant_scale"):
                problem = GradscaleError(
                    f"partitions must be kept once, in memory and not quantized, got another way for {name}; leave out "
                    "hpZ, quantized weights and NVMe"
                )
            elif dist.get_world_size(p.ds_process_group) != dist.get_world_size():
                problem = GradscaleError(
                    f"partitions must be of all ranks, got {dist.get_world_size(p.ds_process_group)} of "
                    f"{dist.get_world_size()} for {name}; MiCS and expert parallelism are not supported"
                )
            elif hasattr(p, "ds_z3_leaf_module"):
                problem = GradscaleError(f"modules must not be ZeRO-3 leaf modules, got {name} in one; unset them")
        agreed(problem, self.losses.device)
        for part, master, held in self._pieces():
            if not torch.equal(master.to(held.dtype), held):
                problem = differing(part, int((master.to(held.dtype) != held).sum()))
        agreed(problem, self.losses.device)

    def gradient(self, share: Share, shift: Tensor | None = None) -> Tensor:
        """[p] float64: of the mean loss over the examples of all ranks, at the weights plus `shift` [p].

        Each rank's gradient of a parameter is summed over ranks in float32 as soon as it is there. The weights
        come back bit for bit, whatever happens, without collectives: other partitions are in their place meanwhile.
        """
        total = torch.zeros(len(self.order.here(dist.get_rank())), dtype=torch.float64, device=self.losses.device)
        with self._moved(shift):
            for batch in read(self.losses, share.batches):
                with torch.enable_grad(), self._summing(total) as finish:
                    loss = run(self.losses, widened_batch(batch) if self.wide else batch, self.losses)
                    torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
                    finish()
        return total.div_(share.n)

    def _pieces(self) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Of every parameter with entries here: its part, and these of the float32 master and of what is gathered."""
        for part in self.order.slices[dist.get_rank()]:
            p, size = self.parameters[part.name], len(part.entries)
            yield part, safe_get_local_fp32_param(p).flatten()[:size], p.ds_tensor.data.view(-1)[:size]

    @contextmanager
    def _moved(self, shift: Tensor | None) -> Iterator[None]:
        """With the partitions at their masters plus `shift`, and nothing gathered from before."""
        engine = self.losses.engine
        optimizer, everything = engine.optimizer, list[Any](engine.module.parameters())
        persistent = [p for p in getattr(optimizer, "persistent_parameters", []) if p.ds_status.name == "AVAILABLE"]
        kept = [(p, p.dtype, p.ds_tensor.data) for p in everything]
        masters = [(part, master) for part, master, _ in self._pieces()]
        optimizer.empty_partition_cache()
        try:
            with widened(engine.module) if self.wide else nullcontext():
                for p, dtype, before in kept:
                    p.ds_tensor.data = widened_tensor(before).clone() if self.wide else before.clone()
                    p.data = p.data.to(p.ds_tensor.dtype if p.dtype.is_floating_point else dtype)  # empty: its type
                for part, master in masters:
                    there = self.parameters[part.name].ds_tensor.data.view(-1)[: len(part.entries)]
                    move = 0.0 if shift is None else shift[part.place].to(master.device, torch.float64)
                    there.copy_(master.double() + move)
                yield
        finally:
            optimizer.parameter_offload.release_backward_leftovers()
            optimizer.empty_partition_cache()
            for p, dtype, before in kept:
                p.ds_tensor.data = before
                p.data = p.data.to(dtype)
        if persistent:  # only when nothing has failed: all ranks are here
            persistent[0].all_gather(persistent)

    @contextmanager
    def _summing(self, total: Tensor) -> Iterator[Any]:
        """While gradients are computed, they are summed up over ranks, and this rank's entries added to `total`.

        autograd itself gets zeros without memory in their place; the hooks of DeepSpeed, which run when a gradient is
        accumulated, get nothing.
        """
        waiting: list[tuple[str, Tensor]] = []

        def flush() -> None:
            if waiting:
                self._scatter(waiting, total)
                waiting.clear()

        def hook(name: str) -> Any:
            def take(gradient: Tensor) -> Tensor:
                waiting.append((name, gradient.detach()))
                if sum(each.numel() for _, each in waiting) >= _BUCKET:
                    flush()
                return gradient.new_zeros(()).expand(gradient.shape)

            return take

        handles = [parameter.register_hook(hook(name)) for name, parameter in self.parameters.items()]
        try:
            yield flush
        finally:
            for handle in handles:
                handle.remove()

    def _scatter(self, gradients: list[tuple[str, Tensor]], total: Tensor) -> None:
        world, columns = dist.get_world_size(), []
        for _, gradient in gradients:
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).reshape(-1)
            width = -(-len(wide) // world)
            columns.append(nn.functional.pad(wide, (0, world * width - len(wide))).view(world, width))
        sent = torch.cat(columns, dim=1)
        found = sent.new_empty(sent.shape[1])
        dist.reduce_scatter_tensor(found, sent.view(-1))
        places = {part.name: part.place for part in self.order.slices[dist.get_rank()]}
        for (name, _), mine in zip(gradients, found.split([c.shape[1] for c in columns]), strict=True):
            if name in places:
                place = places[name]
                total[place] += mine[: place.stop - place.start]


def differing(part: Any, count: int) -> GradscaleError:
    return GradscaleError(
        f"weights must be their float32 masters, rounded, got {count} entries of {part.name} that are not; the forward "
        "pass does not see what safe_set_* functions write before the next engine.step()"
    )
