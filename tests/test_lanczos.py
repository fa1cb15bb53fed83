"""Promise: `lanczos` gives the eigenvalues at the ends of a spectrum, each as often as is promised, within its bounds.

Shapes: P entries, k values, j vectors of a basis.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from krylov_problems import GOLDEN, Drawn, Spoilt, dense, rotated
from torch import Tensor

from gradscale.curvature.krylov import Plan, advanced, begun
from gradscale.curvature.lanczos import LanczosState, Ritz, lanczos
from gradscale.curvature.operator import DenseOperator, dots, norms
from gradscale.curvature.probes import FlatProbes
from gradscale.curvature.ritz import Goal, error_bounds, ranked
from gradscale.errors import GradscaleError

TAIL = torch.linspace(1, 0.01, 197).tolist()
SPECTRA = {
    "golden": GOLDEN,
    "clustered": [5, 5 - 1e-6, 5 - 2e-6, *TAIL],
    "indefinite": np.linspace(-7, 9, 200).tolist(),
    "one below": [-20, *np.linspace(-7, 9, 200).tolist()],
    "low rank": [30, 12, 5, *[0.0] * 37],
    "indefinite, low rank": [9, 4, -3, -8, *[0.0] * 60],
    "decaying": (10.0 ** -np.linspace(0, 12, 60)).tolist(),
}


def expected(values: Any, top: int, which: str) -> Any:
    """The oracle: of the spectrum itself."""
    found = np.sort(np.array(values, dtype=float))
    if which == "largest":
        return found[::-1][:top]
    if which == "magnitude":
        return np.sort(found[np.argsort(-abs(found), kind="stable")][:top])[::-1]
    return np.concatenate([found[::-1][: top - top // 2], np.sort(found[: top // 2])[::-1]])


def start(operator: DenseOperator, block: int = 1, seed: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return FlatProbes(operator.here, seed, dtype=dtype)(range(block))


def assert_bounded(operator: DenseOperator, found: Ritz, exact: Any) -> None:
    """Against the matrix: residuals, errors, and vectors."""
    scale = float(np.abs(scipy.linalg.eigvalsh(operator.matrix.numpy())).max())
    unit = torch.finfo(found.vectors.dtype).eps
    vectors = found.vectors.double()
    true = (vectors @ operator.matrix - found.values[:, None] * vectors).norm(dim=1)
    assert ((true - found.residuals).abs() <= found.noise + 40 * unit * scale).all()
    assert (np.abs(found.values.numpy() - exact) <= found.errors.numpy() + 10 * unit * scale).all()
    torch.testing.assert_close(vectors @ vectors.mT, torch.eye(len(vectors)).double(), rtol=0, atol=100 * unit)


CASES = [(name, which) for name in SPECTRA for which in ("largest", "both", "magnitude")]
CASES.remove(("decaying", "both"))  # the gap at the lower end is 1e-12 of the norm: that takes the whole of R^P


@pytest.mark.parametrize(("name", "which"), CASES)
@pytest.mark.parametrize("cap", [None, 60])
def test_wanted_values_are_those_of_the_matrix(name: str, which: str, cap: int | None) -> None:
    values = SPECTRA[name]
    operator, exact = dense(values), expected(values, 3, which)
    found = lanczos(operator, start(operator), 3, 2000, 1e-10, cap, which)
    assert found.complete
    assert found.converged.all()
    scale = max(map(abs, values))
    np.testing.assert_allclose(found.values, exact, rtol=1e-9, atol=1e-12 * scale)
    assert_bounded(operator, found, exact)
    assert found.orthogonality <= 1e-12
    assert found.restarts or found.steps <= (cap or 20)


def test_all_values_of_a_small_matrix() -> None:
    operator = dense(GOLDEN)
    found = lanczos(operator, start(operator), 40, basis_cap=40)
    np.testing.assert_allclose(found.values, GOLDEN, rtol=1e-11)
    assert found.steps == 40
    assert found.residuals.max() < 1e-12


@pytest.mark.parametrize("block", [1, 3])
def test_float32_vectors_give_six_digits(block: int) -> None:
    operator = dense(GOLDEN)
    found = lanczos(operator, start(operator, block, dtype=torch.float32), 4, tolerance=1e-8, basis_cap=24)
    np.testing.assert_allclose(found.values, GOLDEN[:4], rtol=1e-6)
    assert found.vectors.dtype == torch.float32
    assert_bounded(operator, found, GOLDEN[:4])
    assert found.orthogonality < 1e-6


def without_reorthogonalization(matrix: Tensor, vector: Tensor, steps: int) -> Tensor:
    """The plain recurrence's Ritz values, descending."""
    previous, current, beta = torch.zeros_like(vector), vector / vector.norm(), 0.0
    alphas, betas = [], []
    for _ in range(steps):
        product = matrix @ current - beta * previous
        alphas.append(float(current @ product))
        product -= alphas[-1] * current
        beta = float(product.norm())
        betas.append(beta)
        previous, current = current, product / beta
    T = np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
    return torch.from_numpy(np.linalg.eigvalsh(T)[::-1].copy())


