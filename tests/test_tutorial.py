"""Promise: docs/your-own-measure.md can be followed as it stands. Its blocks are run here, one after another.

A block marked `file=NAME` is written there, one marked `run` is run in one interpreter, and shell lines that begin with
`gradscale` are given to the command. What the page shows as printed is held to what is.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gradscale.cli import main

PAGE = Path(__file__).parent.parent / "docs" / "your-own-measure.md"


def blocks(text: str) -> list[tuple[str, str]]:
    """(language and what it is marked with, content) of every fenced block."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(content: str) -> Iterator[list[str]]:
    for line in content.splitlines():
        assert line.startswith("gradscale ")
        yield shlex.split(line)[1:]


def run_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["gradscale", *arguments])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_page_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], local_ray: None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names: dict[str, object] = {}
    printed, ran = "", 0
    for mark, content in blocks(PAGE.read_text(encoding="utf-8")):
        language, _, rest = mark.partition(" ")
        if rest.startswith("file="):
            (tmp_path / rest.removeprefix("file=")).write_text(content, encoding="utf-8")
            monkeypatch.syspath_prepend(tmp_path)
        elif language == "python":
            exec(compile(content, str(PAGE), "exec"), names)
        elif language == "sh":
            for arguments in commands(content):
                assert run_command(arguments, monkeypatch) == 0, arguments
                printed += capsys.readouterr().out
                ran += 1
        else:
            for line in content.splitlines():
                assert " ".join(line.split()) in " ".join(printed.split()), line
    assert ran == 5
    assert "tail_index obeys the laws of settings, state, arguments left untouched, unit" in printed
    assert "passes: 1 forward and 1 backward" in printed
    report = (tmp_path / "runs" / "tails" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Tail index</h2>" in report
    assert "tail_index/hill/k=50/v1" in report
    capsys.readouterr()
