"""Rules for layers whose weight multiplies the input as it is: Linear and Embedding.

Shapes: B examples, T positions, I/O features in and out.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gradscale.errors import GradscaleError
from gradscale.grads.call import Call, batched_input
from gradscale.grads.generic import generic
from gradscale.grads.layer import DenseGrads, EmbeddingGrads, LayerGrads, OuterGrads, widen


def linear(call: Call, wanted: Sequence[str]) -> dict[str, LayerGrads]:
    grad = call.grads[0].reshape(call.batch_size, -1, call.grads[0].shape[-1])
    found: dict[str, LayerGrads] = {}
    if "weight" in wanted:
        source = batched_input(call)
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
    check_uncoupled(call)
    ids = batched_input(call).reshape(call.batch_size, -1)
    grad = call.grads[0].reshape(call.batch_size, -1, module.embedding_dim)
    if module.padding_idx is not None:
        grad = grad.masked_fill((ids == module.padding_idx)[:, :, None], 0)
    return {name: EmbeddingGrads(ids, grad, module.num_embeddings) for name in wanted}


def embedding_bag(call: Call, wanted: Sequence[str]) -> dict[str, LayerGrads]:
    """By the generic rule, for bags of one size."""
    check_uncoupled(call)
    ids = call.args[0] if call.args else next(iter(call.kwargs.values()))
    if ids.dim() != 2:
        raise GradscaleError(
            f"embedding bag {call.name} must be given ids of shape (batch, bag), got {tuple(ids.shape)} and offsets; "
            "pad the bags with its padding_idx, or leave it out by --params"
        )
    return generic(call, wanted)


def check_uncoupled(call: Call) -> None:
    """Raises: GradscaleError if the table's settings make the examples of a batch depend on one another."""
    module = call.module
    assert isinstance(module, nn.Embedding | nn.EmbeddingBag)
    if module.max_norm is not None or module.scale_grad_by_freq:
        raise GradscaleError(
            f"embedding {call.name} must have max_norm=None and scale_grad_by_freq=False, "
            "since both couple the examples of a batch; change the module or leave it out by --params"
        )
