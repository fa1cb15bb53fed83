"""The Hessian of a live DeepSpeed engine, ZeRO-0 to 3, as an operator of which each rank holds its slice of a vector.

Shapes: P entries in all, p of them here, B examples of a batch, n of all batches and ranks, k vectors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradscale.curvature.backends import DOUBLE_BACKWARD, Choice, FiniteDifferences
from gradscale.curvature.calibrate import QUANTITIES
from gradscale.curvature.layout import Layout, Part
from gradscale.curvature.processes import all_summed
from gradscale.errors import GradscaleError
from gradscale.grads.modes import check_mode
from gradscale.run.engine_calibrate import calibrated, differences, global_norm
from gradscale.run.engine_check import engine_self_test
from gradscale.run.engine_losses import Batches, Losses, RankLosses, Share, counted
from gradscale.run.engine_order import NamedProbes, Order
from gradscale.run.engine_partitions import Partitions
from gradscale.run.engine_replicas import Replicas

PRECISIONS = ("auto", "master", "weights")
BACKENDS = ("auto", DOUBLE_BACKWARD.name, FiniteDifferences.name)
_TOGETHER = 8  # vectors that share a graph, and are held in float64
_TORCHS = (RuntimeError, NotImplementedError)  # on all ranks alike; a GradscaleError is neither


@dataclass(frozen=True, eq=False)
class EngineHessian:
    """v -> H v, H the Hessian of the mean loss over the examples of all ranks' batches. Made by `engine_hessian`.

    All ranks call `products` alike. Status: identity by double backward, estimator by finite differences, up to
    `choice.error` in both.
    """

    weights: Replicas | Partitions
    share: Share
    choice: Choice
    error: float  # estimated, relative, of a product as a vector; `choice.error` is that of the quantity

    @property
    def size(self) -> int:
        return self.order.size

    @property
    def here(self) -> range:
        return self.order.here(dist.get_rank())

    @property
    def order(self) -> Order:
        """Which entry belongs to which parameter; `order.groups()` for `trace_samples`, then `by_parameter`."""
        return self.weights.order

    @property
    def layout(self) -> Layout:
        """The parameters with gradients, by name and shape."""
        return self.weights.layout

    @property
    def parts(self) -> tuple[Part, ...]:
        """What this rank's slice holds of which parameter."""
        return self.order.slices[dist.get_rank()]

    @property
    def n(self) -> int:
        return self.share.n

    @property
    def status(self) -> str:
        return "estimator" if isinstance(self.choice.backend, FiniteDifferences) else "identity"

    def probes(self, seed: int = 0, kind: str = "gaussian", dtype: torch.dtype = torch.float32) -> NamedProbes:
        """Random vectors that are the same in every weight under every ZeRO stage and number of ranks."""
        return NamedProbes(self.parts, seed, kind, dtype, str(self.weights.losses.device))

    def products(self, vectors: Tensor) -> Tensor:
        """Raises: GradscaleError if the vectors are not slices [k, p], or the weights not their masters, rounded."""
        if vectors.dim() != 2 or vectors.shape[1] != len(self.here) or not vectors.is_floating_point():
            raise GradscaleError(
                f"vectors must be float32 or float64 of shape (k, {len(self.here)}), got {vectors.dtype} of shape "
                f"{tuple(vectors.shape)}; pass the slice operator.here of each"
            )
        self.weights.check()
        return self.products_of(vectors, self.share, None)

    def all_sum(self, parts: Tensor) -> Tensor:
        return all_summed(parts)

    def products_of(self, vectors: Tensor, share: Share, shift: Tensor | None) -> Tensor:
        """[k, p]: over other examples, at the weights plus `shift` [p]."""
        found = torch.empty_like(vectors)
        for part, result in zip(vectors.split(_TOGETHER), found.split(_TOGETHER), strict=True):
            result.copy_(_multiplied(self.weights, self.choice, part, share, shift))
        return found


