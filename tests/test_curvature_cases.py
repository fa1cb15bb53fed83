"""Promise: gradscale passes every case of the correctness suite, and a library that has the defect fails the case.

`TEXTBOOK` is the slow obvious way to do everything; each of `DEFECTS` is that with one thing done wrong, as somebody
does it.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from curvature_adapter import adapter
from curvature_cases import CASES, Library, Trace, check, long_sums, verdict
from curvature_problems import (
    F64,
    Problem,
    central_differences,
    eigenvalues_of_gpt,
    gpt,
    gradient,
    net,
    quadratic,
    seeded,
    trained,
    whole_matrix,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradscale.curvature.operator import DenseOperator, dots, norms
from gradscale.grads.functional import load_forward_derivatives

Product = Callable[[Problem, Tensor], Tensor]
QUICK = [name for name in CASES if name not in ("claimed_error", "trained_trace", "long_sums")]

# --- the textbook -----------------------------------------------------------------------------------------------------


def double_backward(problem: Problem, v: Tensor, weights: Tensor | None = None) -> Tensor:
    _refuse_random(problem.model)
    sizes = [p.numel() for p in problem.parameters]
    along = [part.view_as(p) for part, p in zip(v.split(sizes), problem.parameters, strict=True)]
    with sdpa_kernel(SDPBackend.MATH):
        x, y = (torch.cat(parts) for parts in zip(*problem.batches, strict=True))
        criterion = copy.copy(problem.criterion)
        criterion.reduction = "none"
        losses = criterion(problem.model(x), y).reshape(len(x), -1).mean(dim=1)
        mean = losses.mean() if weights is None else losses @ weights / weights.sum()
        slopes = torch.autograd.grad(mean, problem.parameters, create_graph=True)
        found = torch.autograd.grad(slopes, problem.parameters, along, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in found])


def weighted(problem: Problem, weights: Tensor, v: Tensor) -> Tensor:
    return double_backward(problem, v, weights)


def from_dense(problem: Problem, k: int) -> list[float]:
    unit = torch.eye(problem.size, dtype=problem.parameters[0].dtype)
    matrix = torch.stack([double_backward(problem, v) for v in unit]).double()
    values = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)
    return values[values.abs().argsort(descending=True)[:k]].tolist()


def hutchinson(problem: Problem, seed: int, most: int, product: Product = double_backward, wide: bool = True) -> Trace:
    samples = [_sample(problem, v, product, wide) for v in _signs(problem, seed, min(most, 32))]
    return Trace(statistics.fmean(samples), statistics.stdev(samples) / len(samples) ** 0.5)


def _sample(problem: Problem, v: Tensor, product: Product = double_backward, wide: bool = True) -> float:
    found = product(problem, v)
    return float(v.double() @ found.double() if wide else torch.dot(v, found))


def _signs(problem: Problem, seed: int, count: int) -> Sequence[Tensor]:
    generator, dtype = torch.Generator().manual_seed(seed), problem.parameters[0].dtype
    return [2 * torch.randint(2, (problem.size,), generator=generator).to(dtype) - 1 for _ in range(count)]


def _refuse_random(model: nn.Module) -> None:
    if any(module.training and isinstance(module, nn.Dropout | nn.BatchNorm1d) for module in model.modules()):
        raise ValueError("model must be in eval mode")


TEXTBOOK = Library("textbook", double_backward, from_dense, hutchinson, weighted)

# --- the same with one thing done wrong -------------------------------------------------------------------------------


def _functional(problem: Problem) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    names = [name for name, p in problem.model.named_parameters() if p.requires_grad]

    def loss(*values: Tensor) -> Tensor:
        ((x, y),) = problem.batches
        outputs = torch.func.functional_call(problem.model, dict(zip(names, values, strict=True)), (x,))
        mean: Tensor = problem.criterion(outputs, y)
        return mean

    return loss, tuple(p.detach() for p in problem.parameters)


def _split(problem: Problem, v: Tensor) -> tuple[Tensor, ...]:
    parts = v.split([p.numel() for p in problem.parameters])
    return tuple(part.view_as(p) for part, p in zip(parts, problem.parameters, strict=True))


def forward_over_jacrev(problem: Problem, v: Tensor) -> Tensor:
    load_forward_derivatives()
    loss, here = _functional(problem)
    jacobian = torch.func.jacrev(loss, argnums=tuple(range(len(here))))
    found = torch.func.jvp(jacobian, here, _split(problem, v))[1]
    return torch.cat([part.reshape(-1) for part in found])


def at_the_vector(problem: Problem, v: Tensor) -> Tensor:
    other = problem._replace(model=copy.deepcopy(problem.model))
    nn.utils.vector_to_parameters(v, other.parameters)
    return double_backward(other, v)


def fixed_step(problem: Problem, v: Tensor) -> Tensor:
    """Whatever the length of v; and the weights come back only if the loss does not raise."""
    eps = 6e-6 if v.dtype == F64 else 5e-3
    here, slopes = nn.utils.parameters_to_vector(problem.parameters).detach().clone(), []
    for step in (eps, -eps):
        nn.utils.vector_to_parameters(here + step * v, problem.parameters)
        slopes.append(gradient(problem))
    nn.utils.vector_to_parameters(here, problem.parameters)
    return (slopes[0] - slopes[1]) / (2 * eps)


def by_backward(problem: Problem, v: Tensor) -> Tensor:
    """Leaves its gradients where those of the user were."""
    for x, y in problem.batches:
        problem.criterion(problem.model(x), y).backward()
    return double_backward(problem, v)


def mean_of_means(problem: Problem, v: Tensor) -> Tensor:
    parts = [double_backward(problem._replace(batches=(batch,)), v) for batch in problem.batches]
    return torch.stack(parts).mean(dim=0)


def as_it_comes(problem: Problem, v: Tensor) -> Tensor:
    """No word about dropout or BatchNorm, and attention by the fused kernel."""
    slopes = torch.autograd.grad(
        sum(problem.criterion(problem.model(x), y) for x, y in problem.batches), problem.parameters, create_graph=True
    )
    found = torch.autograd.grad(slopes, problem.parameters, _split(problem, v))
    return torch.cat([part.reshape(-1) for part in found])


def rounded(problem: Problem, v: Tensor) -> Tensor:
    return double_backward(problem, v).float().to(v.dtype) + 1e-4 * v.roll(1)


def until_the_mean_rests(problem: Problem, seed: int, most: int) -> Trace:
    mean, samples = 0.0, []
    for v in _signs(problem, seed, most):
        samples.append(_sample(problem, v))
        if abs(statistics.fmean(samples) - mean) / (abs(mean) + 1e-6) < 1e-3:
            break
        mean = statistics.fmean(samples)
    return Trace(statistics.fmean(samples), tolerance=1e-3)


def by_fixed_steps(problem: Problem, seed: int, most: int) -> Trace:
    return hutchinson(problem, seed, most, fixed_step)


def in_float32(problem: Problem, seed: int, most: int) -> Trace:
    return hutchinson(problem, seed, most, wide=False)


def _lanczos(problem: Problem, k: int, steps: int, again: bool) -> list[float]:
    """Of one vector, in the model's type; `again` orthogonalizes against all before."""
    with seeded(9):
        q = torch.randn(problem.size, dtype=problem.parameters[0].dtype)
    basis, before = [q / q.norm()], torch.zeros_like(q)
    T = torch.zeros(steps, steps, dtype=F64)
    for j in range(steps):
        w = double_backward(problem, basis[j])
        T[j, j] = w @ basis[j]
        w = w - float(T[j, j]) * basis[j] - before
        for other in [*basis, *basis] if again else []:
            w = w - (w @ other) * other
        if j + 1 == steps or float(w.norm()) < 1e-10:
            break
        T[j, j + 1] = T[j + 1, j] = w.norm()
        before = float(w.norm()) * basis[j]
        basis.append(w / w.norm())
    values = torch.linalg.eigvalsh(T[: len(basis), : len(basis)])
    return values[values.abs().argsort(descending=True)[:k]].tolist()


