"""Per-example gradients of every parameter of the models that people measure are those of autograd, one by one.

Tiny models of the architectures in transformers, with random weights in float64 (some compute parts in float32
all the same), with and without padding and activation checkpointing.

Shapes: B examples, T positions, P entries of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradscale.grads.capture import capture
from gradscale.grads.coverage import select_parameters, sites
from gradscale.grads.experts import ExpertGrads
from gradscale.grads.layer import LayerGrads, materialize
from gradscale.grads.sweep import sq_norms, weighted_sum

transformers = pytest.importorskip("transformers")

B, T = 3, 5
VOCABULARY = 13
LENGTHS = torch.tensor([5, 2, 4])
Batch = Mapping[str, Tensor]
Losses = Callable[[nn.Module, Batch], Tensor]

TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 8}
DECODER = TEXT | {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
HEADS = {"num_key_value_heads": 4, "head_dim": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
GPT2 = TEXT | {"n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2, "resid_pdrop": 0, "embd_pdrop": 0}
GPT2["attn_pdrop"] = 0
BERT = TEXT | {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
T5 = {"vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "pad_token_id": 0}
VIT = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 6}


class Case(NamedTuple):
    """A model, its losses, its batch and what an example of that batch is alone, without its padding."""

    model: nn.Module
    losses: Losses
    batch: Batch
    alone: Callable[[Batch, int], Batch]


# --- the models -------------------------------------------------------------------------------------------------------


def next_tokens(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over an example's own tokens."""
    scores = model(input_ids=batch["ids"], attention_mask=batch.get("mask")).logits[:, :-1]
    losses = F.cross_entropy(scores.mT, batch["ids"][:, 1:], reduction="none")
    own = batch["mask"][:, 1:] if "mask" in batch else torch.ones_like(batch["ids"][:, 1:])
    return (losses * own).sum(dim=1) / own.sum(dim=1)


def classes(model: nn.Module, batch: Batch) -> Tensor:
    scores = model(input_ids=batch["ids"], attention_mask=batch.get("mask")).logits
    return F.cross_entropy(scores, batch["label"], reduction="none")


def translation(model: nn.Module, batch: Batch) -> Tensor:
    scores = model(
        input_ids=batch["ids"], attention_mask=batch.get("mask"), decoder_input_ids=batch["target"][:, :-1]
    ).logits
    return F.cross_entropy(scores.mT, batch["target"][:, 1:], reduction="none").mean(dim=1)


def pictures(model: nn.Module, batch: Batch) -> Tensor:
    output = model(batch["x"])
    scores = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(scores, batch["label"], reduction="none")


def one_row(batch: Batch, i: int) -> Batch:
    """Example i, cut to its own length."""
    row = {name: tensor[i : i + 1] for name, tensor in batch.items()}
    if "mask" not in row:
        return row
    length = int(row.pop("mask").sum())
    return row | {name: row[name][:, :length] for name in ("ids",)}


def text(kind: str, losses: Losses, settings: Mapping[str, Any], *, padded: bool, attention: str) -> Case:
    config = getattr(transformers, kind).config_class(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, kind)._from_config(config, attn_implementation=attention)
    if hasattr(model, "set_experts_implementation") and "num_experts_per_tok" in settings:
        model.set_experts_implementation("eager")  # the default, grouped_mm, has no float64
    batch = {"ids": torch.randint(3, VOCABULARY, (B, T)), "label": torch.tensor([1, 0, 1])}
    batch["target"] = torch.randint(3, VOCABULARY, (B, 4))
    if padded:
        batch["mask"] = (torch.arange(T) < LENGTHS[:, None]).long()
        batch["ids"] = batch["ids"] * batch["mask"]
    return Case(randomized(model), losses, batch, one_row)


def vit(*, padded: bool, attention: str) -> Case:
    config = transformers.ViTConfig(**VIT, patch_size=3, num_channels=1, num_labels=3)
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification._from_config(config, attn_implementation=attention)
    return Case(randomized(model), pictures, images(6), one_row)


class SmallConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.GroupNorm(2, 6), nn.GELU())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(self.stem(x)).mean(dim=(2, 3)))
        return scores


class SmallEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.encoder(x.flatten(2).mT.expand(-1, -1, 8)).mean(dim=1))
        return scores


