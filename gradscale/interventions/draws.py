"""Random numbers for every trained weight, the same on all ranks and devices: by a key, and the place of the weight."""

from __future__ import annotations

from torch import Tensor

from gradscale.interventions.target import Training
from gradscale.sketches.philox import key_of, normals
from gradscale.sketches.words import entry_signs


def normals_of(trained: Training, *key: str | int) -> list[Tensor]:
    """Standard normals, a tensor for each parameter. Drawn at once: many small tensors would take ten times as long."""
    return _shaped(trained, normals(key_of(*key), 0, -(-_size(trained) // 4), 4, trained.device).flatten())


def signs_of(trained: Training, *key: str | int) -> list[Tensor]:
    """+1 and -1, a tensor for each parameter."""
    return _shaped(trained, entry_signs(key_of(*key), 0, _size(trained), trained.device))


def _size(trained: Training) -> int:
    return sum(p.numel() for p in trained.weights)


def _shaped(trained: Training, drawn: Tensor) -> list[Tensor]:
    parts = drawn[: _size(trained)].split([p.numel() for p in trained.weights])
    return [part.view(p.shape).to(p.dtype, copy=True) for part, p in zip(parts, trained.weights, strict=True)]
