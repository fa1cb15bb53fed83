"""Ways to per-example gradients, each wrapped to run on the model and batch of a `Shape`.

gradscale's own readings, and the peers in the versions of requirements-peers.txt. A peer that cannot take the
model as it is gets the nearest copy that it can, which `note` names, and is compared with a plain pass of that copy.

Shapes: B examples.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from models import Shape, losses
from torch import Tensor, nn

from gradscale.grads.capture import capture
from gradscale.grads.coverage import select_parameters, sites
from gradscale.grads.layer import LayerGrads
from gradscale.grads.readings import GradientSums, Projected, Reading, SquaredNorms, Totals, read_gradients
from gradscale.grads.waiting import Doubts
from gradscale.sketches import blocks, parse_sketch
from gradscale.sketches.gaussian import GaussianProbes
from gradscale.sketches.philox import key_of, normals

Found = Mapping[str, Tensor]  # parameter -> squared norms [B], or gradients [B, ...]


class Method(NamedTuple):
    model: nn.Module  # an untouched one, for the plain pass
    run: Callable[[], Found | None]  # None: what it found, it dropped
    covers: float  # share of the model's parameters
    note: str = ""


def _share(model: nn.Module, names: Iterable[str]) -> float:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(sizes[name] for name in names) / sum(sizes.values())


# gradscale


def _read(shape: Shape, *readings: Reading, totals: Totals | None = None) -> Method:
    """As a shard is read: what a module's first call decides holds for the later ones; sums are added to `totals`."""
    model, ids, doubts = shape.model(), shape.ids(), Doubts()
    parameters = select_parameters(model, None)
    places = sites(model, parameters)

    def run() -> Found:
        kept = {} if totals is None else totals
        found = read_gradients(
            model, places, parameters, lambda m: losses(m, ids), len(ids), readings, totals=kept, doubts=doubts
        )
        return dict(zip(parameters, found.sq_norms.T, strict=True))

    return Method(model, run, _share(model, parameters))


def norms(shape: Shape) -> Method:
    return _read(shape, SquaredNorms())


def norms_and_sums(shape: Shape) -> Method:
    method = _read(shape, SquaredNorms(), GradientSums(), totals={})
    return method._replace(note="added to the [P] sums of the batches before")


def norms_and_new_sums(shape: Shape) -> Method:
    return _read(shape, SquaredNorms(), GradientSums())._replace(note="[P] sums made anew each time")


def norms_sums_and_sketch(dim: int, shape: Shape) -> Method:
    sizes = {name: parameter.numel() for name, parameter in shape.model().named_parameters()}
    sketch = parse_sketch(f"default:{dim}", seed=0).bind(sizes)
    return _read(shape, SquaredNorms(), GradientSums(), Projected(sketch), totals={})


def norms_and_probes(number: int, shape: Shape) -> Method:
    return _read(shape, SquaredNorms(), Projected(GaussianProbes(number)))._replace(note="blocks of the probes kept")


def all_streaming(shape: Shape) -> Method:
    """What coherence, dispersion, stiffness by sketch and a width read together."""
    sizes = {name: parameter.numel() for name, parameter in shape.model().named_parameters()}
    sketch = Projected(parse_sketch("default:4096", seed=0).bind(sizes))
    return _read(shape, SquaredNorms(), GradientSums(), sketch, Projected(GaussianProbes(64)), totals={})


def unit_sums(shape: Shape) -> Method:
    """What the cosine stiffness over all pairs reads: 1 / |g_i| is known when every layer has been seen."""
    return _read(shape, SquaredNorms(), GradientSums(unit=True), totals={})._replace(note="two passes")


def norms_and_regenerated_probes(number: int, shape: Shape) -> Method:
    """As where the probes are more than the memory budget of their blocks: nothing of them is kept between runs."""
    method = norms_and_probes(number, shape)

    def run() -> Found | None:
        # The budget has no setting of its own: it is the module's.
        with mock.patch.multiple(blocks, _CACHE_BYTES=0, _cache=blocks.Cache()):
            return method.run()

    rate = normals_a_second(number) / 1e6
    note = f"blocks made anew; {rate:.1f} million normals a second with {torch.get_num_threads()} threads"
    return method._replace(run=run, note=note)