def torch_net(make: Callable[[], nn.Module], *, padded: bool, attention: str) -> Case:
    torch.manual_seed(0)
    return Case(randomized(make()), pictures, images(4), one_row)


def images(size: int) -> Batch:
    return {"x": torch.randn(B, 1, size, size, dtype=torch.float64), "label": torch.tensor([1, 0, 2])}


def randomized(model: nn.Module) -> nn.Module:
    """In float64, with weights that leave no gradient zero by chance (transformers begins with zeros and ones)."""
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


Make = Callable[..., Case]

DENSE: dict[str, Make] = {
    "gpt2": partial(text, "GPT2LMHeadModel", next_tokens, GPT2),
    "llama": partial(text, "LlamaForCausalLM", next_tokens, DECODER),
    "qwen3": partial(text, "Qwen3ForCausalLM", next_tokens, DECODER),
    "gemma3": partial(text, "Gemma3ForCausalLM", next_tokens, DECODER | {"sliding_window": 4}),
    "mistral": partial(text, "MistralForCausalLM", next_tokens, DECODER | {"sliding_window": 4}),
    "bert": partial(
        text,
        "BertForSequenceClassification",
        classes,
        BERT | {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
    ),
    "t5": partial(text, "T5ForConditionalGeneration", translation, T5 | {"dropout_rate": 0}),
    "vit": vit,
}
MIXTURES: dict[str, Make] = {
    "mixtral": partial(text, "MixtralForCausalLM", next_tokens, DECODER | EXPERTS | {"num_local_experts": 4}),
    "qwen2-moe": partial(
        text,
        "Qwen2MoeForCausalLM",
        next_tokens,
        DECODER | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 8},
    ),
    "qwen3-moe": partial(text, "Qwen3MoeForCausalLM", next_tokens, DECODER | EXPERTS | {"num_experts": 4}),
}
OTHERS: dict[str, Make] = {
    "olmoe": partial(text, "OlmoeForCausalLM", next_tokens, DECODER | HEADS | EXPERTS | {"num_experts": 4}),
    "gemma2": partial(text, "Gemma2ForCausalLM", next_tokens, DECODER),
    "gpt-oss": partial(text, "GptOssForCausalLM", next_tokens, DECODER | EXPERTS | {"num_local_experts": 4}),
    "deepseek-v3": partial(
        text,
        "DeepseekV3ForCausalLM",
        next_tokens,
        DECODER
        | HEADS
        | EXPERTS
        | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
        | {"q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 2, "qk_nope_head_dim": 2, "v_head_dim": 4},
    ),
}
TORCH: dict[str, Make] = {
    "conv-net": partial(torch_net, SmallConvNet),
    "encoder": partial(torch_net, SmallEncoder),
}
ALL = DENSE | MIXTURES | OTHERS | TORCH


# --- the promises -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", DENSE | MIXTURES)
def test_gradients_are_those_of_each_example_alone(name: str, attention: str) -> None:
    check(ALL[name](padded=False, attention=attention))


@pytest.mark.parametrize("name", OTHERS | TORCH)
def test_other_models(name: str) -> None:
    check(ALL[name](padded=False, attention="eager"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [name for name in DENSE | MIXTURES if name != "vit"])
def test_padding_changes_nothing(name: str, attention: str) -> None:
    check(ALL[name](padded=True, attention=attention))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", DENSE | MIXTURES)
def test_checkpointing_changes_nothing(name: str, use_reentrant: bool) -> None:
    case = ALL[name](padded=True, attention="eager")
    checkpointed(case.model, use_reentrant)
    check(case)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("params", [r"layers\.1\.self_attn", r"layers\.0\.mlp|lm_head", r"layers\.1\.mlp\.down"])
def test_a_part_of_a_checkpointed_model(params: str, use_reentrant: bool) -> None:
    case = ALL["llama"](padded=False, attention="eager")
    checkpointed(case.model, use_reentrant)
    case.model.disable_input_require_grads()  # which transformers makes the first checkpoint's input have
    check(case, params)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", MIXTURES)
def test_implementations_of_experts(name: str, implementation: str) -> None:
    case = ALL[name](padded=False, attention="eager")
    case.model.set_experts_implementation(implementation)
    case.model.float()  # grouped_mm has no float64
    check(case, tolerance=1e-4)


@pytest.mark.parametrize("positions", [1, B, 2 * B])
@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "qwen2-moe"])
def test_as_many_positions_as_examples(name: str, positions: int) -> None:
    """Where a dimension that is not the batch has its size."""
    case = ALL[name](padded=False, attention="eager")
    if positions == 1 and case.losses is next_tokens:
        case = case._replace(losses=first_token)
    ids = torch.randint(3, VOCABULARY, (B, positions))
    check(case._replace(batch={**case.batch, "ids": ids, "target": torch.randint(3, VOCABULARY, (B, B + 1))}))


