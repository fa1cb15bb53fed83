"""Baratin's bound of the Rademacher complexity of a learning flow, for given radii and preconditioners.

Shapes: T checkpoints, n examples, C outputs, P entries of the measured parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from gradscale.errors import GradscaleError
from gradscale.measures.measure import Estimate
from gradscale.run.trajectory import UNIT, FeatureNorms, SquaredNorm, feature_norms
from gradscale.store.results import Run


def rademacher_bound(
    run: Run | Mapping[int, FeatureNorms],
    radii: Mapping[int, float],
    preconditioners: Mapping[int, float | Mapping[str, float]] | None = None,
) -> Estimate:
    """sum_t (m_t / n) |A_t^-1 Phi_t^T|_F, over the steps t of `radii`: a bound of the Rademacher complexity of what
    updates with |A_t delta w_t| <= m_t may add up to.

    R = (1/n) E_s sup sum_ic s_ic sum_t <delta w_t, Phi_t(x_i)_c> over signs s, at most the sum, since the supremum of
    <delta w, u> over the ellipsoid is m_t |A_t^-1 u|, A_t symmetric. With A_t = I and m_t = |delta w_t| it is C / n, C
    as `path_complexity` has it where every step is a checkpoint. `preconditioners`: for every step a positive number
    a_t, A_t = a_t I, or one for every measured parameter (tensor), A_t = diag(a_l I), by |Phi|_F of each; None is I.
    Diagonals within a parameter, and full matrices, are not taken: |A^-1 Phi^T|_F of those needs probes of its own,
    and cannot be had from what a run stores. A_t act on parameters; there is none that acts on outputs.

    Conditional: on radii, A_t and the features Phi_t being fixed before the examples are seen, which those of a
    training run are not; with an upper confidence bound in place of the estimate only if the error is added. Standard
    error: of the probes, errors of steps and of parameters added, not their squares, as they share their probes: an
    upper bound. `run` is one with `tangent_kernel`, or what `feature_norms` gives. Units: output units.

    Cost: reads the run's table of estimates.
    Raises: GradscaleError if there is no such run, step or parameter, or a radius or preconditioner is not positive.
    Source: Baratin et al. (2021), arXiv 2008.00938, section 4, the bound for learning flows.
    """
    norms = run if isinstance(run, Mapping) else feature_norms(run)
    preconditioners = dict.fromkeys(radii, 1.0) if preconditioners is None else preconditioners
    _check_steps("radii", radii, norms)
    if set(preconditioners) != set(radii):
        raise GradscaleError(
            f"preconditioners must be given for the steps of radii, {sorted(radii)}, got {sorted(preconditioners)}; "
            "give 1.0 where there is none"
        )
    sizes = {norms[step].n for step in radii}
    if len(sizes) != 1:
        raise GradscaleError(
            f"all steps must have as many finite examples, got {sorted(sizes)}; leave the steps with fewer out of radii"
        )
    n = sizes.pop()
    terms = [(radii[step] / n, *_preconditioned(norms[step], preconditioners[step], step)) for step in sorted(radii)]
    value, error = (math.fsum(factor * part[j] for factor, *part in terms) for j in (0, 1))
    kinds = sorted({"scalar" if isinstance(a, int | float) else "by parameter" for a in preconditioners.values()})
    return Estimate(value, error, n, "conditional", f"rademacher_bound/A={' and '.join(kinds)}/v1", UNIT)


def _preconditioned(norms: FeatureNorms, a: float | Mapping[str, float], step: int) -> tuple[float, float]:
    """|A^-1 Phi^T|_F and its standard error."""
    values = [a] if isinstance(a, int | float) else list(a.values())
    if not all(0 < value < math.inf for value in values):
        raise GradscaleError(
            f"preconditioners must be positive numbers, got {values} at step {step}; give a of A = a I"
        )
    if isinstance(a, int | float):
        norm, error = norms.whole.root
        return norm / a, error / a
    if set(a) != set(norms.layers):
        raise GradscaleError(
            f"preconditioners must be given for every measured parameter, {', '.join(norms.layers)}, got "
            f"{', '.join(a) or 'none'} at step {step}"
        )
    square = math.fsum(part.value / a[name] ** 2 for name, part in norms.layers.items())
    return SquaredNorm(square, math.fsum(part.stderr / a[name] ** 2 for name, part in norms.layers.items())).root


def _check_steps(what: str, given: Mapping[int, float], norms: Mapping[int, FeatureNorms]) -> None:
    if not given or not set(given) <= set(norms):
        raise GradscaleError(f"{what} must be given for steps among {sorted(norms)}, got {sorted(given)}")
    if not all(0 < value < math.inf for value in given.values()):
        raise GradscaleError(
            f"{what} must be positive numbers, got {list(given.values())}; leave steps without one out"
        )
