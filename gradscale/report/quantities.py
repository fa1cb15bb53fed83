"""What the report knows of each quantity: how it is called, drawn and read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from gradscale.report.measured import Measured, curve

ALPHA_SOURCE = ("Chatterjee & Zielinski (2022), arXiv:2203.10036", "https://arxiv.org/abs/2203.10036")
NEU_SOURCE = ("Neu et al. (2021), COLT", "https://proceedings.mlr.press/v134/neu21a.html")
GRAM_SOURCE = ("Yang & Chaudhari (2025), arXiv:2504.16450", "https://arxiv.org/abs/2504.16450")
NOISE_SOURCE = ("McCandlish et al. (2018), arXiv:1812.06162", "https://arxiv.org/abs/1812.06162")
STIFFNESS_SOURCE = ("Fort et al. (2019), arXiv:1901.09491", "https://arxiv.org/abs/1901.09491")
WIDTH_SOURCE = ("Banerjee et al. (2024), arXiv:2406.07712", "https://arxiv.org/abs/2406.07712")


JACKKNIFE = (
    "Standard error: delete-one-block jackknife over blocks of shards, the examples taken as a sample of a population."
)
PROBES = (
    "Standard error: of the mean over probes, for the examples that were measured; all checkpoints share their probes."
)
MEAN = "Standard error: the standard deviation over examples, divided by √n."


class Quantity(NamedTuple):
    """One (measure, name). `noun` goes into sentences, `error` says how the standard error was got.

    `scope` is that of its curve. `beside` names a quantity of the same measure that stands beside it in its plot, and
    what that is.
    """

    measure: str
    name: str
    title: str
    noun: str
    equation: str
    text: str
    error: str = ""
    source: tuple[str, str] | None = None
    plotted: bool = True
    scope: str = "all"
    beside: tuple[str, str] | None = None
    apart: bool = False  # got by a call of its own, so that nobody misses it in a run

    @property
    def key(self) -> str:
        return f"{self.measure}/{self.name}"


KNOWN = (
    Quantity(
        "loss", "mean", "Mean loss", "mean loss", "(1/n) Σ ℓᵢ",
        "The mean of the per-example losses.", MEAN,
    ),
    Quantity(
        "coherence", "alpha", "Coherence α", "coherence α", "α = |mean g|² / mean |g|²",
        "How far the per-example gradients point the same way: 1 when all are equal, 1/n when n of them are "
        "orthogonal, 0 when their mean vanishes. The plug-in value on n examples lies about (1 − α)/n above that of "
        "the population, so compare it only at equal n.",
        JACKKNIFE, ALPHA_SOURCE,
    ),
    Quantity(
        "coherence", "alpha_unbiased", "Coherence α, unbiased", "unbiased coherence α",
        "(|Σ g|² − Σ |g|²) / ((n − 1) Σ |g|²)",
        "The same with an unbiased estimate of |E g|² in the numerator: it can be compared between different n, and it "
        "can be negative.",
        JACKKNIFE, ALPHA_SOURCE, plotted=False,
    ),
    Quantity(
        "coherence", "m_coherence", "m-coherence", "m-coherence", "m α = |Σ g|² / Σ |g|², with m = n",
        "How many examples, on average, one example's gradient helps, itself included: 1 for orthogonal gradients, "
        "n for equal ones.",
        JACKKNIFE, ALPHA_SOURCE,
    ),
    Quantity(
        "dispersion", "trace_covariance", "Trace of the gradient covariance", "trace of the gradient covariance",
        "tr Σ = (Σ |g|² − |Σ g|² / n) / (n − 1)",
        "The variance of one example's gradient, summed over parameters. Scaling the loss by c scales it by c².",
        JACKKNIFE,
    ),
    Quantity(
        "dispersion", "noise_scale", "Gradient noise scale", "gradient noise scale",
        "tr Σ / |E g|², with (|Σ g|² − Σ |g|²) / (n (n − 1)) for |E g|²",
        "The batch size, in examples, at which the noise of the mean gradient is as large as the gradient itself. "
        "Undefined (a gap) where the estimate of |E g|² is not positive: the mean gradient cannot then be told from "
        "zero.",
        JACKKNIFE, NOISE_SOURCE,
    ),
    Quantity(
        "coherence", "alpha_above", "Coherence α above a norm", "coherence α of gradients above a norm",
        "|mean g|² / mean |g|² over |g| > min_norm",
        "The coherence of the examples whose gradient norm is above a threshold, which the definition names. Gradients "
        "that vanish, as most do late in training, dilute α by their share: this one they do not. n counts the "
        "examples above.",
        JACKKNIFE, ALPHA_SOURCE, apart=True,
    ),
    Quantity(
        "dispersion", "v_within", "Gradient variance of a batch, within a run", "gradient variance of a batch",
        "V = tr Σ / B",
        "The variance of the mean gradient of a fresh batch of B examples, which the definition names, around that of "
        "their population. Not that of batches which the weights have seen, nor across trainings.",
        JACKKNIFE, NEU_SOURCE, apart=True,
    ),
    Quantity(
        "effective_gram", "perturbation", "Perturbation of the leave-one-out gap",
        "perturbation of the leave-one-out gap", "ε = tr Σ / n = mean |g|² (1 − α) / (n − 1)",
        "What leaving an example out adds to the generalization gap per unit of time of the gradient flow, before the "
        "contraction, which is not measured. Reconstructed: the paper's formula could not be read. It speaks of the "
        "gap only if the checkpoint was trained on all the data measured, and on no other.",
        JACKKNIFE, GRAM_SOURCE, apart=True,
    ),
    Quantity(
        "gaussian_width", "width", "Loss gradient Gaussian width", "Gaussian width",
        "E maxᵢ ⟨gᵢ, v⟩, v ~ N(0, I)",
        "The width of the set examples@theta, the per-example gradients at one checkpoint, over dense Gaussian probes. "
        "It depends only on the distances between gradients, so it does not see what they have in common; each probe's "
        "maximum is taken around the mean gradient, which changes the error, not the width. It grows with n: compare "
        "it only at equal n. The union is the same over all checkpoints up to and including a step. "
        "The set is named because the literature uses several; no constant of a paper's bound is claimed here.",
        PROBES, WIDTH_SOURCE,
    ),
    Quantity(
        "gaussian_width", "symmetrized", "Gaussian width, symmetrized", "symmetrized Gaussian width",
        "E maxᵢ |⟨gᵢ, v⟩|, v ~ N(0, I)",
        "The width of the set together with its negatives: unlike the width, it sees what all gradients share.",
        PROBES, WIDTH_SOURCE,
    ),
    Quantity(
        "gaussian_width", "path_width", "Gaussian width of the path", "Gaussian width of the path",
        "E maxₜ ⟨E g(θₜ), v⟩, v ~ N(0, I)",
        "The width of the set path, the mean gradients at this and all earlier checkpoints: exactly 0 at the first, "
        "one point, and growing with the set. It depends on which checkpoints were measured: compare runs only at the "
        "same ones. n counts checkpoints.",
        PROBES, WIDTH_SOURCE, scope="union",
    ),
    Quantity(
        "featurizer", "width", "Gaussian width of the features", "Gaussian width of the features",
        "E maxᵢ ⟨hᵢ, v⟩, v ~ N(0, I)",
        "The width of the set of the features hᵢ that the last layer is given, in their own units. The width of that "
        "layer's gradients rᵢ hᵢᵀ, rᵢ the gradient at the scores, is at most √2 (max |r| w({h}) + max |h| w({r})). It "
        "grows with n: compare it only at equal n.",
        PROBES, WIDTH_SOURCE, apart=True,
    ),
    Quantity(
        "featurizer", "symmetrized", "Gaussian width of the features, symmetrized",
        "symmetrized Gaussian width of the features", "E maxᵢ |⟨hᵢ, v⟩|, v ~ N(0, I)",
        "The width of the features together with their negatives: unlike the width, it sees what all of them share.",
        PROBES, WIDTH_SOURCE, apart=True,
    ),
    Quantity(
        "stiffness", "cos", "Cosine stiffness", "cosine stiffness", "mean cos(gᵢ, gⱼ) over i ≠ j",
        "How far a small step along one example's gradient lowers the loss of another: 1 when all gradients point the "
        "same way, 0 when they are orthogonal on average. Lengths of gradients have no part in it, which sets it apart "
        "from coherence; it can be compared between different n. Examples of zero gradient are left out.",
        JACKKNIFE, STIFFNESS_SOURCE, apart=True,
    ),
    Quantity(
        "stiffness", "cos_within", "Cosine stiffness within classes", "cosine stiffness within classes",
        "mean over classes a of C(a, a)",
        "The same over pairs of one class, averaged over classes, each with equal weight.",
        JACKKNIFE, STIFFNESS_SOURCE, apart=True,
    ),
    Quantity(
        "stiffness", "cos_between", "Cosine stiffness between classes", "cosine stiffness between classes",
        "mean over classes a ≠ b of C(a, b)",
        "The same over pairs of two classes, averaged over the pairs of classes. Below zero, learning one class "
        "unlearns another.",
        JACKKNIFE, STIFFNESS_SOURCE, apart=True,
    ),
    Quantity(
        "stiffness", "zero_gradients", "Examples of zero gradient", "number of examples of zero gradient", "",
        "They have no cosine and are left out of the stiffness.", plotted=False, apart=True,
    ),
    Quantity(
        "grad_norm", "q50", "Gradient norm", "median gradient norm", "median of |gᵢ|",
        "Median and 5 % and 95 % quantiles over examples.",
        "Standard error of a quantile: half the distance between the order statistics one binomial standard deviation "
        "to either side.",
    ),
    Quantity(
        "grad_norm", "mean", "Mean gradient norm", "mean gradient norm", "(1/n) Σ |gᵢ|",
        "The mean of the per-example gradient norms.", MEAN, plotted=False,
    ),
    Quantity(
        "sketch_error", "cosine_rms_error", "Error of the sketches' cosines", "error of the sketches' cosines",
        "√ mean (⟨Sx, Sy⟩ / (|x| |y|) − cos)²",
        "How far cosines from the stored sketches, with exact norms, are off: against exact products of the first "
        "examples (at most 16) of every checkpoint. n is the number of pairs.",
        "Standard error: delete-one-example jackknife. It does not hold the choice of the map, which all pairs and "
        "checkpoints share.",
        beside=("cosine_expected_error", "a dense Gaussian sketch"),
    ),
    Quantity(
        "sketch_error", "cosine_expected_error", "Expected error of the sketches' cosines",
        "expected error of the sketches' cosines", "√ mean (1 + cos²) / K",
        "What a dense Gaussian sketch of the same dimension is expected to have, on the same pairs.", plotted=False,
    ),
    Quantity(
        "sketch_error", "norm_bias", "Bias of the sketches' squared norms", "bias of the sketches' squared norms",
        "mean |Sx|² / |x|² − 1",
        "Zero on average over sketches; exact norms are used wherever there is one.", MEAN, plotted=False,
    ),
    Quantity(
        "sketch_error", "zero_gradients", "Zero gradients among the examples compared", "number of zero gradients", "",
        "They have no cosine and are left out of the three above.", plotted=False,
    ),
    Quantity(
        "sketch_error", "entries_underflown", "Entries of sketches stored as zero", "share of entries stored as zero",
        "",
        "The share of a sketch's nonzero entries that its type cannot tell from zero, over the examples compared.",
        plotted=False,
    ),
)  # fmt: skip


def present(runs: Sequence[Measured]) -> list[Quantity]:
    """Those in any of the runs, the known ones first, then the others with scope `all` by their names."""
    found: dict[str, tuple[str, str]] = {}
    scoped: set[tuple[str, str]] = set()
    for run in runs:
        frame = run.estimates
        for measure, name, scope in zip(frame["measure"], frame["name"], frame["scope"], strict=True):
            scoped.add((f"{measure}/{name}", str(scope)))
            if scope == "all":
                found[f"{measure}/{name}"] = (str(measure), str(name))
    known = [quantity for quantity in KNOWN if (quantity.key, quantity.scope) in scoped]
    rest = [pair for key, pair in found.items() if key not in {q.key for q in KNOWN} and pair[0] != "grad_norm"]
    return known + [_unknown(measure, name) for measure, name in rest]


def absent(runs: Sequence[Measured]) -> list[Quantity]:
    keys = {quantity.key for quantity in present(runs)}
    return [quantity for quantity in KNOWN if quantity.key not in keys and quantity.plotted and not quantity.apart]


def drawn(runs: Sequence[Measured]) -> list[Quantity]:
    """Those present that have a plot: one over checkpoints (scope `union`) only where there are two of them."""
    return [
        quantity
        for quantity in present(runs)
        if quantity.plotted and (quantity.scope == "all" or any(len(curve_of(run, quantity)) > 1 for run in runs))
    ]


def curve_of(run: Measured, quantity: Quantity) -> pd.DataFrame:
    return curve(run.estimates, quantity.measure, quantity.name, quantity.scope)


def beside(run: Measured, quantity: Quantity) -> pd.DataFrame:
    """The curve that stands beside it: that over the union of checkpoints, or of the quantity it is measured against.

    Empty where there is none. What something is measured against has no error of its own: it is worked out from what
    was compared. What is expected of an exact sketch, 0, is nothing to measure against.
    """
    if quantity.beside is None:
        union = curve(run.estimates, quantity.measure, quantity.name, "union")
        return union if quantity.scope == "all" else union[:0]
    found = curve(run.estimates, quantity.measure, quantity.beside[0], quantity.scope)
    return found[found["value"] > 0].assign(stderr=0.0).reset_index(drop=True)


def unit_of(runs: Sequence[Measured], quantity: Quantity) -> str:
    """The unit that the runs give, or an empty string for pure numbers."""
    for run in runs:
        frame = run.estimates
        units = frame[(frame["measure"] == quantity.measure) & (frame["name"] == quantity.name)]["unit"]
        if len(units):
            unit = str(units.iloc[0])
            return "" if unit == "1" else unit
    return ""


def _unknown(measure: str, name: str) -> Quantity:
    title = f"{measure} / {name}".replace("_", " ")
    return Quantity(measure, name, title, title, "", "See the definition that the run gives.")
