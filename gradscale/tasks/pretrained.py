"""A transformers model from a folder, a config.json or a checkpoint.

Nothing is downloaded and no code that came with a model is run. `transformers` is imported inside
functions only.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from gradscale import weights
from gradscale.errors import GradscaleError

Head = Literal["causal-lm", "sequence", "image"]

AUTO_CLASSES: dict[Head, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence": "AutoModelForSequenceClassification",
    "image": "AutoModelForImageClassification",
}
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}


def load_model(
    head: Head,
    model_dir: str | None,
    checkpoint: str | None,
    *,
    seed: int,
    dtype: str,
    attn_implementation: str | None,
    changes: Mapping[str, Any],
) -> Any:
    """The `PreTrainedModel` with `head` at `checkpoint`, in eval mode and without a key-value cache.

    `checkpoint` None: the weights in the folder `model_dir` (a new head where they have none), or, if it
    is a config.json or a folder without weights, random ones from `seed`. A Hugging Face folder with its
    own config.json: as it is. Otherwise the weights of `weights.load_state_dict` in the architecture
    of `model_dir`. `changes` are put into the config that is used.

    The global random state is left as it was.
    Raises: GradscaleError if there is no config, or a checkpoint's names or shapes differ from the model's.
    """
    source = config_source(model_dir, checkpoint)
    options = {"dtype": _dtype(dtype)} | ({"attn_implementation": attn_implementation} if attn_implementation else {})
    config = read_config(source, changes)
    with seeded(seed):
        if source == checkpoint or (checkpoint is None and weights.has_weights(Path(source).expanduser())):
            model = _from_folder(head, source, config, options, new_head=checkpoint is None and head != "causal-lm")
        else:
            model = _from_config(head, source, config, options)
    if checkpoint is not None and source != checkpoint:
        load_strictly(model, weights.load_state_dict(checkpoint), checkpoint)
    return model.eval()


def config_source(model_dir: str | None, checkpoint: str | None) -> str:
    """Where the config is: the checkpoint if it is a folder with its own config.json and weights, else `model_dir`."""
    source = checkpoint if checkpoint is not None and _is_model_folder(checkpoint) else model_dir
    if source is None:
        raise GradscaleError(
            "model must be a transformers model folder or a config.json, got none; pass --model (model_dir=...)"
        )
    return source


def read_config(source: str, changes: Mapping[str, Any]) -> Any:
    """The transformers config in the folder or file `source`, with `changes` and `use_cache=False`."""
    file = Path(source).expanduser()
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise GradscaleError(
            f"model must be a folder with a config.json, or such a file, got {source}; "
            "to use a model of the Hugging Face hub, first run `hf download NAME --local-dir DIR`"
        )
    try:
        config = transformers().AutoConfig.from_pretrained(str(file), trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise GradscaleError(
            f"model config {file} must be of an architecture that the installed transformers knows, got {error}; "
            "check model_type, or upgrade transformers"
        ) from error
    for name, value in ({"use_cache": False} | dict(changes)).items():
        setattr(config, name, value)
    return config


def head_of(config: Any, source: str) -> Literal["sequence", "image"]:
    """Whether a classifier with this config reads text or images, from its `architectures`, else its model type."""
    from transformers.models.auto import modeling_auto

    declared = str(config.architectures)
    of_images = config.model_type in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    of_text = config.model_type in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if "ForImageClassification" in declared or (of_images and not of_text):
        return "image"
    if "ForSequenceClassification" in declared or (of_text and not of_images):
        return "sequence"
    raise GradscaleError(
        f"model {source} must be a sequence or image classifier, got model_type {config.model_type} with architectures "
        f"{config.architectures}; set architectures in its config.json, or use a task of your own"
    )


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Puts `state` into `model`, cast to its dtype. Tied parameters need be there under one name only.

    Raises: GradscaleError if names are missing or unexpected, shapes differ, or tied parameters have
    different values.
    """
    own: dict[str, Tensor] = model.state_dict(keep_vars=True)
    loaded = {id(tensor): name for name, tensor in own.items() if name in state}
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    unexpected = [name for name in state if name not in own and not any(p.search(name) for p in ignored)]
    _refuse(source, "missing", [name for name, tensor in own.items() if id(tensor) not in loaded])
    _refuse(source, "unexpected", unexpected)
    both = [name for name in own if name in state]
    shapes = [f"{n} {tuple(state[n].shape)} instead of {tuple(own[n].shape)}" for n in both]
    _refuse(source, "other shapes of", [s for s, n in zip(shapes, both, strict=True) if state[n].shape != own[n].shape])
    untied = [name for name in both if not torch.equal(state[name], state[loaded[id(own[name])]])]
    _refuse(source, "different values of the tied", untied)
    model.load_state_dict({name: state[name] for name in both}, strict=False)