def normals_a_second(number: int, rows: int = 1 << 17) -> float:
    """The rate of the generator of the probes alone, in blocks of `number` columns."""
    key, cpu = key_of("benchmark"), torch.device("cpu")
    normals(key, 0, rows // 8, number, cpu)
    started = time.perf_counter()
    normals(key, 0, rows, number, cpu)
    return rows * number / (time.perf_counter() - started)


def materialized(shape: Shape) -> Method:
    model, ids = shape.model(), shape.ids()
    parameters = select_parameters(model, None)
    places = sites(model, parameters)
    buffer = torch.empty(len(ids) * max(parameter.numel() for parameter in parameters.values()))

    def write(name: str, grads: LayerGrads) -> None:
        batch, rows, columns = grads.shape
        out = buffer[: batch * rows * columns].view(batch, rows, columns)
        grads.tile(slice(0, batch), slice(0, rows), out)

    def run() -> None:
        capture(model, places, lambda m: losses(m, ids), len(ids), write)

    return Method(model, run, _share(model, parameters), "one parameter at a time, into one buffer, dropped")


# The floor and the peers


def floor(shape: Shape) -> Method:
    model, ids, frozen = shape.model(), shape.ids(), shape.model().requires_grad_(False)
    frozen.transformer.wpe.requires_grad_(True)  # the backward pass has to go all the way down

    def run() -> None:
        losses(frozen, ids).sum().backward()
        frozen.zero_grad(set_to_none=True)

    return Method(model, run, 0.0, "what no method can do without")


def loop(shape: Shape) -> Method:
    model, ids = shape.model(), shape.ids()

    def run() -> None:
        for example in ids.split(1):
            torch.autograd.grad(losses(model, example).sum(), list(model.parameters()))

    return Method(model, run, 1.0, "one example at a time, each dropped")


def vmap(shape: Shape) -> Method:
    model, ids = shape.model(), shape.ids()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(values: dict[str, Tensor], example: Tensor) -> Tensor:
        def call(tokens: Tensor) -> Any:
            return torch.func.functional_call(model, values, (tokens,))

        return losses(call, example[None])[0]

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    return Method(model, lambda: each(parameters, ids), 1.0)


def opacus_full(shape: Shape) -> Method:
    from opacus.grad_sample import GradSampleModule

    return _opacus(shape, lambda model: GradSampleModule(model, strict=False, loss_reduction="sum"), "grad_sample")


def opacus_ghost(shape: Shape) -> Method:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping as Ghost

    return _opacus(shape, lambda model: Ghost(model, strict=False, loss_reduction="sum"), "_norm_sample")


def _opacus(shape: Shape, wrap: Callable[[nn.Module], nn.Module], field: str) -> Method:
    ids, inner = shape.ids(), shape.model(tied=False, conv1d=False).train()  # it records nothing in eval mode
    inner.transformer.wpe.requires_grad_(False)  # its output is broadcast over the batch
    covered = {name: p for name, p in inner.named_parameters() if p.requires_grad}
    wrapped = wrap(inner)

    def run() -> Found:
        losses(wrapped, ids).sum().backward()
        found = {name: getattr(p, field) for name, p in covered.items()}
        for p in covered.values():
            p.grad = p.grad_sample = None
            if field != "grad_sample":
                delattr(p, field)
        return {name: x.square() for name, x in found.items()} if field == "_norm_sample" else found

    model = shape.model(tied=False, conv1d=False)
    return Method(model, run, _share(model, covered), "untied head, Conv1D as Linear, position embedding frozen")


def backpack_grads(shape: Shape) -> Method:
    return _backpack(shape, "BatchGrad", "grad_batch")


def backpack_norms(shape: Shape) -> Method:
    return _backpack(shape, "BatchL2Grad", "batch_l2")


def _backpack(shape: Shape, extension: str, field: str) -> Method:
    import backpack

    ids, inner = shape.ids(), shape.model(tied=False, conv1d=False)
    extended = {n: m for n, m in inner.named_modules() if isinstance(m, nn.Linear) or n.endswith("wte")}
    for module in extended.values():
        backpack.extend(module)
    covered = {f"{n}.{local}": p for n, m in extended.items() for local, p in m.named_parameters()}
    make = getattr(backpack.extensions, extension)

    def run() -> Found:
        with backpack.backpack(make()):
            losses(inner, ids).sum().backward()
        found = {name: getattr(p, field) for name, p in covered.items()}
        for p in inner.parameters():
            p.grad = None
        for p in covered.values():
            delattr(p, field)
        return found

    model = shape.model(tied=False, conv1d=False)
    return Method(model, run, _share(model, covered), "untied head, Conv1D as Linear; Linear and token embedding only")


def bergson(shape: Shape) -> Method:
    return _bergson(shape, {})


def bergson_two_sided(rank: int, shape: Shape) -> Method:
    method = _bergson(shape, {"projection_dim": rank})
    return method._replace(note=f"{method.note}: {rank} x {rank} numbers each, signs kept")


def bergson_global(dim: int, shape: Shape) -> Method:
    method = _bergson(shape, {"projection_dim": dim, "projection_target": "global"})
    return method._replace(note=f"{method.note}: {dim} numbers in all, signs made anew")


def _bergson(shape: Shape, projection: Mapping[str, Any]) -> Method:
    from bergson.collector.collector import HookCollectorBase
    from bergson.gradients import GradientProcessor

    class Collect(HookCollectorBase):  # what GradientCollector does, without its files
        def setup(self) -> None:
            self.lo, self.hi = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max

        def backward_hook(self, module: nn.Module, g: Tensor) -> None:
            grads = self._module_gradient(module, g)
            if not self.accumulate_global_projection(module._name, grads):
                self.mod_grads[module._name] = self._materialize_gradient(grads)

        def process_batch(self, indices: list[int], **kwargs: Any) -> None: ...

        def teardown(self) -> None: ...

    ids, inner = shape.ids(), shape.model(tied=False).requires_grad_(False)
    inner.get_input_embeddings().requires_grad_(True)  # as its worker_utils prepares a model
    collector = Collect(model=inner.base_model, processor=GradientProcessor(**projection))
    covered = {name: f"transformer.{name}.weight" for name in collector.target_info}

    def run() -> Found | None:
        with collector:
            losses(inner, ids).sum().backward()
        inner.zero_grad(set_to_none=True)
        found = dict(collector.mod_grads)
        collector.mod_grads.clear()
        return None if projection else {covered[name]: grads for name, grads in found.items()}

    model = shape.model(tied=False)
    return Method(model, run, _share(model, covered.values()), "untied head; matrices of the blocks only")


def trak(dim: int, shape: Shape) -> Method:
    import numpy as np
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput

    class Loss(AbstractModelOutput):  # of one example, as everywhere here; its own outputs are margins
        def __init__(self) -> None: ...

        @staticmethod
        def get_output(model: nn.Module, weights: Any, buffers: Any, example: Tensor) -> Tensor:
            def call(tokens: Tensor) -> Any:
                return torch.func.functional_call(model, (weights, buffers), (tokens,))

            return losses(call, example[None])[0]

        def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
            return torch.ones(len(batch[0]), 1)

    model, ids, folder = shape.model(), shape.ids(), tempfile.TemporaryDirectory()
    traker = TRAKer(
        model=model,
        task=Loss(),
        train_set_size=len(ids),
        save_dir=folder.name,
        load_from_save_dir=False,
        device="cpu",
        proj_dim=dim,
        use_half_precision=False,
        logging_level=logging.ERROR,
    )
    traker.load_checkpoint(model.state_dict(), model_id=0)

    def run() -> None:
        assert folder  # which is deleted with this function
        traker.saver.current_store["is_featurized"][:] = 0  # else it would skip them
        traker.featurize(batch=(ids,), inds=np.arange(len(ids)))

    return Method(shape.model(), run, 1.0, "BasicProjector, normals made anew; featurize, with its files")


def dattri_trak(dim: int, shape: Shape) -> Method:
    from dattri.func.projection import random_project
    from dattri.task import AttributionTask

    model, ids = shape.model(), shape.ids()

    def loss(values: dict[str, Tensor], example: Tensor) -> Tensor:
        def call(tokens: Tensor) -> Any:
            return torch.func.functional_call(model, values, (tokens,))

        return losses(call, example[None])[0]

    task = AttributionTask(loss, model, model.state_dict())
    each = task.get_grad_loss_func(in_dims=(None, 0))
    parameters, _ = task.get_param(ckpt_idx=0)

    def run() -> None:  # what it does with a batch, less the probabilities
        grads = torch.nan_to_num(each(parameters, ids))
        grads /= math.sqrt(grads.shape[1])
        random_project(grads, len(grads), dim, proj_max_batch_size=32, device="cpu")(grads, ensemble_id=0)

    return Method(
        shape.model(),
        run,
        1.0,
        "as TRAKAttributor.cache: vmap over one flat vector of weights, projector and normals made anew",
    )


def less(dim: int, shape: Shape) -> Method:
    """After its collect_grad_reps.py, where 16 gradients are projected at a time, without Adam's moments."""
    from trak.projectors import BasicProjector, ProjectionType

    model, ids = shape.model(), shape.ids()
    size = sum(parameter.numel() for parameter in model.parameters())
    signs = ProjectionType.rademacher
    projector = BasicProjector(size, dim, 0, signs, torch.device("cpu"), block_size=128, dtype=torch.float32)

    def gradient(example: Tensor) -> Tensor:
        model.zero_grad(set_to_none=True)
        losses(model, example).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    def run() -> None:
        for part in ids.split(16):
            grads = torch.stack([gradient(example) for example in part.split(1)])
            projector.project(grads.to(torch.float16), model_id=0)

    return Method(shape.model(), run, 1.0, "its loop of one, then traker's BasicProjector, signs made anew")


OURS: dict[str, Callable[[Shape], Method]] = {
    "gradscale: squared norms": norms,
    "gradscale: norms + sums": norms_and_sums,
    "gradscale: norms + new sums": norms_and_new_sums,
    "gradscale: norms + sums + sketch, K=512": partial(norms_sums_and_sketch, 512),
    "gradscale: norms + sums + sketch, K=4096": partial(norms_sums_and_sketch, 4096),
    "gradscale: norms + 64 Gaussian probes": partial(norms_and_probes, 64),
    "gradscale: norms + sums + sketch, K=4096 + 64 probes": all_streaming,
    "gradscale: norms + sums of unit gradients": unit_sums,
    "gradscale: norms + 64 Gaussian probes, regenerated": partial(norms_and_regenerated_probes, 64),
    "gradscale: gradients, layer by layer": materialized,
}
PEERS: dict[str, Callable[[Shape], Method]] = {
    "floor: no weight gradients": floor,
    "loop of one": loop,
    "torch.func.vmap(grad)": vmap,
    "opacus: gradients": opacus_full,
    "opacus: ghost norms": opacus_ghost,
    "backpack: BatchGrad": backpack_grads,
    "backpack: BatchL2Grad": backpack_norms,
    "bergson: gradients": bergson,
    "bergson: p=16": partial(bergson_two_sided, 16),
    "bergson: p=32": partial(bergson_two_sided, 32),
    "bergson: global, K=512": partial(bergson_global, 512),
    "traker: featurize, K=512": partial(trak, 512),
    "dattri: TRAK, K=512": partial(dattri_trak, 512),
    "LESS-like loop + BasicProjector, K=512": partial(less, 512),
}
METHODS = OURS | PEERS
# Ten times plain and more: run a few times, on the first shape alone.
SLOW = frozenset(
    {
        "gradscale: norms + 64 Gaussian probes, regenerated",
        "bergson: global, K=512",
        "traker: featurize, K=512",
        "dattri: TRAK, K=512",
        "LESS-like loop + BasicProjector, K=512",
    }
)
