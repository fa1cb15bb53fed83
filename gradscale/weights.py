"""The weights in a checkpoint, read without executing pickles.

State dicts of `torch.save`, safetensors, Hugging Face's folders, and what DeepSpeed saves (`deepspeed_weights`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from gradscale.deepspeed_weights import (
    DEEPSPEED_STATES,
    ZERO3_STATES,
    Dtype,
    Weights,
    is_deepspeed,
    itself,
    open_deepspeed,
)
from gradscale.errors import GradscaleError
from gradscale.pickles import load_pickle, unreadable

HF_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
WRAPPERS = ("module", "model", "state_dict", "model_state_dict")  # {"model": state dict, "optimizer": …}


def check_exists(path: str) -> None:
    """Raises: GradscaleError if `path` is neither a URI nor there."""
    if "://" not in path and not Path(path).expanduser().exists():
        raise GradscaleError(
            f"checkpoint must be an existing path, got {path}; "
            "check it: relative paths start at the working directory, and a glob must match something"
        )


def has_weights(path: Path) -> bool:
    """Whether the folder holds weights in Hugging Face's layout."""
    return any((path / name).is_file() for name in HF_WEIGHTS)


def load_state_dict(path: str, dtype: Dtype = "training") -> dict[str, Tensor]:
    """The weights of the checkpoint at `path`, on the CPU, under the names they were saved with.

    Reads what `open_weights` does. Tied parameters are one tensor. Takes the memory of all weights that are put
    together from parts; others are mapped.
    """
    weights = open_weights(path, dtype)
    found = {name: read() for name, read in weights.readers.items()}
    return found | {name: found[of] for name, of in weights.tied.items()}


@torch.no_grad()
def load_weights(model: nn.Module, path: str, dtype: Dtype = "training") -> None:
    """Copies the checkpoint at `path` into `model`, in the model's dtypes, a weight after another.

    Beyond the model this takes the memory of its largest weight. Of tied parameters one name suffices.

    Raises: GradscaleError as `open_weights` does, or if names are missing or unexpected, or a shape differs.
    """
    weights, own = open_weights(path, dtype), model.state_dict(keep_vars=True)
    given = weights.readers.keys() | weights.tied.keys()
    filled = {id(own[name]) for name in given if name in own}
    _refuse(path, "lacks", [name for name, tensor in own.items() if id(tensor) not in filled])
    _refuse(path, "has besides", [name for name in weights.readers if name not in own])
    done: dict[int, str] = {}
    for name, read in weights.readers.items():
        first = done.setdefault(id(own[name]), name)
        _copy(path, read(), own[name], name, first)


def _copy(path: str, tensor: Tensor, into: Tensor, name: str, first: str) -> None:
    """Copies, or where the parameter has its values from the name `first`, compares."""
    _refuse(path, f"has in shape {(*tensor.shape,)}", [name] if tensor.shape != into.shape else [])
    if first == name:
        into.copy_(tensor)
    elif not torch.equal(into, tensor.to(into.device, into.dtype)):
        _refuse(path, "has in two values, tied in the model,", [first, name])


def _refuse(path: str, what: str, names: Sequence[str]) -> None:
    if names:
        raise GradscaleError(
            f"checkpoint {path} must hold exactly the model's weights, got one that {what} "
            f"{', '.join(names[:4])}; build the model that was trained"
        )


