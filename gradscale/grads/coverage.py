"""Which module's hook accounts for which parameter, settled before the first microbatch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from gradscale.errors import GradscaleError
from gradscale.grads.call import Rule
from gradscale.grads.rules import is_fast, owns_subtree, rule_of

_CONTAINERS = (nn.ParameterList, nn.ParameterDict, nn.ModuleList, nn.ModuleDict)


class Site(NamedTuple):
    """A module whose calls are recorded. `parameters` maps the module's own names to the model's."""

    name: str
    module: nn.Module
    parameters: Mapping[str, str]
    rule: Rule


class Covered(NamedTuple):
    """How one parameter is covered: by each of its uses, a tied one by several."""

    name: str
    entries: int
    rule: str  # joined by " + " where they differ
    module: str  # joined by ", "
    fast: bool  # none of its uses runs the module again for every example


@dataclass(frozen=True)
class Coverage:
    """How every measured parameter is covered, in their order."""

    parameters: tuple[Covered, ...]

    @property
    def entries(self) -> int:
        return sum(row.entries for row in self.parameters)

    @property
    def share_fast(self) -> float:
        """Of the entries."""
        return sum(row.entries for row in self.parameters if row.fast) / self.entries

    @property
    def share_generic(self) -> float:
        """Of the entries: those whose gradients take a second run of their module."""
        return sum(row.entries for row in self.parameters if not row.fast) / self.entries


def describe(sites: Sequence[Site], parameters: Mapping[str, nn.Parameter]) -> Coverage:
    """Which rule accounts for which parameter; for `gradscale plan`."""
    rows = []
    for name, parameter in parameters.items():
        uses = [site for site in sites for used in site.parameters.values() if used == name]
        rule = " + ".join(dict.fromkeys(site.rule.__name__ for site in uses))
        module = ", ".join(site.name for site in uses)
        rows.append(Covered(name, parameter.numel(), rule, module, all(is_fast(site.rule) for site in uses)))
    return Coverage(tuple(rows))


def select_parameters(model: nn.Module, pattern: str | None, exclude: Collection[str] = ()) -> dict[str, nn.Parameter]:
    """The trainable parameters whose name matches the regular expression `pattern` (anywhere in it; None: all).

    Those named in `exclude` are left out.
    Raises: GradscaleError if none is left, one of `exclude` is not there, or the pattern is no regular expression.
    """
    try:
        wanted = re.compile(pattern or "")
    except re.error as error:
        raise GradscaleError(f"params must be a regular expression, got {pattern!r}: {error}") from error
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    unknown = [name for name in exclude if name not in trainable]
    if unknown:
        raise GradscaleError(f"exclude must name trainable parameters, got {', '.join(unknown)}; see `gradscale plan`")
    chosen = {name: p for name, p in trainable.items() if wanted.search(name) and name not in exclude}
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
