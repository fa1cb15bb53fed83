"""Files of `torch.save`, read without executing what they hold.

`torch.load(weights_only=True)`, where the classes that DeepSpeed puts beside the weights are replaced by
inert ones (so DeepSpeed need not be installed). Everything else in a pickle is refused.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path

import torch

from gradscale.errors import GradscaleError

DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def load_pickle(file: Path) -> object:
    """What `torch.save` put into `file`, on the CPU; its tensors are mapped, so read from the disk when they are used.

    Files that torch wrote before its zip format (2020) cannot be mapped and are read whole.

    Raises: GradscaleError, naming the file, if it is cut short or needs a class other than DeepSpeed's known ones.
    """
    zipped = zipfile.is_zipfile(file)
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in DEEPSPEED_CLASSES]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise unreadable(file, error) from error
        raise GradscaleError(
            f"checkpoint {file} must hold only tensors and plain values, got an object of {refused[1]}, "
            "which would run code to be read; save the model's state_dict() alone"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise unreadable(file, error) from error


def unreadable(file: Path, error: Exception) -> GradscaleError:
    """The error for a file that its format's reader could not read."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return GradscaleError(f"checkpoint {file} must be a whole file of weights, got {reason}; it may be truncated")


class _Inert:
    """Stands in for a class of DeepSpeed: takes any state and does nothing."""

    def __new__(cls, *_: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...
