"""A transformers classifier of text or images.

Shapes: B examples, T positions, C classes, an image [channels, height, width].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradscale.errors import GradscaleError
from gradscale.task import Batch, Examples
from gradscale.tasks import pretrained, table_files, tables, text
from gradscale.tasks.columns import BadRow, is_integer, to_tensor
from gradscale.tasks.text import TokenColumn

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Classification:
    """Cross-entropy of each example's class, in nats, for sequence and image classifiers.

    `model_dir`: a transformers model folder, or a config.json or a folder without weights for random
    weights from `seed`; a folder without a classification head gets a random one from `seed`. The config
    says whether the model reads text or images. `data`: Parquet or JSON lines with integer classes in
    `label_column`, and for images `pixel_column` (what the model's image processor gives, [C, H, W] or
    flat), for text `input_ids_column` (with `attention_mask`, if there is one), else `text_column`.
    `tokenizer`: a folder, or `bytes`; by default the model folder's, else bytes. Texts are cut to
    `max_length` and to the model's number of positions. `num_labels`: C, by default the config's.

    Padding is on the right and masked, so that an example has the loss and the gradient it has alone.
    """

    data: str
    model_dir: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    input_ids_column: str = "input_ids"
    pixel_column: str = "pixel_values"
    tokenizer: str | None = None
    max_length: int = 512
    num_labels: int | None = None
    seed: int = 0
    dtype: str = "float32"
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        if self.num_labels is not None and self.num_labels < 2:
            raise GradscaleError(f"num_labels must be at least 2, got {self.num_labels}; leave it out for the config's")

    def model(self, checkpoint: str | None) -> nn.Module:
        source = pretrained.config_source(self.model_dir, checkpoint)
        head = pretrained.head_of(self._config(source), source)
        model: Any = pretrained.load_model(
            head,
            self.model_dir,
            checkpoint,
            seed=self.seed,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            changes=self._changes(),
        )
        if head == "sequence":  # a decoder's head takes the last position that holds another id
            model.config.pad_token_id = text.padding_id(self._config(self.model_dir))
        assert isinstance(model, nn.Module)
        return model

    def examples(self) -> Examples:
        names = tables.column_names(self.data)
        table_files.check_column(self.label_column, names, self.data)
        config = self._config(self.model_dir)
        classes = Classes(self.label_column, getattr(config, "num_labels", self.num_labels))
        decode: DecodeText | DecodeImages
        if self._head(config, names) == "image":
            table_files.check_column(self.pixel_column, names, self.data)
            decode = DecodeImages(self.pixel_column, classes, _image_shape(config))
        else:
            decode = DecodeText(self._tokens(config, names), classes, text.padding_id(config))
        return tables.open_examples(self.data, decode.columns, decode)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits [B, C]."""
        if "pixel_values" in batch:
            return self.outputs_of(model, self.inputs(model, batch), batch)
        return _text_logits(model, batch)

    def inputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The pixels [B, channels, height, width], or the embeddings of the tokens [B, T, E], in the model's dtype."""
        if "pixel_values" in batch:
            return batch["pixel_values"].to(next(model.parameters()).dtype)
        return pretrained.embeddings(model, batch["input_ids"])

    def outputs_of(self, model: nn.Module, inputs: Tensor, batch: Batch) -> Tensor:
        """The logits [B, C] of the model given these pixels, or these embeddings for those of its tokens."""
        if "pixel_values" in batch:
            logits: Tensor = model(pixel_values=inputs).logits
            return logits
        with pretrained.embedding_as(model, inputs):
            return _text_logits(model, batch)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """[B]: the cross-entropy of each example, in at least float32."""
        logits = self.outputs(model, batch)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, batch["labels"], reduction="none")

    def labels(self, batch: Batch) -> Tensor:
        """The classes [B], int64."""
        return batch["labels"]

    def input_vectors(self, model: nn.Module, batch: Batch) -> Tensor:
        """[B, d]: the pixels, or the mean over a text's tokens of what the embedding gives."""
        if "pixel_values" in batch:
            return batch["pixel_values"].flatten(1)
        return pretrained.mean_embedding(model, batch["input_ids"], batch["attention_mask"])

    def _changes(self) -> dict[str, Any]:
        return {} if self.num_labels is None else {"num_labels": self.num_labels}

    def _config(self, source: str | None) -> Any | None:
        return None if source is None else pretrained.read_config(source, self._changes())

    def _head(self, config: Any | None, names: Sequence[str]) -> Literal["sequence", "image"]:
        if config is None:
            return "image" if self.pixel_column in names else "sequence"
        return pretrained.head_of(config, str(self.model_dir))

    def _tokens(self, config: Any | None, names: Sequence[str]) -> TokenColumn:
        return text.token_column(
            names,
            self.data,
            text=self.text_column,
            ids=self.input_ids_column,
            tokenizer=self.tokenizer,
            model_dir=self.model_dir,
            max_length=self.max_length,
            config=config,
        )


