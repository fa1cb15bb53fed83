"""Identities that every run is held to as it goes: where one is violated there is an error, and no number in a table.

Each compares two routes that share as little as there is to share: the Gram matrix of the blocks' sums of gradients,
from which the estimates come; those sums themselves; the norms in the rows; products with probes. Tolerances follow
from float64 rounding, or from how far chance goes: a sound run violates none.

Shapes: B examples, J blocks, L parameters, P entries of one parameter, N probes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.grads.readings import GradientSums
from gradscale.measures.coherence import alpha
from gradscale.measures.measure import MicroBatch
from gradscale.measures.moments import Moments, MomentsState, block_sums, moments
from gradscale.sketches.gaussian import TOGETHER, GaussianProbes

SIGMAS = 8  # of what chance may do to products with probes
_FLOOR = 1e-28  # squared norms below it, of float32 gradients, may have lost entries whose squares are zero in it
_ENTRIES = 1 << 22  # of a parameter that are widened at a time
_NARROW = 1e-2  # by which |S|^2 <= n Q may be off: sums in float32 or of half-precision factors are rounded


class Recorded(NamedTuple):
    """What the shards' commit records say of a step, from the rows and not from the states."""

    examples: int  # finite
    sq_norm: float  # Q, the sum of their squared norms


class _Direct(NamedTuple):
    """What the blocks' sums of one parameter give without their Gram matrix."""

    entries: int  # P
    norm: float  # |S|^2, of the vector S
    between: float  # sum_b n_b |S_b / n_b - S / n|^2


def check_moments(state: MomentsState, recorded: Recorded, step: int) -> None:
    """Hold the moments of all examples at one step to the identities that they must satisfy.

    (i) They are of as many examples as the rows. (ii) Every block has |S|^2 <= n Q. (iii) Layer decomposition of
    coherence, arXiv 2203.10036: sum_l f_l alpha_l = alpha with f_l = Q_l / Q, the right side by the Gram matrix, the
    left with Q from the rows and |S_l|^2 from the vectors S_l. (iv) q (1 - alpha) / (n - 1) = tr Sigma / n, the left
    side with q from the rows and alpha by the Gram matrix, the right one by the sums of squares within blocks and
    between them. Of (iii) and (iv) nothing is asked where n Q is zero, or n is 1.

    Tolerances: 8 eps (P + J^2 + n), all P together, on the scale of alpha = 1: an inner product of P terms is off by at
    most P eps of its factors' norms, a sum of n or J^2 terms likewise. Cost: 3 J P operations, once a step.
    Raises: GradscaleError naming the identity, the step, what was expected and what was found.
    """
    parts = moments(state)
    whole = parts["all"]
    n, q = whole.n, recorded.sq_norm
    if n != recorded.examples:
        raise _violation("the number of examples in the states", step, recorded.examples, n, 0.0)
    _check_blocks(whole, step)
    if not (0 < q < math.inf):
        return
    direct = {name: _direct(whole.counts, sums) for name, sums in block_sums(state)}  # one parameter at a time
    size = sum(found.entries for found in direct.values()) + len(whole.counts) ** 2 + n
    tolerance = min(8 * torch.finfo(torch.float64).eps * size, _NARROW)
    coherence = alpha(n, float(whole.sq_norms.sum()), float(whole.gram.sum()))
    decomposed = sum(_share(parts[f"layer:{name}"], found.norm, q) for name, found in direct.items())
    _compare("sum_l f_l alpha_l = alpha", step, coherence, decomposed, tolerance)
    if n > 1:
        within = float((whole.sq_norms - whole.gram.diagonal() / whole.counts).sum())
        total = within + sum(found.between for found in direct.values())
        expected, scale = q / n * (1 - coherence) / (n - 1), q / n / (n - 1)
        got = total / (n - 1) / n
        _compare("q (1 - alpha) / (n - 1) = tr Sigma / n", step, expected, got, tolerance * scale)


def check_products(batch: MicroBatch, ids: range) -> None:
    """Hold the products <g_i, v_j> with Gaussian probes to the exact norms: mean_j <g_i, v_j>^2 ~ |g_i|^2.

    All examples share their probes, so that they are no independent evidence. Compared is r = sum_ij <g_i, v_j>^2 /
    (N sum_i |g_i|^2) = (1/N) sum_j v_j^T A v_j with A = sum_i g_i g_i^T / tr: a mean of N independent mixtures of
    chi^2_1 of weights that add up to 1, whatever the examples have in common. By Chernoff, and since the moment
    generating function of such a mixture is at most that of a single chi^2_1,

        P(r beyond x) <= exp(-N (x - 1 - log x) / 2) on either side of 1,

    which is exp(-32) = 1.3e-14 at x = 1 +- 8 sqrt(2 / N), for large N: eight standard deviations of the worst case.
    Examples with |g_i| < 1e-14 are left out: in float32 their squares may be too small to be seen.
    Raises: GradscaleError naming the identity, the examples, what was expected and what was found.
    """
    sq_norms = batch.sq_norms.sum(dim=1)
    kept = sq_norms > _FLOOR
    for reading, products in batch.projections.items():
        if not (isinstance(reading.map, GaussianProbes) and bool(kept.any())):
            continue
        exact = sq_norms[kept].sum()
        N = products.shape[1]
        ratio = float((products[kept] / exact.sqrt()).square().sum()) / N
        surprise = N * (ratio - 1 - math.log(ratio)) / 2 if 0 < ratio < math.inf else math.inf
        if not surprise <= SIGMAS**2 / 2:
            raise GradscaleError(
                f"the identity mean_j <g_i, v_j>^2 ~ |g_i|^2 must hold for examples {ids.start} to {ids.stop - 1} to "
                f"{SIGMAS} standard deviations, expected a sum of {float(exact):.6g} over examples, got "
                f"{ratio * float(exact):.6g} over {N} probes; the products or the norms are wrong: try the other of "
                "--probe-products forward and backward, and report it"
            )


