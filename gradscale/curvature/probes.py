"""Random vectors by the position of their entries: the same for any slicing, machine and device.

Shapes: P entries in all, p of them here, k probes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.sketches.philox import key_of, normal_of
from gradscale.sketches.words import entry_signs, words

KINDS = ("gaussian", "rademacher")
_VERSION = 1
_TOGETHER = 1 << 17  # entries made at a time


class Probes(Protocol):
    """Independent random vectors v with E v v^T = I, by their numbers."""

    @property
    def kind(self) -> str:
        """gaussian, whose directions are uniform, or rademacher."""
        ...

    def __call__(self, ids: range) -> Tensor:
        """[k, p]: the slices here of the probes `ids`."""
        ...


def check_kind(kind: str) -> None:
    """Raises: GradscaleError if it is neither gaussian nor rademacher."""
    if kind not in KINDS:
        raise GradscaleError(f"kind of probes must be one of {', '.join(KINDS)}, got {kind}; gaussian is usual")


@dataclass(frozen=True)
class FlatProbes:
    """Entry i of probe j is keyed by (seed, j) and counted by i, the position in the whole vector.

    Raises: GradscaleError if `kind` is neither gaussian nor rademacher.
    """

    here: range
    seed: int = 0
    kind: str = "gaussian"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_kind(self.kind)

    def __call__(self, ids: range) -> Tensor:
        made = torch.empty(len(ids), len(self.here), dtype=self.dtype, device=self.device)
        for row, probe in zip(made, ids, strict=True):
            self._fill(row, probe)
        return made

    def _fill(self, row: Tensor, probe: int) -> None:
        key = key_of("curvature", _VERSION, self.seed, self.kind, probe)
        for start in range(self.here.start, self.here.stop, _TOGETHER):
            stop, device = min(start + _TOGETHER, self.here.stop), torch.device(self.device)
            entries = row[start - self.here.start : stop - self.here.start]
            if self.kind == "gaussian":
                entries.copy_(normal_of(words(key, start, stop, device)))
            else:
                entries.copy_(entry_signs(key, start, stop, device))
