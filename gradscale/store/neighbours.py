"""Which examples pull the weights the same way as a given one: a scan over the sketches of a step.

Shapes: n finite examples of a step, K sketch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradscale.errors import GradscaleError
from gradscale.store.sketches import StoredSketches, cosine_error, error_is_stated

if TYPE_CHECKING:
    import pandas as pd

BY = ("cosine", "inner product")
_ROWS = 128  # that are widened to float64 at a time


class Products(NamedTuple):
    """Of one example with all others: estimates with their standard errors."""

    inner: np.ndarray  # [n]
    cosine: np.ndarray  # [n]; NaN where a gradient is zero
    cosine_stderr: np.ndarray  # [n]
    inner_stderr: np.ndarray  # [n]


def neighbours(
    sketches: StoredSketches, position: int, k: int, by: str, most_opposed: bool, measured: float = math.nan
) -> pd.DataFrame:
    """The k examples beside the one at `position`; see `Run.neighbours`. `measured`: the run's error of a cosine.

    Raises: GradscaleError if `by` is unknown, or the cosine is asked for and the example's gradient is zero.
    """
    import pandas as pd

    _check(sketches, position, k, by)
    found = products_with(sketches, position, measured)
    score = found.cosine if by == "cosine" else found.inner
    order = np.argsort(score if most_opposed else -score, kind="stable")  # which puts NaN last
    order = order[order != position][:k]
    frame = pd.DataFrame(
        {
            "example_id": sketches.ids[order],
            "inner_product": found.inner[order],
            "inner_product_stderr": found.inner_stderr[order],
            "cosine": found.cosine[order],
            "cosine_stderr": found.cosine_stderr[order],
        }
    )
    frame.attrs = {
        "zero_gradients": int((sketches.sq_norms == 0).sum()),
        "sketch_error": measured,
        "stderr_is": "stated" if error_is_stated(sketches.scheme) else "measured",
    }
    return frame


def products_with(sketches: StoredSketches, position: int, measured: float) -> Products:
    """Of the example at `position`, with every example of the step; one row group in memory at a time."""
    (sketch,) = sketches.take(np.array([position])).astype(np.float64)
    inner = np.empty(len(sketches.ids))
    for group, matrix in sketches.blocks():
        for start in range(0, len(matrix), _ROWS):
            part = matrix[start : start + _ROWS]
            inner[group.start + start :][: len(part)] = part.astype(np.float64) @ sketch
    inner[position] = sketches.sq_norms[position]
    lengths = np.sqrt(sketches.sq_norms[position]) * np.sqrt(sketches.sq_norms)
    cosine = np.divide(inner, lengths, out=np.full(len(inner), np.nan), where=lengths > 0)
    spread = _spread(sketches.scheme, np.clip(np.nan_to_num(cosine), -1, 1), measured)
    spread[position] = 0.0
    inner_spread = np.where(lengths > 0, spread * lengths, 0.0)  # a zero gradient has a zero sketch
    return Products(inner, cosine, np.where(lengths > 0, spread, np.nan), inner_spread)


def _spread(scheme: Mapping[str, Any], cosine: np.ndarray, measured: float) -> np.ndarray:
    """[n] the errors of cosines: what the scheme states, or, where it states none, the one that was measured."""
    if error_is_stated(scheme):
        stated: np.ndarray = cosine_error(scheme, 0) * np.sqrt(1 + cosine**2)
        return stated
    return np.full(len(cosine), measured)


def _check(sketches: StoredSketches, position: int, k: int, by: str) -> None:
    if by not in BY:
        raise GradscaleError(f"by must be one of {', '.join(BY)}, got {by!r}")
    if not isinstance(k, int) or k < 1:
        raise GradscaleError(f"k must be a whole number of at least 1, got {k!r}")
    if by == "cosine" and not sketches.sq_norms[position] > 0:
        raise GradscaleError(
            f"example {sketches.ids[position]} must have a gradient other than zero to have a cosine with others, got "
            f"a zero gradient at step {sketches.step}; use by='inner product'"
        )
