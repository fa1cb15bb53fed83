"""Every rule gives what autograd gives one example at a time, and is taken only where it holds.

Shapes: B examples, T positions, E features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree

from gradscale.errors import GradscaleError
from gradscale.grads import generic as generic_module
from gradscale.grads.call import Call, float_tensors
from gradscale.grads.coverage import describe, select_parameters, sites
from gradscale.grads.generic import generic
from gradscale.grads.layer import GroupedGrads, OuterGrads, materialize
from gradscale.grads.rules import is_fast, rule_of

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
B = 3
conv1, conv2, conv3 = nn.Conv1d, nn.Conv2d, nn.Conv3d
transposed1, transposed2, transposed3 = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one example
    rule: str
    integers: int = 0


def running(make: Callable[[], nn.Module]) -> nn.Module:
    """In eval mode, with running statistics that are neither 0 nor 1."""
    module = make().eval()
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.copy_(0.5 + torch.rand_like(buffer))
    return module


CASES: dict[str, Case] = {
    "linear": Case(partial(nn.Linear, 4, 3), (4,), "linear"),
    "linear-2-dims": Case(partial(nn.Linear, 4, 3), (2, 5, 4), "linear"),
    "embedding": Case(partial(nn.Embedding, 5, 3), (6,), "embedding", 5),
    "embedding-single": Case(partial(nn.Embedding, 5, 3), (), "embedding", 5),
    "embedding-grid": Case(partial(nn.Embedding, 5, 3), (2, 6), "embedding", 5),
    "embedding-padding": Case(partial(nn.Embedding, 5, 3, padding_idx=0), (6,), "embedding", 5),
    "embedding-bag": Case(partial(nn.EmbeddingBag, 5, 3), (6,), "embedding_bag", 5),
    "embedding-bag-max": Case(partial(nn.EmbeddingBag, 5, 3, mode="max"), (6,), "embedding_bag", 5),
    "embedding-bag-sparse": Case(partial(nn.EmbeddingBag, 5, 3, sparse=True), (6,), "embedding_bag", 5),
    "conv1": Case(partial(conv1, 4, 6, 3), (4, 7), "convolution"),
    "conv1-patches": Case(partial(conv1, 4, 6, 3, stride=3), (4, 9), "convolution"),
    "conv1-depthwise": Case(partial(conv1, 4, 8, 3, groups=4, bias=False), (4, 7), "convolution"),
    "conv2": Case(partial(conv2, 2, 3, 3), (2, 5, 6), "convolution"),
    "conv2-point": Case(partial(conv2, 4, 3, 1), (4, 5, 6), "convolution"),
    "conv2-stride": Case(partial(conv2, 2, 3, (2, 3), stride=(3, 2), padding=(1, 2)), (2, 6, 7), "convolution"),
    "conv2-same": Case(partial(conv2, 2, 3, (2, 4), padding="same", dilation=(3, 1)), (2, 5, 6), "convolution"),
    "conv2-valid": Case(partial(conv2, 2, 3, 2, padding="valid", bias=False), (2, 5, 6), "convolution"),
    "conv2-dilated": Case(partial(conv2, 2, 3, 3, dilation=(1, 2), stride=2, padding=2), (2, 6, 7), "convolution"),
    "conv2-groups": Case(partial(conv2, 4, 6, 2, groups=2, padding=1), (4, 4, 5), "convolution"),
    "conv2-reflect": Case(partial(conv2, 2, 3, 3, padding=(1, 2), padding_mode="reflect"), (2, 5, 6), "convolution"),
    "conv2-circular": Case(partial(conv2, 2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 6), "convolution"),
    "conv2-replicate": Case(partial(conv2, 2, 3, 3, padding=2, padding_mode="replicate"), (2, 5, 6), "convolution"),
    "conv2-reflect-same": Case(
        partial(conv2, 2, 4, (2, 3), padding="same", padding_mode="reflect", groups=2), (2, 5, 6), "convolution"
    ),
    "conv3": Case(partial(conv3, 2, 4, (2, 1, 3), stride=(1, 2, 1), padding=1, groups=2), (2, 3, 4, 5), "convolution"),
    "transposed1": Case(partial(transposed1, 4, 6, 3), (4, 5), "transposed_convolution"),
    "transposed2": Case(
        partial(transposed2, 4, 6, (3, 2), stride=(3, 2), padding=1, output_padding=(2, 1), dilation=(1, 2), groups=2),
        (4, 3, 4),
        "transposed_convolution",
    ),
    "transposed2-no-bias": Case(
        partial(transposed2, 2, 3, 4, stride=2, padding=1, bias=False), (2, 3, 4), "transposed_convolution"
    ),
    "transposed3": Case(partial(transposed3, 2, 3, 2, stride=2), (2, 2, 3, 2), "transposed_convolution"),
    "layer-norm": Case(partial(nn.LayerNorm, 4), (5, 4), "layer_norm"),
    "layer-norm-flat": Case(partial(nn.LayerNorm, 4), (4,), "layer_norm"),
    "layer-norm-2": Case(partial(nn.LayerNorm, (5, 4), bias=False), (2, 5, 4), "layer_norm"),
    "rms-norm": Case(partial(nn.RMSNorm, 4), (5, 4), "rms_norm"),
    "rms-norm-flat": Case(partial(nn.RMSNorm, 4, eps=1e-3), (4,), "rms_norm"),
    "rms-norm-2": Case(partial(nn.RMSNorm, (5, 4), eps=1e-5), (2, 3, 5, 4), "rms_norm"),
    "group-norm": Case(partial(nn.GroupNorm, 2, 6), (6, 3, 4), "group_norm"),
    "group-norm-flat": Case(partial(nn.GroupNorm, 2, 6), (6,), "group_norm"),
    "instance-norm1": Case(partial(nn.InstanceNorm1d, 4, affine=True), (4, 5), "instance_norm"),
    "instance-norm2": Case(partial(nn.InstanceNorm2d, 4, affine=True), (4, 3, 5), "instance_norm"),
    "instance-norm3": Case(partial(nn.InstanceNorm3d, 4, affine=True), (4, 3, 2, 2), "instance_norm"),
    "instance-norm-running": Case(
        partial(running, partial(nn.InstanceNorm2d, 4, affine=True, track_running_stats=True)),
        (4, 3, 5),
        "instance_norm",
    ),
    "batch-norm1": Case(partial(running, partial(nn.BatchNorm1d, 4)), (4,), "batch_norm"),
    "batch-norm1-positions": Case(partial(running, partial(nn.BatchNorm1d, 4)), (4, 5), "batch_norm"),
    "batch-norm2": Case(partial(running, partial(nn.BatchNorm2d, 4, eps=0.1)), (4, 3, 5), "batch_norm"),
    "batch-norm3": Case(partial(running, partial(nn.BatchNorm3d, 4)), (4, 3, 2, 2), "batch_norm"),
    "bilinear-of-one": Case(lambda: Bilinear(), (4,), "generic"),
    "prelu": Case(partial(nn.PReLU, 4), (4, 5), "generic"),
    "layer-scale": Case(lambda: LayerScale(), (5, 4), "generic"),
    "relative-bias": Case(lambda: RelativeBias(5, 4), (5, 4), "generic"),
    "old-weight-norm": Case(lambda: old_weight_norm(), (4,), "generic"),
    "weight-norm": Case(lambda: parametrizations.weight_norm(nn.Linear(4, 3)), (4,), "generic"),
    "spectral-norm": Case(lambda: parametrizations.spectral_norm(nn.Linear(4, 3)).eval(), (4,), "generic"),
    "old-spectral-norm-conv": Case(lambda: nn.utils.spectral_norm(nn.Conv2d(2, 3, 2)).eval(), (2, 3, 4), "generic"),
    "standardized-conv": Case(lambda: Standardized(2, 3, 2), (2, 3, 4), "generic"),
    "doubled-linear": Case(lambda: Doubled(4, 3), (4,), "generic"),
    "untraceable": Case(lambda: Untraceable(), (5, 4), "generic"),
    "old-function": Case(lambda: OldFunction(), (5, 4), "generic"),
}


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,oij,bj->bo", x, self.form, x)


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.inner = nn.Parameter(torch.full((4,), 0.1)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.inner(x)


class RelativeBias(nn.Module):
    """Scores of single-head attention with a bias for each distance, as of Swin and T5."""

    def __init__(self, T: int, E: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * T - 1))
        self.register_buffer("index", torch.arange(T)[:, None] - torch.arange(T)[None] + T - 1)

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.mT + self.table[self.index]
        return scores.softmax(dim=-1) @ x


class Standardized(nn.Conv2d):
    """A subclass that computes something else in the method that forward calls."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(dim=(1, 2, 3), keepdim=True), bias)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Untraceable(nn.Module):
    """Its steps depend on the values: vmap cannot trace it, and the loop can."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        parts = [row * self.scale if float(row.detach().sum()) > 0 else row * self.scale.exp() for row in x]
        return torch.stack(parts)


class Cube(torch.autograd.Function):
    """An autograd.Function of the old kind, which torch.func refuses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grads[0]


class OldFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.unused = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(x * self.scale)


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(4, 3))


@pytest.mark.parametrize("size", [1, B, 5])  # 5: T = B for many
@pytest.mark.parametrize("case", CASES)
def test_float64_is_the_loop_over_examples(case: str, size: int) -> None:
    module, source = made(case, torch.float64, size)
    call = called(module, (source,))
    assert rule_of(module).__name__ == CASES[case].rule
    compare(call, loop(call), 1e-9)


@pytest.mark.parametrize("case", CASES)
def test_float32_is_the_float64_loop_to_rounding(case: str) -> None:
    module, source = made(case, torch.float32, B)
    call = called(module, (source,))
    compare(call, loop(widened(call)), 1e-4)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.rule != "generic"])
def test_bfloat16_is_near(case: str) -> None:
    """Within 3 % of the norm: some units of 2^-8."""
    module, source = made(case, torch.bfloat16, B)
    call = called(module, (source,))
    compare(call, loop(widened(call)), 0.03)


@pytest.mark.parametrize("case", CASES)
def test_the_generic_rule_says_the_same(case: str) -> None:
    module, source = made(case, torch.float64, B)
    call = called(module, (source,))
    found, wanted = rule_of(module)(call, names(module)), names(module)
    for name, grads in generic(call, wanted).items():
        torch.testing.assert_close(materialize(found[name]), materialize(grads), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_a_module_is_left_as_it_was(case: str) -> None:
    module, source = made(case, torch.float64, B)
    call = called(module, (source,))
    before = [(dict(m.__dict__), dict(m._parameters), dict(m._buffers)) for m in module.modules()]
    state = copy.deepcopy(module.state_dict())
    rule_of(module)(call, names(module))
    for m, (attributes, parameters, buffers) in zip(module.modules(), before, strict=True):
        assert m.__dict__.keys() == attributes.keys()
        assert all(m.__dict__[name] is value for name, value in attributes.items())
        assert all(m._parameters[name] is value for name, value in parameters.items())
        assert all(m._buffers[name] is value for name, value in buffers.items())
    assert all(torch.equal(module.state_dict()[name], value) for name, value in state.items())


# --- convolutions -----------------------------------------------------------------------------------------------------


def test_convolutions_are_factored() -> None:
    for module, kind in ((nn.Conv2d(2, 3, 2), OuterGrads), (nn.Conv2d(4, 6, 2, groups=2), GroupedGrads)):
        found = rule_of(module)(called(module, (torch.randn(B, module.in_channels, 4, 4),)), ["weight"])
        assert isinstance(found["weight"], kind)


def test_convolutions_without_a_batch_are_refused() -> None:
    module = nn.Conv2d(2, B, 2).double()
    with pytest.raises(GradscaleError, match="module m must give each example the output it has alone"):
        rule_of(module)(called(module, (randn(0, 2, 4, 4),), size=B), ["weight"])


def test_the_size_of_a_transposed_convolution_is_the_calls() -> None:
    module = nn.ConvTranspose2d(2, 3, 3, stride=3).double()
    call = called(module, (randn(0, B, 2, 3, 3), [10, 11]))
    assert call.outputs[0].shape[2:] == (10, 11)
    compare(call, loop(call), 1e-9)


# --- norms ------------------------------------------------------------------------------------------------------------

HF_NORMS = {
    "LlamaRMSNorm": "llama.modeling_llama",
    "MistralRMSNorm": "mistral.modeling_mistral",
    "MixtralRMSNorm": "mixtral.modeling_mixtral",
    "Qwen2RMSNorm": "qwen2.modeling_qwen2",
    "Qwen3RMSNorm": "qwen3.modeling_qwen3",
    "GemmaRMSNorm": "gemma.modeling_gemma",
    "Gemma2RMSNorm": "gemma2.modeling_gemma2",
    "Gemma3RMSNorm": "gemma3.modeling_gemma3",
    "Olmo2RMSNorm": "olmo2.modeling_olmo2",
    "DeepseekV3RMSNorm": "deepseek_v3.modeling_deepseek_v3",
    "T5LayerNorm": "t5.modeling_t5",
}


def hf_norm(name: str) -> nn.Module:
    pytest.importorskip("transformers")
    module = pytest.importorskip(f"transformers.models.{HF_NORMS[name]}")
    made: nn.Module = getattr(module, name)(6)
    return made


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 4, 6)])
@pytest.mark.parametrize("name", HF_NORMS)
def test_norms_of_transformers(name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's and T5's norms compute in float32 whatever the dtype is, so that theirs agree to its rounding."""
    module, exact = randomized(hf_norm(name)), 1e-6 if name.startswith(("Gemma", "T5")) else 1e-9
    assert rule_of(module).__name__ == "rms_norm"
    without_generic(monkeypatch)
    for kind, tolerance in ((torch.float64, exact), (torch.float32, 1e-4), (torch.bfloat16, 0.03)):
        call = called(copy.deepcopy(module).to(kind), (randn(0, B, *shape).to(kind),))
        compare(call, loop(call if kind == torch.float64 else widened(call)), tolerance)


def test_torchs_rms_norm_needs_no_generic_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    without_generic(monkeypatch)
    for kind in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for eps in (None, 1e-6):
            module = nn.RMSNorm(4, eps=eps).to(kind)
            rule_of(module)(called(module, (randn(0, B, 5, 4).to(kind),)), ["weight"])


class FalseRMSNorm(nn.RMSNorm):
    """Takes the name and computes something else, which at weight 1 looks the same."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight**2, self.eps)


class GatedRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x if gate is None else x * gate.sigmoid())


class OtherEpsRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, 1e-3)


@pytest.mark.parametrize(("kind", "inputs"), [(FalseRMSNorm, 1), (GatedRMSNorm, 2), (OtherEpsRMSNorm, 1)])
def test_what_only_is_called_rms_norm(kind: type[nn.RMSNorm], inputs: int) -> None:
    module = kind(4, eps=1e-6).double()
    assert rule_of(module).__name__ == "rms_norm"
    call = called(module, tuple(1e-2 * randn(i, B, 5, 4) for i in range(inputs)))
    compare(call, loop(call), 1e-9)


def test_batch_norm_with_batch_statistics_is_refused() -> None:
    module = nn.BatchNorm1d(4).double()
    with pytest.raises(GradscaleError, match="module m must give each example the output it has alone"):
        rule_of(module)(called(module, (randn(0, B, 4, 5),)), ["weight"])


def test_instance_norm_in_training_is_exact_and_leaves_its_statistics() -> None:
    module = nn.InstanceNorm1d(4, affine=True, track_running_stats=True).double().train()
    call = called(module, (randn(0, B, 4, 5),))
    compare(call, loop(call), 1e-9)


# --- embeddings -------------------------------------------------------------------------------------------------------


def test_position_ids_are_broadcast_over_the_batch() -> None:
    module, grad = nn.Embedding(5, 2, padding_idx=0).double(), randn(0, B, 4, 2)
    output = module(torch.arange(4)[None]).detach().expand(B, -1, -1)
    (found,) = rule_of(module)(
        Call("m", module, (torch.arange(4)[None],), {}, [output], [grad], B), ["weight"]
    ).values()
    expected = torch.zeros(B, 5, 2, dtype=torch.float64)
    expected[:, 1:4] = grad[:, 1:]
    assert torch.equal(materialize(found), expected.flatten(1))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("setting", [{"max_norm": 0.1}, {"scale_grad_by_freq": True}])
