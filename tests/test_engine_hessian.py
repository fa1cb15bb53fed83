"""Promise: Hessian products on a live DeepSpeed engine are those of one process, and training does not notice them.

Two ranks run every case (tests/engine_problems.py), with half a step's gradients waiting; the oracle is the dense
Hessian in float64 at the float32 master weights that they found.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_problems import CASES, SLOW, losses, made_batches, made_model
from rank_problems import environments
from torch import Tensor

import gradscale as gs
from gradscale.curvature.layout import Layout, gaussian
from gradscale.errors import GradscaleError
from gradscale.run.engine_order import NamedProbes, flat_order, in_parameters, rank_major_order

ROOT = Path(__file__).parent.parent


def dense_hessian(weights: dict[str, Tensor]) -> Tensor:
    """[P, P] float64 of the mean over all examples, a row at a time by double backward."""
    model = made_model().double()
    model.load_state_dict({name: each.double() for name, each in weights.items()}, strict=False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batch = torch.cat([each for rank in made_batches() for each in rank])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        value = losses(model, batch).mean()
        slopes = torch.autograd.grad(value, parameters, create_graph=True)
        slope = torch.cat([each.flatten() for each in slopes])
        rows = [torch.autograd.grad(each, parameters, retain_graph=True) for each in slope]
    return torch.stack([torch.cat([each.flatten() for each in row]) for row in rows])


def whole(ranks: list[dict[str, Any]], name: str) -> Tensor:
    """[k, P] in the order of the model's parameters, from the slices of all ranks."""
    layout = Layout.of({name: p for name, p in made_model().named_parameters() if p.requires_grad})
    found = torch.full((len(ranks[0][name]), layout.size), torch.nan, dtype=torch.float64)
    starts = dict(zip(layout.names, layout.offsets, strict=True))
    for rank in ranks:
        for parameter, entries, place in rank["parts"]:
            first = starts[parameter]
            found[:, first + entries.start : first + entries.stop] = rank[name][:, place].double()
    assert bool(found.isfinite().all())
    return found


