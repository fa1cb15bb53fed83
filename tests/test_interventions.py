"""Promise: every intervention takes the step of its paper's equation, on a model with a plain optimizer.

Oracles are written out in float64. What happens under DeepSpeed is in test_interventions_engine.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional as F

import gradscale as gs
from gradscale.errors import GradscaleError
from gradscale.interventions import robust_mean
from gradscale.interventions.draws import signs_of
from gradscale.interventions.target import training

ETA = 0.1


class Weights(nn.Module):
    """The parameter itself; forward gives it back."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.w


def sgd(model: nn.Module, lr: float = ETA, **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    return model, torch.optim.SGD(model.parameters(), lr=lr, **settings)


def random_quadratic(seed: int = 0, size: int = 5) -> tuple[Tensor, Weights]:
    """A Hessian with eigenvalues of both signs, and weights."""
    draw = torch.Generator().manual_seed(seed)
    square = torch.randn(size, size, generator=draw, dtype=torch.float64)
    return square + square.T, Weights(*torch.randn(size, generator=draw, dtype=torch.float64).tolist())


def quadratic(matrix: Tensor, seen: list[Tensor] | None = None) -> Callable[[nn.Module], Tensor]:
    def loss(model: nn.Module) -> Tensor:
        w: Tensor = model()
        if seen is not None:
            seen.append(w.detach().clone())
        return w @ matrix @ w / 2

    return loss


def small_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)).double()


def regression(count: int = 12) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    x, y = (torch.randn(count, size, generator=draw, dtype=torch.float64) for size in (3, 2))
    return x, y


def mean_loss(model: nn.Module) -> Tensor:
    x, y = regression()
    return (model(x) - y).square().mean()


def each_loss(model: nn.Module) -> Tensor:
    x, y = regression()
    return (model(x) - y).square().mean(dim=1)


def outputs(model: nn.Module) -> tuple[Tensor, Tensor]:
    x, y = regression()
    return model(x), y


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def stepped(method: Any, loss_fn: Any, model: nn.Module) -> Tensor:
    """The gradient that a step of SGD went along."""
    before = flat(model)
    method.step(sgd(model), loss_fn, gs.StepState(steps=4))
    return (before - flat(model)) / ETA


METHODS: list[tuple[Any, Any]] = [
    (gs.DynamicClipping(alpha=0.5), mean_loss),
    (gs.GaussianPerturbation(sigma=0.1), mean_loss),
    (gs.SAM(rho=0.1), mean_loss),
    (gs.SAM(rho=0.5, adaptive=True), mean_loss),
    (gs.LabelNoise(delta=0.3), outputs),
    (gs.Winsorized(share=0.2), each_loss),
    (gs.MedianOfMeans(groups=4), each_loss),
    (gs.HessianTracePenalty(weight=0.01), mean_loss),
]


@pytest.mark.parametrize("seed", range(5))
def test_sam_climbs_as_the_closed_form_on_a_quadratic_says(seed: int) -> None:
    """L(w + e) - L(w) = rho |g| + rho^2 g'Hg / (2 |g|^2), and the step goes along g + rho H g / |g|."""
    matrix, model = random_quadratic(seed)
    seen: list[Tensor] = []
    g, rho = matrix @ model.w.detach(), 0.3
    found = stepped(gs.SAM(rho=rho), quadratic(matrix, seen), model)
    rise = (seen[1] @ matrix @ seen[1] - seen[0] @ matrix @ seen[0]) / 2
    torch.testing.assert_close(rise, rho * g.norm() + rho**2 * (g @ matrix @ g) / (2 * g.norm() ** 2))
    torch.testing.assert_close(found, g + rho * matrix @ g / g.norm())