def test_tables_must_not_couple_examples(kind: Callable[..., nn.Module], setting: dict[str, Any]) -> None:
    module = kind(5, 4, **setting)
    with pytest.raises(GradscaleError, match="embedding m must have max_norm=None and scale_grad_by_freq=False"):
        rule_of(module)(called(module, (torch.zeros(B, 2, dtype=torch.long),)), ["weight"])


def test_bags_given_by_offsets_are_refused() -> None:
    module, ids = nn.EmbeddingBag(5, 4).double(), torch.tensor([0, 1, 2, 2, 3, 4])
    with pytest.raises(GradscaleError, match=r"embedding bag m must be given ids of shape \(batch, bag\), got \(6,\)"):
        rule_of(module)(called(module, (ids, torch.tensor([0, 2, 3])), size=B), ["weight"])


# --- attention and recurrent networks ---------------------------------------------------------------------------------

E, H = 4, 2


def attended(T: int, batch_first: bool, mask: str, S: int | None = None, **settings: Any) -> Call:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, H, batch_first=batch_first, **settings).double()
    query, memory = randn(0, B, T, E), randn(1, B, S or T, E)
    memory = query if S is None else memory
    inputs = [x if batch_first else x.transpose(0, 1) for x in (query, memory, memory)]
    causal = torch.ones(T, S or T, dtype=torch.bool).triu(1)
    kwargs: dict[str, Any] = {}
    if "causal" in mask:
        kwargs["attn_mask"] = causal
    if "float" in mask:
        kwargs["attn_mask"] = randn(2, T, S or T)
    if "heads" in mask:
        kwargs["attn_mask"] = randn(3, B * H, T, S or T)
    if "padding" in mask:
        kwargs["key_padding_mask"] = torch.arange(S or T)[None] > torch.arange(B)[:, None]
    if "weights" not in mask:
        kwargs["need_weights"] = False
    if "per-head" in mask:
        kwargs["average_attn_weights"] = False
    return called(module, tuple(inputs), kwargs, size=B, output_dims=(0 if batch_first else 1, 0))


