"""Every statistic is a commutative monoid that survives storage; every estimate is its definition with its error.

Shapes: B examples of a microbatch, n of the data, L parameters, P entries of one parameter, N probes, J blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.grads.layer import DenseGrads
from gradscale.grads.readings import GradientSums, Projected, Sums
from gradscale.measures.coherence import Coherence
from gradscale.measures.curvature import Curvature
from gradscale.measures.dispersion import Dispersion
from gradscale.measures.effective_gram import EffectiveGram
from gradscale.measures.exact_sum import total_of
from gradscale.measures.gaussian_width import GaussianWidth
from gradscale.measures.geometric_complexity import GeometricComplexity
from gradscale.measures.hessian_probes import HessianState
from gradscale.measures.measure import Estimate, Gathering, Measure, MicroBatch, OverSteps, Statistic, statistic_of
from gradscale.measures.moments import MomentsStatistic
from gradscale.measures.perturbation import BatchMeans, draws_of
from gradscale.measures.probe_means import means_of
from gradscale.measures.sensitivity import Sensitivity, SensitivityState
from gradscale.measures.settings import parse_measures
from gradscale.measures.sharpness import AscentState, Sharpness
from gradscale.measures.tangent_kernel import TangentKernel
from gradscale.measures.tangent_passes import TangentState
from gradscale.measures.unit_sums import UnitSumsStatistic
from gradscale.measures.worst_case import WorstCase
from gradscale.run import laws as laws_held
from gradscale.run.fold import flatten, statistics_of, unflatten
from gradscale.run.laws import difference
from gradscale.sketches.gaussian import GaussianProbes
from gradscale.store.store import decode_states, encode_states

SHAPES = {"z.weight": 6, "a.bias": 1, "head/odd|name": 3}  # L parameters, not in the order of their names
NAMES = list(SHAPES)
P = sum(SHAPES.values())
PROBES = 5
MIN_NORM = 8.0  # about the median of `Data.random`
BESIDE = (
    GeometricComplexity(3),
    TangentKernel(2, alignment=True),
    Sensitivity(num_draws=2),
    Sharpness(num_draws=2),
    WorstCase(num_steps=2),
    Curvature(2, frobenius=True),
)
STATISTICS: list[Statistic[Any]] = [
    MomentsStatistic(),
    MomentsStatistic(by_class=True),
    MomentsStatistic(by_class=True, min_norm=MIN_NORM),
    GaussianWidth(PROBES, seed=3),
    UnitSumsStatistic(),
    UnitSumsStatistic(by_class=True),
    *BESIDE,
]
EXACT = (  # sums of integers, exact sums, and maxima
    *("counts", "zeros", "examples", "largest", "smallest", "total"),
    *("totals", "batches", "ascent_batches", "ascent_totals"),
)
Array = np.ndarray[Any, np.dtype[np.float64]]

laws = settings(deadline=None, max_examples=40)
statistics = st.sampled_from(STATISTICS)


@st.composite
def microbatches(draw: st.DrawFn) -> MicroBatch:
    """0 to 4 finite examples, now and then from a batch that had others."""
    B, seed = draw(st.integers(0, 4)), draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** draw(st.integers(-3, 3))
    grads = scale * torch.randn(B, P, dtype=torch.float64, generator=generator)
    grads[torch.rand(B, generator=generator) < 0.2] = 0.0
    labels = torch.randint(-1, 3, (B,), generator=generator)
    spare = draw(st.sampled_from([(), (1,), (7,)]))
    return with_beside(micro(grads, labels, block=draw(st.integers(0, 2)), spare_classes=spare))


@st.composite
def states(draw: st.DrawFn, statistic: Statistic[Any]) -> Any:
    return reduce(statistic.update, draw(st.lists(microbatches(), max_size=3)), statistic.init())


@laws
@given(statistics, st.data())
def test_the_initial_state_changes_nothing(statistic: Statistic[Any], data: st.DataObject) -> None:
    laws_held.hold_unit(statistic, data.draw(states(statistic)))


@laws
@given(statistics, st.data())
def test_merge_is_associative(statistic: Statistic[Any], data: st.DataObject) -> None:
    a, b, c = (data.draw(states(statistic)) for _ in range(3))
    laws_held.hold_associativity(statistic, a, b, c, EXACT)


@laws
@given(statistics, st.data())
def test_merge_is_commutative(statistic: Statistic[Any], data: st.DataObject) -> None:
    laws_held.hold_commutativity(statistic, data.draw(states(statistic)), data.draw(states(statistic)))


@laws
@given(statistics, microbatches(), st.data())
def test_update_and_merge_can_be_exchanged(statistic: Statistic[Any], batch: MicroBatch, data: st.DataObject) -> None:
    a, b = data.draw(states(statistic)), data.draw(states(statistic))
    laws_held.hold_exchange(statistic, a, b, batch, EXACT)


@laws
@given(statistics, microbatches(), microbatches(), st.data())
def test_microbatches_can_be_split(
    statistic: Statistic[Any], first: MicroBatch, second: MicroBatch, data: st.DataObject
) -> None:
    laws_held.hold_splitting(statistic, data.draw(states(statistic)), first, second._replace(block=first.block), EXACT)


@laws
@given(statistics, microbatches(), st.data())
def test_arguments_are_left_untouched(statistic: Statistic[Any], batch: MicroBatch, data: st.DataObject) -> None:
    a, b = data.draw(states(statistic)), data.draw(states(statistic))
    laws_held.hold_arguments(statistic, a, b, batch)


@laws
@given(st.data())
def test_states_survive_storage_bit_for_bit(data: st.DataObject) -> None:
    laws_held.hold_storage({statistic: data.draw(states(statistic)) for statistic in STATISTICS})


def test_a_stored_state_goes_on_like_the_one_that_was_not_stored() -> None:
    data = Data.random(3, [4, 5, 3])
    for statistic in STATISTICS:
        first, *rest = map(with_beside, data.batches)
        state = statistic.update(statistic.init(), first)
        (stored,) = unflatten([statistic], decode_states(encode_states(flatten({statistic: state})))).values()
        assert not difference(reduce(statistic.update, rest, stored), reduce(statistic.update, rest, state), bits=True)


def test_measures_with_equal_statistics_share_one_state() -> None:
    measures: list[Measure] = [Coherence(), Dispersion(), GaussianWidth()]
    assert statistics_of(measures) == [MomentsStatistic(), GaussianWidth()]
    assert all(isinstance(measure, Measure) for measure in measures)
    assert [isinstance(measure, OverSteps) for measure in measures] == [False, False, True]
    assert len(statistics_of([Coherence(by_class=True), Dispersion()])) == 2


# --- coherence and dispersion -----------------------------------------------------------------------------------------


def alpha(g: Array) -> float:
    return float((g.mean(0) ** 2).sum() / (g**2).sum(1).mean())


def alpha_unbiased(g: Array) -> float:
    """The mean of <g_i, g_j> over pairs i != j, by the mean squared norm."""
    gram, n = g @ g.T, len(g)
    return math.nan if n < 2 else float((gram.sum() - np.trace(gram)) / (n * (n - 1)) / (np.trace(gram) / n))


def trace_covariance(g: Array) -> float:
    return math.nan if len(g) < 2 else float(np.trace(np.atleast_2d(np.cov(g.T))))


def noise_scale(g: Array) -> float:
    if len(g) < 2:
        return math.nan
    gram = g @ g.T
    signal = float((gram.sum() - np.trace(gram)) / (len(g) * (len(g) - 1)))
    return trace_covariance(g) / signal if signal > 0 else math.nan


def v_within(g: Array) -> float:
    """The variance of a mean of 8 fresh examples."""
    return trace_covariance(g) / 8


QUANTITIES: dict[str, tuple[Measure, Callable[[Array], float]]] = {
    "alpha": (Coherence(by_class=True), alpha),
    "alpha_unbiased": (Coherence(by_class=True), alpha_unbiased),
    "trace_covariance": (Dispersion(), trace_covariance),
    "noise_scale": (Dispersion(), noise_scale),
    "v_within": (Dispersion(batch_size=8), v_within),
}


@pytest.mark.parametrize("name", QUANTITIES)
@pytest.mark.parametrize("sizes", [[5, 5, 5], [7, 3, 4, 6], [9, 1]])
def test_values_and_errors_are_those_of_the_dense_gradients(name: str, sizes: list[int]) -> None:
    data = Data.random(1, sizes)
    measure, oracle = QUANTITIES[name]
    estimates = measure.compute(data.state(statistic_of(measure)))
    scopes = {"all": data.grads, **{f"layer:{layer}": data.layer(layer) for layer in NAMES}}
    for scope, g in scopes.items():
        estimate = estimates[name, scope]
        assert estimate.n == len(g)
        assert estimate.status == "estimator"
        expect(estimate.value, oracle(g))
        expect(estimate.stderr, busing(oracle, g, data.blocks))
    by_class = {scope for _, scope in estimates if scope.startswith("class:")}
    assert by_class == ({f"class:{c}" for c in np.unique(data.labels)} if isinstance(measure, Coherence) else set())
    for scope in by_class:
        mine = data.labels == int(scope.removeprefix("class:"))
        expect(estimates[name, scope].value, oracle(data.grads[mine]))
        expect(estimates[name, scope].stderr, busing(oracle, data.grads[mine], data.blocks[mine]))
        assert estimates[name, scope].n == mine.sum()


@pytest.mark.parametrize("name", QUANTITIES)
def test_equal_blocks_give_the_classical_jackknife(name: str) -> None:
    data = Data.random(2, [4] * 6)
    measure, oracle = QUANTITIES[name]
    left_out = np.array([oracle(data.grads[data.blocks != j]) for j in range(6)])
    classical = math.sqrt(5 / 6 * ((left_out - left_out.mean()) ** 2).sum())
    expect(measure.compute(data.state(statistic_of(measure)))[name, "all"].stderr, classical)


def test_m_coherence_is_n_alpha() -> None:
    """Its error too: n is that of the data measured, and no estimate."""
    estimates = Coherence(by_class=True).compute(Data.random(2, [4, 7]).state(MomentsStatistic(by_class=True)))
    for scope in {scope for _, scope in estimates}:
        value, stderr, n, *_ = estimates["alpha", scope]
        assert stderr is not None
        expect(estimates["m_coherence", scope].value, n * value)
        expect(estimates["m_coherence", scope].stderr, n * stderr)


def test_perturbation_is_the_trace_by_n() -> None:
    """Its error too, for the same reason; and it is q (1 - alpha) / (n - 1)."""
    data = Data.random(3, [5, 8, 4])
    state, n = data.state(MomentsStatistic()), 17
    found, traces = EffectiveGram().compute(state), Dispersion().compute(state)
    assert {scope for _, scope in found} == {scope for _, scope in traces}
    for (name, scope), (value, stderr, count, status, definition, _) in found.items():
        trace = traces["trace_covariance", scope]
        assert (name, count, status) == ("perturbation", n, "conditional")
        assert "reconstructed" in definition
        assert trace.stderr is not None
        expect(value, trace.value / n)
        expect(stderr, trace.stderr / n)
        g = data.grads if scope == "all" else data.layer(scope.removeprefix("layer:"))
        expect(value, (g**2).sum(1).mean() * (1 - alpha(g)) / (n - 1))
        left_out = [g[i] - np.delete(g, i, axis=0).mean(0) for i in range(n)]  # math.md, section 8
        expect(value, sum(float(g[i] @ apart) for i, apart in enumerate(left_out)) / n**2)


@pytest.mark.parametrize("sizes", [[6, 9, 7], [9, 1, 4]])
def test_coherence_above_a_norm_is_that_of_the_longer_gradients(sizes: list[int]) -> None:
    data = Data.random(1, sizes)
    measure = Coherence(min_norm=MIN_NORM)
    found = measure.compute(data.state(statistic_of(measure)))
    above = np.linalg.norm(data.grads, axis=1) > MIN_NORM
    assert 2 < above.sum() < len(above)
    for scope, g in {"all": data.grads, **{f"layer:{layer}": data.layer(layer) for layer in NAMES}}.items():
        estimate = found["alpha_above", scope]
        expect(estimate.value, alpha(g[above]))
        expect(estimate.stderr, busing(alpha, g[above], data.blocks[above]))
        assert (estimate.n, estimate.status) == (above.sum(), "estimator")
        assert "min_norm=8.0" in estimate.definition
        expect(found["alpha", scope].value, alpha(g))
    assert not {name for name, _ in Coherence().compute(data.state(MomentsStatistic()))} & {"alpha_above"}


def test_nothing_above_the_norm_has_no_coherence() -> None:
    data = Data(1e-3 * np.eye(P)[:6], np.zeros(6, dtype=int), np.repeat([0, 1], 3))
    measure = Coherence(min_norm=MIN_NORM)
    found = measure.compute(data.state(statistic_of(measure)))["alpha_above", "all"]
    assert math.isnan(found.value)
    assert found.n == 0


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "much", True])
def test_the_threshold_must_be_a_number(value: Any) -> None:
    with pytest.raises(GradscaleError, match="min_norm must be a finite number of at least 0, got"):
        Coherence(min_norm=value)


@pytest.mark.parametrize("value", [0, -3, 1.5, "many", True])
def test_the_batch_size_must_be_a_count(value: Any) -> None:
    with pytest.raises(GradscaleError, match="batch_size must be a whole number of at least 1, got"):
        Dispersion(batch_size=value)


def test_settings_from_the_command_line() -> None:
    expected = (Coherence(min_norm=1e-3), Dispersion(batch_size=32), EffectiveGram())
    assert parse_measures("coherence:min_norm=1e-3,dispersion:batch_size=32,effective_gram") == expected
    assert statistics_of([Dispersion(batch_size=32), EffectiveGram(), Coherence()]) == [MomentsStatistic()]
    assert statistic_of(Coherence(min_norm=1)) == statistic_of(Coherence(min_norm=1.0))


def test_jackknife_by_hand() -> None:
    """Blocks of opposite gradients: every sum is zero, so that tr Sigma is the sum of squares by n - 1."""
    squares = np.array([1.0, 4.0, 2.0, 3.0])
    grads = np.concatenate([np.sqrt(squares), -np.sqrt(squares)])[:, None] * np.ones((1, P))
    data = Data(grads, np.zeros(8, dtype=int), np.tile(np.arange(4), 2))  # each block sums to zero
    estimate = Dispersion().compute(data.state(MomentsStatistic()))["trace_covariance", "all"]
    left_out = np.array([P * 2 * (squares.sum() - s) / 5 for s in squares])
    expect(estimate.value, P * 2 * squares.sum() / 7)
    expect(estimate.stderr, math.sqrt(3 / 4 * ((left_out - left_out.mean()) ** 2).sum()))


def test_coherence_decomposes_over_layers() -> None:
    """alpha = sum_l f_l alpha_l with f_l the layer's share of the squared norms; the traces add up."""
    data = Data.random(4, [5, 6])
    state = data.state(MomentsStatistic())
    found, traces = Coherence().compute(state), Dispersion().compute(state)
    shares = {name: (data.layer(name) ** 2).sum() / (data.grads**2).sum() for name in NAMES}
    expect(sum(shares[name] * found["alpha", f"layer:{name}"].value for name in NAMES), found["alpha", "all"].value)
    total = sum(traces["trace_covariance", f"layer:{name}"].value for name in NAMES)
    expect(total, traces["trace_covariance", "all"].value)


