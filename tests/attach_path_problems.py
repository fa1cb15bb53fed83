"""What two ranks of DeepSpeed training leave behind when their path is recorded: run by test_attach_path.py.

    torchrun --nproc_per_node 2 tests/attach_path_problems.py FOLDER CASE...

Every rank leaves FOLDER/CASE-RANK.pt, a dictionary of tensors and messages, and all together a run FOLDER/CASE.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "jobs"))

import torch
import torch.distributed as dist
from attach_problems import batch_of, loss_of, made_model
from engine_problems import held, said
from rank_problems import serve
from torch import Tensor

import gradscale as gs
from gradscale.store.training_path import PATH

STEPS, EVERY = 5, 2
RATES = (0.05, 0.2)  # of the two groups in float32
CLIP = 0.3
POISONED = 1  # the step whose loss is infinite on rank 1, in bfloat16


class Case(NamedTuple):
    stage: int
    low: bool = False  # bfloat16 with float32 masters; else SGD with momentum and two groups
    microbatches: int = 1
    params: str | None = None
    by_gas: bool = True
    offload: bool = False
    accumulate: str | None = None  # the type of gradients


CASES = {
    "zero0": Case(0),
    "zero1": Case(1, microbatches=2, params=r"block\."),
    "zero2": Case(2, microbatches=2),
    "zero3": Case(3, by_gas=False, microbatches=2),
    "zero0-bf16": Case(0, True),
    "zero1-bf16": Case(1, True),
    "zero2-bf16": Case(2, True, params=r"block\."),
    "zero3-bf16": Case(3, True, microbatches=2),
}
SLOW = {
    "zero1-bf16-accumulated": Case(1, True, microbatches=2, accumulate="bf16"),
    "zero2-offload": Case(2, offload=True),
    "zero3-offload": Case(3, params=r"block\.", offload=True),
    "zero0-3": Case(0, microbatches=3, params=r"block\."),
}


def started(case: Case) -> Any:
    import deepspeed

    model = made_model()
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": case.microbatches,
        "bf16": {"enabled": case.low},
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 0}
        | ({"offload_optimizer": {"device": "cpu"}} if case.offload else {}),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1000000,
    }
    if case.accumulate:
        settings["data_types"] = {"grad_accum_dtype": case.accumulate}
    parameters: Any = model.parameters()
    if case.low:
        settings["optimizer"] = {"type": "AdamW", "params": {"lr": 0.02, "torch_adam": True}}
        settings["scheduler"] = {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.001, "warmup_max_lr": 0.02, "warmup_num_steps": 4},
        }
        optimizer = None
    else:
        first = [p for p in parameters if p.dim() > 1]
        groups = [first, [p for p in model.parameters() if p.dim() == 1]]
        parameters = [{"params": group, "lr": rate} for group, rate in zip(groups, RATES, strict=True)]
        optimizer = torch.optim.SGD(parameters, momentum=0.9)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=parameters, config=settings)
    return engine


def masters(engine: Any) -> dict[str, Tensor]:
    """All of them on every rank, float64, by DeepSpeed's own gathering where it has one."""
    from deepspeed.utils import safe_get_full_fp32_param

    optimizer, found = engine.optimizer, {}
    kept = {}
    if hasattr(optimizer, "fp32_groups"):
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        kept = {id(p): master for group, masters in pairs for p, master in zip(group, masters, strict=True)}
    for name, p in engine.module.named_parameters():
        master = kept[id(p)] if kept else safe_get_full_fp32_param(p)
        assert master is not None or p.dtype == torch.float32
        found[name] = (p if master is None else master).detach().double().clone()
    return found


def gradient_norm(engine: Any) -> float:
    """Of the mean over ranks, at the boundary."""
    from deepspeed.utils import safe_get_full_grad

    squares = [safe_get_full_grad(p).double().square().sum() for p in engine.module.parameters()]
    return float(torch.stack(squares).sum().sqrt())


def trained(
    engine: Any, case: Case, steps: range, before: Callable[[int], None] = lambda step: None, look: bool = False
) -> tuple[list[list[float]], list[float]]:
    """The unchanged loop: the losses of every step, and the norms of its gradient if one is to `look`."""
    losses, norms = [], []
    for step in steps:
        before(step)
        losses.append(list[float]())
        for microbatch in range(case.microbatches):
            batch = batch_of(step, dist.get_rank(), microbatch)
            loss = loss_of(engine(batch[:, :-1]), batch)
            if case.low and step == POISONED and dist.get_rank() == 1:
                loss = loss * torch.inf
            engine.backward(loss, scale_wrt_gas=case.by_gas)
            losses[-1].append(float(loss))
            if look and microbatch == case.microbatches - 1 and not case.low:
                norms.append(gradient_norm(engine))
            engine.step()
    return losses, norms