MASKS = ["none", "weights", "per-head weights", "causal", "float", "heads", "padding", "causal weights"]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("T", [B, 2])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention(T: int, batch_first: bool, mask: str) -> None:
    call = attended(T, batch_first, mask)
    assert rule_of(call.module).__name__ == "attention"
    first = 0 if batch_first else 1
    dims = {"attn_mask": (0, H) if mask == "heads" else None, "key_padding_mask": (0, 1)}
    compare(call, loop(call, [(first, 1)] * 3, dims, [first, 0]), 1e-9)


@pytest.mark.parametrize(
    "settings", [{"bias": False}, {"add_bias_kv": True}, {"kdim": E, "vdim": E, "add_zero_attn": True}]
)
def test_attention_to_another_sequence(settings: dict[str, Any]) -> None:
    call = attended(2, True, "weights", S=B, **settings)
    compare(call, loop(call), 1e-9)


def test_inputs_of_attention_by_name() -> None:
    module, x = nn.MultiheadAttention(E, H, batch_first=True).double(), randn(0, B, B, E)
    mask = torch.ones(B, B, dtype=torch.bool).triu(1)
    named = called(module, (), {"key": x, "value": x, "query": x, "attn_mask": mask, "need_weights": False})
    positional = called(module, (x, x, x), {"attn_mask": mask, "need_weights": False})
    found, expected = (rule_of(module)(call, names(module)) for call in (named, positional))
    for name in names(module):
        assert torch.equal(materialize(found[name]), materialize(expected[name]))


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_recurrent(kind: type[nn.RNNBase], batch_first: bool, with_state: bool) -> None:
    """T = L = B: nothing to tell the batch by, and a loss that depends on the last states too."""
    torch.manual_seed(0)
    module = kind(4, 2, num_layers=B, batch_first=batch_first).double()
    state: Any = randn(1, B, B, 2)
    state = (state, randn(2, B, B, 2)) if kind is nn.LSTM else state
    args = (randn(0, B, B, 4), state) if with_state else (randn(0, B, B, 4),)
    first = 0 if batch_first else 1
    call = called(module, args, output_dims=(first, 1, 1))
    assert rule_of(module).__name__ == "recurrent"
    compare(call, loop(call, [(first, 1), (1, 1), (1, 1)], {}, [first, 1, 1]), 1e-9)


def test_packed_sequences_are_refused() -> None:
    module = nn.LSTM(4, 2, batch_first=True).double()
    packed = nn.utils.rnn.pack_padded_sequence(randn(0, B, 5, 4), torch.tensor([5, 3, 2]), batch_first=True)
    output = torch.zeros(10, 2, dtype=torch.float64)
    with pytest.raises(GradscaleError, match="recurrent module m must be given a padded tensor, got a PackedSequence"):
        rule_of(module)(Call("m", module, (packed,), {}, [output], [output], B), ["weight_ih_l0"])


# --- the generic rule -------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (x @ x.mT).masked_fill(mask, -torch.inf).softmax(dim=-1) @ (x * self.scale)


