"""Measures from text, and their settings as plain values."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from gradscale.errors import GradscaleError
from gradscale.measures import MEASURES
from gradscale.measures.measure import Measure
from gradscale.task import import_attribute


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


def _parse_measure(text: str) -> Measure:
    head, *rest = text.split(":")
    if head in MEASURES:
        kind, settings = MEASURES[head], rest
    elif rest:
        kind, settings = import_attribute(f"{head}:{rest[0]}", "measure"), rest[1:]
    else:
        raise GradscaleError(
            f"measure must be one of {', '.join(MEASURES)} or module:attribute, got {text!r}; see `gradscale measures`"
        )
    try:
        made: Measure = kind(**dict(_setting(setting) for setting in settings))
    except TypeError as error:
        raise GradscaleError(f"measure {head} could not be made from {text!r}: {error}") from error
    return made


def _setting(text: str) -> tuple[str, Any]:
    """`name=value` with a JSON value, or `name` for true."""
    name, equals, value = text.partition("=")
    try:
        return name, json.loads(value) if equals else True
    except json.JSONDecodeError:
        return name, value
