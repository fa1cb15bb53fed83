"""Dense Gaussian maps: probes of the Gaussian width, and the reference Johnson-Lindenstrauss sketch.

Entry (p, k) of a parameter's [P, K] block is a standard normal keyed by (version, seed, role, parameter)
and counted by (p, k): the same on every machine, device and sharding. Blocks are kept within a memory
budget for each process and made again from their counters beyond it.

Shapes: B examples, P entries of one parameter, K outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.grads.layer import LayerGrads
from gradscale.sketches.philox import Key, key_of, normals

VERSION = 1
_BLOCK_ENTRIES = 1 << 22
_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class GaussianProbes:
    """K independent standard normal vectors v_k: apply gives <g_b, v_k>. Cost: P K products an example.

    The first K' < K probes of a seed are the same whatever K is.
    """

    dim: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_dim("number of probes", self.dim)

    def apply(self, parameter: str, grads: LayerGrads) -> Tensor:
        return _project(key_of("gaussian", VERSION, self.seed, "probe", parameter), self.dim, grads)

    def materialize(self, parameter: str, size: int) -> Tensor:
        """[P, K] float32: the definition."""
        return _block(key_of("gaussian", VERSION, self.seed, "probe", parameter), 0, size, self.dim, "cpu")


@dataclass(frozen=True)
class GaussianSketch:
    """x -> S x with independent entries N(0, 1/K): unbiased for inner products, E <Sx, Sy> = <x, y>.

    The variance of <Sx, Sy> is (|x|^2 |y|^2 + <x, y>^2) / K. Source: Johnson and Lindenstrauss (1984).
    """

    dim: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_dim("sketch dimension", self.dim)

    @property
    def scheme(self) -> dict[str, object]:
        """What makes two sketches comparable; kept beside them."""
        return {"name": "gaussian", "version": VERSION, "seed": self.seed, "dim": self.dim}

    def apply(self, parameter: str, grads: LayerGrads) -> Tensor:
        key = key_of("gaussian", VERSION, self.seed, "sketch", parameter)
        return _project(key, self.dim, grads) * math.sqrt(1 / self.dim)

    def materialize(self, parameter: str, size: int) -> Tensor:
        """[P, K] float32: the definition, up to the last rounding."""
        key = key_of("gaussian", VERSION, self.seed, "sketch", parameter)
        return _block(key, 0, size, self.dim, "cpu") * math.sqrt(1 / self.dim)


def check_dim(what: str, dim: int) -> None:
    if dim < 1:
        raise GradscaleError(f"{what} must be at least 1, got {dim}")


def _project(key: Key, dim: int, grads: LayerGrads) -> Tensor:
    """[B, K]: the gradients times the parameter's block, a group of examples and a block of rows at a time."""
    parts = []
    for group in grads.split():
        dense = group.materialize()
        total = dense.new_zeros(dense.shape[0], dim)
        for start, stop in _row_blocks(dense.shape[1], dim):
            total += dense[:, start:stop] @ _cached(key, start, stop, dim, str(dense.device)).to(dense.dtype)
        parts.append(total)
    return torch.cat(parts)


def _row_blocks(size: int, dim: int) -> Iterator[tuple[int, int]]:
    rows = max(1, _BLOCK_ENTRIES // dim)
    for start in range(0, size, rows):
        yield start, min(start + rows, size)


def _block(key: Key, start: int, stop: int, dim: int, device: str) -> Tensor:
    return normals(key, start, stop, dim, torch.device(device))


_cache: dict[tuple[Key, int, int, int, str], Tensor] = {}  # blocks of this process, never evicted: they are in use


def _cached(key: Key, start: int, stop: int, dim: int, device: str) -> Tensor:
    name = (key, start, stop, dim, device)
    if name not in _cache:
        block = _block(key, start, stop, dim, device)
        if sum(kept.nbytes for kept in _cache.values()) + block.nbytes > _CACHE_BYTES:
            return block
        _cache[name] = block
    return _cache[name]
