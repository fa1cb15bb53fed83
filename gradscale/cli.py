"""The `gradscale` command: reads its arguments, calls the library, prints.

Exit code 0 only if all was measured; 1 if shards failed; 2 for bad input.
"""

from __future__ import annotations

import logging
import shutil
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from gradscale.cli_options import (
    AddressOption,
    CheckpointsOption,
    DataOption,
    GpusOption,
    MicrobatchOption,
    ModelOption,
    TaskOption,
    TaskOptionsOption,
    ThreadsOption,
    options_of,
    task_of,
)
from gradscale.cli_spectrum import EXAMPLE, spectrum
from gradscale.errors import GradscaleError, ShardsFailed

if TYPE_CHECKING:
    from rich.console import RenderableType

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Per-example gradients of transformers, measured at scale. Start with: gradscale measure --help",
)


@app.command(
    epilog="Example: gradscale measure --task digits --out runs/a --checkpoint runs/checkpoints-real --workers 2"
)
def measure(
    task: TaskOption,
    out: Annotated[str, typer.Option(help="The run directory: a new folder or URI, or a run to resume.")],
    data: DataOption = None,
    model: ModelOption = None,
    checkpoint: CheckpointsOption = None,
    measures: Annotated[
        str,
        typer.Option(
            help="NAME[:SETTING=VALUE...], separated by commas; your own as module:attribute or file.py:class."
        ),
    ] = "coherence,dispersion,gaussian_width",
    workers: Annotated[int, typer.Option(help="Ray actors.")] = 2,
    gpus_per_worker: GpusOption = 0,
    threads_per_worker: ThreadsOption = 1,
    shard_size: Annotated[int, typer.Option(help="Examples of one shard: the unit of commitment and retry.")] = 256,
    microbatch: MicrobatchOption = 32,
    sketch: Annotated[str | None, typer.Option(help="Store a sketch of every gradient: NAME:K or identity.")] = None,
    sketch_dtype: Annotated[str, typer.Option(help="What sketches are stored in: float32 or float16.")] = "float32",
    probe_products: Annotated[
        str, typer.Option(help="The pass that gives the width's products: backward, forward, or auto, the cheaper one.")
    ] = "auto",
    params: Annotated[str | None, typer.Option(help="Measure only parameters whose name matches this regex.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="A parameter, by name, that is not to be measured; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sketch.")] = 0,
    address: AddressOption = None,
    task_option: TaskOptionsOption = None,
) -> None:
    """Measure the per-example gradients of a task at every checkpoint. A run that exists is resumed."""
    from gradscale.measures.settings import parse_measures
    from gradscale.report.progress import shown_progress
    from gradscale.run.job import measure as run_measure

    options = options_of(data, model, task_option)
    with shown_progress() as on_progress:
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
            task_options=options,
            exclude=exclude or (),
            on_progress=on_progress,
            sketch_dtype=sketch_dtype,
            probe_products=probe_products,
        )
    typer.echo(f"{run.path}: {len(run.estimates())} estimates; see them with: gradscale show {out}")


app.command(epilog=EXAMPLE)(spectrum)


@app.command(epilog="Example: gradscale plan --task digits --workers 16 --steps 9 --sketch gaussian:512")
def plan(
    task: Annotated[str, typer.Option(help="A ready task or module:attribute.")],
    data: Annotated[str | None, typer.Option(help="As for measure.")] = None,
    model: Annotated[str | None, typer.Option(help="As for measure.")] = None,
    checkpoint: Annotated[list[str] | None, typer.Option(help="As for measure; the first one is loaded.")] = None,
    steps: Annotated[int, typer.Option(help="Checkpoints to measure, where none are given.")] = 1,
    measures: Annotated[str, typer.Option(help="As for measure.")] = "coherence,dispersion,gaussian_width",
    workers: Annotated[int, typer.Option(help="Workers to reckon with, each as fast as this process.")] = 2,
    gpus: Annotated[int, typer.Option(help="GPUs to reckon with: workers of one GPU each; measures on this one.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads of each worker.")] = 1,
    shard_size: Annotated[int, typer.Option(help="As for measure.")] = 256,
    microbatch: Annotated[int, typer.Option(help="As for measure.")] = 32,
    sketch: Annotated[str | None, typer.Option(help="As for measure.")] = None,
    sketch_dtype: Annotated[str, typer.Option(help="As for measure.")] = "float32",
    probe_products: Annotated[str, typer.Option(help="As for measure.")] = "auto",
    params: Annotated[str | None, typer.Option(help="As for measure.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="As for measure.")] = None,
    task_option: Annotated[list[str] | None, typer.Option(help="As for measure.")] = None,
) -> None:
    """Say which rule serves each parameter, and what a run will cost, from one microbatch measured here."""
    import torch

    from gradscale.checkpoints import resolve
    from gradscale.grads.coverage import describe
    from gradscale.measures.settings import parse_measures
    from gradscale.report.forecasts import coverage_lines, forecast_lines, pass_lines
    from gradscale.run.fold import statistics_of
    from gradscale.run.forecast import forecast
    from gradscale.run.passes import passes_of
    from gradscale.run.shard import bound, prepare
    from gradscale.sketches import parse_sketch

    torch.set_num_threads(threads)
    found = resolve(checkpoint)
    subject = prepare(
        task_of(task, data, model, task_option), found[0].path, params, "cuda" if gpus else "cpu", exclude or ()
    )
    for line in coverage_lines(describe(subject.sites, subject.parameters)):
        typer.echo(line)
    dense = parse_sketch(sketch, seed=0) if sketch else None
    count = len(found) if checkpoint else steps
    chosen = parse_measures(measures)
    statistics = statistics_of(chosen)
    cost = forecast(subject, statistics, dense, microbatch, count, sketch_dtype, probe_products, shard_size)
    for line in forecast_lines(cost, gpus or workers, shard_size):
        typer.echo(line)
    typer.echo(f"  probes  by the {cost.probe_products.way} pass: {cost.probe_products.why}")
    forward = cost.probe_products.way == "forward"
    for line in pass_lines(passes_of(subject, chosen, microbatch, bound(dense, subject), forward)):
        typer.echo(line)


@app.command(epilog="Example: gradscale check --task causal-lm --model DIR --data text.jsonl --examples 8")
def check(
    task: Annotated[str, typer.Option(help="A ready task or module:attribute.")],
    data: Annotated[str | None, typer.Option(help="As for measure.")] = None,
    model: Annotated[str | None, typer.Option(help="As for measure.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="A checkpoint.")] = None,
    examples: Annotated[int, typer.Option(help="The first so many, each alone and within a batch of them all.")] = 8,
    params: Annotated[str | None, typer.Option(help="As for measure.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="As for measure.")] = None,
    task_option: Annotated[list[str] | None, typer.Option(help="As for measure.")] = None,
) -> None:
    """Check that padding and batch-mates change no example's gradient, and that the hooks see what autograd does."""
    from gradscale.checkpoints import resolve
    from gradscale.run.check import check_subject, compare_alone
    from gradscale.run.shard import prepare

    path = resolve([checkpoint] if checkpoint else None)[0].path
    subject = prepare(task_of(task, data, model, task_option), path, params, "cpu", exclude or ())
    check_subject(subject)
    compared = compare_alone(subject, range(min(examples, len(subject.examples))))
    for one in compared:
        verdict = "agrees" if one.agrees else f"DIFFERS, most in {one.worst}"
        typer.echo(f"example {one.example_id}: relative difference {one.difference:.1e} of {one.allowed:.1e} {verdict}")
    if not all(one.agrees for one in compared):
        raise GradscaleError("an example must have the same gradient alone as within a batch; see the lines above")


@app.command(epilog="Example: gradscale show runs/a --measure coherence")
def show(
    run: Annotated[str, typer.Argument(help="A run directory.")],
    measure: Annotated[str | None, typer.Option(help="One measure, per layer and class too.")] = None,
) -> None:
    """Print a run's estimates with their standard errors."""
    from gradscale.report.tables import estimate_tables
    from gradscale.store.results import open_run

    _print(*estimate_tables(open_run(run), measure, width=_width()))


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


@app.command(
    epilog="Examples: gradscale measures; gradscale measures coherence; gradscale measures mine.py:Mine --laws"
)
def measures(
    measure: Annotated[
        str | None, typer.Argument(help="One measure, in full: a name, module:attribute or file.py:class.")
    ] = None,
    laws: Annotated[bool, typer.Option(help="Hold it to the laws that every measure has to obey.")] = False,
) -> None:
    """List the measures with definition, cost and source, and what is worked out from a run that is there."""
    from gradscale.report.listing import function_table, measure_details, measure_table

    if measure is None:
        _print(measure_table(), function_table())
        return
    from gradscale.measures.settings import find_measure, parse_measures
    from gradscale.run.check_measure import check_measure

    _print(*measure_details(find_measure(measure)[0]))
    if laws:
        for each in parse_measures(measure):
            typer.echo(f"{each.name} obeys the laws of {', '.join(check_measure(each))}")


def main() -> None:
    sys.path.insert(0, "")  # a task or measure in the current folder can be named
    log = logging.getLogger("gradscale")
    log.setLevel(logging.INFO)
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
    try:
        app()
    except GradscaleError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)
    except ShardsFailed as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(1)


def _width() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 120


def _print(*parts: RenderableType) -> None:
    from rich.console import Console

    console = Console(width=_width())
    for part in parts:
        console.print(part)