def test_blocks_are_those_of_the_batches_however_they_are_cut_and_merged() -> None:
    data = Data.random(5, [6, 6, 6])
    whole = Coherence(by_class=True).compute(data.state(MomentsStatistic(by_class=True)))
    statistic = MomentsStatistic(by_class=True)
    parts = [statistic.update(statistic.init(), batch) for batch in data.cut(4)]
    merged = Coherence(by_class=True).compute(reduce(statistic.merge, reversed(parts)))
    assert set(merged) == set(whole)
    for key, estimate in whole.items():
        expect(merged[key].value, estimate.value)
        expect(merged[key].stderr, estimate.stderr)


def test_one_block_has_an_unknown_error() -> None:
    state = Data.random(6, [5]).state(MomentsStatistic())
    for measure in (Coherence(), Dispersion()):
        for estimate in measure.compute(state).values():
            assert estimate.stderr is not None
            assert math.isnan(estimate.stderr)


def test_blocks_without_finite_examples_are_left_out() -> None:
    data = Data.random(7, [5, 6])
    statistic = MomentsStatistic()
    empty = micro(torch.zeros(0, P, dtype=torch.float64), torch.zeros(0, dtype=torch.long), block=9)
    with_empty = statistic.update(data.state(statistic), empty)
    assert Coherence().compute(with_empty) == Coherence().compute(data.state(statistic))
    nothing = Coherence().compute(statistic.update(statistic.init(), empty))
    assert all(math.isnan(estimate.value) and estimate.n == 0 for estimate in nothing.values())


