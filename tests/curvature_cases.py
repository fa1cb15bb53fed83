"""Cases that any library of curvature can be run through, and what it takes to run one: see docs/correctness.md.

    found = check(Library("mine", product=..., eigenvalues=..., trace=...))

A case returns a verdict with the figure that it rests on. What a library does not offer has no verdict, and an error
that it raises is its figure. Torch alone.

Shapes: P parameter entries, k eigenvalues, n examples.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from curvature_problems import (
    F64,
    NORMS,
    Problem,
    ball,
    central_differences,
    eigenvalues_of_gpt,
    gpt,
    net,
    quadratic,
    seeded,
    trained,
)
from torch import Tensor, nn

EXACT = 1e-6  # relative, of products and eigenvalues in float64
SEEDS = 200
LONG = 4_000_000


class Trace(NamedTuple):
    value: float
    stderr: float | None = None  # what the library says of its error: a standard error,
    tolerance: float | None = None  # or a relative tolerance


class Library(NamedTuple):
    """What is offered; None is not. Each refuses by raising."""

    name: str
    product: Callable[[Problem, Tensor], Tensor]  # H v of v [P], of the problem's dtype
    eigenvalues: Callable[[Problem, int], Sequence[float]] | None = None  # the k largest in magnitude, every copy
    trace: Callable[[Problem, int, int], Trace] | None = (
        None  # of a seed, by its own rule, with at most so many products
    )
    weighted: Callable[[Problem, Tensor, Tensor], Tensor] | None = None  # H v with weights [n] of the examples


class Verdict(NamedTuple):
    passed: bool | None  # None: not offered, nothing claimed
    figure: str


Case = Callable[[Library], Verdict]
NOT_OFFERED = Verdict(None, "-")


def check(library: Library, names: Sequence[str] | None = None) -> dict[str, Verdict]:
    """The verdicts of all cases, or of those named."""
    return {name: verdict(CASES[name], library) for name in names or CASES}


def verdict(case: Case, library: Library) -> Verdict:
    try:
        return case(library)
    except Exception as error:
        lines = f"{error}".strip().splitlines() or [""]
        return Verdict(False, f"{type(error).__name__}: {lines[0]}")


# --- products ---------------------------------------------------------------------------------------------------------


def layer_norm(library: Library) -> Verdict:
    """Hv through LayerNorm and attention is that of central differences of gradients, within 1e-6 in float64."""
    return _exact(library, gpt("LayerNorm"))


def rms_norm(library: Library) -> Verdict:
    """The same through RMSNorm and attention."""
    return _exact(library, gpt("RMSNorm"))


def batch_norm(library: Library) -> Verdict:
    """The same through BatchNorm in eval mode."""
    return _exact(library, net(batch_norm=True))


def fused_attention(library: Library) -> Verdict:
    """The same where attention is `scaled_dot_product_attention`, without a context of the user's around it."""
    return _exact(library, gpt("RMSNorm", fused=True))


def other_weights(library: Library) -> Verdict:
    """When the weights change in place, Hv changes, to that at the new weights."""
    problem = net()
    v = _vector(problem)
    before = library.product(problem, v)
    with torch.no_grad(), seeded(5):
        for parameter in problem.parameters:
            parameter += 0.3 * torch.randn_like(parameter)
    after = library.product(problem, v)
    moved, error = _far(before, after), _far(after, central_differences(problem, v[None])[0])
    return Verdict(moved > 1e-2 and error <= EXACT, f"moves by {moved:.2g}, off by {error:.1e}")


def scaled_vectors(library: Library) -> Verdict:
    """H(cv) = c Hv within 1 % for c = 1/1024 and 1024, on a trained transformer in float32."""
    problem, v = trained().problem, _vector(trained().problem)
    once = library.product(problem, v)
    worst = max(_far(library.product(problem, c * v) / c, once) for c in (2.0**-10, 2.0**10))
    return Verdict(worst <= 1e-2, f"{worst:.1e}")


def ragged_batches(library: Library) -> Verdict:
    """Hv of 7 examples in batches of 3, 3 and 1 is that of one batch: a mean over examples."""
    whole, parts = net(sizes=(7,)), net(sizes=(3, 3, 1))
    v = _vector(whole)
    error = _far(library.product(parts, v), central_differences(whole, v[None])[0])
    return Verdict(error <= EXACT, f"{error:.1e}")


def weighted_examples(library: Library) -> Verdict:
    """With the weights 2, 1, ..., 1, Hv is that of the data with the first example twice."""
    if library.weighted is None:
        return NOT_OFFERED
    problem = net()
    ((x, y),) = problem.batches
    doubled = problem._replace(batches=((torch.cat([x[:1], x]), torch.cat([y[:1], y])),))
    v, weights = _vector(problem), torch.ones(len(y), dtype=F64)
    weights[0] = 2
    error = _far(library.weighted(problem, weights, v), central_differences(doubled, v[None])[0])
    return Verdict(error <= EXACT, f"{error:.1e}")