def open_weights(path: str, dtype: Dtype = "training") -> Weights:
    """The weights of the checkpoint at `path`, each read when it is asked for.

    Reads a DeepSpeed tag folder of any ZeRO stage and world size, a universal checkpoint, or a folder whose `latest`
    names a tag; a Hugging Face folder; a `.safetensors` file; and a `.pt`, `.pth`, `.bin` or `.ckpt` file that holds
    a state dict, bare or under `module`, `model`, `state_dict` or `model_state_dict`. Executes nothing that they
    hold. `dtype` is `training`, or `master` for the float32 masters that DeepSpeed keeps; others have one dtype.

    Raises: GradscaleError if the path is none of these, holds several tensor parallel slices, lacks a file,
    cannot be read, or needs a class other than those of DeepSpeed that are known.
    """
    if dtype not in get_args(Dtype):
        raise GradscaleError(f"dtype must be training or master, got {dtype}; training is the default")
    if "://" in path:
        raise GradscaleError(f"checkpoint must be a local path to be read, got {path}; download it first")
    check_exists(path)
    root = Path(path).expanduser()
    if root.is_file():
        return _open_file(root)
    if is_deepspeed(root):
        return open_deepspeed(root, dtype)
    found = next((root / name for name in HF_WEIGHTS if (root / name).is_file()), None)
    if found is not None:
        return _open_file(found)
    tag = latest_tag(root)
    if tag is None:
        raise _no_weights(root)
    return open_deepspeed(tag, dtype)


def latest_tag(folder: Path) -> Path | None:
    """The tag that DeepSpeed's `latest` in `folder` names, or else `latest_universal`; None without these files.

    Raises: GradscaleError if there is no such tag.
    """
    file = next((folder / name for name in ("latest", "latest_universal") if (folder / name).is_file()), None)
    if file is None:
        return None
    tag = folder / file.read_text().strip()
    if not is_deepspeed(tag):
        raise GradscaleError(
            f"checkpoint {folder} must hold the tag that its file {file.name} names, got no {tag.name} with weights; "
            "copy it there, or name the folder of another tag"
        )
    return tag


def _no_weights(folder: Path) -> GradscaleError:
    there = sorted(p.name for p in folder.iterdir())
    return GradscaleError(
        f"checkpoint {folder} must be a folder with {DEEPSPEED_STATES}, {ZERO3_STATES.format(rank=0)} or "
        f"{', '.join(HF_WEIGHTS)}, got {', '.join(there[:6]) or 'an empty folder'}; name the folder of one checkpoint, "
        "or a file of weights"
    )


def _open_file(file: Path) -> Weights:
    if file.name.endswith(".index.json"):
        names = sorted(set(json.loads(file.read_text())["weight_map"].values()))
        parts = [_open_file(_existing(file.with_name(name), file)).readers for name in names]
        return Weights({name: read for part in parts for name, read in part.items()})
    if file.suffix == ".safetensors":
        return _open_safetensors(file)
    if file.suffix in PICKLE_SUFFIXES:
        return Weights({name: partial(itself, t) for name, t in _state_dict(load_pickle(file), file).items()})
    raise GradscaleError(
        f"checkpoint file must end in .safetensors, {', '.join(PICKLE_SUFFIXES)} or .index.json, got {file}; rename it"
    )


def _existing(file: Path, index: Path) -> Path:
    if not file.is_file():
        raise GradscaleError(f"checkpoint must hold every file that {index} names, got no {file.name}; copy it there")
    return file


def _open_safetensors(file: Path) -> Weights:
    from safetensors import SafetensorError, safe_open

    try:
        mapped: Any = safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise unreadable(file, error) from error
    return Weights({name: partial(mapped.get_tensor, name) for name in mapped.keys()})  # noqa: SIM118


def _state_dict(saved: Any, file: Path) -> dict[str, Tensor]:
    """The mapping of names to tensors in what `torch.load` gave."""
    if isinstance(saved, Mapping):
        inner = next((saved[key] for key in WRAPPERS if isinstance(saved.get(key), Mapping)), saved)
        wrong = [f"{name}: {type(value).__name__}" for name, value in inner.items() if not isinstance(value, Tensor)]
        if inner and not wrong:
            if any(key in saved for key in ("ds_version", "ds_config")) and not all(t.numel() for t in inner.values()):
                raise GradscaleError(
                    f"checkpoint {file} must hold whole weights, got one rank's part of them; name its folder"
                )
            return {str(name): tensor for name, tensor in inner.items()}
        actual = ", ".join(wrong[:3]) or "an empty mapping"
    else:
        actual = type(saved).__name__
    raise GradscaleError(
        f"checkpoint {file} must hold a state dict, bare or under {', '.join(WRAPPERS)}, got {actual}; "
        "save model.state_dict()"
    )
