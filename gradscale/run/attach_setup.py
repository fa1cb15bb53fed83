"""What `attach` measures, settled before the first step and the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradscale.errors import GradscaleError
from gradscale.grads.coverage import Site, describe, select_parameters, sites
from gradscale.grads.packing import Packing, packing_of
from gradscale.grads.readings import GradientSums, Reading, passes
from gradscale.grads.rules import is_fast
from gradscale.grads.rules.linear import conv1d, embedding, linear
from gradscale.grads.rules.norms import layer_norm, rms_norm
from gradscale.measures.measure import Gathering, Measure, Observation, Statistic
from gradscale.measures.settings import check_measures
from gradscale.run.fold import statistics_of
from gradscale.run.plan import check_positive
from gradscale.run.shard import needs_of
from gradscale.sketches import BoundSketch, Sketch
from gradscale.store.narrow import check_dtype

COLUMNS = ("loss", "grad_sq_norm", "layer_sq_norms")
_WITHOUT_WEIGHTS = frozenset({linear, conv1d, embedding, layer_norm})  # rules that never look at a weight
_TOKEN_WISE = _WITHOUT_WEIGHTS | {rms_norm}


class Inputs(NamedTuple):
    """What the engine's module is called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


Losses = Callable[[Any, Inputs], Tensor]
Labels = Callable[[Inputs], Tensor]
Boundaries = Callable[[Inputs], Tensor]


