"""Rules for modules with a batch dimension of their own: attention and recurrent networks, by `per_example`.

Shapes: B examples, T and S positions, E features, H heads, L layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from gradscale.errors import GradscaleError
from gradscale.grads.call import Call, batch_dims
from gradscale.grads.generic import generic, per_example
from gradscale.grads.layer import LayerGrads


def attention(call: Call, wanted: Sequence[str]) -> dict[str, LayerGrads]:
    """nn.MultiheadAttention, whose attn_mask is one [T, S] for all examples, or [B H, T, S]."""
    module = call.module
    assert isinstance(module, nn.MultiheadAttention)
    bound = inspect.signature(nn.MultiheadAttention.forward).bind(module, *call.args, **call.kwargs)
    bound.apply_defaults()
    inputs = {name: value for name, value in bound.arguments.items() if name != "self"}
    if inputs["query"].dim() != 3:
        return generic(call, wanted)
    dims = dict.fromkeys(("query", "key", "value"), 0 if module.batch_first else 1) | {"key_padding_mask": 0}
    if isinstance(inputs["attn_mask"], Tensor) and inputs["attn_mask"].dim() == 3:
        dims["attn_mask"] = 0
    given = [dims.get(name) if isinstance(value, Tensor) else None for name, value in inputs.items()]
    return per_example(call._replace(args=tuple(inputs.values()), kwargs={}), wanted, given, batch_dims(call))


def recurrent(call: Call, wanted: Sequence[str]) -> dict[str, LayerGrads]:
    """nn.RNN, nn.LSTM and nn.GRU, whose states are [L, B, E] whatever batch_first says."""
    module = call.module
    assert isinstance(module, nn.RNNBase)
    given = dict(zip(("input", "hx"), call.args, strict=False)) | dict(call.kwargs)
    source, state = given["input"], given.get("hx")
    if isinstance(source, PackedSequence):
        raise GradscaleError(
            f"recurrent module {call.name} must be given a padded tensor, got a PackedSequence, which orders examples "
            "by time step; pass the padded batch and pick the last steps from its output"
        )
    if source.dim() != 3:
        return generic(call, wanted)
    states = [1 if isinstance(leaf, Tensor) else None for leaf in pytree.tree_leaves(state)]
    dims = [0 if module.batch_first else 1, *states]
    return per_example(call._replace(args=(source, state), kwargs={}), wanted, dims, batch_dims(call))