def test_there_are_no_ghosts() -> None:
    """30 steps of the plain recurrence list 30 three times; the list here has each eigenvalue once."""
    operator = dense(GOLDEN)
    vector = start(operator)[0]
    plain = without_reorthogonalization(operator.matrix, vector, 30)
    np.testing.assert_allclose(plain[:4], [30, 30, 30, 12], rtol=1e-6)
    for cap in (12, 40):
        found = lanczos(operator, vector, 4, basis_cap=cap)
        np.testing.assert_allclose(found.values, [30, 12, 5, 1], rtol=1e-6)


@pytest.mark.parametrize("block", [1, 2])
def test_many_restarts_keep_the_basis_orthonormal_and_the_values_those_of_a_full_one(block: int) -> None:
    values = np.linspace(0, 1, 300).tolist()
    operator = dense(values)
    whole = lanczos(operator, start(operator, block), 4, 300, 1e-10, 300)
    capped = lanczos(operator, start(operator, block), 4, 2000, 1e-10, 16)
    assert whole.restarts == 0
    assert capped.restarts > 10
    assert len(capped.state.basis) <= 16
    assert capped.orthogonality <= 1e-12
    np.testing.assert_allclose(capped.values, whole.values, rtol=1e-9)
    np.testing.assert_allclose(capped.values, values[::-1][:4], rtol=1e-9)


# --- equal eigenvalues ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [2, 3, 4])
@pytest.mark.parametrize("cap", [None, 16])
def test_a_block_shows_as_many_copies_as_it_has_vectors(block: int, cap: int | None) -> None:
    values = [5.0, 5.0, 5.0, 4.0, 4.0, *TAIL]
    operator = dense(values)
    found = lanczos(operator, start(operator, block), block, tolerance=1e-8, basis_cap=cap)
    np.testing.assert_allclose(found.values, values[:block], rtol=1e-8)
    assert_bounded(operator, found, values[:block])


