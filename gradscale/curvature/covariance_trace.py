"""The trace of the covariance of gradients, exact: no probes are needed where every gradient is read.

Shapes: n examples, P entries, L parameters.
"""

from __future__ import annotations

import torch

from gradscale.curvature.gradient_covariance import not_finite
from gradscale.curvature.layout import Layout
from gradscale.curvature.processes import reduce_scattered
from gradscale.curvature.products import add_gradients
from gradscale.curvature.share import ShardedCovariance
from gradscale.grads.readings import SquaredNorms
from gradscale.grads.subject import read_batch


def covariance_traces(operator: ShardedCovariance, layout: Layout, device: torch.device) -> dict[str, float]:
    """Of every parameter: (1 / (n - 1)) (sum_i |g_i|^2 - n |g|^2), g the mean gradient of all processes' examples.

    Status: identity. Cost: a pass for the norms of the examples' gradients, and one for their sum.
    Raises: GradscaleError naming the first example whose loss or gradient is not finite.
    """
    n, share = operator.examples, operator.share
    squares = torch.zeros(len(layout.names), dtype=torch.float64, device=device)
    total = torch.zeros(1, layout.size, dtype=torch.float64, device=device)
    if share is not None:
        for microbatch in share:
            readings = read_batch(share.subject, microbatch.batch, frozenset({SquaredNorms()}))
            if not bool(readings.finite.all()):
                raise not_finite(microbatch.ids[int((~readings.finite).nonzero()[0])], "gradient")
            squares += readings.sq_norms.sum(dim=0)
        add_gradients(share, total[0].split(layout.sizes), 1 / n)
    mean = reduce_scattered(total, operator.group)[0]
    lengths = torch.zeros_like(squares)
    for name, _, place in layout.parts(operator.here):
        lengths[layout.names.index(name)] = mean[place].square().sum()
    traces = (operator.all_sum(squares) - n * operator.all_sum(lengths)) / (n - 1)
    return dict(zip(layout.names, traces.tolist(), strict=True))