class Defect(NamedTuple):
    library: Library
    fails: tuple[str, ...]


PRODUCTS = ("layer_norm", "rms_norm", "batch_norm", "fused_attention", "other_weights", "ragged_batches")
DEFECTS: dict[str, Defect] = {
    "jvp(jacrev)": Defect(TEXTBOOK._replace(product=forward_over_jacrev), ("layer_norm", "same_and_symmetric")),
    "Hessian at the vector": Defect(TEXTBOOK._replace(product=at_the_vector), PRODUCTS),
    "products a little off": Defect(TEXTBOOK._replace(product=rounded), (*PRODUCTS, "same_and_symmetric")),
    "steps of one length": Defect(
        TEXTBOOK._replace(product=fixed_step, trace=by_fixed_steps), ("scaled_vectors", "failing_loss", "trained_trace")
    ),
    "gradients left behind": Defect(TEXTBOOK._replace(product=by_backward), ("side_effects",)),
    "mean of batches' means": Defect(TEXTBOOK._replace(product=mean_of_means), ("ragged_batches",)),
    "model as it comes": Defect(
        TEXTBOOK._replace(product=as_it_comes), ("dropout", "batch_norm_training", "fused_attention")
    ),
    "weights ignored": Defect(
        TEXTBOOK._replace(weighted=lambda problem, weights, v: double_backward(problem, v)), ("weighted_examples",)
    ),
    "the mean stopped moving": Defect(TEXTBOOK._replace(trace=until_the_mean_rests), ("claimed_error",)),
    "torch.dot of float32": Defect(TEXTBOOK._replace(trace=in_float32), ("long_sums",)),
    "no reorthogonalization": Defect(
        TEXTBOOK._replace(eigenvalues=lambda problem, k: _lanczos(problem, k, 100, again=False)), ("ghosts",)
    ),
    "one vector": Defect(
        TEXTBOOK._replace(eigenvalues=lambda problem, k: _lanczos(problem, k, 24, again=True)), ("copies",)
    ),
    "too few steps": Defect(
        TEXTBOOK._replace(eigenvalues=lambda problem, k: _lanczos(problem, k, 12, again=True)),
        ("eigenvalues_rms_norm", "eigenvalues_layer_norm"),
    ),
}


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_gradscale_passes(name: str) -> None:
    found = verdict(CASES[name], adapter())
    assert found.passed is True, found.figure


