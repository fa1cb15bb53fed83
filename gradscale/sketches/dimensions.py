"""What the number of outputs of a map may be: at least one, and no more than there are entries to map."""

from __future__ import annotations

from collections.abc import Mapping

from gradscale.errors import GradscaleError


def check_dim(what: str, dim: int) -> None:
    if dim < 1:
        raise GradscaleError(f"{what} must be at least 1, got {dim}")


def check_fits(dim: int, sizes: Mapping[str, int]) -> None:
    """Raises: GradscaleError if K is more than P, the entries of all parameters together."""
    entries = sum(sizes.values())
    if dim > entries:
        raise GradscaleError(
            f"sketch dimension must be at most the {entries} entries of the measured parameters, got {dim}; "
            f"use a smaller K, or identity:{entries}, which keeps the gradients themselves"
        )
