"""What two ranks of DeepSpeed find out about Hessian products on live engines: run by test_engine_hessian.py.

    torchrun --nproc_per_node 2 tests/engine_problems.py FOLDER CASE...

Every rank leaves FOLDER/CASE-RANK.pt, a dictionary of tensors and messages.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "jobs"))

import torch
import torch.distributed as dist
from rank_problems import serve
from torch import Tensor, nn
from torch.nn import functional as F

import gradscale as gs
from gradscale.curvature.lanczos import lanczos
from gradscale.curvature.operator import Operator
from gradscale.curvature.trace import group_traces, trace_samples
from gradscale.run.engine_order import by_parameter

WORDS, LENGTH, WIDTH, HEADS = 7, 5, 6, 2
SIZES = ((3, 2), (4, 2))  # examples in the batches of each rank
STEPS = 4  # of training before the measurement


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.mix(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(seen)
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


class Transformer(nn.Module):
    """462 parameters, odd sizes among them; one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.block, self.norm, self.head = Block(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)
        self.places.weight.requires_grad_(False)

    def forward(self, words: Tensor) -> Tensor:
        places = torch.arange(LENGTH, device=words.device).expand_as(words)
        return self.head(self.norm(self.block(self.words(words) + self.places(places))))


def made_model() -> Transformer:
    torch.manual_seed(3)
    return Transformer()


def made_batches() -> list[list[Tensor]]:
    """Of every rank."""
    draw = torch.Generator().manual_seed(5)
    return [[torch.randint(WORDS, (size, LENGTH + 1), generator=draw) for size in sizes] for sizes in SIZES]


def losses(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1])
    return (
        F.cross_entropy(
            logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
            batch[:, 1:].flatten(),
            reduction="none",
        )
        .view(len(batch), -1)
        .mean(dim=1)
    )


class Case(NamedTuple):
    stage: int
    low: bool = False  # bfloat16
    backend: str = "auto"
    precision: str = "auto"
    strict: bool = False  # nothing persistent
    fused: bool = False  # a kernel that has no float32


CASES = {
    "zero0": Case(0),
    "zero1": Case(1, True),
    "zero2": Case(2),
    "zero3": Case(3),
    "zero3-bf16": Case(3, True, strict=True),
}
SLOW = {
    "zero0-bf16": Case(0, True),
    "zero1-fp32": Case(1),
    "zero2-differences": Case(2, backend="finite_differences"),
    "zero2-bf16-differences": Case(2, True, "finite_differences"),
    "zero3-strict": Case(3, strict=True),
    "zero3-bf16-persistent": Case(3, True),
    "zero1-fused": Case(1, True, fused=True),
    "zero3-fused": Case(3, True, fused=True),
}


def started(case: Case) -> Any:
    """An engine after some steps of training, gradients of one of two microbatches waiting."""
    import deepspeed

    zero = {"stage": case.stage} | ({"stage3_param_persistence_threshold": 0} if case.strict else {})
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.02, "torch_adam": True}},
        "bf16": {"enabled": case.low},
        "zero_optimization": zero,
        "steps_per_print": 1000000,
    }
    model = made_model()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    for _ in range(STEPS):
        trained(engine)
    backward(engine, 0)
    return engine


def backward(engine: Any, which: int) -> float:
    batch = made_batches()[dist.get_rank()][which]
    value = F.cross_entropy(engine(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())
    engine.backward(value)
    engine.step()
    return float(value)


def trained(engine: Any, first: int = 0) -> list[float]:
    """The losses of a step of two microbatches, from the `first` on."""
    return [backward(engine, which) for which in range(first, 2)]


def masters(engine: Any) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            master = safe_get_full_fp32_param(parameter)
            found[name] = (parameter if master is None else master).detach().float().clone()
    return found


def held(engine: Any) -> list[Tensor]:
    """Everything that training depends on, of this rank: weights, masters, moments, gradients that wait."""
    found = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in engine.module.parameters()]
    found += [p.grad for p in engine.module.parameters() if p.grad is not None]
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for group in base.param_groups:
        for parameter in group["params"]:
            state = base.state.get(parameter, {})
            found += [parameter, *(each for each in state.values() if isinstance(each, Tensor))]
    for gradients in getattr(engine.optimizer, "averaged_gradients", {}).values():
        found += [each for each in gradients or [] if each is not None]
    return [each.detach().clone() for each in found]


def measured(name: str) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_grad

    case, rank = (CASES | SLOW)[name], dist.get_rank()
    engine, plain = started(case), started(case)
    mine, weights, before = made_batches()[rank], masters(engine), held(engine)
    with torch.no_grad():
        losses(engine.module, mine[0])  # under ZeRO-3, leaves parameters gathered
    if case.fused:
        engine.module.block.register_forward_pre_hook(no_float32)
    gathered = [getattr(getattr(p, "ds_status", None), "name", "") == "AVAILABLE" for p in engine.module.parameters()]
    waiting = float(safe_get_full_grad(engine.module.head.weight).norm()) if case.stage == 3 else None
    operator = gs.engine_hessian(engine, losses, mine, case.backend, "lambda_max", precision=case.precision)
    top = lanczos(operator, operator.probes(2)(range(1))[0], 1, 9, 1e-4)
    samples = trace_samples(operator, operator.probes(4, "rademacher"), range(2), operator.order.groups())
    vectors = operator.probes(1)(range(2))
    found = {
        "masters": weights,
        "gathered": sum(gathered),
        "waiting": waiting,
        "backend": operator.choice.backend.name,
        "refused": dict(operator.choice.refused),
        "errors": (operator.choice.error, operator.error),
        "status": operator.status,
        "n": operator.n,
        "here": operator.here,
        "parts": [tuple(part) for part in operator.parts],
        "vectors": vectors,
        "products": operator.products(vectors),
        "lambda_max": float(top.values[0]),
        "traces": {group: each.value for group, each in group_traces(by_parameter(samples)).items()},
        "probes": operator.probes(4, "rademacher")(range(2)),
    }
    found["refusals"] = refusals(engine, operator, mine) if name in ("zero2", "zero3") else {}
    after = held(engine)
    found["same"] = len(before) == len(after) and all(map(torch.equal, before, after))
    found["losses"], found["plain"] = ([*trained(each, 1), *trained(each), *trained(each)] for each in (engine, plain))
    found["traps"] = traps(engine, operator, mine) if case.stage else {}
    return found