def same_and_symmetric(library: Library) -> Verdict:
    """Hv is the same twice within 1e-12, and u^T H v = v^T H u within 1e-6, through LayerNorm and attention."""
    problem = gpt("LayerNorm")
    u, v = _vector(problem, 1), _vector(problem, 2)
    first, again, other = library.product(problem, v), library.product(problem, v), library.product(problem, u)
    repeat, apart = _far(again, first), float((u @ first - v @ other).abs() / (u.norm() * first.norm()))
    return Verdict(repeat <= 1e-12 and apart <= EXACT, f"{repeat:.0e}, {apart:.1e}")


# --- what is left behind, what is refused -----------------------------------------------------------------------------


def side_effects(library: Library) -> Verdict:
    """Weights, gradients, buffers and mode of the model are left bit for bit by products, eigenvalues and trace."""
    problem = net()
    problem.model.train()  # nothing in it is random
    with seeded(6):
        for parameter in problem.parameters:
            parameter.grad = torch.randn_like(parameter)
    before = _state(problem.model)
    library.product(problem, _vector(problem))
    if library.eigenvalues is not None:
        library.eigenvalues(problem, 1)
    if library.trace is not None:
        library.trace(problem, 0, 6)
    changed = _changes(before, _state(problem.model))
    return Verdict(not changed, ", ".join(changed) or "none")


def failing_loss(library: Library) -> Verdict:
    """The same when the loss raises: at its first evaluation, its second, or where the weights have been moved."""
    changed: list[str] = []
    for at in (1, 2, None):
        problem = net()
        problem = problem._replace(criterion=_Failing(problem.criterion, problem.parameters[0], at))
        before = _state(problem.model)
        try:
            library.product(problem, _vector(problem))
        except Exception as error:
            if "asked to fail" not in f"{error}":
                raise
        changed += _changes(before, _state(problem.model))
    return Verdict(not changed, ", ".join(dict.fromkeys(changed)) or "none")


def dropout(library: Library) -> Verdict:
    """Dropout in training mode is refused, or Hv is the same twice all the same."""
    problem = net(dropout=0.5)
    problem.model.train()
    return _refused_or_same(library, problem)


def batch_norm_training(library: Library) -> Verdict:
    """BatchNorm in training mode is refused, or Hv the same twice, with the running statistics left as they were."""
    problem = net(batch_norm=True)
    problem.model.train()
    return _refused_or_same(library, problem)


# --- traces -----------------------------------------------------------------------------------------------------------


def trained_trace(library: Library) -> Verdict:
    """The mean of 16 traces of a trained transformer in float32 is the trace, within 4 standard errors of that mean."""
    if library.trace is None:
        return NOT_OFFERED
    problem, truth = trained()
    values = [library.trace(problem, seed, 16).value for seed in range(16)]
    mean, stderr = statistics.fmean(values), statistics.stdev(values) / 4
    return Verdict(abs(mean - truth) <= 4 * stderr, f"{mean / truth:.2f} ± {stderr / truth:.2f} of it")