@pytest.mark.parametrize("seed", range(5))
def test_asam_moves_by_the_squared_weights_times_the_gradient(seed: int) -> None:
    matrix, model = random_quadratic(seed)
    w, rho = model.w.detach().clone(), 0.4
    g = matrix @ w
    move = rho * w**2 * g / (w.abs() * g).norm()
    torch.testing.assert_close(stepped(gs.SAM(rho, adaptive=True), quadratic(matrix), model), matrix @ (w + move))


def test_asam_sees_the_same_sharpness_when_weights_are_rescaled() -> None:
    """Of (u v - 1)^2: at (c u, v / c) the climb reaches the same loss, which SAM's does not."""

    def climbed(scale: float, adaptive: bool) -> float:
        losses: list[float] = []

        def loss(model: nn.Module) -> Tensor:
            u, v = model()
            losses.append(float((u * v - 1).detach() ** 2))
            return (u * v - 1) ** 2

        gs.SAM(0.2, adaptive).step(sgd(Weights(2.0 * scale, 1.5 / scale)), loss, gs.StepState())
        return losses[1]

    assert climbed(1.0, True) == pytest.approx(climbed(5.0, True), rel=1e-12)
    assert climbed(5.0, False) > 1.1 * climbed(1.0, False)


def test_the_step_at_a_zero_gradient_is_a_plain_one() -> None:
    model = Weights(0.0, 0.0)
    for method in (gs.SAM(0.1), gs.SAM(0.1, adaptive=True), gs.DynamicClipping()):
        method.step(sgd(model), lambda m: m().square().sum(), gs.StepState(threshold=0.0))
    assert flat(model).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("method", [gs.SAM(0.5), gs.GaussianPerturbation(0.5, rho=1.0)], ids=["sam", "perturbation"])
def test_an_autocast_around_the_step_does_not_hide_the_moves(method: Any) -> None:
    """It keeps the weights that it has rounded: without being told, the second pass would see those of the first."""

    def within(outside: bool) -> Tensor:
        model, x = small_net().float(), regression()[0].float()

        def loss(module: nn.Module) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=not outside or torch.is_autocast_enabled("cpu")):
                return module(x).float().square().mean()

        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            return stepped(method, loss, model)

    plain = stepped(gs.DynamicClipping(), lambda m: m(regression()[0].float()).square().mean(), small_net().float())
    torch.testing.assert_close(within(outside=True), within(outside=False), rtol=1e-3, atol=1e-4)
    assert float((within(outside=True) - plain).norm() / plain.norm()) > 0.1


def test_perturbation_descends_the_mixture_over_its_draws() -> None:
    matrix, model = random_quadratic()
    seen: list[Tensor] = []
    found = stepped(gs.GaussianPerturbation(sigma=0.5, rho=0.3, draws=4), quadratic(matrix, seen), model)
    assert len(seen) == 5
    assert len({tuple(each.tolist()) for each in seen}) == 5
    torch.testing.assert_close(found, 0.7 * matrix @ seen[0] + 0.3 * matrix @ torch.stack(seen[1:]).mean(dim=0))


def test_noise_raises_a_quadratic_by_half_the_trace_and_its_error_covers_that() -> None:
    """E L(w + d) - L(w) = sigma^2 tr H / 2 exactly. 200 runs of 16 draws: 68 and 95 % within one and two errors."""
    matrix, model = random_quadratic(3)
    matrix, sigma, inside = matrix @ matrix, 0.3, torch.zeros(2)  # positive, so that the trace is not small
    before, pooled = flat(model), []
    for seed in range(200):
        seen: list[Tensor] = []
        method = gs.GaussianPerturbation(sigma, rho=1.0, draws=16, seed=seed)
        method.step(sgd(model, lr=0.0), quadratic(matrix, seen), gs.StepState())
        moved = torch.stack(seen[1:])
        rises = ((moved @ matrix) * moved).sum(dim=1) / 2 - before @ matrix @ before / 2
        error = rises.std() / math.sqrt(len(rises))
        away = (rises.mean() - sigma**2 * matrix.trace() / 2).abs() / error
        inside += torch.stack([away <= 1, away <= 2]).float()
        pooled.append(rises)
    assert torch.equal(flat(model), before)
    for share, rate in zip(inside / 200, (0.683, 0.954), strict=True):
        assert abs(float(share) - rate) < 3 * math.sqrt(rate * (1 - rate) / 200) + 0.02, inside
    every = torch.cat(pooled)
    expected = float(sigma**2 * matrix.trace() / 2)
    assert abs(float(every.mean()) - expected) < 4 * float(every.std()) / math.sqrt(len(every)) < 0.2 * expected


