"""Weights in float32 behind weights that were rounded when a model was loaded in bfloat16 or float16.

Shapes: P_j entries of a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradscale.sketches.blocks import kept
from gradscale.sketches.philox import key_of
from gradscale.sketches.words import words

VERSION = 1
_PIECE = 1 << 18  # entries at a time
_TINY = torch.finfo(torch.float32).tiny


def master_of(name: str, weights: Tensor) -> Tensor:
    """Float32 weights that round to `weights` to the bit; `weights` themselves where they are float32 or float64.

    The bits that rounding took are drawn evenly, by the parameter's name and the position. A weight that lay where
    rounding has put it would not move at all by less than half the way to the next; one that may lie anywhere moves in
    the mean by as much as it should. Status: heuristic, the bits that were lost are not known.
    """
    lost = math.log2(torch.finfo(weights.dtype).eps / torch.finfo(torch.float32).eps)
    if lost <= 0:
        return weights
    span, size, device = 2 ** round(lost) - 1, weights.numel(), weights.device

    def draw() -> Tensor:
        pieces = [range(size)[start : start + _PIECE] for start in range(0, size, _PIECE)]
        key = key_of("master", VERSION, name)
        return torch.cat([words(key, p.start, p.stop, device) % span - span // 2 for p in pieces]).short()

    bits = kept(("master", VERSION, name, size, span, str(device)), draw).view(weights.shape)
    wide = weights.float()
    return torch.where(wide.abs() < _TINY, wide, (wide.view(torch.int32) + bits).view(torch.float32))


def squared_way(
    weights: Sequence[Tensor], masters: Sequence[Tensor], along: Sequence[Tensor], h: float
) -> float | None:
    """<v, theta(h) - theta(-h)> / 2 h of the weights as rounded, for |v|^2; None where none are, or none moves."""
    if all(master is before for master, before in zip(masters, weights, strict=True)):
        return None
    total = 0.0
    for before, master, v in zip(weights, masters, along, strict=True):
        ahead, back = (torch.add(master, v, alpha=step).to(before.dtype).double() for step in (h, -h))
        total += float(((ahead - back) * v).sum()) / (2 * h)
    return total or None
