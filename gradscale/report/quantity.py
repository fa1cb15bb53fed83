"""What the report knows of one quantity: how it is called, drawn and read."""

from __future__ import annotations

from typing import NamedTuple

JACKKNIFE = (
    "Standard error: delete-one-block jackknife over blocks of shards, the examples taken as a sample of a population."
)
PROBES = (
    "Standard error: of the mean over probes, for the examples that were measured; all checkpoints share their probes."
)
MEAN = "Standard error: the standard deviation over examples, divided by √n."
DRAWS = "Standard error: over the draws of the noise, which all examples share, and over examples, their squares added."


class Quantity(NamedTuple):
    """One (measure, name). `noun` goes into sentences, `error` says how the standard error was got.

    `scope` is that of its curve. `beside` names a quantity of the same measure that stands beside it in its plot, and
    what that is; `limit` says that it is one to stay below.
    """

    measure: str
    name: str
    title: str
    noun: str
    equation: str
    text: str
    error: str = ""
    source: tuple[str, str] | None = None
    plotted: bool = True
    scope: str = "all"
    beside: tuple[str, str] | None = None
    limit: bool = False
    apart: bool = False  # got by a call of its own, so that nobody misses it in a run

    @property
    def key(self) -> str:
        return f"{self.measure}/{self.name}"
