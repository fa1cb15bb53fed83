"""The quadratures themselves: Lanczos recurrences of several probes in lock-step, so that products are of k at once.

Shapes: P entries in all, p of them here, k probes at a time, m steps.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gradscale.curvature.density import Quadrature, merge_quadratures
from gradscale.curvature.operator import Operator, norms
from gradscale.curvature.probes import Probes
from gradscale.curvature.slices import row_dots, sweep
from gradscale.errors import GradscaleError

_ROUNDING = 10  # times the rounding unit and the operator's norm: a beta below it ends a recurrence
_ASYMMETRY = 0.1  # of the operator's norm: products by finite differences in bfloat16 stay below


def quadratures(
    operator: Operator, probes: Probes, ids: range, steps: int, together: int = 8, reorthogonalize: bool = False
) -> Quadrature:
    """Gauss quadratures with m = `steps` nodes of the spectral measures of the probes `ids`.

    Exact for polynomials of degree 2 m - 1; a probe whose Krylov space is exhausted has fewer nodes and is exact for
    all. `together` probes share a call of the operator. Every quadrature is held to sum tau theta^2 = |A v|^2 / |v|^2,
    and every product to <u, A v> = <v, A u> of neighbours in the recurrence.

    Without `reorthogonalize`, memory is 4 k p numbers; nodes then depend on rounding (so on the number of processes)
    where one has converged, sums over nodes do not. With it, m k p more, and the nodes too are reproduced.

    Raises: GradscaleError if there are no probes, steps or `together` is less than 1, a product is not finite, the
    operator is not symmetric, or the identity is violated.
    """
    if not len(ids):
        raise GradscaleError(f"probes must be at least 1, got {len(ids)}; 10 are usual for a density")
    if steps < 1 or together < 1:
        raise GradscaleError(f"steps and together must be at least 1, got {steps} and {together}; 50 and 8 are usual")
    batches = [ids[first : first + together] for first in range(0, len(ids), together)]
    return merge_quadratures([_batch(operator, probes(batch), batch, steps, reorthogonalize) for batch in batches])


def gauss(alphas: Tensor, betas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes, weights and residuals [m] of the tridiagonal matrix with `alphas` [m] on and `betas` [m - 1] beside the
    diagonal; its last entry `betas[m - 1]`, of m, couples what comes next.
    """
    m = len(alphas)
    nodes, vectors = torch.linalg.eigh(
        torch.diag(alphas) + torch.diag(betas[: m - 1], 1) + torch.diag(betas[: m - 1], -1)
    )
    return nodes, vectors[0].square(), betas[m - 1] * vectors[-1].abs()


def check_second_moment(probe: int, nodes: Tensor, weights: Tensor, image: float, tolerance: float) -> None:
    """Raises: GradscaleError if sum tau theta^2 is not `image` = |A v|^2 / |v|^2."""
    found = float((weights * nodes.square()).sum())
    if not abs(found - image) <= tolerance * max(abs(image), float(nodes.abs().max()) ** 2):
        raise GradscaleError(
            f"quadrature of probe {probe} must have sum tau theta^2 = |A v|^2 / |v|^2 = {image:.9g}, got {found:.9g}; "
            "use float64 probes, and look whether the operator is deterministic"
        )


def _batch(operator: Operator, starts: Tensor, ids: range, steps: int, reorthogonalize: bool) -> Quadrature:
    alphas, betas, counts, images = _recurrences(operator, starts, ids, steps, reorthogonalize)
    tolerance = 1e3 * torch.finfo(starts.dtype).eps
    parts = []
    for row, probe in enumerate(ids):
        m = int(counts[row])
        nodes, weights, residuals = gauss(alphas[row, :m], betas[row, :m])
        if m > 1 or float(betas[row, 0]) == 0:
            check_second_moment(probe, nodes, weights, float(images[row]), tolerance)
        numbers = np.full(m, probe, dtype=np.int64)
        parts.append(Quadrature(operator.size, numbers, nodes.numpy(), weights.numpy(), residuals.numpy()))
    return merge_quadratures(parts)