def test_perturbation_draws_anew_at_every_step_and_by_seed() -> None:
    def steps(seed: int, first: int) -> Tensor:
        matrix, model = random_quadratic()
        gs.GaussianPerturbation(0.5, seed=seed).step(sgd(model), quadratic(matrix), gs.StepState(steps=first))
        return flat(model)

    assert torch.equal(steps(0, 0), steps(0, 0))
    assert not torch.equal(steps(0, 0), steps(0, 1))
    assert not torch.equal(steps(0, 0), steps(1, 0))


@pytest.mark.parametrize(("alpha", "start", "first"), [(1.0, 0, math.inf), (0.1, 0, 2.0), (0.7, 3, math.inf)])
def test_clipping_is_algorithm_1(alpha: float, start: int, first: float) -> None:
    """The threshold is the smallest norm so far, not a mean: of linear losses whose gradients are given."""
    slopes = torch.randn(20, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    model, state = Weights(0.0, 0.0, 0.0, 0.0), gs.StepState(threshold=first)
    target, expected, threshold, clipped = sgd(model), torch.zeros(4, dtype=torch.float64), first, 0
    for t, slope in enumerate(slopes, start=1):
        gs.DynamicClipping(alpha, start).step(target, lambda m, c=slope: m() @ c, state)
        g = slope
        if t > start:
            if g.norm() > threshold:
                g, clipped = alpha * threshold * g / g.norm(), clipped + 1
            else:
                threshold = float(g.norm())
        expected = expected - ETA * g
        torch.testing.assert_close(flat(model), expected)
        assert state.threshold == pytest.approx(threshold)
    assert clipped > 5
    assert state.threshold == pytest.approx(min(first, float(slopes[start:].norm(dim=1).min())))


def test_clipping_that_has_not_begun_is_the_optimizers_own_step() -> None:
    one, other = small_net(), small_net()
    optimizer, plain = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (one, other))
    state = gs.StepState()
    for _ in range(4):
        loss = gs.DynamicClipping(start=100).step((one, optimizer), mean_loss, state)
        expected = mean_loss(other)
        plain.zero_grad()
        expected.backward()
        plain.step()
        assert float(loss) == float(expected.detach())
    assert torch.equal(flat(one), flat(other))
    assert state == gs.StepState(steps=4)


def test_label_noise_is_plus_or_minus_delta_on_every_entry() -> None:
    """The step reads off the noise: the gradient in a bias of the half squared loss is mean (f - y - delta e)."""

    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Parameter(torch.zeros(50, 4, dtype=torch.float64))

        def forward(self) -> Tensor:
            return self.b

    model, drawn, state = Bias(), [], gs.StepState()
    for _ in range(40):
        with torch.no_grad():
            model.b.zero_()
        loss = gs.LabelNoise(0.25).step(sgd(model, lr=1.0), lambda m: (m(), torch.zeros(50, 4).double()), state)
        assert float(loss) == pytest.approx(0.25**2 * 4 / 2)
        drawn.append(model.b.detach() * 50 / 0.25)
    signs = torch.stack(drawn)
    torch.testing.assert_close(signs.abs(), torch.ones_like(signs))
    assert abs(float(signs.mean())) < 4 / math.sqrt(signs.numel())
    for one, other in ((signs[:-1], signs[1:]), (signs[:, :-1], signs[:, 1:]), (signs[..., :-1], signs[..., 1:])):
        assert abs(float((one * other).mean())) < 4 / math.sqrt(one.numel())