def test_a_mask_with_as_many_rows_as_examples_is_not_taken_for_a_batch() -> None:
    module, mask = Masked().double(), torch.ones(B, B, dtype=torch.bool).triu(1)
    call = called(module, (randn(0, B, B, 4), mask))
    compare(call, loop(call, [(0, 1), None]), 1e-9)


@pytest.mark.parametrize("entries", [1, 8, 20])
@pytest.mark.parametrize("case", ["layer-scale", "embedding-bag"])
def test_groups_of_examples_give_the_same(case: str, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, source = made(case, torch.float64, 5)
    call, seen = called(module, (source,)), []
    vmap = torch.func.vmap
    monkeypatch.setattr(generic_module, "_ALIVE_ENTRIES", entries)
    monkeypatch.setattr(torch.func, "vmap", lambda *args, **kw: seen.append(kw["chunk_size"]) or vmap(*args, **kw))
    exact = loop(call)
    for name, grads in generic(call, names(module)).items():
        torch.testing.assert_close(materialize(grads), exact[name], rtol=1e-9, atol=1e-9)
    assert seen == [max(1, entries // sum(p.numel() for p in module.parameters()))]


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError, ZeroDivisionError])
def test_an_error_of_the_module_is_its_own(error: type[Exception]) -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.failing = nn.Parameter(torch.ones(4)), False

        def forward(self, x: Tensor) -> Tensor:
            if self.failing:
                raise error("of the user")
            return x * self.scale

    module = Failing().double()
    call = called(module, (randn(0, B, 4),))
    module.failing = True
    with pytest.raises(error, match="of the user") as caught:
        generic(call, ["scale"])
    assert caught.value.__context__ is None


def test_examples_that_are_mixed_are_found_in_half_precision() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean(dim=0)) * self.scale

    for kind in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        module = Centred().to(kind)
        with pytest.raises(GradscaleError, match="module m must give each example the output it has alone, got one"):
            generic(called(module, (randn(0, B, 4).to(kind),)), ["scale"])


def test_no_gradient_no_run() -> None:
    module = LayerScale().double()
    call = called(module, (randn(0, B, 5, 4),))
    call.grads[0].zero_()
    call = call._replace(unreached=frozenset({0}))
    module.forward = None  # type: ignore[assignment]
    assert not any(materialize(grads).any() for grads in generic(call, names(module)).values())


# --- models -----------------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen Linear with a trained low-rank term. Source: Hu et al. (2021), arXiv:2106.09685."""

    def __init__(self, base: nn.Linear, rank: int = 2, *, as_modules: bool = True) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.as_modules = as_modules
        if as_modules:
            self.down = nn.Linear(base.in_features, rank, bias=False)
            self.up = nn.Linear(rank, base.out_features, bias=False)
        else:
            self.down = nn.Parameter(torch.randn(rank, base.in_features))
            self.up = nn.Parameter(torch.randn(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        if self.as_modules:
            return self.base(x) + 0.5 * self.up(self.down(x))
        return self.base(x) + 0.5 * F.linear(F.linear(x, self.down), self.up)


@pytest.mark.parametrize("as_modules", [True, False])
def test_adapters_are_measured_and_their_base_is_not(as_modules: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Adapted(nn.Linear(4, 5), as_modules=as_modules), nn.Tanh()).double()
    parameters = select_parameters(net, None)
    assert {name.split(".")[1] for name in parameters} == {"down", "up"}
    covered = describe(sites(net, parameters), parameters)
    assert covered.entries == 2 * (4 + 5)
    assert covered.share_fast == (1.0 if as_modules else 0.0)
    module = net[0]
    if not as_modules:
        call = called(module, (randn(0, B, 3, 4),))
        compare(call, loop(call), 1e-9)


def test_describe() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), LayerScale(), nn.MultiheadAttention(4, 2))
    net[1].weight = net[0].weight
    net[2].inner.requires_grad_(False)
    parameters = select_parameters(net, None)
    report = describe(sites(net, parameters), parameters)
    rows = {row.name: row for row in report.parameters}
    assert list(rows) == list(parameters)
    assert rows["0.weight"] == ("0.weight", 16, "linear", "0, 1", True)
    assert rows["0.bias"] == ("0.bias", 4, "linear", "0", True)
    assert rows["2.gamma"] == ("2.gamma", 4, "generic", "2", False)
    assert rows["3.out_proj.weight"] == ("3.out_proj.weight", 16, "attention", "3", False)
    assert report.entries == sum(p.numel() for p in parameters.values()) == 104
    assert report.share_fast == 20 / 104
    assert report.share_generic == 84 / 104


