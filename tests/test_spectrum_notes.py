"""Spectrum runs in words: legends, criteria, shortfalls; and options that lack others."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from spectrum_runs import UNIT, plan_of_spectrum, save_spectrum
from test_report import figure_titled, section_titled
from typer.testing import CliRunner

from gradscale.cli import app
from gradscale.report.html import write_report
from gradscale.report.legends import in_words, way_of
from gradscale.report.numbers import estimate_text
from gradscale.report.progress import _spectrum_line
from gradscale.report.shortfalls import shortfalls
from gradscale.report.spectrum_plots import _scale
from gradscale.report.tables import estimate_tables
from gradscale.run.spectrum_parts import SpectrumProgress
from gradscale.store.files import Files
from gradscale.store.parts import Parts
from gradscale.store.spectra import Spectrum, SpectrumRow

STEPS = (0, 64)
TRACE = {"max_probes": 96, "relative": 0.02, "stderr": None, "min_probes": 16, "probes": "rademacher",
         "method": "hutchinson"}  # fmt: skip
STABILITY = {"eta": 0.5, "batch_size": 8, "momentum": 0.0, "example_norms": 64}


def row(step: int, name: str, value: float, stderr: float | None, how: str = "lanczos/largest", **of: Any) -> tuple:
    measure, status = of.get("measure", "curvature"), of.get("status", "estimator")
    definition = of.get("definition", f"{measure}/{name}/hessian/{how}/v1")
    return (step, measure, name, "all", value, stderr, 200, status, definition, UNIT)


def saved(folder: Path, estimates: list[tuple], converged: bool = True, **settings: Any) -> Spectrum:
    rows = [SpectrumRow(s, "hessian", "eigenvalue", None, 0, 4.0, None, 1e-3, 1e-3, converged) for s in STEPS]
    given = {"top": 1, "density": None, "trace": None, "examples": 200, "shard_size": 20, "max_steps": 7} | settings
    return save_spectrum(folder, plan_of_spectrum(steps=STEPS) | given, rows, estimates)


def printed(run: Spectrum, width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    for table in estimate_tables(run, width=width):
        console.print(table)
    return console.export_text()


def with_stability(folder: Path) -> Spectrum:
    found = []
    for step, status in zip(STEPS, ("heuristic", "conditional"), strict=True):
        found += [
            row(step, "sharpness", 4.84, 1e-3, measure="stability", status="identity", definition="Ritz"),
            row(step, "sharpness_threshold", 4.0, None, measure="stability", status="identity", definition="2 / eta"),
            row(step, "bound_along", 0.5, 1e-16, measure="stability", status="identity", definition="eta"),
            row(step, "bound_along_threshold", 0.25, 0.03, measure="stability", status=status, definition="(15)"),
        ]
    run = saved(folder, found, stability=STABILITY)
    for step, verdict in zip(STEPS, ("undecided", "unstable"), strict=True):
        Parts(run.files).write(step, "eigenvalues", {"stability": {"verdict": verdict, "rows": []}})
    return run


# tables


def test_definitions_are_in_words(tmp_path: Path) -> None:
    text = printed(saved(tmp_path / "r", [row(s, "trace", 9.0, 0.5, "hutchinson/rademacher") for s in STEPS]), 150)
    assert "trace: trace of the Hessian, tr H = E vᵀHv, by hutchinson/rademacher (estimator; " in text
    assert "/v1" not in text


@pytest.mark.parametrize("definition", ["coherence/alpha/v1", "theirs", "curvature/trace/other/hutchinson/v1"])
def test_other_definitions_stay(definition: str) -> None:
    assert in_words("curvature", "trace", definition) == definition


def test_ways_of_products_are_in_words() -> None:
    assert way_of("gauss_newton/backend_error/ggn/forward_mode/v1") == "forward mode"
    assert way_of("theirs") == "theirs"


def test_the_error_of_products_comes_last_and_has_none_itself(tmp_path: Path) -> None:
    estimates = [row(s, n, v, e) for s in STEPS for n, v, e in (("backend_error", 2e-7, math.nan), ("trace", 9.0, 0.5))]
    text = printed(saved(tmp_path / "r", estimates))
    (heads,) = [line for line in text.splitlines() if line.strip().startswith("step  ") and "backend_error" in line]
    assert heads.split() == ["step", "trace", "backend_error", "n"]
    assert "2×10⁻⁷ ±" not in text
    assert "± ?" not in text


def test_undefined_values_say_why(tmp_path: Path) -> None:
    estimates = [row(s, "log_determinant", math.nan, math.nan, "slq/log det (A + 0.01 I)") for s in STEPS]
    run = saved(tmp_path / "r", estimates, density={"probes": 1, "shift": 0.01})
    assert "undefined: some eigenvalue lies at or below −s" in printed(run, 200)
    text = write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<h3>Log-determinant of the Hessian</h3>" not in text  # an empty drawing


def test_stability_is_a_table_of_values_against_thresholds(tmp_path: Path) -> None:
    text = " ".join(printed(with_stability(tmp_path / "r"), 100).split())
    assert "stability: SGD with η = 0.5 and batches of 8" in text
    assert "step sharpness / threshold bound_along / threshold verdict" in text
    assert "64 4.8400 ± 0.0010 / 4 0.5 / 0.250 ± 0.030 unstable" in text
    assert "bound_along_threshold: (15) (conditional at step 64; heuristic at step 0; " in text
    assert "unstable: a necessary criterion is not met" in text


def test_the_report_has_the_verdicts(tmp_path: Path) -> None:
    text = write_report([with_stability(tmp_path / "r")], tmp_path / "r.html").read_text(encoding="utf-8")
    section = section_titled(text, "Stability")
    assert "SGD with η = 0.5 and batches of 8, of r: unstable at step 64 (a necessary criterion is not met" in section
    assert "undecided at step 0 (" in section


def test_a_run_without_its_parts_has_no_verdicts(tmp_path: Path) -> None:
    run = saved(
        tmp_path / "r", [row(s, "sharpness", 4.8, 0.1, measure="stability") for s in STEPS], stability=STABILITY
    )
    assert "verdict" not in printed(run)


@pytest.mark.parametrize("width", [60, 80, 100])
def test_tables_fit_a_narrow_terminal(tmp_path: Path, width: int) -> None:
    names = ("trace", "trace_sample", "frobenius", "ellipsoid", "log_determinant", "outliers")
    run = saved(tmp_path / str(width), [row(s, name, 12.0 + s, 0.5) for s in STEPS for name in names])
    text = printed(run, width)
    assert "…" not in text  # of a cell that was cut
    assert text.count("76.00 ± 0.50") == len(names)


def test_small_errors_have_a_power_of_ten() -> None:
    assert estimate_text(-0.44551057, 3.6e-7) == "-0.44551057 ± 3.6×10⁻⁷"
    assert estimate_text(0.5, 3.6e-4) == "0.50000 ± 0.00036"


# sentences


def test_a_quantity_beside_another_is_named_once(tmp_path: Path) -> None:
    pairs = (("frobenius", 3.0), ("frobenius_sample", 5.0))
    run = saved(tmp_path / "r", [row(s, name, v, 0.1, "halves/gaussian") for s in STEPS for name, v in pairs])
    text = write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    figure = figure_titled(text, "Frobenius norm of the Hessian")
    assert "the Frobenius norm of the Hessian of the examples measured exceeds that of r" in figure


def test_both_ends_have_a_smallest(tmp_path: Path) -> None:
    rows = [
        SpectrumRow(0, "hessian", "eigenvalue", None, i, v, None, 0.1, 0.1, True) for i, v in enumerate((4.0, -1.0))
    ]
    plan = plan_of_spectrum(steps=(0,), top=2, density=None) | {"which": "both"}
    text = write_report([save_spectrum(tmp_path / "r", plan, rows, [])], tmp_path / "r.html").read_text("utf-8")
    assert "is 4.00 ± 0.10; the smallest is -1.00 ± 0.10." in figure_titled(text, "Eigenvalues")


def test_the_exact_trace_of_a_covariance_is_drawn(tmp_path: Path) -> None:
    estimates = [row(s, "trace_sample", 3.0 + s, None, measure="covariance", status="identity") for s in STEPS]
    plan = plan_of_spectrum("covariance", STEPS, top=0, density=None, trace=None)
    text = write_report([save_spectrum(tmp_path / "r", plan, [], estimates)], tmp_path / "r.html").read_text("utf-8")
    title = "Trace of the gradient covariance of the examples measured"
    assert "<svg" in figure_titled(text, title)
    assert "Exact: a sum of squared norms." in text


@pytest.mark.parametrize("values", [np.array([15.0, 15.4]), np.array([-15.0, -15.4])])
def test_the_axis_of_eigenvalues_holds_all_of_them(values: np.ndarray) -> None:
    axes = Figure().subplots()
    axes.plot([1, 2], values)
    _scale(axes, values)
    low, high = axes.get_ylim()
    assert (low, high) == ((0.0, pytest.approx(1.08 * 15.4)) if values[0] > 0 else (pytest.approx(-1.08 * 15.4), 0.0))


def test_a_part_that_is_one_piece_has_no_count() -> None:
    assert _spectrum_line(SpectrumProgress(3, "stability", 0, 1, 2.0, "")) == "step 3: stability, under way"
    counted = SpectrumProgress(3, "norms", 2, 4, 2.0, "")
    assert _spectrum_line(counted) == "step 3: norms, 2 of 4 products, at most 0:02 left"


# shortfalls


def test_a_run_that_has_what_was_asked_for_says_nothing(tmp_path: Path) -> None:
    good = [row(s, name, 50.0, 0.5, "hutchinson/rademacher") for s in STEPS for name in ("trace", "trace_sample")]
    assert shortfalls(saved(tmp_path / "r", good, trace=TRACE)) == []


def test_eigenvalues_that_did_not_converge_are_told(tmp_path: Path) -> None:
    (line,) = shortfalls(saved(tmp_path / "r", [row(0, "lambda_max", 4.0, 0.1)], converged=False))
    assert line.startswith("2 of 2 eigenvalues have not converged at 2 steps, the last of them 64;")
    assert "raise --max-steps (7 here)" in line


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [({"relative": 0.02}, "0.02 of it"), ({"relative": None, "stderr": 1.5}, "1.5 asked for")],
)
def test_an_error_that_is_larger_than_asked_for_is_told(tmp_path: Path, asked: dict, wanted: str) -> None:
    estimates = [row(64, "trace_sample", -50.0, 2.5), row(0, "trace_sample", 50.0, 0.5)]
    (line,) = shortfalls(saved(tmp_path / "r", estimates, trace=TRACE | asked))
    assert "error over probes is still 0.05 of it" in line
    assert wanted in line
    assert "after 96 probes at step 64; raise --trace-probes" in line


def test_one_shard_is_told(tmp_path: Path) -> None:
    estimates = [row(0, "trace", 50.0, math.nan), row(0, "trace_sample", 50.0, 0.5)]
    (line,) = shortfalls(saved(tmp_path / "r", estimates, trace=TRACE, shard_size=256))
    assert "`trace` has no error over examples" in line
    assert "--shard-size 20 gives 10 shards" in line


def test_undefined_values_are_told(tmp_path: Path) -> None:
    estimates = [row(0, name, math.nan, math.nan) for name in ("log_determinant", "effective_dimension")]
    (line,) = shortfalls(saved(tmp_path / "r", estimates, density={"probes": 8, "steps": 20, "shift": 0.01}, top=0))
    assert line.startswith(
        "log_determinant and effective_dimension: undefined at step 0, as some eigenvalue lies at or"
    )
    assert "below -0.01" in line


# options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--density-probes", "4"], "density_probes must come with --density, got none; add it"),
        (["--shift", "1", "--density-steps", "9"], "density_steps and shift must come with --density, got none"),
        (["--eta", "0.1"], "stability must have --eta and --batch-size, got no --batch-size; add it"),
        (["--momentum", "0.9"], "got no --eta and --batch-size; add it"),
        (["--trace-probes", "9"], "options of the trace must come with --trace, got none; add it"),
    ],
)
def test_options_that_lack_another_are_refused(options: list[str], said: str, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["spectrum", "--task", "digits", "--out", str(tmp_path / "r"), *options])
    assert said in str(found.exception)
    assert not (tmp_path / "r").exists()


def test_verdicts_are_read_from_the_parts(tmp_path: Path) -> None:
    run = with_stability(tmp_path / "r")
    part = json.loads(Files(run.path).read("parts/step-00000064/eigenvalues.json").to_pybytes())
    assert part["stability"]["verdict"] == "unstable"
