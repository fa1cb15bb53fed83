"""What products with Hessian, Gauss-Newton and gradient covariance cost beside training.

    python benchmarks/bench_curvature.py [--threads 2] [--repetitions 7] [--only finite] [--what time,memory]

Time: in one process, plain forward and backward pass, product, plain pass, next product, ... on one microbatch of the
GPT-2 of `models.py`, its attention as transformers sets it (fused; the exact ways take the differentiable kernel). The
ratio is that of each run to the plain pass just before it, and per vector: its median and quartiles, in CPU and wall
time. The error is that of the product with a random vector beside double backward in float64. Memory: each in a fresh
process, the peak of the resident set during its second run above that of the loaded model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from bench_gradients import Rows, Seconds, Timing, machine, peak, resident, show, timed
from models import SHAPES, Shape, losses, plain
from torch import Tensor, nn

from gradscale.curvature.backends import (
    BACKWARD_JACOBIAN,
    DOUBLE_BACKWARD,
    FORWARD_JACOBIAN,
    FORWARD_OVER_BACKWARD,
    Backend,
    Choice,
    FiniteDifferences,
)
from gradscale.curvature.layout import gaussian
from gradscale.curvature.operator import Operator
from gradscale.curvature.operators import CovarianceOperator, CurvatureOperator
from gradscale.curvature.stream import Stream
from gradscale.grads.coverage import select_parameters, sites
from gradscale.grads.subject import Subject
from gradscale.task import TensorExamples

WARM_UPS = 1
SHAPE = SHAPES["base"]


class Product(NamedTuple):
    make: Callable[[Stream], Operator]
    vectors: int
    target: str = "-"  # of the ratio a vector


def by(backend: Backend) -> Callable[[Stream], Operator]:
    return lambda stream: CurvatureOperator(stream, Choice(backend, 0.0, {}))


PRODUCTS: Mapping[str, Product] = {
    "finite differences": Product(by(FiniteDifferences(1e-3)), 1, "2.0"),
    "double backward": Product(by(DOUBLE_BACKWARD), 1, "3.1"),
    "double backward, 8 vectors": Product(by(DOUBLE_BACKWARD), 8, "2.0"),
    "forward over backward": Product(by(FORWARD_OVER_BACKWARD), 1),
    "Gauss-Newton": Product(by(FORWARD_JACOBIAN), 1, "2.1"),
    "Gauss-Newton, 8 vectors": Product(by(FORWARD_JACOBIAN), 8),
    "Gauss-Newton without forward mode": Product(by(BACKWARD_JACOBIAN), 1),
    "covariance": Product(CovarianceOperator, 1),
    "covariance, 8 vectors": Product(CovarianceOperator, 8),
}
HESSIANS = ("finite differences", "double backward", "double backward, 8 vectors", "forward over backward")


@dataclass(frozen=True)
class Text:
    """The benchmark's batch as a task."""

    net: nn.Module
    shape: Shape

    def model(self, checkpoint: str | None) -> nn.Module:
        return self.net

    def examples(self) -> TensorExamples:
        return TensorExamples(ids=self.shape.ids())

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return losses(model, batch["ids"])


def stream_of(model: nn.Module, shape: Shape) -> Stream:
    task, parameters = Text(model, shape), select_parameters(model, None)
    subject = Subject(task, model, task.examples(), parameters, sites(model, parameters))
    return Stream(subject, range(shape.batch), shape.batch)


def vectors_of(stream: Stream, count: int) -> Tensor:
    return gaussian(stream.layout, range(stream.layout.size), 0, range(count), torch.device("cpu"))


def run_of(name: str, stream: Stream) -> Callable[[], Tensor]:
    product = PRODUCTS[name]
    return partial(product.make(stream).products, vectors_of(stream, product.vectors))


