"""Which pass the products of gradients with Gaussian probes come from, settled once, when a run is planned.

The backward pass forms every gradient, tile by tile, and multiplies it with all probes; forward mode forms none and
takes a pass for each probe. The choice depends on shapes alone, and on whether the model can be differentiated forward,
never on who works: a plan records it.

Shapes: B examples of a microbatch, P entries of all parameters, N probes, T positions of an example.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gradscale.errors import GradscaleError
from gradscale.grads.functional import differentiable_attention
from gradscale.grads.layer import LayerGrads
from gradscale.grads.readings import Projected
from gradscale.grads.subject import Subject, load_batch, read_batch
from gradscale.grads.sweep import Request, read
from gradscale.measures.measure import Statistic
from gradscale.run.forward import forward_products, probes_in
from gradscale.run.memory import is_out_of_memory
from gradscale.run.shard import needs_of
from gradscale.sketches.blocks import entries_kept
from gradscale.sketches.gaussian import TOGETHER, GaussianProbes

WAYS = ("auto", "backward", "forward")
_EXAMPLES = 4
_NORMAL_COST = 1500  # multiply-adds as long as one normal from its counter: 80 to 100 ns, once, on a CPU
_PASS_COST = 3.5  # a pass with a tangent, in forward passes: 3.0 and 3.7, of one measurement each


class Choice(NamedTuple):
    way: str  # backward or forward
    why: str


def check_probe_products(way: str) -> str:
    """Raises: GradscaleError if there is no such way."""
    if way not in WAYS:
        raise GradscaleError(f"probe_products must be one of {', '.join(WAYS)}, got {way!r}")
    return way


def choose(
    asked: str, subject: Subject, statistics: Sequence[Statistic[Any]], microbatch: int, shard_size: int
) -> Choice:
    """The way to take products with the probes of `statistics`. Cost: a forward pass, and a check if it is forward.

    Raises: GradscaleError if forward mode is asked for and there are no probes, or the model does not allow it.
    """
    probes = list(probes_in(needs_of(statistics, None)).values())
    if check_probe_products(asked) == "forward" and not probes:
        raise GradscaleError(
            "probe_products must come with a measure that has probes, got forward without one; add gaussian_width to "
            "the measures"
        )
    if not probes:
        return Choice("backward", "no measure has probes")
    if asked == "backward":
        return Choice("backward", "as asked for")
    ids = range(min(_EXAMPLES, microbatch, len(subject.examples)))
    if asked == "auto":
        against = _against_forward(subject, ids, sum(p.dim for p in probes), microbatch, shard_size)
        if against is not None:
            return Choice("backward", against)
    try:
        check_forward(subject, ids, probes[0])
    except (GradscaleError, RuntimeError) as error:  # torch's own errors too: the backward pass has gone through
        if asked == "forward" or is_out_of_memory(error):
            raise
        return Choice("backward", f"forward mode would be cheaper, but {str(error).splitlines()[0]}")
    return Choice("forward", "as asked for" if asked == "forward" else "cheaper by these shapes")


def forward_is_cheaper(entries: int, batch: int, positions: float, probes: int, kept: int, batches: int) -> bool:
    """Compare the multiply-adds of N products of each of B P-entry gradients, for one microbatch.

    Backward, beside the pass that a run makes anyway: T B P for the gradients' tiles, N B P for the products, and the
    normals that are not among the `kept` ones. Forward: N passes of some 3.5 T B P, and the same normals, made once for
    the `batches` of a shard. `entries` is P; `positions` is T.

    So forward mode wins only where the probes outgrow what is kept, and T is small.
    """
    pass_ = positions * batch * entries
    normals = _NORMAL_COST * max(0, probes * entries - kept)
    return _PASS_COST * probes * pass_ + normals / batches < pass_ + probes * batch * entries + normals


def check_forward(subject: Subject, ids: range, probes: GaussianProbes) -> None:
    """Hold forward mode to the backward pass on the examples `ids`, which should be few, with the first few `probes`.

    Raises: GradscaleError if they differ: the model cuts its graph, or an operation's forward derivative is wrong.
    """
    first = _First(GaussianProbes(min(TOGETHER, probes.dim), probes.seed))
    batch = load_batch(subject, ids)
    forward = forward_products(subject, [batch], first.probes)
    readings = read_batch(subject, batch, frozenset({Projected(first)}))
    backward = readings.projections[Projected(first)]
    eps = max(torch.finfo(parameter.dtype).eps for parameter in subject.parameters.values())
    allowed = 4 * eps**0.5 * readings.sq_norms.sum(dim=1).sqrt()  # of a product's size, which is |g_b|
    wrong = ~((forward - backward).abs() <= allowed[:, None]).all(dim=1) & readings.finite
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise GradscaleError(
            f"forward mode must give the products of the backward pass, got {float(forward[row, 0]):.6g} for "
            f"{float(backward[row, 0]):.6g} on example {ids[row]}; the model computes something under torch.no_grad() "
            "or in a reentrant checkpoint: take the products from the backward pass, --probe-products backward"
        )


def mean_positions(subject: Subject, ids: range) -> float:
    """T: the multiply-adds of a forward pass for each example and measured entry, at least 1.

    Counted by torch from shapes, on the examples `ids`. Of a language model whose parameters are all measured, the
    tokens of a sequence, more or less: embeddings are used without any, attention has some of its own.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad(), differentiable_attention():
        subject.task.losses(subject.model, load_batch(subject, ids))
    products = int(counter.get_total_flops()) / 2
    return max(1.0, products / (len(ids) * _entries(subject)))


def _against_forward(subject: Subject, ids: range, probes: int, microbatch: int, shard_size: int) -> str | None:
    """Why products should not come from forward mode; None if it is the cheaper way."""
    narrow = {parameter.dtype for parameter in subject.parameters.values()} - {torch.float32, torch.float64}
    if narrow:
        return f"forward mode would round the probes to {', '.join(sorted(map(str, narrow)))}"
    examples = len(subject.examples)
    batch, batches = min(microbatch, examples), -(-min(shard_size, examples) // microbatch)
    positions = mean_positions(subject, ids)
    if forward_is_cheaper(_entries(subject), batch, positions, probes, entries_kept(), batches):
        return None
    return "cheaper by these shapes"


def _entries(subject: Subject) -> int:
    return sum(parameter.numel() for parameter in subject.parameters.values())


@dataclass(frozen=True)
class _First:
    """A few probes as forward mode has them, for the backward pass: what the check makes and keeps, a run needs too."""

    probes: GaussianProbes

    @property
    def dim(self) -> int:
        return self.probes.dim

    def apply(self, parameter: str, grads: LayerGrads) -> Tensor:
        """[B, N] float64"""
        block = self.probes.columns(parameter, 0, self.dim, math.prod(grads.shape[1:]), grads.device)
        total = torch.zeros(grads.shape[0], self.dim, dtype=torch.float64, device=grads.device)
        read(grads, Request(None, (), ((lambda start, stop: block[start:stop], total),)))
        return total