def test_rules_are_told_apart_by_their_names() -> None:
    found = {rule_of(CASES[case].make()) for case in CASES}
    assert len({rule.__name__ for rule in found}) == len(found)
    assert not is_fast(generic)


# --- the oracle -------------------------------------------------------------------------------------------------------

Dim = tuple[int, int] | None  # the batch dimension of an input and its entries an example; None: shared


def made(case: str, kind: torch.dtype, size: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    module = randomized(CASES[case].make()).to(kind)
    shape, integers = (size, *CASES[case].shape), CASES[case].integers
    source = torch.randint(integers, shape) if integers else randn(1, *shape).to(kind)
    return module, source


def called(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    size: int | None = None,
    output_dims: Sequence[int] = (0,),
) -> Call:
    """A call of `module`, with gradients made up for its outputs."""
    with torch.no_grad():
        outputs = float_tensors(module(*args, **(kwargs or {})))
    grads = [randn(90 + i, *output.shape).to(output.dtype) for i, output in enumerate(outputs)]
    size = size or outputs[0].shape[output_dims[0]]
    return Call("m", module, args, kwargs or {}, outputs, grads, size)


def loop(
    call: Call,
    dims: Sequence[Dim] | None = None,
    named: Mapping[str, Dim] | None = None,
    out: Sequence[int] = (0, 0, 0),
) -> dict[str, Tensor]:
    """[B, P] for each parameter, by autograd on one example after another."""
    module = copy.deepcopy(call.module)
    rows: dict[str, list[Tensor]] = {name: [] for name in names(module)}
    for b in range(call.batch_size):

        def of(tree: Any, dim: Dim, b: int = b) -> Any:
            return tree if dim is None else pytree.tree_map_only(Tensor, partial(rows_of, b=b, dim=dim), tree)

        leaves, structure = pytree.tree_flatten(call.args)
        pairs = zip(leaves, dims or [(0, 1)] * len(leaves), strict=False)
        args = pytree.tree_unflatten([of(x, dim) for x, dim in pairs], structure)
        kwargs = {name: of(x, (named or {}).get(name, (0, 1))) for name, x in call.kwargs.items()}
        outputs = float_tensors(module(*args, **kwargs))
        upstream = [grad.narrow(dim, b, 1) for grad, dim in zip(call.grads, out, strict=False)]
        parameters = [module.get_parameter(name) for name in rows]
        grads = torch.autograd.grad(outputs, parameters, upstream, allow_unused=True)
        for name, parameter, grad in zip(rows, parameters, grads, strict=True):
            full = torch.zeros_like(parameter) if grad is None else grad.to_dense() if grad.is_sparse else grad
            rows[name].append(full.flatten())
    return {name: torch.stack(found) for name, found in rows.items()}


def rows_of(tensor: Tensor, b: int, dim: tuple[int, int]) -> Tensor:
    return tensor.narrow(dim[0], b * dim[1], dim[1])


def widened(call: Call) -> Call:
    """The call in float64, of the same numbers."""

    def wide(tree: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, tree)

    return call._replace(
        module=copy.deepcopy(call.module).double(),
        args=wide(call.args),
        kwargs=wide(dict(call.kwargs)),
        outputs=wide(call.outputs),
        grads=wide(call.grads),
    )


def compare(call: Call, exact: Mapping[str, Tensor], tolerance: float, wanted: Sequence[str] | None = None) -> None:
    """Relative to the largest norm of an example; and every parameter alone is as all together."""
    wanted = wanted or names(call.module)
    found = rule_of(call.module)(call, wanted)
    assert list(found) == list(wanted)
    for name in wanted:
        ours = materialize(found[name])
        assert ours.dtype == (torch.float64 if call.grads[0].dtype == torch.float64 else torch.float32)
        error = float((ours.double() - exact[name]).norm(dim=1).max())
        scale = float(exact[name].norm(dim=1).max())
        assert error <= tolerance * scale, f"{name}: {error:.2g} apart from {scale:.2g}"
        alone = rule_of(call.module)(call, [name])
        torch.testing.assert_close(materialize(alone[name]), ours)


def names(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def randomized(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(1 + 0.5 * randn(i, *parameter.shape))
    return module


def without_generic(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("the generic rule was taken")

    monkeypatch.setattr("gradscale.grads.rules.norms.generic", refuse)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
