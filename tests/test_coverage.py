"""Promise: the truth lies within one and two stated standard errors as often as Student's distribution has it.

Over 200 seeds for each estimate, whose states are built from numbers directly, so that they cost little. Which
distribution: that of as many degrees of freedom as the error is made of, less one. Estimates that are not here have
such a test beside their measure: tr Sigma, the noise scale, v_within, the perturbation and the widths in
`test_measure_laws`, cosines in `test_stiffness`, those of batches in `test_batch_coherence`.

Shapes: n examples, C outputs or classes, P entries, N probes or draws, J jackknife blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from test_measure_laws import assert_honest
from test_stiffness import state_of

from gradscale.measures.coherence import Coherence
from gradscale.measures.exact_sum import total_of
from gradscale.measures.featurizer import FeaturizerWidth
from gradscale.measures.gaussian_width import GaussianWidth
from gradscale.measures.gaussian_width import state_of as width_state
from gradscale.measures.geometric_complexity import GeometricComplexity
from gradscale.measures.measure import Estimate
from gradscale.measures.moments import ABOVE, MomentsState
from gradscale.measures.pairs import ALL, BETWEEN, WITHIN, means_within
from gradscale.measures.perturbation import draws_of
from gradscale.measures.probe_means import means_of
from gradscale.measures.sensitivity import Sensitivity, SensitivityState
from gradscale.measures.sharpness import AscentState, Sharpness, SharpnessState
from gradscale.measures.stiffness import Stiffness, cosines_between
from gradscale.measures.tangent_kernel import TangentKernel
from gradscale.measures.tangent_passes import TARGET, TangentState, probe_name

Array = np.ndarray[Any, np.dtype[np.float64]]
SEEDS = 200


def score(estimate: Estimate, truth: float) -> float:
    assert estimate.stderr is not None
    assert estimate.stderr > 0
    return (estimate.value - truth) / estimate.stderr


def tensors(found: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(np.asarray(value)) for key, value in found.items()}


# --- coherence --------------------------------------------------------------------------------------------------------

J, SIZE, P = 12, 25, 12
MEAN, SCALES = np.linspace(-0.5, 0.7, P), np.linspace(0.3, 1.2, P)
MIN_NORM = 3.0  # about half of the gradients are longer


def moments_of(g: Array, blocks: Array) -> MomentsState:
    """As `MomentsStatistic(min_norm=MIN_NORM)` has it, of one parameter."""
    groups = {"*": np.ones(len(g), dtype=bool), ABOVE: np.linalg.norm(g, axis=1) > MIN_NORM}
    rows = {f"{b:04d}|{name}": g[(blocks == b) & of] for name, of in groups.items() for b in range(J)}
    return MomentsState(
        tensors({key: np.array(len(part)) for key, part in rows.items()}),
        tensors({key: np.square(part).sum(keepdims=True)[0] for key, part in rows.items()}),
        tensors({f"{key}|w": part.sum(axis=0) for key, part in rows.items()}),
    )


def test_coherence() -> None:
    """The plug-in values lie (1 - alpha) / n above the population's, up to O(1 / n^2): their error is for that mean."""
    generator, n = np.random.default_rng(0), J * SIZE
    blocks = np.repeat(np.arange(J), SIZE)

    def draw(rows: int) -> Array:
        return MEAN + SCALES * generator.standard_normal((rows, P))

    signal, trace = (MEAN**2).sum(), (SCALES**2).sum()
    many = draw(1_000_000)
    many = many[np.linalg.norm(many, axis=1) > MIN_NORM]
    truth = {"alpha": signal / (signal + trace), "alpha_above": (many.mean(0) ** 2).sum() / (many**2).sum(1).mean()}
    scores: dict[str, list[float]] = {name: [] for name in ("alpha", "m_coherence", "alpha_above", "alpha_unbiased")}
    for _ in range(SEEDS):
        found = Coherence(min_norm=MIN_NORM).compute(moments_of(draw(n), blocks))
        for name, exact in truth.items():
            expected = exact + (1 - exact) / found[name, "all"].n
            scores[name].append(score(found[name, "all"], expected))
            if name == "alpha":
                scores["m_coherence"].append(score(found["m_coherence", "all"], n * expected))
        scores["alpha_unbiased"].append(score(found["alpha_unbiased", "all"], truth["alpha"]))
    for parts in scores.values():
        assert_honest(parts, J - 1)


