"""Options that several commands take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradscale.errors import GradscaleError

if TYPE_CHECKING:
    from gradscale.task import Task


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