def test_zero_gradients_have_no_coherence_and_zero_dispersion() -> None:
    data = Data(np.zeros((6, P)), np.zeros(6, dtype=int), np.repeat([0, 1], 3))
    state = data.state(MomentsStatistic())
    assert all(math.isnan(estimate.value) for estimate in Coherence().compute(state).values())
    assert Dispersion().compute(state)["trace_covariance", "all"][:2] == (0.0, 0.0)
    assert math.isnan(Dispersion().compute(state)["noise_scale", "all"].value)


def test_noise_scale_is_nan_where_the_mean_gradient_cannot_be_told_from_zero() -> None:
    grads = np.concatenate([np.eye(P), -np.eye(P)])
    data = Data(grads, np.zeros(2 * P, dtype=int), np.arange(2 * P) % 2)
    assert math.isnan(Dispersion().compute(data.state(MomentsStatistic()))["noise_scale", "all"].value)


@pytest.mark.parametrize(("rows", "value", "unbiased"), [("equal", 1.0, 1.0), ("orthogonal", 0.2, 0.0)])
def test_extremes_of_coherence(rows: str, value: float, unbiased: float) -> None:
    grads = np.ones((5, P)) if rows == "equal" else np.eye(P)[:5]
    found = Coherence().compute(Data(grads, np.zeros(5, dtype=int), np.zeros(5, dtype=int)).state(MomentsStatistic()))
    expect(found["alpha", "all"].value, value)
    expect(found["m_coherence", "all"].value, 5 * value)
    expect(found["alpha_unbiased", "all"].value, unbiased)


