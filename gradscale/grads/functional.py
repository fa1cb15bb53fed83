"""A model called with other weights than its own, and differentiated more than once: forward, or its gradient again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

_ONCE = "torch::autograd::Error"  # such a node is passed over on the way to the parameters, as if it were constant


class NotTwiceDifferentiable(RuntimeError):
    """A gradient whose graph does not hold all that it depends on; its derivative would be wrong, and nothing tell."""


class Caller(nn.Module):
    """A function of a model and a batch as a module's forward, so that the model can be called with other weights."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model, self._function = model, function
        self.training = model.training

    def forward(self, batch: Any) -> Any:
        return self._function(self.model, batch)


def called(caller: Caller, parameters: Sequence[nn.Parameter], values: Sequence[Tensor], batch: Any) -> Any:
    """What the function gives with `values` in the place of the `parameters`, wherever one is used."""
    there = dict(zip(parameters, values, strict=True))
    return functional_call(caller, _everywhere(caller, there), (batch,), tie_weights=False)


def _everywhere(caller: nn.Module, values: Mapping[nn.Parameter, Tensor]) -> dict[str, Tensor]:
    """Each value at every place where its parameter is, a module that has two names being one place.

    Left to find tied parameters itself, `functional_call` puts such a module's own parameters not back (torch 2.13).
    """
    return {
        f"{path}.{name}": values[parameter]
        for path, module in caller.named_modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter in values
    }


def load_forward_derivatives() -> None:
    """At its first dual tensor torch compiles some derivatives with torch.jit, of whose end it then warns."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Of the ways to compute attention, the one that has a second and a forward derivative: B heads T^2 scores held."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def gradient_graph(
    values: Sequence[Tensor],
    parameters: Sequence[Tensor],
    seeds: Sequence[Tensor] | None = None,
) -> list[Tensor | None]:
    """The gradient of sum_j <seed_j, value_j> in the `parameters`, to be differentiated again. Seeds: by default ones.

    `torch.autograd.grad(..., create_graph=True)` takes what a function gives that is marked @once_differentiable, or
    whose backward leaves autograd, for constants, and derivatives of it are silently zero. With a seed that has a
    gradient itself, these leave traces: a node of errors, or an output without a graph of an input that has one. A
    function that computes its gradient from tensors which it detached on the way forward leaves none.

    Cost: beside the gradient, a walk over the nodes of both graphs.
    Raises: NotTwiceDifferentiable naming such a function.
    """
    seeds = [torch.ones_like(value) for value in values] if seeds is None else seeds
    live = [seed if seed.requires_grad else seed.detach().requires_grad_() for seed in seeds]
    cut: list[str] = []
    watched = [_watched(node, cut) for node in nodes(values) if isinstance(node, BackwardCFunction)]
    try:
        found: list[Tensor | None] = [
            *torch.autograd.grad(values, parameters, live, create_graph=True, allow_unused=True)
        ]
    finally:
        for handle in watched:
            handle.remove()
    if any(node.name() == _ONCE for node in nodes(found)):
        raise NotTwiceDifferentiable("gradients must have a graph, got a function that is marked @once_differentiable")
    if cut:
        raise NotTwiceDifferentiable(f"gradients must have a graph, got {cut[0]}, whose results have none")
    return found


def hessian_products(
    value: Tensor,
    gradient: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    vectors: Iterable[Sequence[Tensor]],
    count: int,
) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """Each of the `count` vectors v and H v, a tensor for each parameter, from the `gradient_graph` of [value].

    The graph is there until the last of them.
    """
    slopes = [slope for slope in gradient if slope is not None]
    for k, vector in enumerate(vectors):
        along = [v.to(slope.dtype) for slope, v in zip(gradient, vector, strict=True) if slope is not None]
        # the value has a part, of weight zero, so that a pass through its graph is counted as one
        found = torch.autograd.grad(
            [*slopes, value],
            parameters,
            [*along, torch.zeros_like(value)],
            retain_graph=k + 1 < count,
            materialize_grads=True,
        )
        yield vector, found


def _watched(node: Any, cut: list[str]) -> RemovableHandle:
    """Puts the name of a function of the user's own in `cut` if its backward gives what autograd has not followed."""

    def see(inward: Sequence[Tensor | None], outward: Sequence[Tensor | None]) -> None:
        followed = [g.requires_grad for g in inward if g is not None]
        if any(g is not None and g.requires_grad for g in outward) and not all(followed):
            cut.append(node.name())

    handle: RemovableHandle = node.register_hook(see)
    return handle


def nodes(tensors: Sequence[Tensor | None]) -> Iterator[Any]:
    """The nodes of the graph of these tensors, each once."""
    waiting, seen = [tensor.grad_fn for tensor in tensors if tensor is not None], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            yield node


def depend(tensors: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> bool:
    """Whether the graph of any of the `tensors` leads to one of the `leaves`."""
    return any(getattr(node, "variable", None) is leaf for node in nodes(tensors) for leaf in leaves)
