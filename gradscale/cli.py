"""The `gradscale` command: reads its arguments, calls the library, prints.

Exit code 0 only if all was measured; 1 if shards failed; 2 for bad input.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from gradscale.errors import GradscaleError, ShardsFailed

if TYPE_CHECKING:
    from gradscale.run.job import Progress

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Per-example gradients of transformers, measured at scale. Start with: gradscale measure --help",
)
_PLAIN_SECONDS = 5.0  # between progress lines where there is no terminal


@app.command(
    epilog="Example: gradscale measure --task digits --out runs/a --checkpoint runs/checkpoints-real --workers 2"
)
def measure(
    task: Annotated[str, typer.Option(help="A ready task (see `gradscale tasks`) or module:attribute.")],
    out: Annotated[str, typer.Option(help="The run directory: a new folder or URI, or a run to resume.")],
    data: Annotated[str | None, typer.Option(help="The task's data: files, a folder or a glob; or a name.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A transformers model folder, or a config for random weights.")
    ] = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option(help="A checkpoint, a glob, or a folder of checkpoints; may be repeated.")
    ] = None,
    measures: Annotated[
        str, typer.Option(help="NAME[:SETTING=VALUE...], separated by commas; or module:attribute.")
    ] = "coherence,dispersion,gaussian_width",
    workers: Annotated[int, typer.Option(help="Ray actors.")] = 2,
    gpus_per_worker: Annotated[float, typer.Option(help="GPUs of each worker; 0 measures on the CPU.")] = 0,
    threads_per_worker: Annotated[int, typer.Option(help="CPU threads of each worker.")] = 1,
    shard_size: Annotated[int, typer.Option(help="Examples of one shard: the unit of commitment and retry.")] = 256,
    microbatch: Annotated[int, typer.Option(help="Examples of one forward and backward pass.")] = 32,
    sketch: Annotated[str | None, typer.Option(help="Store a sketch of every gradient: NAME:K.")] = None,
    params: Annotated[str | None, typer.Option(help="Measure only parameters whose name matches this regex.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sketch.")] = 0,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; the default starts one here.")] = None,
    task_option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, passed to the task; may be repeated.")
    ] = None,
) -> None:
    """Measure the per-example gradients of a task at every checkpoint. A run that exists is resumed."""
    from gradscale.measures.settings import parse_measures
    from gradscale.run.job import measure as run_measure

    sys.path.insert(0, "")  # a task in the current folder can be named
    options = {"data": data, "model_dir": model, **dict(_option(text) for text in task_option or [])}
    with _progress() as on_progress:
        run = run_measure(
            task,
            out,
            measures=parse_measures(measures),
            checkpoints=checkpoint,
            workers=workers,
            microbatch=microbatch,
            shard_size=shard_size,
            sketch=sketch,
            params=params,
            seed=seed,
            gpus_per_worker=gpus_per_worker,
            threads_per_worker=threads_per_worker,
            address=address,
            task_options={name: value for name, value in options.items() if value is not None},
            on_progress=on_progress,
        )
    typer.echo(f"{run.path}: {len(run.estimates())} estimates; see them with: gradscale show {out}")


@app.command(epilog="Example: gradscale show runs/a --measure coherence")
def show(
    run: Annotated[str, typer.Argument(help="A run directory.")],
    measure: Annotated[str | None, typer.Option(help="One measure, per layer and class too.")] = None,
) -> None:
    """Print a run's estimates with their standard errors."""
    from rich.console import Console

    from gradscale.report.tables import estimate_tables
    from gradscale.store.results import open_run

    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in estimate_tables(open_run(run), measure):
        console.print(table)


@app.command(epilog="Example: gradscale report runs/demo-real runs/demo-random --output runs/demo.html")
def report(
    run: Annotated[list[str], typer.Argument(help="Run directories, shown side by side.")],
    output: Annotated[str | None, typer.Option(help="The HTML file; the default is report.html in the run.")] = None,
) -> None:
    """Write one self-contained HTML page with the curves and tables of one run or several."""
    from gradscale.report.html import write_report
    from gradscale.store.results import open_run

    runs = [open_run(path) for path in run]
    if output is None and "://" in runs[0].path:
        raise GradscaleError(f"report of a run at a URI needs --output FILE, got none for {runs[0].path}")
    typer.echo(f"wrote {write_report(runs, output or f'{runs[0].path}/report.html')}")


@app.command(epilog="Example: gradscale tasks")
def tasks() -> None:
    """List the ready tasks."""
    from gradscale.tasks import READY

    for name, ready in READY.items():
        typer.echo(f"{name:16} {ready.summary}")


@app.command(epilog="Example: gradscale measures")
def measures() -> None:
    """List the measures with what they are, what they cost and where they come from."""
    from gradscale.measures import MEASURES

    for name, kind in MEASURES.items():
        typer.echo(f"{name:16} {kind.summary}")


def main() -> None:
    try:
        app()
    except GradscaleError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)
    except ShardsFailed as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(1)


def _option(text: str) -> tuple[str, str | int | float]:
    name, equals, value = text.partition("=")
    if not equals:
        raise GradscaleError(f"task option must be NAME=VALUE, got {text!r}")
    for number in (int, float):
        try:
            return name, number(value)
        except ValueError:
            continue
    return name, value


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """Shows examples done, examples a second and time left: a bar on a terminal, else a line now and then."""
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