def engine_hessian(
    engine: Any,
    losses: Losses,
    batches: Batches,
    backend: str = "auto",
    quantity: str = "vector",
    seed: int = 0,
    precision: str = "auto",
) -> EngineHessian:
    """The Hessian of `losses(module, batch)` [B] on the engine's weights as they are; all ranks call it alike.

    `batches` are this rank's part of the data, read again at every product. Under ZeRO-0, 1 and 2 products are by
    double backward where the model has one; otherwise, and under ZeRO-3, by central differences of gradients, whose
    step is calibrated for `quantity` on the first batch of every rank. Then the operator is tested: symmetric, the same
    twice, of these weights.

    With `precision` "master" a model of low-precision weights is computed in float32 at their masters, where its loss
    has derivatives that differences can show; with "weights" as in training, by differences of the rounded copies,
    which are good for eigenvalues at the top of large models only. "auto" is the first that the model allows.

    Training goes on as if nothing had been: weights come back bit for bit, gradients that wait for a step and the
    optimizer are not touched. Losses are computed with `engine.module` (never by `engine(...)`), which must be in eval
    mode where that makes a difference; reentrant checkpointing is refused by torch.

    Cost: by double backward two to three forward and backward passes a product and P numbers of float64 a vector on
    every rank; by differences two, and under ZeRO-3 no more than p numbers a vector.

    Raises: GradscaleError for an engine, a backend, losses or batches that do not serve, and if the test fails.
    """
    if backend not in BACKENDS:
        raise GradscaleError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if precision not in PRECISIONS:
        raise GradscaleError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if backend == DOUBLE_BACKWARD.name and precision == "weights":
        raise GradscaleError(
            f"precision must be master for {backend}, got 'weights'; low-precision copies have differences only"
        )
    if quantity not in QUANTITIES:
        raise GradscaleError(f"quantity must be one of {', '.join(QUANTITIES)}, got {quantity!r}")
    weights = _weights_of(engine, losses)
    if isinstance(weights, Partitions) and backend == DOUBLE_BACKWARD.name:
        raise GradscaleError(
            f"backend must be {FiniteDifferences.name} under ZeRO-3, which lets go of weights that a second backward "
            f"pass needs, got {backend!r}; leave it at auto, or load a checkpoint under ZeRO-2"
        )
    weights.check()
    share, first = counted(weights.losses, batches)
    weights, choice, error = _choose(weights, first, _Asked(backend, quantity, precision), seed)
    operator = EngineHessian(weights, share, choice, error)
    engine_self_test(operator, first, seed)
    return operator


def _multiplied(
    weights: Replicas | Partitions, choice: Choice, vectors: Tensor, share: Share, shift: Tensor | None
) -> Tensor:
    """[k, p] float64."""
    if isinstance(choice.backend, FiniteDifferences):
        return torch.stack([differences(weights, share, vector, choice.backend.eps, shift) for vector in vectors])
    assert isinstance(weights, Replicas)
    return weights.products(share, vectors, shift)


class _Asked(NamedTuple):
    backend: str
    quantity: str
    precision: str


def _choose(
    weights: Replicas | Partitions, first: Share, asked: _Asked, seed: int
) -> tuple[Replicas | Partitions, Choice, float]:
    """The first way that the model allows: the weights with its precision, the way, and the error of a product."""
    parts = weights.order.slices[dist.get_rank()]
    random = NamedProbes(parts, seed, device=str(weights.losses.device))(range(2)).double()
    refused: dict[str, str] = {}
    if isinstance(weights, Replicas) and asked.backend != FiniteDifferences.name and asked.precision != "weights":
        try:
            made = weights.products(first, random)
        except _TORCHS as problem:
            if asked.backend == DOUBLE_BACKWARD.name:
                raise _impossible(f"backend {asked.backend}", problem) from problem
            refused[DOUBLE_BACKWARD.name] = _line(problem)
        else:
            crossed, scale = all_summed(torch.stack([random[0] @ made[1], random[1] @ made[0]])), global_norm(made)
            error = float(crossed.diff().abs()) / scale if scale else 0.0
            return weights, Choice(DOUBLE_BACKWARD, error, refused), error
    if asked.precision != "weights":
        try:
            step = calibrated(weights, first, random)[asked.quantity]
            return weights, Choice(FiniteDifferences(step.eps), step.error, refused), step.vector
        except _TORCHS as problem:
            if asked.precision == "master":
                raise _impossible("precision master", problem) from problem
            refused[f"{FiniteDifferences.name} at the masters"] = _line(problem)
    weights = replace(weights, wide=False)
    if weights.dtype == torch.float16:
        raise GradscaleError(
            "weights must be float32, float64 or bfloat16 for finite differences, got torch.float16, in which "
            "gradients vanish; take precision master"
        )
    step = calibrated(weights, first, random)[asked.quantity]
    return weights, Choice(FiniteDifferences(step.eps), step.error, refused), step.vector


def _impossible(what: str, problem: BaseException) -> GradscaleError:
    return GradscaleError(f"{what} must be possible for the model, got {_line(problem)}; leave it at auto")


def _line(problem: BaseException) -> str:
    return f"{problem}".strip().splitlines()[0][:200]


def _weights_of(engine: Any, losses: Losses) -> Replicas | Partitions:
    missing = [name for name in ("module", "zero_optimization_stage", "dp_world_size") if not hasattr(engine, name)]
    if missing or not dist.is_initialized():
        raise GradscaleError(
            f"engine must be what deepspeed.initialize returns, got {type(engine).__name__}; pass its first value"
        )
    if engine.dp_world_size != dist.get_world_size():
        raise GradscaleError(
            f"ranks must all be data parallel, got {engine.dp_world_size} of {dist.get_world_size()}; tensor, pipeline "
            "and sequence parallel engines are not supported"
        )
    try:
        check_mode(engine.module)
    except GradscaleError as problem:
        raise GradscaleError(f"{problem}: for an engine, call engine.module.eval() first") from problem
    parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    partitioned = engine.zero_optimization_stage() == 3
    shared = RankLosses(engine, losses, lockstep=partitioned)
    return Partitions(shared, parameters) if partitioned else Replicas(shared, parameters)
