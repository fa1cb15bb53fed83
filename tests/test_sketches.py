"""The Gaussian maps: linear, additive over parameters, the same however they are made, and unbiased as stated.

Shapes: B examples, P entries of a parameter, K outputs.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.grads import sweep
from gradscale.grads.layer import DenseGrads, EmbeddingGrads, LayerGrads, OuterGrads, SharedGrads, materialize
from gradscale.grads.readings import LinearMap
from gradscale.sketches import BoundSketch, Sketch, blocks, parse_sketch
from gradscale.sketches.count import CountSketch
from gradscale.sketches.gaussian import GaussianProbes, GaussianSketch
from gradscale.sketches.philox import key_of, normals

SEEDS = 400
KINDS = ["dense", "outer", "table", "shared", "bfloat16"]
MAPS = [GaussianProbes, GaussianSketch]
Maps = type[GaussianProbes] | type[GaussianSketch]


def grads_of(kind: str, B: int = 3) -> LayerGrads:
    """P = 20 entries for every kind."""
    left, right = randn(1, B, 2, 4), randn(2, B, 2, 5)
    ids = torch.tensor([[0, 3, 0]] * B)
    made: dict[str, LayerGrads] = {
        "dense": DenseGrads(randn(0, B, 20)),
        "outer": OuterGrads(left, right),
        "table": EmbeddingGrads(ids, randn(3, B, 3, 5), 4),
        "shared": SharedGrads((EmbeddingGrads(ids, randn(3, B, 3, 5), 4), OuterGrads(left, right))),
        "bfloat16": OuterGrads(left.bfloat16(), right.bfloat16()),
    }
    return made[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAPS)
def test_apply_is_the_product_with_materialize(make: Maps, kind: str) -> None:
    grads, sketch = grads_of(kind), make(7, seed=3)
    dense = materialize(grads)
    found = sketch.apply("a.weight", grads)
    assert found.shape == (3, 7)
    assert found.dtype == torch.float64
    close(found, dense.double() @ sketch.materialize("a.weight", (20, 1)).double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAPS)
def test_groups_blocks_and_cache_leave_the_map_as_it_is(make: Maps, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grads, sketch = grads_of(kind), make(7, seed=4)
    whole = sketch.apply("a.weight", grads)
    monkeypatch.setattr(sweep, "_CPU_TILE", 25)  # one or two examples at a time
    monkeypatch.setattr(sweep, "_PRODUCT_ENTRIES", 11)  # two or three blocks of the map
    close(sketch.apply("a.weight", grads), whole.double())


def test_beyond_the_cache_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_cache", blocks.Cache())
    monkeypatch.setattr(sweep, "_PRODUCT_ENTRIES", 3)
    sketch, grads = GaussianSketch(7, seed=5), grads_of("dense")
    cached = [sketch.apply("a.weight", grads) for _ in range(2)]
    assert len(blocks._cache.tensors) == 7
    budget = sum(block.nbytes for block in list(blocks._cache.tensors.values())[:2])
    for bytes_kept, blocks_kept in ((0, 0), (budget, 2)):
        monkeypatch.setattr(blocks, "_cache", blocks.Cache())
        monkeypatch.setattr(blocks, "_CACHE_BYTES", bytes_kept)
        again = [sketch.apply("a.weight", grads) for _ in range(2)]
        assert len(blocks._cache.tensors) == blocks_kept
        assert all(torch.equal(a, b) for a, b in zip(again, cached, strict=True))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(0, 2**40), st.integers(1, 30), st.integers(0, 5))
def test_linear(dim: int, seed: int, P: int, draw: int) -> None:
    x, y, sketch = randn(draw, 2, P), randn(draw + 1, 2, P), GaussianSketch(dim, seed)
    together = sketch.apply("a", DenseGrads(2 * x - y))
    close(together, (2 * sketch.apply("a", DenseGrads(x)) - sketch.apply("a", DenseGrads(y))).double())


def test_additive_over_parameters() -> None:
    """The map of two parameters is the sum of their maps, and its inner products those of the whole gradients."""
    a, b = randn(0, 2, 6), randn(1, 2, 9)
    products = torch.zeros(2, 2, dtype=torch.float64)
    for seed in range(SEEDS):
        sketch = GaussianSketch(16, seed)
        image = sketch.apply("a", DenseGrads(a)) + sketch.apply("b", DenseGrads(b))
        stacked = torch.cat([sketch.materialize("a", (6, 1)), sketch.materialize("b", (9, 1))]).double()
        close(image, torch.cat([a, b], dim=1) @ stacked)
        products += image @ image.T / SEEDS
    exact = a @ a.T + b @ b.T
    norms = exact.diagonal()
    stderr = ((norms[:, None] * norms + exact.square()) / (16 * SEEDS)).sqrt()
    assert ((products - exact).abs() < 4 * stderr).all()


def test_different_parameters_and_roles_and_seeds_have_different_maps() -> None:
    maps = [
        GaussianSketch(5).materialize("a", (4, 1)) * math.sqrt(5),
        GaussianSketch(5).materialize("b", (4, 1)) * math.sqrt(5),
        GaussianSketch(5, seed=1).materialize("a", (4, 1)) * math.sqrt(5),
        GaussianProbes(5).materialize("a", (4, 1)),
    ]
    assert all(float((p - q).abs().max()) > 0.1 for i, p in enumerate(maps) for q in maps[:i])


def test_the_map_is_the_one_that_is_documented() -> None:
    key = key_of("gaussian", 1, 9, "probe", "a")
    assert torch.equal(GaussianProbes(5, seed=9).materialize("a", (4, 1)), normals(key, 0, 4, 5, torch.device("cpu")))
    made = normals(key_of("gaussian", 1, 9, "sketch", "a"), 0, 4, 5, torch.device("cpu"))
    close(GaussianSketch(5, seed=9).materialize("a", (4, 1)), made.double() / 5**0.5)


def test_fewer_probes_are_the_first_ones() -> None:
    few, many = GaussianProbes(3, seed=2), GaussianProbes(8, seed=2)
    assert torch.equal(few.materialize("a", (50, 1)), many.materialize("a", (50, 1))[:, :3])
    close(few.apply("a", grads_of("outer")), many.apply("a", grads_of("outer"))[:, :3])


@pytest.mark.parametrize(("cosine", "K"), [(1.0, 4), (0.0, 4), (0.6, 16), (-0.9, 16)])
def test_inner_products_are_unbiased_with_the_stated_variance(cosine: float, K: int) -> None:
    """E <Sx, Sy> = <x, y>, variance (|x|^2 |y|^2 + <x, y>^2) / K; with cosine 1, the squared norm."""
    x = torch.nn.functional.normalize(randn(0, 24), dim=0) * 2
    other = torch.nn.functional.normalize(randn(1, 24), dim=0)
    other = torch.nn.functional.normalize(other - (other @ x) * x / 4, dim=0)
    y = 3 * (cosine * x / 2 + math.sqrt(1 - cosine**2) * other)
    pair = DenseGrads(torch.stack([x, y]))
    images = [GaussianSketch(K, seed).apply("p", pair) for seed in range(SEEDS)]
    products = torch.stack([image[0] @ image[1] for image in images])
    exact, variance = 6 * cosine, (36 + (6 * cosine) ** 2) / K
    assert abs(float(products.mean()) - exact) < 4 * math.sqrt(variance / SEEDS)
    # a product of Gaussians has kurtosis of at most 15 over K terms: the variance's own standard error
    excess = 12 / K
    assert abs(float(products.var()) / variance - 1) < 4 * math.sqrt((2 + excess) / SEEDS)


def test_probes_are_standard_normal_products() -> None:
    x = randn(0, 1, 24)
    products = torch.cat([GaussianProbes(4, seed).apply("p", DenseGrads(x)) for seed in range(SEEDS)]).flatten()
    scaled = products / x.norm()
    assert abs(float(scaled.mean())) < 4 / math.sqrt(len(scaled))
    assert abs(float(scaled.var()) - 1) < 4 * math.sqrt(2 / len(scaled))


def test_a_scheme_says_what_makes_sketches_comparable() -> None:
    assert GaussianSketch(8, seed=3).scheme == {"name": "gaussian", "version": 1, "seed": 3, "dim": 8}
    assert isinstance(GaussianSketch(8), Sketch)
    assert isinstance(GaussianSketch(8), BoundSketch)
    assert isinstance(GaussianProbes(8), LinearMap)
    assert {GaussianSketch(8, 3), GaussianSketch(8, 3)} == {GaussianSketch(8, 3)}


def test_parse_sketch() -> None:
    assert parse_sketch("gaussian:32", seed=7) == GaussianSketch(32, seed=7)
    assert parse_sketch("default:512", seed=0) == CountSketch(512, seed=0)


@pytest.mark.parametrize(
    "text", ["", "gaussian", "gaussian:", "gaussian:x", "gaussian:-3", "gaussian:2.5", "other:3", ":3"]
)
def test_parse_sketch_refuses(text: str) -> None:
    with pytest.raises(
        GradscaleError, match=f"sketch must be NAME:K with NAME in count, gaussian, .*default, got '{text}'"
    ):
        parse_sketch(text, seed=0)


def test_dimensions_must_be_positive() -> None:
    with pytest.raises(GradscaleError, match="sketch dimension must be at least 1, got 0"):
        parse_sketch("gaussian:0", seed=0)
    with pytest.raises(GradscaleError, match="number of probes must be at least 1, got -1"):
        GaussianProbes(-1)


def close(found: Tensor, exact: Tensor) -> None:
    """To the rounding of float32 entries."""
    torch.testing.assert_close(found.double(), exact.double(), rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
