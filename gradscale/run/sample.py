"""A fixed random sample of examples: which ones are in it depends on their ids and a seed alone.

Every id has a random 64-bit number, and the sample is of the k ids with the smallest: of the union of two sets it is
that of their two samples, whatever the shards.
"""

from __future__ import annotations

import numpy as np
import torch

from gradscale.sketches.philox import key_of, philox

_VERSION = 1
_MASK = 0xFFFFFFFF


def bottom_k(ids: np.ndarray, k: int, seed: int) -> np.ndarray:
    """[min(n, k)]: the sample of the different ids [n] int64, ascending; all of them where n <= k."""
    if len(ids) <= k:
        return np.sort(ids)
    counter = torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int64))
    zero = torch.zeros_like(counter)
    high, low, *_ = philox(key_of("example sample", _VERSION, seed), (counter & _MASK, counter >> 32, zero, zero))
    order = np.lexsort((ids, low.numpy(), high.numpy()))  # the last key counts first
    return np.sort(ids[order[:k]])