def first_token(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(input_ids=batch["ids"]).logits[:, 0], batch["label"], reduction="none")


def test_tiles_of_experts() -> None:
    """Any rows of any examples; some experts have no token, and some examples none for an expert."""
    torch.manual_seed(0)
    bounds = ((0, 2, 2, 5), (5, 5, 5, 5), (5, 6, 9, 10), (10, 10, 10, 11))
    grads = ExpertGrads(torch.randn(11, 3), torch.randn(11, 2), bounds)
    whole = torch.zeros(3, 4, 3, 2)
    for e, row in enumerate(bounds):
        for b in range(3):
            whole[b, e] = grads.left[row[b] : row[b + 1]].mT @ grads.right[row[b] : row[b + 1]]
    whole = whole.flatten(1, 2)
    assert grads.shape == whole.shape
    torch.testing.assert_close(materialize(grads), whole.flatten(1))
    for examples, rows in product((slice(0, 1), slice(1, 3)), (slice(0, 3), slice(1, 2), slice(2, 8), slice(7, 12))):
        out = torch.full_like(whole[examples, rows], torch.nan)
        grads.tile(examples, rows, out)
        torch.testing.assert_close(out, whole[examples, rows])


# --- the oracle -------------------------------------------------------------------------------------------------------


def checkpointed(model: nn.Module, use_reentrant: bool) -> None:
    model.config.use_cache = False
    model.train()  # where transformers checkpoints; every dropout is zero
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})


def check(case: Case, params: str | None = None, tolerance: float = 1e-6) -> None:
    """Within `tolerance` of the parameter's own gradients, and a hundredth of it of the whole gradient."""
    parameters = select_parameters(case.model, params)
    weights = torch.linspace(-1, 2, B, dtype=torch.float64)
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def read(name: str, grads: LayerGrads) -> None:
        assert name not in found, "each parameter is read once"
        found[name] = materialize(grads).double(), sq_norms(grads), weighted_sum(grads, weights).double()

    losses = capture(case.model, sites(case.model, parameters), partial(flip(case.losses), case.batch), B, read)
    exact_losses, exact = one_by_one(case, parameters)
    torch.testing.assert_close(losses, exact_losses, rtol=tolerance, atol=0)
    whole = float(torch.cat(list(exact.values()), dim=1).norm())
    for name, grads in exact.items():
        ours, norms, total = found.pop(
            name, (torch.zeros_like(grads), torch.zeros(B).double(), torch.zeros(1).double())
        )
        for what, a, b in (
            ("gradients", ours, grads),
            ("norms", norms.sqrt(), grads.norm(dim=1)),
            ("sum", total, weights @ grads),
        ):
            error = float((a - b).norm())
            assert error <= tolerance * (float(grads.norm()) + 0.01 * whole), f"{what} of {name}: {error:.2g} apart"
    assert not found
    assert all(parameter.grad is None for parameter in case.model.parameters())


def unused(grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(grads), grads.new_zeros(B), grads.new_zeros(1)


def flip(losses: Losses) -> Callable[[Batch, nn.Module], Tensor]:
    return lambda batch, model: losses(model, batch)


def one_by_one(case: Case, parameters: Mapping[str, nn.Parameter]) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses [B] and the gradients [B, P], from autograd on each example alone and without its padding."""
    case.model.eval()  # without checkpointing
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    values = []
    for i in range(B):
        (loss,) = case.losses(case.model, case.alone(case.batch, i))
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
            rows[name].append((torch.zeros_like(parameter) if grad is None else grad).flatten().double())
        values.append(loss.detach())
    return torch.stack(values), {name: torch.stack(found) for name, found in rows.items()}
