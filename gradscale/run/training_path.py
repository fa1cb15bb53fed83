"""What the path of an attached training says: its length and complexity, the variance and the perturbation along it.

Pure functions of a run that `gs.attach` has written with `path=True`. Shapes: S optimizer steps, M measured ones.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradscale.errors import GradscaleError
from gradscale.measures.measure import Estimate
from gradscale.run.trajectory import INTERPOLATIONS, PathComplexity, path_complexity
from gradscale.store.results import Run
from gradscale.store.training_path import read_path

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray[Any, np.dtype[np.float64]]
_LENGTH = "parameter units"


class PerturbationIntegral(NamedTuple):
    """The integral of eps_bar over the time of the flow, and what its quadrature was."""

    integral: Estimate
    time: float  # S learning rates added up
    spacing: float  # the longest time without a measured step
    coarser: float  # the same from every second measured step; NaN of fewer than three


def training_path(run: Run) -> pd.DataFrame:
    """A row for every optimizer step, by step: those of path.parquet, see docs/training-path.md.

    `length` is |w_(t+1) - w_t| over the measured parameters, exact; `skipped` steps have 0. NaN is what could not be
    told: that of a step in which reading the weights failed, or a loss that did not go through engine.backward.

    Cost: one small table is read.
    Raises: GradscaleError if the run has none, or the file is damaged.
    Source: what training did, exact; the step's length is that of Baratin et al. (2021), arXiv 2008.00938, section 4.
    """
    frame: pd.DataFrame = read_path(run.files).to_pandas()
    return frame


def path_length(run: Run) -> Estimate:
    """sum_t |w_(t+1) - w_t| over the steps of the training: exact, status identity; n counts the steps.

    Cost: one small table is read.
    Raises: GradscaleError as `training_path`, or if a step or its length is missing.
    Source: the length of the path in Baratin et al. (2021), arXiv 2008.00938, section 4, without the features' norms.
    """
    path = _whole(run)
    _check_lengths(run, path)
    value = math.fsum(path["length"])
    return Estimate(value, None, len(path), "identity", "training_path/length/realized, n: steps/v1", _LENGTH)


def training_complexity(training: Run, checkpoints: Run, interpolation: str = "trapezoid") -> PathComplexity:
    """C = sum_t |w_(t+1) - w_t| |Phi_t|_F, with every step's own length from `training`.

    |Phi| takes passes of its own: `checkpoints` is a run of `gs.measure` with `tangent_kernel` over checkpoints of that
    training, its steps being the training's. As `gs.path_complexity(checkpoints, lengths=gs.training_path(training))`,
    and the parameters are held to be the same. Heuristic.

    Cost: small tables are read.
    Raises: GradscaleError as `gs.path_complexity` and `path_length`, or if the two have measured other parameters.
    Source: Baratin et al. (2021), arXiv 2008.00938, section 4: the heuristic for their bound.
    """
    ours, theirs = (
        {name: about["shape"] for name, about in run.plan["parameters"].items()} for run in (training, checkpoints)
    )
    if ours != theirs:
        differing = sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        raise GradscaleError(
            f"both runs must have measured the same parameters, got differences in {', '.join(differing[:3])}; use the "
            "same params and exclude"
        )
    path = _whole(training)
    _check_lengths(training, path)
    return path_complexity(checkpoints, lengths=path, interpolation=interpolation)


def gradient_variances(run: Run, group: int | None = None) -> pd.DataFrame:
    """V_t at every measured step [M]: columns step, learning_rate, variance, stderr, n, skipped.

    V_t = tr Sigma / n, of the n examples of the step on all ranks: an unbiased estimate of the variance
    E[|g(w_t, B_t) - g(w_t)|^2 | w_t] of the mean gradient of n examples that are drawn independently of w_t, within one
    training. It is conditional: in later epochs examples have been seen by w_t, and V_t of such batches is another
    number. The V of Wang and Mao, around E g(W) over trainings, has a share across seeds that no single run can tell.

    `stderr`: of tr Sigma by n, the jackknife over the step's blocks. `learning_rate`: of all groups, or `group`.

    Cost: small tables are read.
    Raises: GradscaleError if the run was not measured with `dispersion`, has no path, or groups of several rates.
    Source: Neu et al. (2021), COLT, theorem 1; Wang and Mao (2021), arXiv 2110.03128.
    """
    import pandas as pd

    measured = run.plan["measures"]
    if "dispersion" not in measured:
        raise GradscaleError(
            f"run {run.path} must have been measured with dispersion, got {', '.join(measured) or 'none'}; train again "
            "with gs.Dispersion() in measures"
        )
    path = training_path(run).set_index("step", drop=False)
    frame = run.estimates()
    rows = frame[(frame["measure"] == "dispersion") & (frame["name"] == "trace_covariance") & (frame["scope"] == "all")]
    rows = rows[rows["step"].isin(path["step"])].sort_values("step")
    if not len(rows):
        raise GradscaleError(
            f"run {run.path} must have a measured step on its path, got none; train longer than every steps"
        )
    here = path.loc[rows["step"]]
    n = rows["n"].to_numpy()
    return pd.DataFrame(
        {
            "step": rows["step"].to_numpy(),
            "learning_rate": _rates(here, group),
            "variance": rows["value"].to_numpy() / n,
            "stderr": rows["stderr"].to_numpy() / n,
            "n": n,
            "skipped": here["skipped"].to_numpy(),
        }
    )


def variance_sum(run: Run, interpolation: str = "trapezoid", group: int | None = None) -> Estimate:
    """sum_t lambda_t^2 V_t over the steps of the training: what the information-theoretic bounds of SGD have of it.

    With it the bound of Wang and Mao is (3/2) (R^2 S / m x this x tr H)^(1/3), of m training examples and S steps, and
    the term of V in that of Neu et al., at one sigma for all steps, (4 R^2 / m) x this / sigma^2. lambda_t is the
    step's learning rate, 0 of skipped steps; V_t as in `gradient_variances`, between measured steps linear in the step
    (`trapezoid`) or as at the earlier one (`step`), beyond the first and last as at these. Both bounds are of plain SGD
    on batches drawn independently of the weights, with lambda_t fixed in advance; momentum and Adam are not covered.

    Status estimator where every step is measured, else heuristic. Standard error: the squares of the steps' added, for
    their batches are other examples; that of interpolation is not in it, and one epoch is taken for granted. n: the
    examples of all measured steps.

    Cost: small tables are read.
    Raises: GradscaleError as `gradient_variances`, or if a step is missing.
    Source: Wang and Mao (2021), arXiv 2110.03128; Neu et al. (2021), COLT, theorem 1.
    """
    path, measured = _whole(run), gradient_variances(run, group)
    rates = _taken_rates(path, group)
    shares = _shares(path["step"].to_numpy(), rates**2, measured["step"].to_numpy(), interpolation)
    status = "estimator" if len(measured) == len(path) else "heuristic"
    about = f"variance_sum/{len(measured)} of {len(path)} steps, {interpolation}/v1"
    return _sum(measured, shares, status, about, "parameter units^2")


def perturbation_integral(
    run: Run, examples: int, interpolation: str = "trapezoid", group: int | None = None
) -> PerturbationIntegral:
    """The integral of eps_bar = tr Sigma / m over the time of the flow, sum_t eta_t eps_bar(t), m = `examples`.

    m is the number of training examples, that of the leave-one-out gap whose source eps_bar is; tr Sigma is estimated
    from the examples of each measured step. Quadrature: every step counts with its learning rate eta_t (0 if skipped)
    from its beginning, as in `gs.leave_out_gap`; between measured steps tr Sigma is linear in the step (`trapezoid`) or
    as at the earlier one (`step`), beyond the first and last as at these. `spacing` is the longest time between two
    measured steps, and `coarser` the same from every second of them: how far off it is tells of the quadrature's error.

    Conditional: on the path being that of the full-batch gradient flow with all m examples, which that of SGD follows
    at best roughly, and that of momentum or Adam does not, for which eta_t is no time; and on examples that w_t has not
    seen. The contraction, which closes the gap again, is not in it. Standard error: the squares of the steps' added, of
    V_t as in `variance_sum`. n: the examples of all measured steps.

    Cost: small tables are read.
    Raises: GradscaleError as `variance_sum`, or if examples is not a whole number of at least 2.
    Source: Yang and Chaudhari (2025), arXiv 2504.16450; eps_bar is reconstructed, see `gs.EffectiveGram`.
    """
    if not isinstance(examples, int) or isinstance(examples, bool) or examples < 2:
        raise GradscaleError(
            f"examples must be a whole number of at least 2, got {examples!r}; give the size of the training set"
        )
    path, measured = _whole(run), gradient_variances(run, group)
    steps, rates, at = path["step"].to_numpy(), _taken_rates(path, group), measured["step"].to_numpy()
    times = np.concatenate([[0.0], rates.cumsum()])  # at the beginning of every step, and at the end
    ends = times[np.concatenate([[0], at - steps[0], [len(steps)]])]
    about = f"perturbation_integral/m={examples}, {len(at)} of {len(steps)} steps, {interpolation}"
    definition = f"{about}, time={times[-1]:g}/leave-one-out flow, reconstructed/v1"

    def integral(part: pd.DataFrame) -> Estimate:
        shares = _shares(steps, rates, part["step"].to_numpy(), interpolation)
        traces = part["n"].to_numpy() / examples  # V_t n = tr Sigma
        return _sum(part, shares * traces, "conditional", definition, "loss units")

    coarser = integral(measured[::2]).value if len(measured) > 2 else math.nan
    return PerturbationIntegral(integral(measured), float(times[-1]), float(np.diff(ends).max()), coarser)


def _sum(measured: pd.DataFrame, shares: Array, status: str, definition: str, unit: str) -> Estimate:
    values, errors = shares * measured["variance"].to_numpy(), shares * measured["stderr"].to_numpy()
    error = math.sqrt(math.fsum(errors**2))
    n = int(measured["n"].sum())
    return Estimate(math.fsum(values), error, n, status, f"training_path/{definition}", unit)


def _shares(steps: Array, weights: Array, measured: Array, interpolation: str) -> Array:
    """[M]: a_j with sum_t weights_t v(t) = sum_j a_j v(measured_j), v interpolated between the measured steps.

    Raises: GradscaleError if the interpolation is not known.
    """
    if interpolation not in INTERPOLATIONS:
        raise GradscaleError(
            f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}; trapezoid is the default"
        )
    after = np.searchsorted(measured, steps, side="right")
    left, right = np.clip(after - 1, 0, None), np.clip(after, None, len(measured) - 1)
    way = np.maximum(measured[right] - measured[left], 1)
    late = (steps - measured[left]) / way * (right > left) if interpolation == "trapezoid" else np.zeros(len(steps))
    shares = np.zeros(len(measured))
    np.add.at(shares, left, weights * (1 - late))
    np.add.at(shares, right, weights * late)
    return shares


def _whole(run: Run) -> pd.DataFrame:
    """Raises: GradscaleError unless the path has steps, one after another."""
    path = training_path(run)
    steps = path["step"].to_numpy()
    expected = np.arange(steps[0], steps[-1] + 1) if len(steps) else steps
    if not len(steps) or not np.array_equal(steps, expected):
        raise GradscaleError(
            f"path of {run.path} must have every step once, got {len(steps)} rows for {len(expected)} steps; train "
            "under gs.attach with path=True from the first step to the last"
        )
    return path


def _check_lengths(run: Run, path: pd.DataFrame) -> None:
    spoilt = path["step"][~np.isfinite(path["length"])].tolist()
    if spoilt:
        raise GradscaleError(
            f"lengths of {run.path} must be finite, got others at steps {spoilt[:3]}; the training diverged there, or "
            "its log says what failed"
        )


def _rates(path: pd.DataFrame, group: int | None) -> Array:
    """[S]: the learning rates of one group of parameters, or of all.

    Raises: GradscaleError if there is no such group, or several rates where they are to be one.
    """
    for step, rates in zip(path["step"], map(np.ndarray.tolist, path["learning_rates"]), strict=True):
        if group is None and len(set(rates)) != 1:
            raise GradscaleError(
                f"all groups of parameters must have one learning rate, got {rates} at step {step}; pass group="
            )
        if group is not None and not 0 <= group < len(rates):
            raise GradscaleError(f"group must be one of {len(rates)} from 0 on, got {group} at step {step}; see get_lr")
    return np.array([rates[group or 0] for rates in path["learning_rates"]], dtype=np.float64)


def _taken_rates(path: pd.DataFrame, group: int | None) -> Array:
    """[S]: 0 where no step was taken."""
    return np.where(path["skipped"].to_numpy(), 0.0, _rates(path, group))
