"""Is the mean of the per-example gradients the gradient that DeepSpeed itself has?"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradscale.errors import GradscaleError
from gradscale.grads.readings import GradientSums
from gradscale.run.attach_setup import Setup
from gradscale.run.attach_step import Part
from gradscale.run.attach_together import gathered, rank, together

_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}  # DeepSpeed rounds gradients to the weights' type
_EXACT = 1e-3
_WHOLE = GradientSums()


def check_agreement(setup: Setup, part: Part) -> float:
    """|mean g - G| / |G| over all measured parameters, G what the optimizer is about to be given. Collectives.

    Then the sums that autograd has made, which later steps rely on, are held to those from the factors. To be called
    before engine.step at the end of an accumulation. Cost: P numbers are summed up and as many gathered,
    a parameter at a time. The tolerance is 1e-3, of float16 weights 1e-2, of bfloat16 5e-2: roundings.
    Raises: GradscaleError on all ranks, with the ratio <mean g, G> / <G, G>, if they differ.
    """
    named = dict(setup.module.named_parameters())
    tolerance = max(_TOLERANCE.get(p.dtype, _EXACT) for p in setup.parameters.values())
    found = torch.zeros(3, dtype=torch.float64)  # <mean, G>, |G|^2, |mean - G|^2
    for name in setup.parameters:
        mean = part.by_rules[name].to(setup.device, copy=True)
        if dist.is_initialized():
            dist.all_reduce(mean)
        mean = mean.double() / setup.ranks
        held = _held(setup.engine, named[name], mean)
        found += torch.stack([mean @ held, held @ held, (mean - held).square().sum()]).cpu()
    # The first rank's word counts for all: where they differ in the last bit, they still must do the same.
    product, square, apart = gathered(found.tolist() if rank() == 0 else None)[0] or [math.nan] * 3
    error = math.sqrt(apart / square) if square > 0 else (0.0 if apart == 0 else math.inf)
    if not error <= tolerance:
        ratio = product / square if square > 0 else math.nan
        raise GradscaleError(
            f"the mean of the per-example gradients must be the gradient that DeepSpeed has to {tolerance:g}, got a "
            f"relative difference of {error:.3g}, their ratio is {ratio:.6g}; use engine.backward(loss) for all that "
            "is trained on, and no hooks that change gradients"
        )
    together(lambda: _check_pass(part, tolerance))
    return error


def _check_pass(part: Part, tolerance: float) -> None:
    """Raises: GradscaleError if the sums that later steps take from the pass are not those from the factors."""
    if not all(_WHOLE in block.readings.sums for block in part.blocks):
        return
    apart = square = 0.0
    for name, by_rules in part.by_rules.items():
        sums = [block.readings.sums[_WHOLE][None][name] for block in part.blocks]
        apart += float((torch.stack(sums).sum(dim=0) - by_rules).double().square().sum())
        square += float(by_rules.double().square().sum())
    if not apart <= tolerance**2 * square:
        raise GradscaleError(
            f"the gradients that autograd adds up must be those that the modules' inputs and slopes give to "
            f"{tolerance:g}, got a relative difference of {math.sqrt(apart / square) if square else math.inf:.3g}; use "
            "the weights in their own modules alone, and no hooks that change gradients"
        )


def _held(engine: Any, parameter: nn.Parameter, like: Tensor) -> Tensor:
    """[P] float64: DeepSpeed's gradient, without the loss scale; zero where it has none."""
    from deepspeed.utils import safe_get_full_grad

    found = safe_get_full_grad(parameter)
    if found is None:
        return torch.zeros_like(like)
    scale = float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0
    held: Tensor = found.detach().to(like.device).double().flatten() / scale
    return held