def recorded(name: str, folder: Path) -> dict[str, Any]:
    case = (CASES | SLOW)[name]
    engine, plain = started(case), started(case)
    weights: list[dict[str, Tensor]] = []
    rates: list[list[float]] = []
    partitioned = [p.numel() for p in engine.module.parameters()]

    def before(step: int) -> None:
        weights.append(masters(engine))
        rates.append([float(rate) for rate in engine.get_lr()])

    with gs.attach(engine, str(folder / name), every=EVERY, params=case.params, strict=True, path=True) as attachment:
        losses, norms = trained(engine, case, range(STEPS), before, look=True)
    weights.append(masters(engine))
    trained(plain, case, range(STEPS))
    return {
        "weights": weights,
        "rates": rates,
        "losses": losses,
        "norms": norms,
        "same": all(map(torch.equal, held(engine), held(plain))),
        "failures": attachment.failures,
        "partitioned": sum(partitioned) == 0,
        "own": [each for each in ("backward", "step", "save_checkpoint") if each in vars(engine)],
    }


@contextmanager
def unreadable(engine: Any) -> Iterator[None]:
    """With a parameter that does not say where its masters are; DeepSpeed itself does not ask."""
    p = engine.optimizer.bit16_groups[0][0]
    kept = p._hp_mapping
    del p._hp_mapping
    try:
        yield
    finally:
        p._hp_mapping = kept


def failing(name: str, folder: Path) -> dict[str, Any]:
    """Rank 1 cannot read its masters in step 1; rank 0 cannot write the file at the checkpoint of step 3."""
    case, rank, strict = Case(2), dist.get_rank(), name == "failing-strict"
    engine, plain = started(case), started(case)
    in_the_way = folder / name / PATH

    def loop() -> None:
        for step in range(STEPS):
            if step == 3 and rank == 0:
                in_the_way.mkdir()
            if step == 3:
                engine.save_checkpoint(str(folder / f"{name}-checkpoints"))
            if step == 3 and rank == 0:
                in_the_way.rmdir()
            with unreadable(engine) if step == 1 and rank == 1 else nullcontext():
                trained(engine, case, range(step, step + 1))

    with gs.attach(engine, str(folder / name), every=EVERY, strict=strict, path=True) as attachment:
        problem = said(loop)
    trained(plain, case, range(int(engine.global_steps)))
    return {
        "said": problem,
        "problem": attachment.problem,
        "failures": attachment.failures,
        "steps": attachment.steps,
        "global_steps": int(engine.global_steps),
        "same": all(map(torch.equal, held(engine), held(plain))),
    }


def rows_of(out: Path) -> list[int]:
    return gs.training_path(gs.open_run(str(out)))["step"].tolist()


def again(name: str, folder: Path) -> dict[str, Any]:
    """Five steps with a checkpoint after two; from there on without a path, and then with one."""
    case, out, checkpoints = Case(1, microbatches=2), folder / name, folder / f"{name}-checkpoints"
    engine, found = started(case), dict[str, Any]()

    def before(step: int) -> None:
        if step == 2:
            engine.save_checkpoint(str(checkpoints))
            found["at the checkpoint"] = rows_of(out)
            dist.barrier()

    with gs.attach(engine, str(out), every=EVERY, strict=True, path=True):
        trained(engine, case, range(STEPS), before)
    found["first"] = gs.training_path(gs.open_run(str(out))).to_dict("list")
    dist.barrier()
    engine.load_checkpoint(str(checkpoints))
    with gs.attach(engine, str(out), every=EVERY, strict=True):
        found["without"] = rows_of(out)
    dist.barrier()
    with gs.attach(engine, str(out), every=EVERY, strict=True, path=True):
        trained(engine, case, range(2, STEPS))
    return found


def refused(name: str, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def made(label: str, engine: Any) -> None:
        found[label] = said(lambda: gs.attach(engine, str(folder / label), path=True).__enter__())

    engine = started(Case(3))
    flat = engine.optimizer.fp32_partitioned_groups_flat
    kept, flat[0] = flat[0], torch.empty(0)
    made("swapped out", engine)
    flat[0] = kept
    engine.zenflow = True
    made("late", engine)
    del engine.zenflow
    other = folder / "other columns"
    engine = started(Case(1))
    with gs.attach(engine, str(other)):
        pass
    if dist.get_rank() == 0:
        import pandas as pd

        pd.DataFrame({"step": [0]}).to_parquet(other / PATH)
    dist.barrier()
    made("other columns", engine)
    return found


def killed(name: str, folder: Path) -> dict[str, Any]:
    """`whole`: six steps. `killed`: all ranks die in step 4, with a checkpoint at step 2. `resumed`: from there."""
    case = Case(2, microbatches=2)
    engine = started(case)
    if name == "resumed":
        engine.load_checkpoint(str(folder / "checkpoints"))

    def before(step: int) -> None:
        if name == "killed" and step == 2:
            engine.save_checkpoint(str(folder / "checkpoints"))
        if name == "killed" and step == 4:
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)

    out = folder / ("whole" if name == "whole" else "interrupted")
    with gs.attach(engine, str(out), every=EVERY, strict=True, path=True):
        trained(engine, case, range(int(engine.global_steps), 6), before)
    return {}


def kinds() -> Iterator[tuple[Callable[[str, Path], dict[str, Any]], tuple[str, ...]]]:
    yield recorded, (*CASES, *SLOW)
    yield failing, ("failing", "failing-strict")
    yield again, ("again",)
    yield refused, ("refused",)
    yield killed, ("whole", "killed", "resumed")


def known(name: str, folder: Path) -> dict[str, Any]:
    run = next(function for function, names in kinds() if name in names)
    return run(name, folder)


if __name__ == "__main__":
    serve(known)
