"""Coherence from batch gradients, for models whose examples have no gradient of their own: BatchNorm in training mode.

No run: one process, no files, no hooks. Shapes: m examples in batches of k, P entries of one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from gradscale.errors import GradscaleError
from gradscale.grads.coverage import select_parameters
from gradscale.grads.modes import check_dropout
from gradscale.grads.readings import GradientSums
from gradscale.grads.subject import Subject, load_batch
from gradscale.measures.coherence import alpha
from gradscale.measures.measure import Estimate, Estimates, MicroBatch
from gradscale.measures.moments import Moments, MomentsState, MomentsStatistic, jackknife, moments
from gradscale.run.check import autograd
from gradscale.run.memory import explaining_memory
from gradscale.run.plan import check_positive
from gradscale.task import Task


def batch_coherence(
    task: Task,
    checkpoint: str | None = None,
    batch_size: int = 32,
    params: str | None = None,
    exclude: Sequence[str] = (),
    blocks: int = 20,
    device: str = "cpu",
) -> Estimates:
    """Coherence at one checkpoint from the gradients of the mean losses of disjoint batches of k = `batch_size`.

    `beta` = |mean g_b|^2 / mean |g_b|^2 over the batches b: the coherence of batch gradients. `alpha`, the coherence of
    the m examples that they hold, from it: if every g_b is the mean of its k examples' gradients and the batches are a
    random partition of the m, then E mean |g_b|^2 = q (rho + (1 - rho) alpha), rho = (m - k) / (k (m - 1)), and so

        alpha = beta rho / (1 - beta + beta rho)

    exactly if the mean over b is that over all partitions. (The inversion beta / (k - (k - 1) beta) of the literature
    is for independent batches; it is off by O(k / m).) Under batch statistics an example has no gradient of its own:
    there alpha is that of examples of which the g_b would be means, status `conditional`. n counts batches for `beta`,
    examples for `alpha`.

    Batches are consecutive examples: shuffle a sorted dataset. The last ones that do not fill a batch are left out, and
    so are batches whose loss or gradient is not finite. The model is measured in the mode that the task gives it,
    batch statistics allowed, dropout not; its buffers are left as they were. Standard errors: delete-one-block
    jackknife over at most `blocks` blocks of batches, as samples of a population. Scopes `all` and `layer:<parameter>`.

    Cost: one plain forward and backward pass; `blocks` P numbers in float64.
    Raises: GradscaleError if there are not two full batches, or dropout is active.
    Source: Chatterjee and Zielinski (2022), arXiv 2203.10036, for beta; the inversion is derived here.
    """
    check_positive(batch_size=batch_size, blocks=blocks)
    model = task.model(checkpoint)
    check_dropout(model)
    model = model.to(device)
    subject = Subject(task, model, task.examples(), select_parameters(model, params, exclude), ())
    count = len(subject.examples) // batch_size
    if count < 2:
        raise GradscaleError(
            f"batch_size must be at most half the number of examples, {len(subject.examples)}, got {batch_size}; take "
            "smaller batches, or more examples"
        )
    statistic = MomentsStatistic()
    state = statistic.init()
    with _buffers_kept(model):
        for b in range(count):
            with explaining_memory(batch_size):
                batch = _batch_gradient(subject, range(b * batch_size, (b + 1) * batch_size))
            if batch is not None:
                state = statistic.update(state, batch._replace(block=b * min(blocks, count) // count))
    return _estimates(state, batch_size)


def example_coherence(beta: float, batches: float, batch_size: int) -> float:
    """The coherence of m = batches k examples in a partition into batches of k whose gradients have coherence beta.

    NaN where there is one batch: its coherence is 1, whatever that of its examples is.
    """
    m, k = batches * batch_size, batch_size
    if batches < 2:
        return math.nan
    rho = (m - k) / (k * (m - 1))
    return beta * rho / (1 - beta + beta * rho)


def _batch_gradient(subject: Subject, ids: range) -> MicroBatch | None:
    """The gradient of the mean loss of the examples `ids` in the place of one example's; None if it is not finite."""
    found = autograd(subject, load_batch(subject, ids))
    means = {name: total / len(ids) for name, total in found.sums.items()}
    sq_norms = torch.stack([mean.square().sum() for mean in means.values()])
    loss = found.losses.mean()
    if not bool(sq_norms.sum().isfinite() & loss.isfinite()):
        return None
    return MicroBatch(
        torch.tensor([ids.start], device=subject.device),
        loss[None],
        None,
        tuple(means),
        sq_norms[None],
        {GradientSums(): {None: means}},
        {},
        0,
    )


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Running statistics, which a pass in training mode moves, are put back."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])


def _estimates(state: MomentsState, batch_size: int) -> Estimates:
    """Raises: GradscaleError if fewer than two batches are finite."""
    finite = sum(int(count) for count in state.counts.values())
    if finite < 2:
        raise GradscaleError(
            f"at least two batches must have a finite loss and gradient, got {finite}; look for the examples by "
            "measuring the model in eval mode, or take smaller batches"
        )
    found: dict[tuple[str, str], Estimate] = {}
    for scope, parts in moments(state).items():
        found |= {(name, scope): estimate for name, estimate in _both(parts, batch_size)}
    return found


def _both(parts: Moments, batch_size: int) -> Iterator[tuple[str, Estimate]]:
    def inverted(batches: float, q: float, norm: float) -> float:
        return example_coherence(alpha(batches, q, norm), batches, batch_size)

    about = f"batch_size={batch_size}/v1"
    yield "beta", Estimate(*jackknife(parts, alpha), parts.n, "estimator", f"batch_coherence/beta/{about}", "1")
    definition = f"batch_coherence/alpha/finite partition/{about}"
    yield "alpha", Estimate(*jackknife(parts, inverted), parts.n * batch_size, "conditional", definition, "1")
