"""The plan of a training's run, and the jackknife blocks that its examples fall into."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from gradscale.measures.settings import settings_of
from gradscale.run.attach_setup import Setup
from gradscale.run.plan import Plan
from gradscale.run.worker import versions

_PARTS = 10  # of the only microbatch of a step


class Blocks(NamedTuple):
    """Runs of consecutive microbatches of a step, in the order of ranks; or parts of the only one."""

    total: int
    microbatches: int  # of each rank
    ranks: int

    @property
    def parts(self) -> int:
        """Into how many each microbatch is divided."""
        return self.total if self.microbatches * self.ranks == 1 else 1

    def first(self, rank: int, microbatch: int) -> int:
        """The number of a microbatch's block, of the first if it is divided."""
        position = rank * self.microbatches + min(microbatch, self.microbatches - 1)
        return position * self.total // (self.microbatches * self.ranks) if self.parts == 1 else 0


def blocks_of(setup: Setup, plan: Plan) -> Blocks:
    """As many as a plan allows of as many shards: at most 20, and fewer where their sums would take too much memory."""
    microbatches = int(setup.engine.gradient_accumulation_steps())
    units = microbatches * setup.ranks
    limit = dataclasses.replace(plan, examples=units if units > 1 else _PARTS, shard_size=1).blocks
    return Blocks(limit, microbatches, setup.ranks)


def planned(setup: Setup) -> Plan:
    """`examples` and the sizes are those of the engine's settings; the commit records have what there was."""
    engine, kind = setup.engine, type(setup.module)
    size, microbatches = int(engine.train_micro_batch_size_per_gpu()), int(engine.gradient_accumulation_steps())
    return Plan(
        task=f"attach:{kind.__module__}:{kind.__qualname__}",
        task_options={
            "zero_stage": int(engine.zero_optimization_stage()),
            "ranks": setup.ranks,
            "columns": list(setup.columns),
            "packed": setup.boundaries is not None,
        },
        checkpoints={},
        examples=size * microbatches * setup.ranks,
        data_fingerprint="",
        parameters={
            name: {
                "shape": list(parameter.shape),
                "dtype": str(parameter.dtype).removeprefix("torch."),
                "rule": setup.rules[name],
            }
            for name, parameter in setup.parameters.items()
        },
        params=setup.params,
        excluded=list(setup.excluded),
        labels=setup.labels is not None,
        measures={measure.name: settings_of(measure) for measure in setup.measures},
        sketch=None if setup.sketch is None else dict(setup.sketch.scheme),
        seed=setup.seed,
        shard_size=size * microbatches,
        microbatch=size,
        threads_per_worker=torch.get_num_threads(),
        device=setup.device.type,
        versions=versions(setup.device.type),
        sketch_dtype=None if setup.sketch is None else setup.sketch_dtype,
    )
