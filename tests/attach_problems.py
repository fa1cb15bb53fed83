"""What two ranks of DeepSpeed training leave behind when they are measured: run by test_attach.py.

    torchrun --nproc_per_node 2 tests/attach_problems.py FOLDER CASE...

Every rank leaves FOLDER/CASE-RANK.pt, a dictionary of tensors and messages, and all together a run FOLDER/CASE.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "jobs"))

import torch
import torch.distributed as dist
from engine_problems import LENGTH, WIDTH, WORDS, Block, held, masters
from rank_problems import serve
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradscale as gs
from gradscale.run.attach_setup import Inputs

STEPS, EVERY = 4, 2
SIZES = (3, 2)  # examples in a microbatch of each rank
MEASURES = (gs.Coherence(), gs.Dispersion(), gs.GaussianWidth(num_probes=8))
BY_CLASS = (gs.Coherence(by_class=True),)


class Tiny(nn.Module):
    """Words and places as ids [T], a block that may be checkpointed, the words' table again as the head."""

    def __init__(self, checkpointing: str = "") -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.block, self.norm, self.head = Block(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight
        self.checkpointing = checkpointing

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places(torch.arange(LENGTH, device=words.device))
        return self.head(self.norm(self._through(x)))

    def _through(self, x: Tensor) -> Tensor:
        if not self.checkpointing or not self.training:
            return self.block(x)
        if self.checkpointing == "deepspeed":
            import deepspeed

            return deepspeed.checkpointing.checkpoint(self.block, x)
        return checkpoint(self.block, x, use_reentrant=self.checkpointing == "reentrant")


class Tokens(nn.Module):
    """No attention: the examples of a row need no mask. What is used of `numbers` [B, T] is `boundaries`'s affair."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH)
        self.mix, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor, numbers: Tensor | None = None) -> Tensor:
        return self.head(self.norm(self.words(words) + F.gelu(self.mix(self.words(words)))))


NUMBERS = (  # of each rank: two rows of five positions
    torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 2, -1]]),
    torch.tensor([[0, 1, 1, 1, 1], [0, 0, -1, -1, -1]]),
)


class Case(NamedTuple):
    stage: int
    low: bool = False  # bfloat16
    microbatches: int = 1
    checkpointing: str = ""
    sketch: str | None = None
    by_gas: bool = True  # the engine divides the loss by the number of microbatches
    labelled: bool = False  # estimates by class, losses in the rows
    offload: bool = False  # the optimizer


CASES = {
    "zero0": Case(0),
    "zero1-3": Case(1, microbatches=3, labelled=True),
    "zero2-3": Case(2, microbatches=3, checkpointing="plain", sketch="rademacher:16"),
    "zero3-3": Case(3, microbatches=3, checkpointing="reentrant", by_gas=False),
    "zero3-bf16": Case(3, True),
}
SLOW = {
    f"zero{stage}{'-bf16' * low}-{microbatches}-{kind or 'off'}": Case(stage, low, microbatches, kind)
    for stage in range(4)
    for low in (False, True)
    for microbatches in (1, 3)
    for kind in ("", "plain", "reentrant", "deepspeed")
}
SLOW |= {f"zero{stage}-offload": Case(stage, microbatches=3, offload=True) for stage in (1, 2, 3)}


def made_model(checkpointing: str = "") -> Tiny:
    torch.manual_seed(3)
    return Tiny(checkpointing)


def batch_of(step: int, rank: int, microbatch: int) -> Tensor:
    """[B, T + 1]"""
    draw = torch.Generator().manual_seed(1000 * step + 10 * microbatch + rank)
    return torch.randint(WORDS, (SIZES[rank], LENGTH + 1), generator=draw)


def first_word(inputs: Inputs) -> Tensor:
    """[B]: a class."""
    return inputs.args[0][:, 0] % 2


def first_logits(output: Tensor, inputs: Inputs) -> Tensor:
    """[B]"""
    return output[:, :, 0].mean(dim=1) + inputs.args[0][:, 0]


def loss_of(logits: Tensor, batch: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def started(case: Case, model: nn.Module | None = None) -> Any:
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": case.microbatches,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.02, "torch_adam": True}},
        "bf16": {"enabled": case.low},
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 0}
        | ({"offload_optimizer": {"device": "cpu"}} if case.offload else {}),
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1000000,
    }
    model = model or made_model(case.checkpointing)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    return engine


def trained(engine: Any, case: Case, steps: range, before: Callable[[int], None] = lambda step: None) -> None:
    """The unchanged loop."""
    for step in steps:
        before(step)
        for microbatch in range(case.microbatches):
            batch = batch_of(step, dist.get_rank(), microbatch)
            loss = loss_of(engine(batch[:, :-1]), batch)
            engine.backward(loss, scale_wrt_gas=case.by_gas)
            engine.step()


def measured(name: str, folder: Path) -> dict[str, Any]:
    case = (CASES | SLOW)[name]
    engine, plain = started(case), started(case)
    weights: dict[int, dict[str, Tensor]] = {}
    hooks: dict[int, int] = {}
    partitioned = [p.numel() for p in engine.module.parameters()]

    def before(step: int) -> None:
        weights[step] = masters(engine)
        hooks[step] = sum(len(m._forward_hooks) for m in engine.module.modules())
        with torch.no_grad():  # an evaluation in between is not part of the step
            engine.module(batch_of(9, 0, 0)[:, :-1])

    untouched = sum(len(m._forward_hooks) for m in engine.module.modules())
    measures, out = BY_CLASS if case.labelled else MEASURES, str(folder / name)
    given = {"labels": first_word, "losses": first_logits} if case.labelled else {}
    with gs.attach(engine, out, measures, EVERY, sketch=case.sketch, strict=True, **given) as attachment:
        trained(engine, case, range(STEPS), before)
    trained(plain, case, range(STEPS))
    return {
        "weights": weights,
        "same": all(map(torch.equal, held(engine), held(plain))),
        "steps": attachment.steps,
        "failures": attachment.failures,
        "partitioned": sum(partitioned) == 0,
        "hooks": {step: count - untouched for step, count in hooks.items()},
        "left": sum(len(m._forward_hooks) for m in engine.module.modules()) - untouched,
        "own": [name for name in ("backward", "step") if name in vars(engine)],
    }


def made_tokens() -> Tokens:
    torch.manual_seed(4)
    return Tokens()


def packed(name: str, folder: Path) -> dict[str, Any]:
    """Two steps of two microbatches of packed rows; the loss is a mean over the positions that belong to an example."""
    engine, rank = started(Case({"packed": 1, "packed-zero3": 3}[name], microbatches=2), made_tokens()), dist.get_rank()
    weights: dict[int, dict[str, Tensor]] = {}
    with gs.attach(
        engine, str(folder / name), BY_CLASS, strict=True, boundaries=numbers_of, labels=first_of_each
    ) as on:
        for step in range(2):
            weights[step] = masters(engine)
            for microbatch in range(2):
                words, numbers = batch_of(step, 1, microbatch), NUMBERS[rank]
                counted = numbers >= 0
                logits = engine((words[:, :-1] + rank) % WORDS, numbers)
                engine.backward(F.cross_entropy(logits[counted].float(), words[:, 1:][counted]))
                engine.step()
    return {"weights": weights, "steps": on.steps, "failures": on.failures}


def numbers_of(inputs: Inputs) -> Tensor:
    """[B, T]"""
    return inputs.args[1]


def first_of_each(inputs: Inputs) -> Tensor:
    """[n]: a class."""
    words, numbers = inputs.args
    firsts = [
        row[of == number][0] for row, of in zip(words, numbers, strict=True) for number in range(int(of.max()) + 1)
    ]
    return torch.stack(firsts) % 2


def single(name: str, folder: Path) -> dict[str, Any]:
    """One rank, one microbatch of three examples a step."""
    case = Case(1)
    engine, weights = started(case), dict[int, dict[str, Tensor]]()
    with gs.attach(engine, str(folder / name), MEASURES, strict=True, columns=("grad_sq_norm",)) as attachment:
        trained(engine, case, range(2), lambda step: weights.update({step: masters(engine)}))
    return {"weights": weights, "steps": attachment.steps}


def failing(name: str, folder: Path) -> dict[str, Any]:
    """A failure on one rank in step 1 of 4: no rank has the step, training does not notice."""
    case = Case({"failing": 2, "failing-strict": 1}[name], microbatches=2, checkpointing="plain")
    engine, plain, rank = started(case), started(case), dist.get_rank()

    def losses(output: Tensor, inputs: Inputs) -> Tensor:
        if rank == 1 and engine.global_steps == 1:
            raise ValueError("no such word")
        return output.float().square().mean(dim=(1, 2))

    said = ""
    with gs.attach(
        engine, str(folder / name), losses=losses, strict=name == "failing-strict", keep_states=True
    ) as attachment:
        try:
            trained(engine, case, range(STEPS))
        except Exception as problem:
            said = f"{type(problem).__name__}: {problem}"
    trained(plain, case, range(int(engine.global_steps)))
    return {
        "same": all(map(torch.equal, held(engine), held(plain))),
        "said": said,
        "problem": attachment.problem,
        "failures": attachment.failures,
        "steps": attachment.steps,
        "global_steps": int(engine.global_steps),
    }


def refused(name: str, folder: Path) -> dict[str, Any]:
    """What is said to each mistake, on this rank."""
    found: dict[str, Any] = {}
    case = Case(1)

    def made(label: str, **settings: Any) -> None:
        engine = settings.pop("engine", None) or started(case)
        try:
            with gs.attach(engine, settings.pop("out", str(folder / label)), **settings):
                found[label] = ""
        except Exception as problem:
            found[label] = f"{type(problem).__name__}: {problem}"

    def train(label: str, case: Case, change: Callable[[Any], Any], loop: Callable[..., None] = trained) -> None:
        engine = started(case)
        change(engine)
        with gs.attach(engine, str(folder / label)) as attachment:
            loop(engine, case, range(2))
        found[label] = attachment.problem
        found[f"{label} counted"] = (attachment.failures, attachment.steps, int(engine.global_steps))

    def direct(engine: Any, case: Case, steps: range) -> None:
        for step in steps:
            batch = batch_of(step, dist.get_rank(), 0)
            loss_of(engine(batch[:, :-1]), batch).backward()
            engine.step()

    def twice(engine: Any, case: Case, steps: range) -> None:
        for step in steps:
            batch = batch_of(step, dist.get_rank(), 0)
            logits = engine(batch[:, :-1]), engine(batch[:, :-1])
            engine.backward(loss_of(logits[0], batch) + loss_of(logits[1], batch))
            engine.step()

    def outside(engine: Any, case: Case, steps: range) -> None:
        for step in steps:
            batch = batch_of(step, dist.get_rank(), 0)
            logits = engine.module.head(F.pad(engine(batch[:, :-1])[..., :WIDTH], (0, 0)))
            engine.backward(loss_of(logits, batch))
            engine.step()

    def poisoned(engine: Any, case: Case, steps: range) -> None:
        for step in steps:
            batch = batch_of(step, dist.get_rank(), 0)
            loss = loss_of(engine(batch[:, :-1]), batch) * (torch.inf if dist.get_rank() == 1 and step == 0 else 1.0)
            engine.backward(loss)
            engine.step()

    train("doubled", case, lambda engine: engine.module.norm.weight.register_hook(lambda g: 2 * g))
    train("all doubled", case, lambda engine: [p.register_hook(lambda g: 2 * g) for p in engine.module.parameters()])
    train("direct", case, lambda engine: None, direct)
    train("twice", Case(1, checkpointing="plain"), lambda engine: None, twice)
    train("outside", case, lambda engine: None, outside)
    train("poisoned", Case(0), lambda engine: None, poisoned)
    made("engine", engine=made_model())
    made("every", every=0)
    made("two passes", measures=[gs.Coherence(min_norm=0.0)])
    made("observed", measures=[gs.Sharpness(sigma=0.1)])
    made("by class", measures=[gs.Coherence(by_class=True)])
    made("columns", columns=("loss", "norm"))
    made("packed rule", engine=started(case, nn.Sequential(nn.Linear(3, 2), nn.PReLU())), boundaries=numbers_of)
    (folder / "other").mkdir(exist_ok=True)
    (folder / "other" / "file").write_text("mine")
    dist.barrier()
    made("folder", out=str(folder / "other"))
    made("first", out=str(folder / "again"))
    engine = started(case)
    with gs.attach(engine, str(folder / "again")):
        trained(engine, case, range(1))
    made("settings", out=str(folder / "again"), measures=[gs.Coherence()])
    engine = started(Case(3))
    engine.module.add_module("curve", nn.PReLU())
    made("zero3 rule", engine=engine)
    engine = started(case)
    engine.module.add_module("flat", nn.BatchNorm1d(2))
    made("batch norm", engine=engine)
    return found


def killed(name: str, folder: Path) -> dict[str, Any]:
    """`whole`: six steps. `killed`: a checkpoint at step 2, and in step 4 all wait for death. `resumed`: from there."""
    case, rank = Case(2, microbatches=2), dist.get_rank()
    engine = started(case)
    if name == "resumed":
        engine.load_checkpoint(str(folder / "checkpoints"))

    def before(step: int) -> None:
        if name == "killed" and step == 2:
            engine.save_checkpoint(str(folder / "checkpoints"))
        if name == "killed" and step == 4:
            batch = batch_of(step, rank, 0)
            engine.backward(loss_of(engine(batch[:, :-1]), batch))
            (folder / f"ready-{rank}").touch()
            time.sleep(600)  # the test kills both ranks

    out = folder / ("whole" if name == "whole" else "interrupted")
    with gs.attach(engine, str(out), MEASURES, strict=True) as attachment:
        trained(engine, case, range(int(engine.global_steps), 6), before)
    return {"steps": attachment.steps}


def kinds() -> Iterator[tuple[Callable[[str, Path], dict[str, Any]], tuple[str, ...]]]:
    yield measured, (*CASES, *SLOW)
    yield failing, ("failing", "failing-strict")
    yield packed, ("packed", "packed-zero3")
    yield single, ("single",)
    yield refused, ("refused",)
    yield killed, ("whole", "killed", "resumed")


def known(name: str, folder: Path) -> dict[str, Any]:
    run = next(function for function, names in kinds() if name in names)
    return run(name, folder)


if __name__ == "__main__":
    serve(known)
