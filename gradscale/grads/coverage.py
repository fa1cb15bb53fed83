"""Which module's hook accounts for which parameter, settled before the first microbatch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from gradscale.errors import GradscaleError
from gradscale.grads.rules import Rule, owns_subtree, rule_of

_CONTAINERS = (nn.ParameterList, nn.ParameterDict, nn.ModuleList, nn.ModuleDict)


class Site(NamedTuple):
    """A module whose calls are recorded. `parameters` maps the module's own names to the model's."""

    name: str
    module: nn.Module
    parameters: Mapping[str, str]
    rule: Rule


def select_parameters(model: nn.Module, pattern: str | None) -> dict[str, nn.Parameter]:
    """The trainable parameters whose name matches the regular expression `pattern` (anywhere in it; None: all).

    Raises: GradscaleError if there is none, or the pattern is not a regular expression.
    """
    try:
        wanted = re.compile(pattern or "")
    except re.error as error:
        raise GradscaleError(f"params must be a regular expression, got {pattern!r}: {error}") from error
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    chosen = {name: p for name, p in trainable.items() if wanted.search(name)}
    if not chosen:
        raise GradscaleError(
            f"params must match at least one trainable parameter, got {pattern!r} for {len(trainable)} trainable "
            f"parameters{' such as ' + next(iter(trainable)) if trainable else ''}"
        )
    return chosen


def sites(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> tuple[Site, ...]:
    """The modules to hook so that every use of every one of `parameters` is seen exactly once.

    Raises: GradscaleError naming the parameters that no module's forward accounts for.
    """
    canonical = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[nn.Module, Site] = {}
    _visit("", model, canonical, found)
    seen = {name for site in found.values() for name in site.parameters.values()}
    missing = [name for name in parameters if name not in seen]
    if missing:
        raise GradscaleError(
            f"every measured parameter must belong to a module that is called, got none for {', '.join(missing)}; "
            "move it into a module of its own, or leave it out by --params"
        )
    return tuple(found.values())


def _visit(name: str, module: nn.Module, canonical: Mapping[int, str], found: dict[nn.Module, Site]) -> None:
    if module in found:  # registered under several names
        return
    whole = owns_subtree(module)
    own = {
        local: canonical[id(parameter)]
        for local, parameter in _owned(module, whole=whole).items()
        if id(parameter) in canonical
    }
    if own:
        found[module] = Site(name or "(the model)", module, own, rule_of(module))
    if whole:
        return
    for child_name, child in module.named_children():
        if not isinstance(child, nn.ParameterList | nn.ParameterDict):
            _visit(f"{name}.{child_name}".lstrip("."), child, canonical, found)


def _owned(module: nn.Module, *, whole: bool) -> dict[str, nn.Parameter]:
    """The parameters that `module.forward` reads: its own and those in its parameter lists; or all below it."""
    if isinstance(module, _CONTAINERS):
        return {}
    owned = dict(module.named_parameters(recurse=whole, remove_duplicate=False))
    for child_name, child in module.named_children():
        if isinstance(child, nn.ParameterList | nn.ParameterDict):
            owned |= {f"{child_name}.{n}": p for n, p in child.named_parameters(remove_duplicate=False)}
    return owned
