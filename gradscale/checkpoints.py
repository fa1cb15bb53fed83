"""Checkpoints: which ones a run measures, and what identifies them. `weights` reads them."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gradscale.deepspeed_weights import is_deepspeed
from gradscale.errors import GradscaleError
from gradscale.weights import PICKLE_SUFFIXES, check_exists, has_weights, load_state_dict, load_weights

__all__ = ["Checkpoint", "deepspeed_tags", "fingerprint", "load_state_dict", "load_weights", "resolve"]

STEP_FOLDER = re.compile(r"(?:^|step|checkpoint|ckpt|iter|epoch)[-_=]?\d+$")  # a file's step may stand in such a name
UNIVERSAL = "_universal"  # by custom at the end of the name of what ds_to_universal.py makes of a tag
EDGE = 1 << 20  # bytes of a file's start and end that its fingerprint covers


class Checkpoint(NamedTuple):
    """One checkpoint of a run; `path` None stands for the task's initial weights."""

    step: int
    path: str | None


def resolve(checkpoints: Sequence[str] | Mapping[int, str] | None) -> tuple[Checkpoint, ...]:
    """The checkpoints that a user named, each with its step, sorted by step.

    None is the one checkpoint (0, None). A mapping gives step -> path as they are. Each string is a path,
    a glob, or a URI (with `://`, not checked); a folder of DeepSpeed tags or of HF `checkpoint-*` folders
    stands for all of them (a universal checkpoint beside the tag that it was made of is left out). The step is the
    last number of the name (`global_step100`, `model_100.pt`), or for a file without one, of its folder's name if
    that is like `step100`; if no name has a number, the position in the list.

    Raises: GradscaleError if a path does not exist, some names have a step and others none, or two
    checkpoints have the same step.
    """
    if checkpoints is None:
        return (Checkpoint(0, None),)
    if isinstance(checkpoints, Mapping):
        for path in checkpoints.values():
            check_exists(path)
        return tuple(Checkpoint(step, checkpoints[step]) for step in sorted(checkpoints))
    named = [checkpoints] if isinstance(checkpoints, str) else list(checkpoints)
    if not named:
        raise GradscaleError("checkpoints must name at least one checkpoint, got none; leave them out to use none")
    return _sorted_by_step([path for name in named for path in _matches(name)])


def _matches(name: str) -> list[str]:
    if "://" in name:
        return [name]
    path = Path(name).expanduser()
    found = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path)))]
    if not found:
        check_exists(name)
    return [str(checkpoint) for match in _originals(found) for checkpoint in _expanded(match)]


def _expanded(path: Path) -> list[Path]:
    """The checkpoints in a folder that holds several, else the path itself."""
    saved = [] if path.is_file() else [p for p in path.glob("checkpoint-*") if p.is_dir() and _step(p.name) is not None]
    if saved:
        return [inner for folder in sorted(saved) for inner in _expanded(folder)]
    return [path] if has_weights(path) else deepspeed_tags(path) or [path]


def deepspeed_tags(path: Path) -> list[Path]:
    """The tag folders that DeepSpeed saved in the folder `path`, sorted by name; none for a file, or for a tag.

    A universal checkpoint counts if it is not beside the tag that it was made of.
    """
    if not path.is_dir() or is_deepspeed(path):
        return []
    folders = sorted(p for p in path.iterdir() if p.is_dir())
    tags = [p for p in folders if re.fullmatch(r"global_step\d+", p.name) or is_deepspeed(p)]
    return _originals(tags)


def _originals(paths: Sequence[Path]) -> list[Path]:
    """The paths without the universal checkpoints of tags among them."""
    return [p for p in paths if not (p.name.endswith(UNIVERSAL) and Path(str(p).removesuffix(UNIVERSAL)) in paths)]


def _step(name: str) -> int | None:
    stem = re.sub(r"(\.safetensors|\.pt|\.pth|\.bin|\.ckpt)$", "", name).removesuffix(UNIVERSAL)
    number = re.search(r"(\d+)$", stem)
    return int(number[1]) if number else None


def _step_of(path: str) -> int | None:
    parts = path.rstrip("/").split("/")
    own = _step(parts[-1])
    is_file = Path(path).is_file() or Path(parts[-1]).suffix in (".safetensors", *PICKLE_SUFFIXES)
    inherits = own is None and is_file and len(parts) > 1 and STEP_FOLDER.search(parts[-2])
    return _step(parts[-2]) if inherits else own


def _sorted_by_step(paths: Sequence[str]) -> tuple[Checkpoint, ...]:
    steps = [_step_of(path) for path in paths]
    without = [path for path, step in zip(paths, steps, strict=True) if step is None]
    if without and len(without) < len(paths):
        raise GradscaleError(
            f"checkpoint names must all end in their step or none of them, got none in {', '.join(without[:3])}; "
            "leave those out, or give the steps: {100: 'PATH', ...}"
        )
    found: dict[int, str] = {}
    for position, (path, step) in enumerate(zip(paths, steps, strict=True)):
        number = position if step is None else step
        if number in found:
            raise GradscaleError(
                f"checkpoints must have different steps, got step {number} for {found[number]} and {path}; "
                "leave one out, or give the steps: {100: 'PATH', ...}"
            )
        found[number] = path
    return tuple(Checkpoint(step, found[step]) for step in sorted(found))


def fingerprint(path: str) -> str:
    """A hash of the names, sizes and first and last MiB of every file at `path`; of a URI, the URI itself."""
    if "://" in path:
        return path
    check_exists(path)
    root = Path(path).expanduser()
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root.parent if file == root else root).as_posix()}:{size};".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(EDGE))
            stream.seek(max(EDGE, size - EDGE))
            digest.update(stream.read(EDGE))
    return digest.hexdigest()
