"""Mixtures of experts, whose insides do not have the batch as their first dimension, and what else is like them.

In blocks that are known, the insides see the tokens of all examples in one dimension, those of the first example
first: there `capture` gives rules what they expect, [B, T, ...], and `fused_experts` serves weights that are fused
over the experts. Every other block is taken as one module, with a vector-Jacobian product per example.

Shapes: B examples, T tokens of each, E experts, K of them for each token, S = B T K assignments of a token to an
expert, H features of a token, I of an expert's inside, R and C rows and columns of one expert's matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradscale.grads.call import Call, Rule
from gradscale.grads.layer import LayerGrads, multiply, wide_dtype, widen

_PAIRS_TILE = 1 << 19  # entries of padded assignments and their Gram matrices at a time: more cost page faults


@dataclass(frozen=True)
class ExpertGrads:
    """Gradients of [E, R, C]: of expert e and example b, the sum of left[s] right[s]^T over their assignments s."""

    left: Tensor  # [S, R], by expert, then by example
    right: Tensor  # [S, C]
    bounds: tuple[tuple[int, ...], ...]  # [E, B + 1]: the assignments of e and b are bounds[e][b] : bounds[e][b + 1]

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.bounds[0]) - 1, len(self.bounds) * self.left.shape[1], self.right.shape[1]

    @property
    def shape_of_one(self) -> tuple[int, int]:
        """(R, C), of one expert."""
        return self.left.shape[1], self.right.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return wide_dtype(self.left.dtype)

    @property
    def device(self) -> torch.device:
        return self.left.device

    def tile(self, examples: slice, rows: slice, out: Tensor, *, add: bool = False) -> None:
        height = self.left.shape[1]
        for expert in range(rows.start // height, -(-rows.stop // height)):
            start, stop = max(rows.start, expert * height), min(rows.stop, (expert + 1) * height)
            bounds = self.bounds[expert][examples.start : examples.stop + 1]
            left = widen(self.left[bounds[0] : bounds[-1], start - expert * height : stop - expert * height])
            right = widen(self.right[bounds[0] : bounds[-1]])
            for b in range(len(bounds) - 1):
                part = slice(bounds[b] - bounds[0], bounds[b + 1] - bounds[0])
                into = out[b, None, start - rows.start : stop - rows.start]
                multiply(left[part].mT[None], right[None, part], into, add=add)

    @property
    def counts(self) -> Tensor:
        """[E, B]: how many assignments an expert and an example have; on the CPU."""
        return torch.tensor(self.bounds).diff()


def add_norms_of_pairs(grads: ExpertGrads, norms: Tensor) -> None:
    """Add the squared norms [B]: <left_s, left_t> <right_s, right_t>, summed over pairs of the same expert and example.

    Experts and examples with about as many assignments are padded to the same number, and taken together.
    """
    starts, counts = torch.tensor(grads.bounds)[:, :-1].flatten(), grads.counts.flatten()
    factors = [torch.cat([factor, factor.new_zeros(1, factor.shape[1])]) for factor in (grads.left, grads.right)]
    for cells, height in _alike(counts):
        for part in cells.split(max(1, _PAIRS_TILE // (height * (height + sum(grads.shape_of_one))))):
            position = torch.arange(height)
            padding = position >= counts[part, None]
            rows = (starts[part, None] + position).masked_fill(padding, len(grads.left)).flatten().to(grads.device)
            left, right = (widen(f.index_select(0, rows)).view(len(part), height, -1) for f in factors)
            gram = (left @ left.mT).mul_(right @ right.mT)
            norms.index_add_(0, (part % len(norms)).to(grads.device), gram.flatten(1).sum(dim=1).double())


def add_sum_of_assignments(grads: ExpertGrads, weights: Tensor | None, total: Tensor) -> None:
    """Add the sum [P] over examples of weights[b] (None: one each) * gradient[b]: one product for each expert."""
    left = widen(grads.left)
    if weights is not None:
        batch, counts = len(weights), grads.counts
        example = torch.arange(batch).expand_as(counts).flatten().repeat_interleave(counts.flatten())
        left = left * weights[example.to(grads.device), None]
    for bounds, block in zip(grads.bounds, total.view(len(grads.bounds), *grads.shape_of_one), strict=True):
        part = slice(bounds[0], bounds[-1])
        block.addmm_(left[part].mT, widen(grads.right[part]))


def _alike(counts: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Indices of `counts` from the largest down, in groups none of which falls below half its largest; none of 0."""
    ordered, order = counts.sort(descending=True)
    sizes, start = ordered.tolist(), 0
    while start < len(sizes) and sizes[start]:
        stop = next((i for i in range(start, len(sizes)) if 2 * sizes[i] < sizes[start]), len(sizes))
        yield order[start:stop], sizes[start]
        start = stop


