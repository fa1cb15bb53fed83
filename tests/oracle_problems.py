"""Three problems in float64 of which everything can be measured, and differentiated one example at a time.

They are apart from the tests, so that a worker of a run that is given one imports little.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradscale.task import TensorExamples
from gradscale.tasks.digits import Digits

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class LinearRegression:
    """Three outputs with an offset, half the squared error, classes of unequal sizes."""

    rows: int = 13

    def model(self, checkpoint: str | None) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return nn.Linear(4, 3).double().eval()

    def examples(self) -> TensorExamples:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.rows, 4, dtype=torch.float64, generator=generator)
        y = x @ torch.randn(4, 3, dtype=torch.float64, generator=generator) + 1.0
        return TensorExamples(x=x, y=y, label=torch.arange(self.rows) ** 2 % 3)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch["x"]) - batch["y"]).square().sum(dim=1) / 2

    def labels(self, batch: Batch) -> Tensor:
        return batch["label"]

    def targets(self, batch: Batch) -> Tensor:
        return batch["y"]

    def inputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return batch["x"]

    def outputs_of(self, model: nn.Module, inputs: Tensor, batch: Batch) -> Tensor:
        return model(inputs)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"])

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        return batch["x"]


@dataclass(frozen=True)
class FewDigits(Digits):
    """The first digits in float64."""

    width: int = 8
    depth: int = 1
    rows: int = 10

    def model(self, checkpoint: str | None) -> nn.Module:
        return super().model(checkpoint).double()

    def examples(self) -> TensorExamples:
        batch = super().examples().batch(range(self.rows))
        return TensorExamples(image=batch["image"].double(), label=batch["label"] % 4)


@dataclass(frozen=True)
class SmallGPT2:
    """Next tokens of random documents, their parity the class; the outputs are the scores after the last token."""

    rows: int = 10
    length: int = 8
    vocabulary: int = 31

    def model(self, checkpoint: str | None) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            n_layer=2, n_embd=16, n_head=2, n_positions=self.length, vocab_size=self.vocabulary, bos_token_id=0,
            eos_token_id=0, attn_implementation="eager", use_cache=False, initializer_range=0.2,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return GPT2LMHeadModel(config).double().eval()

    def examples(self) -> TensorExamples:
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(self.vocabulary, (self.rows, self.length), generator=generator)
        return TensorExamples(ids=ids, label=torch.arange(self.rows) % 2)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        scores = model(input_ids=batch["ids"]).logits[:, :-1]
        return F.cross_entropy(scores.mT, batch["ids"][:, 1:], reduction="none").mean(dim=1)

    def labels(self, batch: Batch) -> Tensor:
        return batch["label"]

    def inputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return model.transformer.wte(batch["ids"])

    def outputs_of(self, model: nn.Module, inputs: Tensor, batch: Batch) -> Tensor:
        return model(inputs_embeds=inputs).logits[:, -1]

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(input_ids=batch["ids"]).logits[:, -1]

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        return model.transformer(input_ids=batch["ids"]).last_hidden_state[:, -1]
