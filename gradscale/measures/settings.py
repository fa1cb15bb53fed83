"""Measures from text, their settings as plain values, and what the settings mean."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gradscale.errors import GradscaleError
from gradscale.measures import MEASURES
from gradscale.measures.measure import Measure
from gradscale.task import import_attribute

_MEANINGS = {
    "adaptive": "noise, steps and balls are scaled entry by entry by the weights",
    "alignment": "also the kernel's alignment with the targets",
    "batch_size": "also the variance of the mean gradient of a batch of so many examples",
    "by_class": "also by class, for which the task must have labels",
    "centred": "alignment of the centred kernel and targets",
    "epsilon": "radius of the ball around the weights",
    "frobenius": "also the Frobenius norm, for which the products with every probe are kept",
    "min_norm": "also of the examples alone whose gradient norm is above it",
    "norm": "of the ball: l2 or linf",
    "num_draws": "how many draws of the noise",
    "num_probes": "how many random probes",
    "num_steps": "how many steps of gradient ascent",
    "probes": "of which random numbers: rademacher or gaussian",
    "rho": "length of the step along the gradient of a microbatch",
    "seed": "of the random numbers",
    "sigma": "standard deviation of the noise",
}


class Setting(NamedTuple):
    """One setting of a measure, as `--measures name:setting=value` takes it."""

    name: str
    default: str  # as JSON; empty if it must be given
    meaning: str  # empty if nothing is said of it


def settings_taken(kind: type) -> tuple[Setting, ...]:
    """The settings of a measure's class; their meaning is that in `field(metadata={"meaning": ...})`, or by name."""
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return tuple(
        Setting(
            field.name,
            "" if field.default is dataclasses.MISSING else json.dumps(field.default, default=str),
            str(field.metadata.get("meaning", _MEANINGS.get(field.name, ""))),
        )
        for field in fields
        if field.init
    )


def check_measures(measures: Sequence[Measure]) -> tuple[Measure, ...]:
    """Raises: GradscaleError if something is not a measure, or two have the same name."""
    for measure in measures:
        if isinstance(measure, type) or not isinstance(measure, Measure):
            raise GradscaleError(
                f"measures must be instances such as Coherence(), got {measure!r}; see `gradscale measures`"
            )
    names = [measure.name for measure in measures]
    if len(set(names)) != len(names):
        raise GradscaleError(f"measures must have different names, got {', '.join(names)}")
    return tuple(measures)


def parse_measures(text: str) -> tuple[Measure, ...]:
    """Measures from `a,b:setting=value:setting=value`; a name is a ready one or module:attribute.

    Raises: GradscaleError if there is no such measure or setting.
    """
    return check_measures([_parse_measure(part.strip()) for part in text.split(",") if part.strip()])


def settings_of(measure: Measure) -> dict[str, Any]:
    """The class and fields of a measure as JSON values, for run.json."""
    kind = type(measure)
    return {"class": f"{kind.__module__}:{kind.__qualname__}", **plain_fields(measure)}


def plain_fields(settings: object) -> dict[str, Any]:
    """A dataclass's fields as JSON values; empty for anything else."""
    fields = dataclasses.fields(settings) if dataclasses.is_dataclass(settings) else ()
    return json_values({field.name: getattr(settings, field.name) for field in fields})


def json_values(values: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(dict(values), default=str))
    return plain


def find_measure(text: str) -> tuple[type[Measure], list[str]]:
    """The class that the head of `text` names, a ready one, module:attribute or file.py:attribute; and what follows it.

    Raises: GradscaleError if there is none.
    """
    head, *rest = text.split(":")
    if head in MEASURES:
        return MEASURES[head], rest
    if not rest:
        raise GradscaleError(
            f"measure must be one of {', '.join(MEASURES)}, module:attribute or file.py:attribute, got {text!r}; see "
            "`gradscale measures`"
        )
    module = _module_of_file(Path(head)) if head.endswith(".py") else head
    kind: type[Measure] = import_attribute(f"{module}:{rest[0]}", "measure")
    return kind, rest[1:]


def _parse_measure(text: str) -> Measure:
    kind, settings = find_measure(text)
    if not callable(kind):
        raise GradscaleError(f"measure {text} must be a class or make a measure when called, got {kind!r}")
    try:
        made: Measure = kind(**dict(_setting(setting) for setting in settings))
    except TypeError as error:
        raise GradscaleError(f"measure {text.partition(':')[0]} could not be made from {text!r}: {error}") from error
    return made


def _module_of_file(path: Path) -> str:
    """Make the file importable, by workers too, which are given sys.path; its module's name.

    Raises: GradscaleError if there is no such file, or another module has its name.
    """
    if not path.is_file():
        raise GradscaleError(f"measure file must exist, got {path}; relative paths start at the working directory")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        found = importlib.import_module(path.stem).__file__
    except ModuleNotFoundError as error:
        raise GradscaleError(f"measure file {path} must import what is installed, got {error}; install it") from error
    if found is None or Path(found).resolve() != path.resolve():
        raise GradscaleError(
            f"measure file must have a name that no other module has, got {path} beside {found}; rename it"
        )
    return path.stem


def _setting(text: str) -> tuple[str, Any]:
    """`name=value` with a JSON value, or `name` for true."""
    name, equals, value = text.partition("=")
    try:
        return name, json.loads(value) if equals else True
    except json.JSONDecodeError:
        return name, value