# --- stiffness --------------------------------------------------------------------------------------------------------


def two_classes(generator: np.random.Generator, n: int) -> tuple[Array, Array]:
    """Gradients around the centre of their class."""
    labels = np.arange(n) % 2
    centres = np.array([[1.0, 0.2, -0.4, 0.0], [-0.3, 0.8, 0.5, 0.1]])
    return centres[labels] + generator.standard_normal((n, 4)), labels


def test_the_class_matrix_of_cosines() -> None:
    generator, blocks = np.random.default_rng(1), np.repeat(np.arange(10), 12)
    many, of = two_classes(generator, 400_000)
    units = many / np.linalg.norm(many, axis=1, keepdims=True)
    u = [units[of == c].mean(axis=0) for c in (0, 1)]
    truth = {f"class:{a},{b}": float(u[a] @ u[b]) for a, b in ((0, 0), (0, 1), (1, 1))}
    scores: dict[str, list[float]] = {scope: [] for scope in truth}
    for _ in range(SEEDS):
        found = Stiffness(by_class=True).compute(state_of(*two_classes(generator, len(blocks)), blocks))
        for scope, exact in truth.items():
            scores[scope].append(score(found["cos", scope], exact))
    for parts in scores.values():
        assert_honest(parts, 9)


def test_cosines_between_two_sets() -> None:
    """A training and a validation set: the jackknife over either's blocks with the other held."""
    generator, blocks = np.random.default_rng(10), np.repeat(np.arange(10), 12)
    many, of = two_classes(generator, 400_000)
    units = many / np.linalg.norm(many, axis=1, keepdims=True)
    u = [units[of == c].mean(axis=0) for c in (0, 1)]
    truth = {("cos", f"class:{a},{b}"): float(u[a] @ u[b]) for a in (0, 1) for b in (0, 1)}
    truth["cos", "all"] = float(np.mean(list(truth.values())))
    truth["cos_within", "all"] = (truth["cos", "class:0,0"] + truth["cos", "class:1,1"]) / 2
    truth["cos_between", "all"] = truth["cos", "class:0,1"]
    scores: dict[tuple[str, str], list[float]] = {key: [] for key in truth}
    for _ in range(SEEDS):
        left, right = (state_of(*two_classes(generator, len(blocks)), blocks) for _ in range(2))
        found = cosines_between(left, right, by_class=True)
        for key, exact in truth.items():
            scores[key].append(score(found[key], exact))
    for parts in scores.values():
        assert_honest(parts, 18)


def test_signs_within_and_between_classes() -> None:
    """By the jackknife over examples, as `sign_stiffness` has it."""
    generator, n = np.random.default_rng(2), 60
    first, second = (two_classes(generator, 1_000_000)[0] for _ in range(2))  # independent, row by row of one class
    truth = {WITHIN: sign_of_pairs(first, second), BETWEEN: sign_of_pairs(first, np.roll(second, 1, axis=0))}
    share = (n / 2 - 1) / (n - 1)  # of pairs within a class
    truth[ALL] = share * truth[WITHIN] + (1 - share) * truth[BETWEEN]
    scores: dict[int, list[float]] = {v: [] for v in truth}
    for _ in range(SEEDS):
        g, labels = two_classes(generator, n)
        own = torch.from_numpy(labels)
        found = torch.from_numpy(np.sign(g @ g.T)).fill_diagonal_(0)
        means = means_within(found @ torch.nn.functional.one_hot(own, 2).double(), own, 2)
        for v, exact in truth.items():
            scores[v].append(float((means.values[v] - exact) / means.errors[v]))
    for parts in scores.values():
        assert_honest(parts, n - 1)


def sign_of_pairs(g: Array, h: Array) -> float:
    return float(np.sign((g * h).sum(axis=1)).mean())


