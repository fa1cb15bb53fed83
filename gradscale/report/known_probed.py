"""What the report knows of the measures that probe the model, and of the error of sketches."""

from __future__ import annotations

from gradscale.report.known_gradients import WIDTH_SOURCE
from gradscale.report.quantity import DRAWS, MEAN, PROBES, Quantity

GC_SOURCE = ("Dherin et al. (2022), arXiv:2209.13083", "https://arxiv.org/abs/2209.13083")
TANGENT_SOURCE = ("Baratin et al. (2021), arXiv:2008.00938", "https://arxiv.org/abs/2008.00938")
SENSITIVITY_SOURCE = ("Neu et al. (2021), COLT", "https://proceedings.mlr.press/v134/neu21a.html")
AVERAGE_SOURCE = ("Andriushchenko et al. (2023), arXiv:2302.07011", "https://arxiv.org/abs/2302.07011")
ADAPTIVE_SOURCE = ("Kwon et al. (2021), arXiv:2102.11600", "https://arxiv.org/abs/2102.11600")
WORST_SOURCE = ("Keskar et al. (2017), arXiv:1609.04836", "https://arxiv.org/abs/1609.04836")
HUTCHINSON_SOURCE = ("Hutchinson (1990), Commun. Stat. Simul. Comput. 19", "https://doi.org/10.1080/03610919008812866")
SAM_SOURCE = ("Foret et al. (2021), arXiv:2010.01412", "https://arxiv.org/abs/2010.01412")
HALVES_ERROR = "Standard error: over probes; the noise of the two halves of the data is not in it."

