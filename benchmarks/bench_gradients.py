"""What per-example gradients cost beside training: gradscale and its peers, on the same models and batches.

    python benchmarks/bench_gradients.py [--only gradscale] [--repetitions 7] [--slow-repetitions 3] [--markdown]

Time: in one process with 2 threads, plain pass, method A, plain pass, method B, ... The ratio is that of each
run to the plain forward and backward pass just before it, so that a load that drifts cancels: its median and
quartiles, of the process's CPU time (which other jobs on the machine disturb less) and of wall time. Squared norms
are held to one backward pass per example first. Memory: each method in a fresh process; the peak of the resident
set during its second run, above that of the loaded models. Methods that take ten times plain and more run a few
times, on the first shape alone. Peers that are not installed are named, not timed; `make bench` installs them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from methods import METHODS, OURS, PEERS, SLOW, Method
from models import SHAPES, Shape, plain, squared_norms_by_loop, worst_error

WARM_UPS = 2
DEPTHS = (4, 8, 16)
IN_DEPTH = ("gradscale: norms + sums", "torch.func.vmap(grad)")
Rows = list[tuple[str, ...]]


class Seconds(NamedTuple):
    wall: float
    cpu: float


class Timing(NamedTuple):
    plain: list[Seconds]
    method: list[Seconds]

    def median_ms(self, clock: str) -> tuple[float, float]:
        before, after = ([getattr(run, clock) * 1e3 for run in runs] for runs in self)
        return statistics.median(before), statistics.median(after)

    def ratio(self, clock: str) -> str:
        """The median, and the quartiles, of the ratio of each run to the plain pass just before it."""
        ratios = [getattr(method, clock) / getattr(plain, clock) for plain, method in zip(*self, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def timed(function: Callable[[], object]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def interleave(methods: Sequence[Method], shape: Shape, repetitions: int, warm_ups: int) -> list[Timing]:
    ids = shape.ids()
    timings = [Timing([], []) for _ in methods]
    for repetition in range(warm_ups + repetitions):
        for method, timing in zip(methods, timings, strict=True):
            pair = timed(partial(plain, method.model, ids)), timed(method.run)
            if repetition >= warm_ups:
                timing.plain.append(pair[0])
                timing.method.append(pair[1])
    return timings


def prepared(names: Sequence[str], shape: Shape) -> tuple[dict[str, tuple[Method, str]], dict[str, str]]:
    """The methods that run on this shape, each with its error, and why the others do not."""
    ready, missing = {}, {}
    for name in names:
        try:
            method = METHODS[name](shape)
            found = method.run()
            error = "-" if found is None else f"{worst_error(found, reference(method, shape)):.0e}"
            del found
            ready[name] = method, error
        except ImportError as problem:
            missing[name] = f"not installed: {problem}"
        except Exception as problem:  # a peer that cannot take the model is a result too
            if name in OURS:
                raise
            missing[name] = f"{type(problem).__name__}: {problem}".splitlines()[0][:120]
    return ready, missing


def reference(method: Method, shape: Shape) -> dict[str, torch.Tensor]:
    return squared_norms_by_loop(method.model, shape.ids())


def time_table(names: Sequence[str], shape: Shape, repetitions: int, slow_repetitions: int) -> Rows:
    rows: Rows = [("method", "covers", "CPU ratio", "wall ratio", "plain CPU ms", "CPU ms", "error", "remarks")]
    rows += _timed_rows([name for name in names if name not in SLOW], shape, repetitions, WARM_UPS)
    return rows + _timed_rows([name for name in names if name in SLOW], shape, slow_repetitions, 0)


def _timed_rows(names: Sequence[str], shape: Shape, repetitions: int, warm_ups: int) -> Rows:
    """`prepared` has run each of them once already."""
    ready, missing = prepared(names, shape)
    timings = interleave([method for method, _ in ready.values()], shape, repetitions, warm_ups)
    rows: Rows = []
    for (name, (method, error)), timing in zip(ready.items(), timings, strict=True):
        before, after = timing.median_ms("cpu")
        times = timing.ratio("cpu"), timing.ratio("wall"), f"{before:.0f}", f"{after:.0f}"
        rows.append((name, f"{method.covers:.1%}", *times, error, method.note))
    return rows + [(name, *["-"] * 6, why) for name, why in missing.items()]


def peak_above_rest(method: str, shape: Shape) -> tuple[float, float]:
    """MB of resident memory that one plain pass, and one run of the method, need above the loaded models.

    What the method keeps between runs (a buffer, saved inputs) counts as its own.
    """
    ready = METHODS[method](shape)
    step = partial(plain, ready.model, shape.ids())
    step()  # once before: threads, kernels and caches come at the first use
    rest = resident("VmRSS")
    return _second_peak(step) - rest, _second_peak(ready.run) - rest


def _second_peak(function: Callable[[], object]) -> float:
    function()
    return peak(function)


def peak(function: Callable[[], object]) -> float:
    """MB of resident memory at most while `function` runs."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    function()
    return resident("VmHWM")


