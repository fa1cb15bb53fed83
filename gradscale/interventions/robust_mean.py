"""Robust means of per-example gradients, entry by entry: winsorized, and the median of means.

The examples of all ranks are one batch. The gradients of a layer are materialized a few rows at a time as soon as
backpropagation has reached it, and reduced to one number an entry.

Shapes: B examples of all ranks, b of this one, R rows and C columns of a parameter, r rows in a tile, k groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradscale.errors import GradscaleError
from gradscale.grads.capture import capture, check_losses
from gradscale.grads.coverage import sites
from gradscale.grads.layer import LayerGrads
from gradscale.grads.sweep import tiles
from gradscale.interventions.state import StepState
from gradscale.interventions.target import Function, Target, Training, called, listed, step_with, training

_ENTRIES = 1 << 22  # of a tile of all ranks' gradients


@dataclass(frozen=True)
class Winsorized:
    """A step along the mean of the examples' gradients, every entry of which is clipped to two of its percentiles:

        mean_i clip(g_ip, q_c, q_{1-c}),    q the quantiles of the entry p over the B examples, c = `share` in [0, 1/2)

    by linear interpolation between order statistics (numpy's default). With share=0 it is the plain mean. A few
    examples cannot move an entry by more than the others allow.

    Cost: two forward passes (the first counts the examples), a backward pass, and a sort of B P numbers. Memory: P, and
    a few times max(2^22, B C) numbers, C the columns of the widest parameter; never B P. On several ranks all gradients
    of all examples pass between them, a tile at a time.
    Source: Chatterjee and Zielinski (2022), arXiv 2203.10036 (winsorized gradient descent, levels c and 100 - c), as a
    report on it has it.
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.share < 0.5:
            raise GradscaleError(f"share must be in [0, 0.5), got {self.share}; 0.1 clips at the percentiles 10 and 90")

    def step(self, target: Target, losses_fn: Function, state: StepState) -> Tensor:
        """One step of `target`; `losses_fn(model)` is [b], one loss for each example. Returns their mean.

        Raises: GradscaleError for a target or losses that do not serve, or a parameter that no rule covers; the weights
        are then as before.
        """
        return _robust_step(target, losses_fn, state, lambda each: winsorized_mean(each, self.share))


@dataclass(frozen=True)
class MedianOfMeans:
    """A step along the median, entry by entry, over k = `groups` of the means of B / k consecutive examples' gradients.

    With an even k the mean of the two in the middle; with k = 1 the plain mean, with k = B the median of the examples.

    Cost and memory: as `Winsorized`, but that B / k times less is sorted.
    Source: Zielinski, Krishnan, Chatterjee (2020), arXiv 2003.07422 (M3, k = 3; their RM3, a median with the two steps
    before, is another method); Chatterjee and Zielinski (2022), arXiv 2203.10036, as a report on it has it.
    """

    groups: int = 3

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise GradscaleError(f"groups must be at least 1, got {self.groups}; 3 are usual")

    def step(self, target: Target, losses_fn: Function, state: StepState) -> Tensor:
        """As `Winsorized.step`. Raises also: GradscaleError if B is not a multiple of k."""
        return _robust_step(target, losses_fn, state, lambda each: median_of_means(each, self.groups))


def winsorized_mean(values: Tensor, share: float) -> Tensor:
    """[n] of [B, n]."""
    ordered, place = values.sort(dim=0).values, share * (len(values) - 1)
    first, part = math.floor(place), place - math.floor(place)
    after = min(first + 1, len(values) - 1)
    low = torch.lerp(ordered[first], ordered[after], part)
    high = torch.lerp(ordered[-1 - first], ordered[-1 - after], part)
    return torch.clamp(values, low, high).mean(dim=0)


def median_of_means(values: Tensor, groups: int) -> Tensor:
    """[n] of [B, n]. Raises: GradscaleError if B is not a multiple of `groups`."""
    if len(values) % groups:
        raise GradscaleError(
            f"the examples of all ranks must be a multiple of groups={groups}, got {len(values)}; drop the last ones"
        )
    means = values.view(groups, -1, values.shape[1]).mean(dim=1)
    ordered: Tensor = means.sort(dim=0).values
    return (ordered[(groups - 1) // 2] + ordered[groups // 2]) / 2


def _robust_step(target: Target, losses_fn: Function, state: StepState, reduced: Callable[[Tensor], Tensor]) -> Tensor:
    trained = training(target)
    functions = listed(losses_fn)
    if len(functions) > 1:
        raise GradscaleError(
            f"losses_fn must be one function, got {len(functions)}; quantiles need all examples in one microbatch"
        )
    _check_batch_norm(trained.model)
    with torch.no_grad():
        losses = called(trained, functions[0])
        size = len(losses) if isinstance(losses, Tensor) and losses.dim() else 1
        check_losses(losses, size)
    _check_sizes(trained, size)
    found = {name: torch.zeros_like(p) for name, p in trained.parameters.items()}

    def read(name: str, grads: LayerGrads) -> None:
        found[name] = _reduced(trained, grads, reduced).view(trained.parameters[name].shape)

    measured = sites(trained.model, trained.parameters)
    values = capture(trained.model, measured, lambda _: called(trained, functions[0]), size, read)
    state.steps += 1
    return step_with(trained, values.double().mean(), list(found.values()))


def _reduced(trained: Training, grads: LayerGrads, reduced: Callable[[Tensor], Tensor]) -> Tensor:
    """[P] of one parameter."""
    batch, rows, columns = grads.shape
    height = min(rows, max(1, _ENTRIES // (trained.ranks * batch * columns)))
    return torch.cat([reduced(_of_all_ranks(trained, tile.flatten(1))) for _, _, tile in tiles(grads, height, batch)])


def _of_all_ranks(trained: Training, tile: Tensor) -> Tensor:
    """[B, n] of [b, n], rank by rank."""
    if trained.ranks == 1:
        return tile
    parts = [torch.empty_like(tile) for _ in range(trained.ranks)]
    dist.all_gather(parts, tile.contiguous())
    return torch.cat(parts)


def _check_sizes(trained: Training, size: int) -> None:
    if trained.ranks == 1:
        return
    sizes = torch.zeros(trained.ranks, dtype=torch.int64, device=trained.device)
    sizes[trained.rank] = size
    dist.all_reduce(sizes)
    if len(sizes.unique()) > 1:
        raise GradscaleError(
            f"all ranks must have as many examples, got {sizes.tolist()}; drop the last ones, or pad the ranks alike"
        )


def _check_batch_norm(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise GradscaleError(
                f"BatchNorm {name} must be in eval mode with running statistics, got batch statistics, under which an "
                "example has no gradient of its own; put it in eval mode, or take another norm"
            )
