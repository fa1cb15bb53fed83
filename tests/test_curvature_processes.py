"""Promise: Krylov and trace algorithms on 1, 2 and 4 processes give the same; each holds its part of every vector.

Shapes: P entries, W processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from krylov_problems import rotated
from torch import Tensor

from gradscale.curvature.deflated import hutch_plus_plus, xnystrace, xtrace
from gradscale.curvature.density import moment, trace_of_function
from gradscale.curvature.lanczos import LanczosState, lanczos
from gradscale.curvature.operator import DenseOperator, Operator, dots, norms
from gradscale.curvature.probes import FlatProbes
from gradscale.curvature.processes import Sharded, SlicedDense, gathered, reduce_scattered, slice_of
from gradscale.curvature.quadrature import quadratures
from gradscale.curvature.trace import group_traces, trace, trace_samples
from gradscale.errors import GradscaleError

SPECTRUM = [30.0, 12.0, 5.0, 5.0, *np.linspace(0.01, 1, 97).tolist()]  # P = 101, which 2 and 4 do not divide
P, CAP, WORLDS = len(SPECTRUM), 20, (2, 4)
GROUPS = {"low": range(3, 60), "high": range(60, 101)}


def measured(operator: Operator) -> dict[str, Tensor]:
    """Everything, by name; vectors as their slices here."""
    double, single = (FlatProbes(operator.here, 5, dtype=dtype) for dtype in (torch.float64, torch.float32))
    states: list[LanczosState] = []

    def keep(state: LanczosState) -> None:
        states.append(state._replace(basis=state.basis.clone()))

    found = lanczos(operator, double(range(2)), 5, 300, 1e-9, CAP, on_step=keep)
    again = lanczos(operator, states[len(states) // 2], 5, 300, 1e-9, CAP)
    rough = lanczos(operator, single(range(1)), 3, basis_cap=CAP)
    samples = trace_samples(operator, double, range(20), GROUPS)
    nodes = quadratures(operator, double, range(4), 12, reorthogonalize=True)
    plain = quadratures(operator, double, range(4), 25)
    bytes_held = found.state.basis.untyped_storage().nbytes()
    return {
        "values": found.values,
        "vectors": found.vectors,
        "rough": rough.values,
        "steps": torch.tensor([found.steps, found.restarts, found.state.fresh, rough.steps]),
        "resumed": torch.tensor(torch.equal(found.vectors, again.vectors)),
        "orthogonality": torch.tensor(found.orthogonality),
        "traces": torch.tensor([trace(samples).value, *(part.value for part in group_traces(samples).values())]),
        "nodes": torch.from_numpy(nodes.value),
        "functions": torch.tensor([moment(plain, 3).value, trace_of_function(plain, np.exp).value]),
        "deflated": torch.tensor(
            [m(operator, double, 18).estimate.value for m in (hutch_plus_plus, xtrace, xnystrace)]
        ),
        "dots": dots(operator, double(range(2)), double(range(3))),
        "norms": norms(operator, single(range(2))),
        "bytes": torch.tensor(bytes_held),
    }


def in_group(world: int, group: dist.ProcessGroup) -> dict[str, Any]:
    """What this rank of `group` finds: of a matrix in slices of rows, and of parts that sum to it."""
    rank, matrix = dist.get_rank(group), rotated(SPECTRUM)
    here = slice_of(P, rank, world)
    rows = SlicedDense(matrix[here.start : here.stop].clone(), group)
    shares = torch.arange(1.0, world + 1).double()  # of the data
    summed = Sharded(DenseOperator(matrix * (shares[rank] / shares.sum())), group)
    assert rows.here == summed.here == here
    whole = torch.arange(3.0 * P).view(3, P)
    gathering = gathered(whole[:, here.start : here.stop].contiguous(), P, group)
    scattering = reduce_scattered(whole * (rank + 1), group)
    return {
        "rows": measured(rows),
        "summed": measured(summed),
        "gathered": torch.equal(gathering, whole),
        "scattered": torch.equal(scattering, whole[:, here.start : here.stop] * (world * (world + 1) // 2)),
    }


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=max(WORLDS))
    for world in WORLDS:
        group = dist.new_group(list(range(world)))
        if rank < world:
            torch.save(in_group(world, group), f"{folder}/{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return measured(DenseOperator(rotated(SPECTRUM)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes found, two of them first: started once, for that takes longer than all they do."""
    found: Path = tmp_path_factory.mktemp("gang")
    mp.spawn(on_rank, args=(str(found),), nprocs=max(WORLDS))
    return found


@pytest.fixture(params=WORLDS)
def gang(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{request.param}-{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("kind", ["rows", "summed"])
def test_the_gang_gives_what_one_process_gives(gang: list[dict[str, Any]], alone: dict[str, Tensor], kind: str) -> None:
    for found in gang:
        for name in ("values", "traces", "nodes", "functions", "deflated", "dots", "norms"):
            torch.testing.assert_close(
                found[kind][name], alone[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: n + m
            )
        torch.testing.assert_close(found[kind]["rough"], alone["rough"], rtol=2e-6, atol=0)
        assert found[kind]["orthogonality"] <= 1e-12
    np.testing.assert_allclose(alone["values"][:4], SPECTRUM[:4], rtol=1e-9)
    vectors = torch.cat([found[kind]["vectors"] for found in gang], dim=1)
    assert vectors.shape == alone["vectors"].shape
    overlap = (vectors @ alone["vectors"].mT).abs()
    simple = [0, 1, 4]  # the vectors of 5, twice, are any of their plane
    torch.testing.assert_close(overlap[simple][:, simple], torch.eye(3).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["rows", "summed"])
def test_all_ranks_decide_alike_to_the_bit(gang: list[dict[str, Any]], kind: str) -> None:
    for found in gang[1:]:
        for name in ("values", "rough", "steps", "traces", "nodes", "functions", "deflated", "dots", "norms"):
            assert torch.equal(found[kind][name], gang[0][kind][name]), name
    assert all(bool(found[kind]["resumed"]) for found in gang)


@pytest.mark.parametrize("kind", ["rows", "summed"])
def test_a_rank_holds_its_part_of_the_basis(gang: list[dict[str, Any]], alone: dict[str, Tensor], kind: str) -> None:
    assert int(alone["bytes"]) == CAP * P * 8
    width = -(-P // len(gang))
    assert [int(found[kind]["bytes"]) for found in gang] == [
        CAP * min(width, P - rank * width) * 8 for rank in range(len(gang))
    ]


def test_whole_vectors_are_gathered_and_their_sums_scattered(gang: list[dict[str, Any]]) -> None:
    assert all(found["gathered"] and found["scattered"] for found in gang)


def test_slices_make_the_whole() -> None:
    for size, world in ((101, 4), (8, 4), (5, 1), (4, 4)):
        cuts = [slice_of(size, rank, world) for rank in range(world)]
        assert [entry for cut in cuts for entry in cut] == list(range(size))


def test_more_processes_than_slices() -> None:
    with pytest.raises(
        GradscaleError, match=r"processes must each hold an entry, got 4 of them for 5 entries .* 2; use"
    ):
        slice_of(5, 3, 4)
