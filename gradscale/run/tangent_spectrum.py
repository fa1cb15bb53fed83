"""The tangent kernel of a few examples, dense: which of its eigenspaces hold the targets, the residual, the update.

No run: one process, no files.

Shapes: n examples, C outputs, m = n C.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.grads.modes import check_mode
from gradscale.grads.subject import Subject, load_batch
from gradscale.measures.dispersion import SQUARED
from gradscale.measures.measure import Estimate
from gradscale.measures.outputs import outputs, targets
from gradscale.measures.tangent_dense import (
    Eigen,
    alignment,
    centred,
    effective_gram,
    eigen,
    first_order,
    from_the_bottom,
    lower_half,
    shares,
)
from gradscale.measures.tangent_jacobians import NAME, output_gradients, tangent_matrix
from gradscale.measures.tangent_kernel import UNIT
from gradscale.run.memory import explaining_memory
from gradscale.run.plan import check_positive
from gradscale.run.sample import bottom_k
from gradscale.run.shard import prepare
from gradscale.run.tangent_identities import check_finite, check_perturbation, check_residuals, loss_gradients
from gradscale.task import Batch, Task

_GRAM = "reconstructed"  # what is found of arXiv 2504.16450 and what is not: see `tangent_spectrum`


class Shares(NamedTuple):
    """Of a vector in an eigenbasis, the largest eigenvalue first. Of equal eigenvalues only the sum has a meaning."""

    each: np.ndarray  # [m]: (u_j^T v)^2 / |v|^2
    below: np.ndarray  # [m]: the sum from j to the last, that of the smallest eigenvalue


class FunctionUpdate(NamedTuple):
    """How the outputs moved to another checkpoint, in the kernel's eigenbasis; in output units."""

    change: np.ndarray  # [m]: u_j^T df
    predicted: np.ndarray  # [m]: -eta lambda_j u_j^T r / n


class TangentSpectrum(NamedTuple):
    """Of Theta = J J^T [m, m], J's row i C + c the gradient of output c of example i, and of the effective Gram B."""

    ids: np.ndarray  # [n] int64, ascending
    eigenvalues: np.ndarray  # [m], of Theta, descending
    targets: Shares | None  # of y centred over examples, in Theta's basis; None of a task without targets and labels
    residual: Shares  # of r, r_i = d loss_i / d f(x_i), in Theta's basis
    gram_eigenvalues: np.ndarray  # [m], of B, descending
    gram_residual: Shares  # of r, in B's basis
    update: FunctionUpdate | None
    estimates: Mapping[str, Estimate]


def tangent_spectrum(
    task: Task,
    checkpoint: str | None = None,
    examples: int | Sequence[int] | np.ndarray = 64,
    after: str | None = None,
    params: str | None = None,
    exclude: Sequence[str] = (),
    microbatch: int = 32,
    memory: int = 4 << 30,
    seed: int = 0,
    device: str = "cpu",
) -> TangentSpectrum:
    """The eigenspaces of the tangent kernel of `task.outputs` on n examples, and what lies in them.

    `examples` are ids, or how many to draw of all, by `bottom_k` of their ids. `estimates`, exact for these examples:

        trace                  tr Theta, which the measure `tangent_kernel` estimates as `frobenius`
        kernel_frobenius       |Theta|_F
        alignment              y^T K y / (|K|_F |y|^2), centred over examples as the measure has it: K = H Theta H
        residual_below         the share of |r|^2 in the lower half of Theta's spectrum, floor(m / 2) eigenvectors
        target_below           that of the centred targets
        gram_residual_below    that of r in the lower half of the spectrum of B
        perturbation           r^T B r, B = (blockdiag(J_i J_i^T) - Theta / n) / (n (n - 1))
        eta, r_squared         with `after`: below

    Held to: |J_i^T r_i| = |g_i| of every example, and r^T B r = q (1 - alpha) / (n - 1) = tr Sigma / n, the right side
    from the losses' own gradients: to sqrt(eps) of the parameters' type. The residual is had from
    `task.losses_of(outputs, batch) -> [B]` if there is one, else as `output_gradients` says.

    With the checkpoint `after`: df = f(after) - f(checkpoint) in Theta's eigenbasis, beside the first-order change
    under gradient flow of the mean loss L of these n examples, u_j^T df = -eta lambda_j u_j^T grad_f L with
    grad_f L = r / n; eta is fitted by least squares, r_squared the share of |df|^2 explained. `conditional`: it speaks
    of a step of training on just these examples by plain gradient descent, all of these parameters moving.

    Found of Yang and Chaudhari (2025), arXiv 2504.16450, in what could be read of it: gap = r_n(0)^T K_n r_n(0), and
    that the residual lies in the subspace of low eigenvalues. Reconstructed here: B, derived for leave-one-out gradient
    flow; it is K_n's rate and not K_n, so that `perturbation` and shares in B's eigenspaces are `conditional`.

    Cost: C forward and backward passes over the n examples for every group of parameters, m^2 P + 20 m^3 operations.
    Memory: six matrices [m, m] of float64, and Jacobians [m, P] of as many parameters as fit with them into `memory`
    bytes; a batch's activations beside.
    Raises: GradscaleError if that does not fit, the task has no outputs, an example is not finite or has more outputs
    than another, the losses are no function of the outputs, or an identity is violated.
    Source: u_j^T df = -eta lambda_j u_j^T grad_f L: Baratin et al. (2021), arXiv 2008.00938; Walker (2023), lemma
    4.2. B: derived here.
    """
    check_positive(microbatch=microbatch, memory=memory)
    subject = prepare(task, checkpoint, params, device, exclude)
    ids = _chosen(examples, len(subject.examples), seed)
    n = len(ids)
    with explaining_memory(microbatch):
        batches = list(_batches(subject, ids, microbatch))
        f, r = _outputs_and_residuals(subject, batches)
        theta = tangent_matrix(subject, batches, f.shape[1], memory)
        losses = loss_gradients(subject, batches)
        y = _targets(subject, batches, f.shape[1])
        change = None if after is None else _outputs_at(task, after, device, batches, subject) - f
    check_finite(theta, r, losses, ids)
    check_residuals(theta, r, losses, ids)
    gram = effective_gram(theta, n)
    perturbation = float(r.flatten() @ gram @ r.flatten())
    check_perturbation(perturbation, losses)
    basis, gram_basis = eigen(theta), eigen(gram)
    values = {"trace": float(theta.trace()), "kernel_frobenius": float(theta.norm()), "perturbation": perturbation}
    residual, in_gram = (shares(b.vectors, r.flatten()) for b in (basis, gram_basis))
    values |= {"residual_below": lower_half(residual), "gram_residual_below": lower_half(in_gram)}
    aligned = None
    if y is not None:
        centred_y = (y - y.mean(dim=0)).flatten()
        aligned = shares(basis.vectors, centred_y)
        values |= {"alignment": alignment(centred(theta, n), centred_y), "target_below": lower_half(aligned)}
    update = None
    if change is not None:
        update, fitted = _update(basis, r, change, n)
        values |= fitted
    return TangentSpectrum(
        ids,
        basis.values.numpy(),
        None if aligned is None else _shares(aligned),
        _shares(residual),
        gram_basis.values.numpy(),
        _shares(in_gram),
        update,
        {name: _estimate(name, value, n) for name, value in values.items()},
    )


