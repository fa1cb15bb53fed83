"""Leave-one-out trainings of a small problem, on whatever cluster this is submitted to: the gap, and what contracts it.

    python jobs/leave_out.py --task digits --examples 16 --steps 100 --learning-rate 0.1 --out runs/leave-out
    ray job submit --working-dir . -- python jobs/leave_out.py --task module:attribute --out /shared/runs/b

One training on all examples and one without each, or without each of some blocks: n + 1 of them, full-batch gradient
descent. Submitted again with the same arguments, it keeps the trainings that are finished. The exit code is 0 only if
all were done, 2 for bad input. Without `--out` nothing is kept but what is printed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the working directory of the job

import gradscale as gs


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    out = given.out
    if out and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and "://" not in out and not os.path.isabs(out):
        print(
            f"error: --out of a job must be an absolute path or a URI, got {out}; the job's folder is a copy that the "
            "cluster throws away",
            file=sys.stderr,
        )
        return 2
    try:
        show(leave_out(given), given.steps)
    except gs.GradscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--task", default="digits", help="a ready task (see `gradscale tasks`) or module:attribute")
    parser.add_argument("--out", help="a new folder or URI, or one to resume")
    parser.add_argument("--examples", type=int, help="the first so many; all without it")
    parser.add_argument("--checkpoint", help="the weights to start from; the task's initial ones without it")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10, help="steps between rows of the table")
    parser.add_argument("--blocks", type=int, help="leave out so many random blocks; all without it")
    parser.add_argument("--block-size", type=int, default=1, help="examples of one block")
    parser.add_argument("--gram", action="store_true", help="the effective Gram matrix K_n too")
    parser.add_argument("--tolerance", type=float, default=1e-12, help="the gap from which on it has a contraction")
    parser.add_argument("--seed", type=int, default=0, help="of the blocks")
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time")
    parser.add_argument("--threads-per-worker", type=int, default=1)
    return parser.parse_args(arguments)


def leave_out(given: argparse.Namespace) -> gs.LeaveOutGap:
    return gs.leave_out_gap(**vars(given), on_progress=tell)


def tell(done: int, total: int) -> None:
    print(f"{done}/{total} trainings", flush=True)


def show(found: gs.LeaveOutGap, steps: int) -> None:
    columns = ["step", "time", "loss", "gap", "gap_stderr", "perturbation", "contraction", "closure_error"]
    print(found.trajectory[columns].to_string(index=False, float_format="{:.4g}".format))
    print(f"at step {steps}:")
    for (name, _), estimate in found.estimates.items():
        error = "exact" if estimate.stderr is None else f"± {estimate.stderr:.2g}"
        print(f"  {name:22} {estimate.value:.6g} {error} ({estimate.status}), n = {estimate.n}, {estimate.unit}")
    if found.gram is not None:
        top = [f"{value:.3g}" for value in found.gram.eigenvalues[:5].tolist()]
        below = float(found.gram.shares[len(found.gram.shares) // 2 :].sum())
        print(f"  K_n: largest eigenvalues {', '.join(top)}; {below:.1%} of r(0) in the lower half of the spectrum")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