# --- Gaussian width ---------------------------------------------------------------------------------------------------


def products_of(data: Data, width: GaussianWidth) -> Array:
    """[n, N] from the probes' definition."""
    probes = GaussianProbes(width.num_probes, width.seed)
    stacked = torch.cat([probes.materialize(name, (size, 1)) for name, size in SHAPES.items()]).double().numpy()
    return data.grads @ stacked


def expect_mean_over_probes(estimate: Estimate, values: Array, n: int) -> None:
    expect(estimate.value, values.mean())
    expect(estimate.stderr, values.std(ddof=1) / math.sqrt(len(values)))
    assert (estimate.n, estimate.status) == (n, "estimator")


@pytest.mark.parametrize("sizes", [[1], [4], [3, 5, 2]])
def test_width_is_brute_force_on_the_same_probes(sizes: list[int]) -> None:
    width, data = GaussianWidth(9, seed=4), Data.random(1, sizes)
    products = products_of(data, width)
    found = width.compute(data.state(width))
    assert set(found) == {("width", "all"), ("symmetrized", "all")}
    expect_mean_over_probes(found["width", "all"], (products - products.mean(0)).max(0), len(products))
    expect_mean_over_probes(found["symmetrized", "all"], np.abs(products).max(0), len(products))


def test_symmetrized_width_of_products_of_one_sign() -> None:
    width, data = GaussianWidth(9, seed=4), Data.random(1, [4])
    shifted = Data(data.grads + 50 * data.grads[:1], data.labels, data.blocks)
    products = products_of(shifted, width)
    assert (products.max(0) < 0).any()
    assert (products.min(0) > 0).any()
    expect(width.compute(shifted.state(width))["symmetrized", "all"].value, np.abs(products).max(0).mean())


