"""Promise: a parameter is found again in the vectors of any number of ranks, laid out as DeepSpeed documents it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.zero_layout import Place, Section, consecutive, interleaved

FOLDER = Path("global_step1")
SHAPES = st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=6)
GROUPS = st.lists(SHAPES, min_size=1, max_size=3)


def made(groups: list[list[list[int]]]) -> list[dict[str, Tensor]]:
    """Parameters of these shapes, all entries different."""
    count, found = 0, list[dict[str, Tensor]]()
    for index, shapes in enumerate(groups):
        found.append({})
        for position, shape in enumerate(shapes):
            size = math.prod(shape)
            found[-1][f"{index}.{position}"] = torch.arange(count, count + size, dtype=torch.float64).reshape(shape)
            count += size
    return found


def shapes_of(groups: list[dict[str, Tensor]]) -> list[dict[str, torch.Size]]:
    return [{name: tensor.shape for name, tensor in group.items()} for group in groups]


def assert_found(places: dict[str, Place], groups: list[dict[str, Tensor]]) -> None:
    expected = {name: tensor for group in groups for name, tensor in group.items()}
    assert places.keys() == expected.keys()
    assert all(torch.equal(places[name].read(torch.float64), tensor) for name, tensor in expected.items())


@given(GROUPS, st.integers(1, 5))
def test_stage_3(shapes: list[list[list[int]]], world: int) -> None:
    groups = made(shapes)
    ranks: list[list[Tensor]] = [[] for _ in range(world)]
    for group in groups:  # every rank: its part of the first, its part of the second …
        shares: list[list[Tensor]] = [[] for _ in range(world)]
        for tensor in group.values():
            share = -(-tensor.numel() // world)
            padded = torch.cat([tensor.flatten(), torch.full((share * world - tensor.numel(),), torch.nan)])
            for rank in range(world):
                shares[rank].append(padded[rank * share : (rank + 1) * share])
        for rank in range(world):
            ranks[rank].append(torch.cat(shares[rank]))
    assert_found(interleaved(shapes_of(groups), ranks, FOLDER), groups)
    short = [[vector[:-1] if vector is rank[-1] else vector for vector in rank] for rank in ranks]
    with pytest.raises(GradscaleError, match=r"global_step1 must hold \d+ masters of rank 0, got \d+; its files"):
        interleaved(shapes_of(groups), short, FOLDER)


@given(GROUPS, st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_stages_1_and_2(shapes: list[list[list[int]]], world: int, alignment: int, trimmed: bool) -> None:
    groups, gaps = made(shapes), list[list[int]]()
    ranks: list[list[Tensor]] = [[] for _ in range(world)]
    for group in groups:  # the parameters one after another, then cut in equal parts
        vector, gaps_of = torch.empty(0, dtype=torch.float64), list[int]()
        for position, tensor in enumerate(group.values()):
            vector = torch.cat([vector, tensor.flatten()])
            gaps_of.append(-len(vector) % alignment if position < len(group) - 1 else 0)
            vector = torch.cat([vector, torch.full((gaps_of[-1],), torch.nan)])
        end = len(vector)
        vector = torch.cat([vector, torch.full((-end % (2 * world),), torch.nan)])
        gaps.append(gaps_of)
        for rank, part in enumerate(vector.chunk(world)):
            last = trimmed and rank == world - 1  # newer versions leave out the padding of the last rank
            ranks[rank].append(part[: max(0, end - rank * len(part))] if last else part)
    assert_found(consecutive(shapes_of(groups), gaps, ranks, FOLDER), groups)
    without = [[*rank[:-1], rank[-1][:0]] for rank in ranks]
    with pytest.raises(GradscaleError, match=r"must hold \d+ masters of parameter group \d, got 0; its files are of"):
        consecutive(shapes_of(groups), gaps, without, FOLDER)
    longer = [[*rank[:-1], torch.cat([rank[-1], torch.zeros(2)])] for rank in ranks]
    with pytest.raises(GradscaleError, match=r"must hold \d+ masters of parameter group \d, got \d+; its files"):
        consecutive(shapes_of(groups), gaps, longer, FOLDER)


def test_no_paddings_given() -> None:
    found = consecutive([{"a": (2,), "b": (1,)}], None, [[torch.tensor([1.0, 2.0])], [torch.tensor([3.0])]], FOLDER)
    assert found["b"].read(torch.float32).tolist() == [3.0]
    assert found["a"].read(torch.bfloat16).dtype == torch.bfloat16


def test_pieces_are_views() -> None:
    vector = [torch.arange(3.0), torch.empty(0), torch.arange(3.0, 8.0)]
    pieces = list(Section(vector, 2, 3).pieces())
    assert [piece.tolist() for piece in pieces] == [[2.0], [3.0, 4.0]]
    assert pieces[1].data_ptr() == vector[2].data_ptr()
