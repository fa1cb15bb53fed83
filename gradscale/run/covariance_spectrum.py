"""The spectrum of the covariance of per-example gradients, from the sketches of a finished run.

Shapes: n examples, b of them in a block, K sketch, J blocks, m = min(n - 1, K) eigenvalues.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.measures.covariance_moments import (
    Spectrum,
    entropy_rank,
    frobenius_sq,
    jackknife_error,
    trace_sq,
    without_sketch_noise,
)
from gradscale.measures.dispersion import SQUARED
from gradscale.measures.measure import Estimate
from gradscale.run.covariance_scans import by_gram, by_moments
from gradscale.run.plan import check_positive
from gradscale.store.products import MATRIX_BYTES
from gradscale.store.results import Run

if TYPE_CHECKING:
    import pandas as pd

OPERATOR = "gradient_covariance"
_LEAST = 4  # examples: the U-statistics are over quadruples
_GAUSSIAN = ("gaussian", "rademacher")  # whose noise is the one that is taken off, or within 2 / K of it
_BOUNDED = ("count", "sjlt", "srht")  # whose noise is at most that
_UNITS = {"participation_ratio": "1", "entropy_rank": "1", "stable_rank": "1", "lambda_max": SQUARED}
_FOURTH = "(loss units / parameter unit)^4"


class CovarianceSpectrum(NamedTuple):
    """Eigenvalues of the sample covariance of gradients at one step, and what summarizes them."""

    step: int
    eigenvalues: np.ndarray  # [m] float64, descending
    stderr: np.ndarray  # [m]: over examples; NaN beyond what every left-out sample has
    resolution: float  # tr Sigma / K, by which a sketch lifts every eigenvalue, more or less; 0 of the identity
    estimates: Mapping[str, Estimate]  # by name, of all measured parameters together

    def to_frame(self) -> pd.DataFrame:
        """A row for each eigenvalue: step, operator, index, value, stderr, weight, residual.

        As in spectra.parquet; the last two are NaN: these are no quadrature nodes and no Ritz values.
        """
        import pandas as pd

        m = len(self.eigenvalues)
        about = {"step": np.full(m, self.step), "operator": [OPERATOR] * m, "index": np.arange(m)}
        nothing = np.full(m, math.nan)
        return pd.DataFrame(
            {**about, "value": self.eigenvalues, "stderr": self.stderr, "weight": nothing, "residual": nothing}
        )


def covariance_spectrum(
    run: Run, step: int, ids: Sequence[int] | np.ndarray | None = None, blocks: int = 20
) -> CovarianceSpectrum:
    """The spectrum of (1/(n - 1)) sum_i (g_i - g) (g_i - g)^T over all finite examples at `step`, or those of `ids`.

    `eigenvalues` are those of the sketches, each scaled to the exact norm of its gradient before their mean is taken
    off: products are then sketched cosines by exact norms, the matrix has no negative eigenvalue, and the trace is off
    by the error of |mean g|^2 alone. (Exact norms on the diagonal of a sketched Gram matrix, as `run.gram` has them,
    leave it indefinite; put there after centring they would be the norms of something else.) Exact of the identity.
    Of a sketch, eigenvalues far above `resolution` = tr Sigma / K are those of the gradients to about sqrt(2 / K) of
    themselves; what lies around it or below is the sketch's. The largest is also biased up by the sample.

    `estimates`, with tr Sigma exact from the run's `dispersion` (given `ids`, from their exact norms and the sketched
    mean):

        trace_covariance          tr Sigma, unbiased
        trace_sketched            the sum of `eigenvalues`, to be held to it
        frobenius_sq              |Sigma|_F^2, a U-statistic over pairs of different examples, sketch noise taken off as
                                  that of a dense Gaussian map, `without_sketch_noise`: unbiased of gaussian and of the
                                  identity, of rademacher low by 2 / K of itself or less. Of count, sjlt and srht
                                  `conditional`: their noise is at most that, so that the truth is to be expected
                                  between it and the next. NaN of kronecker, whose noise depends on the gradients
        frobenius_sq_uncorrected  the same with that noise in it
        participation_ratio       (tr Sigma)^2 / |Sigma|_F^2; NaN where the latter comes out negative
        entropy_rank              exp of the entropy of the eigenvalues as shares; heuristic: a plug-in, low where n is
                                  not large beside it; of a sketch, of what `resolution` has lifted too
        stable_rank               tr Sigma / lambda_max
        lambda_max                the first of `eigenvalues`

    Standard errors: delete-one-block jackknife over at most `blocks` runs of neighbouring ids, for other examples and
    the same sketch; shuffle a sorted dataset. The sketch's own error is not in them. NaN of a single block.

    Cost: of n <= K examples n^2 K operations, J + 1 eigenvalue problems of size n; else 8 n K^2, J + 1 of size K, the
    sketches read three times. Memory: nine matrices of that size, and a row group.
    Raises: GradscaleError if there are fewer than four examples, the run has no dispersion and `ids` is None, the
    matrix is larger than 1 GiB, or as `run.stored_sketches`.
    Source: entropy rank: Roy and Vetterli (2007), EUSIPCO;
    |Sigma|_F^2: Chen, Zhang and Zhong (2010), J. Am. Stat. Assoc. 105; the sketch's bias is derived here.
    """
    check_positive(blocks=blocks)
    stored = run.stored_sketches(step)
    positions = np.arange(len(stored.ids)) if ids is None else np.unique(stored.positions(ids))
    n, dim = len(positions), int(stored.scheme["dim"])
    _check_sizes(n, dim, step)
    exact = _exact_trace(run, step, n) if ids is None else None
    J = max(1, min(blocks, n - _LEAST))
    whole, *left_out = by_gram(stored, positions, J) if n <= dim else by_moments(stored, positions, J)
    scheme = stored.scheme
    values = _quantities(whole, scheme, exact.value if exact else None)
    replicates = [_quantities(part, scheme, None) for part in left_out]
    estimates = {name: _estimate(name, values[name], replicates, n, scheme) for name in values}
    trace = exact or estimates["trace_sketched"]._replace(definition="covariance_spectrum/trace_covariance/sketched/v1")
    estimates = {"trace_covariance": trace, **estimates}
    resolution = 0.0 if scheme["name"] == "identity" else trace.value / dim
    errors = _jackknife_rows([part.eigenvalues for part in left_out], len(whole.eigenvalues))
    return CovarianceSpectrum(step, whole.eigenvalues.numpy(), errors, resolution, estimates)


def _quantities(spectrum: Spectrum, scheme: Mapping[str, Any], trace: float | None) -> dict[str, float]:
    """`trace` is the exact one, of all examples; the sketched one serves where there is none."""
    values = spectrum.eigenvalues
    sketched, largest = float(values.sum()), float(values[0])
    total = sketched if trace is None else trace
    uncorrected = frobenius_sq(spectrum.invariants)
    square = _corrected(uncorrected, trace_sq(spectrum.invariants), scheme)
    return {
        "trace_sketched": sketched,
        "frobenius_sq": square,
        "frobenius_sq_uncorrected": uncorrected,
        "participation_ratio": total**2 / square if square > 0 else math.nan,
        "entropy_rank": entropy_rank(values),
        "stable_rank": total / largest if largest > 0 else math.nan,
        "lambda_max": largest,
    }


def _corrected(frobenius: float, trace: float, scheme: Mapping[str, Any]) -> float:
    if scheme["name"] == "identity":
        return frobenius
    known = scheme["name"] in (*_GAUSSIAN, *_BOUNDED)
    return without_sketch_noise(frobenius, trace, int(scheme["dim"])) if known else math.nan


def _estimate(
    name: str, value: float, replicates: Sequence[Mapping[str, float]], n: int, scheme: Mapping[str, Any]
) -> Estimate:
    error = jackknife_error(torch.tensor([found[name] for found in replicates], dtype=torch.float64))
    status = "estimator"
    if name == "entropy_rank":
        status = "heuristic"
    elif name in ("frobenius_sq", "participation_ratio") and scheme["name"] in _BOUNDED:
        status = "conditional"
    unit = _UNITS.get(name, _FOURTH if name.startswith("frobenius") else SQUARED)
    definition = f"covariance_spectrum/{name}/{scheme['name']}:{scheme['dim']}/v1"
    return Estimate(value, float(error), n, status, definition, unit)


def _jackknife_rows(rows: Sequence[Tensor], m: int) -> np.ndarray:
    """[m]: the error of each eigenvalue by its place in the order."""
    errors = torch.full((m,), math.nan, dtype=torch.float64)
    if rows:
        shortest = min(len(row) for row in rows)
        errors[:shortest] = jackknife_error(torch.stack([row[:shortest] for row in rows]))
    found: np.ndarray = errors.numpy()
    return found


def _exact_trace(run: Run, step: int, n: int) -> Estimate:
    """Raises: GradscaleError if the run did not measure it, or of other examples."""
    frame = run.estimates()
    chosen = frame[(frame["step"] == step) & (frame["measure"] == "dispersion") & (frame["scope"] == "all")]
    chosen = chosen[chosen["name"] == "trace_covariance"]
    if not len(chosen):
        raise GradscaleError(
            f"run {run.path} must have been measured with dispersion for the exact trace at step {step}, got "
            f"{', '.join(run.plan['measures']) or 'none'}; measure it again with --measures dispersion, or pass ids= "
            "for that of the sketches"
        )
    row = chosen.iloc[0]
    found = (float(row["value"]), float(row["stderr"]), int(row["n"]), row["status"], row["definition"], row["unit"])
    if found[2] != n:
        raise GradscaleError(
            f"sketches must be of the {found[2]} examples of trace_covariance at step {step} of {run.path}, got {n}; "
            "run the run's command again"
        )
    return Estimate(*found)


def _check_sizes(n: int, dim: int, step: int) -> None:
    if n < _LEAST:
        raise GradscaleError(
            f"ids must name at least {_LEAST} finite examples at step {step} for a covariance, got {n}; name more"
        )
    size = min(n, dim)
    if 8 * size * size > MATRIX_BYTES:
        raise GradscaleError(
            f"the smaller of n and K must be at most {math.isqrt(MATRIX_BYTES // 8)} for a matrix of "
            f"{MATRIX_BYTES >> 20} MiB, got {n} examples and K = {dim}; pass ids= of fewer, or measure with a smaller K"
        )