def flow(eta: float, copies: int = 256, delta: float = 0.5, tau: float = 2.0) -> tuple[float, float]:
    """The mean of (u^2 - v^2) over independent runs of f = u v, y = 1, relative to its start, and its error."""
    model = nn.Module()
    model.u = nn.Parameter(torch.full((copies,), 2.0, dtype=torch.float64))
    model.v = nn.Parameter(torch.full((copies,), 0.5, dtype=torch.float64))
    target, state, ones = sgd(model, lr=eta), gs.StepState(), torch.ones(1, copies, dtype=torch.float64)
    method = gs.LabelNoise(delta)
    for _ in range(round(tau / eta**2)):
        method.step(target, lambda m: ((m.u * m.v)[None], ones), state)
    ratio = (model.u**2 - model.v**2).detach() / (2.0**2 - 0.5**2)
    return float(ratio.mean()), float(ratio.std()) / math.sqrt(copies)


def test_label_noise_flows_down_the_trace_of_the_hessian() -> None:
    """(u^2 - v^2)(tau) = (u0^2 - v0^2) exp(-delta^2 tau): 0.6065, the limit of small learning rates.

    A flow of 2 delta^2 or delta^2 / 2 would give 0.368 or 0.779. What is left of O(eta^2) is about 1e-3.
    """
    (coarse, coarse_error), (fine, fine_error) = flow(0.06), flow(0.03)
    assert 2 * fine - coarse == pytest.approx(math.exp(-0.5), abs=4 * (2 * fine_error + coarse_error) + 3e-3)


