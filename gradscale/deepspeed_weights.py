"""The weights in a folder that DeepSpeed saved: a tag of any ZeRO stage and world size, or a universal one.

DeepSpeed is neither imported nor needed. What it writes, of W ranks (DeepSpeed 0.19,
`deepspeed/utils/zero_to_fp32.py` and `deepspeed/checkpoint/ds_to_universal.py`):

- Stages 0 to 2: `mp_rank_00_model_states.pt`, whose `module` holds every weight in the training dtype.
- Stages 1 and 2: `zero_pp_rank_R_mp_rank_00_optim_states.pt` of every rank R (`bf16_` before it under bfloat16).
  A parameter group is one vector, its float32 masters in the order of `param_shapes`, each followed by its
  `param_alignment_paddings`; rank R has one section of it, `single_partition_of_fp32_groups`.
- Stage 3: `zero_pp_rank_R_mp_rank_00_model_states.pt`, with shapes, buffers and rank R's part of frozen parameters,
  and optimizer states as above, where `fp32_flat_groups` holds ceil(P / W) masters of every parameter of P entries.
- Universal: `zero/NAME/fp32.pt`, the masters of one parameter (flat if they come from stage 3), beside the above
  model states.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.pickles import load_pickle
from gradscale.zero_layout import Place, Section, Shapes, consecutive, interleaved, other_size

DEEPSPEED_STATES = "mp_rank_00_model_states.pt"
ZERO3_STATES = "zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
OPTIMIZER_STATES = "*zero_pp_rank_*_optim_states.pt"
MODEL_STATES = ("mp_rank_*_model_states.pt", "zero_pp_rank_*_mp_rank_*_model_states.pt")
SLICES = ("mp_rank_*_model_states.pt", "zero_pp_rank_0_mp_rank_*_model_states.pt")
EXPERTS = ("layer_*_expert_*_model_states.pt", "expp_rank_*_optim_states.pt")

Dtype = Literal["training", "master"]


class Weights(NamedTuple):
    """The weights of a checkpoint, each read when it is asked for."""

    readers: Mapping[str, Callable[[], Tensor]]
    tied: Mapping[str, str] = {}  # a name -> the name in `readers` of the same parameter


class _Saved(NamedTuple):
    """What the model states say of the weights."""

    folder: Path
    module: Mapping[str, Tensor]  # under stage 3 the parameters are empty, and tell their dtype alone
    shapes: Shapes
    frozen: Mapping[str, Sequence[int]]
    tied: Mapping[str, str]  # a name -> the one that holds the parameter
    buffers: Collection[str]
    partitioned: bool  # stage 3


def is_deepspeed(folder: Path) -> bool:
    """Whether the folder is a tag or a universal checkpoint."""
    return next(chain.from_iterable(folder.glob(pattern) for pattern in MODEL_STATES), None) is not None


def is_universal(folder: Path) -> bool:
    """Whether the folder is what `ds_to_universal.py` made of a tag."""
    return is_deepspeed(folder) and (folder / "zero").is_dir()


def open_deepspeed(folder: Path, dtype: Dtype) -> Weights:
    """The weights in a tag or universal folder, in the dtype of training, or, where they have them, float32 masters.

    Frozen parameters and buffers have no master and come as they were saved. Under stage 3 and in universal folders
    the weights in the training dtype are the masters, rounded, which is how DeepSpeed makes them at every step.
    Reading a weight needs the memory of that weight; all files but legacy ones are mapped.

    Raises: GradscaleError if the folder holds slices of tensor, pipeline or expert parallelism, a file of a rank is
    missing or damaged, or `dtype` is `master` and there are none.
    """
    _refuse_slices(folder)
    states = folder / DEEPSPEED_STATES
    if not states.is_file():
        states = _there(folder / ZERO3_STATES.format(rank=0), "rank 0's model states, which name the weights")
    saved = _saved(states)
    if not saved.partitioned and dtype == "training":
        return Weights({name: partial(itself, tensor) for name, tensor in saved.module.items()})
    parameters = _universal(saved, dtype) if is_universal(folder) else _masters(saved, dtype)
    if saved.partitioned:
        parameters |= _frozen(saved)
        kept = {name: tensor for name, tensor in saved.module.items() if name in saved.buffers}
    else:
        kept = {name: tensor for name, tensor in saved.module.items() if name not in parameters}
    tied = {name: of for name, of in saved.tied.items() if of in parameters}
    as_saved = {name: partial(itself, tensor) for name, tensor in kept.items() if name not in tied}
    return Weights(as_saved | parameters, tied)


def _refuse_slices(folder: Path) -> None:
    found = [sorted(path.name for path in folder.glob(pattern)) for pattern in SLICES]
    slices = next((names for names in found if len(names) > 1), [])
    slices += sorted(path.name for pattern in EXPERTS for path in folder.glob(pattern))
    if slices:
        raise GradscaleError(
            f"checkpoint {folder} must hold whole weights, got {len(slices)} tensor-parallel slices or experts "
            f"({', '.join(slices[:3])}); join them with your trainer's exporter to Hugging Face's layout"
        )
    if all(found):
        raise GradscaleError(
            f"checkpoint {folder} must be of one ZeRO stage, got {found[0][0]} and {found[1][0]}; remove those that "
            "another run left"
        )


def _there(file: Path, what: str) -> Path:
    if not file.is_file():
        raise GradscaleError(
            f"checkpoint {file.parent} must hold {what}, got no {file.name}; copy it from the machine that wrote it: "
            "every node saves the files of its own ranks"
        )
    return file


def itself(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _saved(file: Path) -> _Saved:
    states: Any = load_pickle(file)
    module = states.get("module") if isinstance(states, Mapping) else None
    if not isinstance(module, Mapping):
        raise GradscaleError(
            f"checkpoint {file} must hold the weights under module, got {type(module).__name__}; of a pipeline, save "
            "the model in Hugging Face's layout"
        )
    wrong = [f"{name}: {type(value).__name__}" for name, value in module.items() if not isinstance(value, Tensor)]
    if wrong:
        raise GradscaleError(
            f"checkpoint {file} must hold tensors under module, got {', '.join(wrong[:3])}; leave out the extra state"
        )
    partitioned = file.name != DEEPSPEED_STATES
    shapes, frozen, tied, buffers = (
        states.get(key) for key in ("param_shapes", "frozen_param_shapes", "shared_params", "buffer_names")
    )
    if partitioned and not shapes:
        raise _no_masters(file.parent, "no shapes in " + file.name)
    return _Saved(file.parent, module, shapes or (), frozen or {}, tied or {}, buffers or (), partitioned)


def _no_masters(folder: Path, found: str) -> GradscaleError:
    return GradscaleError(
        f"checkpoint {folder} must hold the float32 masters of its weights by name, got {found}; stages 1 to 3 save "
        "them: of stage 0, take dtype training"
    )


def _masters(saved: _Saved, dtype: Dtype) -> dict[str, Callable[[], Tensor]]:
    """The trained parameters from the parts of all ranks."""
    files = _optimizer_files(saved.folder)
    if not files:
        if saved.partitioned or any(t.dtype in (torch.bfloat16, torch.float16) for t in saved.module.values()):
            raise _no_masters(saved.folder, f"no {OPTIMIZER_STATES}")
        return {}
    optimizers = [_optimizer(file) for file in files]
    _check_ranks(saved.folder, files, optimizers)
    key = "fp32_flat_groups" if saved.partitioned else "single_partition_of_fp32_groups"
    for file, optimizer in zip(files, optimizers, strict=True):
        if not isinstance(optimizer.get(key), Sequence):
            raise _no_masters(saved.folder, f"no {key} in {file.name}")
    parts = [optimizer[key] for optimizer in optimizers]
    if saved.partitioned:
        found = interleaved(saved.shapes, parts, saved.folder)
    else:
        found = consecutive(saved.shapes, optimizers[0].get("param_alignment_paddings"), parts, saved.folder)
    return {name: partial(place.read, _target(saved, name, dtype)) for name, place in found.items()}


def _optimizer_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(OPTIMIZER_STATES), key=_rank)


def _rank(file: Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", file.name)
    return int(found[1]) if found else -1


def _optimizer(file: Path) -> Mapping[str, Any]:
    states: Any = load_pickle(file)
    optimizer = states.get("optimizer_state_dict") if isinstance(states, Mapping) else None
    if not isinstance(optimizer, Mapping):
        raise _no_masters(file.parent, f"no optimizer_state_dict in {file.name}")
    return optimizer


def _check_ranks(folder: Path, files: Sequence[Path], optimizers: Sequence[Mapping[str, Any]]) -> None:
    """Raises: GradscaleError unless the files are those of ranks 0 to W - 1 of one run."""
    count = optimizers[0].get("partition_count", len(files))
    ranks = max(count) if isinstance(count, Sequence) else int(count)
    there = {_rank(file) for file in files}
    for rank in range(ranks):
        if rank not in there:
            name = re.sub(r"rank_\d+_mp", f"rank_{rank}_mp", files[0].name)
            _there(folder / name, f"the optimizer states of all {ranks} ranks")
    if len(files) > ranks:
        raise GradscaleError(
            f"checkpoint {folder} must hold the optimizer states of {ranks} ranks, got {len(files)} files up to "
            f"{files[-1].name}; remove those that another run left"
        )
    for key in ("partition_count", "param_alignment_paddings"):
        for file, optimizer in zip(files, optimizers, strict=True):
            if optimizer.get(key) != optimizers[0].get(key):
                raise GradscaleError(
                    f"checkpoint {folder} must hold files of one run, got {key} {optimizers[0].get(key)} in "
                    f"{files[0].name}, {optimizer.get(key)} in {file.name}; copy the whole folder again"
                )


def _target(saved: _Saved, name: str, dtype: Dtype) -> torch.dtype:
    return torch.float32 if dtype == "master" or name not in saved.module else saved.module[name].dtype


def _frozen(saved: _Saved) -> dict[str, Callable[[], Tensor]]:
    """Stage 3: each rank's part one after another, with padding at the end of the last."""
    if not saved.frozen:
        return {}
    fragments = [_fragments(saved.folder, 0)]
    sizes = {name: fragments[0][name].numel() for name in saved.frozen}
    ranks = max(math.ceil(math.prod(shape) / max(1, sizes[name])) for name, shape in saved.frozen.items())
    fragments += [_fragments(saved.folder, rank) for rank in range(1, ranks)]
    found = dict[str, Callable[[], Tensor]]()
    for name, shape in saved.frozen.items():
        vector, entries = [rank[name] for rank in fragments], math.prod(shape)
        if sum(tensor.numel() for tensor in vector) < entries:
            raise other_size(saved.folder, f"{entries} entries of {name}", sum(t.numel() for t in vector))
        found[name] = partial(Place(shape, [Section(vector, 0, entries)]).read, vector[0].dtype)
    return found


