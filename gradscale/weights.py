"""The weights in a checkpoint, read without executing pickles.

`torch.load(weights_only=True)`, where the classes that DeepSpeed puts beside the weights are replaced by
inert ones (so DeepSpeed need not be installed), and safetensors. Everything else in a pickle is refused.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradscale.errors import GradscaleError

DEEPSPEED_STATES = "mp_rank_00_model_states.pt"
ZERO3_STATES = "zero_pp_rank_*_model_states.pt"
HF_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
WRAPPERS = ("module", "model", "state_dict", "model_state_dict")  # {"model": state dict, "optimizer": …}
DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


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


def load_state_dict(path: str) -> dict[str, Tensor]:
    """The weights of the checkpoint at `path`, on the CPU, under the names they were saved with.

    Reads a DeepSpeed tag folder of ZeRO stage 0 to 2 (in the training dtype), a Hugging Face folder, a
    `.safetensors` file, and a `.pt`, `.pth`, `.bin` or `.ckpt` file that holds a state dict, bare or under
    `module`, `model`, `state_dict` or `model_state_dict`. Executes nothing that the file holds.

    Raises: GradscaleError if the path is none of these, was saved by ZeRO stage 3 or in several tensor
    parallel slices, cannot be read, or needs a class other than those of DeepSpeed that are known.
    """
    if "://" in path:
        raise GradscaleError(f"checkpoint must be a local path to be read, got {path}; download it first")
    check_exists(path)
    root = Path(path).expanduser()
    if root.is_dir():
        _refuse_slices(root)
        found = next((root / name for name in (DEEPSPEED_STATES, *HF_WEIGHTS) if (root / name).is_file()), None)
        if found is None:
            raise _no_weights(root)
        root = found
    return _load_file(root)


def _refuse_slices(folder: Path) -> None:
    if next(folder.glob(ZERO3_STATES), None) is not None:
        raise _zero3(folder)
    slices = sorted(p.name for p in folder.glob("mp_rank_*_model_states.pt"))
    if len(slices) > 1:
        raise GradscaleError(
            f"checkpoint {folder} must hold whole weights, got {len(slices)} tensor-parallel slices "
            f"({', '.join(slices[:3])}); join them with DeepSpeed's ds_to_universal.py or your trainer's exporter"
        )


def _zero3(path: Path) -> GradscaleError:
    return GradscaleError(
        f"checkpoint {path} must hold whole weights, got the partitions of ZeRO stage 3; convert it with "
        "`python zero_to_fp32.py ROOT OUT --safe_serialization`, the script that DeepSpeed left in its root folder"
    )


def _no_weights(folder: Path) -> GradscaleError:
    there = sorted(p.name for p in folder.iterdir())
    return GradscaleError(
        f"checkpoint {folder} must be a folder with {DEEPSPEED_STATES} or {', '.join(HF_WEIGHTS)}, "
        f"got {', '.join(there[:6]) or 'an empty folder'}; name the folder of one checkpoint, or a file of weights"
    )


def _load_file(file: Path) -> dict[str, Tensor]:
    if file.name.endswith(".index.json"):
        names = sorted(set(json.loads(file.read_text())["weight_map"].values()))
        return _merged(_load_file(_existing(file.with_name(name), file)) for name in names)
    if file.suffix == ".safetensors":
        return _load_safetensors(file)
    if file.suffix in PICKLE_SUFFIXES:
        return _state_dict(_load_pickle(file), file)
    raise GradscaleError(
        f"checkpoint file must end in .safetensors, {', '.join(PICKLE_SUFFIXES)} or .index.json, got {file}; rename it"
    )


def _merged(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for part in parts for name, tensor in part.items()}


def _existing(file: Path, index: Path) -> Path:
    if not file.is_file():
        raise GradscaleError(f"checkpoint must hold every file that {index} names, got no {file.name}; copy it there")
    return file


def _load_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file, device="cpu")
    except SafetensorError as error:
        raise _unreadable(file, error) from error


def _load_pickle(file: Path) -> object:
    zipped = zipfile.is_zipfile(file)  # what torch.save has written since 2020; only these can be mapped
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in DEEPSPEED_CLASSES]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise _unreadable(file, error) from error
        raise GradscaleError(
            f"checkpoint {file} must hold only tensors and plain values, got an object of {refused[1]}, "
            "which would run code to be read; save the model's state_dict() alone"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> GradscaleError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return GradscaleError(f"checkpoint {file} must be a whole file of weights, got {reason}; it may be truncated")


class _Inert:
    """Stands in for a class of DeepSpeed: takes any state and does nothing."""

    def __new__(cls, *_: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def _state_dict(saved: Any, file: Path) -> dict[str, Tensor]:
    """The mapping of names to tensors in what `torch.load` gave."""
    if isinstance(saved, Mapping):
        inner = next((saved[key] for key in WRAPPERS if isinstance(saved.get(key), Mapping)), saved)
        wrong = [f"{name}: {type(value).__name__}" for name, value in inner.items() if not isinstance(value, Tensor)]
        if inner and not wrong:
            if any(key in saved for key in ("ds_version", "ds_config")) and not all(t.numel() for t in inner.values()):
                raise _zero3(file)
            return {str(name): tensor.detach() for name, tensor in inner.items()}
        actual = ", ".join(wrong[:3]) or "an empty mapping"
    else:
        actual = type(saved).__name__
    raise GradscaleError(
        f"checkpoint {file} must hold a state dict, bare or under {', '.join(WRAPPERS)}, got {actual}; "
        "save model.state_dict()"
    )
