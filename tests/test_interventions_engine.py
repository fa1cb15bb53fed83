"""Promise: on a DeepSpeed engine an intervention ends with the weights of one process that has the ranks' whole batch.

Two ranks run this file as a script for every case and leave FOLDER/CASE-RANK.pt; the oracle is (model, optimizer).

    torchrun --nproc_per_node 2 tests/test_interventions_engine.py FOLDER CASE...
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "jobs"))

import pytest
import torch
import torch.distributed as dist
from engine_problems import LENGTH, WORDS, losses, made_model
from rank_problems import environments
from torch import Tensor, nn
from torch.nn import functional as F

import gradscale as gs
from gradscale.errors import GradscaleError

ROOT = Path(__file__).resolve().parent.parent
STEPS, SIZE = 4, 6  # examples of a microbatch
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


class Case(NamedTuple):
    stage: int
    microbatches: int = 1
    low: bool = False
    autocast: bool = False


CASES = {
    "zero0": Case(0),
    "zero1": Case(1),
    "zero2": Case(2),
    "zero0-accumulated": Case(0, 2),
    "zero1-accumulated": Case(1, 2),
    "zero2-accumulated": Case(2, 2),
    "zero1-bf16": Case(1, low=True),
    "zero1-bf16-accumulated": Case(1, 2, low=True),
    "zero2-autocast": Case(2, autocast=True),
    "zero3": Case(3),  # these last: DeepSpeed replaces F.linear for good
    "zero3-accumulated": Case(3, 2),
    "zero3-bf16": Case(3, low=True),
}


def batch(step: int, rank: int, microbatch: int) -> Tensor:
    draw = torch.Generator().manual_seed(100 * step + 10 * rank + microbatch)
    return torch.randint(WORDS, (SIZE, LENGTH + 1), generator=draw)


def mean_loss(words: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: losses(model, words).mean()


def each_loss(words: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: losses(model, words)


def outputs(words: Tensor) -> Callable[[nn.Module], tuple[Tensor, Tensor]]:
    return lambda model: (model(words[:, :-1]), F.one_hot(words[:, 1:], WORDS).float())


METHODS: dict[str, tuple[Any, Callable[[Tensor], Any]]] = {
    "plain": (gs.DynamicClipping(start=100), mean_loss),
    "clipping": (gs.DynamicClipping(alpha=0.5), mean_loss),
    "perturbation": (gs.GaussianPerturbation(sigma=0.05), mean_loss),
    "sam": (gs.SAM(rho=0.2), mean_loss),
    "asam": (gs.SAM(rho=0.5, adaptive=True), mean_loss),
    "label noise": (gs.LabelNoise(delta=0.3), outputs),
    "winsorized": (gs.Winsorized(share=0.2), each_loss),
    "median of means": (gs.MedianOfMeans(groups=3), each_loss),
    "trace": (gs.HessianTracePenalty(weight=0.001), mean_loss),
}
PER_EXAMPLE = ("winsorized", "median of means")
MOVE = ("perturbation", "sam", "asam")
PARTITIONED = ("plain", "clipping", "label noise")


def served(case: Case) -> list[str]:
    """Quantiles need all examples in one microbatch, moves float32 weights; ZeRO-3 has gradients in partitions only."""
    served_by_stage = PARTITIONED if case.stage == 3 else METHODS
    names = [name for name in served_by_stage if not (case.microbatches > 1 and name in PER_EXAMPLE)]
    return [name for name in names if not (case.low and name in (*MOVE, "trace", *PER_EXAMPLE))]


def in_one_process(name: str, microbatches: int) -> tuple[dict[str, Tensor], gs.StepState]:
    """Weights after the steps, with the batches of both ranks, rank by rank."""
    method, loss_of = METHODS[name]
    model, state = made_model(), gs.StepState()
    target = model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **SGD)
    for step in range(STEPS):
        words = [batch(step, rank, m) for rank in range(2) for m in range(microbatches)]
        whole = torch.cat(words) if name in PER_EXAMPLE else None
        method.step(target, [loss_of(each) for each in words] if whole is None else loss_of(whole), state)
    return {name: p.detach() for name, p in model.named_parameters()}, state


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What the two ranks found of each case: one launch, for starting them takes longer than a case."""
    folder = tmp_path_factory.mktemp("ranks")
    names, processes, logs = sorted([*CASES, "refusals"], key=lambda name: "zero3" in name), [], []
    for rank, own in enumerate(environments()):
        logs.append((folder / f"log-{rank}").open("w+"))
        job = [sys.executable, __file__, str(folder), *names]
        processes.append(subprocess.Popen(job, env=own, stdout=logs[-1], stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
        for log in logs:
            log.close()
    ends = "\n".join((folder / f"log-{rank}").read_text()[-3000:] for rank in (0, 1))
    assert codes == [0, 0], f"both ranks must end with 0, got {codes}:\n{ends}"
    return {name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in (0, 1)] for name in names}


FINE = [(case, name) for case in CASES if not (CASES[case].low or CASES[case].autocast) for name in served(CASES[case])]


@pytest.mark.parametrize(("case", "name"), FINE)
def test_weights_are_those_of_one_process(case: str, name: str, ranks: dict[str, list[dict[str, Any]]]) -> None:
    expected, state = in_one_process(name, CASES[case].microbatches)
    start = made_model().state_dict()
    for found in ranks[case]:
        for parameter, weight in expected.items():
            torch.testing.assert_close(found[name][parameter], weight, rtol=0, atol=1e-5)
        assert found[f"{name} state"]["steps"] == state.steps == STEPS
        assert found[f"{name} state"]["threshold"] == pytest.approx(state.threshold, rel=1e-5)
    assert max(float((weight - start[parameter]).abs().max()) for parameter, weight in expected.items()) > 1e-2


def test_the_methods_differ_by_far_more_than_that() -> None:
    plain, _ = in_one_process("plain", 1)
    for name in METHODS:
        if name != "plain":
            found, _ = in_one_process(name, 1)
            assert max(float((found[each] - plain[each]).abs().max()) for each in plain) > 1e-3, name


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.microbatches == 1])
def test_a_step_that_changes_nothing_is_deepspeeds_own_bit_for_bit(
    case: str, ranks: dict[str, list[dict[str, Any]]]
) -> None:
    """Weights and masters, in bfloat16 too."""
    for found in ranks[case]:
        for parameter, weight in found["deepspeed"].items():
            assert torch.equal(found["plain"][parameter], weight), parameter
        assert found["plain losses"] == pytest.approx(found["deepspeed losses"], rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_and_losses_are_the_ranks_own(case: str, ranks: dict[str, list[dict[str, Any]]]) -> None:
    one, other = ranks[case]
    for name in served(CASES[case]):
        assert all(torch.equal(one[name][parameter], other[name][parameter]) for parameter in one[name])
        assert one[f"{name} state"] == other[f"{name} state"]
        assert one[f"{name} losses"] != other[f"{name} losses"]


BFLOAT = [name for name, case in CASES.items() if case.low or case.autocast]


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in BFLOAT for name in served(CASES[case]) if name != "trace"],
)
def test_bfloat16_goes_the_same_way(case: str, name: str, ranks: dict[str, list[dict[str, Any]]]) -> None:
    """Within a share of how far float32 went: 1 % under autocast, 10 % with weights of bfloat16, by their masters."""
    expected, _ = in_one_process(name, CASES[case].microbatches)
    start = made_model().state_dict()
    found = ranks[case][0][name]
    names = [name for name in found if name != "places.weight"]
    off = torch.cat([(found[name] - expected[name]).flatten() for name in names]).norm()
    way = torch.cat([(expected[name] - start[name]).flatten() for name in names]).norm()
    assert 1e-5 < float(off / way) < (0.01 if CASES[case].autocast else 0.1)


