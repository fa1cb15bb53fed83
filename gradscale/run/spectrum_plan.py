"""What a spectrum run will do, settled before it starts: which quantities of which operator. No Ray, no files.

Numbers do not depend on the number of workers but for rounding: probes are keyed by position, the trace's units are
ranges of examples. What is asked for of the trace, of the density and so on are the frozen settings here.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from gradscale.curvature.backends import BACKENDS
from gradscale.curvature.probes import KINDS
from gradscale.curvature.ritz import WHICH
from gradscale.curvature.share import OPERATORS
from gradscale.errors import GradscaleError

KIND = "spectrum"
TOGETHER = 8  # probes of a unit: they share the graph of a microbatch
MEASURES = {"hessian": "curvature", "ggn": "gauss_newton", "covariance": "covariance"}  # in the estimates


@dataclass(frozen=True)
class Hutchinson:
    """tr A as the mean of v^T A v over probes, until its standard error over probes is at most `relative` of it.

    Or at most `stderr`, where that is given in its place; at most `max_probes`, at least `min_probes`. With both None,
    `max_probes`. Source: Hutchinson (1990), Commun. Stat. Simul. Comput. 19.
    """

    max_probes: int = 96
    relative: float | None = 0.02
    stderr: float | None = None
    min_probes: int = 16
    probes: str = "rademacher"

    method: ClassVar[str] = "hutchinson"

    def __post_init__(self) -> None:
        _at_least(1, max_probes=self.max_probes, min_probes=self.min_probes)
        _check_kind(self.probes)
        if self.stderr is not None and self.relative is not None:
            object.__setattr__(self, "relative", None)
        for name in ("relative", "stderr"):
            asked = getattr(self, name)
            if asked is not None and not 0 < asked < math.inf:
                raise GradscaleError(f"{name} must be a positive standard error, got {asked}; 0.02 is the default")


@dataclass(frozen=True)
class Deflated:
    """tr A with what a few products span taken exactly: `hutch++`, `xtrace`, or `xnystrace` of ggn.

    Holds 2 to 3 `products` / 3 vectors, in slices, and runs on the gang; see `gradscale.curvature.deflated`.
    """

    method: str = "hutch++"
    products: int = 30
    probes: str = "gaussian"

    METHODS: ClassVar[tuple[str, ...]] = ("hutch++", "xtrace", "xnystrace")

    def __post_init__(self) -> None:
        if self.method not in self.METHODS:
            raise GradscaleError(f"method of the trace must be hutchinson or one of {', '.join(self.METHODS)}, got "
                                 f"{self.method!r}")  # fmt: skip
        _at_least(6, products=self.products)
        _check_kind(self.probes)


@dataclass(frozen=True)
class Norms:
    """|A|_F and, with Gaussian probes, E |A g|: means over probes of |A v|, of all examples and between two halves."""

    num_probes: int = 16
    probes: str = "gaussian"

    def __post_init__(self) -> None:
        _at_least(1, num_probes=self.num_probes)
        _check_kind(self.probes)


@dataclass(frozen=True)
class SLQ:
    """The spectral density by stochastic Lanczos quadrature: `steps` nodes of each of `num_probes` probes.

    `shift` is that of log det (A + shift I) and of the effective dimension tr A (A + shift I)^-1, None to leave these
    out; `edge` the value beyond which eigenvalues are counted as outliers.
    """

    num_probes: int = 8
    steps: int = 50
    probes: str = "gaussian"
    shift: float | None = None
    edge: float | None = None
    reorthogonalize: bool = False

    def __post_init__(self) -> None:
        _at_least(1, num_probes=self.num_probes, steps=self.steps)
        _check_kind(self.probes)
        if self.shift is not None and not 0 <= self.shift < math.inf:
            raise GradscaleError(f"shift must be a number of at least 0, got {self.shift}; 1e-3 lambda_max is usual")
        if self.edge is not None and not math.isfinite(self.edge):
            raise GradscaleError(f"edge must be a finite number, got {self.edge}; where the bulk ends is usual")


@dataclass(frozen=True)
class Stability:
    """Whether SGD with step `eta` and batches of `batch_size` stays where it is: see `gradscale.curvature.stability`.

    `example_norms` examples are taken for mean |H_i|_F^2 of the bound (16), one product each a probe; 0 leaves it out.
    """

    eta: float
    batch_size: int
    momentum: float = 0.0
    example_norms: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.eta < math.inf:
            raise GradscaleError(f"eta must be a positive number, got {self.eta}; give the learning rate")
        if not 0 <= self.momentum < 1:
            raise GradscaleError(f"momentum must be at least 0 and less than 1, got {self.momentum}; 0 is plain SGD")
        _at_least(1, batch_size=self.batch_size)
        _at_least(0, example_norms=self.example_norms)


@dataclass(frozen=True, order=True)
class TraceUnit:
    """The unit of work of a trace: the products of the probes `first` to `last` - 1 over the examples of a shard."""

    step: int
    shard: int
    start: int
    stop: int
    first: int
    last: int

    @property
    def ids(self) -> range:
        return range(self.start, self.stop)

    @property
    def name(self) -> str:
        return f"trace-{self.first:05d}-{self.shard:05d}"

    def __str__(self) -> str:
        return f"probes {self.first} to {self.last - 1} of step {self.step}, examples {self.start} to {self.stop - 1}"


@dataclass(frozen=True)
class SpectrumPlan:
    """Everything that determines the results but for rounding. All fields are JSON values."""

    task: str
    task_options: Mapping[str, Any]
    checkpoints: Mapping[str, Any]  # step -> {"path", "fingerprint"}
    examples: int  # the first so many of the dataset
    data_fingerprint: str
    parameters: Mapping[str, Any]  # name -> {"shape", "dtype"}
    params: str | None
    excluded: list[str]
    operator: str
    top: int  # eigenvalues; 0 for none
    which: str
    tolerance: float
    max_steps: int
    basis_cap: int | None
    vectors: str  # the type that vectors are held in
    trace: Mapping[str, Any] | None
    norms: Mapping[str, Any] | None
    density: Mapping[str, Any] | None
    stability: Mapping[str, Any] | None
    backend: str  # as it was asked for; which one it was is in parts/step-…/choice.json
    seed: int
    shard_size: int
    microbatch: int
    threads_per_worker: int
    device: str
    versions: Mapping[str, str]
    kind: str = KIND

    @property
    def steps(self) -> list[int]:
        return [int(step) for step in self.checkpoints]

    @property
    def size(self) -> int:
        """P."""
        return sum(math.prod(parameter["shape"]) for parameter in self.parameters.values())

    @property
    def measure(self) -> str:
        """Its name in the estimates."""
        return MEASURES[self.operator]

    @property
    def shards(self) -> int:
        return -(-self.examples // self.shard_size)

    def units(self, step: int, first: int, last: int) -> list[TraceUnit]:
        """All shards of the probes `first` to `last` - 1."""
        size = self.shard_size
        starts = [(shard, shard * size) for shard in range(self.shards)]
        return [TraceUnit(step, s, start, min(start + size, self.examples), first, last) for s, start in starts]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> SpectrumPlan:
        """Raises: GradscaleError if the text is not a plan of a spectrum."""
        try:
            found = json.loads(text)
            if found.get("kind") != KIND:
                raise ValueError("the plan of another kind of run")
            return cls(**found)
        except (ValueError, TypeError, AttributeError) as error:
            raise GradscaleError(
                f"run.json must hold the plan of a spectrum run of this version of gradscale, got {error}; take "
                "another --out, the files of the run stay readable as Parquet"
            ) from error


def check_settings(
    operator: str,
    top: int,
    which: str,
    tolerance: float,
    backend: str,
    vectors: str,
    quantities: Sequence[object],
    frobenius: bool,
) -> None:
    """Raises: GradscaleError if a setting is unknown, or nothing is asked for."""
    for name, value, known in (
        ("operator", operator, OPERATORS),
        ("which", which, WHICH),
        ("backend", backend, BACKENDS),
        ("vectors", vectors, ("float32", "float64")),
    ):
        if value not in known:
            raise GradscaleError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    _at_least(0, top=top)
    if not 0 < tolerance < math.inf:
        raise GradscaleError(f"tolerance must be positive, got {tolerance}; 1e-6 of each eigenvalue is usual")
    if operator != "hessian" and backend != "auto":
        raise GradscaleError(f"backend must be auto for the operator {operator}, got {backend!r}; it has one way only")
    if not top and not any(quantities):
        raise GradscaleError("a spectrum must be asked for something, got nothing; add --top, --trace or --density")
    if frobenius and operator == "covariance":
        raise GradscaleError(
            "norms must be of hessian or ggn, got operator covariance; gs.covariance_spectrum of a run with a sketch "
            "has the covariance's spectrum and norm"
        )


def check_sizes(plan: SpectrumPlan, workers: int, gang: bool = True) -> None:
    """Raises: GradscaleError if more is asked for than there is of it."""
    if plan.top > plan.size:
        raise GradscaleError(
            f"top must be at most the {plan.size} measured entries, got {plan.top}; ask for fewer eigenvalues"
        )
    width = -(-plan.size // workers)
    if gang and (workers - 1) * width >= plan.size:
        raise GradscaleError(
            f"workers must be such that each holds an entry of the {plan.size} measured ones, got {workers} with "
            f"slices of {width}; use {-(-plan.size // width)}"
        )
    batch = plan.stability["batch_size"] if plan.stability else 1
    if batch > plan.examples:
        raise GradscaleError(f"batch_size must be at most the {plan.examples} examples, got {batch}; use a smaller one")
    if plan.operator == "covariance" and plan.examples < 2:
        raise GradscaleError(f"examples must be two or more for a covariance, got {plan.examples}; take more")
    least = min(plan.size, plan.top + 4)
    if plan.basis_cap is not None and plan.top and plan.basis_cap < least:
        raise GradscaleError(f"basis_cap must be at least {least} for top = {plan.top}, got {plan.basis_cap}; raise it")


def _at_least(least: int, **settings: int) -> None:
    for name, value in settings.items():
        if not isinstance(value, int) or value < least:
            raise GradscaleError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise GradscaleError(f"probes must be one of {', '.join(KINDS)}, got {kind!r}; rademacher has less noise")