def check_sums(batch: MicroBatch, ids: range, eps: float) -> None:
    """Hold the products <g_i, v_j> with Gaussian probes to the sum of gradients: sum_i <g_i, v_j> = <sum_i g_i, v_j>.

    The two sides share no code from the loss on if the products come from forward mode: with v = mean g it would be
    mean_i <g_i, mean g> = |mean g|^2, for which the mean would have to be known before a pass; along the probes it
    costs none. The first four of them are taken: 4 P products, and as many normals where they are not kept.

    Tolerance: 4 sqrt(eps) sum_i |g_i|, `eps` that of the parameters' type, as forward mode is held to before a run;
    of types narrower than float64 at least 1e-2 sum_i |g_i|, since their sums may be of half-precision factors; and
    1e-14 an example, see `check_products`. Nothing is asked where the sums are not read.
    Raises: GradscaleError naming the identity, the examples, what was expected and what was found.
    """
    sums = batch.sums.get(GradientSums())
    if sums is None or not len(batch.ids):
        return
    norms = batch.sq_norms.sum(dim=1).sqrt()
    relative = max(4 * math.sqrt(eps), _NARROW if eps > torch.finfo(torch.float64).eps else 0.0)
    allowed = relative * float(norms.sum()) + math.sqrt(_FLOOR) * len(norms)
    for reading, products in batch.projections.items():
        if not isinstance(reading.map, GaussianProbes):
            continue
        found = products[:, :TOGETHER].sum(dim=0)
        expected = torch.zeros_like(found)
        for name, total in sums[None].items():
            columns = reading.map.columns(name, 0, len(found), total.numel(), total.device)
            for part, rows in zip(total.split(_ENTRIES), columns.split(_ENTRIES), strict=True):
                expected += part.double() @ rows.double()
        worst = int((found - expected).abs().argmax())
        if not float((found - expected)[worst].abs()) <= allowed:
            raise GradscaleError(
                f"the identity sum_i <g_i, v_j> = <sum_i g_i, v_j> must hold for examples {ids.start} to "
                f"{ids.stop - 1} to {allowed:.1e}, expected {float(expected[worst]):.9g} of probe {worst}, got "
                f"{float(found[worst]):.9g}; the products or the sums are wrong: try the other of --probe-products "
                "forward and backward, and report it"
            )


def _check_blocks(parts: Moments, step: int) -> None:
    for n, q, norm in zip(parts.counts.tolist(), parts.sq_norms.tolist(), parts.gram.diagonal().tolist(), strict=True):
        if q > n * _FLOOR and not norm <= n * q * (1 + _NARROW):
            raise _violation("|sum g|^2 / (n sum |g|^2) <= 1 of a block of shards", step, 1.0, norm / (n * q), _NARROW)


def _share(parts: Moments, norm: float, q: float) -> float:
    """f_l alpha_l = (Q_l / Q) |S_l|^2 / (n Q_l), also where Q_l is zero: S_l may be what squares cannot hold."""
    own = float(parts.sq_norms.sum())
    return own / q * alpha(parts.n, own, norm) if own > 0 else norm / (parts.n * q)


def _direct(counts: Tensor, sums: Tensor) -> _Direct:
    """Of the sums [J, P] of one parameter over blocks of these counts [J]."""
    total = sums.sum(dim=0)
    apart = sums / counts[:, None] - total / counts.sum()
    return _Direct(len(total), float(total.square().sum()), float((counts * apart.square().sum(dim=1)).sum()))


def _compare(identity: str, step: int, expected: float, got: float, tolerance: float) -> None:
    if not abs(expected - got) <= tolerance:
        raise _violation(identity, step, expected, got, tolerance)


def _violation(identity: str, step: int, expected: float, got: float, tolerance: float) -> GradscaleError:
    return GradscaleError(
        f"the identity {identity} must hold at step {step} to {tolerance:.1e}, expected {expected:.17g}, "
        f"got {got:.17g}; the states are not those of the rows: measure the step into a new run, and report it if "
        "that fails too"
    )