def per_example(model: nn.Module) -> dict[str, np.ndarray]:
    """[B, ...] of every parameter, by torch.func."""
    x, y = regression()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def one(given: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (functional_call(model, given, (x[None],))[0] - y).square().mean()

    return {name: g.numpy() for name, g in vmap(grad(one), (None, 0, 0))(weights, x, y).items()}


def percentile_clipped(values: np.ndarray, share: float) -> np.ndarray:
    return np.clip(values, *np.percentile(values, [100 * share, 100 - 100 * share], axis=0)).mean(axis=0)


def grouped_median(values: np.ndarray, groups: int) -> np.ndarray:
    return np.median(np.stack([part.mean(axis=0) for part in np.split(values, groups)]), axis=0)


@pytest.mark.parametrize("entries", [1 << 22, 30])  # at once, and a row at a time
@pytest.mark.parametrize(
    ("method", "oracle"),
    [
        (gs.Winsorized(0.0), lambda v: v.mean(axis=0)),
        (gs.Winsorized(0.1), lambda v: percentile_clipped(v, 0.1)),
        (gs.Winsorized(0.37), lambda v: percentile_clipped(v, 0.37)),
        (gs.MedianOfMeans(1), lambda v: v.mean(axis=0)),
        (gs.MedianOfMeans(3), lambda v: grouped_median(v, 3)),
        (gs.MedianOfMeans(4), lambda v: grouped_median(v, 4)),
        (gs.MedianOfMeans(12), lambda v: np.median(v, axis=0)),
    ],
)
def test_robust_means_are_those_of_the_per_example_gradients(
    method: Any, oracle: Callable[[np.ndarray], np.ndarray], entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robust_mean, "_ENTRIES", entries)
    model = small_net()
    expected = np.concatenate([oracle(each).ravel() for each in per_example(model).values()])
    np.testing.assert_allclose(stepped(method, each_loss, model).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_no_more_gradients_are_held_than_the_bound_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """max(budget, B C) numbers: 12 examples, at most 4 columns."""
    sizes = []

    def noted(values: Tensor, share: float) -> Tensor:
        sizes.append(values.numel())
        return robust_mean_of(values, share)

    robust_mean_of = robust_mean.winsorized_mean
    monkeypatch.setattr(robust_mean, "winsorized_mean", noted)
    monkeypatch.setattr(robust_mean, "_ENTRIES", 30)
    stepped(gs.Winsorized(), each_loss, small_net())
    assert max(sizes) <= 12 * 4
    assert sum(sizes) == 12 * flat(small_net()).numel()


def test_one_wild_example_moves_the_robust_means_no_further_than_the_others_allow() -> None:
    x, y = regression()
    wild = y.clone()
    wild[5] += 1e6

    def along(method: Any, y: Tensor) -> Tensor:
        return stepped(method, lambda model: (model(x) - y).square().mean(dim=1), small_net())

    for method in (gs.Winsorized(0.1), gs.MedianOfMeans(3), gs.MedianOfMeans(12)):
        assert float((along(method, wild) - along(method, y)).norm()) < 2 * float(along(method, y).norm()) + 2
    assert float(along(gs.Winsorized(0.0), wild).norm()) > 1e4


def test_trace_penalty_on_a_sum_of_quartics_is_exact() -> None:
    """L = sum a w^4 / 12: H = diag(a w^2), any probe of signs gives tr H = sum a w^2; its gradient is 2 a w."""
    a, model = torch.tensor([1.0, -2.0, 3.0]).double(), Weights(0.5, 1.5, -1.0)
    w = model.w.detach().clone()
    found = stepped(gs.HessianTracePenalty(0.2), lambda m: (a * m() ** 4).sum() / 12, model)
    torch.testing.assert_close(found, a * w**3 / 3 + 0.2 * 2 * a * w)


def test_trace_penalty_of_a_quadratic_is_constant() -> None:
    matrix, model = random_quadratic()
    g = matrix @ model.w.detach()
    torch.testing.assert_close(stepped(gs.HessianTracePenalty(0.5), quadratic(matrix), model), g)


class WrittenNorm(nn.LayerNorm):
    """torch's layer_norm has a wrong third derivative."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias


def dense_penalty(model: nn.Sequential, quadratic_form: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient of a function of the dense Hessian of the mean loss."""
    shapes = [(name, p.shape) for name, p in model.named_parameters()]
    written = nn.Sequential(model[0], model[1], WrittenNorm(4).double(), model[3])
    x, y = regression()

    def loss(w: Tensor) -> Tensor:
        parts = w.split([shape.numel() for _, shape in shapes])
        given = {name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)}
        return (functional_call(written, given, (x,)) - y).square().mean()

    found: Tensor = grad(lambda w: quadratic_form(jacrev(grad(loss))(w)))(flat(model))
    return found


def test_trace_penalty_is_that_of_the_dense_hessian_for_its_probes_and_unbiased_over_them() -> None:
    model = small_net()
    trained = training(sgd(model))
    plain = torch.cat([g.flatten() for g in torch.autograd.grad(mean_loss(model), list(model.parameters()))])
    probes = [torch.cat([s.flatten() for s in signs_of(trained, "hessian trace", 0, 4, k)]) for k in range(2)]
    expected = dense_penalty(model, lambda h: sum((v @ h @ v for v in probes), torch.zeros(())) / 2)
    found = stepped(gs.HessianTracePenalty(0.3, num_probes=2), mean_loss, model)
    torch.testing.assert_close(found, plain + 0.3 * expected, rtol=1e-8, atol=1e-10)

    truth, draws = dense_penalty(small_net(), torch.trace), []
    for seed in range(200):
        draws.append(stepped(gs.HessianTracePenalty(1.0, seed=seed), mean_loss, small_net()) - plain)
    every = torch.stack(draws)
    away = (every.mean(dim=0) - truth) / (every.std(dim=0) / math.sqrt(200)).clamp_min(1e-12)
    assert float(away.abs().max()) < 4.5
    for k, rate in ((1, 0.683), (2, 0.954)):  # entries depend on one another: a wide tolerance
        assert abs(float((away.abs() <= k).double().mean()) - rate) < 0.2


SLOPES = torch.tensor([0.4, -1.3, 0.8, 2.1, -0.6, 1.7], dtype=torch.float64)
TRUSTED: dict[str, Callable[[Tensor], Tensor]] = {
    "group_norm": lambda w: (F.group_norm(w[None], 2) * SLOPES).pow(3).sum(),
    "rms_norm": lambda w: (F.rms_norm(w.view(2, 3), (3,)) * SLOPES.view(2, 3)).pow(3).sum(),
    "layer_norm": lambda w: (F.layer_norm(w.view(2, 3), (3,)) * SLOPES.view(2, 3)).pow(3).sum(),
    "gelu": lambda w: (F.gelu(w) * SLOPES).square().sum(),
    "gelu, tanh": lambda w: (F.gelu(w, approximate="tanh") * SLOPES).square().sum(),
    "silu": lambda w: (F.silu(w) * SLOPES).square().sum(),
    "softmax": lambda w: (F.softmax(w, 0) * SLOPES).square().sum(),
    "cross_entropy": lambda w: F.cross_entropy(w.view(2, 3), torch.tensor([0, 2])),
    "logits": lambda w: F.binary_cross_entropy_with_logits(w, torch.sigmoid(SLOPES)),
}


@pytest.mark.parametrize("name", TRUSTED)
def test_trace_penalty_has_the_third_derivatives_of_what_networks_are_made_of(name: str) -> None:
    """Against central differences of v'Hv, which is second derivatives only: of one probe, whose signs are read off."""
    model = Weights(0.3, -0.7, 1.1, 0.9, -1.4, 0.2)
    w, f = model.w.detach().clone(), TRUSTED[name]
    (v,) = signs_of(training(sgd(model)), "hessian trace", 0, 4, 0)
    slope: Tensor = grad(f)(w)

    def bend(at: Tensor) -> Tensor:
        return v @ jacrev(grad(f))(at) @ v

    steps = 1e-5 * torch.eye(6, dtype=torch.float64)
    expected = torch.stack([(bend(w + step) - bend(w - step)) / 2e-5 for step in steps])
    found = stepped(gs.HessianTracePenalty(0.7), lambda m: f(m()), model)
    torch.testing.assert_close(found, slope + 0.7 * expected, rtol=1e-6, atol=1e-7)


def test_trace_penalty_goes_through_attention() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation="gelu", batch_first=True).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    before = flat(layer)
    loss = gs.HessianTracePenalty(0.1).step(sgd(layer), lambda m: m(x).pow(3).mean(), gs.StepState())
    assert math.isfinite(float(loss))
    assert not torch.equal(flat(layer), before)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(2), nn.InstanceNorm1d(2)], ids=lambda each: type(each).__name__)
