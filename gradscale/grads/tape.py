"""What one forward and backward pass records: a forward hook on every site, a gradient hook on its outputs.

As soon as the last use of a parameter has its gradient, the parameter's `LayerGrads` go to `read` and are freed.
What a site was called with is kept as autograd keeps what it saves, so that activation checkpointing and offloading
save memory here as they do elsewhere. Under checkpointing a module runs again in the backward pass: with
`use_reentrant=False` to give back what was saved; with `use_reentrant=True` the first run has no graph, and the
second is the one that is recorded.

The pass is that of `capture`, or somebody else's, a training step's: it then goes on whatever happens here.

Shapes: B examples, T positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import _StopRecomputationError

from gradscale.errors import GradscaleError
from gradscale.grads.broadcast import Broadcast, settled
from gradscale.grads.call import (
    Call,
    Rule,
    autocast_of,
    batch_dims,
    by_example,
    cleared,
    precision,
    without,
    without_caches,
)
from gradscale.grads.coverage import Site
from gradscale.grads.experts import flattens_tokens, fused_experts, shares_position_bias
from gradscale.grads.generic import no_gradient
from gradscale.grads.layer import LayerGrads, share
from gradscale.grads.packing import Packing, unpacked
from gradscale.grads.rules.linear import conv1d, embedding, linear
from gradscale.grads.rules.norms import layer_norm
from gradscale.grads.saved import Saved
from gradscale.grads.waiting import Doubts, refuse

Read = Callable[[str, LayerGrads], None]

# Rules of modules that return a view of a tensor that nobody else has.
_FRESH: frozenset[Rule] = frozenset({linear, conv1d})

# Rules that do not look at outputs.
_BLIND: frozenset[Rule] = frozenset({linear, conv1d, embedding, layer_norm, fused_experts})


class Tape:
    """What one pass has recorded so far.

    With `failed` the pass is somebody else's: outputs are left as they are, but for copies where they are broadcast
    over the batch, and an error goes to `failed` instead of being raised, after which nothing more is recorded. With
    `packing`, a batch of `batch_size` rows holds several examples in a row, and what is read has one for each.
    """

    def __init__(
        self,
        batch_size: int,
        read: Read,
        exclude: Tensor | None,
        doubts: Doubts | None,
        failed: Callable[[Exception], None] | None = None,
        packing: Packing | None = None,
    ) -> None:
        self.batch_size = batch_size
        self._packing = packing
        self.ran_without_grad = False
        self._read = read
        self._exclude = exclude
        self._doubts = doubts
        self._failed = failed
        self._stopped = False
        self._anchor = torch.zeros((), requires_grad=True)
        self._pending: Counter[str] = Counter()  # uses without a gradient as yet, as the forward pass counts them
        self._uses: dict[str, list[LayerGrads]] = {}
        self._positions: dict[nn.Module, int | None] = {}  # T of the blocks that flatten [B, T] to [B T]
        self._in_forward = True
        self._muted = False  # while a rule runs modules again

    @contextmanager
    def recording(self, model: nn.Module, sites: Sequence[Site], others: Sequence[nn.Module] = ()) -> Iterator[None]:
        """Hooks on the sites; the outputs of `others` start the graph too, where nothing before them has."""
        blocks = [module for module in model.modules() if flattens_tokens(module)]
        block_of = {module: block for block in blocks for module in block.modules() if module is not block}
        enter = self._guarded(self._enter)
        handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
        for site in sites:
            hook = self._guarded(self._hook(site, block_of.get(site.module)))
            handles.append(site.module.register_forward_hook(hook, with_kwargs=True))
        handles += [module.register_forward_hook(self._start) for module in others]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forward_is_over(self) -> None:
        self._in_forward = False

    def stop(self) -> None:
        """Record nothing more."""
        self._stopped = True
        self._uses.clear()

    def finish(self) -> None:
        """Read the parameters some of whose uses got no gradient: those uses have no part in the losses."""
        for name, uses in self._uses.items():
            self._read(name, share(uses))
        self._uses.clear()

    def _guarded(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook as it is in a pass of our own; in somebody else's, one that never raises."""
        if self._failed is None:
            return hook

        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return hook(*args, **kwargs)
            except _StopRecomputationError:  # a checkpoint's own way to end its second run
                raise
            except Exception as problem:
                self._fail(problem)
                return None

        return guarded

    def _fail(self, problem: Exception) -> None:
        """Read nothing more. What is kept goes on being kept: a checkpoint must save the same in its second run."""
        assert self._failed is not None
        if not self._stopped:
            self.stop()
            self._failed(problem)

    def _check_riding(self, site: Site, floats: Sequence[Tensor]) -> None:
        """Fail if a call in somebody else's pass cannot be told from what is not part of it."""
        if not torch.is_grad_enabled() or self._failed is None:
            return
        if not self._in_forward and torch._C._current_graph_task_id() == -1:
            self._fail(
                GradscaleError(
                    f"module {site.name} must be called once by the model's forward for every engine.backward, got a "
                    "call after it; compute what the loss needs of the weights in the model, and evaluate under "
                    "torch.no_grad()"
                )
            )
        if not all(output.requires_grad for output in floats):
            self._fail(
                GradscaleError(
                    f"the outputs of module {site.name} must all require grad where its parameters do, got one that "
                    "does not; leave the module out by params"
                )
            )

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        source = next((x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)), None)
        batched = source is not None and source.dim() == 3 and source.shape[0] == self.batch_size
        self._positions[block] = source.shape[1] if source is not None and batched else None

    def _start(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._muted or not torch.is_grad_enabled():
            return None
        return pytree.tree_map_only(Tensor, lambda x: self._rooted(x) if x.is_floating_point() else x, output)

    def _hook(self, site: Site, block: nn.Module | None) -> Callable[..., Any]:
        def after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._muted:
                return None
            if site.rule is embedding and self._may_be_positions(args, kwargs):
                return self._broadcast(site, module, (args, kwargs), output)
            leaves, structure = ([output], None) if isinstance(output, Tensor) else pytree.tree_flatten(output)
            floats = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            self._check_riding(site, [leaves[i] for i in floats])
            for i in floats:
                leaves[i] = _unaliased(leaves[i]) if site.rule in _FRESH else leaves[i]
                leaves[i] = self._spread(module, leaves[i], (args, kwargs))
            if self._in_forward:
                self._pending.update(site.parameters.values())
            if torch.is_grad_enabled():
                for i in floats:
                    leaves[i] = self._rooted(leaves[i])
                if len(floats) > 1:  # seen apart from what the module itself makes of one output for another
                    for i in floats:
                        leaves[i] = leaves[i].view_as(leaves[i])
                positions = None if block is None else self._positions[block]
                arranged = None if positions is None else partial(by_example, positions=positions)
                self._expect(site, module, without_caches(args, kwargs), [leaves[i] for i in floats], arranged)
            else:  # runs again with a gradient if it is checkpointed with use_reentrant=True
                self.ran_without_grad = True
            return leaves[0] if structure is None else pytree.tree_unflatten(leaves, structure)

        return after_forward

    def _spread(self, module: nn.Module, output: Tensor, inputs: Any) -> Tensor:
        """An output broadcast over the batch (position embeddings), of no batched input, gets a row per example."""
        elsewhere = isinstance(module, nn.MultiheadAttention | nn.RNNBase)  # with a batch dimension of their own
        if elsewhere or output.dim() < 2 or not output.shape[0] == 1 < self.batch_size:
            return output
        batched = any(isinstance(x, Tensor) and x.shape[:1] == (self.batch_size,) for x in pytree.tree_leaves(inputs))
        if batched and not shares_position_bias(module):
            return output
        return output.expand(self.batch_size, *output.shape[1:])

    def _may_be_positions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an embedding's ids may be [T], those of positions; labels [B] may if they count up."""
        (ids,) = (*args, *kwargs.values())
        return ids.dim() == 1 and (len(ids) != self.batch_size or bool((ids.diff() == 1).all()))

    def _broadcast(self, site: Site, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """The output [T, E], with a copy for each example."""
        if self._in_forward:
            self._pending.update(site.parameters.values())
        if not torch.is_grad_enabled():
            self.ran_without_grad = True
            return output
        copies, own = self._rooted(output.expand(self.batch_size, *output.shape)), self._rooted(output)
        own = own if self._failed is None else own.view_as(own)  # which the copies' gradients do not pass
        self._expect(site, module, inputs, [copies, own], settled)
        return own if self.batch_size == 1 else Broadcast.of(own, copies)

    def _rooted(self, output: Tensor) -> Tensor:
        """The graph starts at the first outputs that depend on a parameter."""
        if output.requires_grad or self._failed is not None:
            return output
        root = output.detach().requires_grad_()
        root.register_post_accumulate_grad_hook(_forget)
        return root.clone()  # not a leaf: the model may go on to change it in place

    def _expect(
        self,
        site: Site,
        module: nn.Module,
        inputs: Any,
        outputs: list[Tensor],
        arranged: Callable[[Call], Call] | None,
    ) -> None:
        kept = [Saved(inputs, self._anchor)]
        if site.rule not in _BLIND:
            kept.append(Saved(outputs, self._anchor))
        makers = [(output.shape, output.dtype, output.device) for output in outputs]
        autocast = autocast_of(outputs[0].device) if outputs else None

        def after_backward(grads: Sequence[Tensor | None]) -> None:
            if self._stopped:
                return
            saved_inputs, *saved_outputs = [saved.take() for saved in kept]
            kept.clear()
            if saved_inputs is None:
                raise GradscaleError(
                    f"the inputs of module {site.name} must stay as they are until the backward pass, "
                    "got an in-place change; write x = x + y for x += y in the model"
                )
            filled = [
                torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
                for grad, (shape, dtype, device) in zip(grads, makers, strict=True)
            ]
            gone = [grad.new_full((), torch.nan).expand(grad.shape) for grad in filled]
            # None after an in-place change, as by nn.ReLU(inplace=True)
            before = next((saved for saved in saved_outputs if saved is not None), gone)
            args, kwargs = saved_inputs
            unreached = frozenset(i for i, grad in enumerate(grads) if grad is None)
            seen = (args, kwargs, before, filled, self.batch_size)
            call = Call(site.name, module, *seen, unreached, self._doubts, autocast)
            self._take(site, call if arranged is None else arranged(call))

        hook = self._guarded(after_backward)
        if len(outputs) == 1:
            outputs[0].register_hook(lambda grad: hook([grad]))
        else:
            register_multi_grad_hook(outputs, hook)

    def _take(self, site: Site, call: Call) -> None:
        call = call._replace(unreached=call.unreached | self._without_batch(site, call))
        rule = site.rule if len(call.unreached) < len(call.outputs) else no_gradient
        if self._packing is not None:
            call = unpacked(call, self._packing)
        self._muted = True
        try:
            with torch.no_grad(), precision(call.grads[0].device, None) if self._failed else nullcontext():
                found = rule(without(call, self._exclude), tuple(site.parameters))
                for local, grads in found.items():
                    self._add(site.parameters[local], cleared(grads, self._exclude))
        finally:
            self._muted = False

    def _without_batch(self, site: Site, call: Call) -> frozenset[int]:
        """The outputs without a batch dimension, which are fine as long as their gradients are zero."""

        def error(output: Tensor) -> GradscaleError:
            return GradscaleError(
                f"the output of module {site.name} must have the batch ({self.batch_size}) as its first dimension, "
                f"got shape {tuple(output.shape)}; reshape inside the model, or leave "
                f"{', '.join(site.parameters.values())} out by --params"
            )

        shapes = [(output.shape, dim) for output, dim in zip(call.outputs, batch_dims(call), strict=True)]
        found = [i for i, (shape, dim) in enumerate(shapes) if shape[dim : dim + 1] != (self.batch_size,)]
        for i in found:
            if i not in call.unreached:
                refuse(call.grads[i].any(), partial(error, call.outputs[i]), self._doubts)
        return frozenset(found)

    def _add(self, name: str, grads: LayerGrads) -> None:
        self._uses.setdefault(name, []).append(grads)
        self._pending[name] -= 1
        if not self._pending[name]:
            self._read(name, share(self._uses.pop(name)))


def _unaliased(output: Tensor) -> Tensor:
    """The output, no view: of a view that is changed in place, autograd throws the node away on which the hook is."""
    found: Tensor = torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output
    return found


def _forget(root: Tensor) -> None:
    root.grad = None
