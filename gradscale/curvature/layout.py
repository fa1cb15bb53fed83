"""The measured parameters one after another in one vector, its slices, and random probes of any slice.

Shapes: P entries in all, p of them in a slice, k vectors, W processes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradscale.errors import GradscaleError
from gradscale.sketches.philox import Key, key_of, normal_of
from gradscale.sketches.words import entry_signs, words

VERSION = 1
_CACHE_WORDS = 1 << 17  # made at a time


class Part(NamedTuple):
    """What a slice holds of one parameter."""

    name: str
    entries: range  # of the parameter, flattened
    place: slice  # where they are in the slice


@dataclass(frozen=True)
class Layout:
    """Parameters in a fixed order, each flattened row by row; entry `offsets[j]` is the first of parameter j."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, parameters: Mapping[str, nn.Parameter]) -> Layout:
        return cls(tuple(parameters), tuple(tuple(parameter.shape) for parameter in parameters.values()))

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def offsets(self) -> tuple[int, ...]:
        return (0, *itertools.accumulate(self.sizes))[:-1]

    @property
    def size(self) -> int:
        """P."""
        return sum(self.sizes)

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """[..., P] of one tensor [..., *shape] for each parameter; a single one is not copied."""
        flat = [
            tensor.reshape(*tensor.shape[: tensor.dim() - len(shape)], -1)
            for tensor, shape in zip(tensors, self.shapes, strict=True)
        ]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)

    def unflatten(self, vectors: Tensor) -> list[Tensor]:
        """Of [..., P], a tensor [..., *shape] for each parameter, in their order: views."""
        parts = vectors.split(self.sizes, dim=-1)
        return [part.view(*part.shape[:-1], *shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def share(self, rank: int, world: int) -> range:
        """The entries of process `rank` of `world`: ceil(P / W) each, fewer for the last ones.

        Raises: GradscaleError unless 0 <= rank < world.
        """
        if not 0 <= rank < world:
            raise GradscaleError(f"rank must be from 0 to {world - 1}, one of {world} processes, got {rank}; pass both")
        each = -(-self.size // world)
        return range(min(rank * each, self.size), min((rank + 1) * each, self.size))

    def parts(self, here: range) -> Iterator[Part]:
        """What the slice `here` holds, in its order; parameters of which it has nothing are left out."""
        for name, offset, size in zip(self.names, self.offsets, self.sizes, strict=True):
            first, last = max(here.start, offset), min(here.stop, offset + size)
            if first < last:
                yield Part(name, range(first - offset, last - offset), slice(first - here.start, last - here.start))


def gaussian(layout: Layout, here: range, seed: int, probes: Sequence[int], device: torch.device) -> Tensor:
    """[k, p] float32: the entries `here` of standard normal vectors, E |v|^2 = P, one for each number in `probes`.

    An entry depends on the seed, the probe's number, the parameter's name and the position in it alone: a probe is the
    same for any slicing, on every device. Not scaled to unit length: E v v^T = I.
    """
    return _probes(layout, here, seed, probes, device, "gaussian", _normals)


def rademacher(layout: Layout, here: range, seed: int, probes: Sequence[int], device: torch.device) -> Tensor:
    """[k, p] float32 of +1 and -1, |v|^2 = P exactly; otherwise as `gaussian`."""
    return _probes(layout, here, seed, probes, device, "rademacher", entry_signs)


def _probes(
    layout: Layout,
    here: range,
    seed: int,
    probes: Sequence[int],
    device: torch.device,
    kind: str,
    entries: Callable[[Key, int, int, torch.device], Tensor],
) -> Tensor:
    found = torch.empty(len(probes), len(here), device=device)
    for row, probe in zip(found, probes, strict=True):
        for name, part, place in layout.parts(here):
            key = key_of("curvature", kind, VERSION, seed, probe, name)
            row[place] = entries(key, part.start, part.stop, device)
    return found


def _normals(key: Key, start: int, stop: int, device: torch.device) -> Tensor:
    """[stop - start] float32 standard normals, by position: one word each."""
    blocks = range(start, stop, _CACHE_WORDS)
    return torch.cat([normal_of(words(key, p, min(p + _CACHE_WORDS, stop), device)) for p in blocks])