def test_norms_whose_third_derivative_torch_has_wrong_are_refused(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Unflatten(1, (2, 1)), nn.Linear(1, 2), norm, nn.Flatten()).double()
    with pytest.raises(GradscaleError, match=r"third derivatives that torch gets right, got .*_norm with statistics"):
        gs.HessianTracePenalty(0.1).step(sgd(model), lambda m: m(regression()[0]).pow(3).mean(), gs.StepState())


def test_trace_penalty_allows_a_batch_norm_with_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double().eval()
    gs.HessianTracePenalty(0.1).step(sgd(model), mean_loss, gs.StepState())


@pytest.mark.parametrize(("method", "loss_fn"), METHODS, ids=lambda each: type(each).__name__)
def test_a_run_goes_on_from_saved_states_as_if_nothing_had_been(method: Any, loss_fn: Any) -> None:
    whole, state = small_net(), gs.StepState()
    target = sgd(whole, momentum=0.9)
    for _ in range(4):
        method.step(target, loss_fn, state)

    first, before = small_net(), gs.StepState()
    target = sgd(first, momentum=0.9)
    for _ in range(2):
        method.step(target, loss_fn, before)
    second, after = small_net(), gs.StepState()
    second.load_state_dict(first.state_dict())
    resumed = sgd(second, momentum=0.9)
    resumed[1].load_state_dict(target[1].state_dict())
    after.load_state_dict(before.state_dict())
    for _ in range(2):
        method.step(resumed, loss_fn, after)
    assert torch.equal(flat(whole), flat(second))
    assert state == after
    assert state.steps == 4


