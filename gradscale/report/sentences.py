"""One sentence for each plot, computed from its numbers: what is to be seen, and nothing that the data do not show.

A difference counts as one only beyond two combined standard errors, sqrt(a^2 + b^2), the errors taken
as independent. Curves are DataFrames with step, value and stderr (see `measured.py`), by run name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from gradscale.report.numbers import estimate_text, number_text

FACTOR = 2.0
BEYOND = "more than two combined standard errors"
WITHIN = "within two combined standard errors"
Curves = Mapping[str, pd.DataFrame]


class Point(NamedTuple):
    step: int
    value: float
    stderr: float

    def __str__(self) -> str:
        return estimate_text(self.value, self.stderr)

    def minus(self, other: Point) -> Point:
        return Point(self.step, self.value - other.value, math.hypot(self.stderr, other.stderr))

    def sign(self) -> int:
        """+1 or -1 beyond two standard errors, 0 within; for a difference whose error is known."""
        return 0 if abs(self.value) <= FACTOR * self.stderr else int(math.copysign(1, self.value))


def sentence(noun: str, curves: Curves) -> str:
    """What a plot of `noun` against step shows, for one or several runs."""
    points = {run: _points(frame) for run, frame in curves.items()}
    held = {run: found for run, found in points.items() if found}
    if not held:
        return f"No run has a value of the {noun}."
    return _of_runs(noun, held) + _left_out(curves, points) + "."


def limit_sentence(noun: str, run: str, own: pd.DataFrame, name: str, limit: pd.DataFrame) -> str:
    """On which side of a limit, called `name`, a curve is: beyond twice the error of their difference, or within."""
    here, there = _points(own), _points(limit)
    pairs = [(here[step], there[step]) for step in sorted(set(here) & set(there))]
    if not pairs:
        return f"The {noun} of {run} has no checkpoint in common with {name}."
    if len(pairs) == 1:
        ((a, b),) = pairs
        side = {1: "above", 0: "within twice its error of", -1: "below"}[a.minus(b).sign()]
        return f"At step {a.step} the {noun} of {run} ({a}) lies {side} {name}, {number_text(b.value)}."
    sides: dict[int, list[Point]] = {sign: [a for a, b in pairs if a.minus(b).sign() == sign] for sign in (-1, 0, 1)}
    words = {-1: "below it", 0: "within twice its error of it", 1: "above it"}
    counts = [
        f"{words[sign]} at {'all ' if len(found) == len(pairs) else ''}{len(found)}{_step_of(found)}"
        for sign, found in sides.items()
        if found
    ]
    a, b = max(pairs, key=lambda pair: pair[0].value / pair[1].value if pair[1].value > 0 else -math.inf)
    nearest = f"it is largest beside it at step {a.step}, {a} against {number_text(b.value)}"
    return f"The {noun} of {run} beside {name}, at {len(pairs)} checkpoints: {', '.join(counts)}; {nearest}."


def _step_of(points: list[Point]) -> str:
    return f" (step {points[0].step})" if len(points) == 1 else ""


def layers_sentence(noun: str, curves: Mapping[str, Curves], by: str = "parameter") -> str:
    """What a heat map by parameter shows: run -> parameter -> curve; or by whatever else, named `by`."""
    clauses = [clause for run, layers in curves.items() if (clause := _layers_of(run, layers))]
    if not clauses:
        return f"No run has the {noun} by {by}."
    return f"The {noun} by {by}: {'; '.join(clauses)}."


def _of_runs(noun: str, held: Mapping[str, dict[int, Point]]) -> str:
    if len(held) == 1:
        ((run, points),) = held.items()
        return _trend(noun, run, list(points.values()))
    common = sorted(set.intersection(*(set(points) for points in held.values())))
    if not common:
        return f"The {noun} of {_listed(held)} has no checkpoint in common, so it is not compared"
    if len(held) == 2:
        (left, a), (right, b) = held.items()
        return _pair(noun, left, right, [(a[step], b[step]) for step in common])
    return _many(noun, {run: points[common[-1]] for run, points in held.items()}, common[-1])


def _trend(noun: str, run: str, points: list[Point]) -> str:
    first, last = points[0], points[-1]
    if len(points) == 1:
        return f"At step {first.step} the {noun} of {run} is {first}"
    change = last.minus(first)
    ends = f"from {first} at step {first.step} to {last} at step {last.step}"
    if math.isnan(change.stderr):
        return f"The {noun} of {run} goes {ends}, without a known standard error of the difference"
    if change.sign() == 0:
        start = f"The {noun} of {run} is {first} at step {first.step} and {last} at step {last.step}, equal {WITHIN}"
    else:
        start = f"The {noun} of {run} {'rises' if change.value > 0 else 'falls'} {ends}"
    return start + _turns(points)


def _turns(points: list[Point]) -> str:
    """A maximum or minimum between the ends that differs from both of them."""
    inner = [point for point in points[1:-1] if not math.isnan(point.stderr)]
    found = []
    for word, sign in (("maximum", 1), ("minimum", -1)):
        best = max(inner, key=lambda point: sign * point.value, default=None)
        if best and all(best.minus(end).sign() == sign for end in (points[0], points[-1])):
            found.append(f"a {word} of {best} at step {best.step}")
    return f", with {' and '.join(found)} in between" if found else ""


def _pair(noun: str, left: str, right: str, pairs: list[tuple[Point, Point]]) -> str:
    differences = [d for a, b in pairs if not math.isnan((d := a.minus(b)).stderr)]
    if not differences:
        a, b = pairs[-1]
        values = f"is {a} for {left} and {b} for {right}"
        return f"At step {a.step} the {noun} {values}; without known errors no more is said"
    if len(differences) == 1:
        return _pair_at(noun, left, right, *next(p for p in pairs if p[0].step == differences[0].step))
    up, down = ([d for d in differences if d.sign() == sign] for sign in (1, -1))
    over = f"Over steps {differences[0].step} to {differences[-1].step} the {noun} of"
    among = f"of {len(differences)} common checkpoints"
    if not up and not down:
        agrees = f"{left} and {right} agrees {WITHIN} at all {among[3:]}"
        return f"{over} {agrees}; the largest difference is {_largest(differences)}"
    if up and down:
        return (
            f"{over} {left} exceeds that of {right} by {BEYOND} at {len(up)} {among} (most by {_largest(up)}) "
            f"and falls short of it at {len(down)} (most by {_largest(down)})"
        )
    higher, lower = (left, right) if up else (right, left)
    exceeds = f"{higher} exceeds that of {lower} at {len(up or down)} {among} by {BEYOND}"
    return f"{over} {exceeds}; the largest difference is {_largest(up or down)}"


def _pair_at(noun: str, left: str, right: str, a: Point, b: Point) -> str:
    d = a.minus(b)
    if d.sign() == 0:
        return f"At step {d.step} the {noun} of {left} ({a}) and of {right} ({b}) agree {WITHIN}"
    (higher, high), (lower, low) = ((left, a), (right, b)) if d.value > 0 else ((right, b), (left, a))
    difference = estimate_text(abs(d.value), d.stderr)
    return f"At step {d.step} the {noun} of {higher} ({high}) exceeds that of {lower} ({low}) by {difference}, {BEYOND}"


def _many(noun: str, at: Mapping[str, Point], step: int) -> str:
    low, *_, high = sorted(at, key=lambda run: at[run].value)
    start = f"At step {step}, the last that all have, the {noun} ranges from {at[low]} ({low}) to {at[high]} ({high})"
    difference = at[high].minus(at[low])
    if math.isnan(difference.stderr):
        return f"{start}, without a known standard error of the difference"
    return f"{start}, {f'equal {WITHIN}' if difference.sign() == 0 else f'apart by {BEYOND}'}"


def _layers_of(run: str, layers: Curves) -> str:
    points = {name: found for name, frame in layers.items() if (found := _points(frame))}
    if not points:
        return ""
    step = max(max(found) for found in points.values())
    at = {name: found[step] for name, found in points.items() if step in found}
    low, high = (pick(at, key=lambda name: at[name].value) for pick in (min, max))
    if low == high:
        return f"{low} of {run} has {at[low]} at step {step}"
    return f"at step {step} of {run} it is highest in {high} ({at[high]}) and lowest in {low} ({at[low]})"


def _points(frame: pd.DataFrame) -> dict[int, Point]:
    """The finite values, by step."""
    rows = zip(frame["step"], frame["value"], frame["stderr"], strict=True)
    points = [Point(int(step), float(value), float(stderr)) for step, value, stderr in rows]
    return {point.step: point for point in sorted(points) if math.isfinite(point.value)}


def _left_out(curves: Curves, points: Mapping[str, dict[int, Point]]) -> str:
    text = ""
    for run, frame in curves.items():
        missing = len(frame) - len(points[run])
        if len(frame) == 0:
            text += f"; {run} has none"
        elif missing:
            text += f"; {run} has no finite value at {missing} of its {len(frame)} checkpoints"
    return text


def _largest(differences: list[Point]) -> str:
    largest = max(differences, key=lambda d: abs(d.value))
    return f"{estimate_text(abs(largest.value), largest.stderr)} at step {largest.step}"


def _listed(names: Mapping[str, object]) -> str:
    *head, last = names
    return f"{', '.join(head)} and {last}" if head else last
