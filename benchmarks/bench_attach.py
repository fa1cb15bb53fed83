"""What `gs.attach` costs beside training: measured and unmeasured steps against plain ones, under DeepSpeed.

    python benchmarks/bench_attach.py [--repetitions 9] [--only unmeasured,norms] [--stage 1] [--markdown]

Two gloo ranks of one thread each, the GPT-2 of `models.py` (base: 4 layers, width 256, T=128, B=16 on each rank,
float32), AdamW, no accumulation. Every variant has an engine of its own; a repetition makes one step with each of them
in turn, and the ratio is that of a step to the plain one of the same repetition (a second plain engine tells how far
off that can be by itself): its median and quartiles, of each rank's CPU and wall time, from before the forward pass
until `engine.step` has returned. The first steps, which check, are not counted. The first rank's writing of the run
directory is.

Predicted, in multiplications for a position (P = 3.45 million, 3.41 of them in matrices; 0.2 million of attention): the
plain pass 3 x 3.6 = 10.8 million; norms by Gram matrices T (R + C), 2.3; by tiles, which the count sketch takes, R C,
3.4, and three or four passes over the tile at 8 multiplications / 128 an entry, 0.8; the Kronecker sketch of rank 64, r
(R + C + r) of its own, 1.2; the sum of gradients none, for autograd makes it. So a measured pass should cost 1.21 with
coherence and norms, 1.39 with the count sketch, 1.32 with the Kronecker sketch; a little less of a step, which also has
the optimizer and the all-reduce, and a little more for the 8 P bytes that each rank sends to the first and for the
estimates there. A dense Gaussian sketch with K = 512 takes P K = 1.8 billion products an example, 14 million a
position: 2.6, without what it costs to make the P K normals, of which a gigabyte is kept and the other six are made
anew every time: a step of minutes. It is not timed unless asked for.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "jobs"))

import torch
import torch.distributed as dist
from bench_gradients import Rows, machine, show
from models import SHAPES, losses

import gradscale as gs

NEVER = 10**9
WARM_UPS = 2


class Variant(NamedTuple):
    every: int | None  # None: no attach
    measures: tuple[Any, ...] = (gs.Coherence(),)
    sketch: str | None = None


VARIANTS = {
    "plain": Variant(None),
    "again": Variant(None),
    "unmeasured": Variant(NEVER),
    "norms": Variant(1),
    "count": Variant(1, sketch="default:512"),
    "kronecker": Variant(1, sketch="kronecker:512"),
    "gaussian": Variant(1, sketch="gaussian:512"),
}
TITLES = {
    "plain": "plain",
    "again": "plain, another engine",
    "unmeasured": "attached, not measured",
    "norms": "coherence + norms",
    "count": "coherence + norms + count sketch, K=512",
    "kronecker": "coherence + norms + Kronecker sketch, K=512",
    "gaussian": "coherence + norms + dense Gaussian sketch, K=512",
}


def started(stage: int) -> Any:
    import deepspeed

    model = SHAPES["base"].model().train()
    settings = {
        "train_micro_batch_size_per_gpu": SHAPES["base"].batch,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "steps_per_print": NEVER,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    return engine


def step(engine: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds of wall and of this process's CPU time."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    engine.backward(losses(engine, ids).mean())
    engine.step()
    return time.perf_counter() - wall, time.process_time() - cpu


def on_rank(names: list[str], stage: int, repetitions: int, out: Path) -> None:
    import deepspeed
    from deepspeed.accelerator import set_accelerator
    from train_digits import GlooOnly

    warnings.filterwarnings("ignore")
    set_accelerator(GlooOnly())
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    shape = SHAPES["base"]
    draw = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(shape.vocabulary, (shape.batch, shape.positions), generator=draw)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with ExitStack() as attached:
        engines = {name: started(stage) for name in names}
        for i, name in enumerate(names):
            every, measures, sketch = VARIANTS[name]
            if every is not None:
                run = gs.attach(engines[name], str(out / f"run-{i}"), measures, every, sketch=sketch, strict=True)
                attached.enter_context(run)
        for repetition in range(WARM_UPS + repetitions):
            for name, engine in engines.items():
                seconds = step(engine, ids)
                if repetition >= WARM_UPS:
                    found[name].append(seconds)
    torch.save(found, out / f"found-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def launched(names: list[str], stage: int, repetitions: int, out: Path) -> list[dict[str, list[tuple[float, float]]]]:
    """What each rank found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--out", str(out), "--stage", f"{stage}", "--repetitions", f"{repetitions}"]
    command += ["--only", ",".join(names)]
    ranks = [
        subprocess.Popen(command, env=common | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}, stdout=subprocess.DEVNULL)
        for rank in (0, 1)
    ]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit("a rank has failed")
    return [torch.load(out / f"found-{rank}.pt") for rank in (0, 1)]


def quartiles(values: list[float], baseline: list[float]) -> str:
    ratios = [value / before for value, before in zip(values, baseline, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def table(found: dict[str, list[tuple[float, float]]]) -> Rows:
    rows: Rows = [("step", "CPU ratio", "wall ratio", "CPU ms", "wall ms")]
    plain = [list(clock) for clock in zip(*found["plain"], strict=True)]
    for name, seconds in found.items():
        wall, cpu = (list(clock) for clock in zip(*seconds, strict=True))
        times = (f"{statistics.median(clock) * 1e3:.0f}" for clock in (cpu, wall))
        rows.append((TITLES[name], quartiles(cpu, plain[1]), quartiles(wall, plain[0]), *times))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="again,unmeasured,norms,count,kronecker", help="of " + ", ".join(VARIANTS))
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--stage", type=int, default=1, help="of ZeRO")
    parser.add_argument("--markdown", action="store_true", help="a section for RESULTS.md")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)  # of a rank
    settings = parser.parse_args()
    names = ["plain", *(name for name in VARIANTS if name in settings.only.split(",") and name != "plain")]
    if settings.out:
        on_rank(names, settings.stage, settings.repetitions, settings.out)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OMP_WAIT_POLICY": "passive"})
    print(machine(1))
    with tempfile.TemporaryDirectory() as folder:
        found = launched(names, settings.stage, settings.repetitions, Path(folder))
    for rank, of_rank in enumerate(found):
        title = f"{SHAPES['base']}, ZeRO-{settings.stage}, rank {rank} of 2: {settings.repetitions} repetitions"
        show(title, table(of_rank), markdown=settings.markdown)
    print(f"\nload after {', '.join(f'{x:.1f}' for x in os.getloadavg())}")


if __name__ == "__main__":
    main()
