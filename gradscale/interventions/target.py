"""What is trained, a DeepSpeed engine or a model with its optimizer: gradients from it, and steps with given ones.

A step never calls `engine(...)`: losses are computed with the module, and gradients asked for, not accumulated, so that
no hook of DeepSpeed runs in the passes that an intervention makes. What it settles on then goes to `engine.backward` as
the gradient of a function of the weights with the loss for its value. From there on it is DeepSpeed's own way of any
stage: the mean over ranks, the scale of accumulation, partitions, clipping, masters, the schedule.

Shapes: P entries of all trained parameters, W ranks, M microbatches of a rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradscale.errors import GradscaleError

Target = Any  # an engine, or (model, optimizer)
Function = Callable[[nn.Module], Any]  # of the model; the batch is in its closure
Functions = Function | Sequence[Function]  # one for each microbatch: their mean


@dataclass(frozen=True, eq=False)
class Training:
    """The trained parameters by name, in the model's order, and who takes the step."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: Any
    engine: Any = None  # None: one process
    partitioned: bool = False  # by ZeRO-3

    @property
    def ranks(self) -> int:
        return 1 if self.engine is None else dist.get_world_size()

    @property
    def rank(self) -> int:
        return 0 if self.engine is None else dist.get_rank()

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    @property
    def weights(self) -> list[nn.Parameter]:
        return list(self.parameters.values())


def training(target: Target, moves: bool = False, partitioned: bool = False) -> Training:
    """`target` is an engine, or (model, optimizer). With `moves`, the weights must be fine enough to be moved a little.

    `partitioned`: ZeRO-3 will do, under which gradients are to be left in partitions.
    Raises: GradscaleError for a target that does not serve.
    """
    if isinstance(target, tuple) and len(target) == 2 and isinstance(target[0], nn.Module):
        found = _plain(*target)
    elif all(hasattr(target, name) for name in ("module", "backward", "step", "zero_optimization_stage")):
        found = _of_engine(target, partitioned)
    else:
        raise GradscaleError(
            f"the target must be a DeepSpeed engine or (model, optimizer), got {type(target).__name__}; pass what "
            "deepspeed.initialize returns first, or the pair"
        )
    for name, parameter in found.parameters.items():
        if parameter.dtype == torch.float16 or (moves and parameter.dtype.itemsize < 4):
            raise GradscaleError(
                f"the weights must be {'float32' if moves else 'float32 or bfloat16'}, got {parameter.dtype} for "
                f"{name}, in which {'moves' if parameter.dtype != torch.float16 else 'gradients'} are lost to "
                "rounding; keep float32 weights and compute under torch.autocast"
            )
    return found


def _plain(model: nn.Module, optimizer: Any) -> Training:
    if isinstance(model, nn.parallel.DistributedDataParallel) or not isinstance(optimizer, torch.optim.Optimizer):
        raise GradscaleError(
            "the pair must be a model of one process and a torch optimizer, got "
            f"{type(model).__name__} and {type(optimizer).__name__}; for several processes pass a DeepSpeed engine"
        )
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parameters = {name: p for name, p in model.named_parameters() if id(p) in trained and p.requires_grad}
    if len(trained) != len({id(p) for p in model.parameters() if id(p) in trained}) or not parameters:
        raise GradscaleError(
            f"the optimizer must train parameters of the model, got {len(trained)} of which {len(parameters)} are "
            "trainable ones of it; pass the model whose parameters() the optimizer was made of"
        )
    return Training(model, parameters, optimizer)


def _of_engine(engine: Any, partitioned: bool) -> Training:
    stage = engine.zero_optimization_stage()
    if stage == 3 and not partitioned:
        _refuse("the engine's ZeRO stage must be 0, 1 or 2", 3, "no rank holds a gradient whole under 3; take 2")
    if engine.dp_world_size != dist.get_world_size():
        found = f"{engine.dp_world_size} of {dist.get_world_size()}"
        _refuse("ranks must all be data parallel", found, "leave out tensor, pipeline and sequence parallelism")
    managed = getattr(engine, "managed_gradient_accumulation", None)
    if managed is not None and not managed():
        _refuse("gradient accumulation must be managed by the engine", "it off", "leave it at its default")
    waiting = engine.micro_steps % engine.gradient_accumulation_steps()
    if waiting:
        _refuse("a step must begin with no gradient waiting", f"{waiting} microbatches", "call it in place of backward")
    parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    return Training(engine.module, parameters, engine.optimizer, engine, stage == 3)


def _refuse(what: str, found: object, remedy: str) -> NoReturn:
    raise GradscaleError(f"{what}, got {found}; {remedy}")


def listed(functions: Functions) -> Sequence[Function]:
    """Raises: GradscaleError if there are none."""
    found = [functions] if callable(functions) else functions
    if not isinstance(found, Sequence) or not found or not all(callable(each) for each in found):
        _refuse("loss_fn must be a function of the model, or a list of one for each microbatch", found, "pass a lambda")
    return found


