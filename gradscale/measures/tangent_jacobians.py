"""The dense tangent kernel of a few examples, and the gradients of their losses in their outputs.

Shapes: B examples of a batch, n of all, C outputs, P entries of one parameter, m = n C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradscale.errors import GradscaleError
from gradscale.grads.capture import capture, check_losses
from gradscale.grads.coverage import sites
from gradscale.grads.layer import LayerGrads, materialize, wide_dtype
from gradscale.grads.subject import Subject
from gradscale.measures.outputs import outputs
from gradscale.task import Batch, batch_size

NAME = "tangent_spectrum"
_MATRICES = 6  # [m, m] float64 at a time: the kernel, B, their eigenvectors and what an eigensolver takes
_TILE_ENTRIES = 1 << 22  # of Jacobians widened at a time: 32 MB


def tangent_matrix(subject: Subject, batches: Sequence[Batch], C: int, memory: int) -> Tensor:
    """[m, m] float64 on the CPU: Theta = J J^T, J = d f(x_i)_c / d theta, row i C + c.

    Parameters are taken in groups whose Jacobians [m, P] fit into `memory` bytes in the parameters' own type (float32
    of half precision) beside the matrices; for each group, C forward and backward passes over all examples.
    Raises: GradscaleError as `groups`.
    """
    sizes = [batch_size(batch) for batch in batches]
    total = torch.zeros(sum(sizes) * C, sum(sizes) * C, dtype=torch.float64, device=subject.device)
    for parameters in groups(subject.parameters, sum(sizes) * C, memory):
        jacobians = {
            name: torch.zeros(sum(sizes), C, p.numel(), dtype=wide_dtype(p.dtype), device=p.device)
            for name, p in parameters.items()
        }
        _fill(subject, parameters, batches, C, jacobians)
        for name in parameters:
            _add_gram(jacobians.pop(name).flatten(0, 1), total)
    return total.cpu()


def groups(parameters: Mapping[str, nn.Parameter], m: int, memory: int) -> Iterator[dict[str, nn.Parameter]]:
    """Consecutive parameters whose Jacobians of m rows fit together.

    Raises: GradscaleError, before the first, if the matrices do not fit, or the Jacobian of one parameter beside them.
    """
    left = memory - _MATRICES * 8 * m * m
    if left <= 0:
        most = int((memory / (8 * _MATRICES)) ** 0.5)
        raise GradscaleError(
            f"examples times outputs must be at most {most} for matrices in {_mib(memory)} MiB, got {m}; take fewer "
            "examples, or raise memory="
        )
    bytes_of = {name: m * p.numel() * wide_dtype(p.dtype).itemsize for name, p in parameters.items()}
    widest = max(bytes_of, key=bytes_of.__getitem__)
    if bytes_of[widest] > left:
        raise GradscaleError(
            f"the Jacobian of parameter {widest} must fit into {_mib(left)} MiB, got {m} outputs x "
            f"{parameters[widest].numel()} entries ({_mib(bytes_of[widest])} MiB); take fewer examples, leave the "
            "parameter out by exclude= or params=, or raise memory="
        )
    return _grouped(parameters, bytes_of, left)


def _grouped(
    parameters: Mapping[str, nn.Parameter], bytes_of: Mapping[str, int], most: int
) -> Iterator[dict[str, nn.Parameter]]:
    group: dict[str, nn.Parameter] = {}
    for name, parameter in parameters.items():
        if sum(bytes_of[taken] for taken in group) + bytes_of[name] > most:
            yield group
            group = {}
        group[name] = parameter
    yield group


def _fill(
    subject: Subject,
    parameters: Mapping[str, nn.Parameter],
    batches: Sequence[Batch],
    C: int,
    jacobians: Mapping[str, Tensor],
) -> None:
    found, start = sites(subject.model, parameters), 0
    for batch in batches:
        examples = slice(start, start + batch_size(batch))
        for c in range(C):
            capture(
                subject.model,
                found,
                partial(_output, subject, batch, c),
                batch_size(batch),
                _into(jacobians, examples, c),
            )
        start = examples.stop


def _output(subject: Subject, batch: Batch, c: int, model: nn.Module) -> Tensor:
    return outputs(subject, batch, NAME)[:, c]


def _into(jacobians: Mapping[str, Tensor], examples: slice, c: int) -> Callable[[str, LayerGrads], None]:
    def read(name: str, grads: LayerGrads) -> None:
        jacobians[name][examples, c] = materialize(grads)

    return read


def _add_gram(jacobian: Tensor, total: Tensor) -> None:
    """Add J J^T of [m, P] to `total`, a few columns at a time in float64."""
    for part in jacobian.split(max(1, _TILE_ENTRIES // len(jacobian)), dim=1):
        wide = part.double()
        total.addmm_(wide, wide.mT)


def output_gradients(subject: Subject, batch: Batch) -> tuple[Tensor, Tensor]:
    """f and r = d loss_i / d f(x_i), both [B, C] float64 on the CPU.

    By `task.losses_of(outputs, batch) -> [B]` where there is one. Else by what the model returns: it is held fixed as
    u, `outputs` and `losses` are computed from it, and r is (df/du) (dloss/du), right where the outputs are entries of
    u, each once; whether (df/du)^T r is dloss/du is checked.
    Raises: GradscaleError if the losses cannot be had from the outputs in one of these ways.
    """
    losses_of: Callable[[Tensor, Batch], Tensor] | None = getattr(subject.task, "losses_of", None)
    if losses_of is None:
        return _through_returned(subject, batch)
    with torch.no_grad():
        f = outputs(subject, batch, NAME)
    f = f.detach().requires_grad_()
    values = losses_of(f, batch)
    check_losses(values, batch_size(batch))
    if not values.requires_grad:
        raise _not_a_function("task.losses_of gives losses without a gradient")
    (r,) = torch.autograd.grad(values.sum(), f)
    return f.detach().double().cpu(), r.double().cpu()


def _through_returned(subject: Subject, batch: Batch) -> tuple[Tensor, Tensor]:
    leaves: list[Tensor] = []
    handle = subject.model.register_forward_hook(_Fixed(leaves))
    try:
        with torch.enable_grad():
            f = outputs(subject, batch, NAME)
            values = subject.task.losses(subject.model, batch)
    finally:
        handle.remove()
    check_losses(values, batch_size(batch))
    if not leaves or not f.requires_grad or not values.requires_grad:
        raise _not_a_function("they are not both computed from what the model returns")
    slopes = _slopes(values.sum(), leaves)
    weights = torch.zeros_like(f, requires_grad=True)
    back = torch.autograd.grad(f, leaves, weights, create_graph=True, allow_unused=True)
    pairs = [(b, s) for b, s in zip(back, slopes, strict=True) if b is not None]
    r = torch.autograd.grad([b for b, _ in pairs], weights, [s for _, s in pairs], retain_graph=True)[0]
    again = torch.autograd.grad(f, leaves, r, allow_unused=True)
    for slope, given in zip(slopes, again, strict=True):
        apart = slope if given is None else slope - given
        largest = max(float(part.nan_to_num(0.0).abs().max()) for part in (slope, r))
        if bool((apart.abs() > 1e-5 * largest).any()):  # NaN is left to who looks for examples that are not finite
            raise _not_a_function("they are not a function of entries of what the model returns that are outputs")
    return f.detach().double().cpu(), r.detach().double().cpu()


class _Fixed:
    """A forward hook: the first time, cuts what the model returns off its graph; then gives the same again."""

    def __init__(self, leaves: list[Tensor]) -> None:
        self._leaves, self._given = leaves, None

    def __call__(self, module: nn.Module, args: Any, returned: Any) -> Any:
        if self._given is None:
            self._given = pytree.tree_map_only(Tensor, self._cut, returned)
        return self._given

    def _cut(self, tensor: Tensor) -> Tensor:
        leaf = tensor.detach()
        if leaf.is_floating_point():
            self._leaves.append(leaf.requires_grad_())
        return leaf


def _slopes(value: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def _not_a_function(why: str) -> GradscaleError:
    return GradscaleError(
        f"losses must be a function of task.outputs for their gradient in the outputs, got losses where {why}; add "
        "task.losses_of(outputs, batch) -> [B]"
    )


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.0f}"