def no_float32(module: nn.Module, inputs: tuple[Tensor]) -> None:
    if inputs[0].dtype == torch.float32:
        raise RuntimeError("FlashAttention only supports fp16 and bf16")


def traps(engine: Any, operator: Operator, mine: list[Tensor]) -> dict[str, Any]:
    """What DeepSpeed does with weights that are written, and what the operator says of it. Leaves the engine spoilt."""
    from deepspeed.utils import safe_set_full_fp32_param

    def loss() -> Tensor:
        with torch.no_grad():
            return losses(engine.module, mine[0])

    before, name = loss(), "head.weight"
    parameter = engine.module.head.weight
    if hasattr(parameter, "ds_tensor"):
        kept = parameter.ds_tensor.data.clone()
        parameter.ds_tensor.data.mul_(1.5)
        stale = torch.equal(loss(), before)
        parameter.ds_tensor.data.copy_(kept)
    else:
        stale = None
    safe_set_full_fp32_param(parameter, masters(engine)[name] * 1.5)
    unseen = torch.equal(loss(), before)
    return {"stale": stale, "unseen": unseen, "said": said(lambda: operator.products(operator.probes()(range(1))))}


def said(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return ""


class Crooked(torch.autograd.Function):
    """x^2 / 2 whose derivative is said to be that of its neighbour: no loss has such a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square() / 2

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return slope * ctx.saved_tensors[0].roll(1, -1)


def refusals(engine: Any, operator: Operator, mine: list[Tensor]) -> dict[str, str]:
    """What is said to each mistake, on this rank."""
    rank, other, calls = dist.get_rank(), made_model(), list[int]()

    def made(function: Callable[..., Tensor] = losses, batches: Any = mine, **settings: Any) -> str:
        return said(lambda: gs.engine_hessian(engine, function, batches, **settings))

    def on_one(kind: type[Exception]) -> Callable[..., Tensor]:
        def failing(module: nn.Module, batch: Tensor) -> Tensor:
            found = losses(module, batch)
            if rank == 1:
                raise kind("label 9 is not a class")
            return found

        return failing

    def late(module: nn.Module, batch: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            calls.append(1)
        found = losses(module, batch)
        if rank == 1 and len(calls) > 5:
            raise ValueError("the weights have moved")
        return found

    def inside(*_: Any) -> None:
        if torch.is_grad_enabled():
            calls.append(1)
        if len(calls) > 5:
            raise ValueError("no such word")

    def no_gradient(*_: Any) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError("FlashAttention only supports fp16 and bf16")

    def unreadable() -> Iterator[Tensor]:
        yield mine[0]

    class Ends(list[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            yield self[0]
            if rank == 0:
                raise OSError("the disk is gone")
            yield self[1]

    found = {
        "uneven": made(batches=mine[: 2 - rank]),
        "none": made(batches=[]),
        "generator": made(batches=unreadable()),
        "reduced": made(lambda module, batch: losses(module, batch).mean()),
        "detached": made(lambda module, batch: losses(module, batch).detach()),
        "on one rank": made(on_one(ValueError)),
        "on one rank, of torch": made(on_one(RuntimeError)),
        "data": made(batches=Ends(mine)),
        "backend": made(backend="exact"),
        "quantity": made(quantity="shape"),
        "precision": made(precision="high"),
        "double": made(backend="double_backward"),
        "shape": said(lambda: operator.products(torch.ones(1, 3))),
        "engine": said(lambda: gs.engine_hessian(other, losses, mine)),
    }
    found["late"] = made(late, backend="finite_differences")
    calls.clear()
    hook = engine.module.norm.register_forward_pre_hook(inside)
    found["inside"] = made(backend="finite_differences")
    hook.remove()
    if engine.zero_optimization_stage() == 2:
        hook = engine.module.block.register_forward_pre_hook(no_gradient)
        found["impossible"] = made(backend="double_backward")
        found["impossible master"] = made(backend="finite_differences", precision="master")
        hook.remove()
        found["other"] = made(lambda module, batch: losses(other, batch))
        found["noise"] = made(lambda module, batch: losses(module, batch) * torch.rand(len(batch)))
        found["crooked"] = made(
            lambda module, batch: Crooked.apply(module(batch[:, :-1])).mean(dim=(1, 2)), backend="finite_differences"
        )
        engine.module.add_module("extra", nn.Dropout(0.5))
        found["dropout"] = made()
        del engine.module.extra
    return found


if __name__ == "__main__":
    serve(lambda name, _: measured(name))