@dataclass(frozen=True, eq=False)
class Setup:
    """Settings only. `parameters` have the shape, type and device of the engine's, and no memory."""

    engine: Any
    measures: tuple[Measure, ...]
    every: int
    parameters: Mapping[str, Tensor]
    rules: Mapping[str, str]  # by parameter
    sites: tuple[Site, ...]
    params: str | None
    excluded: tuple[str, ...]
    sketch: BoundSketch | None
    sketch_dtype: str
    seed: int
    batch_size: Callable[[Inputs], int]
    losses: Losses | None
    labels: Labels | None
    boundaries: Boundaries | None
    columns: tuple[str, ...]  # of the rows that are filled

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self.engine.module
        return module

    @property
    def device(self) -> torch.device:
        return torch.device(self.engine.device)

    @property
    def ranks(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def statistics(self) -> list[Statistic[Any]]:
        return statistics_of(self.measures)

    @property
    def needs(self) -> frozenset[Reading]:
        return needs_of(self.statistics, self.sketch)

    def packing(self, inputs: Inputs) -> Packing | None:
        return None if self.boundaries is None else packing_of(self.boundaries(inputs))

    def rows(self, inputs: Inputs, packing: Packing | None) -> int:
        """How many rows a microbatch has: its examples, where it is not packed."""
        return self.batch_size(inputs) if packing is None else packing.shape[0]


def prepared(
    engine: Any,
    measures: Sequence[Measure],
    every: int,
    params: str | None,
    exclude: Sequence[str],
    batch_size: Callable[[Inputs], int] | None,
    losses: Losses | None,
    labels: Labels | None,
    boundaries: Boundaries | None,
    columns: Sequence[str],
    sketch_dtype: str,
    seed: int,
    sketch: Sketch | None,
) -> Setup:
    """Raises: GradscaleError for what cannot be measured."""
    check_positive(every=every)
    _check_engine(engine)
    measured = check_measures(measures)
    chosen = select_parameters(engine.module, params, exclude)
    device = torch.device(engine.device)
    parameters = {name: _stand_in(parameter, device) for name, parameter in chosen.items()}
    found = sites(engine.module, chosen)
    _check_sites(found, int(engine.zero_optimization_stage()), packed=boundaries is not None)
    setup = Setup(
        engine,
        measured,
        every,
        parameters,
        {row.name: row.rule for row in describe(found, chosen).parameters},
        found,
        params,
        tuple(exclude),
        sketch.bind({name: p.numel() for name, p in parameters.items()}) if sketch is not None else None,
        check_dtype(sketch_dtype),
        seed,
        batch_size or first_dimension,
        losses,
        labels,
        boundaries,
        _checked_columns(columns),
    )
    _check_measures(setup)
    return setup


def first_dimension(inputs: Inputs) -> int:
    """Of the first tensor that has one. Raises: GradscaleError if there is none."""
    for leaf in pytree.tree_leaves((inputs.args, dict(inputs.kwargs))):
        if isinstance(leaf, Tensor) and leaf.dim():
            return len(leaf)
    raise GradscaleError("the engine must be called with a tensor of a row for each example, got none; pass batch_size")


def checked_losses(found: object, size: int) -> Tensor:
    """[B] float64. Raises: GradscaleError if they are not one for each example."""
    if not isinstance(found, Tensor) or found.shape != (size,) or not found.is_floating_point():
        raise GradscaleError(f"losses must be one for each of {size} examples, got {_kind(found)}; do not reduce them")
    return found.detach().double()


def checked_labels(found: object, size: int) -> Tensor:
    """[B] int64. Raises: GradscaleError if they are not one integer for each example."""
    if not isinstance(found, Tensor) or found.shape != (size,) or found.is_floating_point():
        raise GradscaleError(f"labels must be one integer for each of {size} examples, got {_kind(found)}; see Inputs")
    return found.detach().long()


def _checked_columns(columns: Sequence[str]) -> tuple[str, ...]:
    unknown = [name for name in columns if name not in COLUMNS]
    if isinstance(columns, str) or unknown:
        raise GradscaleError(
            f"columns must be some of {', '.join(COLUMNS)}, got {columns!r}; labels and sketches are stored wherever "
            "there are any"
        )
    return tuple(name for name in COLUMNS if name in columns)


def _kind(found: object) -> str:
    return f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__


def _stand_in(parameter: nn.Parameter, device: torch.device) -> Tensor:
    """A parameter's shape, whole also where it is partitioned, its type and the device of its gradient."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    return torch.empty((), dtype=parameter.dtype, device=device).expand(shape)


def _check_engine(engine: Any) -> None:
    missing = [name for name in ("backward", "step", "module", "micro_steps") if not hasattr(engine, name)]
    if missing:
        raise GradscaleError(
            f"engine must be one of deepspeed.initialize, got {type(engine).__name__} without {missing[0]}; attach to "
            "what it returns first"
        )
    if not getattr(engine, "managed_gradient_accumulation", lambda: True)():
        raise GradscaleError("managed_gradient_accumulation must be on, got it off; leave it out of the settings")
    world = dist.get_world_size() if dist.is_initialized() else 1
    parallel = int(engine.dp_world_size)
    if parallel != world or getattr(engine, "has_moe_layers", False):
        kind = f"{parallel} replicas on {world} ranks" if parallel != world else "expert-parallel layers"
        raise GradscaleError(f"the training must be data-parallel alone, got {kind}; measure its checkpoints instead")


def _check_sites(found: Sequence[Site], stage: int, packed: bool) -> None:
    for site in found:
        names, training = ", ".join(site.parameters.values()), site.module.training
        if isinstance(site.module, nn.modules.batchnorm._BatchNorm) and training:
            raise GradscaleError(
                f"BatchNorm {site.name} must be in eval mode, got batch statistics, under which an example has no "
                "gradient of its own; measure its checkpoints instead"
            )
        if not is_fast(site.rule) and training and _draws(site.module):
            raise GradscaleError(
                f"dropout in module {site.name} must be off, got it active in a module that has to be run again, which "
                f"would draw other numbers; set it to 0, or leave {names} out by params"
            )
        if stage == 3 and site.rule not in _WITHOUT_WEIGHTS:
            raise GradscaleError(
                f"parameters under ZeRO-3 must be of Linear, Conv1D, Embedding or LayerNorm, got {names} of module "
                f"{site.name}, whose rule reads weights that are not there; leave it out by params or exclude"
            )
        if packed and site.rule not in _TOKEN_WISE:
            raise GradscaleError(
                f"parameters of packed batches must be of Linear, Conv1D, Embedding, LayerNorm or RMSNorm, got {names} "
                f"of module {site.name}, which may mix the examples of a row; leave it out by params or exclude"
            )


def _draws(module: nn.Module) -> bool:
    return any(
        float(getattr(each, name, 0) or 0) > 0
        for each in module.modules()
        for name in (["p"] if isinstance(each, nn.modules.dropout._DropoutNd) else ["dropout"])
        if isinstance(getattr(each, name, 0), int | float)
    )


def _check_measures(setup: Setup) -> None:
    for measure in setup.measures:
        needs = statistics_of([measure])[0].needs
        if any(isinstance(need, Observation | Gathering) for need in needs):
            raise GradscaleError(
                f"measures of a training step must need its gradients alone, got {measure.name}, which takes passes of "
                "its own; use it with gs.measure on a checkpoint"
            )
    if passes(setup.needs) > 1:
        raise GradscaleError(
            "measures of a training step must take one pass, got one that weighs gradients by their norms, which takes "
            "two; leave out min_norm and sums of unit gradients, or use gs.measure on a checkpoint"
        )
    if setup.labels is None and any(isinstance(need, GradientSums) and need.by_class for need in setup.needs):
        raise GradscaleError("estimates by class must have labels, got none; pass labels=function of Inputs")