def resident(field: str) -> float:
    """MB, by a field of this process's status."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def peak_in_fresh_process(method: str, shape: Shape, threads: int) -> tuple[float, float] | None:
    """As `peak_above_rest`; None if the method does not run here. Freed memory goes back to the system at once."""
    command = [sys.executable, __file__, "--memory-of", method, "--threads", str(threads)]
    command += ["--shape", json.dumps(vars(shape))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return tuple(json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else None


def memory_table(names: Sequence[str], shape: Shape, threads: int) -> Rows:
    rows: Rows = [("method", "plain MB", "method MB", "extra MB")]
    for name in names:
        peaks = peak_in_fresh_process(name, shape, threads)
        if peaks is not None:
            before, after = peaks
            rows.append((name, f"{before:.0f}", f"{after:.0f}", f"{after - before:+.0f}"))
    return rows


def depth_table(names: Sequence[str], threads: int) -> Rows:
    rows: Rows = [("layers", "plain MB", *[f"{name} MB" for name in names])]
    for layers in DEPTHS:
        found = [peak_in_fresh_process(name, replace(SHAPES["base"], layers=layers), threads) for name in names]
        first = next(peaks for peaks in found if peaks)
        rows.append((str(layers), f"{first[0]:.0f}", *[f"{peaks[1]:.0f}" if peaks else "-" for peaks in found]))
    return rows


def show(title: str, rows: Rows, *, markdown: bool) -> None:
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "|" + "---|" * len(rows[0]))
        print(f"\n**{title}**\n", *lines, sep="\n", flush=True)
    else:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        print(f"\n{title}", *lines, sep="\n", flush=True)


def machine(threads: int) -> str:
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    return (
        f"{os.cpu_count()} cores {cpu[1] if cpu else platform.processor()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {threads} threads, load before {load}, commit {_commit()}"
    )


def _commit() -> str:
    """Of this folder's repository, and whether gradscale has changes that are not in it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "../gradscale"], check=False).returncode
    return (commit.strip() or "unknown") + (" with changes" if changed else "")


def chosen(only: str) -> list[str]:
    """`only`: commas between "gradscale", "peers" and parts of names."""
    groups = {"": METHODS, "gradscale": OURS, "peers": PEERS}
    wanted = [part.strip() for part in only.split(",")]
    names = [n for n in METHODS if any(n in groups[w] if w in groups else w in n for w in wanted)]
    if not names:
        raise SystemExit(f"--only must match one of {', '.join(METHODS)}, got {only!r}")
    return names


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help='"gradscale", "peers", or parts of the names, with commas')
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of " + ", ".join(SHAPES))
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--slow-repetitions", type=int, default=3, help="of methods that take ten times plain and more")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--what", default="time,memory,depth")
    parser.add_argument("--markdown", action="store_true", help="a section for RESULTS.md")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # in a fresh process, with --shape
    parser.add_argument("--shape", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    settings = arguments()
    if "OMP_WAIT_POLICY" not in os.environ:  # threads that spin while others hold their core inflate every time
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OMP_WAIT_POLICY": "passive"})
    warnings.filterwarnings("ignore")  # the peers'
    torch.set_num_threads(settings.threads)
    if settings.memory_of:
        print(json.dumps(peak_above_rest(settings.memory_of, Shape(**settings.shape))))
        return
    asked, what = chosen(settings.only), settings.what.split(",")
    if settings.markdown:
        print(f"## {datetime.date.today()}\n\n`python {' '.join(sys.argv)}`\n")
    print(machine(settings.threads))
    for key in settings.shapes.split(","):
        shape = SHAPES[key]
        names = [name for name in asked if name not in SLOW or shape == SHAPES["base"]]
        if "time" in what:
            title = f"{shape}: {settings.repetitions} repetitions"
            rows = time_table(names, shape, settings.repetitions, settings.slow_repetitions)
            show(title, rows, markdown=settings.markdown)
        if "memory" in what:
            title = f"{shape}: peak memory above that at rest"
            show(title, memory_table(names, shape, settings.threads), markdown=settings.markdown)
    deep = [name for name in IN_DEPTH if name in asked]
    if "depth" in what and deep:
        show("Depth: peak memory above that at rest", depth_table(deep, settings.threads), markdown=settings.markdown)
    print(f"\nload after {', '.join(f'{x:.1f}' for x in os.getloadavg())}")


if __name__ == "__main__":
    main()
