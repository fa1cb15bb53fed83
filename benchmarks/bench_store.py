"""Writing and reading back a large store of sketches: rates, times and memory.

    python benchmarks/bench_store.py [--examples 100000] [--dim 4096] [--dtype float16] [--folder DIR] [--markdown]

The sketches are drawn, normals but for a pair that is planted; a run directory with them is written by gradscale's own
writer, shard by shard, read back in four ways, and deleted. Normals hardly compress: a million float16 rows of 4096
are 8 GB. MB are of sketches as stored (10^6 bytes); the peak is of the resident memory while it runs, above that
before. Before the first scan the system is asked to drop the files from its cache; later reads may come from there.

Shapes: n examples, K numbers of a sketch.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from bench_gradients import Rows, machine, peak, resident, show
from torch import Tensor

from gradscale.store.files import Files
from gradscale.store.narrow import DTYPES
from gradscale.store.results import Run, open_run
from gradscale.store.sketches import StoredSketches, locate
from gradscale.store.store import PLAN, ShardColumns, Store, file_name

STEP = 0
SHARD = 8192  # examples
PAIR = (0, -1)  # the first and the last example have a cosine of 0.8
GRAM_NEAR, GRAM_ANYWHERE = 4096, 1024  # examples


@dataclass(frozen=True)
class Size:
    examples: int
    dim: int
    dtype: str

    @property
    def megabytes(self) -> float:
        return self.examples * self.dim * DTYPES[self.dtype].itemsize / 1e6

    @property
    def shards(self) -> int:
        return -(-self.examples // SHARD)

    @property
    def scheme(self) -> dict[str, object]:
        return {"name": "count", "version": 0, "seed": 0, "dim": self.dim}


class Spent(NamedTuple):
    seconds: float
    megabytes: float  # of memory


def spent(function: Callable[[], object]) -> Spent:
    before, started = resident("VmRSS"), time.perf_counter()
    most = peak(function)
    return Spent(time.perf_counter() - started, most - before)


# Writing


def sketches_of(size: Size, shard: int) -> Tensor:
    """[at most SHARD, K] of the stored type."""
    rows = min(SHARD, size.examples - shard * SHARD)
    drawn = torch.randn(rows, size.dim, generator=torch.Generator().manual_seed(shard))
    if shard == size.shards - 1:
        first = torch.randn(1, size.dim, generator=torch.Generator().manual_seed(0))  # as the first shard begins
        drawn[-1] = 0.8 * first[0] + 0.6 * drawn[-1]
    return drawn.to(DTYPES[size.dtype])


def columns_of(size: Size, shard: int) -> ShardColumns:
    sketch = sketches_of(size, shard)
    n = len(sketch)
    sq_norms = torch.cat([part.double().square().sum(dim=1) for part in sketch.split(512)])
    ids = torch.arange(shard * SHARD, shard * SHARD + n)
    return ShardColumns(ids, None, torch.zeros(n).double(), sq_norms, sq_norms[:, None], torch.ones(n).bool(), sketch)


def write(folder: str, size: Size) -> tuple[float, float]:
    """A run directory; returns the seconds in the writer alone, and the megabytes on the disk."""
    store, seconds, bytes_written = Store(Files(folder)), 0.0, 0
    plan = {"checkpoints": {str(STEP): None}, "sketch": size.scheme, "sketch_dtype": size.dtype}
    store.files.write(PLAN, json.dumps({**plan, "parameters": {"weight": {"shape": [size.dim]}}}).encode())
    for shard in range(size.shards):
        columns = columns_of(size, shard)
        started = time.perf_counter()
        files = store.write_shard(STEP, shard, columns, {}, ["weight"], size.scheme)
        store.commit(STEP, shard, {"files": files})
        seconds += time.perf_counter() - started
        bytes_written += sum(file.size for file in files)
    return seconds, bytes_written / 1e6


def forget(folder: str) -> None:
    """Ask the system to drop the files from its cache."""
    for path in Path(folder).rglob("*.parquet"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# Reading


def stored(run: Run, size: Size) -> StoredSketches:
    names = [file_name("sketches", STEP, shard, "parquet") for shard in range(size.shards)]
    rows = run.rows().to_table(columns=["example_id", "grad_sq_norm", "finite"])
    return locate(run.files, STEP, names, rows, size.scheme, size.dtype)


def scan(run: Run, size: Size) -> int:
    """Every row group, one after another; returns how many numbers there were."""
    return sum(matrix.size for _, matrix in stored(run, size).blocks())


def readings(run: Run, size: Size) -> Iterator[tuple[str, float, Callable[[], object]]]:
    """What is done, how many of the store's bytes it reads, as a share, and how to do it."""
    last = size.examples + PAIR[1]
    near = min(GRAM_NEAR, size.examples)
    anywhere = np.random.default_rng(0).choice(size.examples, min(GRAM_ANYWHERE, size.examples), replace=False)

    def nearest() -> None:
        found = run.neighbours(PAIR[0], STEP)
        assert found["example_id"][0] == last, "the planted neighbour must come first"

    def blocks() -> None:
        for block in run.gram_blocks(STEP, ids=np.arange(near)):
            assert np.isfinite(block.block).all()

    yield "scan, row group by row group", 1.0, lambda: scan(run, size)
    yield "the same again", 1.0, lambda: scan(run, size)
    yield "neighbours of one example", 1.0, nearest
    yield f"gram_blocks of {near} examples side by side", 0.0, blocks
    yield f"gram of {len(anywhere)} examples anywhere", 1.0, lambda: run.gram(STEP, anywhere)


def table(folder: str, size: Size) -> Rows:
    rows: Rows = [("what", "seconds", "MB/s", "peak MB")]
    seconds, on_disk = 0.0, 0.0

    def written() -> None:
        nonlocal seconds, on_disk
        seconds, on_disk = write(folder, size)

    memory = spent(written).megabytes
    rows.append((f"write {size.shards} shards ({on_disk:,.0f} MB on disk)", *_rates(seconds, size.megabytes, memory)))
    run = open_run(folder)
    os.sync()
    forget(folder)
    for what, share, function in readings(run, size):
        found = spent(function)
        rows.append((what, *_rates(found.seconds, share * size.megabytes, found.megabytes)))
    return rows


def _rates(seconds: float, megabytes: float, memory: float) -> tuple[str, str, str]:
    return f"{seconds:.1f}", f"{megabytes / seconds:,.0f}" if megabytes else "-", f"{memory:,.0f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--dtype", default="float16", choices=list(DTYPES))
    parser.add_argument("--folder", help="where the store is made and deleted again; default: the temporary folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markdown", action="store_true", help="a section for RESULTS.md")
    return parser.parse_args()


def main() -> None:
    settings = arguments()
    torch.set_num_threads(settings.threads)
    size = Size(settings.examples, settings.dim, settings.dtype)
    if settings.markdown:
        print(f"## {datetime.date.today()}\n\n`python {' '.join(sys.argv)}`\n")
    print(machine(settings.threads), flush=True)
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        rows = table(folder, size)
    title = f"{size.examples:,} sketches of {size.dim} {size.dtype}: {size.megabytes:,.0f} MB"
    show(title, rows, markdown=settings.markdown)


if __name__ == "__main__":
    main()