def called(trained: Training, function: Function) -> Any:
    """`function(model)` in the autocast of the engine if it has one.

    Raises: GradscaleError if the function calls the engine and not the model.
    """
    engine = trained.engine
    if engine is None:
        return function(trained.model)

    def refuse(*_: Any) -> NoReturn:
        _refuse("loss_fn must call the model that it is given", "a call of the engine", "write lambda model: model(x)")

    enabled = bool(getattr(engine, "torch_autocast_enabled", bool)())
    dtype = engine.torch_autocast_dtype() if enabled else None
    with ExitStack() as stack:
        if isinstance(engine, nn.Module):
            handle = engine.register_forward_pre_hook(refuse)
            stack.callback(handle.remove)
        stack.enter_context(torch.autocast(trained.device.type, dtype=dtype, enabled=enabled))
        return function(trained.model)


def scalar(loss: object) -> Tensor:
    """Raises: GradscaleError if it is not one number with a gradient."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        graph = "" if not isinstance(loss, Tensor) or loss.requires_grad else " without a gradient"
        _refuse("loss_fn must return the mean loss, a tensor of one number with a gradient", got + graph, "average it")
    return loss.squeeze()


class Gradient(NamedTuple):
    """Of the mean loss over this rank's microbatches."""

    loss: Tensor  # [] float64
    by_parameter: list[Tensor]


def gradient(trained: Training, functions: Functions, loss_of: Callable[[int, Any], Tensor] | None = None) -> Gradient:
    """At the weights as they are. Cost: one forward and backward pass of each microbatch; P numbers.

    `loss_of(microbatch, value)` makes a loss of what a function returns, by default that itself. The microbatches of
    all ranks are counted through, rank by rank.
    """
    own = listed(functions)
    value = torch.zeros((), dtype=torch.float64, device=trained.device)
    total: list[Tensor] = []
    for m, function in enumerate(own):
        with torch.enable_grad():
            returned = called(trained, function)
            loss = scalar(returned if loss_of is None else loss_of(trained.rank * len(own) + m, returned))
            found = torch.autograd.grad(loss, trained.weights, allow_unused=True, materialize_grads=True)
        value += loss.detach().double() / len(own)
        if total:
            torch._foreach_add_(total, list(found), alpha=1 / len(own))
        else:
            total = [each / len(own) for each in found] if len(own) > 1 else list(found)
    return Gradient(value, total)


def mean_over_ranks(trained: Training, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """One after another; in at least float32. All ranks call it alike."""
    for tensor in tensors:
        wide = tensor if tensor.dtype.itemsize >= 4 else tensor.float()
        if trained.ranks > 1:
            wide = wide.clone() if wide is tensor else wide
            dist.all_reduce(wide)
            wide /= trained.ranks
        yield wide


def norm(tensors: Iterator[Tensor] | Sequence[Tensor]) -> float:
    """The Euclidean norm of all of them together, summed up in float64.

    Raises: GradscaleError if it is not finite.
    """
    return finite(math.sqrt(float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum())))


def finite(length: float) -> float:
    """Raises: GradscaleError if it is not."""
    if not math.isfinite(length):
        _refuse("the gradient must be finite", f"norm {length}", "leave the batch out, or take a smaller learning rate")
    return length


@contextmanager
def moved(trained: Training, moves: Sequence[Tensor]) -> Iterator[None]:
    """With the weights at w + move; then at w again, bit for bit, whatever happens. Memory: P more.

    An autocast that is on outside of the step would give the passes the rounded weights of before: they are forgotten.
    """
    kept = [parameter.detach().clone() for parameter in trained.weights]
    try:
        for parameter, move in zip(trained.weights, moves, strict=True):
            parameter.data.add_(move.to(parameter.dtype))
        torch.clear_autocast_cache()
        yield
    finally:
        for parameter, before in zip(trained.weights, kept, strict=True):
            parameter.data.copy_(before)
        torch.clear_autocast_cache()


def step_with(trained: Training, loss: Tensor, found: Sequence[Tensor]) -> Tensor:
    """The target's own step with these gradients, of which the mean over ranks counts. Returns the loss.

    Under gradient accumulation the engine gets them in equal parts, one for each of its microbatches.
    """
    if trained.engine is None:
        for parameter, gradient in zip(trained.weights, found, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        trained.optimizer.step()
        return loss
    forgets = getattr(trained.optimizer, "clear_backward_seen_flag", None)
    for _ in range(trained.engine.gradient_accumulation_steps()):
        if forgets is not None:  # the microbatch before, as engine.forward does
            forgets()
        trained.engine.backward(given(loss.float(), found, trained.weights))
        trained.engine.step()
    return loss


def given(value: Tensor, found: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """A function of the weights that has this value and this gradient."""
    return cast(Tensor, _Given.apply(value, found, *weights))  # type: ignore[no-untyped-call]


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, found: Sequence[Tensor], *weights: Tensor) -> Tensor:
        ctx.found = [gradient.to(weight.dtype) for gradient, weight in zip(found, weights, strict=True)]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        return None, None, *(gradient * outer[0].to(gradient.dtype) for gradient in ctx.found)