def test_under_stage_3_no_rank_has_more_than_half(ranks: dict[str, list[dict[str, Any]]]) -> None:
    """Of the weights and of the gradient that is clipped, but for padding."""
    whole = sum(p.numel() for p in made_model().parameters() if p.requires_grad)
    for found in ranks["zero3"]:
        assert 0.5 * whole <= found["held"] < 0.6 * whole


REFUSALS = {
    "too few": "under ZeRO-3 there must be one function for each microbatch that the engine accumulates, got 1 for 2",
    "nan": "the gradient must be finite, got norm nan; leave the batch out",
    "stage 3": "the engine's ZeRO stage must be 0, 1 or 2, got 3; no rank holds a gradient whole under 3; take 2",
    "bf16": "the weights must be float32, got torch.bfloat16 for words.weight, in which moves are lost",
    "engine called": "loss_fn must call the model that it is given, got a call of the engine; write lambda model",
    "waiting": "a step must begin with no gradient waiting, got 1 microbatches; call it in place of backward",
    "uneven": r"all ranks must have as many examples, got [6, 5]; drop the last ones",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_serve_is_refused_on_all_ranks(name: str, ranks: dict[str, list[dict[str, Any]]]) -> None:
    for found in ranks["refusals"]:
        assert REFUSALS[name] in found[name]


def started(case: Case) -> Any:
    import deepspeed

    model = made_model()
    settings = {
        "train_micro_batch_size_per_gpu": SIZE,
        "gradient_accumulation_steps": case.microbatches,
        "bf16": {"enabled": case.low},
        "torch_autocast": {"enabled": case.autocast, "dtype": "bfloat16"},
        "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # of its own; 1.0 by default
        "steps_per_print": 1000000,
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **SGD)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def masters(engine: Any) -> dict[str, Tensor]:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, p in engine.module.named_parameters():
        master = safe_get_full_fp32_param(p) if p.requires_grad else None
        with GatheredParameters([p], enabled=engine.zero_optimization_stage() == 3):
            found[name] = (p if master is None else master).detach().float().clone()
    return found


def trained(case: Case, name: str) -> dict[str, Any]:
    engine, state, seen = started(case), gs.StepState(), []
    method, loss_of = METHODS[name]
    for step in range(STEPS):
        words = [loss_of(batch(step, dist.get_rank(), m)) for m in range(case.microbatches)]
        seen.append(float(method.step(engine, words, state)))
    assert engine.global_steps == STEPS
    trainable = [p for p in engine.module.parameters() if p.requires_grad]
    held = {"held": sum(p.ds_tensor.numel() for p in trainable)} if case.stage == 3 else {}
    return {name: masters(engine), f"{name} state": state.state_dict(), f"{name} losses": seen, **held}


def by_deepspeed(case: Case) -> dict[str, Any]:
    engine, seen = started(case), []
    for step in range(STEPS):
        loss = losses(engine, batch(step, dist.get_rank(), 0)).mean()
        engine.backward(loss)
        engine.step()
        seen.append(float(loss.detach()))
    return {"deepspeed": masters(engine), "deepspeed losses": seen}


def refusals() -> dict[str, str]:
    def said(engine: Any, method: Any, loss_fn: Any) -> str:
        try:
            method.step(engine, loss_fn, gs.StepState())
        except GradscaleError as problem:
            return str(problem)
        return "nothing"

    mine = batch(0, dist.get_rank(), 0)
    plain, accumulating = started(Case(1)), started(Case(1, 2))
    accumulating.backward(losses(accumulating, mine).mean())
    accumulating.step()
    found = {
        "bf16": said(started(Case(1, low=True)), gs.SAM(), mean_loss(mine)),
        "engine called": said(plain, gs.SAM(), lambda _: losses(plain, mine).mean()),
        "waiting": said(accumulating, gs.SAM(), mean_loss(mine)),
        "uneven": said(plain, gs.MedianOfMeans(1), each_loss(mine[: SIZE - dist.get_rank()])),
    }
    partitioned = started(Case(3))  # last: it replaces F.linear
    return found | {
        "stage 3": said(partitioned, gs.SAM(), mean_loss(mine)),
        "nan": said(partitioned, gs.DynamicClipping(), lambda model: losses(model, mine).mean() * math.nan),
        "too few": said(started(Case(3, 2)), gs.LabelNoise(0.1), outputs(mine)),
    }


def main() -> None:
    import deepspeed
    from deepspeed.accelerator import set_accelerator
    from train_digits import GlooOnly

    folder, names = Path(sys.argv[1]), sys.argv[2:]
    set_accelerator(GlooOnly())
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60), verbose=False)
    for name in names:
        if name == "refusals":
            found: dict[str, Any] = refusals()
        else:
            case = CASES[name]
            found = by_deepspeed(case) if case.microbatches == 1 else {}
            for method in served(case):
                found |= trained(case, method)
        torch.save(found, folder / f"{name}-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
