"""Random words, signs and buckets by position: each depends on a key and the position alone, on every device.

Word p is word p % 4 of the Philox counter p // 4; a row of signs spends a bit for each, 128 of a counter.

Shapes: p entries of a parameter, K outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradscale.sketches.philox import Key, philox

_MASK = 0xFFFFFFFF
_BITS = 128  # of a counter
_CACHE_SIGNS = 1 << 20


def words(key: Key, start: int, stop: int, device: torch.device) -> Tensor:
    """[stop - start] int64 words of 32 bits, by position."""
    first = start // 4
    counter = torch.arange(first, -(-stop // 4), device=device)
    zero = torch.zeros_like(counter)
    made = torch.stack(philox(key, (counter & _MASK, counter >> 32, zero, zero)), dim=1)
    return made.flatten()[start - 4 * first : stop - 4 * first]


def signs(key: Key, start: int, stop: int, dim: int, device: torch.device) -> Tensor:
    """[stop - start, dim] float32 of +1 and -1; row p and column k depend on the key, p and k alone."""
    rows = max(1, _CACHE_SIGNS // dim)  # as many as stay in the processor's cache
    parts = [signs_of(key, torch.arange(p, min(p + rows, stop), device=device), dim) for p in range(start, stop, rows)]
    return torch.cat(parts) if parts else torch.empty(0, dim, device=device)


def signs_of(key: Key, rows: Tensor, dim: int, draw: int = 0) -> Tensor:
    """[n, dim] float32: the rows [n] of `signs`; others, independent of them, for every other `draw`."""
    blocks = -(-dim // _BITS)
    position = rows.repeat_interleave(blocks)
    block = torch.arange(blocks, device=rows.device).repeat(len(rows))
    made = torch.stack(philox(key, (position & _MASK, position >> 32, block, torch.full_like(block, draw))), dim=1)
    bytes_of = (made[:, :, None] >> torch.arange(0, 32, 8, device=rows.device)) & 0xFF
    bit = torch.arange(256, device=rows.device)[:, None] >> torch.arange(8, device=rows.device) & 1
    of_byte = 1.0 - 2.0 * bit.float()  # [256, 8]
    return of_byte.index_select(0, bytes_of.flatten()).view(len(rows), -1)[:, :dim]


def entry_signs(key: Key, start: int, stop: int, device: torch.device) -> Tensor:
    """[stop - start] float32 of +1 and -1, by position: those of rows of 128 after one another."""
    first = start // _BITS
    made = signs(key, first, -(-stop // _BITS), _BITS, device)
    return made.flatten()[start - _BITS * first : stop - _BITS * first]


def buckets(key: Key, start: int, stop: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[stop - start] int64 numbers below `dim`, and as many of +1 and -1: from word p's upper 31 bits, and its last.

    A bucket's probability is 1 / dim within 2^-31.
    """
    made = words(key, start, stop, device)
    return (made >> 1).mul_(dim) >> 31, 1 - 2 * (made & 1)
