"""Measure checkpoints of a task on whatever cluster this is submitted to.

    ray job submit --working-dir . -- python jobs/measure.py --task digits --out /shared/runs/a \
        --checkpoint '/shared/checkpoints/step*' --workers 8 --gpus-per-worker 1

`--out` and the checkpoints must lie where every node sees them: a shared folder, or a URI such as s3:// for
`--out`. A job that is killed is submitted again with the same arguments: what is committed is kept. The exit
code is 0 only if all was measured, 1 if shards failed, 2 for bad input; `ray job submit` itself exits with 1 for
any code but 0.

Outside of a job it starts a Ray here, or joins the one that RAY_ADDRESS names.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the working directory of the job

import gradscale as gs
from gradscale.measures.settings import parse_measures

_SECONDS = 10.0  # between progress lines


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    print(f"joining {os.environ.get('RAY_ADDRESS', 'a Ray of its own')}, {given.workers} workers", flush=True)
    try:
        run = measure(given)
    except gs.ShardsFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except gs.GradscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(run)
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--task", required=True, help="a ready task (see `gradscale tasks`) or module:attribute")
    parser.add_argument("--out", required=True, help="the run directory: a new folder or URI, or a run to resume")
    parser.add_argument("--checkpoint", action="append", help="a checkpoint, a glob or a folder; may be repeated")
    parser.add_argument("--data", help="the task's data")
    parser.add_argument("--model", help="a transformers model folder or config")
    parser.add_argument("--measures", default="coherence,dispersion,gaussian_width", help="NAME[:SETTING=VALUE...],...")
    parser.add_argument("--workers", type=int, default=2, help="Ray actors")
    parser.add_argument("--gpus-per-worker", type=float, default=0)
    parser.add_argument("--threads-per-worker", type=int, default=1)
    parser.add_argument("--shard-size", type=int, default=256, help="examples of one shard")
    parser.add_argument("--microbatch", type=int, default=32, help="examples of one forward and backward pass")
    parser.add_argument("--sketch", help="store a sketch of every gradient: NAME:K")
    parser.add_argument("--sketch-dtype", default="float32", help="what sketches are stored in: float32 or float16")
    parser.add_argument("--probe-products", default="auto", help="products with probes: auto, backward or forward")
    parser.add_argument("--params", help="a regular expression for the parameters to measure")
    parser.add_argument("--seed", type=int, default=0, help="of the sketch")
    return parser.parse_args(arguments)


def measure(given: argparse.Namespace) -> gs.Run:
    options = {"data": given.data, "model_dir": given.model}
    return gs.measure(
        given.task,
        given.out,
        measures=parse_measures(given.measures),
        checkpoints=given.checkpoint,
        workers=given.workers,
        microbatch=given.microbatch,
        shard_size=given.shard_size,
        sketch=given.sketch,
        sketch_dtype=given.sketch_dtype,
        probe_products=given.probe_products,
        params=given.params,
        seed=given.seed,
        gpus_per_worker=given.gpus_per_worker,
        threads_per_worker=given.threads_per_worker,
        task_options={name: value for name, value in options.items() if value is not None},
        on_progress=progress_lines(),
    )


def progress_lines() -> Callable[[gs.Progress], None]:
    """A line every ten seconds, as `ray job logs --follow` shows them."""
    last = -_SECONDS

    def tell(progress: gs.Progress) -> None:
        nonlocal last
        if time.monotonic() - last < _SECONDS and progress.done < progress.total:
            return
        last = time.monotonic()
        left = "" if progress.seconds_left is None else f", {progress.seconds_left:.0f} s left"
        print(f"measured {progress.done}/{progress.total} examples, {progress.rate:.0f}/s{left}", flush=True)

    return tell


def show(run: gs.Run) -> None:
    """The estimates over all parameters; those of each layer and class are in estimates.parquet."""
    estimates = run.estimates()
    whole = estimates[estimates["scope"].isin(["all", "union"])]
    print(whole[["step", "measure", "name", "scope", "value", "stderr", "n"]].to_string(index=False))
    print(f"{run.path}: {len(estimates)} estimates; read them with gradscale.open_run, or: gradscale report {run.path}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