@pytest.mark.parametrize("name", QUICK)
def test_gradscale_passes_by_finite_differences(name: str) -> None:
    found = verdict(CASES[name], adapter(backend="finite_differences"))
    assert found.passed is True, found.figure


@pytest.mark.parametrize("name", CASES)
def test_the_textbook_passes(name: str) -> None:
    found = verdict(CASES[name], TEXTBOOK)
    assert found.passed is True, found.figure


@pytest.mark.parametrize(("defect", "name"), [(defect, name) for defect in DEFECTS for name in DEFECTS[defect].fails])
def test_a_library_with_the_defect_fails(defect: str, name: str) -> None:
    found = verdict(CASES[name], DEFECTS[defect].library)
    assert found.passed is False, found.figure
    by_error = (defect, name) == ("model as it comes", "fused_attention")
    assert ("Error" in found.figure or "Warning" in found.figure) == by_error  # else it is the figure that is wrong


def test_every_case_is_failed_by_a_defect() -> None:
    assert {name for defect in DEFECTS.values() for name in defect.fails} == set(CASES)


def test_jvp_of_jacrev_is_right_where_there_is_no_layer_norm() -> None:
    library = DEFECTS["jvp(jacrev)"].library
    assert all(found.passed for found in check(library, ["rms_norm", "batch_norm", "other_weights"]).values())


def test_what_is_not_offered_has_no_verdict_and_errors_are_shown() -> None:
    def product(problem: Problem, v: Tensor) -> Tensor:
        raise NotImplementedError("no Hessian\nsecond line")

    found = check(Library("empty", product), ["rms_norm", "trained_trace", "copies", "weighted_examples"])
    assert [verdict.passed for verdict in found.values()] == [False, None, None, None]
    assert found["rms_norm"].figure == "NotImplementedError: no Hessian"


def test_central_differences_are_the_known_matrix() -> None:
    problem = quadratic([3.0, -1.0, 0.5], seed=3)
    found = central_differences(problem, torch.eye(3, dtype=F64))
    torch.testing.assert_close(found, problem.model.matrix, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("problem", [gpt("LayerNorm"), gpt("RMSNorm"), net(batch_norm=True)])
def test_oracle_and_textbook_share_nothing_and_agree(problem: Problem) -> None:
    with seeded(4):
        v = torch.randn(problem.size, dtype=F64)
    expected = double_backward(problem, v)
    torch.testing.assert_close(central_differences(problem, v[None])[0], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("norm", ["LayerNorm", "RMSNorm"])
def test_the_whole_matrix_is_that_of_vectors_one_by_one(norm: str) -> None:
    problem = gpt(norm)
    chosen = torch.randperm(problem.size, generator=torch.Generator().manual_seed(0))[:16]
    expected = central_differences(problem, torch.eye(problem.size, dtype=F64)[chosen])
    torch.testing.assert_close(whole_matrix(problem)[chosen], expected, rtol=1e-7, atol=1e-9)


def test_the_trained_transformer_is_sharp_enough_to_tell_steps_apart() -> None:
    """What a step of 5e-3 |v| says is a third of the trace."""
    problem, truth = trained()
    found = by_fixed_steps(problem, 0, 64)
    assert found.value < 0.5 * truth


def test_eigenvalues_of_the_transformers_are_apart() -> None:
    """Power iteration needs a gap in magnitude after each of the two."""
    for norm in ("LayerNorm", "RMSNorm"):
        first, second, third = (abs(value) for value in eigenvalues_of_gpt(norm, 3))
        assert second < 0.8 * first
        assert third < 0.85 * second


@pytest.mark.slow
def test_long_sums_of_3e7_entries() -> None:
    found = long_sums(adapter(), 30_000_000)
    assert found.passed, found.figure
    assert not long_sums(DEFECTS["torch.dot of float32"].library, 30_000_000).passed


@pytest.mark.slow
def test_inner_products_and_norms_of_2e8_entries() -> None:
    """Where torch.dot is 2 % off."""
    operator = DenseOperator(torch.eye(1, dtype=F64))  # one process; its matrix has no part in this
    x = torch.randn(1, 200_000_000, generator=torch.Generator().manual_seed(0))
    truth = sum(float(part.double().square().sum()) for part in x[0].split(1_000_000))
    assert float(dots(operator, x, x)) == pytest.approx(truth, rel=1e-10)
    assert float(norms(operator, x)) == pytest.approx(truth**0.5, rel=1e-10)
