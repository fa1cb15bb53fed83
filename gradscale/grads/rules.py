"""How one call of a module becomes the per-example gradients of the module's parameters.

A rule is given the call's inputs and the gradients that reached its outputs, and returns one
`LayerGrads` for each parameter asked for. `RULES` holds the special rules; `generic` serves every other
module exactly, by a vector-Jacobian product per example. A special rule is taken only when the module
computes what the rule assumes: its `forward` is the original one and its weight is a plain parameter.

Shapes: B examples, T positions, I/O features in and out, P parameter entries.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from gradscale.errors import GradscaleError
from gradscale.grads.layer import DenseGrads, EmbeddingGrads, LayerGrads, OuterGrads, widen


class Call(NamedTuple):
    """One call of a module, once the gradients of its outputs are known."""

    name: str  # the module's, for messages
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: list[Tensor]  # the floating-point outputs, in pytree order; NaN: not to be compared with anything
    grads: list[Tensor]  # of the outputs; the first dimension of each is B
    batch_size: int


Rule = Callable[[Call, Sequence[str]], dict[str, LayerGrads]]


def rule_of(module: nn.Module) -> Rule:
    """The special rule for `module`, or `generic`."""
    special = _special(type(module))
    computed = "weight" not in module._parameters or parametrize.is_parametrized(module)  # as by weight_norm
    plain = "forward" not in module.__dict__ and not computed
    return special if special is not None and plain else generic


def owns_subtree(module: nn.Module) -> bool:
    """Whether `module` reads its children's parameters itself, so that their own hooks would never see the use."""
    return isinstance(module, nn.MultiheadAttention) or parametrize.is_parametrized(module)


def linear(call: Call, wanted: Sequence[str]) -> dict[str, LayerGrads]:
    grad = call.grads[0].reshape(call.batch_size, -1, call.grads[0].shape[-1])
    found: dict[str, LayerGrads] = {}
    if "weight" in wanted:
        source = _batched(call)
        found["weight"] = OuterGrads(grad, source.reshape(call.batch_size, -1, source.shape[-1]))
    if "bias" in wanted:
        found["bias"] = DenseGrads(widen(grad).sum(dim=1))
    return found


def conv1d(call: Call, wanted: Sequence[str]) -> dict[str, LayerGrads]:
    """GPT-2's Linear with its weight transposed, [I, O]."""
    found = linear(call, wanted)
    weight = found.get("weight")
    return found | ({"weight": OuterGrads(weight.right, weight.left)} if isinstance(weight, OuterGrads) else {})


def embedding(call: Call, wanted: Sequence[str]) -> dict[str, LayerGrads]:
    module = call.module
    assert isinstance(module, nn.Embedding)
    if module.max_norm is not None or module.scale_grad_by_freq:
        raise GradscaleError(
            f"embedding {call.name} must have max_norm=None and scale_grad_by_freq=False, "
            "since both couple the examples of a batch; change the module or leave it out by --params"
        )
    ids = _batched(call).reshape(call.batch_size, -1)
    grad = call.grads[0].reshape(call.batch_size, -1, module.embedding_dim)
    if module.padding_idx is not None:
        grad = grad.masked_fill((ids == module.padding_idx)[:, :, None], 0)
    return {name: EmbeddingGrads(ids, grad, module.num_embeddings) for name in wanted}


def layer_norm(call: Call, wanted: Sequence[str]) -> dict[str, LayerGrads]:
    module = call.module
    assert isinstance(module, nn.LayerNorm)
    grad = widen(call.grads[0])
    found: dict[str, LayerGrads] = {}
    entries = (call.batch_size, -1, *module.normalized_shape)
    if "weight" in wanted:
        normalized = F.layer_norm(widen(_batched(call)), module.normalized_shape, None, None, module.eps)
        found["weight"] = DenseGrads((grad * normalized).reshape(entries).sum(dim=1).flatten(1))
    if "bias" in wanted:
        found["bias"] = DenseGrads(grad.reshape(entries).sum(dim=1).flatten(1))
    return found


