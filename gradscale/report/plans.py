"""What was measured: the plans of the runs side by side, as an HTML table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from gradscale.report.measured import Measured

FIRST = (
    "kind", "task", "task_options", "examples", "checkpoints", "parameters", "params", "measures", "sketch",
    "sketch_dtype", "operator", "top", "which", "trace", "density", "stability", "backend", "seed", "microbatch",
    "shard_size", "device", "versions",
)  # fmt: skip
MOST_ITEMS = 8
FINGERPRINT = 12  # characters that are shown; run.json has the rest


def plan_table(runs: Sequence[Measured], heads: Sequence[str]) -> str:
    """One row per setting, one cell where all runs agree; `heads` are the runs' headings in HTML."""
    keys = list(dict.fromkeys(key for run in runs for key, value in run.plan.items() if value is not None))
    keys.sort(key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST))
    rows = [_row(key.replace("_", " "), [setting_text(key, run.plan.get(key)) for run in runs]) for key in keys]
    if any(run.nonfinite for run in runs):
        counts = ["no rows" if run.levels else f"{run.nonfinite}, kept out of every sum" for run in runs]
        rows.append(_row("non-finite rows", counts))
    cells = "".join(f"<th>{head}</th>" for head in heads)
    note = (
        '<p class="legend">Where the runs differ, the settings are bold.</p>'
        if any("differs" in row for row in rows)
        else ""
    )
    full = "".join(f"<p>{head}</p><pre>{escape(_json(run.plan))}</pre>" for run, head in zip(runs, heads, strict=True))
    return (
        f'<table class="plan"><thead><tr><th></th>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table>{note}'
        f"<details><summary>Every setting, as in run.json</summary>{full}</details>"
    )


def setting_text(key: str, value: Any) -> str:
    """One setting on a line or two: of a long list its length, its head and its last."""
    if key == "checkpoints" and isinstance(value, Mapping):
        return _checkpoints(value)
    if key == "parameters" and isinstance(value, Mapping):
        return _parameters(value)
    if key == "measures" and isinstance(value, Mapping):
        return ", ".join(_measure(name, about) for name, about in value.items())
    if key == "kind":
        return str(value or "gradients")
    if key in ("trace", "density", "stability") and isinstance(value, Mapping):
        value = {name: inner for name, inner in value.items() if inner is not None}
    if key.endswith("fingerprint"):
        return "none" if value is None else _shortened(str(value))
    return _text(value) or "none"


def _checkpoints(value: Mapping[str, Any]) -> str:
    """The steps and the one folder where they lie, or each with its path."""
    paths = {step: about.get("path") if isinstance(about, Mapping) else about for step, about in value.items()}
    folders = {str(path).rpartition("/")[0] for path in paths.values() if path}
    if len(folders) == 1 and all(paths.values()) and len(paths) > 1:
        return f"steps {_few(list(paths))} in {folders.pop()}"
    return _few([f"step {step}: {path or 'initial weights'}" for step, path in paths.items()])


def _measure(name: str, about: Any) -> str:
    """The settings; the class only where it is not gradscale's own."""
    own = isinstance(about, Mapping) and str(about.get("class", "")).startswith("gradscale.")
    text = _text({key: inner for key, inner in about.items() if key != "class"} if own else about)
    return f"{name} ({text})" if text else name


def _parameters(value: Mapping[str, Any]) -> str:
    shapes = [about.get("shape") if isinstance(about, Mapping) else None for about in value.values()]
    entries = sum(math.prod(shape) for shape in shapes if shape is not None)
    return f"{entries:,} in {len(value)} tensors: {_few(list(value), counted=False)}"


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return _few([f"{key} {_text(inner)}" for key, inner in value.items()])
    if isinstance(value, (list, tuple)):
        return _few([_text(inner) for inner in value])
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000 else str(value)


def _few(texts: Sequence[str], *, counted: bool = True) -> str:
    if len(texts) <= MOST_ITEMS:
        return ", ".join(texts)
    some = f"{', '.join(texts[: MOST_ITEMS - 4])}, …, {texts[-1]}"
    return f"{len(texts)}: {some}" if counted else some


def _shortened(text: str) -> str:
    return text if len(text) <= FINGERPRINT else f"{text[:FINGERPRINT]}…"


def _row(key: str, texts: Sequence[str]) -> str:
    if len(set(texts)) == 1:
        return f'<tr><th>{escape(key)}</th><td colspan="{len(texts)}">{escape(texts[0])}</td></tr>'
    cells = "".join(f"<td>{escape(text)}</td>" for text in texts)
    return f'<tr class="differs"><th>{escape(key)}</th>{cells}</tr>'


def _json(plan: Mapping[str, Any]) -> str:
    return json.dumps(plan, indent=1, default=str, ensure_ascii=False)
