"""Every LayerGrads is its own materialize(), and materialize() is what autograd gives one example at a time.

Shapes: B examples, T positions, I/O features in and out, V rows of a table, E its width, N vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradscale.grads import layer
from gradscale.grads.layer import DenseGrads, EmbeddingGrads, LayerGrads, OuterGrads, SharedGrads, share, widen
from gradscale.grads.rules import Call, embedding, generic, layer_norm, linear

sizes = st.integers(1, 4)
seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@st.composite
def dense(draw: st.DrawFn, B: int | None = None, P: int | None = None, dtype: torch.dtype | None = None) -> DenseGrads:
    B, P, dtype = B or draw(sizes), P or draw(st.integers(1, 12)), dtype or draw(dtypes)
    return DenseGrads(randn(draw(seeds), B, P).to(dtype))


@st.composite
def outer(draw: st.DrawFn) -> OuterGrads:
    B, T, O, I = (draw(sizes) for _ in range(4))  # noqa: E741
    dtype = draw(dtypes)
    return OuterGrads(randn(draw(seeds), B, T, O).to(dtype), randn(draw(seeds), B, T, I).to(dtype))


@st.composite
def table(draw: st.DrawFn) -> EmbeddingGrads:
    B, T, V, E = (draw(sizes) for _ in range(4))  # V < T often: repeated ids
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(draw(seeds)))
    return EmbeddingGrads(ids, randn(draw(seeds), B, T, E).to(draw(dtypes)), V)


@st.composite
def shared(draw: st.DrawFn) -> SharedGrads:
    """An output head tied to an embedding, and a use of any other kind."""
    first = draw(table())
    B, _, E = first.grads.shape
    T, dtype = draw(sizes), first.grads.dtype
    head = OuterGrads(
        randn(draw(seeds), B, T, first.num_rows).to(dtype),
        randn(draw(seeds), B, T, E).to(dtype),
    )
    return SharedGrads((first, head, draw(dense(B, first.num_rows * E, dtype)))[: draw(st.integers(2, 3))])


anything = st.one_of(dense(), outer(), table(), shared())
laws = settings(deadline=None, max_examples=60)


@laws
@given(anything)
def test_materialize_is_wide(grads: LayerGrads) -> None:
    assert isinstance(grads, LayerGrads)
    assert grads.materialize().dtype in (torch.float32, torch.float64)
    assert grads.materialize().dim() == 2


@laws
@given(anything)
def test_sq_norms(grads: LayerGrads) -> None:
    exact = materialized(grads).square().sum(dim=1)
    close(grads.sq_norms(), exact, grads)


@laws
@given(anything, seeds, st.integers(1, 3))
def test_dot(grads: LayerGrads, seed: int, N: int) -> None:
    exact = materialized(grads)
    vectors = randn(seed, exact.shape[1], N).to(grads.materialize().dtype)
    close(grads.dot(vectors), exact @ vectors.double(), grads)


@laws
@given(anything, seeds, st.sampled_from([torch.float32, torch.float64]))
def test_weighted_sum(grads: LayerGrads, seed: int, dtype: torch.dtype) -> None:
    exact = materialized(grads)
    weights = randn(seed, len(exact)).to(dtype)
    close(grads.weighted_sum(weights), weights.double() @ exact, grads)
    assert grads.weighted_sum(weights).dtype == grads.materialize().dtype


@laws
@given(anything, st.integers(1, 30))
def test_split_is_the_same_in_groups_that_fit(grads: LayerGrads, entries: int) -> None:
    whole = grads.materialize()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "_CHUNK_ENTRIES", entries)
        parts = [part.materialize() for part in grads.split()]
        sq_norms, products = grads.sq_norms(), grads.dot(torch.eye(whole.shape[1], dtype=whole.dtype)[:, :2])
    assert all(part.numel() <= max(entries, whole.shape[1]) for part in parts)
    close(torch.cat(parts), whole.double(), grads)
    close(sq_norms, whole.double().square().sum(dim=1), grads)
    close(products, whole.double()[:, :2], grads)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_widened_before_they_are_added_up(kind: torch.dtype) -> None:
    left, right = torch.full((1, 600, 2), 16.0, dtype=kind), torch.full((1, 600, 3), 16.0, dtype=kind)
    ids = torch.zeros(1, 600, dtype=torch.long)
    total = 600.0 * 256  # above float16's largest number; 8 bits of bfloat16 do not hold the partial sums
    assert OuterGrads(left, right).materialize().unique().tolist() == [total]
    assert OuterGrads(left, right).weighted_sum(torch.ones(1)).unique().tolist() == [total]
    assert OuterGrads(left, right).sq_norms().tolist() == [6 * total**2]
    assert EmbeddingGrads(ids, left * right[:, :, :2], 1).materialize().unique().tolist() == [total]
    assert EmbeddingGrads(ids, left, 1).sq_norms().tolist() == [2 * (600.0 * 16) ** 2]
    assert DenseGrads(torch.full((600, 1), 256.0, dtype=kind)).weighted_sum(torch.ones(600)).tolist() == [total]
    assert DenseGrads(torch.full((1, 2), 256.0, dtype=kind)).sq_norms().tolist() == [2 * 256.0**2]


@pytest.mark.parametrize(("T", "by_gram"), [(1, True), (2, True), (3, False), (40, False)])
def test_both_ways_to_the_norms_of_outer_products(T: int, by_gram: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = OuterGrads(randn(0, 3, T, 5), randn(1, 3, T, 5))  # T (O + I) < O I for T <= 2
    exact = grads.materialize().square().sum(dim=1)
    torch.testing.assert_close(grads._gram_norms(), exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(grads.sq_norms(), exact, rtol=1e-12, atol=0)
    monkeypatch.setattr(OuterGrads, "_gram_norms", lambda self: torch.full((3,), torch.nan))
    assert bool(grads.sq_norms().isnan().all()) == by_gram


def test_cross_terms_of_shared_uses_count() -> None:
    use = DenseGrads(randn(0, 3, 4))
    torch.testing.assert_close(share([use, use]).sq_norms(), 4 * use.sq_norms())
    torch.testing.assert_close(share([use, DenseGrads(-use.grads)]).sq_norms(), torch.zeros(3, dtype=torch.float64))
    assert share([use]) is use


@settings(deadline=None, max_examples=25)
@given(sizes, sizes, sizes, sizes, seeds, st.booleans())
def test_linear_is_autograd(B: int, T: int, I: int, O: int, seed: int, flat: bool) -> None:  # noqa: E741
    module = nn.Linear(I, O).double()
    source = randn(seed, B, I) if flat else randn(seed, B, T, I)
    check_rule(linear, module, source)
    check_rule(generic, module, source)


@settings(deadline=None, max_examples=25)
@given(sizes, sizes, sizes, sizes, seeds, st.booleans(), st.booleans())
def test_embedding_is_autograd(B: int, T: int, V: int, E: int, seed: int, padded: bool, flat: bool) -> None:
    module = nn.Embedding(V, E, padding_idx=V - 1 if padded else None).double()
    ids = torch.randint(V, (B,) if flat else (B, T), generator=torch.Generator().manual_seed(seed))
    check_rule(embedding, module, ids)


@settings(deadline=None, max_examples=25)
@given(sizes, sizes, st.integers(2, 4), sizes, seeds)
def test_layer_norm_is_autograd(B: int, T: int, E: int, rows: int, seed: int) -> None:
    """Over the last dimension, and over the last two."""
    check_rule(layer_norm, randomized(nn.LayerNorm(E)), randn(seed, B, T, E))
    check_rule(layer_norm, randomized(nn.LayerNorm((rows, E))), randn(seed, B, T, rows, E))
    check_rule(layer_norm, randomized(nn.LayerNorm((rows, E), bias=False)), randn(seed, B, rows, E))


def test_inputs_broadcast_over_the_batch_count_for_every_example() -> None:
    """Position ids [1, T]: the hook has given the output a row for every example."""
    module, ids, grad = nn.Embedding(5, 2).double(), torch.arange(4)[None], randn(0, 3, 4, 2)
    found = embedding(call(module, ids, grad), ["weight"])["weight"].materialize()
    expected = torch.zeros(3, 5, 2, dtype=torch.float64)
    expected[:, :4] = grad
    assert torch.equal(found, expected.flatten(1))


def check_rule(rule: Callable[..., dict[str, LayerGrads]], module: nn.Module, source: Tensor) -> None:
    wanted = [name for name, _ in module.named_parameters()]
    grad = randn(7, *module(source).shape)
    found = rule(call(module, source, grad), wanted)
    assert list(found) == wanted
    for name, parameter in module.named_parameters():
        rows = []
        for example, upstream in zip(source, grad, strict=True):
            (one,) = torch.autograd.grad(module(example[None]), parameter, upstream[None])
            rows.append(one.flatten())
        torch.testing.assert_close(found[name].materialize(), torch.stack(rows), rtol=1e-10, atol=1e-10)


def call(module: nn.Module, source: Tensor, grad: Tensor) -> Call:
    output = module(source).detach().expand(grad.shape)
    return Call("module", module, (source,), {}, [output], [grad], len(grad))


def randomized(module: nn.Module) -> nn.Module:
    module = module.double()
    for i, parameter in enumerate(module.parameters()):
        parameter.data.copy_(1 + randn(i, *parameter.shape))
    return module


def materialized(grads: LayerGrads) -> Tensor:
    """[B, P] float64, computed from the factors at float64."""
    if isinstance(grads, SharedGrads):
        return torch.stack([materialized(use) for use in grads.uses]).sum(dim=0)
    if isinstance(grads, OuterGrads):
        return replace(grads, left=grads.left.double(), right=grads.right.double()).materialize()
    assert isinstance(grads, DenseGrads | EmbeddingGrads)
    return replace(grads, grads=grads.grads.double()).materialize()


def close(found: Tensor, exact: Tensor, grads: LayerGrads) -> None:
    """To rounding in the dtype the factors are widened to."""
    assert found.shape == exact.shape
    eps = torch.finfo(grads.materialize().dtype).eps
    scale = materialized(grads).square().sum() + 1
    assert float((found.double() - exact).abs().max()) <= 100 * eps * float(scale)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_widen_leaves_wide_tensors_alone() -> None:
    tensor = torch.zeros(2)
    assert widen(tensor) is tensor
    assert widen(tensor.half()).dtype == torch.float32