@pytest.mark.parametrize(
    ("method", "loss_fn"),
    [case for case in METHODS if case[1] is mean_loss],
    ids=lambda each: type(each).__name__,
)
def test_microbatches_of_one_size_are_their_whole(method: Any, loss_fn: Any) -> None:
    x, y = regression()

    def part(rows: slice) -> Callable[[nn.Module], Tensor]:
        return lambda model: (model(x[rows]) - y[rows]).square().mean()

    parts = [part(slice(start, start + 4)) for start in (0, 4, 8)]
    torch.testing.assert_close(stepped(method, parts, small_net()), stepped(method, loss_fn, small_net()))


@pytest.mark.parametrize(("method", "loss_fn"), METHODS, ids=lambda each: type(each).__name__)
def test_a_step_that_fails_leaves_weights_and_state(method: Any, loss_fn: Any) -> None:
    model, state, calls = small_net(), gs.StepState(steps=3), []

    def fails(module: nn.Module) -> Any:
        calls.append(None)
        if len(calls) == 2 or not isinstance(
            method, gs.SAM | gs.GaussianPerturbation | gs.Winsorized | gs.MedianOfMeans
        ):
            raise KeyError("the data are gone")
        return loss_fn(module)

    before = flat(model)
    with pytest.raises(KeyError, match="the data are gone"):
        method.step(sgd(model), fails, state)
    assert torch.equal(flat(model), before)
    assert state == gs.StepState(steps=3)
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_parameters_and_those_of_no_optimizer_stay() -> None:
    model = small_net()
    model[0].requires_grad_(False)
    target = model, torch.optim.SGD([*model[0].parameters(), *model[3].parameters()], lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gs.SAM(0.1).step(target, mean_loss, gs.StepState())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"3.weight", "3.bias"}


