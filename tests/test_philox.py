"""The random numbers: published vectors, pinned bits, independence of slicing, and their distribution."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradscale.sketches.philox import key_of, normal_of, normals, philox

CPU = torch.device("cpu")
KEY = key_of("gaussian", 1, 0, "probe", "blocks.0.weight")
ONES = 0xFFFFFFFF

# From a Philox in plain Python integers and scipy.stats.norm.ppf, rounded to float32: float32 numbers in hexadecimal.
GOLDEN_KEY = ("dc0ff2fe", "b7759dbd")
GOLDEN_ZERO_KEY = [
    *("be82fa50", "3f96bb4f", "3f2153b7", "3e88fdeb", "3d2b4c1f"),
    *("3ff51846", "beb4ac05", "3f01cc4f", "bfe489aa", "3f4f4e56"),
]
GOLDEN_FAR = ["3e7402ca", "3f9948e4", "bedef0ba", "bebed231"]
GOLDEN_WORDS = ["c0cad08d", "c0c55364", "bfc45e10", "afa06c99", "2fa06c99", "3fc45e10", "40cad08d"]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),  # Random123's kat_vectors, philox4x32 10
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_published_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    words = philox(key, [torch.tensor([c]) for c in counter])
    assert tuple(int(word) for word in words) == expected


def test_counters_are_left_as_they_are() -> None:
    counters = [torch.arange(3) + i for i in range(4)]
    philox((1, 2), counters)
    assert all(torch.equal(counter, torch.arange(3) + i) for i, counter in enumerate(counters))


def test_pinned_bits() -> None:
    """These change only with the VERSION of the maps: stored sketches and widths depend on them."""
    assert bits(normals((0, 0), 0, 2, 5, CPU)) == GOLDEN_ZERO_KEY
    assert (
        bits(normals(key_of("gaussian", 1, 7, "sketch", "head.weight"), 1 << 33, (1 << 33) + 1, 4, CPU)) == GOLDEN_FAR
    )


def test_pinned_bits_of_the_tails() -> None:
    words = torch.tensor([0, 1, 0x10000000, 0x7FFFFFFF, 0x80000000, 0xF0000000, ONES])
    assert bits(normal_of(words)) == GOLDEN_WORDS


def test_pinned_key() -> None:
    assert tuple(f"{word:08x}" for word in KEY) == GOLDEN_KEY


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 9), st.integers(1, 9))
def test_any_slice_of_rows_and_any_first_columns_have_the_same_bits(
    first: int, rows: int, dim: int, fewer: int
) -> None:
    whole = normals(KEY, 0, 80, max(dim, fewer), CPU)
    assert torch.equal(normals(KEY, first, first + rows, dim, CPU), whole[first : first + rows, :dim])
    assert torch.equal(normals(KEY, 0, 80, fewer, CPU), whole[:, :fewer])


def test_the_bits_do_not_depend_on_how_many_rows_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = normals(KEY, 5, 1005, 7, CPU)
    monkeypatch.setattr("gradscale.sketches.philox._CACHE_WORDS", 64)
    assert torch.equal(normals(KEY, 5, 1005, 7, CPU), whole)


def test_rows_beyond_32_bits_are_new_numbers() -> None:
    rows = [normals(KEY, start, start + 1, 8, CPU) for start in (0, 1, 1 << 32, (1 << 32) + 1, 1 << 33)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(rows, 2))
    across = normals(KEY, (1 << 32) - 1, (1 << 32) + 1, 8, CPU)
    assert torch.equal(across[1:], rows[2])


def test_normal_of_is_the_inverse_distribution_function() -> None:
    generator = np.random.default_rng(0)
    words = np.unique(np.concatenate([generator.integers(0, 1 << 32, 20000), 2 ** np.arange(32), [0, ONES]]))
    words = np.concatenate([words, ONES - words])
    exact = scipy.stats.norm.ppf((words + 0.5) / 2**32)
    found = normal_of(torch.from_numpy(words)).double().numpy()
    np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-9)
    assert np.abs(exact).max() > 6.3


def test_100_000_numbers_are_standard_normal() -> None:
    numbers = normals(KEY, 0, 12500, 8, CPU).double().numpy()
    assert scipy.stats.kstest(numbers.ravel(), "norm").pvalue > 0.01
    correlation = np.corrcoef(numbers.T) - np.eye(8)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(len(numbers))
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 4.5 / np.sqrt(len(numbers))


def test_every_part_of_a_key_counts() -> None:
    parts = [
        ("gaussian", 1, 0, "probe", "a"),
        ("rademacher", 1, 0, "probe", "a"),
        ("gaussian", 2, 0, "probe", "a"),
        ("gaussian", 1, 1, "probe", "a"),
        ("gaussian", 1, 0, "sketch", "a"),
        ("gaussian", 1, 0, "probe", "b"),
        ("gaussian", 10, "probe", "a"),
        ("gaussian", 1, 0, "probea"),
    ]
    assert len({key_of(*part) for part in parts}) == len(parts)
    assert all(0 <= word <= ONES for part in parts for word in key_of(*part))


def bits(numbers: Tensor) -> list[str]:
    return [f"{int(word):08x}" for word in numbers.flatten().view(torch.int32).long() & ONES]
