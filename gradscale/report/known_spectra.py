"""What the report knows of the estimates of spectrum runs: of an operator, and of stability."""

from __future__ import annotations

from gradscale.report.known_probed import HUTCHINSON_SOURCE
from gradscale.report.quantity import Quantity

LANCZOS_SOURCE = ("Parlett (1998), The Symmetric Eigenvalue Problem", "https://doi.org/10.1137/1.9781611971163")
SLQ_SOURCE = ("Ubaru, Chen & Saad (2017), SIAM J. Matrix Anal. Appl. 38", "https://doi.org/10.1137/16M1104974")
EDGE_SOURCE = ("Cohen et al. (2021), arXiv:2103.00065", "https://arxiv.org/abs/2103.00065")
ADAM_SOURCE = ("Cohen et al. (2022), arXiv:2207.14484", "https://arxiv.org/abs/2207.14484")
MEAN_SQUARE_SOURCE = ("Mulayoff & Michaeli (2023), arXiv:2306.07850", "https://arxiv.org/abs/2306.07850")
UNIFORM_SOURCE = (
    "Wu, Ma & E (2018), NeurIPS",
    "https://proceedings.neurips.cc/paper/2018/hash/6651526b6fb8f29a00507de6a49ce30f-Abstract.html",
)
BOUND = (
    "Error: a bound, min(r, r²/gap) of the residual r, not a standard error; for the examples that were measured. That "
    "of a sample is biased up: compare it at equal n."
)
OVER_PROBES = "Standard error: over probes, for the examples that were measured."
OVER_BOTH = (
    "Standard error: over probes and over examples as a sample of a population; not known where all examples are in "
    "one shard."
)
EXACT = "Exact: a sum of squared norms."
QUADRATURE = f"{OVER_PROBES} What the quadrature's finite number of nodes adds is not in it."
THRESHOLD = "See the criterion."


def _of(measure: str, symbol: str, noun: str) -> tuple[Quantity, ...]:
    """What stochastic Lanczos says of an operator A, called `noun`."""
    return (
        Quantity(
            measure, "lambda_max", f"Largest eigenvalue of the {noun}", f"largest eigenvalue of the {noun}",
            f"λ₁({symbol}) = max vᵀ{symbol}v over |v| = 1", "The curvature in the sharpest direction.",
            BOUND, LANCZOS_SOURCE, plotted=False, apart=True,
        ),
        Quantity(
            measure, "lambda_min", f"Smallest eigenvalue of the {noun}", f"smallest eigenvalue of the {noun}",
            f"min vᵀ{symbol}v over |v| = 1",
            "Below zero the point is no minimum: there are directions along which the loss falls on both sides.",
            BOUND, LANCZOS_SOURCE, apart=True,
        ),
        Quantity(
            measure, "spectral_norm", f"Spectral norm of the {noun}", f"spectral norm of the {noun}",
            f"max |λ({symbol})|", "The curvature, of either sign, in the most curved direction.",
            BOUND, LANCZOS_SOURCE, apart=True,
        ),
        Quantity(
            measure, "log_determinant", f"Log-determinant of the {noun}", f"log-determinant of the {noun}",
            f"log det({symbol} + sI)", "The definition names the shift s.", QUADRATURE, SLQ_SOURCE, apart=True,
        ),
        Quantity(
            measure, "effective_dimension", f"Effective dimension of the {noun}", f"effective dimension of the {noun}",
            f"tr {symbol}({symbol} + sI)⁻¹", "About how many eigenvalues stand out of s, which the definition names.",
            QUADRATURE, SLQ_SOURCE, apart=True,
        ),
        Quantity(
            measure, "outliers", f"Outliers of the {noun}", f"number of outliers of the {noun}", "",
            "How many eigenvalues lie above the edge that the definition names.", QUADRATURE, SLQ_SOURCE, apart=True,
        ),
        Quantity(
            measure, "non_uniformity", f"Non-uniformity of the {noun}", f"non-uniformity of the {noun}",
            "s = λ₁((1/n) Σ Hᵢ² − H²)^½", "How much the Hessians Hᵢ of single examples differ.",
            BOUND, UNIFORM_SOURCE, apart=True,
        ),
        Quantity(
            measure, "backend_error", f"Error of products with the {noun}",
            f"error of products with the {noun}", "",
            "Estimated, relative to the length of a product: asymmetry of an exact way, of finite differences what a "
            "smaller step changes.", plotted=False, apart=True,
        ),
    )  # fmt: skip


