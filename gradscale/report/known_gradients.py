"""What the report knows of the measures that one pass, or two, over the gradients gives."""

from __future__ import annotations

from gradscale.report.quantity import JACKKNIFE, MEAN, PROBES, Quantity

ALPHA_SOURCE = ("Chatterjee & Zielinski (2022), arXiv:2203.10036", "https://arxiv.org/abs/2203.10036")
NEU_SOURCE = ("Neu et al. (2021), COLT", "https://proceedings.mlr.press/v134/neu21a.html")
GRAM_SOURCE = ("Yang & Chaudhari (2025), arXiv:2504.16450", "https://arxiv.org/abs/2504.16450")
NOISE_SOURCE = ("McCandlish et al. (2018), arXiv:1812.06162", "https://arxiv.org/abs/1812.06162")
STIFFNESS_SOURCE = ("Fort et al. (2019), arXiv:1901.09491", "https://arxiv.org/abs/1901.09491")
WIDTH_SOURCE = ("Banerjee et al. (2024), arXiv:2406.07712", "https://arxiv.org/abs/2406.07712")

GRADIENTS: tuple[Quantity, ...] = (
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
)  # fmt: skip