def test_union_over_steps_is_the_width_of_the_stacked_set() -> None:
    width = GaussianWidth(9, seed=4)
    steps = [Data.random(seed, sizes) for seed, sizes in enumerate([[3, 2], [4], [1, 6]])]
    found = width.compute_over_steps([data.state(width) for data in steps])
    stacked = np.concatenate([products_of(data, width) for data in steps])
    assert set(found) == {("width", "union"), ("symmetrized", "union"), ("path_width", "union")}
    expect_mean_over_probes(found["width", "union"], (stacked - stacked.mean(0)).max(0), 16)
    expect_mean_over_probes(found["symmetrized", "union"], np.abs(stacked).max(0), 16)
    assert "examples@union" in found["width", "union"].definition
    assert "examples@theta" in width.compute(steps[0].state(width))["width", "all"].definition


def test_width_does_not_see_a_common_component_and_symmetrized_does() -> None:
    width, data = GaussianWidth(9, seed=4), Data.random(1, [6])
    moved = Data(data.grads + 3.0, data.labels, data.blocks)
    a, b = width.compute(data.state(width)), width.compute(moved.state(width))
    expect(a["width", "all"].value, b["width", "all"].value)
    expect(a["width", "all"].stderr, b["width", "all"].stderr)
    assert b["symmetrized", "all"].value > a["symmetrized", "all"].value + 1


