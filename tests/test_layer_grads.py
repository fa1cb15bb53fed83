"""Every reading is that of materialize(), and materialize() is what autograd gives one example at a time.

Shapes: B examples, T positions, G groups, I/O features in and out, V rows of a table, E its width, N vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradscale.grads import gram, sweep
from gradscale.grads.call import Call
from gradscale.grads.experts import ExpertGrads
from gradscale.grads.generic import generic
from gradscale.grads.layer import (
    DenseGrads,
    EmbeddingGrads,
    GroupedGrads,
    LayerGrads,
    OuterGrads,
    SharedGrads,
    materialize,
    share,
    widen,
)
from gradscale.grads.rules.linear import embedding, linear
from gradscale.grads.rules.norms import layer_norm
from gradscale.grads.sweep import Request, dot, read, sq_norms, weighted_sum

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
    whole = share([first, head, draw(dense(B, first.num_rows * E, dtype))][: draw(st.integers(2, 3))])
    assert isinstance(whole, SharedGrads)
    return whole


@st.composite
def grouped(draw: st.DrawFn) -> GroupedGrads:
    B, G, T, O, I = (draw(sizes) for _ in range(5))  # noqa: E741
    dtype = draw(dtypes)
    return GroupedGrads(randn(draw(seeds), B, G, T, O).to(dtype), randn(draw(seeds), B, G, T, I).to(dtype))


@st.composite
def factored(draw: st.DrawFn) -> SharedGrads:
    """Uses whose factors alone give every reading: two heads, an embedding, or any of these twice."""
    first = draw(table())
    B, _, E = first.grads.shape
    heads = [
        OuterGrads(
            randn(seed, B, T, first.num_rows).to(first.grads.dtype), randn(seed + 1, B, T, E).to(first.grads.dtype)
        )
        for seed, T in ((draw(st.integers(0, 99)), draw(sizes)) for _ in range(2))
    ]
    uses = [first, *heads, EmbeddingGrads(first.ids.flip(1), first.grads.flip(0), first.num_rows)]
    chosen = draw(st.lists(st.integers(0, 3), min_size=2, max_size=4))
    return SharedGrads(tuple(uses[i] for i in chosen))


@st.composite
def experts(draw: st.DrawFn) -> ExpertGrads:
    """Some experts have no token, and some examples none for an expert."""
    E, B, R, C = (draw(sizes) for _ in range(4))
    counts = draw(st.lists(st.sampled_from([0, 0, 1, 2, 3, 7]), min_size=E * B, max_size=E * B))
    ends = [0, *accumulate(counts)]
    dtype = draw(dtypes)
    return ExpertGrads(
        randn(draw(seeds), ends[-1], R).to(dtype),
        randn(draw(seeds), ends[-1], C).to(dtype),
        tuple(tuple(ends[e * B : (e + 1) * B + 1]) for e in range(E)),
    )


anything = st.one_of(dense(), outer(), table(), grouped(), shared(), factored(), experts())
laws = settings(deadline=None, max_examples=60)


@laws
@given(anything)
def test_materialize_is_wide(grads: LayerGrads) -> None:
    assert isinstance(grads, LayerGrads)
    assert materialize(grads).dtype == grads.dtype
    assert grads.dtype in (torch.float32, torch.float64)
    assert materialize(grads).shape == (grads.shape[0], grads.shape[1] * grads.shape[2])
    assert grads.device == torch.device("cpu")


@laws
@given(anything)
def test_sq_norms(grads: LayerGrads) -> None:
    exact = materialized(grads).square().sum(dim=1)
    close(sq_norms(grads), exact, grads)
    assert sq_norms(grads).dtype == torch.float64


@laws
@given(anything, seeds, st.integers(1, 3))
def test_dot(grads: LayerGrads, seed: int, N: int) -> None:
    exact = materialized(grads)
    vectors = randn(seed, exact.shape[1], N).to(grads.dtype)
    close(dot(grads, vectors), exact @ vectors.double(), grads)
    assert dot(grads, vectors).dtype == torch.float64


@laws
@given(anything, seeds, st.sampled_from([torch.float32, torch.float64]))
def test_weighted_sum(grads: LayerGrads, seed: int, dtype: torch.dtype) -> None:
    exact = materialized(grads)
    weights = randn(seed, len(exact)).to(dtype)
    close(weighted_sum(grads, weights), weights.double() @ exact, grads)
    assert weighted_sum(grads, weights).dtype == grads.dtype


@laws
@given(anything, st.data())
def test_a_tile_is_the_block_of_materialize(grads: LayerGrads, data: st.DataObject) -> None:
    batch, rows, _ = grads.shape
    examples, part = data.draw(ranges(batch)), data.draw(ranges(rows))
    whole = materialize(grads).view(grads.shape)
    out = torch.full_like(whole[examples, part], torch.nan).contiguous()
    grads.tile(examples, part, out)
    close(out.flatten(), whole[examples, part].double().flatten(), grads)
    grads.tile(examples, part, out, add=True)
    close(out.flatten(), 2 * whole[examples, part].double().flatten(), grads)


@st.composite
def ranges(draw: st.DrawFn, size: int) -> slice:
    start = draw(st.integers(0, size - 1))
    return slice(start, draw(st.integers(start + 1, size)))


PATHS: dict[str, dict[str, float]] = {
    "as-they-are": {},
    "one-entry": {"_TILE_ENTRIES": 1, "_PRODUCT_ENTRIES": 1, "_CPU_TILE": 1, "_GRAM_TILE": 1},
    "some-entries": {"_TILE_ENTRIES": 7, "_PRODUCT_ENTRIES": 5, "_CPU_TILE": 11, "_GRAM_TILE": 6},
    "many-examples": {"_TILE_ENTRIES": 9, "_PRODUCT_ENTRIES": 4, "_CPU_TILE": 40, "_GRAM_TILE": 40},
    "factors": {"_PASS_COST": math.inf},
    "factors-in-tiles": {"_PASS_COST": math.inf, "_GRAM_TILE": 3, "_GRAM_HALF": math.inf},
    "factors-by-halves": {"_PASS_COST": math.inf, "_GRAM_HALF": 20},
    "factors-by-all-halves": {"_PASS_COST": math.inf, "_GRAM_HALF": 0, "_GRAM_TILE": 5},
    "tiles": {"_PASS_COST": -math.inf, "_TILE_ENTRIES": 6, "_CPU_TILE": 6},
}


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None, max_examples=30)
@given(grads=anything, seed=seeds, previous=st.booleans())
def test_one_sweep_reads_everything_by_every_path(path: str, grads: LayerGrads, seed: int, previous: bool) -> None:
    """Norms, several sums and several products at once, added to what was there, whatever the others are."""
    exact = materialized(grads)
    B, P = exact.shape
    weights = [None, randn(seed, B).to(grads.dtype), torch.zeros(B, dtype=grads.dtype)]
    maps = [randn(seed + 1, P, 2).to(grads.dtype), randn(seed + 2, P, 1).float()]
    offset = 1.0 if previous else 0.0

    def request(norms: bool, sums: bool, products: bool) -> Request:
        return Request(
            torch.full((B,), offset, dtype=torch.float64) if norms else None,
            tuple((w, torch.full((P,), offset, dtype=grads.dtype)) for w in weights) if sums else (),
            tuple(
                (lambda start, stop, m=m: m[start:stop], torch.full((B, m.shape[1]), offset, dtype=torch.float64))
                for m in maps
            )
            if products
            else (),
        )

    with pytest.MonkeyPatch.context() as patch:
        for name, value in PATHS[path].items():
            patch.setattr(gram if name in vars(gram) else sweep, name, value)
        for which in [(True, True, True), (True, True, False), (True, False, False), (False, True, False)]:
            asked = request(*which)
            read(grads, asked)
            if asked.norms is not None:
                close(asked.norms - offset, exact.square().sum(dim=1), grads)
            for w, total in asked.sums:
                close(total - offset, (torch.ones(B).double() if w is None else w.double()) @ exact, grads)
            for m, (_, total) in zip(maps, asked.products, strict=False):
                close(total - offset, exact @ m.double(), grads)


def test_tiles_stay_within_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    grads, seen = OuterGrads(randn(0, 5, 30, 6), randn(1, 5, 30, 4)), []
    tile = OuterGrads.tile

    def spy(self: OuterGrads, examples: slice, rows: slice, out: Tensor, *, add: bool = False) -> None:
        seen.append((examples, rows))
        tile(self, examples, rows, out, add=add)

    monkeypatch.setattr(OuterGrads, "tile", spy)
    for name, budget in (("_TILE_ENTRIES", 9), ("_PRODUCT_ENTRIES", 4), ("_CPU_TILE", 17)):
        monkeypatch.setattr(sweep, name, budget)
    sq_norms(grads)
    assert {(e.stop - e.start, r.stop - r.start) for e, r in seen} == {
        (2, 2),
        (1, 2),
    }  # 2 rows are 8 <= 9, of 2 examples 16 <= 17
    seen.clear()
    dot(grads, randn(2, 24, 1))
    assert {(e.stop - e.start, r.stop - r.start) for e, r in seen} == {
        (3, 1),
        (2, 1),
    }  # at most 4 examples share a block of a row


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_widened_before_they_are_added_up(kind: torch.dtype) -> None:
    left, right = torch.full((1, 600, 2), 16.0, dtype=kind), torch.full((1, 600, 3), 16.0, dtype=kind)
    ids = torch.zeros(1, 600, dtype=torch.long)
    total = 600.0 * 256  # above float16's largest number; 8 bits of bfloat16 do not hold the partial sums
    assert materialize(OuterGrads(left, right)).unique().tolist() == [total]
    assert materialize(GroupedGrads(left[:, None], right[:, None])).unique().tolist() == [total]
    assert weighted_sum(OuterGrads(left, right), torch.ones(1)).unique().tolist() == [total]
    assert sq_norms(OuterGrads(left, right)).tolist() == pytest.approx([6 * total**2], rel=3e-7)  # float32's rounding
    assert materialize(EmbeddingGrads(ids, left * right[:, :, :2], 1)).unique().tolist() == [total]
    assert sq_norms(EmbeddingGrads(ids, left, 1)).tolist() == pytest.approx([2 * (600.0 * 16) ** 2], rel=3e-7)
    assert weighted_sum(DenseGrads(torch.full((600, 1), 256.0, dtype=kind)), torch.ones(600)).tolist() == [total]
    assert sq_norms(DenseGrads(torch.full((1, 2), 256.0, dtype=kind))).tolist() == pytest.approx(
        [2 * 256.0**2], rel=3e-7
    )


def test_squares_of_many_entries_lose_no_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One running sum over a million equal squares in float32 is off by 7e-4."""
    monkeypatch.setattr(sweep, "_PASS_COST", -math.inf)  # by tiles
    row = torch.full((1, 1, 1 << 20), 0.1)
    exact = (1 << 20) * float(row[0, 0, 0]) ** 2
    assert sq_norms(OuterGrads(torch.ones(1, 1, 1), row)).item() == pytest.approx(exact, rel=2e-6)


