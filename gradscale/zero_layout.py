"""Where DeepSpeed's flat vectors hold the parameters, and how one of them is put together.

A parameter lies in one section or more, each a range of the vector that some tensors make one after another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.errors import GradscaleError

Shapes = Sequence[Mapping[str, Sequence[int]]]  # of every parameter group, the parameters in the order of the vector


class Section(NamedTuple):
    """The entries from `start` on of what the tensors make one after another."""

    vector: Sequence[Tensor]
    start: int
    length: int

    def pieces(self) -> Iterator[Tensor]:
        """Views, in order."""
        start, length = self.start, self.length
        for tensor in self.vector:
            if start < tensor.numel() and length > 0:
                piece = tensor.detach().view(-1)[start : start + length]
                length -= piece.numel()
                yield piece
            start = max(0, start - tensor.numel())


class Place(NamedTuple):
    """Where a parameter is."""

    shape: Sequence[int]
    sections: Sequence[Section]

    def read(self, dtype: torch.dtype) -> Tensor:
        """The parameter, put together; takes no memory but its own."""
        whole = torch.empty(tuple(self.shape), dtype=dtype)
        flat, filled = whole.view(-1), 0
        for piece in chain.from_iterable(section.pieces() for section in self.sections):
            flat[filled : filled + piece.numel()].copy_(piece)
            filled += piece.numel()
        return whole


def interleaved(shapes: Shapes, ranks: Sequence[Sequence[Tensor]], folder: Path) -> dict[str, Place]:
    """Stage 3: every rank's vector holds its ceil(P / W) entries of each parameter, the last ones' ends padded.

    Raises: GradscaleError if a rank's vector has another length.
    """
    found, start = dict[str, Place](), 0
    for name, shape in chain.from_iterable(group.items() for group in shapes):
        entries = math.prod(shape)
        share = math.ceil(entries / len(ranks))
        taken = [max(0, min(share, entries - rank * share)) for rank in range(len(ranks))]
        found[name] = Place(shape, [Section(v, start, length) for v, length in zip(ranks, taken, strict=True)])
        start += share
    for rank, vector in enumerate(ranks):
        size = sum(tensor.numel() for tensor in vector)
        if size != start:
            raise other_size(folder, f"{start} masters of rank {rank}", size)
    return found


def consecutive(
    shapes: Shapes, paddings: Sequence[Sequence[int]] | None, ranks: Sequence[Sequence[Tensor]], folder: Path
) -> dict[str, Place]:
    """Stages 1 and 2: a group is one vector, cut into a tensor for each rank; `paddings` follow its parameters.

    Raises: GradscaleError if a group's vector has not about the length of its parameters; at the end it may be padded
    to a multiple of 2 W.
    """
    found = dict[str, Place]()
    gaps = paddings or [[0] * len(group) for group in shapes]
    for index, group in enumerate(shapes):
        vector, start, end = [rank[index] for rank in ranks], 0, 0
        for (name, shape), gap in zip(group.items(), gaps[index], strict=True):
            found[name] = Place(shape, [Section(vector, start, math.prod(shape))])
            end = start + math.prod(shape)
            start = end + gap
        size, unit = sum(tensor.numel() for tensor in vector), 2 * len(ranks)
        if size < end or math.ceil(size / unit) > math.ceil(start / unit):
            raise other_size(folder, f"{end} masters of parameter group {index}", size)
    return found


def other_size(folder: Path, expected: str, got: int) -> GradscaleError:
    """The error for vectors that do not fit the shapes."""
    return GradscaleError(
        f"checkpoint {folder} must hold {expected}, got {got}; its files are of different runs or steps, or cut: copy "
        "the whole folder again"
    )
