"""One forward and one backward pass, read parameter by parameter while the gradients exist.

`capture` runs a function that maps the model to one loss per example, with a forward hook on every
site and a gradient hook on its outputs. As soon as the last use of a parameter has its gradient, the
parameter's `LayerGrads` go to `read` and are freed. The model's own parameters do not require grad
meanwhile, so autograd computes no weight gradient.

Shapes: B examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils import _pytree as pytree

from gradscale.errors import GradscaleError
from gradscale.grads.coverage import Site
from gradscale.grads.layer import DenseGrads, LayerGrads, share
from gradscale.grads.rules import Call

Read = Callable[[str, LayerGrads], None]


def capture(
    model: nn.Module,
    sites: Sequence[Site],
    losses: Callable[[nn.Module], Tensor],
    batch_size: int,
    read: Read,
    exclude: Tensor | None = None,
) -> Tensor:
    """Run `losses(model)` -> [B] and its backward; call `read(parameter, grads)` once for every parameter used.

    Examples flagged in `exclude` [B] have zero gradients. Returns the losses, detached.
    Raises: GradscaleError if the losses are not [B], do not depend on the sites, or a site mixes examples.
    """
    tape = _Tape(batch_size, read, exclude)
    with _frozen(model), tape.recording(sites), torch.enable_grad():
        values = losses(model)
        check_losses(values, batch_size)
        tape.stop_recording()
        if not values.requires_grad:
            raise GradscaleError(
                "losses must depend on the measured parameters, got losses without a gradient; "
                "compute them without torch.no_grad() and without .detach()"
            )
        torch.autograd.grad(values.sum(), tape.roots, allow_unused=True)
        tape.finish()
    return values.detach()


def check_losses(values: object, batch_size: int) -> None:
    """Raises: GradscaleError if `values` is not a floating-point tensor [B]."""
    if not isinstance(values, Tensor):
        raise GradscaleError(f"losses must be a tensor of shape ({batch_size},), got {type(values).__name__}")
    if values.dim() != 1 or values.shape[0] != batch_size or not values.is_floating_point():
        hint = "use reduction='none' and average over the positions of each example only"
        raise GradscaleError(
            f"losses must be one per example, a floating-point tensor of shape ({batch_size},), "
            f"got {values.dtype} of shape {tuple(values.shape)}; {hint}"
        )


class _Tape:
    """What one pass has recorded so far; it lives for one call of `capture`."""

    def __init__(self, batch_size: int, read: Read, exclude: Tensor | None) -> None:
        self.batch_size = batch_size
        self.roots: list[Tensor] = []  # where the graph starts: the first outputs that depend on a parameter
        self._read = read
        self._exclude = exclude
        self._pending: Counter[str] = Counter()
        self._uses: dict[str, list[LayerGrads]] = {}
        self._open = False

    @contextmanager
    def recording(self, sites: Sequence[Site]) -> Iterator[None]:
        handles = [site.module.register_forward_hook(self._hook(site), with_kwargs=True) for site in sites]
        self._open = True
        try:
            yield
        finally:
            self.stop_recording()
            for handle in handles:
                handle.remove()

    def stop_recording(self) -> None:
        self._open = False  # the generic rule calls modules again during the backward pass

    def finish(self) -> None:
        """Read the parameters some of whose uses got no gradient: those uses have no part in the losses."""
        for name, uses in self._uses.items():
            self._read(name, share(uses))
        self._uses.clear()

    def _hook(self, site: Site) -> Callable[..., Any]:
        def after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not self._open or not torch.is_grad_enabled():
                return None
            leaves, structure = pytree.tree_flatten(output)
            floats = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            for i in floats:
                leaves[i] = self._rooted(self._spread(leaves[i], (args, kwargs)))
            self._expect(site, module, args, kwargs, [leaves[i] for i in floats])
            return pytree.tree_unflatten(leaves, structure)

        return after_forward

    def _spread(self, output: Tensor, inputs: Any) -> Tensor:
        """An output broadcast over the batch (position embeddings), of no batched input, gets a row per example."""
        batched = any(isinstance(x, Tensor) and x.shape[:1] == (self.batch_size,) for x in pytree.tree_leaves(inputs))
        if batched or output.dim() < 2 or not output.shape[0] == 1 < self.batch_size:
            return output
        return output.expand(self.batch_size, *output.shape[1:])

    def _rooted(self, output: Tensor) -> Tensor:
        if output.requires_grad:
            return output
        root = output.detach().requires_grad_()
        self.roots.append(root)
        return root.clone()  # not a leaf: the model may go on to change it in place

    def _expect(self, site: Site, module: nn.Module, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        self._pending.update(site.parameters.values())
        inputs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        held = [(inputs, _versions(inputs), [output.detach() for output in outputs], _versions(outputs))]

        def after_backward(grads: Sequence[Tensor | None]) -> None:
            (saved_args, saved_kwargs), versions, saved_outputs, output_versions = held.pop()
            if _versions((saved_args, saved_kwargs)) != versions:
                raise GradscaleError(
                    f"the inputs of module {site.name} must stay as they are until the backward pass, "
                    "got an in-place change; write x = x + y for x += y in the model"
                )
            for i, version in enumerate(output_versions):
                if saved_outputs[i]._version != version:  # as by nn.ReLU(inplace=True): the value is gone
                    saved_outputs[i] = torch.full_like(saved_outputs[i], torch.nan)
            filled = [torch.zeros_like(o) if g is None else g for g, o in zip(grads, saved_outputs, strict=True)]
            self._take(site, Call(site.name, module, saved_args, saved_kwargs, saved_outputs, filled, self.batch_size))

        if len(outputs) == 1:
            outputs[0].register_hook(lambda grad: after_backward([grad]))
        else:
            register_multi_grad_hook(outputs, after_backward)

    def _take(self, site: Site, call: Call) -> None:
        for output, grad in zip(call.outputs, call.grads, strict=True):
            if (output.dim() == 0 or output.shape[0] != self.batch_size) and bool(grad.any()):
                raise GradscaleError(
                    f"the output of module {site.name} must have the batch ({self.batch_size}) as its first dimension, "
                    f"got shape {tuple(output.shape)}; reshape inside the model, or leave "
                    f"{', '.join(site.parameters.values())} out by --params"
                )
        with torch.no_grad():
            found = site.rule(_without(call, self._exclude), tuple(site.parameters))
            for local, grads in found.items():
                self._add(site.parameters[local], _cleared(grads, self._exclude))

    def _add(self, name: str, grads: LayerGrads) -> None:
        self._uses.setdefault(name, []).append(grads)
        self._pending[name] -= 1
        if not self._pending[name]:
            self._read(name, share(self._uses.pop(name)))


def _versions(tree: Any) -> list[int]:
    """How often each tensor has been changed in place; a detached tensor shares the count of its source."""
    return [leaf._version for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _without(call: Call, exclude: Tensor | None) -> Call:
    """The call with the excluded examples' inputs and gradients set to zero."""
    if exclude is None:
        return call

    def clear(tensor: Tensor, value: float = 0.0) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != call.batch_size or not tensor.is_floating_point():
            return tensor
        return tensor.masked_fill(exclude.view(-1, *[1] * (tensor.dim() - 1)), value)

    args, kwargs = pytree.tree_map_only(Tensor, clear, (call.args, call.kwargs))
    outputs = [clear(output, torch.nan) for output in call.outputs]
    return call._replace(args=args, kwargs=kwargs, outputs=outputs, grads=[clear(grad) for grad in call.grads])


def _cleared(grads: LayerGrads, exclude: Tensor | None) -> LayerGrads:
    if exclude is None or not isinstance(grads, DenseGrads):
        return grads
    return DenseGrads(grads.grads.masked_fill(exclude[:, None], 0))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
