"""A transformers causal language model on text or token ids.

Shapes: B examples, T positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradscale.errors import GradscaleError
from gradscale.task import Batch, Examples
from gradscale.tasks import pretrained, tables, text
from gradscale.tasks.columns import BadRow
from gradscale.tasks.text import TokenColumn

if TYPE_CHECKING:
    import pyarrow as pa

IGNORED = -100  # a label that is not predicted, as everywhere in transformers


@dataclass(frozen=True)
class CausalLM:
    """Next-token cross-entropy of each sequence, in nats.

    `model_dir`: a transformers model folder, or a config.json or a folder without weights for random
    weights from `seed`. `data`: Parquet or JSON lines with the column `input_ids_column` (and, if there is
    one, `labels_column`, where -100 is not predicted; and `attention_mask`, whose zeros are taken out), else
    with `text_column`. `tokenizer`: a folder, or `bytes`; by default the model folder's, else bytes.
    Sequences are cut to `max_length` and to the model's number of positions. `reduction`: the mean or the
    sum over the sequence's own predicted tokens.

    Padding is on the right and masked, so that a sequence has the loss and the gradient it has alone.
    Raises: GradscaleError, from the batch, for a sequence without a predicted token.
    """

    data: str
    model_dir: str | None = None
    text_column: str = "text"
    input_ids_column: str = "input_ids"
    labels_column: str = "labels"
    tokenizer: str | None = None
    max_length: int = 512
    reduction: Literal["mean", "sum"] = "mean"
    seed: int = 0
    dtype: str = "float32"
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise GradscaleError(f"reduction must be mean or sum, got {self.reduction}; mean is the default")

    def model(self, checkpoint: str | None) -> nn.Module:
        model: nn.Module = pretrained.load_model(
            "causal-lm",
            self.model_dir,
            checkpoint,
            seed=self.seed,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            changes={},
        )
        return model

    def examples(self) -> Examples:
        config = None if self.model_dir is None else pretrained.read_config(self.model_dir, {})
        names = tables.column_names(self.data)
        tokens = text.token_column(
            names,
            self.data,
            text=self.text_column,
            ids=self.input_ids_column,
            tokenizer=self.tokenizer,
            model_dir=self.model_dir,
            max_length=self.max_length,
            config=config,
        )
        labels = self.labels_column if tokens.tokenizer is None and self.labels_column in names else None
        decode = DecodeSequences(tokens, labels, text.padding_id(config))
        return tables.open_examples(self.data, decode.columns, decode)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """[B]: the cross-entropy of each sequence's predicted tokens, in at least float32."""
        return next_token_losses(_logits(model, batch), batch["labels"], self.reduction)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """[B, (T - 1) V]: the logits of every predicted token, one after another; zeros for those not predicted."""
        return predicted_logits(_logits(model, batch), batch["labels"])

    def inputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The embeddings of the tokens [B, T, E], before what the model adds for their positions."""
        return pretrained.embeddings(model, batch["input_ids"])

    def outputs_of(self, model: nn.Module, inputs: Tensor, batch: Batch) -> Tensor:
        with pretrained.embedding_as(model, inputs):
            return self.outputs(model, batch)

    def input_vectors(self, model: nn.Module, batch: Batch) -> Tensor:
        """[B, d]: the mean over each sequence's tokens of what the embedding gives."""
        return pretrained.mean_embedding(model, batch["input_ids"], batch["attention_mask"])


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logits: Tensor = output.logits
    return logits


def predicted_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, (T - 1) V] from logits [B, T, V] and labels [B, T]: those of position t, where label t + 1 is not -100."""
    predicted = (labels[:, 1:] != IGNORED)[:, :, None]
    return logits[:, :-1].where(predicted, 0.0).flatten(1)


def next_token_losses(logits: Tensor, labels: Tensor, reduction: Literal["mean", "sum"]) -> Tensor:
    """[B] from logits [B, T, V] and labels [B, T]: position t predicts label t + 1, where it is not -100."""
    predicted = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    targets = labels[:, 1:]
    losses = F.cross_entropy(predicted.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
    total = losses.sum(dim=1)
    return total if reduction == "sum" else total / (targets != IGNORED).sum(dim=1)


@dataclass(frozen=True)
class DecodeSequences:
    """A table of sequences to `input_ids`, `attention_mask` and `labels`, each [B, T], padded on the right."""

    tokens: TokenColumn
    labels_column: str | None
    pad_id: int

    @property
    def columns(self) -> tuple[str, ...]:
        return self.tokens.columns + ((self.labels_column,) if self.labels_column else ())

    def __call__(self, table: pa.Table) -> dict[str, Tensor]:
        ids = self.tokens.read(table)
        labels = self.tokens.read_aligned(table, self.labels_column) if self.labels_column else ids
        for row in range(len(ids)):
            self._check(row, ids[row], labels[row])
        return {
            "input_ids": text.pad(ids, self.pad_id),
            "attention_mask": text.attention_mask(ids),
            "labels": text.pad(labels, IGNORED),
        }

    def _check(self, row: int, ids: list[int], labels: list[int]) -> None:
        if len(ids) < 2:
            raise BadRow(row, f"must have at least two tokens, got {len(ids)}; drop it from the data")
        if len(labels) != len(ids):
            raise BadRow(row, f"must have one label a token, got {len(labels)} for {len(ids)}; write it again")
        predicted = [label for label in labels[1:] if label != IGNORED]
        if not predicted:
            raise BadRow(
                row,
                f"must have a label other than {IGNORED} after the first of its {len(ids)} tokens, got none; "
                "drop it from the data, or raise max_length if it was cut off",
            )
        vocabulary = self.tokens.vocabulary
        if vocabulary is not None and not 0 <= min(predicted) <= max(predicted) < vocabulary:
            raise BadRow(
                row,
                f"must have labels from 0 to {vocabulary - 1}, or {IGNORED}, got {min(predicted)} to {max(predicted)}; "
                "use the tokenizer of the model",
            )
