"""The demonstration, end to end on one machine: `make demo`, or `python jobs/demo.py`.

1. Two small transformers are trained under DeepSpeed, side by side: one on the digits with their true labels,
   one on the same images with the labels permuted, which it can only memorize.
2. `gradscale measure` reads every checkpoint of each with two Ray workers.
3. `gradscale report` puts both on one page, runs/demo.html.

What is complete already is not done again. `make clean` starts afresh.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

STEPS = 384
MEASURES = "coherence,dispersion,gaussian_width"
WORKERS = 2
SHARD_SIZE = 96  # 15 shards, so 15 blocks behind each standard error
RUNS = Path("runs")
PAGE = RUNS / "demo.html"


class Side(NamedTuple):
    """One of the two sides of the comparison."""

    labels: str  # as train_digits.py calls them
    checkpoints: Path
    run: Path


SIDES = (
    Side("true", RUNS / "checkpoints-real", RUNS / "demo-real"),
    Side("permuted", RUNS / "checkpoints-random", RUNS / "demo-random"),
)


def main() -> int:
    os.chdir(Path(__file__).parent.parent)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    RUNS.mkdir(exist_ok=True)
    phases: list[tuple[str, Callable[[], bool]]] = [
        ("train both models under DeepSpeed", train),
        ("measure the model of the true labels", lambda: measure(SIDES[0])),
        ("measure the model of the permuted labels", lambda: measure(SIDES[1])),
        ("show and report", show_and_report),
    ]
    seconds: list[float] = []
    for name, phase in phases:
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        if not phase():
            print(f"\nfailed: {name}; the messages above say why", file=sys.stderr)
            return 1
        seconds.append(time.perf_counter() - start)

    print("\n== done")
    for (name, _), spent in zip(phases, seconds, strict=True):
        print(f"{spent:7.1f} s  {name}")
    print(f"{sum(seconds):7.1f} s  in total")
    print(f"\nThe page: {PAGE.resolve()}")
    return 0


def train() -> bool:
    """Both trainings at once, one thread each; each writes to a log that is shown when it ends."""
    started = [(side, start_training(side)) for side in SIDES if not is_trained(side)]
    for side in SIDES:
        if side not in [s for s, _ in started]:
            print(f"{side.checkpoints} is complete already")
    codes = [(side, training.wait()) for side, training in started]
    for side, code in codes:
        text = log_of(side).read_text()
        shown = [line for line in text.splitlines() if line.startswith("step ")] if code == 0 else [text]
        print(f"{side.labels} labels, in {side.checkpoints}:", *shown, sep="\n  ", flush=True)
    return all(code == 0 for _, code in codes)


def start_training(side: Side) -> subprocess.Popen[bytes]:
    options = ["--labels", side.labels, "--out", str(side.checkpoints), "--steps", str(STEPS)]
    with log_of(side).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "jobs/train_digits.py", *options], stdout=log, stderr=subprocess.STDOUT
        )


def is_trained(side: Side) -> bool:
    """DeepSpeed writes the name of a checkpoint to `latest` once the checkpoint is complete."""
    latest = side.checkpoints / "latest"
    return latest.is_file() and latest.read_text().strip() == f"global_step{STEPS}"


def log_of(side: Side) -> Path:
    return RUNS / f"{side.checkpoints.name}.log"


def measure(side: Side) -> bool:
    return gradscale(
        "measure",
        *("--task", "digits"),
        *("--data", f"{side.labels}-labels"),
        *("--checkpoint", str(side.checkpoints)),
        *("--out", str(side.run)),
        *("--measures", MEASURES),
        *("--shard-size", str(SHARD_SIZE)),
        *("--workers", str(WORKERS)),
    )


def show_and_report() -> bool:
    runs = [str(side.run) for side in SIDES]
    return all(gradscale("show", run) for run in runs) and gradscale("report", *runs, "--output", str(PAGE))


def gradscale(*arguments: str) -> bool:
    print("$ gradscale", *arguments, flush=True)
    return subprocess.run([sys.executable, "-m", "gradscale", *arguments], check=False).returncode == 0


if __name__ == "__main__":
    raise SystemExit(main())
