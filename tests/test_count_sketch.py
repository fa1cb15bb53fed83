"""The count sketch beyond the parameters of few entries: its definition, its readings, and its error where it is hard.

Shapes: B examples, T positions, R rows and C columns of a parameter, P = R C, K outputs, W sums.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gradscale.grads import sweep
from gradscale.grads.layer import (
    DenseGrads,
    EmbeddingGrads,
    GroupedGrads,
    LayerGrads,
    OuterGrads,
    SharedGrads,
    materialize,
)
from gradscale.grads.sweep import Request, empty_sums, read
from gradscale.sketches import blocks
from gradscale.sketches.count import CountSketch
from gradscale.sketches.philox import key_of
from gradscale.sketches.words import entry_signs, words

CPU = torch.device("cpu")
SEEDS = 300
SHAPES = [(300, 100), (100, 300), (30_000, 1), (3, 7000), (9000, 2)]


def is_prime(number: int) -> bool:
    return all(number % factor for factor in range(2, math.isqrt(number) + 1))


def parts_of(sketch: CountSketch, name: str, rows: int, columns: int) -> tuple[int, np.ndarray]:
    """W, and the place of each of its sums, times its sign: from the words, as the module's docstring has it."""

    def drawn(role: str, stop: int, *names: str | int) -> np.ndarray:
        return words(key_of("count", 2, sketch.seed, role, *names), 0, stop, CPU).numpy()

    lowest = max(2 * sketch.dim, 4096, rows + 1 if rows > 1 else 0, columns + 1 if rows > 1 else 0)
    candidates = [lowest + int(word) % lowest for word in drawn("modulus", 1000, name)]
    size = rows * columns
    modulus = size if size <= 4 * lowest else next(number for number in candidates if is_prime(number))
    parts = -(-modulus // sketch.dim)
    turn = int(drawn("turn", 1, name)[0])
    order = np.argsort(drawn("order", parts * sketch.dim, sketch.dim, parts).reshape(parts, -1), axis=1, kind="stable")
    place = np.argsort(order, axis=1).flatten()[:modulus]
    return modulus, (place + turn) % sketch.dim


def definition(sketch: CountSketch, name: str, shape: tuple[int, int]) -> np.ndarray:
    """[P, K]"""
    rows, columns = shape if shape[1] > 1 else (1, shape[0])

    def sign(role: str, size: int) -> np.ndarray:
        return entry_signs(key_of("count", 2, sketch.seed, role, name), 0, size, CPU).numpy()

    modulus, place = parts_of(sketch, name, rows, columns)
    entry = np.arange(rows * columns)
    signs = sign("sum", modulus)[entry % modulus]
    if modulus < rows * columns:
        signs = signs * np.outer(sign("row", rows), sign("column", columns)).flatten()
    matrix = np.zeros((rows * columns, sketch.dim), dtype=np.float32)
    matrix[entry, place[entry % modulus]] = signs
    return matrix


@pytest.mark.parametrize("shape", [*SHAPES, (12, 5), (8, 1)])
@pytest.mark.parametrize("dim", [7, 600])
def test_materialize_is_the_definition(shape: tuple[int, int], dim: int) -> None:
    sketch = CountSketch(dim, 5)
    np.testing.assert_array_equal(sketch.materialize("a", shape).numpy(), definition(sketch, "a", shape))


def test_pinned_places() -> None:
    """Of single entries, with their sign; they change only with the version: stored sketches depend on them."""
    few, many = (CountSketch(9, 7).materialize("a", shape) for shape in ((12, 5), (300, 100)))
    assert [place(few[entry]) for entry in range(0, 60, 9)] == FEW
    assert [place(many[entry]) for entry in (0, 1, 4999, 5000, 29999)] == MANY


FEW = [1, 1, 1, -7, -7, -1, 0]
MANY = [0, -5, -5, 2, 2]


def place(row: Tensor) -> int:
    """The number of the only entry that is not zero, times that entry."""
    return int(row.abs().argmax()) * int(row.sum())


def test_sums_that_are_shared_are_of_other_rows_and_columns() -> None:
    """What the products of row and column signs rest on, for every shape below the largest W."""
    for shape in ((300, 100), (100, 300), (3, 7000), (9000, 2), (1024, 4096), (50257, 64)):
        for seed in range(20):
            fold = CountSketch(16, seed).fold("a", shape, CPU)
            assert is_prime(fold.modulus) or fold.is_small
            assert fold.modulus > max(shape)


@pytest.mark.parametrize("tile", [1 << 20, 2500])
@pytest.mark.parametrize("dim", [7, 300])
@pytest.mark.parametrize("kind", ["dense", "outer", "grouped", "embedding", "short table", "tied", "float64"])
def test_readings_are_the_products_with_materialize(
    kind: str, dim: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((sweep, "_TILE_ENTRIES"), (blocks, "_TILE_ENTRIES"), (sweep, "_CPU_TILE")):
        monkeypatch.setattr(module, name, tile)
    grads, sketch = grads_of(kind), CountSketch(dim, 3)
    close(sketch.apply("a", grads), materialize(grads) @ sketch.materialize("a", grads.shape[1:]).to(grads.dtype))


def test_more_outputs_than_the_smallest_modulus() -> None:
    grads, sketch = grads_of("outer"), CountSketch(3000, 3)
    assert 6000 < sketch.fold("a", (300, 100), CPU).modulus < 12_000
    close(sketch.apply("a", grads), materialize(grads) @ sketch.materialize("a", (300, 100)))


@pytest.mark.parametrize("kind", ["dense", "outer", "embedding", "tied"])
def test_other_readings_beside_are_not_disturbed(kind: str) -> None:
    """Tiles are signed in place: norms and sums come before, and a second sketch has a copy."""
    grads, dense = grads_of(kind), materialize(grads_of(kind)).double()
    folds = [CountSketch(dim, dim).fold("a", grads.shape[1:], CPU) for dim in (7, 600)]
    sums = tuple(empty_sums(fold, grads) for fold in folds)
    norms, total = torch.zeros(len(dense), dtype=torch.float64), torch.zeros(dense.shape[1])
    read(grads, Request(norms, ((None, total),), (), tuple(zip(folds, sums, strict=True))))
    close(norms, dense.square().sum(dim=1))
    close(total, dense.sum(dim=0))
    for fold, found in zip(folds, sums, strict=True):
        image = torch.zeros(len(dense), fold.dim, dtype=torch.float64)
        fold.finish(found, image)
        close(image, CountSketch(fold.dim, fold.dim).apply("a", grads))


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hard_pairs(rows: int, columns: int) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Rows and columns a, b and a', b' of gradients a b^T and a' b'^T."""
    a, a2, b, b2 = randn(0, rows), randn(1, rows), randn(2, columns), randn(3, columns)
    ones, across = torch.ones(rows), torch.ones(columns)
    waves = torch.sin(0.1 * torch.arange(rows)), torch.sin(0.05 * torch.arange(columns))
    row, column = torch.eye(rows)[3], torch.eye(columns)[5]
    return {
        "constant": (ones, across, ones, across),
        "the same": (a, b, a, b),
        "same rows": (a, b, a, b2),
        "same columns": (a, b, a2, b),
        "orthogonal": (a, b, a2 - a * (a @ a2) / (a @ a), b2),
        "constant rows": (a, across, a, across),
        "constant columns": (ones, b, ones, b),
        "smooth": (*waves, *waves),
        "a row": (row, b, row, b2),
        "a column": (a, column, a2, column),
        "a constant column": (ones, column, ones, column),
        "heavy tails": (a**5, b**5, a**5, b**5),
        "alternating": (ones, across, ones, torch.tensor([1.0, -1.0]).repeat(columns // 2)),
    }


@pytest.fixture(scope="module")
def errors() -> dict[str, tuple[np.ndarray, float]]:
    """Of every pair, over seeds: the errors of <Sx, Sy>, and the mean square that a dense Gaussian's have."""
    pairs = hard_pairs(256, 128)
    left = torch.cat([torch.stack([a, a2]) for a, _, a2, _ in pairs.values()])
    right = torch.cat([torch.stack([b, b2]) for _, b, _, b2 in pairs.values()])
    grads = OuterGrads(left[:, None], right[:, None])
    dense = materialize(grads).double().view(len(pairs), 2, -1)
    exact = (dense[:, 0] * dense[:, 1]).sum(dim=1)
    stated = (dense.square().sum(dim=2).prod(dim=1) + exact.square()) / 64
    images = [CountSketch(64, seed).apply("a", grads).view(len(pairs), 2, -1) for seed in range(SEEDS)]
    found = torch.stack([(image[:, 0] * image[:, 1]).sum(dim=1) for image in images]) - exact  # [SEEDS, pairs]
    return {kind: (found[:, i].numpy(), float(stated[i])) for i, kind in enumerate(pairs)}


@pytest.mark.parametrize("kind", list(hard_pairs(8, 8)))
def test_gradients_of_rank_one_have_no_more_error_than_under_a_dense_sketch(
    kind: str, errors: dict[str, tuple[np.ndarray, float]]
) -> None:
    """Unbiased, and the mean square error within 4 of its standard errors of the Gaussian's, or below."""
    found, stated = errors[kind]
    squares = found**2 / stated
    assert abs(found.mean()) <= 4 * found.std() / math.sqrt(SEEDS) + 1e-5 * math.sqrt(stated)
    assert squares.mean() <= 1 + 4 * squares.std() / math.sqrt(SEEDS)


def grads_of(kind: str) -> LayerGrads:
    """B = 3, of 300 x 100 entries (a table that is short has as many positions as rows), or P = 30,000."""
    ids = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(0))
    table = EmbeddingGrads(ids, randn(1, 3, 20, 100), 300)
    outer = OuterGrads(randn(2, 3, 5, 300), randn(3, 3, 5, 100))
    short = torch.randint(300, (3, 200), generator=torch.Generator().manual_seed(1))
    made: dict[str, LayerGrads] = {
        "dense": DenseGrads(randn(0, 3, 30_000)),
        "outer": outer,
        "grouped": GroupedGrads(randn(4, 3, 4, 5, 75), randn(5, 3, 4, 5, 100)),
        "embedding": table,
        "short table": EmbeddingGrads(short, randn(6, 3, 200, 100), 300),
        "tied": SharedGrads((table, outer)),
        "float64": OuterGrads(outer.left.double(), outer.right.double()),
    }
    return made[kind]


def close(found: Tensor, exact: Tensor) -> None:
    scale = float(exact.abs().max())
    torch.testing.assert_close(found.double(), exact.double(), rtol=1e-5, atol=3e-6 * scale)
