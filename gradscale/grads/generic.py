"""The rule for every module: a vector-Jacobian product of the module's own forward for each example alone.

Exact, and checked: an example alone must give the output that it gave within its batch. torch.func.vmap runs
all examples at once, in groups whose gradients take a bounded space; where it cannot trace the module, a loop
takes one example after another. A module in half precision runs in float32 if it can, so that whatever it sums over
its positions is summed in float32; under autocast it runs as it ran.

Shapes: B examples, n rows of one example in a batch dimension (1 but for the masks of attention heads), P entries.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradscale.errors import GradscaleError
from gradscale.grads.call import Call, float_tensors, precision
from gradscale.grads.layer import DenseGrads, LayerGrads, widen
from gradscale.grads.waiting import refuse

_ALIVE_ENTRIES = 1 << 24  # of the gradients that vmap works on at a time

Dims = list[int | None]


def generic(call: Call, wanted: Sequence[str]) -> dict[str, LayerGrads]:
    """Exact for any module whose inputs and outputs have the batch as their first dimension.

    An input that only happens to have B rows (a mask [T, T] with T = B) is found out by the outputs: the inputs
    are taken for batched first all together, then with one of them left out. What was right at the module's first
    call is taken over by later ones with as many such inputs, where the call has doubts.
    Raises: GradscaleError if an example alone gives another output than it gave within its batch.
    """
    leaves = pytree.tree_leaves((call.args, dict(call.kwargs)))
    batched = [isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == call.batch_size for leaf in leaves]
    key = (generic, call.module, tuple(batched))
    if call.doubts is not None and key in call.doubts.decided:
        with suppress(Exception):  # whatever it is, it comes again below, or was of the wrong choice
            return per_example(call, wanted, call.doubts.decided[key], [0] * len(call.outputs))
    found, dims = _tried(call._replace(doubts=None), wanted, batched)
    if call.doubts is not None:
        call.doubts.decided[key] = dims
    return found


def _tried(call: Call, wanted: Sequence[str], batched: Sequence[bool]) -> tuple[dict[str, LayerGrads], Dims]:
    """The gradients, and the batch dimensions of the inputs with which the outputs are right."""
    dims: Dims = [0 if moved else None for moved in batched]
    output_dims = [0] * len(call.outputs)
    try:
        return per_example(call, wanted, dims, output_dims), dims
    except Exception:
        comparable = all(output.isfinite().any() for output in call.outputs)
        for i, moved in enumerate(batched):
            if moved and sum(batched) > 1 < call.batch_size and comparable:
                fewer = [*dims[:i], None, *dims[i + 1 :]]
                try:
                    return per_example(call, wanted, fewer, output_dims), fewer
                except Exception:  # the first error is the one to tell
                    continue
        raise


def per_example(
    call: Call, wanted: Sequence[str], input_dims: Sequence[int | None], output_dims: Sequence[int]
) -> dict[str, LayerGrads]:
    """As `generic`, for inputs (in pytree order; None: shared) and outputs whose batch dimensions are given.

    A batch dimension may have n B entries, n for each example in turn.
    """
    if call.autocast is None and any(widen(output) is not output for output in call.outputs):
        try:
            return _per_example(_widened(call), wanted, input_dims, output_dims, widen)
        except Exception:  # of a module that insists on its dtype; an error of another kind comes again below
            pass
    return _per_example(call, wanted, input_dims, output_dims, _as_it_is)


def _widened(call: Call) -> Call:
    args, kwargs = pytree.tree_map_only(Tensor, widen, (call.args, dict(call.kwargs)))
    return call._replace(args=args, kwargs=kwargs, grads=[widen(grad) for grad in call.grads])


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _per_example(
    call: Call,
    wanted: Sequence[str],
    input_dims: Sequence[int | None],
    output_dims: Sequence[int],
    cast: Callable[[Tensor], Tensor],
) -> dict[str, LayerGrads]:
    """`cast` is done to the module's own tensors."""
    parameters = {name: cast(call.module.get_parameter(name).detach()) for name in wanted}
    used = [i for i in range(len(call.grads)) if i not in call.unreached]  # a recurrent net's last state is often not
    if not used:
        return no_gradient(call, wanted)
    run = _Run.of(call, input_dims, used, cast)
    grads = [_split(call.grads[i], output_dims[i], call.batch_size) for i in used]
    grads = [grad.movedim(output_dims[i], 0) for i, grad in zip(used, grads, strict=True)]
    with torch.enable_grad(), _restored(call.module), precision(call.outputs[0].device, call.autocast):
        found, outputs = _vmapped_or_looped(run, parameters, grads)
    dtypes = {tensor.dtype for tensor in (*parameters.values(), *call.outputs)} | {call.autocast or torch.float64}
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    for i, output in zip(used, outputs, strict=True):
        together = _split(call.outputs[i], output_dims[i], call.batch_size).movedim(output_dims[i], 0)
        matters = call.grads[i].any()
        _check_same(call, output.detach().reshape(together.shape), together, eps, matters)
    return {name: DenseGrads(grad.reshape(call.batch_size, -1).detach()) for name, grad in found.items()}