def _refuse(source: str, what: str, names: Collection[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:4]) + (", …" if len(names) > 4 else "")
        raise GradscaleError(
            f"checkpoint {source} must hold exactly the model's parameters, got {len(names)} {what}: {shown}; "
            "check that --model is the architecture that was trained"
        )


def _is_model_folder(path: str) -> bool:
    folder = Path(path).expanduser()
    return (folder / "config.json").is_file() and weights.has_weights(folder)


def _from_config(head: Head, source: str, config: Any, options: Mapping[str, Any]) -> Any:
    try:
        return getattr(transformers(), AUTO_CLASSES[head]).from_config(config, trust_remote_code=False, **options)
    except (ValueError, ImportError) as error:
        raise _not_built(head, source, error) from error


def _from_folder(head: Head, source: str, config: Any, options: Mapping[str, Any], *, new_head: bool) -> Any:
    """The weights in a folder; `new_head` allows a head that they lack, left at its random values."""
    from safetensors import SafetensorError

    auto = getattr(transformers(), AUTO_CLASSES[head])
    folder = str(Path(source).expanduser())
    fixed = {"local_files_only": True, "trust_remote_code": False, "weights_only": True, "output_loading_info": True}
    try:
        with _no_progress_bar():
            model, info = auto.from_pretrained(folder, config=config, **fixed, **options)
    except (ValueError, ImportError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        raise _not_built(head, source, error) from error
    trunk = f"{model.base_model_prefix}."
    allowed = {name for name in info["missing_keys"] if new_head and (not name.startswith(trunk) or "pooler" in name)}
    _refuse(source, "missing", set(info["missing_keys"]) - allowed)
    if not new_head:
        _refuse(source, "unexpected", info["unexpected_keys"])
    return model


def _not_built(head: Head, source: str, error: Exception) -> GradscaleError:
    return GradscaleError(
        f"model {source} must be one that {AUTO_CLASSES[head]} can load with these options, got {error}; "
        "check model_type, num_labels and attn_implementation"
    )


def mean_embedding(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """[B, E]: the mean of the input embeddings of token ids [B, T] where `mask` [B, T] is not 0."""
    embedded: Tensor = cast(Any, model).get_input_embeddings()(ids)
    kept = mask.to(embedded.dtype)[:, :, None]
    return (embedded * kept).sum(dim=1) / kept.sum(dim=1)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise GradscaleError(f"dtype must be one of {', '.join(DTYPES)}, got {name}; float32 is the default")
    return DTYPES[name]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The CPU's random state from `seed` inside, as it was before outside."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    logging = transformers().utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def transformers() -> Any:
    """The transformers package. Raises: GradscaleError if it is not installed."""
    try:
        import transformers as package
    except ModuleNotFoundError as error:
        raise GradscaleError(
            f"transformers must be installed for this task, got {error}; pip install transformers"
        ) from error
    return package


def embeddings(model: Any, ids: Tensor) -> Tensor:
    """[B, T, E]: what the module for token embeddings gives for these ids."""
    found: Tensor = model.get_input_embeddings()(ids)
    return found


@contextmanager
def embedding_as(model: Any, inputs: Tensor) -> Iterator[None]:
    """While it lasts, the module for token embeddings gives `inputs` whatever the ids.

    A model's own `inputs_embeds` would hide the ids from it, by which some find the last token or the positions.
    """
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, output: inputs)
    try:
        yield
    finally:
        handle.remove()
