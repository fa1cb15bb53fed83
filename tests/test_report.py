"""The report says what the numbers say: sentences, tables and one self-contained page.

The runs here have the shape of `gradscale.store.results.Run`, rows queried by a real DuckDB.
"""

from __future__ import annotations

import io
import math
import re
import sys
from html.parser import HTMLParser

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pytest
from rich.console import Console

from gradscale.errors import GradscaleError
from gradscale.measures import MEASURES
from gradscale.report.html import write_report
from gradscale.report.measured import COLUMNS, class_matrix, curve, read
from gradscale.report.numbers import estimate_text
from gradscale.report.plans import setting_text
from gradscale.report.quantities import KNOWN
from gradscale.report.sentences import layers_sentence, sentence
from gradscale.report.tables import estimate_tables, shortened

STEPS = (0, 1, 4, 16, 64, 256)
LAYERS = ("embed.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.up.weight", "blocks.0.mlp.up.bias", "head.weight")


class FakeRun:
    """A run held in memory."""

    def __init__(self, name: str, estimates: list[tuple], rows: pd.DataFrame, plan: dict | None = None) -> None:
        self.path, self.name = f"/runs/{name}", name
        self.plan = plan or {"task": "digits", "examples": 400, "seed": 0, "microbatch": 50}
        self._estimates = pd.DataFrame(estimates, columns=COLUMNS).astype({"stderr": object})
        self._rows = rows

    def estimates(self) -> pd.DataFrame:
        return self._estimates

    def rows(self) -> pyarrow.dataset.Dataset:
        return pyarrow.dataset.dataset(pa.Table.from_pandas(self._rows))

    def sql(self, query: str) -> pd.DataFrame:
        with duckdb.connect() as connection:
            connection.register("rows", self._rows)
            connection.register("estimates", self._estimates)
            return connection.execute(query).df()


