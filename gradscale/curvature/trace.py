"""Hutchinson's estimates of traces and norms: samples of probes that are kept, and means with their standard errors.

Shapes: P entries in all, p of them here, N probes, k of them at a time, G groups of entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradscale.curvature.operator import Operator
from gradscale.curvature.probes import Probes
from gradscale.curvature.slices import column_blocks
from gradscale.errors import GradscaleError

Array = np.ndarray

OVER_PROBES = "over probes"


class TraceEstimate(NamedTuple):
    """A number of an operator, from random probes."""

    value: float
    stderr: float  # NaN of a single sample
    n: int  # samples
    status: str  # estimator or conditional
    error: str  # how the standard error was got


class TraceSamples(NamedTuple):
    """What each of N probes v says of A; merged by `merge_samples`."""

    kind: str  # gaussian or rademacher
    groups: tuple[str, ...]
    probe: Array  # [N] int64
    quadratic: Array  # [N] float64: v^T A v
    by_group: Array  # [N, G]: v_g^T (A v)_g
    square: Array  # [N]: |A v|^2


def mean_of_samples(samples: Array, status: str = "estimator", error: str = OVER_PROBES) -> TraceEstimate:
    """The mean of independent samples [N], with s / sqrt(N)."""
    n = len(samples)
    stderr = float(np.std(samples, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return TraceEstimate(float(np.mean(samples)), stderr, n, status, error)


def trace_samples(
    operator: Operator, probes: Probes, ids: range, groups: Mapping[str, range] | None = None, together: int = 8
) -> TraceSamples:
    """Of the probes `ids`, `together` of them in a call of the operator. `groups` are ranges of entries, as of layers.

    The part of a group g is unbiased for tr A_gg, the trace of its diagonal block. Memory: 2 k p numbers.

    Raises: GradscaleError if there are no probes, a group is not some of the entries, or a product is not finite.
    """
    if not len(ids) or together < 1:
        raise GradscaleError(
            f"probes and together must be at least 1, got {len(ids)} and {together}; 16 and 8 are usual"
        )
    named = groups or {}
    for name, entries in named.items():
        if not 0 <= entries.start < entries.stop <= operator.size or entries.step != 1:
            raise GradscaleError(
                f"group {name} must be a range of some of the {operator.size} entries, got {entries}; see the layout"
            )
    batches = [ids[first : first + together] for first in range(0, len(ids), together)]
    return merge_samples([_batch(operator, probes, batch, named) for batch in batches])


def merge_samples(parts: Sequence[TraceSamples]) -> TraceSamples:
    """All samples, by the numbers of their probes.

    Raises: GradscaleError if there are none, a probe is in two parts, or the kinds or groups differ.
    """
    if len({(part.kind, part.groups) for part in parts}) != 1:
        raise GradscaleError(
            "samples to be merged must be of one kind and the same groups, got "
            f"{[(part.kind, part.groups) for part in parts]}; merge those of one run"
        )
    probe = np.concatenate([part.probe for part in parts])
    if len(np.unique(probe)) < len(probe):
        numbers, counts = np.unique(probe, return_counts=True)
        raise GradscaleError(
            f"probes of samples must differ, got {numbers[counts > 1].tolist()} twice; merge each once"
        )
    order = np.argsort(probe)
    columns = ([getattr(part, name) for part in parts] for name in ("quadratic", "by_group", "square"))
    return TraceSamples(
        parts[0].kind, parts[0].groups, probe[order], *(np.concatenate(column)[order] for column in columns)
    )


def hutchinson(
    operator: Operator,
    probes: Probes,
    max_probes: int,
    stderr: float | None = None,
    relative: float | None = None,
    min_probes: int = 16,
    groups: Mapping[str, range] | None = None,
    together: int = 8,
    on_samples: Callable[[TraceSamples], None] | None = None,
) -> TraceSamples:
    """Samples until the standard error of the trace is at most `stderr`, or `relative` of it; at most `max_probes`.

    Without either, `max_probes` samples. At least `min_probes` are taken: a standard error from few is itself too
    uncertain to stop on, and stopping when it happens to be small makes it a little too small. Never stops because the
    mean has come to rest.

    Raises: GradscaleError if both are given, one is not positive, or probes are fewer than 1; as `trace_samples`.
    Source: Hutchinson (1990), Commun. Stat. Simul. Comput. 19; Girard (1989), Numer. Math. 56.
    """
    if stderr is not None and relative is not None:
        raise GradscaleError(f"stderr or relative must be given, got both, {stderr} and {relative}; leave out one")
    if not all(asked is None or asked > 0 for asked in (stderr, relative)):
        raise GradscaleError(f"a requested standard error must be positive, got {stderr or relative}; 1 % is usual")
    if max_probes < 1:
        raise GradscaleError(f"max_probes must be at least 1, got {max_probes}; 100 is usual")
    parts: list[TraceSamples] = []
    while sum(len(part.probe) for part in parts) < max_probes:
        taken = sum(len(part.probe) for part in parts)
        parts.append(trace_samples(operator, probes, range(taken, min(taken + together, max_probes)), groups, together))
        if on_samples is not None:
            on_samples(parts[-1])
        found = trace(merge_samples(parts))
        asked = stderr if stderr is not None else (relative or 0.0) * abs(found.value)
        if found.n >= max(2, min_probes) and (stderr or relative) and found.stderr <= asked:
            break
    return merge_samples(parts)


def trace(samples: TraceSamples) -> TraceEstimate:
    """tr A = E v^T A v. The variance of a sample is 2 |A|_F^2, with random signs 2 (|A|_F^2 - sum_i A_ii^2)."""
    return mean_of_samples(samples.quadratic)


def group_traces(samples: TraceSamples) -> dict[str, TraceEstimate]:
    """tr A_gg of every group."""
    return {name: mean_of_samples(samples.by_group[:, g]) for g, name in enumerate(samples.groups)}


def frobenius_sq(samples: TraceSamples) -> TraceEstimate:
    """|A|_F^2 = E |A v|^2, unbiased for the operator as it is: one that is itself a sample's has the sample's noise."""
    return mean_of_samples(samples.square)


def frobenius(samples: TraceSamples) -> TraceEstimate:
    """|A|_F, with the error of `frobenius_sq` by the delta method."""
    square = frobenius_sq(samples)
    root = math.sqrt(square.value)
    return square._replace(value=root, stderr=square.stderr / (2 * root) if root else 0.0)


def expected_norm(samples: TraceSamples) -> TraceEstimate:
    """E |A g| of a standard normal g, between sqrt(2 / pi) |A|_F and |A|_F: the Gaussian width of the ellipsoid A B(1).

    Raises: GradscaleError if the probes are not Gaussian.
    """
    if samples.kind != "gaussian":
        raise GradscaleError(f"probes of E |A g| must be gaussian, got {samples.kind}; draw Gaussian ones")
    return mean_of_samples(np.sqrt(samples.square))


def _batch(operator: Operator, probes: Probes, ids: range, groups: Mapping[str, range]) -> TraceSamples:
    vectors = probes(ids)
    products = operator.products(vectors)
    here = operator.here
    ranges = [here, *(range(max(g.start, here.start), min(g.stop, here.stop)) for g in groups.values())]
    sums = [_sums(vectors, products, range(e.start - here.start, e.stop - here.start)) for e in ranges]
    own = _sums(products, products, range(len(here)))
    found = operator.all_sum(torch.stack([own, *sums], dim=1)).cpu().numpy()
    if not np.isfinite(found).all():
        row = int(np.argwhere(~np.isfinite(found))[0, 0])
        raise GradscaleError(
            f"product of probe {ids[row]} must be finite, got squared length {found[row, 0]}; look for the example "
            "whose loss or gradient is not, or measure in float32"
        )
    numbers = np.arange(ids.start, ids.stop, dtype=np.int64)
    return TraceSamples(probes.kind, tuple(groups), numbers, found[:, 1], found[:, 2:], found[:, 0])


def _sums(left: Tensor, right: Tensor, entries: range) -> Tensor:
    """[k] float64: inner products of rows over the entries here, before they are summed over processes."""
    total = torch.zeros(len(left), dtype=torch.float64, device=left.device)
    if len(entries):
        a, b = left[:, entries.start : entries.stop], right[:, entries.start : entries.stop]
        for block in column_blocks(a, 2 * len(a)):
            total += (a[:, block].double() * b[:, block].double()).sum(dim=1)
    return total
