"""One forward and one backward pass, read parameter by parameter while the gradients exist.

`capture` runs a function that maps the model to one loss per example, with a `Tape` on every site. The model's own
parameters do not require grad meanwhile, so autograd computes no weight gradient.

Shapes: B examples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gradscale.errors import GradscaleError
from gradscale.grads.call import precision
from gradscale.grads.coverage import Site
from gradscale.grads.tape import Read, Tape
from gradscale.grads.waiting import Doubts


def capture(
    model: nn.Module,
    sites: Sequence[Site],
    losses: Callable[[nn.Module], Tensor],
    batch_size: int,
    read: Read,
    exclude: Tensor | None = None,
    doubts: Doubts | None = None,
) -> Tensor:
    """Run `losses(model)` -> [B] and its backward; call `read(parameter, grads)` once for every parameter used.

    Examples flagged in `exclude` [B] have zero gradients. Returns the losses, detached. With `doubts`, what takes a
    look at the data is left to them: if they turn out justified, what was read is void.
    Raises: GradscaleError if the losses are not [B], do not depend on the sites, or a site mixes examples.
    """
    others = _unmeasured(model, sites)
    with _frozen(model), torch.enable_grad():
        tape = Tape(batch_size, read, exclude, doubts)
        with tape.recording(model, sites), warnings.catch_warnings():
            if others:
                warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")
            values = losses(model)
            if not (others and tape.ran_without_grad):
                return _backward(values, tape)
        # A checkpoint with use_reentrant=True has gradients inside only if its input needs one, as it does where all
        # trainable parameters are: the graph has to start at the first of them, measured or not.
        del values
        tape = Tape(batch_size, read, exclude, doubts)
        with tape.recording(model, sites, others):
            return _backward(losses(model), tape)


def check_losses(values: object, batch_size: int) -> None:
    """Raises: GradscaleError if `values` is not a floating-point tensor [B]."""
    if not isinstance(values, Tensor):
        raise GradscaleError(f"losses must be a tensor of shape ({batch_size},), got {type(values).__name__}")
    if values.dim() != 1 or values.shape[0] != batch_size or not values.is_floating_point():
        hint = "use reduction='none' and average over the positions of each example only"
        raise GradscaleError(
            f"losses must be one per example, a floating-point tensor of shape ({batch_size},), "
            f"got {values.dtype} of shape {tuple(values.shape)}; {hint}"
        )


def _backward(values: Tensor, tape: Tape) -> Tensor:
    check_losses(values, tape.batch_size)
    if not values.requires_grad:
        raise GradscaleError(
            "losses must depend on the measured parameters, got losses without a gradient; "
            "compute them without torch.no_grad() and without .detach()"
        )
    tape.forward_is_over()
    with precision(values.device, None):  # what the readings add up, autocast must not round
        values.sum().backward()  # not autograd.grad, which use_reentrant=True refuses
        tape.finish()
    return values.detach()


def _unmeasured(model: nn.Module, sites: Sequence[Site]) -> list[nn.Module]:
    """The modules with trainable parameters of their own that are not among the sites."""
    measured = {site.module for site in sites}
    return [
        module
        for module in model.modules()
        if module not in measured and any(p.requires_grad for p in module.parameters(recurse=False))
    ]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
