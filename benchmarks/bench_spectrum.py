"""What the spectrum job adds to the products: Lanczos' own work, shares of memory, and how traces scale with workers.

    python benchmarks/bench_spectrum.py [--only lanczos,memory,workers] [--threads 1]

lanczos: 30 iterations with the Hessian of the GPT-2 of `models.py` (P = 3.45 million), in one process; the CPU time
outside of products beside that within them. memory: Lanczos with 20 vectors of 4 million entries on 1, 2 and 4
processes, a diagonal operator; the peak of a rank's resident set above that before. workers: Hutchinson's 16 probes
over 64 examples of the digits' transformer on one and on two Ray actors of one thread, which are up
and have loaded the model; medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_curvature import SHAPE, stream_of
from bench_gradients import Rows, machine, resident, show
from torch import Tensor

from gradscale.curvature.lanczos import lanczos
from gradscale.curvature.layout import gaussian
from gradscale.curvature.operator import Operator
from gradscale.curvature.operators import hessian
from gradscale.curvature.probes import FlatProbes
from gradscale.curvature.processes import all_summed, slice_of

ENTRIES, HELD = 4_000_000, 20


class Timed:
    """An operator that adds up the time of its products."""

    def __init__(self, operator: Operator) -> None:
        self.operator, self.size, self.here, self.seconds = operator, operator.size, operator.here, 0.0

    def products(self, vectors: Tensor) -> Tensor:
        started = time.process_time()
        found = self.operator.products(vectors)
        self.seconds += time.process_time() - started
        return found

    def all_sum(self, parts: Tensor) -> Tensor:
        return self.operator.all_sum(parts)


def lanczos_table(iterations: int = 30) -> Rows:
    stream = stream_of(SHAPE.model(), SHAPE)
    rows: Rows = [("backend", "iterations", "products CPU s", "beyond CPU s", "beyond / products")]
    for backend in ("double_backward", "finite_differences"):
        operator = Timed(hessian(stream, backend, "lambda_max"))
        (start,) = gaussian(stream.layout, range(stream.layout.size), 0, [0], torch.device("cpu"))
        started = time.process_time()
        found = lanczos(operator, start, 1, iterations, 1e-14, basis_cap=iterations + 3)
        beyond = time.process_time() - started - operator.seconds
        share = f"{beyond / operator.seconds:.1%}"
        rows.append((backend, f"{found.steps}", f"{operator.seconds:.1f}", f"{beyond:.1f}", share))
    return rows


@dataclass(frozen=True)
class Diagonal:
    """diag(1, ..., P), in slices; its products take no memory but the result's."""

    here: range
    size: int = ENTRIES

    def products(self, vectors: Tensor) -> Tensor:
        return vectors * torch.arange(self.here.start, self.here.stop, dtype=vectors.dtype)

    def all_sum(self, parts: Tensor) -> Tensor:
        return all_summed(parts)


def on_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{world}", rank=rank, world_size=world)
    operator = Diagonal(slice_of(ENTRIES, rank, world))
    dist.barrier()
    before = resident("VmRSS")
    lanczos(operator, FlatProbes(operator.here)(range(1)), 3, 25, 1e-14, HELD)
    Path(f"{folder}/{world}-{rank}").write_text(f"{resident('VmHWM') - before}")
    dist.barrier()
    dist.destroy_process_group()


def memory_table() -> Rows:
    rows: Rows = [("processes", "MB a rank", "times processes", "basis MB a rank")]
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, 2, 4):
            mp.spawn(on_rank, args=(world, folder), nprocs=world)
            most = max(float(Path(f"{folder}/{world}-{rank}").read_text()) for rank in range(world))
            basis = HELD * ENTRIES * 4 / world / 2**20
            rows.append((f"{world}", f"{most:.0f}", f"{most * world:.0f}", f"{basis:.0f}"))
    return rows


def workers_table(repetitions: int = 5) -> Rows:
    from gradscale.run.cluster import Resources, ray_session
    from gradscale.run.pool import Pool
    from gradscale.run.spectrum_plan import SpectrumPlan
    from gradscale.run.spectrum_worker import SpectrumJob, SpectrumWorker
    from gradscale.tasks.digits import Digits

    seconds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder, ray_session(None, 3, Resources(1, 0)):
        job = SpectrumJob(Digits(), folder, None, (), 32, 1, "cpu", 60.0)
        pools = {workers: Pool(job, workers, Resources(1, 0), SpectrumWorker) for workers in seconds}
        described = pools[1].call("describe", None)
        plan = SpectrumPlan(
            task="digits", task_options={}, checkpoints={"0": {"path": None, "fingerprint": None}}, examples=64,
            data_fingerprint="", parameters=described.parameters, params=None, excluded=[], operator="hessian", top=0,
            which="largest", tolerance=1e-6, max_steps=1, basis_cap=None, vectors="float32",
            trace={"probes": "rademacher"}, norms=None, density=None, stability=None, backend="auto", seed=0,
            shard_size=32, microbatch=32, threads_per_worker=1, device="cpu", versions={},
        )  # fmt: skip
        choice = pools[1].call("choose", plan, 0, ["trace"])
        units = [unit for first in (0, 8) for unit in plan.units(0, first, first + 8)]
        for repetition in range(repetitions + 1):
            for workers, pool in pools.items():
                started = time.perf_counter()
                failures = pool.map("trace_sums", [(plan, choice, unit) for unit in units], lambda _: None)
                assert not failures
                if repetition:
                    seconds[workers].append(time.perf_counter() - started)
        for pool in pools.values():
            pool.__exit__()
    one, two = (statistics.median(seconds[workers]) for workers in (1, 2))
    return [("workers", "seconds", "speed"), ("1", f"{one:.2f}", "1.00"), ("2", f"{two:.2f}", f"{one / two:.2f}")]


TABLES: dict[str, tuple[str, Callable[[], Rows]]] = {
    "lanczos": ("Lanczos beyond its products, 30 iterations at P = 3.45 million", lanczos_table),
    "memory": (f"Memory of Lanczos with {HELD} vectors of {ENTRIES // 10**6} million entries", memory_table),
    "workers": ("Hutchinson with 16 probes, one thread a worker", workers_table),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(TABLES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", action="store_true", help="sections for RESULTS.md")
    settings = parser.parse_args()
    if "OMP_WAIT_POLICY" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OMP_WAIT_POLICY": "passive"})
    warnings.filterwarnings("ignore")
    torch.set_num_threads(settings.threads)
    print(machine(settings.threads))
    for name in settings.only.split(","):
        title, table = TABLES[name]
        show(title, table(), markdown=settings.markdown)
    print(f"\nload after {', '.join(f'{x:.1f}' for x in os.getloadavg())}")


if __name__ == "__main__":
    main()
