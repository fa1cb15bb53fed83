"""Steps under ZeRO-3, for the methods that need one gradient, at the weights as they are: it stays in its partitions.

DeepSpeed's own forward and backward passes, the function being given the engine in the place of the model; what it
holds then is read and scaled in place. No rank has more of a gradient than DeepSpeed itself gives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradscale.errors import GradscaleError
from gradscale.interventions.target import Functions, Training, finite, listed, scalar


def backward(trained: Training, functions: Functions, loss_of: Callable[[int, Any], Tensor] | None = None) -> Tensor:
    """[] float64: the mean loss of this rank. DeepSpeed then holds the mean gradient over microbatches and ranks.

    All is done but the `engine.step()` of the last microbatch. `loss_of` as in `target.gradient`.
    Raises: GradscaleError if there are not as many functions as the engine accumulates. An error in a function after
    the first leaves gradients waiting in the engine; the weights are as before.
    """
    engine, own = trained.engine, listed(functions)
    if len(own) != engine.gradient_accumulation_steps():
        raise GradscaleError(
            "under ZeRO-3 there must be one function for each microbatch that the engine accumulates, got "
            f"{len(own)} for {engine.gradient_accumulation_steps()}; set gradient_accumulation_steps to their number"
        )
    value = torch.zeros((), dtype=torch.float64, device=trained.device)
    for m, function in enumerate(own):
        if m:
            engine.step()
        with torch.enable_grad():
            returned = function(engine)
            loss = scalar(returned if loss_of is None else loss_of(trained.rank * len(own) + m, returned))
        engine.backward(loss)
        value += loss.detach().double() / len(own)
    return value


def norm(trained: Training) -> float:
    """Of the gradient that DeepSpeed holds. All ranks call it alike: a sum of one number.

    Raises: GradscaleError if it is not finite.
    """
    squares = [part.double().square().sum() for _, part in _parts(trained)]
    total = torch.stack([torch.zeros((), dtype=torch.float64, device=trained.device), *squares]).sum()
    dist.all_reduce(total)
    return finite(math.sqrt(float(total)))


def scale(trained: Training, factor: float) -> None:
    """The gradient that DeepSpeed holds, in place."""
    for parameter, part in _parts(trained):
        trained.engine.optimizer.set_local_grad_for_param(part * factor, parameter)


def _parts(trained: Training) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """This rank's part of the gradient of every parameter; what it is padded with is zero."""
    for parameter in trained.weights:
        yield parameter, trained.engine.optimizer.get_local_fp32_grad_for_param(parameter)
