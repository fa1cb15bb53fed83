"""Every sketch is the linear map that materialize() says: unbiased, with the stated variance, the same everywhere.

Shapes: B examples, T positions, R rows and C columns of a parameter, P = R C, K outputs.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import ModelAtHand, UsedTwice
from torch import Tensor, nn

from gradscale.errors import GradscaleError
from gradscale.grads import sweep
from gradscale.grads.experts import ExpertGrads
from gradscale.grads.layer import (
    DenseGrads,
    EmbeddingGrads,
    GroupedGrads,
    LayerGrads,
    OuterGrads,
    SharedGrads,
    materialize,
)
from gradscale.run.shard import bound, prepare, run_shard
from gradscale.sketches import SKETCHES, BoundSketch, Sketch, blocks, check_comparable, kronecker, parse_sketch, srht
from gradscale.sketches.count import CountSketch
from gradscale.sketches.gaussian import GaussianSketch
from gradscale.sketches.identity import IdentityMap, IdentitySketch
from gradscale.sketches.kronecker import KroneckerSketch
from gradscale.sketches.rademacher import RademacherSketch
from gradscale.sketches.sjlt import SjltSketch
from gradscale.sketches.srht import SrhtSketch
from gradscale.sketches.words import buckets, entry_signs, signs, words

CPU = torch.device("cpu")
P = 60  # entries of every kind below
KINDS = ["dense", "outer", "grouped", "embedding", "tied", "experts", "bfloat16", "half table", "half experts"]
SEEDS = 300


def maps_of(dim: int, seed: int) -> dict[str, BoundSketch]:
    """Every scheme; of a Kronecker sketch with both sides, one or none projected, and of identity all P outputs."""
    sizes = {"a": P}
    return {
        "count": CountSketch(dim, seed),
        "gaussian": GaussianSketch(dim, seed),
        "rademacher": RademacherSketch(dim, seed),
        "sjlt": SjltSketch(dim, seed),
        "srht": SrhtSketch(dim, seed),
        "kronecker": KroneckerSketch(dim, seed),
        "kronecker 3": KroneckerSketch(dim, seed, rank=3),
        "kronecker 7": KroneckerSketch(dim, seed, rank=7),
        "identity": IdentitySketch().bind(sizes),
    }


SCHEMES = list(maps_of(1, 0))
UNBIASED = [name for name in SCHEMES if name not in ("identity", "gaussian")]  # tests/test_sketches.py has Gaussian


def grads_of(kind: str, B: int = 3, draw: int = 0) -> LayerGrads:
    """P = 60 entries for every kind: a vector, or 12 x 5 with its row and column factors."""
    left, right = randn(draw + 1, B, 4, 12), randn(draw + 2, B, 4, 5)
    ids = (torch.tensor([0, 11, 0, 7]) + torch.arange(B)[:, None]) % 12
    table = EmbeddingGrads(ids, randn(draw + 3, B, 4, 5), 12)
    counts = [(b + e) % 3 for e in range(3) for b in range(B)]
    ends = list(itertools.accumulate(counts, initial=0))
    bounds = tuple(tuple(ends[e * B : (e + 1) * B + 1]) for e in range(3))
    experts = ExpertGrads(randn(draw + 4, ends[-1], 4), randn(draw + 5, ends[-1], 5), bounds)
    made: dict[str, LayerGrads] = {
        "dense": DenseGrads(randn(draw, B, 60)),
        "outer": OuterGrads(left, right),
        "grouped": GroupedGrads(randn(draw + 6, B, 3, 2, 4), randn(draw + 7, B, 3, 2, 5)),
        "embedding": table,
        "tied": SharedGrads((table, OuterGrads(left, right))),
        "experts": experts,
        "bfloat16": OuterGrads(left.bfloat16(), right.bfloat16()),
        "half table": EmbeddingGrads(ids, table.grads.half(), 12),
        "half experts": ExpertGrads(experts.left.half(), experts.right.half(), bounds),
    }
    return made[kind]


# --- the map ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dim", [1, 7, 100])
def test_apply_is_the_product_with_materialize(scheme: str, kind: str, dim: int) -> None:
    grads, sketch = grads_of(kind), maps_of(dim, 3)[scheme]
    found = sketch.apply("a", grads)
    assert found.shape == (3, sketch.dim)
    assert found.dtype == torch.float64
    assert isinstance(sketch, BoundSketch)
    close(found, image(sketch, "a", grads))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tile", [(1, 1), (11, 13), (23, 50), (60, 170)])
def test_tiles_and_blocks_leave_the_map_as_it_is(
    scheme: str, kind: str, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    grads, sketch = grads_of(kind), maps_of(9, 4)[scheme]
    monkeypatch.setattr(srht, "_BLOCK", 8)
    monkeypatch.setattr(kronecker, "_WIDENED", 17)
    exact = image(sketch, "a", grads)
    for module, entries in ((sweep, "_PRODUCT_ENTRIES"), (blocks, "_TILE_ENTRIES")):
        monkeypatch.setattr(module, entries, tile[0])
        monkeypatch.setattr(module, "_CPU_TILE", tile[1])
    close(sketch.apply("a", grads), exact)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_half_precision_factors_are_widened(scheme: str) -> None:
    """As those of float32 are: the products are not rounded to half precision."""
    grads, sketch = grads_of("bfloat16"), maps_of(9, 4)[scheme]
    assert isinstance(grads, OuterGrads)
    wide = OuterGrads(grads.left.float(), grads.right.float())
    torch.testing.assert_close(sketch.apply("a", grads), sketch.apply("a", wide), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SCHEMES), st.sampled_from(KINDS[:6]), st.integers(1, 80), st.integers(0, 2**40))
def test_linear(scheme: str, kind: str, dim: int, seed: int) -> None:
    """In slices of the entries too: the images of the two parts of a gradient add up to its own."""
    sketch, grads = maps_of(dim, seed)[scheme], grads_of(kind, draw=seed % 100)
    _, rows, columns = grads.shape
    x, y = materialize(grads), randn(seed % 50, 3, P)
    head = torch.arange(P) < seed % P
    for parts in ((x * 2, -y), (x * head, x * ~head)):
        vectors = [as_layout(part, rows, columns) for part in (*parts, parts[0] + parts[1])]
        one, other, both = (sketch.apply("a", vector) for vector in vectors)
        close(one + other, both)
    close(sketch.apply("a", as_layout(x, rows, columns)), sketch.apply("a", grads))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_additive_over_the_uses_of_a_parameter(scheme: str) -> None:
    sketch, tied = maps_of(9, 5)[scheme], grads_of("tied")
    assert isinstance(tied, SharedGrads)
    close(sketch.apply("a", tied), torch.stack([sketch.apply("a", use) for use in tied.uses]).sum(dim=0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_examples_are_mapped_by_themselves(scheme: str, kind: str) -> None:
    sketch, grads = maps_of(9, 6)[scheme], grads_of(kind, B=5)
    whole = sketch.apply("a", grads)
    for part in (slice(0, 2), slice(2, 5), slice(3, 4)):
        found = sketch.apply("a", examples(grads, part))
        if scheme == "identity":
            torch.testing.assert_close(found, whole[part], rtol=1e-6, atol=1e-6)
        close(found, whole[part])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_kept_and_what_is_made_again_have_the_same_bits(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sketch = maps_of(9, 7)[scheme]
    monkeypatch.setattr(blocks, "_cache", blocks.Cache())
    first, kept = (sketch.apply("a", grads_of("outer")) for _ in range(2))
    monkeypatch.setattr(blocks, "_cache", blocks.Cache())
    monkeypatch.setattr(blocks, "_CACHE_BYTES", 0)
    again = sketch.apply("a", grads_of("outer"))
    assert torch.equal(first, kept)
    assert torch.equal(first, again)
    assert not blocks._cache.tensors


@pytest.mark.parametrize("scheme", UNBIASED)
def test_parameters_and_seeds_have_maps_of_their_own(scheme: str) -> None:
    made = [maps_of(9, seed)[scheme].materialize(name, (12, 5)) for seed in (0, 1) for name in ("a", "b")]
    assert all(not torch.equal(p, q) for p, q in itertools.combinations(made, 2))


def test_schemes_have_maps_of_their_own() -> None:
    """A vector's count sketch is that of every Kronecker sketch, by its definition."""
    schemes = ("gaussian", "rademacher", "srht", "kronecker")
    made = [maps_of(9, 0)[scheme].materialize("a", (60, 1)) for scheme in schemes]
    assert all(not torch.equal(p, q) for p, q in itertools.combinations(made, 2))


