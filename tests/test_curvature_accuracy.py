"""Promise: on a trained transformer, eigenvalues and traces are as accurate as `gradscale.curvature` says.

Every reference is in float64 by double backward, or a dense matrix written out entry by entry.

Shapes: n examples, P entries of all parameters, N probes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from oracle_problems import FewDigits, SmallGPT2
from test_curvature_operators import NarrowGPT2, _rows, dense_jacobian, rows_of_hessian, stream_of, subject_of
from torch import Tensor, nn

from gradscale.curvature.calibrate import calibrate, curvature_along
from gradscale.curvature.lanczos import Ritz, lanczos
from gradscale.curvature.operator import Operator
from gradscale.curvature.operators import CovarianceOperator, gauss_newton, hessian
from gradscale.curvature.probes import FlatProbes
from gradscale.curvature.stream import Stream
from gradscale.curvature.trace import trace, trace_samples

STEPS = 60  # of Adam


@dataclass(frozen=True)
class Text(SmallGPT2):
    """GPT-2 of 118 528 weights with eager attention and LayerNorm, on random tokens."""

    rows: int = 16
    length: int = 32
    vocabulary: int = 256

    def model(self, checkpoint: str | None) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            n_layer=2, n_embd=64, n_head=4, n_positions=self.length, vocab_size=self.vocabulary, bos_token_id=0,
            eos_token_id=0, attn_implementation="eager", use_cache=False,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return GPT2LMHeadModel(config).eval()


@dataclass(frozen=True)
class UnderAutocast(Text):
    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().losses(model, batch)


@cache
def trained() -> Mapping[str, Any]:
    """The weights after some steps, float32."""
    task = Text()
    subject = subject_of(task)
    model, batch = subject.model, subject.examples.batch(range(16))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        task.losses(model, batch).mean().backward()
        optimizer.step()
    weights: Mapping[str, Any] = model.state_dict()
    return weights


def loaded(dtype: torch.dtype, task: Text | None = None, rounded: torch.dtype | None = None) -> Stream:
    """The trained model in `dtype`, its weights rounded to `rounded` first."""
    subject = subject_of(task or Text())
    subject.model.load_state_dict(trained())
    subject.model.to(rounded or dtype).to(dtype)
    return Stream(subject, range(16), 16)


def gradient(stream: Stream) -> Tensor:
    """[P]"""
    losses = stream.subject.task.losses(stream.subject.model, stream.subject.examples.batch(stream.ids))
    return torch.cat([part.flatten() for part in torch.autograd.grad(losses.mean(), stream.parameters)])


def largest(operator: Operator, start: Tensor, tolerance: float = 1e-7) -> Ritz:
    """Of a start in float64: the basis is float64, too, whatever the model computes in."""
    return lanczos(operator, start.double(), 1, 40, tolerance)


@cache
def exact(rounded: torch.dtype | None = None) -> tuple[float, Tensor]:
    """lambda_max, and the gradient, by double backward in float64."""
    stream = loaded(torch.float64, rounded=rounded)
    g = gradient(stream)
    return float(largest(hessian(stream, "double_backward"), g).values[0]), g


class TestOfATrainedTransformer:
    def test_the_largest_eigenvalue_in_float32(self) -> None:
        value, g = exact()
        found = largest(hessian(loaded(torch.float32), "finite_differences", "lambda_max"), g)
        assert float(found.values[0]) == pytest.approx(value, rel=1e-4)
        assert found.orthogonality <= 1e-12
        assert found.complete

    def test_the_trace(self) -> None:
        """The same probes: what differences get wrong is far below the error of so few."""
        stream, reference = loaded(torch.float32), loaded(torch.float64)
        probes = FlatProbes(range(stream.layout.size), kind="rademacher", dtype=torch.float64)
        found = trace(trace_samples(hessian(stream, "finite_differences", "trace"), probes, range(12)))
        known = trace(trace_samples(hessian(reference, "double_backward"), probes, range(12)))
        assert abs(found.value - known.value) < 0.02 * known.stderr
        assert found.stderr == pytest.approx(known.stderr, rel=0.02)

    def test_bfloat16_weights_with_a_master(self) -> None:
        """Beside the exact value at the rounded weights: what was rounded off is not known to anybody."""
        value, g = exact(torch.bfloat16)
        stream = loaded(torch.bfloat16)
        found = largest(hessian(stream, "finite_differences", "lambda_max"), g, 1e-3)
        assert float(found.values[0]) == pytest.approx(value, rel=5e-2)
        along = curvature_along(stream, found.vectors[0])
        assert along.value == pytest.approx(value, rel=5e-3)
        assert abs(along.value - value) < along.error < 1e-2 * value
        assert found.orthogonality <= 1e-12

    @pytest.mark.slow
    def test_float32_weights_under_autocast(self) -> None:
        """Beside the exact value at the weights, which are the master themselves here."""
        value, g = exact()
        stream = loaded(torch.float32, UnderAutocast())
        found = largest(hessian(stream, "finite_differences", "lambda_max"), g, 1e-3)
        assert float(found.values[0]) == pytest.approx(value, rel=5e-2)
        assert curvature_along(stream, found.vectors[0]).value == pytest.approx(value, rel=5e-3)

    @pytest.mark.slow
    def test_the_step_is_said_to_be_worse_where_weights_are_rounded(self) -> None:
        steps = [calibrate(loaded(dtype))["lambda_max"] for dtype in (torch.float32, torch.bfloat16)]
        assert steps[0].error < 1e-4 < 1e-3 < steps[1].error

    def test_curvature_along_a_vector_in_float32(self) -> None:
        stream, reference = loaded(torch.float32), loaded(torch.float64)
        _, g = exact()
        for v in (g, torch.randn(len(g), dtype=torch.float64, generator=torch.Generator().manual_seed(0))):
            found, unit = curvature_along(stream, v), v / v.norm()
            product = hessian(reference, "double_backward").products(unit[None])[0]
            assert abs(found.value - float(unit @ product)) < 1e-4 * float(product.norm())


MATRICES = {"digits": lambda: FewDigits(rows=6), "gpt2": NarrowGPT2}


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton", "fisher"])
@pytest.mark.parametrize("name", MATRICES)
def test_eigenvalues_are_those_of_the_dense_matrix(name: str, kind: str) -> None:
    """The first three of digits and of a GPT-2 of one layer; Fisher is the gradients' second moment."""
    stream = stream_of(MATRICES[name]())
    P, n = stream.layout.size, len(stream.ids)
    if kind == "hessian":
        operator: Operator = hessian(stream, "double_backward")
        matrix = rows_of_hessian(stream, range(P))
    elif kind == "gauss_newton":
        operator = gauss_newton(stream)
        J, curvature = dense_jacobian(stream)
        matrix = torch.einsum("nap,nab,nbq->pq", J, curvature, J) / n
    else:
        operator = CovarianceOperator(stream, centred=False)
        losses = stream.subject.task.losses(stream.subject.model, stream.subject.examples.batch(stream.ids))
        G = _rows(losses, stream.parameters)
        matrix = G.mT @ G / n
    known = np.linalg.eigvalsh(matrix.numpy())[::-1][:3]
    found = lanczos(operator, FlatProbes(range(P), dtype=torch.float64)(range(1)), 3, 200, 1e-8)
    assert found.values.numpy() == pytest.approx(known, rel=1e-6)
    assert found.orthogonality <= 1e-12
    if kind == "hessian":
        differences = lanczos(hessian(stream, "finite_differences", "lambda_max"), found.vectors[0], 1)
        assert float(differences.values[0]) == pytest.approx(known[0], rel=1e-6)