@pytest.mark.parametrize(("T", "by_gram"), [(1, True), (5, True), (6, False), (40, False)])
def test_both_ways_to_the_norms_of_outer_products(T: int, by_gram: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = OuterGrads(randn(0, 3, T, 5), randn(1, 3, T, 5))  # 10 T^2 <= 25 T + 25 passes for T <= 5 at 6 a pass
    exact = materialize(grads).square().sum(dim=1)
    monkeypatch.setattr(sweep, "_PASS_COST", 6.0)
    monkeypatch.setattr(sweep, "_GRAM_COST", 1.0)
    torch.testing.assert_close(sq_norms(grads), exact, rtol=1e-12, atol=0)
    monkeypatch.setattr(OuterGrads, "tile", lambda self, examples, rows, out, *, add=False: out.fill_(torch.nan))
    assert bool(sq_norms(grads).isnan().all()) == (not by_gram)


def test_cross_terms_of_shared_uses_count() -> None:
    table = EmbeddingGrads(torch.tensor([[0, 1, 0]] * 3), randn(1, 3, 3, 2), 4)
    for use in (DenseGrads(randn(0, 3, 4)), OuterGrads(randn(0, 3, 2, 4), randn(1, 3, 2, 2)), table):
        torch.testing.assert_close(sq_norms(share([use, use])), 4 * sq_norms(use))
        negative = DenseGrads(-materialize(use))
        torch.testing.assert_close(sq_norms(share([use, negative])), torch.zeros(3, dtype=torch.float64))
        assert share([use]) is use


def test_uses_of_different_layouts_are_added_as_vectors() -> None:
    first, second = OuterGrads(randn(0, 3, 2, 4), randn(1, 3, 2, 2)), DenseGrads(randn(2, 3, 8))
    torch.testing.assert_close(materialize(share([first, second])), materialize(first) + second.grads)


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
    found = materialize(embedding(call(module, ids, grad), ["weight"])["weight"])
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
        torch.testing.assert_close(materialize(found[name]), torch.stack(rows), rtol=1e-10, atol=1e-10)


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
    if isinstance(grads, OuterGrads | GroupedGrads | ExpertGrads):
        return materialize(replace(grads, left=grads.left.double(), right=grads.right.double()))
    assert isinstance(grads, DenseGrads | EmbeddingGrads)
    return materialize(replace(grads, grads=grads.grads.double()))


def close(found: Tensor, exact: Tensor, grads: LayerGrads) -> None:
    """To rounding in the dtype the factors are widened to."""
    assert found.shape == exact.shape
    eps = torch.finfo(grads.dtype).eps
    scale = materialized(grads).square().sum() + 1
    assert float((found.double() - exact).abs().max()) <= 100 * eps * float(scale)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_widen_leaves_wide_tensors_alone() -> None:
    tensor = torch.zeros(2)
    assert widen(tensor) is tensor
    assert widen(tensor.half()).dtype == torch.float32