PROBED: tuple[Quantity, ...] = (
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
        "geometric_complexity", "gc", "Geometric complexity", "geometric complexity", "(1/n) Σ |∇ₓ f(xᵢ)|²",
        "How steep the fitted function is at the data: the squared Frobenius norm of the Jacobian of the scores in the "
        "inputs, averaged over examples. Scaling the inputs by c scales it by 1/c²: compare it only on inputs of one "
        "scale.",
        "Standard error: over examples as a sample of a population, with the noise of the probes in it.", GC_SOURCE,
        apart=True,
    ),
    Quantity(
        "geometric_complexity", "gc_sample", "Geometric complexity of the examples measured",
        "geometric complexity of the examples measured", "(1/n) Σ |∇ₓ f(xᵢ)|²",
        "The same value, for these examples alone.", "Standard error: over probes.", GC_SOURCE,
        plotted=False, apart=True,
    ),
    Quantity(
        "tangent_kernel", "trace", "Trace of the tangent kernel, for each example",
        "trace of the tangent kernel for each example", "tr K / n = (1/n) Σ |Jᵢ|²",
        "How far a step in the weights moves the scores: the squared Frobenius norm of their Jacobian in the "
        "parameters, averaged over examples.",
        "Standard error: over examples as a sample of a population, with the noise of the probes in it.",
        TANGENT_SOURCE, apart=True,
    ),
    Quantity(
        "tangent_kernel", "frobenius", "Squared norm of the tangent features", "squared norm of the tangent features",
        "|Φ|² = tr K = Σ |Jᵢ|²",
        "The same summed over the examples measured: it grows with n.", "Standard error: over probes.", TANGENT_SOURCE,
        plotted=False, apart=True,
    ),
    Quantity(
        "tangent_kernel", "alignment", "Alignment of the tangent kernel", "alignment of the tangent kernel",
        "yᵀKy / (|K| |y|²)",
        "How much of the kernel lies along the targets: 1 for K = y yᵀ, and no more than 1. A kernel that has become "
        "aligned learns in the direction of the targets first.",
        "Standard error: delete-one-probe jackknife, for the examples that were measured; it is rough for few probes.",
        TANGENT_SOURCE, apart=True,
    ),
    Quantity(
        "sensitivity", "gradient", "Sensitivity of the gradient", "sensitivity of the gradient",
        "Γ = E |g(w) − g(w + ξ)|², ξ ~ N(0, σ²I)",
        "How far the mean gradient moves when noise, of the σ that the definition names, is added to the weights. "
        "Without bias, so that it can be negative.",
        "Standard error: over the draws of the noise; the noise of the two halves of the data is not in it.",
        SENSITIVITY_SOURCE, apart=True,
    ),
    Quantity(
        "sensitivity", "value", "Sensitivity of the loss", "sensitivity of the loss",
        "γ = E L(w + ξ) − L(w), ξ ~ N(0, σ²I)",
        "How far the mean loss rises under the same noise: about σ²/2 times the trace of the Hessian.",
        DRAWS, SENSITIVITY_SOURCE, apart=True,
    ),
    Quantity(
        "sharpness", "average", "Average sharpness", "average sharpness", "E L(w + ξ) − L(w), ξ ~ N(0, σ²I)",
        "How far the mean loss rises under noise in the weights, scaled by the weights where the definition says "
        "adaptive. Negative where the weights are not at a minimum and noise happens to help.",
        DRAWS, AVERAGE_SOURCE, apart=True,
    ),
    Quantity(
        "sharpness", "sam", "Sharpness along a batch's gradient", "sharpness along a batch's gradient",
        "L(w + ρ g/|g|) − L(w)",
        "How far the loss of a batch rises by a step of length ρ along its own gradient. It depends on the number m of "
        "examples in a batch, which the definition names: compare it only at equal m and ρ. n counts batches.",
        "Standard error: over batches.", SAM_SOURCE, apart=True,
    ),
    Quantity(
        "sharpness", "asam", "Adaptive sharpness along a batch's gradient",
        "adaptive sharpness along a batch's gradient", "L(w + ρ w² g/|w g|) − L(w)",
        "The same, the step scaled entry by entry by the weights: what rescales weights and leaves the "
        "function as it is leaves it too.", "Standard error: over batches.", ADAPTIVE_SOURCE, apart=True,
    ),
    Quantity(
        "worst_case", "epsilon_sharpness", "Worst-case sharpness", "worst-case sharpness",
        "max L(w + v) − L(w) over |v| ≤ ε",
        "The largest rise of a batch's loss in a ball around the weights, as far as gradient ascent finds it: a lower "
        "bound of the maximum. The definition names the ball, its radius, the number m of examples in a batch and that "
        "of the steps: compare it only where these are equal. n counts batches.",
        "Standard error: over batches.", WORST_SOURCE, apart=True,
    ),
    Quantity(
        "sharpness", "weight_norm", "Norm of the weights", "norm of the weights", "|w|",
        "Of the parameters measured. Rescaling weights without changing the function changes the sharpness, unless it "
        "is adaptive: look at both.", plotted=False, apart=True,
    ),
    Quantity(
        "curvature", "trace", "Trace of the Hessian", "trace of the Hessian", "tr H = E vᵀHv",
        "The sum of the Hessian's eigenvalues, of the mean loss in the measured parameters: how much curvature is in "
        "all directions together. Rescaling weights without changing the function changes it.",
        "Standard error: over probes and over examples as a sample of a population; not known where all examples are "
        "in one shard.", HUTCHINSON_SOURCE, apart=True,
    ),
    Quantity(
        "curvature", "trace_sample", "Trace of the Hessian of the examples measured",
        "trace of the Hessian of the examples measured", "tr H = E vᵀHv",
        "The same value, for these examples alone.", PROBES, HUTCHINSON_SOURCE, plotted=False, apart=True,
    ),
    Quantity(
        "curvature", "frobenius", "Frobenius norm of the Hessian", "Frobenius norm of the Hessian",
        "|H| = (Σ λ²)^½ = (E |Hv|²)^½",
        "The root of the sum of the Hessian's squared eigenvalues. From products with two halves of the data (the "
        "definition says so), the noise of the data does not add to it.",
        HALVES_ERROR, HUTCHINSON_SOURCE, apart=True, beside=("frobenius_sample", "of the examples measured"),
    ),
    Quantity(
        "curvature", "frobenius_sq", "Squared Frobenius norm of the Hessian", "squared Frobenius norm of the Hessian",
        "|H|² = E ⟨H_A v, H_B v⟩", "Without bias, so that it can be negative.", HALVES_ERROR, HUTCHINSON_SOURCE,
        plotted=False, apart=True,
    ),
    Quantity(
        "curvature", "frobenius_sample", "Frobenius norm of the Hessian of the examples measured",
        "Frobenius norm of the Hessian of the examples measured", "(E |Hv|²)^½",
        "For these examples alone: larger than that of a population.", PROBES, HUTCHINSON_SOURCE,
        plotted=False, apart=True,
    ),
    Quantity(
        "curvature", "ellipsoid", "Width of the Hessian's ellipsoid", "width of the Hessian's ellipsoid",
        "E |Hg|, g ~ N(0, I)",
        "Times R, the Gaussian width of the gradients in a ball of radius R around the weights, to first order. From "
        "products with two halves of the data: a little too small where these are noisy.",
        HALVES_ERROR, WIDTH_SOURCE, apart=True, beside=("ellipsoid_sample", "of the examples measured"),
    ),
    Quantity(
        "curvature", "ellipsoid_sample", "Width of the ellipsoid of the examples measured",
        "width of the ellipsoid of the examples measured", "E |Hg|, g ~ N(0, I)",
        "For these examples alone: larger than that of a population.", PROBES, WIDTH_SOURCE, plotted=False, apart=True,
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