_ABOUT = {  # unit, status, what its definition adds
    "trace": (UNIT, "identity", ""),
    "kernel_frobenius": (UNIT, "identity", ""),
    "alignment": ("1", "identity", "/centred"),
    "target_below": ("1", "identity", ""),
    "residual_below": ("1", "identity", ""),
    "gram_residual_below": ("1", "conditional", f"/{_GRAM}"),
    "perturbation": (SQUARED, "conditional", f"/leave-one-out flow, {_GRAM}"),
    "eta": ("parameter unit^2 / loss unit", "conditional", "/gradient flow, first order"),
    "r_squared": ("1", "conditional", "/gradient flow, first order"),
}


def _estimate(name: str, value: float, n: int) -> Estimate:
    unit, status, more = _ABOUT[name]
    return Estimate(value, None, n, status, f"{NAME}/{name}{more}/v1", unit)


def _shares(each: Tensor) -> Shares:
    return Shares(each.numpy(), from_the_bottom(each).numpy())


def _update(basis: Eigen, r: Tensor, change: Tensor, n: int) -> tuple[FunctionUpdate, dict[str, float]]:
    found = first_order(basis, r.flatten(), change.flatten(), n)
    return FunctionUpdate(found.change.numpy(), found.predicted.numpy()), {
        "eta": found.eta,
        "r_squared": found.r_squared,
    }


def _chosen(examples: int | Sequence[int] | np.ndarray, total: int, seed: int) -> np.ndarray:
    """[n] int64, ascending and each once."""
    if isinstance(examples, int):
        check_positive(examples=examples)
        ids = bottom_k(np.arange(total), examples, seed)
    else:
        ids = np.unique(np.asarray(examples).reshape(-1))
        if len(ids) and (ids.dtype.kind not in "iu" or ids[0] < 0 or ids[-1] >= total):
            raise GradscaleError(f"examples must be ids from 0 to {total - 1}, got {ids[0]} to {ids[-1]}; name others")
    if len(ids) < 2:
        raise GradscaleError(f"examples must be at least two for a covariance, got {len(ids)}; name more")
    return ids.astype(np.int64)


def _batches(subject: Subject, ids: np.ndarray, microbatch: int) -> Iterator[Batch]:
    """Of at most `microbatch` of the examples `ids` in their order; each of examples of equal shapes."""
    held: list[Batch] = []
    for i in ids.tolist():
        one = load_batch(subject, range(i, i + 1))
        if held and (len(held) == microbatch or _shapes(one) != _shapes(held[0])):
            yield _joined(held)
            held = []
        held.append(one)
    yield _joined(held)


def _shapes(batch: Batch) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in batch.items()}


def _joined(batches: Sequence[Batch]) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _outputs_and_residuals(subject: Subject, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """f and r, both [n, C]."""
    pairs = [output_gradients(subject, batch) for batch in batches]
    widths = sorted({f.shape[1] for f, _ in pairs})
    if len(widths) > 1:
        raise GradscaleError(
            f"outputs must be as many for every example, got {widths[0]} and {widths[-1]}; choose examples of one "
            "length by examples="
        )
    return torch.cat([f for f, _ in pairs]), torch.cat([r for _, r in pairs])


def _outputs_at(task: Task, checkpoint: str, device: str, batches: Sequence[Batch], like: Subject) -> Tensor:
    model = task.model(checkpoint)
    check_mode(model)
    subject = Subject(task, model.to(device), like.examples, like.parameters, ())
    with torch.no_grad():
        return torch.cat([outputs(subject, batch, NAME).double().cpu() for batch in batches])


def _targets(subject: Subject, batches: Sequence[Batch], C: int) -> Tensor | None:
    """[n, C], or None if the task has none."""
    if getattr(subject.task, "targets", None) is None and getattr(subject.task, "labels", None) is None:
        return None
    return torch.cat([targets(subject, batch, C, NAME).cpu() for batch in batches])
