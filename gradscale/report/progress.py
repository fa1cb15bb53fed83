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

_PLAIN_SECONDS = 5.0  # between lines where there is no terminal


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


def _rate(progress: Progress) -> str:
    if progress.seconds_left is None:
        return "starting"
    minutes, seconds = divmod(round(progress.seconds_left), 60)
    return f"{progress.rate:.0f} examples/s, {minutes}:{seconds:02d} left"
