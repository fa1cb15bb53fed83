"""The report and `gradscale show` on spectrum runs: figures, sentences and tables that say what the numbers say."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from krylov_problems import Drawn, rotated
from rich.console import Console
from spectrum_runs import LAYERS, P, plan_of_spectrum, save_spectrum, spectrum_run
from test_measure_laws import assert_honest
from test_report import Reader, a_curve, demo, figure_titled, section_titled
from typer.testing import CliRunner

from gradscale.cli import app
from gradscale.curvature.operator import DenseOperator
from gradscale.curvature.quadrature import quadratures
from gradscale.errors import GradscaleError
from gradscale.report.bars import MOST_BARS, bars_svg, last_bars
from gradscale.report.html import write_report
from gradscale.report.levels import Levels, mean_square, shares
from gradscale.report.measured import read
from gradscale.report.numbers import estimate_text
from gradscale.report.quantities import KNOWN
from gradscale.report.sentences import limit_sentence
from gradscale.report.tables import estimate_tables
from gradscale.store.spectra import Spectrum, SpectrumRow, density_of

TRACE = next(quantity for quantity in KNOWN if quantity.key == "curvature/trace")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Spectrum]:
    folder = tmp_path_factory.mktemp("runs")
    stability = {"eta": 0.15, "batch_size": 32, "momentum": 0.0}
    return {
        "hessian": spectrum_run(folder / "real", max_steps=14, stability=stability),
        "ggn": spectrum_run(folder / "real-ggn", "ggn"),
        "one": spectrum_run(folder / "one", steps=(100,), which="both", top=5),
    }


@pytest.fixture(scope="module")
def pages(runs: dict[str, Spectrum], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pages")
    asked = {"hessian": ["hessian"], "two": ["hessian", "ggn"], "one": ["one"]}
    found = {name: write_report([runs[n] for n in names], folder / name) for name, names in asked.items()}
    found["mixed"] = write_report([runs["one"], demo()], folder / "mixed")
    texts = {name: path.read_text(encoding="utf-8") for name, path in found.items()}
    for text in texts.values():
        Reader(text)
    return texts


def printed(run: Spectrum, measure: str | None = None) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    for table in estimate_tables(run, measure):
        console.print(table)
    return console.export_text()


# figures


def test_the_section_of_spectra(pages: dict[str, str]) -> None:
    section = section_titled(pages["hessian"], "Spectra")
    assert "The Hessian of the mean loss in 200 parameter entries, over 512 examples." in section
    assert (
        "Products by double backward, chosen by the model&#x27;s operations; estimated relative error of one: "
        "2.1×10⁻⁷, the largest of 3 checkpoints."
    ) in section
    assert section.count("<svg") == 2
    assert all(f">step {step}</text>" in section for step in (0, 64, 256))
    assert ">not converged</text>" in section
    assert "<h1>Curvature of real</h1>" in pages["hessian"]
    assert "Not measured" not in pages["hessian"]


def test_sentences_of_the_density_are_those_of_the_quadrature(pages: dict[str, str], runs: dict[str, Spectrum]) -> None:
    figure = figure_titled(pages["hessian"], "Density of eigenvalues")
    quadrature = runs["hessian"].quadrature(256)
    mean = runs["hessian"].trace_of(lambda theta: theta, 256)
    assert f"the mean eigenvalue is {estimate_text(mean.value / P, mean.stderr / P)}, and about" in figure
    assert "The root mean square of all eigenvalues of real rises from 0.236 ± 0.018 at step 0 to 1.19 ± 0.21" in figure
    width = runs["hessian"].density(256).width
    assert f"of the eigenvalues lie within {width:.2f} of 0, one width of the drawing" in figure
    assert "from 8 probes; bands: one standard error over probes." in figure
    assert quadrature.value.min() < -width
    assert "farther below it." in figure


def test_sentences_of_eigenvalues(pages: dict[str, str]) -> None:
    figure = figure_titled(pages["hessian"], "Eigenvalues")
    assert "The largest eigenvalue of real (Hessian) rises from 2 ± " in figure
    assert "the last of the 6 largest asked for is 0.110 ± 0.021." in figure
    assert (
        "6 of the 18 eigenvalues of real have not converged, at 3 steps, the last of them 256: they are drawn" in figure
    )
    one = figure_titled(pages["one"], "Eigenvalues")
    assert "At step 100 the largest eigenvalue of one (Hessian) is 2 ± " in one
    assert "All 5 of one have converged." in one
    assert ">not converged</text>" not in one


def test_operators_stand_side_by_side(pages: dict[str, str]) -> None:
    section = section_titled(pages["two"], "Spectra")
    assert section.count("<svg") == 2
    assert "real: Hessian</text>" in section
    assert "real-ggn: Gauss-Newton matrix</text>" in section
    assert "<h2>Gauss-Newton matrix</h2>" in pages["two"]
    assert "has none" not in pages["two"]  # of the Hessian's trace nobody expects one of another operator


def test_a_spectrum_beside_a_run_of_gradients(pages: dict[str, str]) -> None:
    text = pages["mixed"]
    assert "<h1>Gradients and curvature of one and demo-real</h1>" in text
    assert "The coherence α of demo-real" in text
    assert "one has none" not in text
    assert "6, kept out of every sum" in text
    assert "no rows" in text


def test_the_trace_by_parameter(pages: dict[str, str], runs: dict[str, Spectrum]) -> None:
    title = "Trace of the Hessian of every parameter"
    section = section_titled(pages["hessian"], "Curvature")
    bars = figure_titled(section, f"{title}, last step")
    frame = runs["hessian"].estimates()
    last = frame[(frame["step"] == 256) & frame["scope"].str.startswith("layer:")]
    assert set(last["scope"]) == {f"layer:{name}" for name in LAYERS}
    assert all(f">{name}</text>" in bars for name in LAYERS)
    assert all(estimate_text(v, e) in bars for v, e in zip(last["value"], last["stderr"], strict=True))
    assert "<svg" in figure_titled(section, title)  # over steps
    assert f"<h3>{title}</h3>" not in section_titled(pages["one"], "Curvature")  # there is one step: the bars show it


def test_the_largest_eigenvalue_is_held_to_its_limit(pages: dict[str, str]) -> None:
    figure = figure_titled(pages["hessian"], "Sharpness against 2/η")
    assert "the threshold 2/η</text>" in figure
    assert (
        "The sharpness of real beside the threshold 2/η, at 3 checkpoints: below it at 2, above it at 1 (step 256); it "
        "is largest beside it at step 256, 18 ± "
    ) in figure
    assert "against 13.33." in figure


@pytest.mark.parametrize(
    ("values", "errors", "said"),
    [
        ([1.0], [0.1], "At step 0 the a of r (1.00 ± 0.10) lies below the limit, 2."),
        ([2.1], [0.1], "At step 0 the a of r (2.10 ± 0.10) lies within twice its error of the limit, 2."),
        (
            [1.0, 2.1, 3.0],
            [0.1] * 3,
            "The a of r beside the limit, at 3 checkpoints: below it at 1 (step 0), within twice its error of it at 1 "
            "(step 1), above it at 1 (step 4); it is largest beside it at step 4, 3.00 ± 0.10 against 2.",
        ),
        (
            [3.0, 3.5],
            [0.0] * 2,
            "at 2 checkpoints: above it at all 2; it is largest beside it at step 1, 3.5 ± 0 against",
        ),
    ],
)
def test_limits(values: list[float], errors: list[float], said: str) -> None:
    limit = a_curve([2.0] * len(values), [0.0] * len(values))
    assert said in limit_sentence("a", "r", a_curve(values, errors), "the limit", limit)
    assert "no checkpoint in common" in limit_sentence("a", "r", a_curve([], []), "the limit", limit)


def test_many_parameters_are_cut_to_the_largest(tmp_path: Path) -> None:
    layers = {f"blocks.{k}.weight": [5] for k in range(40)}
    run = spectrum_run(tmp_path / "deep", steps=(0,), top=0, density=None, layers=layers)
    (measured,) = read([run])
    _, bars = last_bars(measured, TRACE)
    drawing = bars_svg([measured], TRACE) or ""
    kept = {bar.name for bar in sorted(bars, key=lambda bar: -abs(bar.value))[:MOST_BARS]}
    assert {bar.name for bar in bars if f">{bar.name}</text>" in drawing} == kept
    text = write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"Of deep the {MOST_BARS} largest of 40 are drawn." in text
    assert "<h3>Density of eigenvalues</h3>" not in text
    assert "<h3>Eigenvalues</h3>" not in text


def test_one_probe_has_no_band(tmp_path: Path) -> None:
    run = spectrum_run(tmp_path, steps=(0,), top=0, trace=None, density={"probes": 1, "steps": 20})
    figure = figure_titled(
        write_report([run], tmp_path / "r.html").read_text(encoding="utf-8"), "Density of eigenvalues"
    )
    assert "from 1 probe; no bands: one probe has no known error." in figure


def test_same_runs_same_bytes(runs: dict[str, Spectrum], tmp_path: Path) -> None:
    both = [runs["one"], runs["ggn"]]
    assert write_report(both, tmp_path / "a").read_bytes() == write_report(both, tmp_path / "b").read_bytes()


def test_ids_do_not_clash(pages: dict[str, str]) -> None:
    ids = [value for _, name, value in Reader(pages["two"]).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert 'href="#spectra"' in pages["two"]


# tables


def test_show_prints_eigenvalues(runs: dict[str, Spectrum]) -> None:
    text = printed(runs["hessian"])
    assert "eigenvalues of the Hessian, 6 largest" in text
    frame = runs["hessian"].spectra()
    for _, row in frame[frame["kind"] == "eigenvalue"].iterrows():
        assert f"{estimate_text(row['value'], row['error'])}{'' if row['converged'] else '*'} " in text
    assert "*: not converged" in text
    assert "± is a bound, not a standard error" in text
    one = printed(runs["one"], "curvature")
    assert "residual  converged" in one
    assert "5 from both ends" in one
    assert "eigenvalues of the Hessian" not in printed(runs["hessian"], "stability")
    assert max(len(line) for line in text.splitlines()) <= 100


def test_the_commands_take_spectrum_runs(runs: dict[str, Spectrum], tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["show", runs["ggn"].path])
    assert shown.exit_code == 0
    assert "eigenvalues of the Gauss-Newton matrix, 6 largest" in shown.output
    target = tmp_path / "report.html"
    written = CliRunner().invoke(app, ["report", runs["ggn"].path, runs["one"].path, "--output", str(target)])
    assert written.exit_code == 0
    assert target.read_text().startswith("<!DOCTYPE html>")


def test_an_unknown_measure_is_refused(runs: dict[str, Spectrum]) -> None:
    with pytest.raises(GradscaleError, match=r"measure must be one of those in real .*curvature, stability.*, got 'x'"):
        estimate_tables(runs["hessian"], "x")


def test_many_steps_are_cut(tmp_path: Path) -> None:
    steps = range(0, 300, 10)
    rows = [
        SpectrumRow(step, "covariance", "eigenvalue", None, i, 5.0 - i + step, None, 0.1, 0.01, True)
        for step in steps
        for i in range(2)
    ]
    run = save_spectrum(tmp_path / "many", plan_of_spectrum("covariance", steps, top=2), rows, [])
    assert "8 of 30 steps shown; run.spectra() has all" in printed(run)
    figure = figure_titled(write_report([run], tmp_path / "r.html").read_text(encoding="utf-8"), "Eigenvalues")
    assert "eigenvalue [(loss units / parameter unit)^2]" in figure


@pytest.mark.parametrize(
    ("values", "errors", "said"),
    [
        (
            [1.0, 9.0, 4.0],
            [0.1] * 3,
            "to 4.00 ± 0.10 at step 256, with a maximum of 9.00 ± 0.10 at step 64 in between.",
        ),
        ([4.0, 1.0], [0.1] * 2, "falls from 4.00 ± 0.10 at step 0 to 1.00 ± 0.10 at step 64."),
        ([4.0, 4.15], [0.1] * 2, "is 4.00 ± 0.10 at step 0 and 4.15 ± 0.10 at step 64, equal within their bounds."),
    ],
)
def test_eigenvalues_are_told_apart_by_their_bounds(tmp_path: Path, values, errors, said: str) -> None:
    steps = (0, 64, 256)[: len(values)]
    rows = [
        SpectrumRow(step, "hessian", "eigenvalue", None, 0, value, None, error, error, True)
        for step, value, error in zip(steps, values, errors, strict=True)
    ]
    run = save_spectrum(tmp_path / "run", plan_of_spectrum(steps=steps, top=1, density=None), rows, [])
    text = write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    assert said in figure_titled(text, "Eigenvalues")


# numbers that the report works out


def test_the_error_of_the_mean_square_is_honest() -> None:
    values = np.linspace(-1, 2, 40)
    truth, probes, scores = math.sqrt(np.mean(values**2)), 24, []
    dense = DenseOperator(rotated(values.tolist()))
    for seed in range(240):
        found = quadratures(dense, Drawn(40, seed), range(probes), 2, together=probes)
        row = mean_square(Levels({}, None, {0: found})).iloc[0]  # type: ignore[arg-type]
        scores.append((row["value"] - truth) / row["stderr"])
    assert_honest(scores, probes - 1)


def test_shares_of_eigenvalues_where_there_are_gaps() -> None:
    """A step is resolved where no eigenvalue is near it."""
    values = [*[-1.0] * 6, *np.linspace(-0.01, 0.01, 30).tolist(), *[1.0] * 4]
    found = quadratures(DenseOperator(rotated(values)), Drawn(40, 5), range(200), 30, together=50)
    near, near_error, below, below_error = shares(found, 0.5)
    assert abs(near - 30 / 40) < 4 * near_error < 0.1
    assert abs(below - 6 / 40) < 4 * below_error < 0.1
    assert density_of(found).width == pytest.approx(0.02)
