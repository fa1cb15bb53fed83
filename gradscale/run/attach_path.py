"""Every optimizer step's length, learning rates, loss and time, measured step or not: path.parquet of the run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.run.attach_masters import Piece, pieces, sq_distance
from gradscale.run.attach_setup import Setup
from gradscale.run.attach_together import rank, together
from gradscale.run.attach_wrap import Method, replaced
from gradscale.store.files import Files
from gradscale.store.training_path import PathRow, PathTable

Failed = Callable[[int, Exception], None]  # is told the step and what failed in it


class Before(NamedTuple):
    """What is to be known of a step before the optimizer makes it."""

    step: int
    learning_rates: tuple[float, ...]
    skipped: int  # steps so far
    weights: list[Piece] | None  # copies; None: they could not be read


class Sums(NamedTuple):
    """Of one rank, then of all. float64."""

    measured: float  # |delta w|^2 over the measured parameters
    trained: float  # over all that are trained
    loss: float
    microbatches: float  # whose loss was seen
    failures: float


@contextmanager
def recorded(setup: Setup, files: Files, path: bool, failed: Failed, strict: bool) -> Iterator[None]:
    """With a row in `files`' path.parquet for every optimizer step of the engine, if `path`.

    The rows of an earlier training from engine.global_steps on are dropped, also without `path`: their steps are made
    anew. The file is whole before every engine.save_checkpoint, so that a training that goes on from there lacks no
    step; in between it is written now and then, and a killed process may leave out the last rows.

    |delta w| is that of what the optimizer moves, the float32 masters where there are any; the loss is what goes
    backward, and what is read changes no bit of the training. Cost of a step: a copy of the masters here, P / W
    numbers, which lives only as long as engine.step; twice reading them; and one sum over ranks of five numbers. A
    failure leaves NaN in the row, and is told on all ranks alike.
    Raises: GradscaleError on all ranks, for masters that are not in memory, or a damaged file; with `strict` what
    fails, after the step.
    """
    engine = setup.engine
    table = together(lambda: None if rank() else PathTable(files, int(engine.global_steps)))
    if not path:
        yield
        return
    together(lambda: pieces(engine))
    recorder = PathRecorder(setup, table, failed, strict)
    with (
        replaced(engine, "backward", recorder.backward),
        replaced(engine, "step", recorder.step),
        replaced(engine, "save_checkpoint", recorder.save_checkpoint),
    ):
        try:
            yield
        except BaseException:
            with suppress(Exception):
                recorder.flush()
            raise
    recorder.close()


class PathRecorder:
    """What is gathered for the row of the step under way. Only the first rank has a table."""

    def __init__(self, setup: Setup, table: PathTable | None, failed: Failed, strict: bool) -> None:
        self._setup, self._table, self._failed, self._strict = setup, table, failed, strict
        self._problem: Exception | None = None
        self._ended = time.perf_counter()
        self._loss = torch.zeros((), dtype=torch.float64, device=setup.device)
        self._microbatches = 0

    def backward(self, original: Method) -> Method:
        def backward(loss: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(loss, *args, **kwargs)
            by_gas = args[1] if len(args) > 1 else kwargs.get("scale_wrt_gas", True)
            self._saw(loss, int(self._setup.engine.gradient_accumulation_steps()) if by_gas else 1)
            return result

        return backward

    def step(self, original: Method) -> Method:
        def step(*args: Any, **kwargs: Any) -> Any:
            if not self._setup.engine.is_gradient_accumulation_boundary():
                return original(*args, **kwargs)
            before = self._before()
            result = original(*args, **kwargs)
            self._after(before)
            return result

        return step

    def save_checkpoint(self, original: Method) -> Method:
        def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
            with self._kept():
                self.flush()
            return original(*args, **kwargs)

        return save_checkpoint

    def flush(self) -> None:
        if self._table is not None:
            self._table.flush()

    def close(self) -> None:
        """No collective. Raises: on the first rank, if the file cannot be written and with `strict`."""
        try:
            self.flush()
        except Exception as problem:
            self._failed(int(self._setup.engine.global_steps), problem)
            if self._strict:
                raise

    def _saw(self, loss: Any, microbatches: int) -> None:
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._loss += loss.detach().double().reshape(()) / microbatches
            self._microbatches += 1

    def _before(self) -> Before:
        engine = self._setup.engine
        rates, weights = tuple[float, ...](), None
        with self._kept():
            rates = tuple(float(rate) for rate in engine.get_lr())
            weights = [Piece(name, values.clone()) for name, values in pieces(engine)]
        return Before(int(engine.global_steps), rates, int(engine.skipped_steps), weights)

    def _after(self, before: Before) -> None:
        """The row of the step. Every rank comes here, and goes on as the others do."""
        lengths = (math.nan, math.nan)
        if before.weights is not None:
            with self._kept():
                lengths = self._sq_lengths(before.weights)
        own, self._problem = self._problem, None
        total = self._summed(lengths, failures=float(own is not None))
        with self._kept():
            self._add(before, total)
        self._loss.zero_()
        self._microbatches, self._ended = 0, time.perf_counter()
        if total.failures:
            count = f"{total.failures:.0f} of {self._setup.ranks}"
            problem = own or GradscaleError(f"all ranks must succeed, got a failure on {count}; the others know why")
            self._failed(before.step, problem)
            if self._strict:
                raise problem

    def _sq_lengths(self, before: list[Piece]) -> tuple[float, float]:
        """|delta w|^2 of this rank's entries, of the measured parameters and of all."""
        device = self._setup.device
        measured = torch.zeros((), dtype=torch.float64, device=device)
        trained = torch.zeros((), dtype=torch.float64, device=device)
        for (name, old), (_, new) in zip(before, pieces(self._setup.engine), strict=True):
            square = sq_distance(old, new).to(device)
            trained += square
            if name in self._setup.parameters:
                measured += square
        return float(measured), float(trained)

    def _summed(self, lengths: tuple[float, float], failures: float) -> Sums:
        """Over all ranks; the sums of the lengths are NaN if one of them is. A collective."""
        own = torch.tensor([*lengths, 0.0, float(self._microbatches), failures], dtype=torch.float64)
        own = own.to(self._setup.device)
        own[2] = self._loss
        if dist.is_initialized():
            dist.all_reduce(own)
        return Sums(*own.tolist())

    def _add(self, before: Before, total: Sums) -> None:
        if self._table is None:
            return
        engine, ranks = self._setup.engine, self._setup.ranks
        seen = total.microbatches == ranks * int(engine.gradient_accumulation_steps())
        norm = engine.get_global_grad_norm()
        row = PathRow(
            before.step,
            math.sqrt(total.measured),
            math.sqrt(total.trained),
            int(engine.skipped_steps) > before.skipped,
            before.learning_rates,
            None if norm is None else float(norm),
            total.loss / ranks if seen else math.nan,
            time.perf_counter() - self._ended,
        )
        self._table.add(row)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """What fails is kept, to be told when all ranks have come to the end of a step."""
        try:
            yield
        except Exception as problem:
            self._problem = self._problem or problem
