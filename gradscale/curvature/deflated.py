"""Traces with less variance than Hutchinson's: what a few products span is taken exactly, the rest is sampled.

All of them hold vectors by the dozen: 3 k p numbers for k p of a probe batch. Where memory has no room for that, or the
spectrum is flat, Hutchinson's estimate serves.

Shapes: P entries in all, p of them here, k probes, r <= k vectors of an orthonormal basis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradscale.curvature.operator import Operator, dots
from gradscale.curvature.probes import Probes
from gradscale.curvature.slices import orthonormalize, row_dots, sweep
from gradscale.curvature.trace import OVER_PROBES, Array, TraceEstimate, mean_of_samples
from gradscale.errors import GradscaleError

GIVEN_BASIS = OVER_PROBES + ", given the basis"
LEAVE_ONE_OUT = "spread of leave-one-out values, which are not independent: too small, down to half"
BETWEEN_RUNS = "between independent runs"
_DEPENDENT = 1e-6  # the share of a probe's unit vector outside the range of the others, beyond which it is dropped


class DeflatedTrace(NamedTuple):
    """A trace with what its error was got from. Means of independent ones, of other probes, are estimates as well."""

    estimate: TraceEstimate
    samples: Array  # [k] float64: of the sampled part and the exact one together
    products: int  # vectors multiplied


def hutch_plus_plus(operator: Operator, probes: Probes, products: int, first: int = 0) -> DeflatedTrace:
    """tr A = tr Q^T A Q + E g^T (I - QQ^T) A (I - QQ^T) g, with an orthonormal basis Q of A S.

    A third of the `products` is for S, the probes from number `first` on, as many for Q, the others for g, the probes
    after those. Unbiased whatever Q is; the standard error is over g given Q, where the samples are independent.

    Raises: GradscaleError if products are fewer than 6, or one is not finite.
    Source: Meyer, Musco, Musco and Woodruff (2021), arXiv 2010.09649, algorithm 1.
    """
    if products < 6:
        raise GradscaleError(f"products must be at least 6 for Hutch++, got {products}; 30 are usual")
    k = min(products // 3, operator.size)
    basis, _ = _range(operator, _finite(operator, operator.products(probes(range(first, first + k))).clone()))
    exact = float(row_dots(operator, basis, operator.products(basis)).sum()) if len(basis) else 0.0
    others = probes(range(first + k, first + products - k))
    sweep(operator, basis, others, sweep(operator, basis, others).overlaps)
    samples = exact + row_dots(operator, others, _finite(operator, operator.products(others))).numpy()
    return DeflatedTrace(mean_of_samples(samples, error=GIVEN_BASIS), samples, k + len(basis) + len(others))


def xtrace(operator: Operator, probes: Probes, products: int, first: int = 0) -> DeflatedTrace:
    """Hutch++ with every probe in turn left out of the basis and used for the rest; the mean over k = products / 2.

    With Gaussian probes what is left of a probe outside the basis is scaled to the length that it has on the average
    there, which is right for directions that are uniform, and takes the variance of lengths away. Unbiased. The values
    of different probes depend on each other, and their spread / sqrt(k) is no more than a guide to the error.

    Raises: GradscaleError if products are fewer than 4, probes more than P, or a product is not finite.
    Source: Epperly, Tropp and Webber (2024), arXiv 2301.07825, section 2.1 and, for the scale, 2.3.
    """
    k = _check_probes("XTrace", operator, products // 2, 2 * (products // 2))
    omega = probes(range(first, first + k))
    images = _finite(operator, operator.products(omega).clone())
    own = row_dots(operator, omega, images)
    basis, coefficients = _range(operator, images)
    if not len(basis):
        return _zero(k)
    again = _finite(operator, operator.products(basis))
    W, T = dots(operator, basis, omega).cpu(), dots(operator, again, omega).cpu()  # [r, k]
    H = dots(operator, basis, again).cpu()
    H = (H + H.mT) / 2
    S = _left_out(coefficients)
    rest = W - S * (S * W).sum(dim=0)  # the probe in the basis that the others make
    samples = H.trace() - (S * (H @ S)).sum(dim=0)
    remainder = own - 2 * (rest * T).sum(dim=0) + (rest * (H @ rest)).sum(dim=0)
    if probes.kind == "gaussian":
        held = len(basis) - S.square().sum(dim=0)
        length = row_dots(operator, omega, omega) - rest.square().sum(dim=0)
        remainder = remainder * (operator.size - held) / length.clamp(min=1e-300)
    found = (samples + torch.where(operator.size - len(basis) + S.square().sum(dim=0) < 0.5, 0.0, remainder)).numpy()
    return DeflatedTrace(mean_of_samples(found, error=LEAVE_ONE_OUT), found, k + len(basis))


def xnystrace(operator: Operator, probes: Probes, products: int, first: int = 0) -> DeflatedTrace:
    """For positive semi-definite A: the Nystrom approximation of the other probes, and the rest by the probe left out.

    k = `products` probes. From the Gram matrices of Omega and A Omega alone, of A + nu I with nu = sqrt(eps) |A|, whose
    trace is known to be nu P more: no factor of a matrix that may be singular, and exact to about sqrt(eps) |A| where
    the rank is less than k. With Gaussian probes lengths are scaled as by `xtrace`. Unbiased; the error as there.

    Raises: GradscaleError if products are fewer than 2 or more than P, a product is not finite, A is seen not to be
    positive semi-definite, or the probes are not independent.
    Source: Epperly, Tropp and Webber (2024), arXiv 2301.07825, sections 2.2 and 2.3; eigenvectors in place of Cholesky
    factors, and leaving out by a downdate of the inverse, derived here.
    """
    k = _check_probes("XNysTrace", operator, products, products)
    omega = probes(range(first, first + k))
    images = _finite(operator, operator.products(omega))
    M, B, C = (
        dots(operator, a, b).cpu() for a, b in ((omega, omega), (omega, images), (images, images))
    )  # each [k, k]
    eps = math.sqrt(torch.finfo(omega.dtype).eps)
    whitened = _inverse_root(M, k)
    seen = torch.linalg.eigvalsh(whitened @ ((B + B.mT) / 2) @ whitened)
    largest = float(seen.abs().max())
    if float(seen[0]) < -eps * largest:
        raise GradscaleError(
            f"operator must be positive semi-definite for XNysTrace, got v^T A v = {float(seen[0]):.6g} of a unit "
            "vector; use xtrace or hutch_plus_plus"
        )
    if largest == 0:
        return _zero(k)
    nu = eps * largest
    inverse = _inverse((B + B.mT) / 2 + nu * M)
    shifted = C + nu * (B + B.mT) + nu**2 * M
    diagonal, scale = inverse.diagonal(), torch.ones(k, dtype=torch.float64)
    if probes.kind == "gaussian":
        scale = (operator.size - k + 1) * (whitened @ whitened).diagonal()
    nystrom = (inverse * shifted).sum() - (inverse @ shifted @ inverse).diagonal() / diagonal
    found = (nystrom + scale / diagonal - nu * operator.size).numpy()
    return DeflatedTrace(mean_of_samples(found, error=LEAVE_ONE_OUT), found, k)


def _range(operator: Operator, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal vectors [r, p] in the place of `vectors` [k, p], and the coefficients [k, r] that give them back."""
    nothing = vectors[:0]
    made = orthonormalize(operator, nothing, vectors, sweep(operator, nothing, vectors))
    return vectors[: made.coefficients.shape[1]], made.coefficients


