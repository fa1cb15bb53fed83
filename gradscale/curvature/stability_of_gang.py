"""What a gang finds out for the stability report: forms and products of each process's own examples, probes of all.

Shapes: n examples, P entries in all, p of them here, N probes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from gradscale.curvature.example_products import example_quadratics, sampled_ids, sampled_products
from gradscale.curvature.lanczos import Ritz
from gradscale.curvature.probes import FlatProbes
from gradscale.curvature.processes import Sharded, gathered
from gradscale.curvature.share import MeanPart
from gradscale.curvature.stability_at_scale import Known, ScaleReport, stability_at_scale
from gradscale.curvature.stability_inputs import leading_pair, mean_over_sample, quadratic_moments
from gradscale.curvature.trace import trace_samples

_PROBES = 8  # of the traces in bound (16)
_OWN_PROBES = 2  # of every sampled example: fewer would not tell their error


def stability_of_gang(
    operator: Sharded,
    ritz: Ritz,
    population: int,
    examples: int,
    eta: float,
    batch_size: int,
    momentum: float,
    sample: int,
    seed: int,
) -> ScaleReport:
    """`stability_at_scale` of the operator's leading pair, which `ritz` has in slices.

    `population`: the examples of the training set, `examples` those of the operator. Of `sample` of these (0: of none)
    come the squared norms of the bound (16). Cost: a quadratic form of every example, nine forward passes a microbatch;
    8 products; and one product of two vectors for each sampled example. Called by all processes alike.
    Raises: GradscaleError as `stability_at_scale`, `example_quadratics` and `trace_samples`.
    """
    part = operator.part
    assert isinstance(part, MeanPart)
    vector = ritz.vectors[:1]
    along = squares = traces = None
    if not momentum:
        whole = gathered(vector, operator.size, operator.group)  # by all processes, also those without examples
        forms = [example_quadratics(own, whole, seed=seed) for own in part.operators()]
        values = [found.values[:, 0] for found in forms] or [vector.new_zeros(0, dtype=torch.float64)]
        error = _largest(operator, max([0.0, *(found.error for found in forms)]), vector.device)
        along = quadratic_moments(operator, torch.cat(values), error)
    if sample and not momentum:
        probes = FlatProbes(operator.here, seed, "rademacher", vector.dtype, str(vector.device))
        traces = trace_samples(operator, probes, range(_PROBES))
        chosen = sampled_ids(range(examples), min(sample, examples), seed)
        rows = [vector.new_zeros(0, _OWN_PROBES, dtype=torch.float64)]
        for own in part.operators():
            ids = [i for i in chosen if i in own.stream.ids]
            rows += [sampled_products(own, ids, probes=_OWN_PROBES, seed=seed).squares] if ids else []
        squares = mean_over_sample(operator, torch.cat(rows), examples)
    known = Known(population, examples, leading_pair(ritz), along=along, traces=traces, squares=squares)
    return stability_at_scale(known, eta, batch_size, momentum)


def _largest(operator: Sharded, value: float, device: torch.device) -> float:
    """Of all processes' numbers."""
    rank, world = dist.get_rank(operator.group), dist.get_world_size(operator.group)
    own = torch.zeros(world, dtype=torch.float64, device=device)
    own[rank] = value
    return float(operator.all_sum(own).max())
