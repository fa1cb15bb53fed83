"""What `gs.leave_out_gap` will do: which blocks of examples are left out, and with which settings. No Ray, no files.

Shapes: n examples, K blocks of s examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from gradscale.errors import GradscaleError
from gradscale.measures.settings import json_values
from gradscale.run.cluster import Resources
from gradscale.run.leave_out_training import Described, Training
from gradscale.run.plan import check_positive
from gradscale.sketches.philox import key_of, philox

_VERSION = 1
_MOST_OUTPUTS = 2000  # D = n C of K_n: each of five matrices takes 32 MB


def choose_blocks(n: int, blocks: int | None, block_size: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """K disjoint blocks of the n examples, ids ascending within each: the first of a partition drawn by `seed`.

    None: as many as there are; of single examples, every one in its order.
    Raises: GradscaleError if there are not that many, or nothing would be left to train on.
    """
    if block_size >= n:
        raise GradscaleError(f"block_size must be less than the number of examples, {n}, got {block_size}; use less")
    most = n // block_size
    if blocks is not None:
        check_positive(blocks=blocks)
        if blocks > most:
            raise GradscaleError(
                f"blocks must be at most {most}, the disjoint blocks of {block_size} in {n} examples, got {blocks}; "
                "use fewer"
            )
    K = most if blocks is None else blocks
    if block_size == 1 and n == K:
        return tuple((i,) for i in range(n))
    order = _order(n, seed)
    return tuple(tuple(sorted(order[b * block_size : (b + 1) * block_size])) for b in range(K))


def _order(n: int, seed: int) -> list[int]:
    """A random order of 0 to n - 1, by the seed alone."""
    counter, zero = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    high, low, *_ = philox(key_of("leave out", _VERSION, seed), (counter, zero, zero, zero))
    return [int(i) for i in np.lexsort((low.numpy(), high.numpy()))]


def plan_of(
    name: str,
    options: Mapping[str, Any],
    training: Training,
    described: Described,
    block_size: int,
    seed: int,
    tolerance: float,
    resources: Resources,
) -> dict[str, Any]:
    """Everything that determines the results, as JSON values."""
    return {
        "task": name,
        "task_options": json_values(options),
        "checkpoint": training.checkpoint,
        "examples": training.examples,
        "data_fingerprint": described.data_fingerprint,
        "weights_fingerprint": described.weights_fingerprint,
        "learning_rate": training.learning_rate,
        "steps": training.steps,
        "blocks": len(training.blocks),
        "block_size": block_size,
        "seed": seed,
        "tolerance": tolerance,
        "threads_per_worker": resources.threads,
        "versions": described.versions,
    }


def check_numbers(learning_rate: float, tolerance: float) -> None:
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise GradscaleError(f"learning_rate must be a finite number above 0, got {learning_rate!r}; try 0.1")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise GradscaleError(f"tolerance must be a finite number of at least 0, got {tolerance!r}; try 1e-12")


def check_gram_size(n: int, outputs: int | None) -> None:
    if outputs is not None and n * outputs > _MOST_OUTPUTS:
        raise GradscaleError(
            f"examples times outputs must be at most {_MOST_OUTPUTS} for K_n, got {n} times {outputs}; take fewer "
            "examples, or leave out gram"
        )
