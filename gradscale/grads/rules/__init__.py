"""How one call of a module becomes the per-example gradients of the module's parameters.

A rule is given the call's inputs and the gradients that reached its outputs, and returns one `LayerGrads` for
each parameter asked for. `RULES` holds the special rules; `generic` serves every other module exactly, by a
vector-Jacobian product per example. A special rule is taken only when the module computes what the rule
assumes: its methods are the original ones and its weight is a plain parameter.
"""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.nn.utils import parametrize

from gradscale.grads import experts
from gradscale.grads.call import Call, Rule, float_tensors
from gradscale.grads.generic import generic
from gradscale.grads.rules.convolutions import convolution, transposed_convolution
from gradscale.grads.rules.linear import conv1d, embedding, embedding_bag, linear
from gradscale.grads.rules.norms import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from gradscale.grads.rules.sequences import attention, recurrent

__all__ = ["RULES", "Call", "Rule", "float_tensors", "generic", "is_fast", "owns_subtree", "rule_of"]

RULES: dict[str, Rule] = {  # by name, so that no library is imported for the sake of its classes
    "torch.nn.modules.linear.Linear": linear,
    "torch.nn.modules.sparse.Embedding": embedding,
    "torch.nn.modules.sparse.EmbeddingBag": embedding_bag,
    "torch.nn.modules.normalization.LayerNorm": layer_norm,
    "torch.nn.modules.normalization.GroupNorm": group_norm,
    "torch.nn.modules.batchnorm._BatchNorm": batch_norm,
    "torch.nn.modules.batchnorm.SyncBatchNorm": batch_norm,
    "torch.nn.modules.instancenorm._InstanceNorm": instance_norm,
    "torch.nn.modules.conv.Conv1d": convolution,
    "torch.nn.modules.conv.Conv2d": convolution,
    "torch.nn.modules.conv.Conv3d": convolution,
    "torch.nn.modules.conv.ConvTranspose1d": transposed_convolution,
    "torch.nn.modules.conv.ConvTranspose2d": transposed_convolution,
    "torch.nn.modules.conv.ConvTranspose3d": transposed_convolution,
    "torch.nn.modules.activation.MultiheadAttention": attention,
    "torch.nn.modules.rnn.RNN": recurrent,
    "torch.nn.modules.rnn.LSTM": recurrent,
    "torch.nn.modules.rnn.GRU": recurrent,
    "transformers.pytorch_utils.Conv1D": conv1d,
    **experts.RULES,
}
_METHODS = ("forward", "_conv_forward", "_apply_instance_norm")  # what a subclass must not have changed
_NAMES = ("weight", "bias")
_RMS_NORM = re.compile(r"(RMSNorm|T5LayerNorm)$")  # the rule itself tries out what the class computes
_SLOW = (generic, embedding_bag, attention, recurrent)


def rule_of(module: nn.Module) -> Rule:
    """The special rule for `module`, or `generic`."""
    kind = type(module)
    if not _is_plain(module):
        return generic
    if _RMS_NORM.search(kind.__name__) and [name for name, _ in module.named_parameters()] == ["weight"]:
        return rms_norm
    return _special(kind) or generic


def is_fast(rule: Rule) -> bool:
    """Whether the rule does without running the module again for every example."""
    return rule not in _SLOW


def owns_subtree(module: nn.Module) -> bool:
    """Whether `module` is to be taken as a whole, for its children's hooks would not see the use or the examples."""
    known = isinstance(module, nn.MultiheadAttention) or parametrize.is_parametrized(module)
    return known or experts.is_moe_block(module) or experts.shares_position_bias(module)


def _is_plain(module: nn.Module) -> bool:
    """Its methods are its class's, and its weight and bias are parameters; not so under weight_norm, old or new."""
    computed = any(
        isinstance(getattr(module, name, None), Tensor) and name not in module._parameters for name in _NAMES
    )
    return not (computed or parametrize.is_parametrized(module) or any(name in module.__dict__ for name in _METHODS))


def _special(kind: type[nn.Module]) -> Rule | None:
    """The rule of the class whose methods this class has or inherits unchanged."""
    for base in kind.__mro__:
        rule = RULES.get(f"{base.__module__}.{base.__qualname__}")
        if rule is not None and all(getattr(kind, name, None) is getattr(base, name, None) for name in _METHODS):
            return rule
    return None
