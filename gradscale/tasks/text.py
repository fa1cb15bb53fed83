"""Token ids of a table's rows, and their padding.

Shapes: B rows, T positions (of the longest row of the batch).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.tasks.columns import BadRow, is_integer, is_list, is_text, refuse_nulls
from gradscale.tasks.pretrained import transformers

if TYPE_CHECKING:
    import pyarrow as pa

BYTES = "bytes"  # the tokenizer without a vocabulary: UTF-8 bytes, ids 0 to 255
MASK_COLUMN = "attention_mask"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.bpe.model")


@dataclass(frozen=True)
class TokenColumn:
    """Where the token ids of a row come from: a column of ids, or of text and a tokenizer.

    `tokenizer` is None (the column holds ids), `bytes`, or a folder. Rows are cut to `max_length`. With
    `mask`, the column `attention_mask` says which entries of the ids are padding (0): they are taken out.
    """

    name: str
    tokenizer: str | None
    max_length: int
    vocabulary: int | None
    mask: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.name, MASK_COLUMN) if self.mask else (self.name,)

    def read(self, table: pa.Table) -> list[list[int]]:
        """The token ids of each row. Raises: BadRow for a null, and for an id beyond the vocabulary."""
        if self.tokenizer is None:
            rows = self.read_aligned(table, self.name)
        else:
            rows = encode(self.tokenizer, _strings(table, self.name), self.max_length)
        for row, ids in enumerate(rows):
            if self.vocabulary is not None and ids and not 0 <= min(ids) <= max(ids) < self.vocabulary:
                raise BadRow(
                    row,
                    f"must have token ids from 0 to {self.vocabulary - 1}, got {min(ids)} to {max(ids)}; "
                    "use the tokenizer of the model",
                )
        return rows

    def read_aligned(self, table: pa.Table, name: str) -> list[list[int]]:
        """Lists of integers, one entry a token, without the entries that are padding, cut like the ids."""
        rows = integer_lists(table, name)
        if self.mask:
            masks = integer_lists(table, MASK_COLUMN)
            rows = [_kept(i, values, mask) for i, (values, mask) in enumerate(zip(rows, masks, strict=True))]
        return [values[: self.max_length] for values in rows]


def token_column(
    names: Collection[str],
    source: str,
    *,
    text: str,
    ids: str,
    tokenizer: str | None,
    model_dir: str | None,
    max_length: int,
    config: Any | None,
) -> TokenColumn:
    """The column `ids` if `source` has it, else the column `text` and its tokenizer.

    Without `tokenizer`: that of the folder `model_dir` if it has one, else bytes. `max_length` is
    lowered to the model's number of positions.
    Raises: GradscaleError if there is neither column, or no such tokenizer.
    """
    if max_length < 1:
        raise GradscaleError(f"max_length must be at least 1, got {max_length}; 512 is the default")
    length = min(max_length, getattr(config, "max_position_embeddings", None) or max_length)
    vocabulary = getattr(config, "vocab_size", None)
    if ids in names:
        return TokenColumn(ids, None, length, vocabulary, mask=MASK_COLUMN in names)
    if text not in names:
        raise GradscaleError(
            f"data {source} must have a column {ids} (token ids) or {text} (text), got {', '.join(names)}; "
            "name it with text_column=... or input_ids_column=..."
        )
    if tokenizer is None:
        tokenizer = model_dir if model_dir is not None and has_tokenizer(model_dir) else BYTES
    elif tokenizer != BYTES and not has_tokenizer(tokenizer):
        raise GradscaleError(
            f"tokenizer must be {BYTES} or a folder with one of {', '.join(TOKENIZER_FILES)}, got {tokenizer}; "
            "save it there with tokenizer.save_pretrained(DIR)"
        )
    return TokenColumn(text, tokenizer, length, vocabulary)


def has_tokenizer(folder: str) -> bool:
    root = Path(folder).expanduser()
    return root.is_dir() and any(next(root.glob(name), None) is not None for name in TOKENIZER_FILES)


def encode(tokenizer: str, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """The token ids of each text, with the tokenizer's special tokens, cut to `max_length`."""
    if tokenizer == BYTES:
        return [list(text.encode("utf-8")[:max_length]) for text in texts]
    if not texts:
        return []
    encoded = _tokenizer(tokenizer)(list(texts), truncation=True, max_length=max_length)
    return [list(ids) for ids in encoded["input_ids"]]


@lru_cache(maxsize=4)
def _tokenizer(folder: str) -> Any:
    return transformers().AutoTokenizer.from_pretrained(
        str(Path(folder).expanduser()), local_files_only=True, trust_remote_code=False
    )


def padding_id(config: Any | None) -> int:
    """The id that fills up short rows: the config's own if it is in the vocabulary, else 0."""
    own = getattr(config, "pad_token_id", None)
    return own if isinstance(own, int) and 0 <= own < getattr(config, "vocab_size", own + 1) else 0


def pad(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """The rows as [B, T] int64, filled up on the right."""
    longest = max(map(len, rows), default=0)
    padded = [[*row, *[fill] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), longest)


def attention_mask(rows: Sequence[Sequence[int]]) -> Tensor:
    """[B, T] int64: 1 at tokens, 0 at padding."""
    return pad([[1] * len(row) for row in rows], 0)


def integer_lists(table: pa.Table, name: str) -> list[list[int]]:
    """A column of lists of integers. Raises: GradscaleError for another type, BadRow for a null."""
    column = table.column(name)
    if column.null_count < len(column) and not (is_list(column.type) and is_integer(column.type.value_type)):
        raise GradscaleError(f"column {name} must hold lists of integers, got {column.type}; name another column")
    refuse_nulls(column, name)
    rows: list[list[int]] = column.to_pylist()
    for row, values in enumerate(rows):
        if None in values:
            raise BadRow(row, f"must have integers in column {name}, got null; fill it in or drop the row")
    return rows


def _strings(table: pa.Table, name: str) -> list[str]:
    column = table.column(name)
    if not is_text(column.type):
        raise GradscaleError(f"column {name} must hold text, got {column.type}; name another with text_column=...")
    refuse_nulls(column, name)
    return [str(value) for value in column.to_pylist()]


def _kept(row: int, values: Sequence[int], mask: Sequence[int]) -> list[int]:
    if len(values) != len(mask):
        raise BadRow(row, f"must have one {MASK_COLUMN} a token, got {len(mask)} for {len(values)}; write it again")
    return [value for value, kept in zip(values, mask, strict=True) if kept]