# --- widths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["width", "symmetrized"])
def test_the_width_of_features(name: str) -> None:
    """Over probes; of orthogonal points of different lengths, whose true width is found from many."""
    lengths, generator = np.array([1.0, 2.0, 0.5, 1.5]), np.random.default_rng(3)

    def drawn(N: int) -> Array:
        return lengths[:, None] * generator.standard_normal((4, N))

    many, scores = drawn(1_000_000), []
    truth = (many if name == "width" else np.abs(many)).max(axis=0).mean()
    for _ in range(SEEDS):
        found = FeaturizerWidth(32).compute(width_state(torch.from_numpy(drawn(32))))
        scores.append(score(found[name, "all"], truth))
    assert_honest(scores, 31)


def test_the_width_of_a_path() -> None:
    """Over probes; of two mean gradients a distance d apart it is d / sqrt(2 pi)."""
    ends, generator = np.array([[1.0, 0.0], [-0.2, 0.5]]), np.random.default_rng(4)
    truth = float(np.linalg.norm(ends[0] - ends[1])) / math.sqrt(2 * math.pi)
    scores = []
    for _ in range(SEEDS):
        v = generator.standard_normal((2, 32))
        states = [width_state(torch.from_numpy(end[None] @ v)) for end in ends]
        scores.append(score(GaussianWidth(32).compute_over_steps(states)["path_width", "union"], truth))
    assert_honest(scores, 31)


# --- what probes the outputs ------------------------------------------------------------------------------------------


def sign_probes(generator: np.random.Generator, j: Array, N: int) -> Array:
    """|J_i^T v|^2 [n, N] for N vectors of signs of every J_i [C, P]."""
    signs = generator.choice([-1.0, 1.0], (len(j), N, j.shape[1]))
    return np.square(np.einsum("ivc,icp->ivp", signs, j)).sum(axis=2)


def random_jacobians(generator: np.random.Generator, n: int) -> Array:
    """[n, 3, 5], of lengths of their own: E |J|_F^2 = 15 E s^2 = 15 (1 + 1/12), s uniform on (1/2, 3/2)."""
    return generator.uniform(0.5, 1.5, (n, 1, 1)) * generator.standard_normal((n, 3, 5))


@pytest.mark.parametrize("measure", ["geometric_complexity", "tangent_kernel"])
def test_means_over_examples_and_over_probes(measure: str) -> None:
    """For a population, each example with its own probes; and for the examples as they are."""
    generator, n, N = np.random.default_rng(5), 50, 6
    fixed = random_jacobians(generator, n)
    exact, population = np.square(fixed).sum(axis=(1, 2)).mean(), 15 * (1 + 1 / 12)
    scores: dict[str, list[float]] = {"examples": [], "probes": []}
    for _ in range(SEEDS):
        fresh = sign_probes(generator, random_jacobians(generator, n), N)
        over_examples, over_probes = (_both(measure, values) for values in (fresh, sign_probes(generator, fixed, N)))
        scores["examples"].append(score(over_examples[0], population))
        scale = n if measure == "tangent_kernel" else 1  # |Phi|_F^2 is a sum over examples
        scores["probes"].append(score(over_probes[1], scale * exact))
    assert_honest(scores["examples"], n - 1)
    assert_honest(scores["probes"], n * (N - 1))


def _both(measure: str, values: Array) -> tuple[Estimate, Estimate]:
    """The estimate for the population, and that for the examples."""
    means, N = means_of(torch.from_numpy(values)), values.shape[1]
    if measure == "geometric_complexity":
        found = GeometricComplexity(N).compute(means)
        return found["gc", "all"], found["gc_sample", "all"]
    state = TangentState({"all": means.totals}, {"all": means.examples}, {}, {}, {})
    found = TangentKernel(N).compute(state)
    return found["trace", "all"], found["frobenius", "all"]


@pytest.mark.parametrize("N", [8, 32])
@pytest.mark.parametrize("along", [0.0, 0.5])
def test_alignment(N: int, along: float) -> None:
    """Over probes, by the jackknife. `along` is how much the features have of the target."""
    generator, n, entries = np.random.default_rng(6), 30, 50
    y = np.where(np.arange(n) % 2, 1.0, -1.0)
    phi = generator.standard_normal((n, entries)) + along * np.outer(y, generator.standard_normal(entries))
    kernel = phi @ phi.T
    truth = float(y @ kernel @ y / (np.linalg.norm(kernel) * (y @ y)))
    scores = []
    for _ in range(SEEDS):
        found = TangentKernel(N, alignment=True, centred=False).compute(alignment_state(generator, phi, y, N))
        scores.append(score(found["alignment", "all"], truth))
        assert found["alignment", "layer:w"] == found["alignment", "all"]
    assert_honest(scores, N - 1)