def test_the_width_of_nothing_is_unknown_and_of_one_probe_has_an_unknown_error() -> None:
    width = GaussianWidth(4)
    assert all(math.isnan(e.value) and e.n == 0 for e in width.compute(width.init()).values())
    single = GaussianWidth(1)
    stderr = single.compute(Data.random(0, [3]).state(single))["width", "all"].stderr
    assert stderr is not None
    assert math.isnan(stderr)


TOY_Y = np.array([1.0, -1.0, 1.0, -1.0])
TOYS = {  # math.md, section 12: g_i = -y_i (e_i, z_i), z = y or 0
    "real": -np.concatenate([np.diag(TOY_Y), np.zeros((4, 1)), np.ones((4, 1))], axis=1),
    "random": -np.concatenate([np.diag(TOY_Y), np.zeros((4, 2))], axis=1),
}


@pytest.mark.parametrize(
    ("kind", "coherence", "unbiased", "symmetrized"), [("real", 0.625, 0.5, 1.9377), ("random", 0.25, 0.0, 1.4642)]
)
def test_known_answers_of_the_toy(kind: str, coherence: float, unbiased: float, symmetrized: float) -> None:
    grads = np.concatenate([TOYS[kind], np.zeros((4, P - 6))], axis=1)
    data = Data(grads, np.zeros(4, dtype=int), np.zeros(4, dtype=int))
    state, width = data.state(MomentsStatistic()), GaussianWidth(20000)
    found, widths = Coherence().compute(state), width.compute(data.state(width))
    expect(found["alpha", "all"].value, coherence)
    expect(found["alpha_unbiased", "all"].value, unbiased)
    expect(Dispersion().compute(state)["trace_covariance", "all"].value, 1.0)
    for estimate, exact in ((widths["width", "all"], 1.0293754), (widths["symmetrized", "all"], symmetrized)):
        assert estimate.stderr is not None
        assert abs(estimate.value - exact) < 4 * estimate.stderr + 1e-4
        assert estimate.stderr < 0.01


# --- standard errors --------------------------------------------------------------------------------------------------

RUNS = 300


def assert_honest(scores: Sequence[float], freedom: int) -> None:
    """(estimate - truth) / stderr lies within 1 and 2 as often as Student's t: to 4 binomial errors."""
    sizes = np.abs(np.array(scores))
    for bound in (1, 2):
        nominal = float(2 * scipy.stats.t.cdf(bound, freedom) - 1)
        tolerance = 4 * math.sqrt(nominal * (1 - nominal) / len(sizes))
        assert abs((sizes <= bound).mean() - nominal) < tolerance, f"within {bound}: {(sizes <= bound).mean():.3f}"
    assert abs(np.mean(scores)) < 4 * 1.1 / math.sqrt(len(sizes)) + 0.1  # the bias is small against the error


def normal(generator: np.random.Generator, size: tuple[int, int]) -> Array:
    return generator.standard_normal(size)


def skewed(generator: np.random.Generator, size: tuple[int, int]) -> Array:
    """Mean 0, variance 1, one long tail."""
    return generator.exponential(size=size) - 1


@pytest.mark.parametrize(
    ("sizes", "draw"),
    [([10, 30] * 10, normal), ([80] * 5, normal), ([20] * 20, skewed)],
    ids=["unequal", "five", "skewed"],
)
def test_jackknife_errors_are_honest(
    sizes: list[int], draw: Callable[[np.random.Generator, tuple[int, int]], Array]
) -> None:
    """Gradients with a known mean and covariance, as a sample of their population, through update, merge and compute.

    Of J blocks the jackknife has J - 1 degrees of freedom, and its scores Student's distribution.
    """
    J, generator = len(sizes), np.random.default_rng(5)
    blocks = np.repeat(np.arange(J), sizes)
    n, mean, scales = len(blocks), np.linspace(-0.5, 0.7, P), np.linspace(0.3, 1.2, P)
    trace, signal = (scales**2).sum(), (mean**2).sum()
    truth = {
        "alpha_unbiased": signal / (signal + trace),
        "trace_covariance": trace,
        "noise_scale": trace / signal,
        "v_within": trace / 8,
        "perturbation": trace / n,
    }
    scores: dict[str, list[float]] = {name: [] for name in truth}
    for _ in range(200):
        grads = mean + scales * draw(generator, (n, P))
        state = Data(grads, np.zeros(n, dtype=int), blocks).state(MomentsStatistic())
        measures: list[Measure] = [Coherence(), Dispersion(batch_size=8), EffectiveGram()]
        found = {key: estimate for measure in measures for key, estimate in measure.compute(state).items()}
        for name, exact in truth.items():
            estimate = found[name, "all"]
            assert estimate.stderr is not None
            scores[name].append((estimate.value - exact) / estimate.stderr)
    for parts in scores.values():
        assert_honest(parts, J - 1)