class Once(torch.autograd.Function):
    """A square whose gradient has no graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * outer


def nan(model: nn.Module) -> Tensor:
    return mean_loss(model) * torch.nan


@pytest.mark.parametrize(
    ("method", "loss_fn", "message"),
    [
        (gs.SAM(), lambda m: each_loss(m), r"loss_fn must return the mean loss, .* got shape \(12,\); average it"),
        (gs.SAM(), lambda m: mean_loss(m).detach(), r"got shape \(\) without a gradient"),
        (gs.SAM(), lambda m: 3.0, "got float"),
        (gs.SAM(), [], r"loss_fn must be a function of the model, or a list of one for each microbatch, got \[\]"),
        (gs.SAM(), 3, "loss_fn must be a function of the model, .* got 3; pass a lambda"),
        (gs.SAM(), nan, "the gradient must be finite, got norm nan; leave the batch out"),
        (gs.DynamicClipping(), nan, "the gradient must be finite, got norm nan"),
        (gs.LabelNoise(0.1), mean_loss, "loss_fn must return outputs and targets, .* got Tensor; turn classes into"),
        (gs.LabelNoise(0.1), lambda m: (m(regression()[0]), torch.zeros(12)), r"got \[.*\(12, 2\).*\(12,\)"),
        (gs.LabelNoise(0.1), lambda m: (m(regression()[0]), torch.zeros(12, 2).long()), "got .*int64"),
        (gs.Winsorized(), mean_loss, "losses must be one per example"),
        (gs.Winsorized(), [each_loss, each_loss], "losses_fn must be one function, got 2; quantiles need all"),
        (gs.MedianOfMeans(5), each_loss, "must be a multiple of groups=5, got 12; drop the last ones"),
        (
            gs.HessianTracePenalty(0.1),
            lambda m: Once.apply(m(regression()[0])).mean(),
            "the loss must be differentiable three times, got: .*; use GaussianPerturbation",
        ),
    ],
)
def test_functions_that_do_not_serve_are_refused(method: Any, loss_fn: Any, message: str) -> None:
    model, state = small_net(), gs.StepState()
    before = flat(model)
    with pytest.raises(GradscaleError, match=message):
        method.step(sgd(model), loss_fn, state)
    assert torch.equal(flat(model), before)
    assert state == gs.StepState()


def test_targets_that_do_not_serve_are_refused() -> None:
    model, other = small_net(), small_net()
    cases: list[tuple[Any, str]] = [
        (model, r"the target must be a DeepSpeed engine or \(model, optimizer\), got Sequential"),
        ((model, None), "a model of one process and a torch optimizer, got Sequential and NoneType"),
        ((model, sgd(other)[1]), "the optimizer must train parameters of the model, got 6 of which 0 are trainable"),
        (
            sgd(small_net().bfloat16()),
            "the weights must be float32, got torch.bfloat16 for 0.weight, in which moves are",
        ),
        (
            sgd(small_net().half()),
            "got torch.float16 for 0.weight, in which gradients are lost to rounding; keep float32",
        ),
    ]
    for target, message in cases:
        with pytest.raises(GradscaleError, match=message):
            gs.SAM().step(target, mean_loss, gs.StepState())
    with pytest.raises(GradscaleError, match=r"the weights must be float32 or bfloat16, got torch\.float16"):
        gs.DynamicClipping().step(sgd(small_net().half()), mean_loss, gs.StepState())


def test_batch_statistics_are_refused_where_examples_are_told_apart() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    with pytest.raises(GradscaleError, match="BatchNorm 1 must be in eval mode with running statistics, got batch"):
        gs.Winsorized().step(sgd(model), each_loss, gs.StepState())
    gs.Winsorized().step(sgd(model.eval()), each_loss, gs.StepState())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gs.SAM(rho=-1.0), "rho must be a number from 0 on, got -1.0; 0.05 is usual"),
        (lambda: gs.GaussianPerturbation(sigma=math.nan), "sigma must be a number from 0 on, got nan"),
        (lambda: gs.GaussianPerturbation(0.1, rho=1.5), r"rho must be in \[0, 1\], got 1.5; it is the share"),
        (lambda: gs.GaussianPerturbation(0.1, draws=0), "draws must be at least 1, got 0; 3 are usual"),
        (lambda: gs.DynamicClipping(alpha=0.0), "alpha must be a positive number, got 0.0; 1 clips to"),
        (lambda: gs.DynamicClipping(start=-1), "start must be a number of steps from 0 on, got -1"),
        (lambda: gs.LabelNoise(-0.5), "delta must be a number from 0 on, got -0.5"),
        (lambda: gs.Winsorized(0.5), r"share must be in \[0, 0.5\), got 0.5; 0.1 clips at"),
        (lambda: gs.MedianOfMeans(0), "groups must be at least 1, got 0; 3 are usual"),
        (lambda: gs.HessianTracePenalty(math.inf), "weight must be a finite number, got inf; start with"),
        (lambda: gs.HessianTracePenalty(0.1, num_probes=0), "num_probes must be at least 1, got 0"),
        (lambda: gs.StepState().load_state_dict({"steps": 1}), "the state must have steps, .* got {'steps': 1}; pass"),
        (lambda: gs.StepState().load_state_dict({"steps": -1, "threshold": 1.0}), "the state must have steps"),
        (lambda: gs.StepState().load_state_dict({"steps": 1, "threshold": math.nan}), "and threshold, a number"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(GradscaleError, match=message):
        make()
