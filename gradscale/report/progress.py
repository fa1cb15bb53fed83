"""How far a run is, as the terminal shows it: examples done, examples a second and time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from gradscale.run.job import Progress
    from gradscale.run.spectrum_parts import SpectrumProgress

_PLAIN_SECONDS = 5.0  # between lines where there is no terminal
_CLEAR = "\r\x1b[2K"  # the line


@contextmanager
def shown_progress() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        yield _plain_progress()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Bar(*columns, TimeElapsedColumn()) as bar:
        shown = bar.add_task("measuring", total=None, rate="starting")
        yield lambda p: bar.update(shown, completed=p.done, total=p.total, rate=_rate(p))


def _plain_progress() -> Callable[[Progress], None]:
    last = -_PLAIN_SECONDS

    def tell(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= _PLAIN_SECONDS or progress.done == progress.total:
            last = time.monotonic()
            typer.echo(f"measuring {progress.done}/{progress.total} examples, {_rate(progress)}", err=True)

    return tell


@contextmanager
def shown_spectrum_progress() -> Iterator[Callable[[SpectrumProgress], None]]:
    """A line on a terminal that is written anew, else a line now and then."""
    last, at, terminal = -_PLAIN_SECONDS, "", sys.stderr.isatty()

    def tell(progress: SpectrumProgress) -> None:
        nonlocal last, at
        part = f"{progress.step}/{progress.part}"
        due = progress.done >= progress.total or part != at
        if terminal or due or time.monotonic() - last >= _PLAIN_SECONDS:
            last, at = time.monotonic(), part
            typer.echo(f"{_CLEAR if terminal else ''}{_spectrum_line(progress)}", err=True, nl=not terminal)

    try:
        yield tell
    finally:
        if terminal:
            typer.echo("", err=True)


def _spectrum_line(progress: SpectrumProgress) -> str:
    left = progress.seconds_left
    time_left = "starting" if left is None else f"at most {_clock(left)} left"
    note = f", {progress.note}" if progress.note else ""
    at = f"step {progress.step}: {progress.part}"
    if progress.total <= 1 and not progress.done:
        return f"{at}, under way{note}"
    return f"{at}, {progress.done} of {progress.total} products, {time_left}{note}"


def _rate(progress: Progress) -> str:
    if progress.seconds_left is None:
        return "starting"
    return f"{progress.rate:.0f} examples/s, {_clock(progress.seconds_left)} left"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