@pytest.mark.parametrize("cap", [None, 12])
@pytest.mark.parametrize("top", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("which", ["largest", "both", "magnitude"])
def test_an_exhausted_space_is_followed_by_others_until_all_copies_are_found(
    top: int, which: str, cap: int | None
) -> None:
    values = [5.0] * 3 + [1.0] * 20 + [-4.0] * 2
    operator = dense(values)
    found = lanczos(operator, start(operator), top, basis_cap=cap, which=which)
    assert found.complete
    np.testing.assert_allclose(found.values, expected(values, top, which), rtol=1e-10)
    assert found.steps < 20  # rather than all of P


def test_a_start_in_an_invariant_subspace_is_left() -> None:
    operator = DenseOperator(torch.diag(torch.arange(1.0, 41.0).double()))
    vector = torch.zeros(40, dtype=torch.float64)
    vector[7] = 3.0
    found = lanczos(operator, vector, 3, basis_cap=30)
    np.testing.assert_allclose(found.values, [40, 39, 38], rtol=1e-6)
    assert found.state.fresh == 1


@pytest.mark.parametrize(("value", "top"), [(0.0, 2), (1.0, 3), (-2.0, 4)])
def test_multiples_of_the_identity(value: float, top: int) -> None:
    operator = DenseOperator(value * torch.eye(9, dtype=torch.float64))
    found = lanczos(operator, start(operator), top)
    assert found.values.tolist() == pytest.approx([value] * top, abs=1e-14)
    assert found.complete


def test_a_block_whose_vectors_depend_on_each_other() -> None:
    operator = dense(GOLDEN)
    vector = start(operator)
    found = lanczos(operator, torch.cat([vector, 2 * vector, -vector]), 3, basis_cap=24)
    np.testing.assert_allclose(found.values, GOLDEN[:3], rtol=1e-6)
    assert found.state.fresh == 2
    assert found.orthogonality <= 1e-12


def test_one_entry() -> None:
    operator = DenseOperator(torch.tensor([[2.5]], dtype=torch.float64))
    found = lanczos(operator, torch.ones(1, dtype=torch.float64))
    assert found.values.tolist() == [2.5]
    assert found.complete


# --- stopping and going on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block", "cap", "dtype"), [(1, 12, torch.float64), (2, 14, torch.float32)])
def test_a_run_goes_on_from_any_step_to_the_same_bits(block: int, cap: int, dtype: torch.dtype) -> None:
    values = np.linspace(0, 1, 120).tolist()
    operator = dense(values)
    states: list[LanczosState] = []

    def keep(state: LanczosState) -> None:
        states.append(state._replace(basis=state.basis.clone()))

    whole = lanczos(operator, start(operator, block, dtype=dtype), 3, 300, 1e-8, cap, on_step=keep)
    assert whole.restarts > 3
    assert len(states) == whole.steps
    for at in (0, 1, cap // block, whole.steps // 2, whole.steps - 1):
        again = lanczos(operator, states[at], 3, 300, 1e-8, cap)
        assert torch.equal(again.values, whole.values)
        assert torch.equal(again.vectors, whole.vectors)
        assert torch.equal(again.state.projected, whole.state.projected)
        assert again.steps == whole.steps


def test_a_run_goes_on_through_fresh_vectors() -> None:
    values = [5.0] * 3 + [1.0] * 20 + [-4.0] * 2
    operator, states = dense(values), []
    whole = lanczos(operator, start(operator), 5, on_step=lambda s: states.append(s._replace(basis=s.basis.clone())))
    for state in states:
        again = lanczos(operator, state, 5)
        assert torch.equal(again.values, whole.values)
        assert again.state.fresh == whole.state.fresh


def test_what_is_not_accurate_yet_is_not_converged() -> None:
    operator = dense(np.linspace(0, 1, 200).tolist())
    found = lanczos(operator, start(operator), 3, max_steps=8)
    assert not found.complete
    assert not found.converged.any()
    assert found.steps == 8
    fewer = lanczos(operator, start(operator), 3, max_steps=2)
    assert len(fewer.values) == 2


def test_the_state_is_the_recurrence() -> None:
    operator = dense(GOLDEN)
    vector = start(operator)[0]
    found = lanczos(operator, vector, 1, max_steps=6, tolerance=1e-15)
    basis, T = found.state.basis, found.state.projected
    oracle = (basis @ operator.matrix @ basis.mT)[:6]
    torch.testing.assert_close(T[:6], oracle, rtol=0, atol=1e-12)
    assert (T[:6, :6].triu(2) == 0).all()
    assert T.shape == (7, 7)


# --- what a wrong operator does ---------------------------------------------------------------------------------------


def test_noise_is_seen_and_stands_in_the_errors() -> None:
    """An operator with relative errors of 1e-4: the values are off by less than is said, and the run ends."""
    matrix = rotated(GOLDEN)
    generator = torch.Generator().manual_seed(1)
    off = torch.randn(matrix.shape, dtype=torch.float64, generator=generator)
    off *= 1e-4 * 30 / torch.linalg.matrix_norm(off, 2)

    class Noisy(DenseOperator):
        def products(self, vectors: Tensor) -> Tensor:
            return vectors @ (matrix + off)

    operator = Noisy(matrix)
    found = lanczos(operator, start(operator), 3, 200, 1e-12, 30)
    assert 1e-4 < found.noise < 30e-4
    assert found.complete
    assert (np.abs(found.values.numpy() - GOLDEN[:3]) <= found.errors.numpy()).all()


def test_the_basis_is_orthonormal_whatever_the_operator() -> None:
    """With one far from symmetric the recurrence takes off next to nothing; 50 steps without a restart."""
    matrix = rotated([30.0, *TAIL])
    off = torch.randn(matrix.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).triu(1)
    off *= 30 / torch.linalg.matrix_norm(off, 2)

    class Lopsided(DenseOperator):
        def products(self, vectors: Tensor) -> Tensor:
            return vectors @ (matrix + off)

    operator = Lopsided(matrix)
    plan = Plan(Goal(3, "largest", 1e-12), 60, 0)
    storage = torch.empty(60, len(matrix), dtype=torch.float64)
    state = begun(operator, storage, start(operator), plan)
    for _ in range(50):
        state = advanced(operator, storage, state, plan)
    assert state.noise > 5
    assert (state.basis @ state.basis.mT - torch.eye(51)).abs().max() <= 2e-14


def test_error_bounds_by_hand() -> None:
    values, residuals = torch.tensor([4.0, 1.0, 0.9]).double(), torch.tensor([0.1, 0.2, 0.05]).double()
    np.testing.assert_allclose(error_bounds(values, residuals), [0.01 / 2.8, 0.2, 0.05])
    np.testing.assert_allclose(error_bounds(values[:1], residuals[:1]), [0.1])
    assert ranked(torch.tensor([1.0, 3.0, -5.0, 2.0]), "both").tolist() == [1, 2, 3, 0]
    assert ranked(torch.tensor([1.0, 3.0, -5.0, 2.0]), "magnitude").tolist() == [2, 1, 3, 0]


def test_dots_are_of_float64() -> None:
    """Sums of squares of many float32 entries, which float32 sums get wrong."""
    vectors = 1 + FlatProbes(range(1_000_003), 0)(range(2)) * 1e-3
    wide = vectors.double()
    operator = DenseOperator(torch.eye(1, dtype=torch.float64))
    torch.testing.assert_close(dots(operator, vectors, vectors), wide @ wide.mT, rtol=1e-12, atol=0)
    torch.testing.assert_close(norms(operator, vectors), wide.norm(dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_probes_are_the_same_however_they_are_cut(kind: str) -> None:
    whole = FlatProbes(range(1003), 5, kind)(range(2, 5))
    for cut in (range(1), range(1, 402), range(402, 1003)):
        assert torch.equal(FlatProbes(cut, 5, kind)(range(2, 5)), whole[:, cut.start : cut.stop])
    assert abs(float(whole.mean())) < 4 / whole.numel() ** 0.5
    assert float(whole.square().mean()) == pytest.approx(1, abs=0.1)
    assert abs(float(whole[0] @ whole[1])) < 4 * 1003**0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top": 41}, "top must be at least 1 and at most the 40 entries of a vector, got 41; ask for fewer"),
        ({"top": 0}, "top must be at least 1 and at most the 40 .* got 0"),
        ({"which": "smallest"}, "which must be one of largest, both, magnitude, got smallest; largest is usual"),
        ({"tolerance": 0.0}, "tolerance must be positive, got 0.0; 1e-6"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0; 300"),
        ({"top": 3, "basis_cap": 6}, "basis_cap must be at least 7 for top = 3 and blocks of 1, got 6; raise it"),
        ({"start": torch.zeros(40).double()}, "start must have finite vectors of positive length, got .*; draw a"),
        ({"start": torch.full((40,), torch.nan)}, "start must have finite vectors of positive length, got .*nan"),
        ({"start": torch.ones(39)}, r"start must be float32 or float64 vectors of the 40 .* shape \(1, 39\); pass"),
        ({"start": torch.ones(40).half()}, "start must be float32 or float64 .* got torch.float16"),
        ({"start": torch.ones(41, 40)}, "start must be 1 to 40 vectors, got 41; pass fewer"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    operator = dense(GOLDEN)
    with pytest.raises(GradscaleError, match=message):
        lanczos(operator, **{"start": start(operator), **settings})


def test_a_state_of_other_settings() -> None:
    operator = dense(np.linspace(0, 1, 40).tolist())
    state = lanczos(operator, start(operator), 1, 15, 1e-15).state
    with pytest.raises(GradscaleError, match=r"basis_cap must hold the 16 vectors of the state, got 10; go on with"):
        lanczos(operator, state, 1, basis_cap=10)


@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
def test_a_product_that_is_not_finite(factor: float) -> None:
    operator = Spoilt(dense(GOLDEN), 2, factor)
    with pytest.raises(GradscaleError, match=r"product 2 of the operator must be finite, got .*; look for the example"):
        lanczos(operator, Drawn(40, 0)(range(1)))


def test_a_product_of_another_shape_or_type() -> None:
    class Narrow(DenseOperator):
        def products(self, vectors: Tensor) -> Tensor:
            return vectors.float()

    operator = Narrow(rotated(GOLDEN))
    with pytest.raises(GradscaleError, match=r"product 0 must have the vectors' shape .* got .* torch.float32; see"):
        lanczos(operator, start(operator))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(2, 3).double(), r"matrix must be square and float64, got torch.float64 of shape \(2, 3\)"),
        (torch.ones(2, 2), "matrix must be square and float64, got torch.float32"),
        (
            torch.tensor([[1.0, 2.0], [0.0, 1.0]]).double(),
            "matrix must be symmetric, got entries .*2",
        ),
    ],
)
def test_matrices_that_are_no_operators(matrix: Tensor, message: str) -> None:
    with pytest.raises(GradscaleError, match=message):
        DenseOperator(matrix)


def test_probes_of_no_kind() -> None:
    with pytest.raises(
        GradscaleError, match=r"kind of probes must be one of gaussian, rademacher, got sphere; gaussian"
    ):
        FlatProbes(range(3), kind="sphere")


def test_scalars_leave_the_vectors_as_they_are() -> None:
    operator, vectors = DenseOperator(torch.eye(5, dtype=torch.float64)), torch.arange(10.0).double().view(2, 5)
    before = vectors.clone()
    torch.testing.assert_close(norms(operator, vectors).square(), dots(operator, vectors, vectors).diagonal())
    assert torch.equal(vectors, before)