def fused_experts(call: Call, wanted: Sequence[str]) -> dict[str, LayerGrads]:
    """down_proj[e] (act(gate) * up) with (gate, up) = gate_up_proj[e] x, weighted and summed over a token's experts.

    The forward is computed again; a token's gradient reaches an expert's output times the routing weight.
    """
    given = dict(zip(_ARGUMENTS, call.args, strict=False)) | dict(call.kwargs)
    hidden, index, weights = (given[name].reshape(-1, given[name].shape[-1]) for name in _ARGUMENTS)
    matrices = (call.module.get_parameter(name).detach() for name in ("gate_up_proj", "down_proj"))
    gate_up, down = (matrix.to(hidden.dtype) for matrix in matrices)  # another dtype is autocast's
    token, weight, bounds = _assignments(call.batch_size, len(gate_up), index, weights)
    source = hidden[token]
    output_grad = (call.grads[0].reshape(hidden.shape)[token] * weight[:, None]).to(hidden.dtype)
    parts = [(e, slice(row[0], row[-1])) for e, row in enumerate(bounds) if row[0] < row[-1]]
    opened = source.new_empty(len(source), gate_up.shape[1])
    inside_grad = source.new_empty(len(source), down.shape[2])
    for e, part in parts:
        torch.mm(source[part], gate_up[e].mT, out=opened[part])
        torch.mm(output_grad[part], down[e], out=inside_grad[part])
    with torch.enable_grad():
        opened.requires_grad_()
        gate, up = opened.chunk(2, dim=-1)
        inside = call.module.get_submodule("act_fn")(gate) * up
    (opened_grad,) = torch.autograd.grad(inside, opened, inside_grad)
    found = {
        "gate_up_proj": ExpertGrads(opened_grad, source, bounds),
        "down_proj": ExpertGrads(output_grad, inside.detach(), bounds),
    }
    return {name: found[name] for name in wanted}


def is_moe_block(module: nn.Module) -> bool:
    """Whether `module` routes tokens to experts in a way that is not known, so that it is to be taken as a whole."""
    experts = module._modules.get("experts")
    return experts is not None and next(experts.parameters(), None) is not None and not flattens_tokens(module)


def flattens_tokens(module: nn.Module) -> bool:
    """Whether `module` is a block that takes [B, T, H] and gives its insides [B, T, ...], or that as [B T, ...]."""
    experts = module._modules.get("experts")
    return (
        experts is not None
        and _name(module) in _BLOCKS
        and _name(experts) in RULES
        and "forward" not in module.__dict__
        and {name: parameter.dim() for name, parameter in experts.named_parameters()} == _FUSED
    )


def shares_position_bias(module: nn.Module) -> bool:
    """Whether `module` is an attention whose table of relative positions gives all examples one bias, as T5's does.

    It is to be taken as a whole, for inside it nothing of the table has a batch dimension.
    """
    return isinstance(module._modules.get("relative_attention_bias"), nn.Embedding)


def _assignments(
    batch_size: int, num_experts: int, index: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, tuple[tuple[int, ...], ...]]:
    """The token [S] and the weight [S] of each assignment, by expert, then by example; and the bounds of those.

    An index of E or more stands for no expert. The bounds are read on the host, which waits for them, at every
    call: what `waiting.py` spares others does not hold here. The model's own forward waits too in its eager form.
    """
    tokens, slots = index.shape
    example = torch.arange(tokens, device=index.device).div(tokens // batch_size, rounding_mode="floor")
    group = (index * batch_size + example[:, None]).flatten()
    order = group.argsort(stable=True)
    counts = torch.bincount(group, minlength=num_experts * batch_size)[: num_experts * batch_size]
    ends = counts.cumsum(0).tolist()
    order = order[: ends[-1]]
    starts = [0, *ends]
    bounds = tuple(tuple(starts[e * batch_size : (e + 1) * batch_size + 1]) for e in range(num_experts))
    return order.div(slots, rounding_mode="floor"), weights.flatten()[order], bounds


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")
_FUSED = {"gate_up_proj": 3, "down_proj": 3}
_MODELS = "transformers.models"
RULES: dict[str, Rule] = {  # by name, so that no library is imported for the sake of its classes
    f"{_MODELS}.mixtral.modeling_mixtral.MixtralExperts": fused_experts,
    f"{_MODELS}.qwen2_moe.modeling_qwen2_moe.Qwen2MoeExperts": fused_experts,
    f"{_MODELS}.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts": fused_experts,
    f"{_MODELS}.olmoe.modeling_olmoe.OlmoeExperts": fused_experts,
    f"{_MODELS}.deepseek_v3.modeling_deepseek_v3.DeepseekV3Experts": fused_experts,
}
_BLOCKS = frozenset(
    {
        f"{_MODELS}.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
        f"{_MODELS}.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
        f"{_MODELS}.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
        f"{_MODELS}.olmoe.modeling_olmoe.OlmoeSparseMoeBlock",
        f"{_MODELS}.deepseek_v3.modeling_deepseek_v3.DeepseekV3MoE",
    }
)
