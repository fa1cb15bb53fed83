"""The identities that a dense tangent kernel is held to, against the gradients of the losses themselves.

Shapes: n examples, C outputs, m = n C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.grads.readings import GradientSums, Reading, SquaredNorms, Totals
from gradscale.grads.subject import Subject, read_batch
from gradscale.measures.dispersion import trace_covariance
from gradscale.measures.tangent_dense import by_example
from gradscale.task import Batch, batch_size


class LossGradients(NamedTuple):
    """Of n examples, by backward passes of the losses."""

    sq_norms: Tensor  # [n] float64, |g_i|^2
    trace: float  # tr Sigma
    eps: float  # of the parameters' type


def loss_gradients(subject: Subject, batches: Sequence[Batch]) -> LossGradients:
    asked: frozenset[Reading] = frozenset({SquaredNorms(), GradientSums()})
    totals: Totals = {}
    found = [read_batch(subject, batch, asked, totals=totals) for batch in batches]
    sq_norms = torch.cat([part.sq_norms.sum(dim=1) for part in found]).cpu()
    norm = sum(float(total.double().square().sum()) for total in totals[GradientSums()][None].values())
    eps = max(torch.finfo(parameter.dtype).eps for parameter in subject.parameters.values())
    n = sum(batch_size(batch) for batch in batches)
    return LossGradients(sq_norms, trace_covariance(n, float(sq_norms.sum()), norm), eps)


def check_finite(theta: Tensor, r: Tensor, losses: LossGradients, ids: np.ndarray) -> None:
    """Raises: GradscaleError naming the first example with a gradient that is not finite."""
    kept = by_example(theta, len(ids)).flatten(1).isfinite().all(dim=1)
    kept &= r.isfinite().all(dim=1) & losses.sq_norms.isfinite()
    if not bool(kept.all()):
        i = int((~kept).nonzero()[0])
        raise GradscaleError(
            f"outputs and loss must have finite gradients, got others of example {ids[i]}; leave it out of examples="
        )


def check_residuals(theta: Tensor, r: Tensor, losses: LossGradients, ids: np.ndarray) -> None:
    """Raises: GradscaleError naming the first example whose loss has another gradient than J_i^T r_i, or none."""
    found = torch.einsum("nc,ncd,nd->n", r, by_example(theta, len(ids)), r)
    scale = losses.sq_norms + losses.sq_norms.mean()
    wrong = ~((found - losses.sq_norms).abs() <= math.sqrt(losses.eps) * scale)
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise GradscaleError(
            f"|J_i^T r_i|^2 must be |g_i|^2 of a loss that is a function of task.outputs, expected "
            f"{float(losses.sq_norms[i]):.6g} for example {ids[i]}, got {float(found[i]):.6g}; add "
            "task.losses_of(outputs, batch) -> [B]"
        )


def check_perturbation(perturbation: float, losses: LossGradients) -> None:
    """Raises: GradscaleError if r^T B r is not tr Sigma / n."""
    n = len(losses.sq_norms)
    expected, scale = losses.trace / n, float(losses.sq_norms.mean()) / (n - 1)
    tolerance = math.sqrt(losses.eps) * scale
    if not abs(perturbation - expected) <= tolerance:
        raise GradscaleError(
            f"the identity r^T B r = q (1 - alpha) / (n - 1) must hold to {tolerance:.1e}, expected {expected:.17g} "
            f"from the gradients of the losses, got {perturbation:.17g}; task.outputs or task.losses_of is not what "
            "task.losses is computed from: put them right"
        )
