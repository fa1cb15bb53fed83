"""Options that several commands take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradscale.errors import GradscaleError

if TYPE_CHECKING:
    from gradscale.task import Task

TaskOption = Annotated[str, typer.Option(help="A ready task (see `gradscale tasks`) or module:attribute.")]
DataOption = Annotated[str | None, typer.Option(help="The task's data: files, a folder or a glob; or a name.")]
ModelOption = Annotated[str | None, typer.Option(help="A transformers model folder, or a config for random weights.")]
CheckpointsOption = Annotated[
    list[str] | None, typer.Option(help="A checkpoint, a glob, or a folder of checkpoints; may be repeated.")
]
GpusOption = Annotated[float, typer.Option(help="GPUs of each worker; 0 measures on the CPU.")]
ThreadsOption = Annotated[int, typer.Option(help="CPU threads of each worker.")]
MicrobatchOption = Annotated[int, typer.Option(help="Examples of one forward and backward pass.")]
AddressOption = Annotated[str | None, typer.Option(help="A running Ray cluster; the default starts one here.")]
TaskOptionsOption = Annotated[list[str] | None, typer.Option(help="NAME=VALUE, passed to the task; may be repeated.")]


def task_of(task: str, data: str | None, model: str | None, task_option: list[str] | None) -> Task:
    from gradscale.task import load_task

    return load_task(task, **options_of(data, model, task_option))


def options_of(data: str | None, model: str | None, task_option: list[str] | None) -> dict[str, Any]:
    options = {"data": data, "model_dir": model, **dict(_option(text) for text in task_option or [])}
    return {name: value for name, value in options.items() if value is not None}


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
