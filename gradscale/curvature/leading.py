"""The largest eigenvalue of a small problem's operator, by `lanczos` with the whole basis held."""

from __future__ import annotations

import torch

from gradscale.curvature.lanczos import Ritz, lanczos
from gradscale.curvature.operator import Operator
from gradscale.curvature.probes import FlatProbes


def leading_eigenpair(operator: Operator, max_steps: int = 200, residual: float = 1e-13) -> Ritz:
    """One value, from a random vector in float64, with no restart, until |A y - theta y| is about `residual` theta.

    Raises: GradscaleError as `lanczos`.
    """
    start = FlatProbes(operator.here, dtype=torch.float64)(range(1))
    return lanczos(operator, start, 1, max_steps, residual**2, basis_cap=max(5, max_steps + 1))