def generic(call: Call, wanted: Sequence[str]) -> dict[str, LayerGrads]:
    """Exact for any module: each example's vector-Jacobian product with respect to the wanted parameters.

    The module is run again on every example alone (vmapped where torch can trace it, else in a loop).
    Raises: GradscaleError if an example alone gives another output than it gave within its batch.
    """
    parameters = {name: call.module.get_parameter(name).detach() for name in wanted}
    used = [i for i, grad in enumerate(call.grads) if grad.any()]  # a recurrent net's last state may not be batch-first
    if not used:
        return {name: DenseGrads(p.new_zeros(call.batch_size, p.numel())) for name, p in parameters.items()}
    leaves, structure = pytree.tree_flatten((call.args, dict(call.kwargs)))
    moves = [isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == call.batch_size for leaf in leaves]

    def alone(batched: list[Tensor], grads: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        ours = iter(batched)
        inputs = [next(ours)[None] if moved else leaf for leaf, moved in zip(leaves, moves, strict=True)]
        args, kwargs = pytree.tree_unflatten(inputs, structure)

        def outputs_of(values: dict[str, Tensor]) -> list[Tensor]:
            outputs = float_tensors(torch.func.functional_call(call.module, values, args, kwargs, tie_weights=False))
            return [outputs[i] for i in used]

        outputs, pullback, *_ = torch.func.vjp(outputs_of, parameters)
        if any(g.numel() != o.numel() for g, o in zip(grads, outputs, strict=True)):
            shapes = [tuple(o.shape) for o in outputs]
            raise _mixed(call.name, f"shape {shapes[0] if len(shapes) == 1 else shapes} for one")
        return pullback([g.reshape(o.shape) for g, o in zip(grads, outputs, strict=True)])[0], outputs

    batched = [leaf for leaf, moved in zip(leaves, moves, strict=True) if moved]
    with torch.enable_grad():
        found, outputs = _per_example(alone, batched, [call.grads[i] for i in used])
    for i, output in zip(used, outputs, strict=True):
        _check_same(call.name, output.reshape(call.outputs[i].shape), call.outputs[i])
    return {name: DenseGrads(grad.reshape(call.batch_size, -1).detach()) for name, grad in found.items()}


def float_tensors(tree: Any) -> list[Tensor]:
    """The floating-point tensors of a module's output, in pytree order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _per_example(function: Callable[..., Any], batched: list[Tensor], grads: list[Tensor]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # where vmap itself loops
            return torch.func.vmap(function)(batched, grads)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):  # what vmap raises where it cannot trace
        results = [function([x[i] for x in batched], [g[i] for g in grads]) for i in range(grads[0].shape[0])]
        return pytree.tree_map(lambda *parts: torch.stack(parts), *results)


def _check_same(name: str, alone: Tensor, together: Tensor) -> None:
    finite = together.isfinite()
    scale = together.where(finite, 0).abs().amax() if together.numel() else together.sum()
    tolerance = 1e3 * torch.finfo(together.dtype).eps * float(scale)
    difference = (alone - together).abs().where(finite, 0)
    largest = float(difference.amax()) if together.numel() else 0.0
    if not largest <= tolerance:
        raise _mixed(name, f"one {largest:.2g} apart within the batch")


def _mixed(name: str, got: str) -> GradscaleError:
    return GradscaleError(
        f"module {name} must give each example the output it has alone, got {got}; its inputs and outputs must have "
        "the batch as their first dimension and must not mix examples. "
        "Wrap the parameter in a module of its own, or leave it out by --params"
    )


def _batched(call: Call) -> Tensor:
    """The call's first input with B rows; an input that is broadcast over the batch is repeated."""
    source = call.args[0] if call.args else next(iter(call.kwargs.values()))
    assert isinstance(source, Tensor)
    if source.shape[0] != call.batch_size:
        source = source.expand(call.batch_size, *source.shape[1:])
    return source


def _special(kind: type[nn.Module]) -> Rule | None:
    """The rule of the class whose `forward` this class has or inherits unchanged."""
    for base in kind.__mro__:
        rule = RULES.get(f"{base.__module__}.{base.__qualname__}")
        if rule is not None and vars(base)["forward"] is kind.forward:
            return rule
    return None


RULES: dict[str, Rule] = {  # by name, so that no library is imported for the sake of its classes
    "torch.nn.modules.linear.Linear": linear,
    "torch.nn.modules.sparse.Embedding": embedding,
    "torch.nn.modules.normalization.LayerNorm": layer_norm,
    "transformers.pytorch_utils.Conv1D": conv1d,
}
