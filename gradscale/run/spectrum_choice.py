"""The way of Hessian products that was settled on, as it is kept in a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradscale.curvature.backends import (
    DOUBLE_BACKWARD,
    FORWARD_OVER_BACKWARD,
    GAUSS_NEWTON,
    Choice,
    FiniteDifferences,
)

_EXACT = {way.name: way for way in (DOUBLE_BACKWARD, FORWARD_OVER_BACKWARD, *GAUSS_NEWTON)}


def record_of(choice: Choice) -> dict[str, Any]:
    """Its JSON."""
    eps = {"eps": choice.backend.eps} if isinstance(choice.backend, FiniteDifferences) else {}
    return {"backend": choice.backend.name, **eps, "error": choice.error, "refused": dict(choice.refused)}


def choice_of(record: Mapping[str, Any]) -> Choice:
    name = record["backend"]
    backend = FiniteDifferences(record["eps"]) if name == FiniteDifferences.name else _EXACT[name]
    return Choice(backend, record["error"], record["refused"])
