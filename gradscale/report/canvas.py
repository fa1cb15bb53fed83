"""What all figures of the report share: colours, settings, and how a figure becomes inline SVG.

Text stays text, and what is drawn in INK takes the colour of the page, so that a figure reads on light and on dark
ground. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v", "P")
INK = "#1a2b3c"  # stands for currentColor

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False,
    "font.size": 9.0, "font.family": ["DejaVu Sans"], "text.color": INK, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.linewidth": 0.7, "axes.spines.top": False,
    "axes.spines.right": False, "lines.linewidth": 1.5, "lines.markersize": 4.5, "errorbar.capsize": 2.5,
    "legend.frameon": False, "axes.unicode_minus": True, "figure.facecolor": "none", "axes.facecolor": "none",
}  # fmt: skip


@contextmanager
def drawing(key: str) -> Iterator[None]:
    """Within it figures are drawn by the report's settings; ids are made from `key`."""
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": key}):
        yield


def svg_of(figure: Figure, key: str, title: str) -> str:
    """Inline SVG: no prolog, every id prefixed so that figures on one page do not clash, ink as currentColor."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    prefix = re.sub(r"[^a-z0-9]", "-", key.lower())
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