def _left_out(coefficients: Tensor) -> Tensor:
    """[r, k]: in the basis, the unit vector orthogonal to the images of all probes but one; 0 if those span it all."""
    inverse = torch.linalg.pinv(coefficients, rtol=1e-12)
    outside = 1 - (coefficients * inverse.mT).sum(dim=1)
    units = inverse / inverse.norm(dim=0)
    return torch.where(outside > _DEPENDENT, 0.0, units)


def _zero(k: int) -> DeflatedTrace:
    """Of an operator whose products of k probes are all zero."""
    return DeflatedTrace(mean_of_samples(np.zeros(k), error=LEAVE_ONE_OUT), np.zeros(k), k)


def _inverse(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    found: Tensor = vectors / values.clamp(min=torch.finfo(torch.float64).eps * float(values[-1])) @ vectors.mT
    return found


def _inverse_root(gram: Tensor, k: int) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    if float(values[0]) <= 1e-12 * float(values[-1]):
        raise GradscaleError(f"probes must be {k} independent vectors, got a Gram matrix without inverse; draw others")
    found: Tensor = vectors / values.sqrt() @ vectors.mT
    return found


def _check_probes(method: str, operator: Operator, probes: int, products: int) -> int:
    """Raises: GradscaleError if there are fewer than two probes, or more than P."""
    if not 2 <= probes <= operator.size:
        raise GradscaleError(
            f"probes of {method} must be at least 2 and at most the {operator.size} entries of a vector, got {probes} "
            f"with {products} products; 10 are usual"
        )
    return probes


def _finite(operator: Operator, vectors: Tensor) -> Tensor:
    squares = row_dots(operator, vectors, vectors)
    if not bool(squares.isfinite().all()):
        raise GradscaleError(
            f"products must be finite, got squared lengths {squares.tolist()}; look for the example whose loss or "
            "gradient is not, or measure in float32"
        )
    return vectors


def mean_of_runs(runs: Sequence[DeflatedTrace]) -> TraceEstimate:
    """The mean of independent runs, of other probes each, with the standard error between them, which is honest.

    Raises: GradscaleError if there are none.
    """
    if not runs:
        raise GradscaleError(f"runs must be at least 1, got {len(runs)}; pass what xtrace has given, twice or more")
    return mean_of_samples(np.array([run.estimate.value for run in runs]), error=BETWEEN_RUNS)