def _recurrences(
    operator: Operator, starts: Tensor, ids: range, steps: int, reorthogonalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alphas and betas [k, m], how many of them there are [k], and |A v|^2 / |v|^2 [k]: float64 on the CPU."""
    k, unit = len(starts), torch.finfo(starts.dtype).eps
    lengths = norms(operator, starts).cpu()
    if not bool((lengths > 0).all() and lengths.isfinite().all()):
        raise GradscaleError(f"probes must be finite vectors of positive length, got lengths {lengths.tolist()}")
    current = starts / _column(lengths, starts)
    previous = torch.zeros_like(current)
    alphas, betas = torch.zeros(k, steps, dtype=torch.float64), torch.zeros(k, steps, dtype=torch.float64)
    counts, images, scale = torch.zeros(k, dtype=torch.int64), torch.zeros(k, dtype=torch.float64), torch.zeros(k)
    scale, live = scale.double(), torch.arange(k)
    bases = [current.new_empty(min(steps, operator.size), current.shape[1]) for _ in range(k if reorthogonalize else 0)]
    for step in range(min(steps, operator.size)):
        product = operator.products(current).clone()
        squares = row_dots(operator, product, product)
        _check_finite(squares, [ids[row] for row in live.tolist()], step)
        scale[live] = torch.maximum(scale[live], squares.sqrt())
        if step == 0:
            images = squares
        else:
            _check_symmetric(operator, previous, product, betas[live, step - 1], scale[live], ids, live)
            product.addcmul_(previous, _column(betas[live, step - 1], product), value=-1)
        alpha = row_dots(operator, current, product)
        product.addcmul_(current, _column(alpha, product), value=-1)
        for place, row in enumerate(live.tolist() if reorthogonalize else []):
            bases[row][step] = current[place]
            _take_off(operator, bases[row][: step + 1], product[place : place + 1])
        beta = norms(operator, product).cpu()
        on = (beta > _ROUNDING * unit * scale[live]) & (step + 1 < operator.size)
        alphas[live, step], betas[live, step], counts[live] = alpha, torch.where(on, beta, 0.0), counts[live] + 1
        if not bool(on.any()):
            break
        previous, current = current[on], product[on] / _column(beta[on], product)
        live = live[on]
    return alphas, betas, counts, images


def _take_off(operator: Operator, basis: Tensor, vector: Tensor) -> None:
    """The projection of `vector` [1, p] on the basis, twice."""
    first = sweep(operator, basis, vector)
    second = sweep(operator, basis, vector, first.overlaps)
    sweep(operator, basis, vector, second.overlaps)


def _column(scalars: Tensor, vectors: Tensor) -> Tensor:
    return scalars[:, None].to(vectors)


def _check_finite(squares: Tensor, probes: list[int], step: int) -> None:
    if not bool(squares.isfinite().all()):
        row = int((~squares.isfinite()).nonzero()[0])
        raise GradscaleError(
            f"product {step} of probe {probes[row]} must be finite, got squared length {float(squares[row])}; look for "
            "the example whose loss or gradient is not, or measure in float32"
        )


def _check_symmetric(
    operator: Operator, previous: Tensor, product: Tensor, beta: Tensor, scale: Tensor, ids: range, live: Tensor
) -> None:
    """<u, A v> is <v, A u>, which is the beta between them."""
    found = row_dots(operator, previous, product)
    off = (found - beta).abs() > _ASYMMETRY * scale
    if bool(off.any()):
        row = int(off.nonzero()[0])
        raise GradscaleError(
            f"operator must be symmetric, got <u, A v> = {float(found[row]):.6g} and <v, A u> = {float(beta[row]):.6g} "
            f"in the recurrence of probe {ids[int(live[row])]}; see the operator's self-test"
        )