@pytest.mark.parametrize("name", ["width", "symmetrized"])
def test_errors_over_probes_are_honest(name: str) -> None:
    data = Data.random(3, [12])
    many = GaussianWidth(100_000, seed=10**6)
    truth = many.compute(data.state(many))[name, "all"]
    scores = []
    for seed in range(RUNS):
        width = GaussianWidth(32, seed)
        estimate = width.compute(data.state(width))[name, "all"]
        assert estimate.stderr is not None
        scores.append((estimate.value - truth.value) / estimate.stderr)
    assert_honest(scores, 31)


# --- data -------------------------------------------------------------------------------------------------------------


class Data:
    """Gradients [n, P], classes [n] and jackknife blocks [n], as the statistics are given them."""

    def __init__(self, grads: Array, labels: np.ndarray[Any, Any], blocks: np.ndarray[Any, Any]) -> None:
        self.grads, self.labels, self.blocks = grads, labels, blocks

    @classmethod
    def random(cls, seed: int, sizes: Sequence[int]) -> Data:
        """Blocks of these sizes; every class lies in every block that is large enough."""
        generator = np.random.default_rng(seed)
        blocks = np.repeat(np.arange(len(sizes)), sizes)
        scales = np.repeat([3.0, 0.1, 1.0], list(SHAPES.values()))
        grads = scales * (0.6 + generator.standard_normal((len(blocks), P)))
        return cls(grads, np.arange(len(blocks)) % 2 + 3, blocks)

    def layer(self, name: str) -> Array:
        start = sum(SHAPES[other] for other in NAMES[: NAMES.index(name)])
        return self.grads[:, start : start + SHAPES[name]]

    @property
    def batches(self) -> list[MicroBatch]:
        return self.cut(len(self.grads))

    def cut(self, size: int) -> list[MicroBatch]:
        """Microbatches of at most `size` examples, none across blocks."""
        found = []
        for block in np.unique(self.blocks):
            mine = np.flatnonzero(self.blocks == block)
            for start in range(0, len(mine), size):
                rows = mine[start : start + size]
                found.append(micro(torch.from_numpy(self.grads[rows]), torch.from_numpy(self.labels[rows]), int(block)))
        return found

    def state(self, statistic: Statistic[Any]) -> Any:
        """Only the readings that the statistic needs are there."""
        probes = {reading for reading in statistic.needs if isinstance(reading, Projected)}
        batches = [batch._replace(projections=project(batch, probes)) for batch in self.batches]
        return reduce(statistic.update, batches, statistic.init())


def project(batch: MicroBatch, readings: set[Projected]) -> dict[Projected, Tensor]:
    grads = batch.projections[FULL]
    parts = dict(zip(NAMES, grads.split(list(SHAPES.values()), dim=1), strict=True))
    return {
        reading: torch.stack([reading.map.apply(name, DenseGrads(part)) for name, part in parts.items()]).sum(dim=0)
        for reading in readings
    }


@dataclass(frozen=True)
class Identity:
    """Stands in for a linear map: its image is the gradient itself."""

    dim: int = P

    def apply(self, parameter: str, grads: Any) -> Tensor:
        raise NotImplementedError


FULL = Projected(Identity())
READ_BY_LAWS = Projected(GaussianProbes(PROBES, seed=3))


