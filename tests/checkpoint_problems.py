"""What DeepSpeed saves at every ZeRO stage, of 1, 2 and 3 ranks: run by test_deepspeed_checkpoints.py.

    python tests/checkpoint_problems.py FOLDER

Leaves FOLDER/CASE-W/global_step2 of W ranks with FOLDER/CASE-W.pt beside it, the weights that the engine had; of two
ranks, universal checkpoints too, and a large one. DeepSpeed is imported once: the ranks are forks.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "jobs"))

import torch
from torch import Tensor, nn

WORDS, LENGTH, WIDTH = 7, 5, 6
PACKED = {"parameter_alignment": True, "round_robin_gradients": True}  # gaps between parameters, and another order


class Case(NamedTuple):
    stage: int
    low: bool  # bfloat16
    worlds: tuple[int, ...]
    more: Mapping[str, Any] = {}


CASES = {
    "zero0-fp32": Case(0, False, (2,)),
    "zero0-bf16": Case(0, True, (2,)),
    "zero1-fp32": Case(1, False, (2,)),
    "zero1-bf16": Case(1, True, (2,)),
    "zero2-fp32": Case(2, False, (2,)),
    "zero2-bf16": Case(2, True, (1, 3)),
    "packed": Case(2, False, (2,), PACKED),
    "zero3-fp32": Case(3, False, (2, 3)),
    "zero3-bf16": Case(3, True, (1, 2, 3)),
}
STEPS = 2
LARGE, LAYERS = 1024, 24  # 24 x 4 MiB of masters


class Tied(nn.Module):
    """152 entries of odd sizes: a tied weight, a frozen one, one of a single entry, and three buffers."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.mix, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.gain = nn.Parameter(torch.tensor([1.5]))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight
        self.places.weight.requires_grad_(False)
        self.register_buffer("steps", torch.tensor(2**40 + 1))
        self.register_buffer("scale", torch.tensor([1.0, 0.3, 2.0]))
        self.register_buffer("passing", torch.ones(2), persistent=False)

    def forward(self, words: Tensor) -> Tensor:
        places = torch.arange(LENGTH, device=words.device).expand_as(words)
        return self.head(self.norm(self.mix(self.words(words) + self.places(places))) * self.gain)


def made_model() -> Tied:
    torch.manual_seed(3)
    return Tied()


def made_large() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(*(nn.Linear(LARGE, LARGE, bias=False) for _ in range(LAYERS)))


def started(model: nn.Module, case: Case, **optimizer: Any) -> Any:
    import deepspeed

    strict = {"stage3_param_persistence_threshold": 0, "sub_group_size": 60} if case.stage == 3 else {}
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": case.low},
        "zero_optimization": {"stage": case.stage} | strict | dict(case.more),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000000,
    }
    several = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": several, "weight_decay": 0.1}, {"params": others}] if others else several
    made = torch.optim.AdamW(groups, lr=0.02) if not optimizer else torch.optim.SGD(several, **optimizer)
    return deepspeed.initialize(model=model, optimizer=made, config=settings)[0]


def saved(folder: Path, name: str, rank: int) -> None:
    case = name.rsplit("-", 1)[0]
    engine, draw = started(made_model(), CASES[case]), torch.Generator().manual_seed(5 + rank)
    for _ in range(STEPS):
        words = torch.randint(WORDS, (4, LENGTH + 1), generator=draw)
        logits = engine(words[:, :-1])
        engine.backward(nn.functional.cross_entropy(logits.flatten(0, 1).float(), words[:, 1:].flatten()))
        engine.step()
    engine.save_checkpoint(folder / name)
    expected = weights(engine)
    if rank == 0:
        torch.save(expected, folder / f"{name}.pt")


def weights(engine: Any) -> dict[str, dict[str, Tensor]]:
    """In the training dtype and as masters, from the live engine."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    module = engine.module
    with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=hasattr(module.gain, "ds_id")):
        training = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    masters = dict(training)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            master = safe_get_full_fp32_param(parameter)
            masters[name] = training[name] if master is None else master.detach().clone()
    return {"training": training, "master": masters}


def rank_of(folder: Path, world: int, rank: int) -> None:
    import deepspeed
    from deepspeed.accelerator import set_accelerator
    from train_digits import GlooOnly

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    set_accelerator(GlooOnly())
    deepspeed.init_distributed(
        "gloo",
        init_method=f"file://{folder}/store-{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
        auto_mpi_discovery=False,
        verbose=False,
    )
    for name, case in CASES.items():
        if world in case.worlds:
            saved(folder, f"{name}-{world}", rank)
    if world == 2:
        started(made_large(), Case(3, True, ()), lr=0.1).save_checkpoint(folder / "large")
    torch.distributed.barrier()


def fork(folder: Path, world: int, rank: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        rank_of(folder, world, rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def convert(folder: Path) -> None:
    """Universal checkpoints of two ranks' tags."""
    from deepspeed.checkpoint.ds_to_universal import main

    for name, case in CASES.items():
        if case.stage and 2 in case.worlds:
            tag = folder / f"{name}-2" / f"global_step{STEPS}"
            main(
                argparse.Namespace(
                    input_folder=str(tag),
                    output_folder=f"{tag}_universal",
                    num_extract_workers=1,
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=True,
                )
            )


if __name__ == "__main__":
    import deepspeed  # noqa: F401

    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for world in (1, 2, 3):
        children = [fork(root, world, rank) for rank in range(world)]
        codes = [os.waitpid(child, 0)[1] for child in children]
        if any(codes):
            sys.exit(f"the ranks must end with 0, got {codes} of {world}")
    convert(root)