def some_rows(steps=STEPS, n: int = 400, seed: int = 0, decay: float = 0.4) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frames = []
    for k, step in enumerate(steps):
        loss = 2.3 * math.exp(-decay * k) * rng.gamma(4.0, 0.25, n)
        norms = 9.0 * math.exp(-decay * k / 2) * rng.lognormal(0.0, 0.5, n) ** 2
        ids = {"example_id": np.arange(n), "step": step, "shard": np.arange(n) // 100}
        frames.append(pd.DataFrame(ids | {"loss": loss, "grad_sq_norm": norms, "finite": np.arange(n) != 7}))
    return pd.concat(frames, ignore_index=True)


def some_estimates(alphas, steps=STEPS, n: int = 399, layers=LAYERS) -> list[tuple]:
    rows: list[tuple] = []
    rng = np.random.default_rng(7)

    def add(step, measure, name, scope, value, stderr, unit="1"):
        definition = f"{measure}/{name}/v1"
        rows.append((step, measure, name, scope, value, stderr, n, "estimator", definition, unit))

    for k, (step, alpha) in enumerate(zip(steps, alphas, strict=True)):
        add(step, "coherence", "alpha", "all", alpha, 0.04 * alpha)
        add(step, "coherence", "alpha_unbiased", "all", (n * alpha - 1) / (n - 1), 0.04 * alpha)
        add(step, "coherence", "m_coherence", "all", n * alpha, 0.04 * n * alpha)
        for layer in layers:
            add(step, "coherence", "alpha", f"layer:{layer}", min(1.0, alpha * rng.uniform(0.4, 2.5)), 0.05 * alpha)
        trace = 30.0 * math.exp(-0.9 * k)
        noise = trace / alpha if k != 3 else math.nan
        add(step, "dispersion", "trace_covariance", "all", trace, 0.03 * trace, "(loss units / parameter unit)^2")
        add(step, "dispersion", "noise_scale", "all", noise, 0.2 * noise, "examples")
        unit = "loss units / parameter unit"
        for name, factor in (("width", 2.9), ("symmetrized", 3.2)):
            width = factor * math.sqrt(trace)
            add(step, "gaussian_width", name, "all", width, 0.03 * width, unit)
            add(step, "gaussian_width", name, "union", factor * math.sqrt(30.0) + 0.1 * k, 0.4, unit)
        add(step, "gaussian_width", "path_width", "union", 2.0 * math.sqrt(k), 0.1 * math.sqrt(k), unit)
    return rows


def sketched(errors, dim: int = 512, steps=STEPS) -> list[tuple]:
    """What a run with sketches adds; no error is known of what is expected."""
    about = ("estimator", "sketch_error/v1, n pairs", "1")
    return [
        (step, "sketch_error", name, "all", value, stderr, 120, *about)
        for step, error in zip(steps, errors, strict=True)
        for name, value, stderr in (
            ("cosine_rms_error", error, 0.1 * error),
            ("cosine_expected_error", math.sqrt(1.1 / dim) if dim else 0.0, None),
        )
    ]


def featured(steps=STEPS) -> list[tuple]:
    return [
        (step, "featurizer", "width", "all", 5.0 + k, 0.2, 399, "estimator", "featurizer/v1", "feature units")
        for k, step in enumerate(steps)
    ]


def figure_titled(page_text: str, title: str) -> str:
    """The figure of a page, as written."""
    return next(part for part in page_text.split("<figure") if f"<h3>{title}</h3>" in part).partition("</figure>")[0]


def demo(name: str = "demo-real", alphas=(0.31, 0.42, 0.35, 0.24, 0.16, 0.09), **more) -> FakeRun:
    return FakeRun(name, some_estimates(alphas), some_rows(**more))


def other() -> FakeRun:
    return demo("demo-random", (0.30, 0.22, 0.12, 0.041, 0.022, 0.011), seed=1, decay=0.05)


def a_curve(values, errors, steps=STEPS) -> pd.DataFrame:
    return pd.DataFrame({"step": list(steps)[: len(values)], "value": values, "stderr": errors, "n": 100})


class Reader(HTMLParser):
    """The text of a page, its attributes, and whether every element is closed."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = self.svg_text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        self.svg_text += data if "svg" in self.open else ""


@pytest.fixture(scope="module")
def page_of_two(tmp_path_factory) -> Reader:
    return written(tmp_path_factory.mktemp("two"), demo(), other())


def small() -> FakeRun:
    return FakeRun("small", [], some_rows((0,), n=20))


def written(tmp_path, *runs) -> Reader:
    return Reader(write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (0.21345, 0.0172, "0.213 ± 0.017"),
        (0.21345, 0.0996, "0.21 ± 0.10"),
        (0.5, 0.2, "0.50 ± 0.20"),
        (12345.6, 1234.0, "12300 ± 1200"),
        (-0.0001, 0.021, "0.000 ± 0.021"),
        (3.21e-7, 4.5e-9, "(3.210 ± 0.045)×10⁻⁷"),
        (2.5e8, 3.1e9, "(0.2 ± 3.1)×10⁹"),
        (0.0, 1e-6, "(0.0 ± 1.0)×10⁻⁶"),
        (0.25, 0.0, "0.25 ± 0"),
        (0.25, math.nan, "0.25 ± ?"),
        (math.nan, 0.1, "undefined"),
        (-math.inf, 0.1, "-infinite"),
    ],
)
def test_estimate_text(value, stderr, text):
    assert estimate_text(value, stderr) == text


def test_rows_give_loss_and_norms():
    rows = some_rows(steps=(0, 4))
    estimates = read([FakeRun("a", [], rows)])[0].estimates
    finite = rows[rows["finite"] & (rows["step"] == 4)]
    norms = np.sqrt(finite["grad_sq_norm"])
    loss = curve(estimates, "loss", "mean").iloc[1]
    assert (loss["step"], loss["n"]) == (4, 399)
    assert loss["value"] == pytest.approx(finite["loss"].mean())
    assert loss["stderr"] == pytest.approx(finite["loss"].std() / math.sqrt(399))
    for name, p in (("q05", 0.05), ("q50", 0.5), ("q95", 0.95)):
        assert curve(estimates, "grad_norm", name)["value"].iloc[1] == pytest.approx(np.quantile(norms, p))


def test_error_of_a_median_is_that_of_repeated_samples():
    samples = FakeRun("a", [], some_rows(steps=range(200), decay=0.0))
    median = curve(read([samples])[0].estimates, "grad_norm", "q50")
    assert median["stderr"].mean() == pytest.approx(median["value"].std(), rel=0.2)


def test_one_row_has_no_known_error():
    estimates = read([FakeRun("a", [], some_rows(steps=(0,), n=1))])[0].estimates
    assert len(estimates) == 5
    assert estimates["stderr"].isna().all()


def test_sentence_of_two_runs():
    curves = {"a": a_curve([0.5, 0.6, 0.7], [0.01] * 3), "b": a_curve([0.5, 0.4, 0.4], [0.01] * 3)}
    expected = (
        "Over steps 0 to 4 the coherence of a exceeds that of b at 2 of 3 common checkpoints by more than two combined "
        "standard errors; the largest difference is 0.300 ± 0.014 at step 4."
    )
    assert sentence("coherence", curves) == expected
    assert sentence("coherence", dict(reversed(curves.items()))) == expected


def test_sentence_of_a_tie():
    curves = {"a": a_curve([0.5, 0.6], [0.1, 0.1]), "b": a_curve([0.5, 0.4], [0.1, 0.1])}
    said = sentence("coherence", curves)
    assert "agrees within two combined standard errors at all 2 common checkpoints" in said
    assert "exceeds" not in said


def test_sentence_of_crossing_runs():
    curves = {"a": a_curve([0.9, 0.1, 0.3], [0.01] * 3), "b": a_curve([0.1, 0.5, 0.3], [0.01] * 3)}
    said = sentence("loss", curves)
    assert "of a exceeds that of b by more than two combined standard errors at 1 of 3" in said
    assert "(most by 0.800 ± 0.014 at step 0) and falls short of it at 1 (most by 0.400 ± 0.014 at step 1)" in said


def test_sentence_of_two_runs_at_one_step():
    low, high = a_curve([1.0], [0.1]), a_curve([2.0], [0.1])
    said = sentence("loss", {"a": low, "b": high})
    assert said == (
        "At step 0 the loss of b (2.00 ± 0.10) exceeds that of a (1.00 ± 0.10) by 1.00 ± 0.14, more than two combined "
        "standard errors."
    )
    assert "agree within" in sentence("loss", {"a": low, "b": a_curve([1.1], [0.1])})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([3.0, 2.0, 1.0], "falls from 3.00 ± 0.10 at step 0 to 1.00 ± 0.10 at step 4."),
        ([1.0, 2.0, 3.0], "rises from 1.00 ± 0.10 at step 0 to 3.00 ± 0.10 at step 4."),
        (
            [1.0, 1.0, 1.1],
            "is 1.00 ± 0.10 at step 0 and 1.10 ± 0.10 at step 4, equal within two combined standard errors.",
        ),
        ([1.0, 5.0, 2.0], "to 2.00 ± 0.10 at step 4, with a maximum of 5.00 ± 0.10 at step 1 in between."),
        (
            [2.0, 1.0, 2.0],
            "equal within two combined standard errors, with a minimum of 1.00 ± 0.10 at step 1 in between.",
        ),
        ([2.0], "At step 0 the loss of a is 2.00 ± 0.10."),
    ],
)
def test_sentence_of_one_run(values, said):
    assert sentence("loss", {"a": a_curve(values, [0.1] * len(values))}).endswith(said)


def test_sentence_calls_no_difference_without_errors():
    curves = {"a": a_curve([3.0, 1.0], [math.nan] * 2), "b": a_curve([1.0, 2.0], [0.1] * 2)}
    assert "without a known standard error" in sentence("loss", {"a": curves["a"]})
    assert sentence("loss", curves).endswith(
        "is 1 ± ? for a and 2.00 ± 0.10 for b; without known errors no more is said."
    )


def test_exact_values_need_no_margin():
    curves = {"a": a_curve([0.5, 0.5], [0.0] * 2), "b": a_curve([0.5, 0.25], [0.0] * 2)}
    assert "at 1 of 2 common checkpoints" in sentence("alpha", curves)


def test_sentence_of_many_runs():
    curves = {name: a_curve([0.5, value], [0.01] * 2) for name, value in zip("abc", (0.3, 0.9, 0.6), strict=True)}
    assert sentence("alpha", curves) == (
        "At step 1, the last that all have, the alpha ranges from 0.300 ± 0.010 (a) to 0.900 ± 0.010 (b), apart by "
        "more than two combined standard errors."
    )
    assert "equal within" in sentence("alpha", {name: a_curve([0.5], [0.1]) for name in "abc"})


def test_sentence_names_what_is_missing():
    full, gap, none = a_curve([3.0, 1.0], [0.1] * 2), a_curve([3.0, math.nan], [0.1] * 2), a_curve([], [])
    said = sentence("loss", {"a": full, "b": gap, "c": none})
    assert said.endswith("; b has no finite value at 1 of its 2 checkpoints; c has none.")
    assert sentence("loss", {"c": none}) == "No run has a value of the loss."
    apart = {"a": a_curve([1.0], [0.1], steps=(0,)), "b": a_curve([1.0], [0.1], steps=(8,))}
    assert sentence("loss", apart) == "The loss of a and b has no checkpoint in common, so it is not compared."


def test_sentence_of_layers():
    layers = {"w": a_curve([0.5, 0.2], [0.1] * 2), "b": a_curve([0.5, 0.4], [0.1] * 2)}
    said = layers_sentence("alpha", {"run": layers})
    assert (
        said
        == "The alpha by parameter: at step 1 of run it is highest in b (0.40 ± 0.10) and lowest in w (0.20 ± 0.10)."
    )
    assert layers_sentence("alpha", {"run": {}}) == "No run has the alpha by parameter."


def printed(tables) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.export_text()


def test_tables_hold_every_number_of_the_whole():
    run = demo()
    text = printed(estimate_tables(run, None))
    whole = run.estimates()[run.estimates()["scope"].isin(["all", "union"])]
    for value, stderr in zip(whole["value"], whole["stderr"], strict=True):
        assert estimate_text(value, stderr) in text
    assert "layer:" not in text
    assert "…" not in text
    assert "(estimator; examples)" in text


def test_table_of_one_measure_has_its_layers():
    text = printed(estimate_tables(demo(), "coherence"))
    assert all(layer in text for layer in LAYERS)
    assert "…" not in text
    assert "dispersion" not in text


def test_long_names_and_many_steps_stay_readable():
    steps = tuple(range(0, 3000, 100))
    layer = "transformer.hidden_layers." + "31.mixture_of_experts.expert." * 3 + "down_projection.weight"
    run = FakeRun("a", some_estimates([0.3] * 30, steps, layers=(layer,)), some_rows(steps))
    text = printed(estimate_tables(run, "coherence"))
    assert "8 of 30 steps shown" in text
    assert "step 2900" in text
    assert max(len(line) for line in text.splitlines()) <= 100
    assert len(re.findall(r"0\.300 ± 0\.012", text)) == 30


def test_unknown_measure_is_refused():
    with pytest.raises(GradscaleError, match=r"measure must be one of .*coherence, .*, got 'stiffness'"):
        estimate_tables(demo(), "stiffness")


def test_page_holds_every_number_of_the_whole(page_of_two):
    page = page_of_two
    for measured in read([demo(), other()]):
        whole = measured.estimates[measured.estimates["scope"].isin(["all", "union"])]
        for value, stderr in zip(whole["value"], whole["stderr"], strict=True):
            assert estimate_text(value, stderr) in page.text
    assert "of demo-real exceeds that of demo-random" in page.text


def test_page_loads_nothing(page_of_two):
    page = page_of_two
    assert not any(tag in ("script", "link", "iframe", "object") for tag, _, _ in page.attributes)
    loading = [(tag, v) for tag, name, v in page.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert all(value.startswith(("#", "data:")) for tag, value in loading if tag != "a")
    assert "@import" not in page.text
    assert not re.findall(r"url\((?!#)", page.text)


def test_ids_do_not_clash(page_of_two):
    page = page_of_two
    ids = [value for _, name, value in page.attributes if name == "id"]
    used = [value[1:] for tag, name, value in page.attributes if name in ("href", "xlink:href") and value[:1] == "#"]
    used += [v[5:-1] for _, name, v in page.attributes if name == "clip-path"]
    assert len(ids) == len(set(ids))
    assert set(used) <= set(ids)


def test_same_runs_same_bytes(tmp_path):
    first = write_report([demo(), other()], tmp_path / "a.html").read_bytes()
    assert write_report([demo(), other()], tmp_path / "b.html").read_bytes() == first


def test_page_escapes_what_users_wrote(tmp_path):
    evil = '<script>alert("1")</script>&'
    run = FakeRun(evil, some_estimates([0.3, 0.2], (0, 1)), some_rows((0, 1)), {"task": evil, evil: [evil]})
    layered = some_estimates([0.3], (0,), layers=(evil,))
    odd = [(0, evil, evil, "all", 1.0, 0.1, 5, evil, evil, evil)]
    page = written(tmp_path, run, FakeRun("b", layered + odd, some_rows((0,))))
    assert not any(tag == "script" for tag, _, _ in page.attributes)
    assert evil in page.text


def test_page_of_one_run_at_one_step(tmp_path):
    page = written(tmp_path, FakeRun("a", some_estimates([0.3], (0,)), some_rows((0,))))
    assert "At step 0 the coherence α of a is 0.300 ± 0.012." in page.text


def test_page_names_missing_measures(tmp_path):
    partial = [row for row in some_estimates([0.3], (0,)) if row[1] == "coherence"]
    page = written(tmp_path, FakeRun("a", partial, some_rows((0,))), FakeRun("b", [], some_rows((0,))))
    assert "Not measured: trace of the gradient covariance, gradient noise scale, Gaussian width" in page.text
    assert "the coherence α of a is 0.300 ± 0.012; b has none." in page.text


def test_page_without_any_estimate(tmp_path):
    page = written(tmp_path, FakeRun("a", [], pd.DataFrame()))
    assert "No estimates yet." in page.text


def test_odd_names_are_drawn(tmp_path):
    names = ["_hidden", "a$b_1$", "ümläut", "x" * 200]
    rows = [row for row in some_estimates([0.3, 0.2], (0, 1), layers=()) if row[1] == "coherence"]
    page = written(tmp_path, *(FakeRun(name, rows, some_rows((0, 1), n=50)) for name in names))
    for name in names:
        assert name in page.text
        assert page.svg_text.count(shortened(name, 34)) == 4  # once in the legend of every plot


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("checkpoints", {"0": {"path": None}}, "step 0: initial weights"),
        ("checkpoints", {"0": {"path": "c/0.pt"}, "8": {"path": "c/8.pt"}}, "steps 0, 8 in c"),
        ("checkpoints", {"0": {"path": None}, "8": {"path": "c/8.pt"}}, "step 0: initial weights, step 8: c/8.pt"),
        ("parameters", {"w": {"shape": [100, 200]}, "b": {"shape": [200]}}, "20,200 in 2 tensors: w, b"),
        (
            "measures",
            {"coherence": {"class": "gradscale.x:Y", "by_class": True}, "d": {}},
            "coherence (by_class True), d",
        ),
        ("measures", {"mine": {"class": "other:Mine"}}, "mine (class other:Mine)"),
        ("data_fingerprint", "0123456789abcdef", "0123456789ab…"),
        ("steps", list(range(20)), "20: 0, 1, 2, 3, …, 19"),
    ],
)
def test_settings_are_short(key, value, text):
    assert setting_text(key, value) == text


def test_a_measure_that_the_report_does_not_know_is_drawn(tmp_path):
    rows = [(step, "tilt", "cos", "all", 0.1 * step, 0.01, 9, "estimator", "tilt/cos/v1", "1") for step in (0, 1)]
    page = written(tmp_path, FakeRun("a", rows, some_rows((0, 1))))
    assert "The tilt / cos of a rises from 0.000 ± 0.010 at step 0" in page.text


# what stands beside a quantity, and what is over all checkpoints so far

RMS, PATH = "Error of the sketches&#x27; cosines", "Gaussian width of the path"


def page_with(tmp_path, more: list[tuple], steps=STEPS, name: str = "a", **others: list[tuple]) -> str:
    runs = [
        FakeRun(label, some_estimates([0.3] * len(steps), steps, layers=()) + rows, some_rows(steps, n=50))
        for label, rows in {name: more, **others}.items()
    ]
    text = write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    Reader(text)
    return text


def test_the_error_of_sketches_stands_beside_what_is_expected(tmp_path):
    text = page_with(tmp_path, sketched([0.045, 0.046, 0.047, 0.046, 0.045, 0.2]), b=sketched([0.046] * 6))
    figure = figure_titled(text, RMS)
    assert "a dense Gaussian sketch</text>" in figure
    assert (
        "Over steps 0 to 256 the error of the sketches&#x27; cosines of a exceeds that of a dense Gaussian sketch at 1 "
        "of 6 common checkpoints by more than two combined standard errors; the largest difference is 0.154 ± 0.020 at "
        "step 256."
    ) in figure
    assert "of b and a dense Gaussian sketch agrees within two combined standard errors at all 6" in figure
    assert "Expected error" not in figure


def test_the_error_of_sketches_at_one_step(tmp_path):
    figure = figure_titled(page_with(tmp_path, sketched([0.2], steps=(4,)), steps=(4,)), RMS)
    assert "a dense Gaussian sketch</text>" in figure
    assert "of a (0.200 ± 0.020) exceeds that of a dense Gaussian sketch (0.0463512 ± 0) by 0.154 ± 0.020" in figure


def test_an_exact_sketch_has_nothing_to_be_measured_against(tmp_path):
    figure = figure_titled(page_with(tmp_path, sketched([1e-8] * 6, dim=0)), RMS)
    assert "a dense Gaussian sketch" not in figure


def test_the_path_is_drawn_once_there_are_two_checkpoints(tmp_path):
    figure = figure_titled(page_with(tmp_path, []), PATH)
    assert "The Gaussian width of the path of a rises from 0 ± 0 at step 0 to 4.47 ± 0.22 at step 256." in figure
    assert "union of checkpoints" not in figure  # it is one
    alone = page_with(tmp_path, [], steps=(4,))
    assert f"<h3>{PATH}</h3>" not in alone
    assert f"<dt>{PATH}</dt>" in alone


def test_the_featurizer_width_is_drawn_where_it_is(tmp_path):
    with_it, without = page_with(tmp_path, featured()), page_with(tmp_path, [])
    figure = figure_titled(with_it, "Gaussian width of the features")
    assert "The Gaussian width of the features of a rises from 5.00 ± 0.20 at step 0 to 10.00 ± 0.20" in figure
    assert "[feature units]" in figure
    assert "Gaussian width of the features" not in without
    assert "Not measured: error of the sketches&#x27; cosines." in without


# every measure has a section: known or not, with whatever scopes it has


def estimated(step: int, measure: str, name: str, scope: str, value: float, stderr: float | None) -> tuple:
    return (step, measure, name, scope, value, stderr, 9, "heuristic", f"{measure}/{name}/v1", "furlongs")


def pairs(values: dict[str, float], step: int = 0, measure: str = "stiffness", name: str = "cos") -> list[tuple]:
    return [estimated(step, measure, name, f"class:{pair}", value, 0.1) for pair, value in values.items()]


def section_titled(page_text: str, title: str) -> str:
    return next(part for part in page_text.split("<section") if f"<h2>{title}</h2>" in part).partition("</section>")[0]


def test_a_measure_of_ones_own_has_a_section(tmp_path):
    rows = [estimated(step, "tail_index", "hill", "all", 0.1 * step, 0.01) for step in (0, 4)]
    text = page_with(tmp_path, rows, steps=(0, 4))
    section = section_titled(text, "Tail index")
    assert "hill: heuristic, definition tail_index/hill/v1, unit furlongs" in section
    assert "<svg" in section
    assert "0.400 ± 0.010" in section
    assert 'href="#m' in text.partition("<h2>What was found</h2>")[2].partition("</section>")[0]


def test_one_number_needs_no_plot(tmp_path):
    text = page_with(tmp_path, [estimated(4, "tail_index", "hill", "all", 0.25, None)], steps=(4,))
    section = section_titled(text, "Tail index")
    assert "<svg" not in section
    assert (
        "At step 4 the tail index / hill of a is 0.25 ± 0." in section
    )  # an exact value's null error is no unknown one


def test_a_measure_by_parameter_and_class_alone_is_drawn(tmp_path):
    rows = [
        estimated(step, "tilt", "angle", scope, value, 0.01)
        for step in (0, 4)
        for scope, value in {"layer:w": 0.5, "layer:b": -0.25, "class:1": 2.0, "class:2": 3.0}.items()
    ]
    section = section_titled(page_with(tmp_path, rows, steps=(0, 4)), "Tilt")
    assert "<h3>tilt / angle of every parameter</h3>" in section
    assert "highest in w (0.500 ± 0.010) and lowest in b (-0.250 ± 0.010)" in section
    assert "<h3>tilt / angle of every class</h3>" in section
    assert "highest in class 2 (3.000 ± 0.010)" in section
    assert section.count("<svg") == 2
    assert "0.500 ± 0.010</td>" in section  # the folded numbers
    text = printed(estimate_tables(FakeRun("a", rows, some_rows((0,), n=9)), None))
    assert "tilt/angle by layer" in text


def test_class_matrices_are_heat_maps(tmp_path):
    rows = pairs({"0,0": 0.9, "0,10": -0.2, "2,10": 0.1, "0,2": 0.3}) + pairs({"0,0": 0.5}, measure="mine", name="m")
    text = page_with(tmp_path, rows)
    assert "<h3>Cosine stiffness between classes, last step</h3>" in section_titled(text, "Stiffness")
    assert "highest in classes 0 and 0 (0.90 ± 0.10) and lowest in classes 0 and 10" in text
    assert "<h3>mine / m between classes, last step</h3>" in section_titled(text, "Mine")


def test_a_class_matrix_is_that_of_the_last_step():
    old, new = pairs({"0,0": 9.0, "0,10": 9.0}), pairs({"0,10": 0.2, "2,10": 0.1, "10,0": 0.4}, step=8)
    run = FakeRun("a", [*old, *new, estimated(8, "stiffness", "cos", "class:3", 7.0, 0.1)], some_rows((0,), n=9))
    found = class_matrix(read([run])[0].estimates, "stiffness", "cos")
    assert list(found.index) == list(found.columns) == ["0", "2", "10"]
    assert (found.loc["0", "10"], found.loc["10", "0"], found.loc["10", "2"], found.loc["2", "10"]) == (
        0.2,
        0.4,
        0.1,
        0.1,
    )
    assert math.isnan(found.loc["0", "0"])


def test_every_measure_of_gradscale_is_known():
    assert {quantity.measure for quantity in KNOWN} >= set(MEASURES)
    assert len({quantity.key for quantity in KNOWN}) == len(KNOWN)


def test_runs_of_one_name_are_told_apart(tmp_path):
    left, right = demo(), demo()
    right.path = "/elsewhere/demo-real"
    assert [run.label for run in read([left, right])] == ["/runs/demo-real", "/elsewhere/demo-real"]


def test_report_is_overwritten_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "new" / "report.html"
    write_report([small()], target)
    target.write_text("old")
    assert write_report([small()], str(target)) == target
    assert target.read_text().startswith("<!DOCTYPE html>")
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


def test_a_failed_report_leaves_the_old_one(tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    target.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_report([small()], target)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_no_matplotlib_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(GradscaleError, match=r"pip install 'gradscale\[report\]'"):
        write_report([small()], tmp_path / "report.html")


def test_no_run_is_refused(tmp_path):
    with pytest.raises(GradscaleError, match="at least one run"):
        write_report([], tmp_path / "report.html")
