"""A penalty on the trace of the Hessian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gradscale.errors import GradscaleError
from gradscale.grads.functional import NotTwiceDifferentiable, differentiable_attention, gradient_graph
from gradscale.interventions.draws import signs_of
from gradscale.interventions.state import StepState
from gradscale.interventions.target import Functions, Target, gradient, listed, scalar, step_with, training


@dataclass(frozen=True)
class HessianTracePenalty:
    """A step that descends, with N = `num_probes` fresh Rademacher vectors v at every step,

        L(w) + weight / N sum_v v' H(w) v,           in expectation L + weight tr H

    Its gradient is unbiased: an estimator. It takes third derivatives of the loss, which must have them: that of a
    piecewise linear network has only those of the loss in the outputs. torch's third derivatives of layer_norm, of
    batch_norm with batch statistics and of instance_norm are silently wrong (pytorch issues 175754, 186256): the first
    is written out here, the others are refused. H of all ranks' batch; v the same on all ranks, by seed, step
    and place in the model.

    Cost: a forward pass, a backward pass that keeps its graph, and for each probe one more through that graph, then the
    backward pass of them all; memory: these graphs of a microbatch, attention without a fused kernel; 2 P more.
    Source: Liu, Yu, Lin (2022), arXiv 2208.05924; with Hutchinson's estimator itself, not their dropout approximation.
    """

    weight: float
    num_probes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise GradscaleError(f"weight must be a finite number, got {self.weight}; start with 1e-3")
        if self.num_probes < 1:
            raise GradscaleError(f"num_probes must be at least 1, got {self.num_probes}; more are less noisy")

    def step(self, target: Target, loss_fn: Functions, state: StepState) -> Tensor:
        """One step of `target`; `loss_fn(model)` is the mean loss of a microbatch. Returns the loss with the penalty.

        Raises: GradscaleError for a target or losses that do not serve; the weights are then as before.
        """
        trained = training(target)

        def penalised(_: int, returned: Tensor) -> Tensor:
            loss = scalar(returned)
            slopes = _again(loss, trained.weights)
            total = loss
            for k in range(self.num_probes):
                probe = signs_of(trained, "hessian trace", self.seed, state.steps, k)
                curved = _again(_product(slopes, probe), trained.weights)
                total = total + self.weight / self.num_probes * _product(curved, probe)
            return total

        with differentiable_attention(), _WithThirdDerivatives():
            loss, found = gradient(trained, listed(loss_fn), penalised)
        state.steps += 1
        return step_with(trained, loss, found)


def _again(value: Tensor, weights: list[torch.nn.Parameter]) -> list[Tensor | None]:
    """The gradient of a value, to be differentiated again; nothing where it is constant."""
    if not value.requires_grad:
        return [None] * len(weights)
    try:
        return gradient_graph([value], weights)
    except NotTwiceDifferentiable as problem:
        raise GradscaleError(
            f"the loss must be differentiable three times, got: {problem}; use GaussianPerturbation, which needs one"
        ) from problem


def _product(found: list[Tensor | None], probe: list[Tensor]) -> Tensor:
    """[]: the inner product."""
    parts = [(each * v).sum() for each, v in zip(found, probe, strict=True) if each is not None]
    return torch.stack(parts).sum() if parts else probe[0].new_zeros(())


class _WithThirdDerivatives(TorchFunctionMode):
    """Meanwhile no function runs whose third derivative torch has wrong: it takes statistics of the input for given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.layer_norm, torch.layer_norm):
            return _layer_norm(*args, **kwargs)
        batch_statistics = func in (F.batch_norm, torch.batch_norm) and (*args[5:6], kwargs.get("training", False))[0]
        if batch_statistics or func in (F.instance_norm, torch.instance_norm, torch.native_layer_norm):
            raise GradscaleError(
                f"the loss must have third derivatives that torch gets right, got {func.__name__} with statistics of "
                "its input; take another norm, or GaussianPerturbation"
            )
        return func(*args, **kwargs)


def _layer_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """As torch's, in steps that autograd knows."""
    over = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dim=over, keepdim=True)
    out = centred * (centred.square().mean(dim=over, keepdim=True) + eps).rsqrt()
    out = out if weight is None else out * weight
    return out if bias is None else out + bias