def _traces(measure: str, symbol: str, noun: str) -> tuple[Quantity, ...]:
    """Those that the measure `curvature` has of the Hessian, of another operator A. The covariance's trace is exact."""
    exact = measure == "covariance"
    return (
        Quantity(
            measure, "trace", f"Trace of the {noun}", f"trace of the {noun}", f"tr {symbol} = E vᵀ{symbol}v",
            "The sum of its eigenvalues.", OVER_BOTH, HUTCHINSON_SOURCE, apart=True,
        ),
        Quantity(
            measure, "trace_sample", f"Trace of the {noun} of the examples measured",
            f"trace of the {noun} of the examples measured", f"tr {symbol} = E vᵀ{symbol}v",
            "The same value, for these examples alone.", EXACT if exact else OVER_PROBES, HUTCHINSON_SOURCE,
            plotted=exact, apart=True,
        ),
        Quantity(
            measure, "frobenius", f"Frobenius norm of the {noun}", f"Frobenius norm of the {noun}",
            f"|{symbol}| = (Σ λ²)^½", "The root of the sum of squared eigenvalues.", OVER_PROBES, HUTCHINSON_SOURCE,
            apart=True, beside=("frobenius_sample", "of the examples measured"),
        ),
        Quantity(
            measure, "frobenius_sample", f"Frobenius norm of the {noun} of the examples measured",
            f"Frobenius norm of the {noun} of the examples measured", f"(E |{symbol}v|²)^½",
            "For these examples alone: larger than that of a population.", OVER_PROBES, HUTCHINSON_SOURCE,
            plotted=False, apart=True,
        ),
        Quantity(
            measure, "ellipsoid", f"Width of the ellipsoid of the {noun}", f"width of the ellipsoid of the {noun}",
            f"E |{symbol}g|, g ~ N(0, I)", "The Gaussian width of the image of the unit ball.", OVER_PROBES,
            apart=True, beside=("ellipsoid_sample", "of the examples measured"),
        ),
        Quantity(
            measure, "ellipsoid_sample", f"Width of the ellipsoid of the {noun} of the examples measured",
            f"width of the ellipsoid of the {noun} of the examples measured", f"E |{symbol}g|, g ~ N(0, I)",
            "For these examples alone.", OVER_PROBES, plotted=False, apart=True,
        ),
    )  # fmt: skip


def _criterion(
    name: str, title: str, noun: str, equation: str, text: str, source: tuple[str, str], limit: str
) -> tuple[Quantity, Quantity]:
    """A criterion of stability, with its threshold beside it."""
    return (
        Quantity(
            "stability", name, title, noun, equation, text, "Error: that of the curvature it is made of.", source,
            apart=True, beside=(f"{name}_threshold", limit), limit=True,
        ),
        Quantity(
            "stability", f"{name}_threshold", f"{title}: the threshold", f"threshold of the {noun}", "", THRESHOLD,
            plotted=False, apart=True,
        ),
    )  # fmt: skip


STABILITY: tuple[Quantity, ...] = (
    *_criterion(
        "sharpness", "Sharpness against 2/η", "sharpness", "λ₁(H) ≤ 2/η",
        "The largest eigenvalue of the Hessian, of full-batch descent with step size η. Above the threshold descent "
        "leaves the neighbourhood of a minimum; close to it training is at the edge of stability. Away from a "
        "minimum it says how the curvature stands to the step, no more.", EDGE_SOURCE, "the threshold 2/η",
    ),
    *_criterion(
        "sharpness_momentum", "Sharpness against 2(1 + β)/η", "sharpness", "λ₁(H) ≤ 2(1 + β)/η",
        "The same of descent with momentum β.", EDGE_SOURCE, "the threshold 2(1 + β)/η",
    ),
    *_criterion(
        "sharpness_adam", "Preconditioned sharpness", "preconditioned sharpness",
        "λ₁(D^−½ H D^−½) ≤ 2(1 + β₁)/((1 − β₁)η)",
        "The same of Adam, its preconditioner D held where it is.", ADAM_SOURCE, "its threshold",
    ),
    *_criterion(
        "bound_along", "Step size against a bound along v₁", "step size", "η ≤ 2a/(a² + p Var v₁ᵀHᵢv₁)",
        "Necessary for SGD to stay near a minimum that all examples share; a = λ₁, v₁ its eigenvector, "
        "p = (n − B)/(B(n − 1)). One product an example.", MEAN_SQUARE_SOURCE, "the bound along v₁",
    ),
    *_criterion(
        "bound_of_traces", "Step size against a bound of traces", "step size",
        "η ≤ 2 tr H/((1 − p)|H|² + p mean |Hᵢ|²)",
        "Necessary likewise, from traces and norms.", MEAN_SQUARE_SOURCE, "the bound of traces",
    ),
    *_criterion(
        "non_uniformity", "Non-uniformity against 1/(η√p)", "non-uniformity of the Hessians", "s ≤ 1/(η√p)",
        "How much the Hessians of single examples differ. Of a condition that is sufficient, not necessary: SGD can "
        "stay where it is not met.", UNIFORM_SOURCE, "1/(η√p)",
    ),
    Quantity(
        "stability", "backend_error", "Error of the products", "error of the products", "",
        "Estimated, relative to the length of a product.", plotted=False, apart=True,
    ),
)  # fmt: skip

SPECTRA: tuple[Quantity, ...] = (
    *_of("curvature", "H", "Hessian"),
    *_of("gauss_newton", "G", "Gauss-Newton matrix"),
    *_traces("gauss_newton", "G", "Gauss-Newton matrix"),
    *_of("covariance", "Σ", "gradient covariance"),
    *_traces("covariance", "Σ", "gradient covariance"),
    *STABILITY,
)