def launched(folder: Path, cases: list[str]) -> dict[str, list[dict[str, Any]]]:
    """What the two ranks found of each case: one launch, for starting them takes longer than a case."""
    job, logs = [sys.executable, str(ROOT / "tests" / "engine_problems.py"), str(folder), *cases], []
    ranks = []
    for rank, own in enumerate(environments()):
        logs.append((folder / f"log-{rank}").open("w+"))
        ranks.append(subprocess.Popen(job, env=own, stdout=logs[-1], stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(timeout=280) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    ends = "\n".join((folder / f"log-{rank}").read_text()[-3000:] for rank in (0, 1))
    for log in logs:
        log.close()
    assert codes == [0, 0], f"both ranks must end with 0, got {codes}:\n{ends}"
    return {case: [torch.load(folder / f"{case}-{rank}.pt", weights_only=False) for rank in (0, 1)] for case in cases}


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return launched(tmp_path_factory.mktemp("usual"), list(CASES))


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return launched(tmp_path_factory.mktemp("more"), list(SLOW))


@pytest.fixture(params=[*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def case(request: pytest.FixtureRequest) -> tuple[str, list[dict[str, Any]]]:
    """The name of a case, and what the ranks found."""
    name = request.param
    found: dict[str, list[dict[str, Any]]] = request.getfixturevalue("usual" if name in CASES else "more")
    return name, found[name]


def settings_of(name: str) -> Any:
    return (CASES | SLOW)[name]


@cache
def reference(key: bytes, low: bool) -> Tensor:
    weights = torch.load(io.BytesIO(key))
    if low:  # the frozen ones have no master
        weights["places.weight"] = made_model().places.weight.detach().bfloat16()
    return dense_hessian(weights)


def hessian_of(name: str, ranks: list[dict[str, Any]]) -> Tensor:
    kept = io.BytesIO()
    torch.save(ranks[0]["masters"], kept)
    return reference(kept.getvalue(), settings_of(name).low)


def test_products_are_those_of_one_process_in_float64(case: tuple[str, list[dict[str, Any]]]) -> None:
    name, ranks = case
    exact = whole(ranks, "vectors") @ hessian_of(name, ranks)
    error = float((whole(ranks, "products") - exact).norm() / exact.norm())
    backend, fused = ranks[0]["backend"], settings_of(name).fused
    assert error < (0.5 if fused else 1e-3 if backend == "finite_differences" else 2e-6), error
    assert error < max(5e-6, 20 * ranks[0]["errors"][1])  # the error that is estimated is of that size
    assert [rank["n"] for rank in ranks] == [11, 11]


def test_the_largest_eigenvalue_is_that_of_one_process(case: tuple[str, list[dict[str, Any]]]) -> None:
    name, ranks = case
    largest = float(torch.linalg.eigvalsh(hessian_of(name, ranks))[-1])
    assert ranks[0]["lambda_max"] == ranks[1]["lambda_max"]
    assert ranks[0]["lambda_max"] == pytest.approx(largest, rel=0.05 if settings_of(name).fused else 5e-4)


def test_the_way_is_exact_unless_under_zero_3(case: tuple[str, list[dict[str, Any]]]) -> None:
    name, ranks = case
    settings = settings_of(name)
    differences = settings.stage == 3 or settings.fused or settings.backend == "finite_differences"
    for rank in ranks:
        assert rank["backend"] == ("finite_differences" if differences else "double_backward")
        assert rank["status"] == ("estimator" if differences else "identity")
        assert rank["refused"].keys() == (
            ({"double_backward"} if settings.stage < 3 else set()) | {"finite_differences at the masters"}
            if settings.fused
            else set()
        )


def test_training_goes_on_as_if_nothing_had_been(case: tuple[str, list[dict[str, Any]]]) -> None:
    """With half a step's gradients waiting, and under ZeRO-2 and 3 after a dozen failures as well."""
    for rank in case[1]:
        assert rank["same"]  # weights, masters, moments, gradients: to the bit
        assert rank["losses"] == rank["plain"]
        assert len(set(rank["losses"])) == 5  # it does learn


def test_random_vectors_are_of_the_weights_whatever_the_stage(case: tuple[str, list[dict[str, Any]]]) -> None:
    """So traces by parameter are the sums over ranks of v_l^T (H v)_l, the same probes everywhere."""
    name, ranks = case
    layout = Layout.of({name: p for name, p in made_model().named_parameters() if p.requires_grad})
    expected = gaussian(layout, range(layout.size), 1, [0, 1], torch.device("cpu"))
    torch.testing.assert_close(whole(ranks, "vectors"), expected.double(), rtol=0, atol=0)
    probes, hessian = whole(ranks, "probes"), hessian_of(name, ranks)
    quadratic = (probes * (probes @ hessian)).mean(dim=0)
    traces = {
        parameter: float(part.sum())
        for parameter, part in zip(layout.names, quadratic.split(layout.sizes), strict=True)
    }
    found = ranks[0]["traces"]
    assert found.keys() == traces.keys()
    scale, tolerance = float((probes @ hessian).norm()), 0.5 if settings_of(name).fused else 1e-3
    assert found == pytest.approx(traces, abs=tolerance * scale)


def test_each_rank_holds_its_slice(case: tuple[str, list[dict[str, Any]]]) -> None:
    ranks = case[1]
    assert [rank["here"] for rank in ranks] == [range(229), range(229, 457)]
    assert [tuple(rank["vectors"].shape) for rank in ranks] == [(2, 229), (2, 228)]


def test_trap_1_what_is_written_to_masters_is_not_seen_by_the_forward_pass(
    usual: dict[str, list[dict[str, Any]]],
) -> None:
    for name in ("zero1", "zero2", "zero3", "zero3-bf16"):
        said = [rank["traps"]["said"] for rank in usual[name]]
        assert all(rank["traps"]["unseen"] for rank in usual[name])
        assert any("weights must be their float32 masters, rounded, got" in each for each in said)
        assert all(each.startswith("GradscaleError") for each in said)


def test_traps_2_and_3_parameters_that_are_gathered_already_keep_old_weights(
    usual: dict[str, list[dict[str, Any]]],
) -> None:
    """By a forward pass before the operator is made; its products are right (see above)."""
    for rank in range(2):
        assert usual["zero3-bf16"][rank]["gathered"] == 17  # of 18, none of which is persistent
        assert usual["zero3"][rank]["gathered"] == 18  # all are
        assert usual["zero3"][rank]["traps"]["stale"]  # what is written to the partitions is not seen meanwhile


def test_trap_4_gradients_that_wait_for_a_step_are_neither_added_nor_lost(
    usual: dict[str, list[dict[str, Any]]],
) -> None:
    ranks = usual["zero3"]
    exact = whole(ranks, "vectors") @ hessian_of("zero3", ranks)
    torch.testing.assert_close(whole(ranks, "products"), exact, rtol=0, atol=1e-3 * float(exact.norm()))
    for rank in ranks:
        assert rank["waiting"] > 0.01
        assert rank["same"]
        assert rank["losses"] == rank["plain"]


REFUSALS = {
    "none": (r"batches must be one or more, got \[0, 0\]", "zero2 zero3"),
    "uneven": (r"batches must be as many on every rank, got \[2, 1\]", "zero3"),
    "generator": ("batches must be a sequence, .* got generator", "zero2 zero3"),
    "reduced": (r"losses must be one number for each example, of shape \(B,\), got \(\)", "zero2 zero3"),
    "detached": ("losses must depend on the engine's parameters", "zero2 zero3"),
    "on one rank": (r"label 9 is not|all ranks must succeed, got failures on ranks \[1\]", "zero2 zero3"),
    "on one rank, of torch": (r"label 9 is not|all ranks must succeed, got failures on ranks \[1\]", "zero2 zero3"),
    "data": (r"the disk is gone|all ranks must succeed, got failures on ranks \[0\]", "zero2 zero3"),
    "late": (r"weights have moved|all ranks must succeed, got failures on ranks \[1\]", "zero2 zero3"),
    "inside": ("no such word", "zero2 zero3"),
    "backend": ("backend must be one of auto, double_backward, finite_differences, got 'exact'", "zero2 zero3"),
    "quantity": ("quantity must be one of vector, lambda_max, trace, got 'shape'", "zero2 zero3"),
    "precision": ("precision must be one of auto, master, weights, got 'high'", "zero2 zero3"),
    "double": ("backend must be finite_differences under ZeRO-3", "zero3"),
    "shape": (r"vectors must be float32 or float64 of shape \(k, 22[89]\), got torch.float32", "zero2 zero3"),
    "impossible": ("backend double_backward must be possible for the model, got (Flash|all ranks)", "zero2"),
    "impossible master": ("precision master must be possible for the model, got (Flash|all ranks)", "zero2"),
    "other": ("products with random vectors must not all be zero", "zero2"),
    "engine": ("engine must be what deepspeed.initialize returns, got Transformer", "zero2 zero3"),
    "noise": ("the product must be the same twice, got", "zero2"),
    "crooked": ("the operator must be symmetric, got", "zero2"),
    "dropout": ("dropout extra must be off, .* engine.module.eval", "zero2"),
}


@pytest.mark.parametrize("mistake", REFUSALS)
def test_mistakes_are_refused_on_all_ranks(usual: dict[str, list[dict[str, Any]]], mistake: str) -> None:
    message, cases = REFUSALS[mistake]
    for name in cases.split():
        for rank in usual[name]:
            assert re.search(message, rank["refusals"][mistake]), f"{name}: {rank['refusals'][mistake]}"


def test_ranks_may_have_different_numbers_of_batches_where_each_has_all_weights(
    usual: dict[str, list[dict[str, Any]]],
) -> None:
    assert [rank["refusals"]["uneven"] for rank in usual["zero2"]] == ["", ""]


def test_low_precision_has_no_double_backward() -> None:
    with pytest.raises(GradscaleError, match="precision must be master for double_backward, got 'weights'"):
        gs.engine_hessian(None, losses, [], backend="double_backward", precision="weights")


def test_probes_of_an_unknown_kind() -> None:
    with pytest.raises(GradscaleError, match="kind of probes must be one of gaussian, rademacher, got cauchy"):
        NamedProbes((), kind="cauchy")


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_orders_hold_every_entry_once(world: int) -> None:
    layout = Layout(("a", "b", "c"), ((3, 4), (7,), (1,)))
    for order in (flat_order(layout, world), rank_major_order(layout, world)):
        assert [i for rank in range(world) for i in order.here(rank)] == list(range(20))
        slices = [torch.arange(20.0)[list(order.here(rank))] for rank in range(world)]
        found = in_parameters(order, layout, slices)
        assert sorted(torch.cat([each.flatten() for each in found.values()]).tolist()) == list(range(20))
        assert sum(len(each) for each in order.groups().values()) == 20
