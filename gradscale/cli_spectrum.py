"""`gradscale spectrum`: reads its arguments, calls the library, prints."""

from __future__ import annotations

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
)
from gradscale.errors import GradscaleError

if TYPE_CHECKING:
    from gradscale.run.spectrum_plan import SLQ, Deflated, Hutchinson, Norms, Stability

EXAMPLE = "Example: gradscale spectrum --task digits --out runs/s --top 5 --trace --density --examples 512 --workers 2"


def spectrum(
    task: TaskOption,
    out: Annotated[str, typer.Option(help="The run directory: a new folder or URI, or a spectrum run to resume.")],
    data: DataOption = None,
    model: ModelOption = None,
    checkpoint: CheckpointsOption = None,
    operator: Annotated[
        str, typer.Option(help="hessian of the mean loss, its Gauss-Newton part ggn, or the gradients' covariance.")
    ] = "hessian",
    top: Annotated[
        int | None, typer.Option(help="Eigenvalues, by Lanczos on a gang of workers; 1 if nothing else is asked for.")
    ] = None,
    which: Annotated[str, typer.Option(help="Their end: largest, both, or magnitude.")] = "largest",
    tolerance: Annotated[float, typer.Option(help="Of an eigenvalue, relative.")] = 1e-6,
    max_steps: Annotated[int, typer.Option(help="Of Lanczos, one product each, at most.")] = 300,
    basis_cap: Annotated[
        int | None, typer.Option(help="Vectors that Lanczos holds; the default is 20, or 2 top + 4.")
    ] = None,
    vectors: Annotated[str, typer.Option(help="What vectors are held in: float32 or float64.")] = "float32",
    trace: Annotated[bool, typer.Option("--trace", help="The trace, also by parameter, by random probes.")] = False,
    trace_stderr: Annotated[
        float | None, typer.Option(help="Take probes until the trace's standard error is that share of it; 0.02.")
    ] = None,
    trace_probes: Annotated[int | None, typer.Option(help="Probes of the trace at most, 96 by default.")] = None,
    trace_method: Annotated[
        str, typer.Option(help="hutchinson, as shard jobs; or hutch++, xtrace, xnystrace on the gang.")
    ] = "hutchinson",
    norms: Annotated[int, typer.Option(help="Probes of |A|_F and E|Ag|; 0 for none.")] = 0,
    density: Annotated[
        bool, typer.Option("--density", help="The spectral density, by stochastic Lanczos quadrature.")
    ] = False,
    density_probes: Annotated[int | None, typer.Option(help="Probes of the density, 8 by default.")] = None,
    density_steps: Annotated[int | None, typer.Option(help="Nodes of each probe, 50 by default.")] = None,
    shift: Annotated[
        float | None,
        typer.Option(help="With --density: log det (A + shift I) and effective dimension; A + shift I positive."),
    ] = None,
    edge: Annotated[float | None, typer.Option(help="With --density: how many eigenvalues lie above it.")] = None,
    eta: Annotated[
        float | None, typer.Option(help="A learning rate: report whether SGD with it stays; with --batch-size.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="SGD's, with --eta.")] = None,
    momentum: Annotated[float | None, typer.Option(help="SGD's, with --eta; 0 by default.")] = None,
    backend: Annotated[
        str,
        typer.Option(help="Hessian products: double_backward, forward_over_backward, finite_differences, or auto."),
    ] = "auto",
    examples: Annotated[int | None, typer.Option(help="Only the first so many of the dataset.")] = None,
    workers: Annotated[int, typer.Option(help="Processes; each holds its part of every vector.")] = 2,
    gpus_per_worker: GpusOption = 0,
    threads_per_worker: ThreadsOption = 1,
    microbatch: MicrobatchOption = 32,
    shard_size: Annotated[int, typer.Option(help="Examples of one unit of the trace.")] = 256,
    params: Annotated[str | None, typer.Option(help="Only parameters whose name matches this regex: a block.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="A parameter that is left out; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Of the probes.")] = 0,
    commit_seconds: Annotated[float, typer.Option(help="Between commits of Lanczos.")] = 60.0,
    address: AddressOption = None,
    task_option: TaskOptionsOption = None,
) -> None:
    """Eigenvalues, traces and spectral density of curvature at every checkpoint. A run that exists is resumed."""
    from gradscale.report.progress import shown_spectrum_progress
    from gradscale.report.shortfalls import shortfalls
    from gradscale.run.spectrum import spectrum as run_spectrum

    with shown_spectrum_progress() as on_progress:
        run = run_spectrum(
            task,
            out,
            operator=operator,
            top=top if top is not None else int(eta is not None or not (trace or density or norms)),
            trace=_trace(trace, trace_method, trace_stderr, trace_probes),
            density=_density(density, density_probes, density_steps, shift, edge),
            norms=_norms(norms),
            stability=_stability(eta, batch_size, momentum),
            checkpoints=checkpoint,
            workers=workers,
            seed=seed,
            which=which,
            tolerance=tolerance,
            max_steps=max_steps,
            basis_cap=basis_cap,
            vectors=vectors,
            backend=backend,
            examples=examples,
            microbatch=microbatch,
            shard_size=shard_size,
            params=params,
            exclude=exclude or (),
            gpus_per_worker=gpus_per_worker,
            threads_per_worker=threads_per_worker,
            address=address,
            task_options=options_of(data, model, task_option),
            commit_seconds=commit_seconds,
            on_progress=on_progress,
        )
    for short in shortfalls(run):
        typer.echo(f"note: {short}", err=True)
    typer.echo(f"{run.path}: {len(run.estimates())} estimates; see them with: gradscale show {out}")


def _trace(asked: bool, method: str, stderr: float | None, probes: int | None) -> bool | Hutchinson | Deflated:
    from gradscale.run.spectrum_plan import Deflated, Hutchinson

    if not asked:
        if (stderr, probes, method) != (None, None, Hutchinson.method):
            raise GradscaleError("options of the trace must come with --trace, got none; add it")
        return False
    if method != Hutchinson.method:
        if stderr is not None:
            raise GradscaleError(
                f"trace_stderr must come with the method hutchinson, got {method}; give --trace-probes, its products"
            )
        return Deflated(method, Deflated.products if probes is None else probes)
    most = Hutchinson.max_probes if probes is None else probes
    least = min(Hutchinson.min_probes, max(1, most))
    return Hutchinson(most, Hutchinson.relative if stderr is None else stderr, min_probes=least)


def _density(asked: bool, probes: int | None, steps: int | None, shift: float | None, edge: float | None) -> bool | SLQ:
    from gradscale.run.spectrum_plan import SLQ

    given = {"density_probes": probes, "density_steps": steps, "shift": shift, "edge": edge}
    alone = [name for name, value in given.items() if value is not None]
    if asked:
        nodes = SLQ.steps if steps is None else steps
        return SLQ(SLQ.num_probes if probes is None else probes, nodes, shift=shift, edge=edge)
    if alone:
        raise GradscaleError(f"{' and '.join(alone)} must come with --density, got none; add it")
    return False


def _norms(probes: int) -> bool | Norms:
    from gradscale.run.spectrum_plan import Norms

    if probes < 0:
        raise GradscaleError(f"norms must be a number of probes, or 0 for none, got {probes}")

    return Norms(probes) if probes else False


def _stability(eta: float | None, batch_size: int | None, momentum: float | None) -> Stability | None:
    from gradscale.run.spectrum_plan import Stability

    if eta is not None and batch_size is not None:
        return Stability(eta, batch_size, Stability.momentum if momentum is None else momentum)
    if (eta, batch_size, momentum) == (None, None, None):
        return None
    given = {"--eta": eta, "--batch-size": batch_size}
    lacking = " and ".join(name for name, value in given.items() if value is None)
    raise GradscaleError(f"stability must have --eta and --batch-size, got no {lacking}; add it")