def no_gradient(call: Call, wanted: Sequence[str]) -> dict[str, LayerGrads]:
    """Zeros: the rule for a call none of whose outputs has a part in the losses."""
    parameters = {name: call.module.get_parameter(name) for name in wanted}
    return {name: DenseGrads(p.detach().new_zeros(call.batch_size, p.numel())) for name, p in parameters.items()}


class _Run(NamedTuple):
    """How to run a call's module on one example."""

    call: Call
    leaves: list[Any]
    structure: pytree.TreeSpec
    dims: Sequence[int | None]
    used: list[int]  # outputs
    cast: Callable[[Tensor], Tensor]  # done to the module's own tensors

    @classmethod
    def of(cls, call: Call, dims: Sequence[int | None], used: list[int], cast: Callable[[Tensor], Tensor]) -> _Run:
        leaves, structure = pytree.tree_flatten((call.args, dict(call.kwargs)))
        return cls(call, leaves, structure, dims, used, cast)

    @property
    def batched(self) -> list[Tensor]:
        """[..., B, n, ...] each."""
        pairs = zip(self.leaves, self.dims, strict=True)
        return [_split(leaf, dim, self.call.batch_size) for leaf, dim in pairs if dim is not None]

    @property
    def batched_dims(self) -> list[int]:
        return [dim for dim in self.dims if dim is not None]

    def outputs(self, values: Mapping[str, Tensor], batched: Sequence[Tensor]) -> list[Tensor]:
        """Of the example whose inputs are `batched` [..., n, ...]."""
        ours = iter(batched)
        inputs = [leaf if dim is None else next(ours) for leaf, dim in zip(self.leaves, self.dims, strict=True)]
        args, kwargs = pytree.tree_unflatten(inputs, self.structure)
        output = torch.func.functional_call(self.call.module, dict(values), args, kwargs, tie_weights=False)
        outputs = float_tensors(output)
        return [outputs[i] for i in self.used]

    def check_shapes(self, outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        if any(g.numel() != o.numel() for g, o in zip(grads, outputs, strict=True)):
            shapes = [tuple(o.shape) for o in outputs]
            raise _mixed(self.call.name, f"shape {shapes[0] if len(shapes) == 1 else shapes} for one")


Found = tuple[dict[str, Tensor], list[Tensor]]  # gradients [B, ...] and outputs [B, ...]


def _vmapped_or_looped(run: _Run, parameters: dict[str, Tensor], grads: list[Tensor]) -> Found:
    try:
        return _vmapped(run, parameters, grads)
    except GradscaleError:
        raise
    except Exception:  # whatever vmap raises where it cannot trace; an error of the module's own comes again below
        pass
    return _looped(run, parameters, grads)


def _vmapped(run: _Run, parameters: dict[str, Tensor], grads: list[Tensor]) -> Found:
    others = _others(run, parameters)

    def alone(batched: list[Tensor], grads: list[Tensor]) -> Found:
        outputs, pullback, *_ = torch.func.vjp(lambda p: run.outputs({**others, **p}, batched), parameters)
        run.check_shapes(outputs, grads)
        return pullback([g.reshape(o.shape) for g, o in zip(grads, outputs, strict=True)])[0], outputs

    group = max(1, _ALIVE_ENTRIES // max(1, sum(p.numel() for p in parameters.values())))
    chunk_size = group if group < run.call.batch_size else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # where vmap itself loops
        vmapped: Callable[..., Found] = torch.func.vmap(alone, (run.batched_dims, 0), chunk_size=chunk_size)
        return vmapped(run.batched, grads)


def _looped(run: _Run, parameters: dict[str, Tensor], grads: list[Tensor]) -> Found:
    others, batched = _others(run, parameters), run.batched
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    columns: list[list[Tensor]] = [[] for _ in grads]
    for b in range(run.call.batch_size):
        one = [tensor.select(dim, b) for tensor, dim in zip(batched, run.batched_dims, strict=True)]
        outputs = run.outputs({**others, **leaves}, one)
        upstream = [grad[b] for grad in grads]
        run.check_shapes(outputs, upstream)
        pairs = [(o, g.reshape(o.shape)) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
        for name, grad in zip(parameters, _gradients(pairs, list(leaves.values())), strict=True):
            rows[name].append(grad.to_dense() if grad.is_sparse else grad)
        for column, output in zip(columns, outputs, strict=True):
            column.append(output.detach())
    return {name: torch.stack(found) for name, found in rows.items()}, [torch.stack(column) for column in columns]


def _gradients(pairs: Sequence[tuple[Tensor, Tensor]], leaves: list[Tensor]) -> Sequence[Tensor]:
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    outputs, upstream = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, leaves, upstream, allow_unused=True, materialize_grads=True)


def _split(tensor: Tensor, dim: int, batch_size: int) -> Tensor:
    """[..., n B, ...] as [..., B, n, ...]."""
    split: Tensor = tensor.unflatten(dim, (batch_size, -1))
    return split


def _others(run: _Run, wanted: Collection[str]) -> dict[str, Tensor]:
    """Copies of the buffers, so that a module that counts its calls does not count these; and what `cast` changes."""
    module = run.call.module
    buffers = {name: run.cast(buffer.clone()) for name, buffer in module.named_buffers()}
    rest = [(name, p.detach()) for name, p in module.named_parameters(remove_duplicate=False) if name not in wanted]
    pairs = [(name, p, run.cast(p)) for name, p in rest]
    return buffers | {name: other for name, p, other in pairs if other is not p}


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Puts the tensors that a forward hangs on its modules back (the weight of the old weight_norm, caches)."""
    before = [(m.__dict__, dict(m.__dict__), m._buffers, dict(m._buffers)) for m in module.modules()]
    try:
        yield
    finally:
        for attributes, saved, buffers, saved_buffers in before:
            attributes.clear()
            attributes.update(saved)
            buffers.clear()
            buffers.update(saved_buffers)


def _check_same(call: Call, alone: Tensor, together: Tensor, eps: float, matters: Tensor) -> None:
    """To rounding by `eps`, against the largest entry; what is not finite within the batch is not compared."""
    if not together.numel():
        return
    finite = together.isfinite()
    scale = together.where(finite, 0).abs().amax()
    tolerance = min(1e3 * eps, 0.25) * scale.double()
    largest = (alone - together).abs().where(finite, 0).amax().double()

    def error() -> GradscaleError:
        return _mixed(call.name, f"one {float(largest):.2g} apart within the batch")

    refuse(matters & ~(largest <= tolerance), error, call.doubts)


def _mixed(name: str, got: str) -> GradscaleError:
    return GradscaleError(
        f"module {name} must give each example the output it has alone, got {got}; its inputs and outputs must have "
        "the batch as their first dimension and must not mix examples. "
        "Wrap the parameter in a module of its own, or leave it out by --params"
    )