def _text_logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits


@dataclass(frozen=True)
class Classes:
    """The column of classes, 0 to count - 1 (count None: not known here)."""

    column: str
    count: int | None

    def read(self, table: pa.Table) -> Tensor:
        """[B] int64. Raises: GradscaleError if they are not integers, BadRow if one is out of range."""
        kind = table.schema.field(self.column).type
        if not is_integer(kind):
            raise GradscaleError(
                f"column {self.column} must hold integer classes, got {kind}; number the classes from 0"
            )
        labels = to_tensor(table, self.column)
        for row, label in enumerate(labels.tolist()):
            if label < 0 or (self.count is not None and label >= self.count):
                expected = "of at least 0" if self.count is None else f"from 0 to {self.count - 1}"
                raise BadRow(row, f"must have a class {expected}, got {label}; set num_labels=...")
        return labels.to(torch.int64)


@dataclass(frozen=True)
class DecodeText:
    """A table of texts to `input_ids` and `attention_mask` [B, T], padded on the right, and `labels` [B]."""

    tokens: TokenColumn
    classes: Classes
    pad_id: int

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.tokens.columns, self.classes.column)

    def __call__(self, table: pa.Table) -> dict[str, Tensor]:
        ids = self.tokens.read(table)
        for row in range(len(ids)):
            if not ids[row]:
                raise BadRow(row, "must have at least one token, got none; drop it from the data")
        return {
            "input_ids": text.pad(ids, self.pad_id),
            "attention_mask": text.attention_mask(ids),
            "labels": self.classes.read(table),
        }


@dataclass(frozen=True)
class DecodeImages:
    """A table of images to `pixel_values` [B, channels, height, width] and `labels` [B].

    `shape` is that of one image, where known, for columns that hold flat images.
    """

    column: str
    classes: Classes
    shape: tuple[int, int, int] | None

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column, self.classes.column)

    def __call__(self, table: pa.Table) -> dict[str, Tensor]:
        pixels = to_tensor(table, self.column)
        if pixels.dtype == torch.uint8:
            raise GradscaleError(
                f"column {self.column} must hold floats, got uint8; apply the model's image processor before writing it"
            )
        if pixels.dim() == 2 and self.shape is not None and pixels[:1].numel() in (0, torch.Size(self.shape).numel()):
            pixels = pixels.reshape(len(pixels), *self.shape)
        if pixels.dim() != 4:
            raise GradscaleError(
                f"column {self.column} must hold images [channels, height, width]{self._or_flat()}, "
                f"got rows of shape {tuple(pixels.shape[1:])}; write nested lists"
            )
        return {"pixel_values": pixels.to(torch.float32), "labels": self.classes.read(table)}

    def _or_flat(self) -> str:
        return "" if self.shape is None else f" or {torch.Size(self.shape).numel()} numbers for {self.shape}"


def _image_shape(config: Any | None) -> tuple[int, int, int] | None:
    channels, size = getattr(config, "num_channels", None), getattr(config, "image_size", None)
    if channels is None or size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return int(channels), int(height), int(width)