def _fragments(folder: Path, rank: int) -> Mapping[str, Tensor]:
    file = _there(folder / ZERO3_STATES.format(rank=rank), "every rank's part of the frozen parameters")
    states: Any = load_pickle(file)
    found: Mapping[str, Tensor] = states["frozen_param_fragments"]
    return found


def _universal(saved: _Saved, dtype: Dtype) -> dict[str, Callable[[], Tensor]]:
    shapes = {name: shape for group in saved.shapes for name, shape in group.items()}
    files = {name: saved.folder / "zero" / name / "fp32.pt" for name in shapes}
    for file in files.values():
        _there(file, f"the masters of every parameter, zero/{file.parent.name}/fp32.pt of them")
    return {
        name: partial(_read_universal, file, shapes[name], _target(saved, name, dtype)) for name, file in files.items()
    }


def _read_universal(file: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    held: Any = load_pickle(file)
    tensor = held.get("param") if isinstance(held, Mapping) else held
    if not isinstance(tensor, Tensor) or tensor.numel() != math.prod(shape):
        got = f"{tensor.numel()}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise GradscaleError(
            f"checkpoint {file} must hold the {math.prod(shape)} masters of a parameter, got {got}; convert the tag "
            "again with ds_to_universal.py"
        )
    return Place(shape, [Section([tensor], 0, tensor.numel())]).read(dtype)
