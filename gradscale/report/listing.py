"""What can be measured, as tables: the measures, and the functions of runs and tasks; read off their own docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

import gradscale
from gradscale.measures import MEASURES
from gradscale.measures.settings import settings_taken

_GIVEN = {"Run", "Task"}  # of the first argument of a function that is listed


class About(NamedTuple):
    """What is said of something that can be measured; parts that are not said are empty."""

    name: str
    definition: str
    cost: str
    source: str


def about_measures() -> list[About]:
    return [about_measure(name, kind.summary) for name, kind in MEASURES.items()]


def about_measure(name: str, summary: str) -> About:
    """From a summary `definition; cost; source`."""
    *definition, cost, source = ["", *summary.rsplit("; ", 2)] if summary.count("; ") >= 2 else [summary, "", ""]
    return About(name, "".join(definition), cost, source)


def about_functions() -> list[About]:
    """The first sentence of each docstring, its `Cost:` and its `Source:`."""
    return [
        About(f"gs.{name}", _first_sentence(text), entry(text, "Cost"), entry(text, "Source"))
        for name, function in functions().items()
        for text in [inspect.getdoc(function) or ""]
    ]


def functions() -> Mapping[str, Callable[..., Any]]:
    """The public functions that are given a run or a task, but for those that make a run."""
    public = {name: getattr(gradscale, name) for name in gradscale.__all__}
    return {name: found for name, found in public.items() if inspect.isfunction(found) and _is_given_one(found)}


def entry(text: str, name: str) -> str:
    """The sentence that `name:` begins in a docstring, on one line; empty if there is none.

    >>> entry("First. Cost: n^2\\noperations. More. Source: Fort (2019), eq. 2: theirs.", "Cost")
    'n^2 operations'
    """
    found = re.search(rf"\b{name}: (.+?)(?=\n\n|\s(?:Cost|Raises|Source): |\Z)", text, re.DOTALL)
    said = " ".join(found[1].split()) if found else ""
    return (said if name == "Source" else said.partition(". ")[0]).rstrip(".")


def measure_table() -> Table:
    return _table("measures, by gradscale measure --measures NAME", "measure", about_measures())


def function_table() -> Table:
    return _table("functions of a run or a task, in Python (import gradscale as gs)", "function", about_functions())


def measure_details(kind: Any) -> Sequence[RenderableType]:
    """A measure in full: its summary, its settings with their defaults, and its docstring."""
    about = about_measure(str(getattr(kind, "name", kind)), str(getattr(kind, "summary", "")))
    settings = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("setting", "default", "meaning"):
        settings.add_column(column)
    for setting in settings_taken(kind):
        settings.add_row(*(Text(part) for part in setting))
    parts = [Text(f"{name}: {value}") for name, value in zip(about._fields, about, strict=True) if value]
    described = Text(f"\n{inspect.getdoc(kind) or ''}")
    return [*parts, *([settings] if settings.row_count else []), described]


def _is_given_one(function: Callable[..., Any]) -> bool:
    signature = inspect.signature(function)
    first = next(iter(signature.parameters.values()), None)
    given = set(re.findall(r"\w+", str(first.annotation))) if first is not None else set()
    return bool(given & _GIVEN) and "Run" not in re.findall(r"\w+", str(signature.return_annotation))


def _first_sentence(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split()).partition(". ")[0].rstrip(".")


def _table(title: str, kind: str, listed: Sequence[About]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_lines=False)
    table.add_column(kind, no_wrap=True)
    for column, ratio in (("definition", 5), ("cost", 3), ("source", 4)):
        table.add_column(column, ratio=ratio)
    for about in listed:
        table.add_row(*(Text(part) for part in about))
    return table