def alignment_state(generator: np.random.Generator, phi: Array, y: Array, N: int) -> TangentState:
    """Of features [n, P] of a single output, with N vectors of signs."""
    vectors = {TARGET: y} | {probe_name(j): generator.choice([-1.0, 1.0], len(y)) for j in range(N)}
    means = means_of(torch.from_numpy(np.square(phi).sum(axis=1))[:, None].expand(-1, N))
    return TangentState(
        {"all": means.totals},
        {"all": means.examples},
        tensors({f"{name}|w": w @ phi for name, w in vectors.items()}),
        {},
        tensors({name: np.array(w @ y) for name, w in vectors.items()}),
    )


# --- noise on the weights ---------------------------------------------------------------------------------------------

SIGMA = 0.3


def quadratics(generator: np.random.Generator, n: int) -> tuple[Array, Array]:
    """Of n examples the Hessians' factors x_i [n, P] and the gradients g_i [n, P], E x x^T = diag(SCALES^2)."""
    return SCALES * generator.standard_normal((n, P)), MEAN + 0.5 * generator.standard_normal((n, P))


def rises(x: Array, g: Array, xi: Array) -> Array:
    """l_i(w + xi_j) - l_i(w) = <g_i, xi_j> + <x_i, xi_j>^2 / 2: [n, N]."""
    return g @ xi.T + np.square(x @ xi.T) / 2


@pytest.mark.parametrize("measure", ["sensitivity", "sharpness"])
def test_the_mean_rise_of_the_loss(measure: str) -> None:
    """For both examples and draws as samples: sigma^2 tr H / 2.

    What each pair has of its own is in the error twice, which makes it too large by less than can be seen here.
    """
    generator, n, N = np.random.default_rng(7), 40, 16
    truth = SIGMA**2 * (SCALES**2).sum() / 2
    scores = []
    for _ in range(SEEDS):
        values = rises(*quadratics(generator, n), SIGMA * generator.standard_normal((N, P)))
        draws = draws_of(torch.from_numpy(values))
        if measure == "sensitivity":
            state: Any = SensitivityState(*draws, torch.tensor([0, 0]), {})
            found = Sensitivity(SIGMA, N).compute(state)["value", "all"]
        else:
            state = SharpnessState(*draws, {}, {}, torch.tensor(1.0))
            found = Sharpness(SIGMA, 0.1, N).compute(state)["average", "all"]
        scores.append(score(found, truth))
    assert_honest(scores, N - 1)


def test_the_change_of_the_mean_gradient() -> None:
    """Over draws, for two given halves: sigma^2 tr H_A H_B."""
    generator, N = np.random.default_rng(8), 32
    halves = [x.T @ x / len(x) for x in (quadratics(generator, 40)[0] for _ in range(2))]
    truth, scores = SIGMA**2 * float(np.trace(halves[0] @ halves[1])), []
    for _ in range(SEEDS):
        xi = SIGMA * generator.standard_normal((N, P))
        sums = {f"{h}|{j:04d}|w": 40 * hessian @ xi[j] for h, hessian in enumerate(halves) for j in range(N)}
        state = SensitivityState(*draws_of(torch.zeros(80, N).double()), torch.tensor([40, 40]), tensors(sums))
        scores.append(score(Sensitivity(SIGMA, N).compute(state)["gradient", "all"], truth))
    assert_honest(scores, N - 1)


def test_the_ascent_of_batches() -> None:
    generator, count, scores = np.random.default_rng(9), 25, []
    measure = Sharpness()
    for _ in range(SEEDS):
        d = torch.from_numpy(0.2 + 0.1 * generator.standard_normal(count))
        ascents = {"000008": torch.tensor(count)}, {"000008": total_of(torch.stack([d, d * d], dim=1))}
        state = SharpnessState(*measure.init()[:2], *AscentState(*ascents, torch.tensor(1.0)))
        scores.append(score(measure.compute(state)["sam", "all"], 0.2))
    assert_honest(scores, count - 1)