def interleave(names: Sequence[str], shape: Shape, repetitions: int) -> list[Timing]:
    """Times of a product are those of a vector."""
    model, ids = shape.model(), shape.ids()
    runs = [run_of(name, stream_of(model, shape)) for name in names]
    timings = [Timing([], []) for _ in names]
    for repetition in range(WARM_UPS + repetitions):
        for name, run, timing in zip(names, runs, timings, strict=True):
            before, own = timed(partial(plain, model, ids)), timed(run)
            if repetition >= WARM_UPS:
                timing.plain.append(before)
                timing.method.append(Seconds(*(time / PRODUCTS[name].vectors for time in own)))
    return timings


def errors(names: Sequence[str], shape: Shape) -> dict[str, float]:
    """|M v - exact| / |exact| of a random v; exact is the same in float64, of the Hessian by double backward."""
    model, wide = shape.model(), shape.model().double()
    found = {}
    for name in names:
        stream, product = stream_of(model, shape), PRODUCTS[name]
        (v,) = vectors_of(stream, 1)
        exact = PRODUCTS["double backward" if name in HESSIANS else name].make
        expected = exact(stream_of(wide, shape)).products(v[None].double())
        found[name] = float((product.make(stream).products(v[None]) - expected).norm() / expected.norm())
    return found


def time_table(names: Sequence[str], shape: Shape, repetitions: int, *, check: bool) -> Rows:
    rows: Rows = [("product", "CPU ratio", "wall ratio", "target", "plain CPU ms", "CPU ms", "error")]
    off = errors(names, shape) if check else {}
    for name, timing in zip(names, interleave(names, shape, repetitions), strict=True):
        before, after = timing.median_ms("cpu")
        ratios = timing.ratio("cpu"), timing.ratio("wall"), PRODUCTS[name].target
        rows.append((name, *ratios, f"{before:.0f}", f"{after:.0f}", f"{off[name]:.0e}" if check else "-"))
    return rows


def memory_table(names: Sequence[str], threads: int) -> Rows:
    rows: Rows = [("product", "plain MB", "product MB", "ratio")]
    for name in names:
        command = [sys.executable, __file__, "--memory-of", name, "--threads", str(threads)]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        before, own = json.loads(done.stdout.splitlines()[-1])
        rows.append((name, f"{before:.0f}", f"{own:.0f}", f"{own / before:.2f}"))
    return rows


def peaks(name: str, shape: Shape) -> tuple[float, float]:
    """MB of resident memory that a plain pass, and the product, need at most above the loaded model and the vectors."""
    model, ids = shape.model(), shape.ids()
    run, step = run_of(name, stream_of(model, shape)), partial(plain, model, ids)
    step()
    rest = resident("VmRSS")
    step()
    before = peak(step) - rest
    run()
    return before, peak(run) - rest


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts of the names, with commas")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--what", default="time,memory")
    parser.add_argument("--no-errors", action="store_true", help="do not compare with float64")
    parser.add_argument("--markdown", action="store_true", help="a section for RESULTS.md")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # in a fresh process
    return parser.parse_args()


def main() -> None:
    settings = arguments()
    if "OMP_WAIT_POLICY" not in os.environ:  # threads that spin while others hold their core inflate every time
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OMP_WAIT_POLICY": "passive"})
    warnings.filterwarnings("ignore")
    torch.set_num_threads(settings.threads)
    if settings.memory_of:
        print(json.dumps(peaks(settings.memory_of, SHAPE)))
        return
    parts = [part.strip() for part in settings.only.split(",")]
    names = [name for name in PRODUCTS if any(part in name for part in parts)]
    print(machine(settings.threads))
    if "time" in settings.what:
        title = f"{SHAPE}: {settings.repetitions} repetitions, ratios a vector"
        rows = time_table(names, SHAPE, settings.repetitions, check=not settings.no_errors)
        show(title, rows, markdown=settings.markdown)
    if "memory" in settings.what:
        show("Peak memory above that at rest", memory_table(names, settings.threads), markdown=settings.markdown)
    print(f"\nload after {', '.join(f'{x:.1f}' for x in os.getloadavg())}")


if __name__ == "__main__":
    main()