def claimed_error(library: Library) -> Verdict:
    """A trace is as near to the truth as the library says: at least at the nominal rate, over 200 seeds.

    A standard error s: within s in 68.3 % of the runs and within 2 s in 95.4 %; a relative tolerance: within it in
    68.3 %; each less 4 binomial errors. A sample scatters by 0.6 of the trace, 30 and -30 in turn.
    """
    if library.trace is None:
        return NOT_OFFERED
    values, runs, apart = [10.0, *torch.linspace(-1, 1.2, 199).tolist()], [], []
    for sign in (1, -1):
        problem, truth = quadratic([sign * value for value in values], seed=7), sign * sum(values)
        for seed in range(SEEDS // 2):
            runs.append(library.trace(problem, seed + (sign > 0) * SEEDS, 100))
            apart.append(abs(runs[-1].value - truth) / abs(truth))
    stderrs = [run.stderr / abs(truth) for run in runs if run.stderr is not None]
    claims = stderrs or [run.tolerance for run in runs if run.tolerance is not None]
    if not claims:
        return Verdict(None, f"claims none; {statistics.fmean(apart):.0%} off on average")
    nominal = (0.683, 0.954) if stderrs else (0.683,)
    rates = [statistics.fmean(a <= t * c for a, c in zip(apart, claims, strict=True)) for t in (1, 2)[: len(nominal)]]
    least = (rate - 4 * math.sqrt(rate * (1 - rate) / SEEDS) for rate in nominal)
    inside = all(rate >= bound for rate, bound in zip(rates, least, strict=True))
    return Verdict(inside, " and ".join(f"{rate:.0%}" for rate in rates) + " inside")


def long_sums(library: Library, size: int = LONG) -> Verdict:
    """tr(c I) of `size` float32 parameters, which any probe of signs has without scatter, within 1e-6."""
    if library.trace is None:
        return NOT_OFFERED
    problem = ball(size, 0.1)
    truth = size * float(torch.tensor(0.1))
    error = abs(library.trace(problem, 0, 3).value / truth - 1)
    return Verdict(error <= EXACT, f"{error:.1e}")


# --- eigenvalues ------------------------------------------------------------------------------------------------------


def eigenvalues_rms_norm(library: Library) -> Verdict:
    """The two largest of a transformer with RMSNorm are those of the whole matrix, within 1e-6."""
    return _same_eigenvalues(library, "RMSNorm")


def eigenvalues_layer_norm(library: Library) -> Verdict:
    """The same with LayerNorm."""
    return _same_eigenvalues(library, "LayerNorm")


def ghosts(library: Library) -> Verdict:
    """Of 100, 50, 1.1 and 297 from -1 to 1, in float32, the first three: none of them twice. Within 0.1 %."""
    return _spectrum(library, [100.0, 50.0, 1.1], torch.linspace(-1, 1, 297).tolist(), torch.float32)


def copies(library: Library) -> Verdict:
    """Of 10, 10, 10, 8, 5, 5 and 94 from -1 to 1 the first six: every copy. Within 0.1 %."""
    return _spectrum(library, [10.0, 10.0, 10.0, 8.0, 5.0, 5.0], torch.linspace(-1, 1, 94).tolist(), F64)


CASES: Mapping[str, Case] = {
    case.__name__: case
    for case in (
        layer_norm, rms_norm, batch_norm, fused_attention, other_weights, scaled_vectors, ragged_batches,
        weighted_examples, same_and_symmetric, side_effects, failing_loss, dropout, batch_norm_training, trained_trace,
        claimed_error, long_sums, eigenvalues_rms_norm, eigenvalues_layer_norm, ghosts, copies,
    )
}  # fmt: skip


class _Failing(nn.Module):
    """Raises at call number `at`, or, where that is None, whenever the weights are not what they were."""

    def __init__(self, criterion: nn.Module, watched: nn.Parameter, at: int | None) -> None:
        super().__init__()
        self.criterion, self.at, self.calls = criterion, at, [0]  # a list: copies count together
        self.watched, self.before = (watched,), watched.detach().clone()
        self.reduction = "mean"

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        self.calls[0] += 1
        moved = self.at is None and not torch.equal(self.watched[0].detach(), self.before)
        if moved or self.calls[0] == self.at:
            raise ArithmeticError("asked to fail")
        criterion = copy.copy(self.criterion)
        criterion.reduction = self.reduction
        losses: Tensor = criterion(outputs, y)
        return losses


def _vector(problem: Problem, seed: int = 0) -> Tensor:
    """[P] standard normal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(problem.size, dtype=F64, generator=generator).to(problem.parameters[0].dtype)


def _far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).double().norm() / expected.double().norm())


def _exact(library: Library, problem: Problem) -> Verdict:
    v = _vector(problem)
    error = _far(library.product(problem, v), central_differences(problem, v[None])[0])
    return Verdict(error <= EXACT, f"{error:.1e}")


def _state(model: nn.Module) -> dict[str, list[Tensor]]:
    parameters = list(model.parameters())
    return {
        "weights": [p.detach().clone() for p in parameters],
        "gradients": [torch.zeros(0) if p.grad is None else p.grad.detach().clone() for p in parameters],
        "buffers": [buffer.clone() for buffer in model.buffers()],
        "mode": [torch.tensor([module.training for module in model.modules()])],
    }


def _changes(before: Mapping[str, list[Tensor]], after: Mapping[str, list[Tensor]]) -> list[str]:
    return [name for name in before if not all(map(torch.equal, before[name], after[name]))]


def _refused_or_same(library: Library, problem: Problem) -> Verdict:
    before, v = _state(problem.model)["buffers"], _vector(problem)
    try:
        first, again = library.product(problem, v), library.product(problem, v)
    except Exception as error:
        return Verdict(True, f"refused: {type(error).__name__}")
    apart, left = _far(again, first), all(map(torch.equal, before, _state(problem.model)["buffers"]))
    return Verdict(apart <= 1e-12 and left, f"{apart:.0e}" + ("" if left else ", buffers changed"))


def _same_eigenvalues(library: Library, norm: str) -> Verdict:
    if library.eigenvalues is None:
        return NOT_OFFERED
    assert norm in NORMS
    expected = sorted(eigenvalues_of_gpt(norm, 2))
    found = sorted(library.eigenvalues(gpt(norm), 2))
    error = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
    return Verdict(error <= EXACT, f"{error:.1e}")


def _spectrum(library: Library, first: list[float], rest: list[float], dtype: torch.dtype) -> Verdict:
    if library.eigenvalues is None:
        return NOT_OFFERED
    found = sorted((float(x) for x in library.eigenvalues(quadratic([*first, *rest], 8, dtype), len(first))), key=abs)
    good = len(found) == len(first) and all(abs(a / b - 1) <= 1e-3 for a, b in zip(found[::-1], first, strict=True))
    return Verdict(good, ", ".join(f"{value:.4g}" for value in found[::-1]))
