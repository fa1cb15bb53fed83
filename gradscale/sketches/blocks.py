"""How maps are applied and kept: dense ones by blocks of their matrix, others tile by tile.

What a map is made of depends on its key alone, and every microbatch asks for the same: it is kept while a
budget for each process lasts, and made again from its counters beyond it.

Shapes: B examples, b of them in a tile, R rows and C columns of the parameter, P = R C, p of them in a tile, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gradscale.grads import sweep
from gradscale.grads.layer import LayerGrads
from gradscale.grads.readings import DenseMap, TiledMap
from gradscale.grads.sweep import Request, empty_sums, read

_CACHE_BYTES = 1 << 30
_TILE_ENTRIES = 1 << 16  # of a parameter in a tile
_CPU_TILE = 1 << 18  # entries of a tile's examples together: 1 MB of float32, and a few times that while it is read
_GPU_TILE = 1 << 26


class Cache:
    """Tensors of this process by name, never evicted: all of them are in use."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[Any, ...], Tensor] = {}
        self._bytes = 0

    def get(self, name: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        if name in self.tensors:
            return self.tensors[name]
        made = make()
        if self._bytes + made.nbytes <= _CACHE_BYTES:
            self.tensors[name] = made
            self._bytes += made.nbytes
        return made


_cache = Cache()


def kept(name: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
    """What `make` gives; `name` must say everything that it depends on, the device too."""
    return _cache.get(name, make)


def entries_kept() -> int:
    """How many numbers of float32 a process keeps."""
    return _CACHE_BYTES // 4


def apply_rows(dense: DenseMap, parameter: str, grads: LayerGrads) -> Tensor:
    """[B, K] float64: the gradients times the map's matrix, block by block."""
    total = torch.zeros(grads.shape[0], dense.dim, dtype=torch.float64, device=grads.device)

    def rows(start: int, stop: int) -> Tensor:
        return dense.rows(parameter, start, stop, grads.device)

    read(grads, Request(None, (), ((rows, total),)))
    return total


def apply_fold(tiled: TiledMap, parameter: str, grads: LayerGrads) -> Tensor:
    """[B, K] float64: the gradients folded tile by tile."""
    fold = tiled.fold(parameter, grads.shape[1:], grads.device)
    sums = empty_sums(fold, grads)
    read(grads, Request(None, (), (), ((fold, sums),)))
    total = torch.zeros(grads.shape[0], tiled.dim, dtype=torch.float64, device=grads.device)
    fold.finish(sums, total)
    return total


def tiles(grads: LayerGrads) -> Iterator[tuple[slice, slice, Tensor]]:
    """As `sweep.tiles`, of a size for maps that make several tensors of a tile."""
    batch, rows, columns = grads.shape
    budget = _CPU_TILE if grads.device.type == "cpu" else _GPU_TILE
    height = min(rows, max(1, _TILE_ENTRIES // columns))
    return sweep.tiles(grads, height, min(batch, max(1, budget // (columns * height))))