# --- inner products ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "outer", "embedding", "tied"])
@pytest.mark.parametrize("scheme", UNBIASED)
def test_inner_products_and_norms_are_unbiased(scheme: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over seeds, within 4 standard errors; of one parameter, and of two together."""
    monkeypatch.setattr(srht, "_BLOCK", 16)
    grads, other = grads_of(kind, B=2), DenseGrads(randn(9, 2, P))
    exact = gram(materialize(grads).double())
    together = exact + gram(materialize(other))
    one, two = [], []
    for seed in range(SEEDS):
        sketch = maps_of(8, seed)[scheme]
        first = sketch.apply("a", grads)
        one.append(gram(first))
        two.append(gram(first + sketch.apply("b", other)))
    for found, expected in ((one, exact), (two, together)):
        products = torch.stack(found)
        assert ((products.mean(dim=0) - expected).abs() < 4 * products.std(dim=0) / math.sqrt(SEEDS) + 1e-9).all()


@pytest.mark.parametrize("cosine", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("scheme", ["rademacher", "sjlt", "srht", "kronecker"])
def test_inner_products_of_vectors_have_the_stated_variance(
    scheme: str, cosine: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(srht, "_BLOCK", 16)
    x, y = pair(cosine)
    found = products(lambda seed: maps_of(6, seed)[scheme], DenseGrads(torch.stack([x, y])))
    stated = of_srht(x, y, 6) if scheme == "srht" else of_signs(x, y, 6)
    check_variance(found, stated)


@pytest.mark.parametrize("dim", [3, 6, 16, 32])
def test_blocks_of_srht_have_the_stated_variance(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller, equal and larger than K, of very different lengths: one that fits in is isometric."""
    monkeypatch.setattr(srht, "_BLOCK", 16)
    x, y = pair(0.5)
    x[:16] *= 3
    found = products(lambda seed: SrhtSketch(dim, seed), DenseGrads(torch.stack([x, y])))
    check_variance(found, of_srht(x, y, dim))
    matrix = SrhtSketch(32, 1).materialize("a", (16, 1)).double()
    close(matrix @ matrix.T, torch.eye(16).double())


@pytest.mark.parametrize("positions", [1, 2, 20])
@pytest.mark.parametrize("rank", [2, 6])
def test_a_kronecker_sketch_has_the_stated_variance(rank: int, positions: int) -> None:
    """Of rank-one and other matrices, with both sides or rows alone projected: V, and what the fold adds to it."""
    grads = OuterGrads(randn(1, 1, positions, 12), randn(2, 1, positions, 5))
    matrix = materialize(grads).view(12, 5)
    before, total = variance_before_the_fold(matrix, rank), float(matrix.square().sum())
    large = products(lambda seed: KroneckerSketch(1 << 13, seed, rank), grads)
    check_variance(large, before, slack=2 * (total**2 + before) / (1 << 13))
    small = products(lambda seed: KroneckerSketch(8, seed, rank), grads)
    largest = before + 2 * (total**2 + before) / 8
    assert before < float(small.var()) < largest * (1 + 4 * relative_error_of_variance(small))


def test_a_matrix_that_is_kept_has_the_variance_of_the_fold() -> None:
    grads = OuterGrads(randn(1, 1, 2, 12), randn(2, 1, 2, 5))
    (entries,) = materialize(grads)
    check_variance(products(lambda seed: KroneckerSketch(8, seed, rank=12), grads), of_signs(entries, entries, 8))
    assert variance_before_the_fold(entries.view(12, 5), 12) == 0


def test_a_matrix_of_rank_one_has_the_effective_dimension_of_the_docstring() -> None:
    """31 at rank 64, however large K is: to the terms that signs do better than Gaussians."""
    left, right = randn(1, 1, 1, 300), randn(2, 1, 1, 200)
    matrix = materialize(OuterGrads(left, right)).view(300, 200)
    effective = 2 * float(matrix.square().sum()) ** 2 / variance_before_the_fold(matrix, 64)
    assert effective == pytest.approx(1 / (2 / 64 + 2 / 64**2), rel=0.03)
    assert math.floor(1 / (2 / 64 + 2 / 64**2)) == 31


def variance_before_the_fold(matrix: Tensor, rank: int) -> float:
    """V of KroneckerSketch, term by term."""
    rows, columns = (0.0 if size <= rank else 1 / rank for size in matrix.shape)
    square = matrix.square()
    of_rows, of_columns = (off_diagonal((m @ m.T).square()) for m in (matrix, matrix.T))
    lengths = square.sum(dim=0)
    crossed = off_diagonal(lengths[:, None] * lengths - 2 * square.T @ square)
    return 2 * rows * of_rows + 2 * columns * ((1 + rows) * of_columns + rows * crossed)


def of_signs(x: Tensor, y: Tensor, K: int) -> float:
    return float((x @ x * (y @ y) + (x @ y) ** 2 - 2 * (x * y).square().sum()) / K)


def of_srht(x: Tensor, y: Tensor, K: int) -> float:
    """With blocks of 16, or of K's power of two if that is more."""
    n = SrhtSketch(K).block_size(len(x))
    total = x @ x * (y @ y) + (x @ y) ** 2
    for a, b in zip(x.split(n), y.split(n), strict=True):
        own, f = a @ a * (b @ b) + (a @ b) ** 2, max(0, n - K) / (n - 1)
        total = total - (own - f * (own - 2 * (a * b).square().sum()))
    return float(total / K)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_every_name_parses_binds_and_says_its_scheme() -> None:
    for name in SKETCHES:
        sketch = parse_sketch(f"{name}:60", seed=3)
        assert isinstance(sketch, Sketch)
        scheme = sketch.bind({"a": 40, "b": 20}).scheme
        assert {"name", "version", "seed", "dim"} <= set(scheme)
        assert scheme["dim"] == 60
        assert scheme["name"] == ("count" if name == "default" else name)
        assert sketch == parse_sketch(f"{name}:60", seed=3)
        assert hash(sketch) == hash(parse_sketch(f"{name}:60", seed=3))
    assert KroneckerSketch(60, 3, rank=9).scheme["rank"] == 9


def test_identity_takes_the_number_of_all_entries() -> None:
    sizes = {"a": 4, "b": 2}
    whole = parse_sketch("identity", seed=5).bind(sizes)
    assert whole == parse_sketch("identity:6", seed=0).bind(sizes) == IdentityMap((("a", 4), ("b", 2)))
    a, b = randn(0, 3, 4), randn(1, 3, 2)
    found = whole.apply("a", DenseGrads(a)) + whole.apply("b", DenseGrads(b))
    assert torch.equal(found, torch.cat([a, b], dim=1))
    stacked = torch.cat([whole.materialize("a", (2, 2)), whole.materialize("b", (2, 1))])
    assert torch.equal(stacked, torch.eye(6))


@pytest.mark.parametrize("dim", [5, 7])
def test_identity_of_another_dimension_is_refused(dim: int) -> None:
    expected = f"dimension of identity must be that of the gradients, 6, got {dim}; use identity:6, or plain identity"
    with pytest.raises(GradscaleError, match=expected):
        IdentitySketch(dim).bind({"a": 4, "b": 2})


@pytest.mark.parametrize("name", [name for name in SKETCHES if name != "identity"])
def test_more_outputs_than_entries_are_refused(name: str) -> None:
    expected = "sketch dimension must be at most the 6 entries of .* got 7; use a smaller K, or identity:6"
    with pytest.raises(GradscaleError, match=expected):
        parse_sketch(f"{name}:7", seed=0).bind({"a": 4, "b": 2})
    parse_sketch(f"{name}:6", seed=0).bind({"a": 4, "b": 2})


@pytest.mark.parametrize("name", list(SKETCHES))
def test_dimensions_must_be_positive(name: str) -> None:
    with pytest.raises(GradscaleError, match="sketch dimension must be at least 1, got 0"):
        parse_sketch(f"{name}:0", seed=0)


def test_the_rank_and_the_sparsity_must_be_positive() -> None:
    with pytest.raises(GradscaleError, match="sparsity of an SJLT sketch must be at least 1, got 0"):
        SjltSketch(4, sparsity=0)
    with pytest.raises(GradscaleError, match="rank of a Kronecker sketch must be at least 1, got 0"):
        KroneckerSketch(4, rank=0)


@pytest.mark.parametrize("text", ["count sketch:4", "kronecker", "srht:", "rademacher:1e3", "identity:", "identity:P"])
def test_parse_sketch_refuses(text: str) -> None:
    with pytest.raises(GradscaleError, match=f"sketch must be NAME:K with NAME in .* got '{re.escape(text)}'"):
        parse_sketch(text, seed=0)


def test_only_sketches_of_the_same_scheme_are_compared() -> None:
    check_comparable(KroneckerSketch(8, 1).scheme, KroneckerSketch(8, 1).scheme)
    with pytest.raises(
        GradscaleError, match="must be of the same scheme, got name gaussian and srht, dim 8 and 9; mea"
    ):
        check_comparable(GaussianSketch(8).scheme, SrhtSketch(9).scheme)
    with pytest.raises(GradscaleError, match="got seed 1 and 2; measure again with the same --sketch and --seed"):
        check_comparable(GaussianSketch(8, 1).scheme, GaussianSketch(8, 2).scheme)
    with pytest.raises(GradscaleError, match="got rank 64 and None"):
        check_comparable(KroneckerSketch(8, 1).scheme, {**KroneckerSketch(8, 1).scheme, "rank": None})


@pytest.mark.parametrize("name", [name for name in SKETCHES if name != "default"])
def test_a_shard_holds_the_image_of_what_identity_keeps(name: str) -> None:
    """A layer used twice, biases and a head: P = 35; and the error for other K names it."""
    torch.manual_seed(0)
    tensors = {"x": randn(0, 5, 3, 4), "label": torch.tensor([0, 2, 1, 0, 1])}
    task = ModelAtHand(UsedTwice().double().eval(), tensors, cross_entropy)
    subject = prepare(task, None, None)
    whole = run_shard(subject, range(5), 0, 2, [], bound(IdentitySketch(), subject)).columns
    assert whole.sketch is not None
    torch.testing.assert_close(whole.sketch.square().sum(dim=1), whole.grad_sq_norm)
    sketch = bound(parse_sketch(f"{name}:35", seed=1), subject)
    assert sketch is not None
    found = run_shard(subject, range(5), 0, 2, [], sketch).columns.sketch
    assert found is not None
    shapes = {parameter: (*p.shape, 1)[:2] for parameter, p in subject.parameters.items()}
    stacked = torch.cat([sketch.materialize(parameter, (r, c)) for parameter, (r, c) in shapes.items()])
    close(found, whole.sketch @ stacked.double())
    with pytest.raises(GradscaleError, match=r"entries of the measured .* got 36|of the gradients, 35, got 36"):
        bound(parse_sketch(f"{name}:36", seed=1), subject)


# --- bits -------------------------------------------------------------------------------------------------------------


def test_signs_and_words_do_not_depend_on_where_a_range_begins() -> None:
    key = (3, 4)
    assert torch.equal(words(key, 5, 19, CPU), words(key, 0, 30, CPU)[5:19])
    assert torch.equal(signs(key, 2, 5, 7, CPU), signs(key, 0, 9, 150, CPU)[2:5, :7])
    assert torch.equal(entry_signs(key, 100, 400, CPU), entry_signs(key, 0, 512, CPU)[100:400])
    bucket, sign = buckets(key, 0, 4000, 9, CPU)
    assert torch.equal(buckets(key, 9, 21, 9, CPU)[0], bucket[9:21])
    assert torch.bincount(bucket, minlength=9).sub(4000 / 9).abs().max() < 4 * math.sqrt(4000 / 9)
    assert abs(int(sign.sum())) < 4 * math.sqrt(4000)
    assert abs(int(signs(key, 0, 40, 100, CPU).sum())) < 4 * math.sqrt(4000)
    assert set(sign.unique().tolist()) == {-1, 1}


def test_signs_are_the_bits_of_the_words() -> None:
    """From the lowest bit of the first word on; 1 is minus."""
    (first, *_) = words((3, 4), 0, 4, CPU).tolist()
    assert signs((3, 4), 0, 1, 32, CPU)[0].tolist() == [1.0 - 2.0 * (first >> bit & 1) for bit in range(32)]


def test_pinned_numbers() -> None:
    """These change only with the VERSION of a scheme: stored sketches depend on them."""
    for scheme, expected in GOLDEN.items():
        assert digest(maps_of(9, 7)[scheme].materialize("a", (12, 5))) == pytest.approx(expected, abs=1e-3), scheme
    second = SrhtSketch(9, 7).materialize("a", (2000, 1))[1020:1028]
    assert digest(second) == pytest.approx(GOLDEN_SECOND_BLOCK, abs=1e-3)


def test_a_column_of_sjlt_has_an_entry_in_each_of_its_blocks() -> None:
    matrix = SjltSketch(10, 3, sparsity=4).materialize("a", (300, 100))  # blocks of 2, 3, 2, 3
    for start, stop in ((0, 2), (2, 5), (5, 7), (7, 10)):
        block = matrix[:, start:stop]
        assert ((block != 0).sum(dim=1) == 1).all()
        close(block.abs().sum(dim=1), torch.full((30_000,), math.sqrt((stop - start) / 10)))
    assert not torch.equal(matrix[:, :2].abs(), matrix[:, 5:7].abs())


# From a Philox, and the definitions, in plain Python integers and floats.
GOLDEN: Mapping[str, list[float]] = {
    "rademacher": [-0.333333, -0.333333, -0.333333, -0.333333, -0.333333, -0.333333, 3196.667],
    "srht": [-0.333333, 0.333333, 0.333333, 0.333333, -0.333333, -0.333333, 13.333],
    "kronecker": [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, -1909.0],
    "kronecker 3": [0.333333, -0.666667, 0.0, 0.0, 0.0, 0.666667, 262.0],
    "kronecker 7": [0.0, -0.377964, 0.0, 0.0, 0.377964, -0.755929, 3212.698],
    "sjlt": [
        0.0,
        -0.471405,
        0.0,
        -0.471405,
        0.0,
        -0.471405,
        -560.93,
    ],  # as it came out: tests/test_count_sketch.py has the definition of its blocks
}
GOLDEN_SECOND_BLOCK = [-0.333333, -0.333333, -0.333333, -0.333333, 0.333333, -0.333333, 59.333]


def digest(matrix: Tensor) -> list[float]:
    """Some numbers of `matrix`, and one that depends on all of them."""
    weights = torch.arange(1, matrix.numel() + 1, dtype=torch.float64)
    return [*matrix[1, :6].tolist(), float(matrix.double().flatten() @ weights)]


# --- at hand ----------------------------------------------------------------------------------------------------------


def image(sketch: BoundSketch, name: str, grads: LayerGrads) -> Tensor:
    """The definition."""
    _, rows, columns = grads.shape
    return materialize(grads).double() @ sketch.materialize(name, (rows, columns)).double()


def as_layout(dense: Tensor, rows: int, columns: int) -> LayerGrads:
    """The same gradients [B, P] of R x C entries: column j times the unit vector j, for every column."""
    if columns == 1:
        return DenseGrads(dense)
    return OuterGrads(dense.view(-1, rows, columns).mT, torch.eye(columns).to(dense).expand(len(dense), -1, -1))


def examples(grads: LayerGrads, part: slice) -> LayerGrads:
    if isinstance(grads, SharedGrads):
        return SharedGrads(tuple(examples(use, part) for use in grads.uses))
    if isinstance(grads, DenseGrads):
        return DenseGrads(grads.grads[part])
    if isinstance(grads, EmbeddingGrads):
        return EmbeddingGrads(grads.ids[part], grads.grads[part], grads.num_rows)
    if isinstance(grads, ExpertGrads):
        rows = [torch.arange(b[part.start], b[part.stop]) for b in grads.bounds]
        starts = itertools.accumulate((len(r) for r in rows), initial=0)
        bounds = (
            tuple(end - b[part.start] + start for end in b[part.start : part.stop + 1])
            for b, start in zip(grads.bounds, starts, strict=False)
        )
        return ExpertGrads(grads.left[torch.cat(rows)], grads.right[torch.cat(rows)], tuple(bounds))
    assert isinstance(grads, OuterGrads | GroupedGrads)
    return type(grads)(grads.left[part], grads.right[part])


def products(make: Callable[[int], BoundSketch], grads: LayerGrads) -> Tensor:
    """[SEEDS]: <S x, S y> of the first and the last example."""
    images = (make(seed).apply("a", grads) for seed in range(SEEDS))
    return torch.stack([found[0] @ found[-1] for found in images])


def check_variance(found: Tensor, stated: float, slack: float = 0.0) -> None:
    error = abs(float(found.var()) - stated)
    assert error <= 4 * relative_error_of_variance(found) * stated + slack + 1e-8 * float(found.square().mean())


def relative_error_of_variance(found: Tensor) -> float:
    """From the fourth moment of the sample itself."""
    centred = found - found.mean()
    variance = float(centred.square().mean())
    if variance < 1e-12 * float(found.square().mean()):
        return 0.0
    return math.sqrt(max(float(centred.pow(4).mean()) / variance**2 - 1, 0) / len(found))


def pair(cosine: float) -> tuple[Tensor, Tensor]:
    """[40] each: of lengths 2 and 3."""
    x = torch.nn.functional.normalize(randn(0, 40), dim=0)
    other = torch.nn.functional.normalize(randn(1, 40) - (randn(1, 40) @ x) * x, dim=0)
    return 2 * x, 3 * (cosine * x + math.sqrt(1 - cosine**2) * other)


def cross_entropy(net: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return torch.nn.functional.cross_entropy(net(batch["x"]), batch["label"], reduction="none")


def gram(rows: Tensor) -> Tensor:
    return rows @ rows.T


def off_diagonal(matrix: Tensor) -> float:
    return float(matrix.sum() - matrix.diagonal().sum())


def close(found: Tensor, exact: Tensor) -> None:
    """To the rounding of float32 entries."""
    scale = float(exact.abs().max())
    torch.testing.assert_close(found.double(), exact.double(), rtol=1e-5, atol=1e-5 * scale + 1e-6)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
