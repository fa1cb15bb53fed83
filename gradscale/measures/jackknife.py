"""Standard errors by leaving out one block of examples after another.

Shapes: J blocks, m of them at a time, V values.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def jackknife_errors(full: Tensor, left_out: Iterable[tuple[Tensor, Tensor]], sizes: Tensor) -> Tensor:
    """[V] standard errors of `full` [V], from (values without the block, examples in the block), both [m, V].

    The delete-one-block jackknife for blocks of unequal size, each value's over the blocks that hold examples of its
    own, of which it has `sizes` [V] in all. NaN where that is one block, or a block holds what a value cannot do
    without. Memory: that of what is given at a time.
    Source: Busing, Meijer and van der Leeden (1999), "Delete-m jackknife for unequal m", equations 3 and 4, with the
    differences d_j from the full value and the shares s_j = m_j / n in place of values and h_j = n / m_j.
    """
    spread, linear, drift, odds, blocks = (torch.zeros_like(full) for _ in range(5))
    for values, taken in left_out:
        share = taken / sizes
        held = share > 0
        d = torch.where(held, values - full, 0.0)
        spread += torch.where(held, (1 - share) / share * d**2, 0.0).sum(dim=0)
        linear += d.sum(dim=0)
        drift -= ((1 - share) * d).sum(dim=0)
        odds += torch.where(held, share / (1 - share), 0.0).sum(dim=0)
        blocks += held.sum(dim=0)
    variance = (spread + 2 * linear * drift + drift**2 * odds) / blocks
    return variance.clamp(min=0).sqrt().where(blocks > 1, torch.nan)