def micro(grads: Tensor, labels: Tensor, block: int, spare_classes: tuple[int, ...] = ()) -> MicroBatch:
    """The microbatch of these gradients [B, P]; `spare_classes` are those of examples that were not finite alone."""
    parts: Mapping[str, Tensor] = dict(zip(NAMES, grads.split(list(SHAPES.values()), dim=1), strict=True))
    groups = sorted({int(c) for c in labels} | set(spare_classes))
    by_class: Sums = {c: {name: part[labels == c].sum(dim=0) for name, part in parts.items()} for c in groups}
    norms = grads.norm(dim=1, keepdim=True)
    units = {name: torch.where(norms > 0, part / norms, 0.0) for name, part in parts.items()}
    units_by_class: Sums = {c: {name: unit[labels == c].sum(dim=0) for name, unit in units.items()} for c in groups}
    batch = MicroBatch(
        torch.arange(len(grads)),
        torch.zeros(len(grads), dtype=torch.float64),
        labels,
        tuple(NAMES),
        torch.stack([part.square().sum(dim=1) for part in parts.values()], dim=1),
        {
            GradientSums(): {None: {name: part.sum(dim=0) for name, part in parts.items()}},
            GradientSums(by_class=True): by_class,
            GradientSums(unit=True): {None: {name: unit.sum(dim=0) for name, unit in units.items()}},
            GradientSums(by_class=True, unit=True): units_by_class,
            GradientSums(min_norm=MIN_NORM): {
                None: {name: part[grads.square().sum(dim=1) > MIN_NORM**2].sum(dim=0) for name, part in parts.items()}
            },
        },
        {FULL: grads},
        block,
    )
    if not len(grads):
        return batch._replace(projections={FULL: grads, READ_BY_LAWS: torch.zeros(0, PROBES, dtype=torch.float64)})
    return batch._replace(projections={FULL: grads, **project(batch, {READ_BY_LAWS})})


def with_beside(batch: MicroBatch) -> MicroBatch:
    """With what stands in for observations and for what is gathered."""
    grads = batch.projections[FULL]
    observations = {BESIDE[0].observation: grads[:, :3].square(), BESIDE[3].observation: grads[:, :2]}
    return batch._replace(observations=observations, gathered=gathered_of(grads))


def gathered_of(grads: Tensor) -> dict[Gathering[Any], Any]:
    """What stands in for that of a microbatch with these gradients; none of several fields is that of another."""
    _, tangent, sensitivity, sharpness, worst_case, curvature = BESIDE
    means, draws = means_of(grads[:, 3:6].square()), draws_of(grads[:, 4:6])
    sums = {f"{vector}|a": factor * grads.sum(dim=0) for vector, factor in (("target", 1.0), ("probe:0000", 2.0))}
    half = torch.arange(len(grads)) % 2
    batches = {f"{len(grads):06d}": torch.tensor(1)} if len(grads) else {}
    ascents = {size: total_of(grads[:1, :2]) for size in batches}
    return {
        tangent.gathering: TangentState(
            {"all": means.totals}, {"all": means.examples}, sums, {"target": grads[:, 0].sum()[None]}, {}
        ),
        sensitivity.gathering: SensitivityState(*draws, torch.bincount(half, minlength=2), sums),
        sharpness.gathering: AscentState(batches, ascents, torch.tensor(1.0, dtype=torch.float64)),
        worst_case.gathering: BatchMeans(batches, ascents),
        curvature.gathering: HessianState(
            {"a": total_of(grads[:, :2])},
            torch.bincount(half, minlength=2),
            {f"{h}|0000|a": grads[half == h].sum(dim=0) for h in range(2)},
        ),
    }


def busing(value: Callable[[Array], float], g: Array, blocks: np.ndarray[Any, Any]) -> float:
    """Busing, Meijer, van der Leeden (1999), equations 3 and 4, by deleting rows; NaN for a single block."""
    names = np.unique(blocks)
    if len(names) < 2:
        return math.nan
    n, J, full = len(g), len(names), value(g)
    m = np.array([(blocks == j).sum() for j in names])
    without = np.array([value(g[blocks != j]) for j in names])
    jackknifed = J * full - ((1 - m / n) * without).sum()
    h = n / m
    pseudo = h * full - (h - 1) * without
    return math.sqrt(((pseudo - jackknifed) ** 2 / (h - 1)).mean())


def expect(found: float | None, exact: float | None) -> None:
    assert found is not None
    assert exact is not None
    assert found == pytest.approx(exact, rel=1e-9, abs=1e-12, nan_ok=True)
