"""Promise: the dense tangent kernel, and what lies in its eigenspaces, are those of float64 Jacobians by torch.func.

Shapes: n examples, C outputs, m = n C, P entries of all parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from test_probing import IDS, Problem, ToyWithTargets, Without, agrees, gpt2, jacobians, measured, write_model
from torch import Tensor, nn
from torch.nn import functional as F

import gradscale as gs
from gradscale.errors import GradscaleError
from gradscale.measures import tangent_jacobians
from gradscale.measures.tangent_dense import alignment, centred, effective_gram, eigen, first_order, lower_half, shares
from gradscale.measures.tangent_jacobians import groups, output_gradients
from gradscale.measures.tangent_kernel import TangentKernel
from gradscale.run.shard import prepare
from gradscale.run.tangent_identities import LossGradients, check_perturbation, check_residuals
from gradscale.task import Task, TensorExamples


@dataclass(frozen=True)
class Fitted(Problem):
    """`Problem`, whose checkpoints are files of safetensors."""

    def model(self, checkpoint: str | None) -> nn.Module:
        model = super().model(None)
        if checkpoint is not None:
            model.load_state_dict(safetensors.torch.load_file(checkpoint))
        return model


def theta_of(task: Any) -> Tensor:
    """[m, m]: the oracle."""
    found = torch.cat(list(jacobians(task).values()), dim=2).flatten(0, 1).double()
    return found @ found.mT


def residual_of(task: Any) -> Tensor:
    """[n, C] of cross-entropy: softmax less one-hot."""
    model, examples = task.model(None).double(), task.examples()
    batch = examples.batch(range(len(examples)))
    scores = task.outputs(model, batch).detach()
    return scores.softmax(dim=1) - F.one_hot(task.labels(batch), scores.shape[1])


def losses_covariance(task: Any) -> float:
    """tr Sigma by autograd, one example after another."""
    model, examples, rows = task.model(None).double(), task.examples(), []
    for i in range(len(examples)):
        loss = task.losses(model, examples.batch(range(i, i + 1))).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return float(torch.stack(rows).var(dim=0).sum())


@dataclass(frozen=True)
class FewDigits:
    """The first digits and a narrow transformer, in float64 or float32."""

    rows: int = 5
    dtype: torch.dtype = torch.float64

    @property
    def inner(self) -> Any:
        pytest.importorskip("sklearn")
        from gradscale.tasks.digits import Digits

        return Digits(width=8, depth=1)

    def model(self, checkpoint: str | None) -> nn.Module:
        return self.inner.model(None).to(self.dtype)

    def examples(self) -> TensorExamples:
        batch = self.inner.examples().batch(range(self.rows))
        return TensorExamples(image=batch["image"].to(self.dtype), label=batch["label"])

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return self.inner.losses(model, batch)

    def labels(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["label"]

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["image"])


def gpt2_classifier(folder: Path) -> Task:
    from gradscale.tasks.classification import Classification

    columns = {"input_ids": [ids[:2] for ids in IDS], "label": [0, 2, 1]}
    return Classification(*write_model(folder, gpt2(num_labels=3), columns), dtype="float64")


TASKS: dict[str, Callable[[Path], Any]] = {
    "mlp": lambda _: Problem(),
    "linear": lambda _: Problem("linear"),
    "digits": lambda _: FewDigits(),
    "gpt2": gpt2_classifier,
}


@pytest.mark.parametrize("kind", TASKS)
def test_everything_is_that_of_dense_jacobians(kind: str, tmp_path: Path) -> None:
    task = TASKS[kind](tmp_path)
    n = len(task.examples())
    found = gs.tangent_spectrum(task, examples=range(n), microbatch=3)
    theta, r = theta_of(task), residual_of(task)
    exact = torch.linalg.eigvalsh(theta).flip(0)
    scale = float(exact[0])
    np.testing.assert_allclose(found.eigenvalues, exact, atol=1e-9 * scale)
    estimates = {name: estimate.value for name, estimate in found.estimates.items()}
    assert estimates["trace"] == pytest.approx(float(theta.trace()), rel=1e-9)
    assert estimates["kernel_frobenius"] == pytest.approx(float(theta.norm()), rel=1e-9)
    assert estimates["perturbation"] == pytest.approx(losses_covariance(task) / n, rel=1e-8)
    flat = r.flatten()
    quotient = float(flat @ theta @ flat / flat.square().sum())
    assert float(found.eigenvalues @ found.residual.each) == pytest.approx(quotient, rel=1e-8)
    gram = estimates["perturbation"] / float(flat.square().sum())
    assert float(found.gram_eigenvalues @ found.gram_residual.each) == pytest.approx(gram, rel=1e-8)
    for part in (found.residual, found.gram_residual, found.targets):
        assert part is not None
        assert part.each.sum() == pytest.approx(1)
        np.testing.assert_allclose(part.below[:-1] - part.below[1:], part.each[:-1], atol=1e-12)
    assert estimates["residual_below"] == pytest.approx(found.residual.each[-(len(flat) // 2) :].sum())
    y = F.one_hot(task.labels(task.examples().batch(range(n))), r.shape[1]).double()
    y = (y - y.mean(dim=0)).flatten()
    h = torch.kron(torch.eye(n, dtype=torch.float64) - 1 / n, torch.eye(r.shape[1], dtype=torch.float64))
    kernel = h @ theta @ h
    expected = float(y @ kernel @ y / (kernel.norm() * y.square().sum()))
    assert estimates["alignment"] == pytest.approx(expected, rel=1e-8)


def test_eigenvalues_agree_with_the_measures_trace_and_alignment() -> None:
    task = Problem()
    found = gs.tangent_spectrum(task, examples=range(7)).estimates
    measure = measured(task, TangentKernel(400, alignment=True), 7, 7)
    agrees(measure["frobenius", "all"], found["trace"].value)
    agrees(measure["alignment", "all"], found["alignment"].value)


def test_float32_agrees_with_float64() -> None:
    wide, narrow = (gs.tangent_spectrum(FewDigits(dtype=d), examples=range(5)) for d in (torch.float64, torch.float32))
    np.testing.assert_allclose(narrow.eigenvalues, wide.eigenvalues, atol=1e-5 * wide.eigenvalues[0])
    assert narrow.estimates["perturbation"].value == pytest.approx(wide.estimates["perturbation"].value, rel=1e-4)


# --- goldens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "aligned"), [("real", 0.944911), ("random", 0.5)])
def test_the_toys(kind: str, aligned: float) -> None:
    """math.md, section 12: eps_bar(0) is 1/4 for both, so that it tells nothing; alignment does. y has mean zero."""
    found = gs.tangent_spectrum(ToyWithTargets(kind), examples=range(4))
    assert found.estimates["perturbation"].value == pytest.approx(0.25, rel=1e-12)
    theta = torch.eye(4, dtype=torch.float64)
    y = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    theta += torch.outer(y, y) if kind == "real" else 0
    assert alignment(theta, y) == pytest.approx(aligned, abs=1e-6)
    np.testing.assert_allclose(found.eigenvalues, torch.linalg.eigvalsh(theta).flip(0).numpy(), atol=1e-12)
    assert found.estimates["alignment"].value == pytest.approx(alignment(centred(theta, 4), y), rel=1e-10)
    if kind == "real":
        assert found.targets is not None
        assert found.targets.each[0] == pytest.approx(1)  # y is the first eigenvector
        assert found.residual.each[0] == pytest.approx(1)  # r = -y at zero weights
        assert found.estimates["residual_below"].value == pytest.approx(0, abs=1e-12)


def test_known_kernels() -> None:
    y = torch.tensor([3.0, -1.0, 2.0, 0.5], dtype=torch.float64)
    assert alignment(torch.outer(y, y), y) == pytest.approx(1)
    assert alignment(torch.eye(4, dtype=torch.float64), y) == pytest.approx(0.5)
    assert math.isnan(alignment(torch.zeros(4, 4, dtype=torch.float64), y))
    diagonal = eigen(torch.diag(torch.tensor([1.0, 5.0, 3.0, 2.0], dtype=torch.float64)))
    assert diagonal.values.tolist() == pytest.approx([5, 3, 2, 1])
    parts = shares(diagonal.vectors, y)
    assert parts.tolist() == pytest.approx([1 / 14.25, 4 / 14.25, 0.25 / 14.25, 9 / 14.25])
    assert lower_half(parts) == pytest.approx(9.25 / 14.25)
    assert lower_half(parts[:3]) == pytest.approx(0.25 / 14.25)  # one of three


def test_the_effective_gram_matrix_by_its_definition() -> None:
    """r^T B r = (1/n^2) sum_i <g_i, g_i - grad L_-i>, and B has no negative eigenvalue."""
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(4, 3, 20, dtype=torch.float64, generator=generator)
    r = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    flat = jacobian.flatten(0, 1)
    gram = effective_gram(flat @ flat.mT, 4)
    g = torch.einsum("ncp,nc->np", jacobian, r)
    others = (g.sum(dim=0) - g) / 3
    assert float(r.flatten() @ gram @ r.flatten()) == pytest.approx(float((g * (g - others)).sum()) / 16, rel=1e-12)
    assert float(torch.linalg.eigvalsh(gram)[0]) > -1e-12
    assert effective_gram(torch.eye(3), 1).isnan().all()


# --- the update -------------------------------------------------------------------------------------------------------


def saved(folder: Path, weights: Mapping[str, Tensor], name: str = "after") -> str:
    path = folder / f"{name}.safetensors"
    safetensors.torch.save_file({key: w.detach().clone() for key, w in weights.items()}, path)
    return str(path)


def stepped(task: Any, eta: float, rows: int) -> dict[str, Tensor]:
    """The weights after a step of gradient descent on the mean loss of the first `rows` examples."""
    model = task.model(None)
    loss = task.losses(model, task.examples().batch(range(rows))).mean()
    parameters = dict(model.named_parameters())
    slopes = torch.autograd.grad(loss, list(parameters.values()))
    return {name: p - eta * g for (name, p), g in zip(parameters.items(), slopes, strict=True)}


def test_a_small_step_of_gradient_descent_is_explained_with_its_own_step_size(tmp_path: Path) -> None:
    task, eta = Fitted(), 1e-4
    found = gs.tangent_spectrum(task, examples=range(7), after=saved(tmp_path, stepped(task, eta, 7)))
    assert found.estimates["eta"].value == pytest.approx(eta, rel=1e-3)
    assert found.estimates["r_squared"].value == pytest.approx(1, abs=1e-6)
    assert found.update is not None
    np.testing.assert_allclose(found.update.change, found.update.predicted, atol=1e-3 * abs(found.update.change).max())
    model, examples = task.model(None), task.examples().batch(range(7))
    with torch.no_grad():
        moved = task.outputs(task.model(str(tmp_path / "after.safetensors")), examples) - task.outputs(model, examples)
    assert np.square(found.update.change).sum() == pytest.approx(float(moved.square().sum()), rel=1e-9)


def test_a_linear_model_has_no_higher_order(tmp_path: Path) -> None:
    task = Fitted("linear")
    found = gs.tangent_spectrum(task, examples=range(7), after=saved(tmp_path, stepped(task, 3.0, 7))).estimates
    assert found["eta"].value == pytest.approx(3, rel=1e-9)
    assert found["r_squared"].value == pytest.approx(1, abs=1e-9)
    assert found["r_squared"].status == "conditional"


def test_a_random_move_is_not_explained(tmp_path: Path) -> None:
    task = Fitted()
    weights = {name: p + 0.1 * torch.randn_like(p) for name, p in task.model(None).named_parameters()}
    assert (
        gs.tangent_spectrum(task, examples=range(7), after=saved(tmp_path, weights)).estimates["r_squared"].value < 0.8
    )


def test_first_order_by_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(5, 9, dtype=torch.float64, generator=generator)
    theta = points @ points.mT
    r, change = torch.randn(2, 5, dtype=torch.float64, generator=generator).unbind()
    found = first_order(eigen(theta), r, change, 5)
    direction = -theta @ r / 5
    eta = float(np.linalg.lstsq(direction[:, None].numpy(), change.numpy(), rcond=None)[0][0])
    assert found.eta == pytest.approx(eta, rel=1e-10)
    left = float((change - eta * direction).square().sum() / change.square().sum())
    assert found.r_squared == pytest.approx(1 - left, rel=1e-10)
    assert math.isnan(first_order(eigen(theta), r, torch.zeros(5, dtype=torch.float64), 5).eta)


# --- how it is computed -----------------------------------------------------------------------------------------------


def test_parameters_in_groups_and_examples_in_batches_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gs.tangent_spectrum(Problem(), examples=range(7))
    m = 21
    monkeypatch.setattr(tangent_jacobians, "_TILE_ENTRIES", 3 * m)
    least = 8 * 6 * m * m + m * 8 * 20  # the first weight has 20 entries
    parts = gs.tangent_spectrum(Problem(), examples=range(7), microbatch=2, memory=least)
    assert len(list(groups(prepare(Problem(), None, None).parameters, m, least))) == 3
    np.testing.assert_allclose(parts.eigenvalues, whole.eigenvalues, atol=1e-12 * whole.eigenvalues[0])
    assert parts.estimates["perturbation"].value == pytest.approx(whole.estimates["perturbation"].value, rel=1e-12)


def test_examples_are_drawn_or_named() -> None:
    drawn = gs.tangent_spectrum(Problem(rows=30), examples=5, seed=3)
    named = gs.tangent_spectrum(Problem(rows=30), examples=[*reversed(drawn.ids.tolist())], microbatch=2)
    assert (len(drawn.ids), drawn.ids.tolist()) == (5, sorted(drawn.ids.tolist()))
    assert drawn.ids.tolist() != gs.tangent_spectrum(Problem(rows=30), examples=5, seed=4).ids.tolist()
    np.testing.assert_allclose(named.eigenvalues, drawn.eigenvalues, rtol=1e-10)
    np.testing.assert_array_equal(named.ids, drawn.ids)


def test_only_the_parameters_asked_for() -> None:
    task = Problem()
    found = gs.tangent_spectrum(task, examples=range(7), params=r"2\.weight")
    j = jacobians(task)["2.weight"].flatten(0, 1)
    np.testing.assert_allclose(found.eigenvalues, torch.linalg.eigvalsh(j @ j.mT).flip(0).numpy(), atol=1e-12)


def test_texts_of_two_lengths_go_together(tmp_path: Path) -> None:
    from gradscale.tasks.classification import Classification

    config = gpt2(num_labels=3)
    columns = {"input_ids": [[1, 2, 3], [4, 5], [6, 7], [8, 9, 1]], "label": [0, 2, 1, 1]}
    task = Classification(*write_model(tmp_path, config, columns), dtype="float64")
    found = gs.tangent_spectrum(task, examples=range(4))
    assert found.estimates["perturbation"].value == pytest.approx(losses_covariance(task) / 4, rel=1e-8)


def test_a_task_without_targets_has_no_alignment() -> None:
    found = gs.tangent_spectrum(Without(Problem(), "labels"), examples=range(4))
    assert found.targets is None
    assert not {"alignment", "target_below"} & found.estimates.keys()


@dataclass(frozen=True)
class Scaled(Problem):
    """Outputs that are twice what the model returns; losses that also depend on what it gives of another input."""

    how: str = "scaled"

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["x"]) * 2

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        losses = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        if self.how == "smoothed":
            return losses + model(2 * batch["x"]).square().sum(dim=1)
        return losses


class WithLossesOf(Scaled):
    def losses_of(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        halved = outputs / 2 if self.how != "wrong" else outputs
        losses = F.cross_entropy(halved, batch["y"], reduction="none")
        return losses.mean() if self.how == "reduced" else losses.detach() if self.how == "detached" else losses


def test_losses_of_outputs() -> None:
    found = gs.tangent_spectrum(WithLossesOf(), examples=range(7))
    assert found.estimates["perturbation"].value == pytest.approx(losses_covariance(Problem()) / 7, rel=1e-8)


def test_residuals_of_a_part_of_what_the_model_returns() -> None:
    """Of a language model's positions: outputs are some entries of the logits."""

    class Middle(Problem):
        def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            return model(batch["x"]).flip(1)[:, :2]

        def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            return model(batch["x"])[:, 1:].square().sum(dim=1) / 2

    task = Middle()
    subject = prepare(task, None, None)
    f, r = output_gradients(subject, task.examples().batch(range(7)))
    torch.testing.assert_close(r, f)
    assert not subject.model._forward_hooks


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no function": (Scaled(), {}, "losses must be a function of task.outputs .* add task.losses_of"),
    "of another input too": (
        type("Smoothed", (Scaled,), {"outputs": Problem.outputs})(how="smoothed"),
        {},
        r"\|J_i\^T r_i\|\^2 must be \|g_i\|\^2 .* expected .* for example 0",
    ),
    "wrong losses_of": (WithLossesOf(how="wrong"), {}, r"must be \|g_i\|\^2 of a loss .* add task.losses_of"),
    "reduced": (WithLossesOf(how="reduced"), {}, "losses must be one per example"),
    "detached": (WithLossesOf(how="detached"), {}, "task.losses_of gives losses without a gradient"),
    "not finite": (Problem(nan=3), {}, "finite gradients, got others of example 3; leave it out of examples="),
    "one": (Problem(), {"examples": [2]}, "examples must be at least two for a covariance, got 1"),
    "none": (Problem(), {"examples": 0}, "examples must be a whole number of at least 1, got 0"),
    "unknown": (Problem(), {"examples": [1, 7]}, "examples must be ids from 0 to 6, got 1 to 7; name others"),
    "matrices": (
        Problem(),
        {"memory": 48 * 100},
        r"must be at most 10 for matrices in 0 MiB, got 21; .* raise memory=",
    ),
    "a parameter": (
        Problem(),
        {"memory": 48 * 21 * 21 + 100},
        "Jacobian of parameter 0.weight must fit into 0 MiB, got 21 outputs x 20 entries .* raise memory=",
    ),
    "no outputs": (Without(Problem(), "outputs"), {}, "tangent_spectrum needs task.outputs"),
}


@pytest.mark.parametrize(("task", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(task: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GradscaleError, match=message):
        gs.tangent_spectrum(task, **{"examples": range(7), **settings})


def test_outputs_of_two_widths_are_refused(tmp_path: Path) -> None:
    from gradscale.tasks.causal_lm import CausalLM

    task = CausalLM(*write_model(tmp_path, gpt2(), {"input_ids": IDS}), dtype="float64")
    with pytest.raises(GradscaleError, match="outputs must be as many for every example, got 12 and 36; choose"):
        gs.tangent_spectrum(task, examples=range(3))


def test_a_violated_identity_is_named() -> None:
    losses = LossGradients(torch.ones(4, dtype=torch.float64), 1.0, 1e-16)
    with pytest.raises(
        GradscaleError, match=r"identity r\^T B r = q \(1 - alpha\) / \(n - 1\) must hold .* 0.25 .* 0.26"
    ):
        check_perturbation(0.26, losses)
    check_perturbation(0.25, losses)
    check_residuals(torch.eye(4, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64), losses, np.arange(4))
