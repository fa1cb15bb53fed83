"""A model called with other weights than its own, and the state of torch in which it can be differentiated forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


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
