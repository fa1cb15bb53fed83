"""The demonstration: a small vision transformer on scikit-learn's handwritten digits.

Small enough that a laptop trains and measures it in seconds, and built of what large transformers are
built of. With permuted labels the same model can only memorize: the contrast that per-example gradients show.

Shapes: B examples, T tokens (a class token and 16 patches), E the width, H heads, C = 10 classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradscale.errors import GradscaleError
from gradscale.task import Batch, TensorExamples

CLASSES = 10
SIDE, PATCH = 8, 2  # pixels
PATCHES = (SIDE // PATCH) ** 2
DATA = ("true-labels", "permuted-labels")
SIZES = {"train": 1438, "validation": 359}  # images
SPLITS = tuple(SIZES)
_SPLIT_SEED, _PERMUTATION_SEED = 20, 21  # fixed: every run holds out the same images and permutes alike
_NOISE_SEED = 22  # the first of two streams of every noise_seed


class ClassToken(nn.Module):
    """Puts a learned token before the others: [B, T, E] -> [B, T + 1, E]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(width))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.cat([self.weight.expand(tokens.shape[0], 1, -1), tokens], dim=1)


class PositionEmbedding(nn.Module):
    """Adds a learned vector to each position: [B, T, E] -> [B, T, E]."""

    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.5 * torch.randn(positions, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.weight


class Attention(nn.Module):
    """Multi-head self-attention, [B, T, E] -> [B, T, E].

    The softmax is written out: torch's fused attention has no second derivative on a CPU, which curvature needs.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (self._split(p(tokens)) for p in (self.query, self.key, self.value))
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])  # [B, H, T, T]
        mixed: Tensor = self.out((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))
        return mixed

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.reshape(*tokens.shape[:2], self.heads, -1).transpose(1, 2)  # [B, H, T, E / H]


class Block(nn.Module):
    """A pre-LayerNorm transformer block: [B, T, E] -> [B, T, E]."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        mixed: Tensor = tokens + self.attention(self.norm_attention(tokens))
        mapped: Tensor = mixed + self.mlp(self.norm_mlp(mixed))
        return mapped


class DigitsViT(nn.Module):
    """Images [B, 8, 8] -> class scores [B, C], by way of 16 patches of 2 x 2 pixels and a class token.

    No dropout and no batch statistics: each example's loss depends on that example alone.
    """

    def __init__(self, width: int = 64, depth: int = 3, heads: int = 4, mlp_ratio: int = 2) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH * PATCH, width)
        self.class_token = ClassToken(width)
        self.positions = PositionEmbedding(PATCHES + 1, width)
        self.blocks = nn.Sequential(*(Block(width, heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.features(images))
        return scores

    def features(self, images: Tensor) -> Tensor:
        """[B, E]: the class token's last state, which the head is given."""
        tokens = self.positions(self.class_token(self.patches(_patches_of(images))))
        states: Tensor = self.norm(self.blocks(tokens))
        return states[:, 0]


@dataclass(frozen=True)
class Digits:
    """The training four fifths of the 1,797 images, the ViT, and the cross-entropy of each image in nats.

    `data` is `true-labels`, or `permuted-labels`: the training labels in one fixed random order. `seed` draws
    the initial weights. The split and the permutation are the same for every seed.

    `split` is `train`, or `validation`: the fifth that is never trained on, with its true labels whatever else is
    said here. `size` takes the first so many images of the split, which are in random order; None takes all.
    `label_noise` p redraws the labels of exactly round(p n) of the n training images, uniformly from all 10 classes: a
    tenth of them keeps its label by chance, and p = 1 leaves nothing to learn. `noise_seed` says which, and what they
    become; under one, a smaller p redraws a part of what a larger one does, and to the same classes. `redrawn` names
    them.

    Raises: GradscaleError if `data` or `split` is neither, if `size` is not from 1 to what the split holds, if
    `label_noise` is not in [0, 1], or if labels are both permuted and redrawn.
    Source: Kaynak, Alpaydin (1998), UCI optical recognition of handwritten digits, the test part. Label noise: the
    partially corrupted labels of Zhang et al. (2017), arXiv 1611.03530, section 2, but of an exact number of images.
    """

    data: str = "true-labels"
    seed: int = 0
    width: int = 64
    depth: int = 3
    split: str = "train"
    size: int | None = None
    label_noise: float = 0.0
    noise_seed: int = 0

    def __post_init__(self) -> None:
        if self.data not in DATA:
            raise GradscaleError(f"data of task digits must be one of {', '.join(DATA)}, got {self.data!r}")
        if self.split not in SPLITS:
            raise GradscaleError(f"split of task digits must be one of {', '.join(SPLITS)}, got {self.split!r}")
        if self.size is not None and not 1 <= self.size <= SIZES[self.split]:
            raise GradscaleError(
                f"size of task digits must be from 1 to {SIZES[self.split]}, the images of split {self.split}, "
                f"got {self.size}; leave it out to take all"
            )
        if not 0 <= self.label_noise <= 1:
            raise GradscaleError(
                f"label_noise of task digits must be a share of the labels in [0, 1], got {self.label_noise}; give 0.2 "
                "to redraw a fifth"
            )
        if self.label_noise and self.data != "true-labels":
            raise GradscaleError(
                f"label_noise of task digits must be 0 where data is {self.data}, got {self.label_noise}; take data "
                "true-labels, and label_noise 1 for labels that are all random"
            )

    def model(self, checkpoint: str | None) -> nn.Module:
        """The ViT with the weights of a DeepSpeed `checkpoint`, or drawn from `seed` for None; in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            model = DigitsViT(self.width, self.depth).eval()
        if checkpoint is None:
            return model

        from gradscale.checkpoints import load_state_dict

        try:
            model.load_state_dict(load_state_dict(checkpoint))
        except RuntimeError as error:
            raise GradscaleError(
                f"checkpoint {checkpoint} must hold the weights of DigitsViT(width={self.width}, depth={self.depth}), "
                f"got {error}; pass the width and depth that it was trained with"
            ) from error
        return model

    def examples(self) -> TensorExamples:
        """The images of the split and their labels: true, permuted, or some of them redrawn."""
        images, labels = self._images_and_true_labels()
        if self.split == "validation":
            return TensorExamples(image=images, label=labels)
        if self.data == "permuted-labels":
            return TensorExamples(image=images, label=_permuted(_split()[1])[: len(labels)])
        return TensorExamples(image=images, label=torch.where(self.redrawn(), self._random_labels(), labels))

    def held_out(self) -> TensorExamples:
        """The fifth that is never trained on, with its true labels: all that split `validation` has."""
        _, _, images, labels = _split()
        return TensorExamples(image=images, label=labels)

    def true_labels(self) -> Tensor:
        """[n] of the images of `examples`, before any was permuted or redrawn."""
        return self._images_and_true_labels()[1]

    def redrawn(self) -> Tensor:
        """[n] bool: the images of `examples` whose label was redrawn, those that kept theirs by chance included."""
        n = len(self.true_labels())
        redrawn = torch.zeros(n, dtype=torch.bool)
        if self.split == "train":
            order = torch.randperm(n, generator=_generator(_NOISE_SEED, self.noise_seed))
            redrawn[order[: round(self.label_noise * n)]] = True
        return redrawn

    def _random_labels(self) -> Tensor:
        """[n]: what the labels that are redrawn become."""
        generator = _generator(_NOISE_SEED + 1, self.noise_seed)
        return torch.randint(CLASSES, (len(self.true_labels()),), generator=generator)

    def _images_and_true_labels(self) -> tuple[Tensor, Tensor]:
        train_images, train_labels, images, labels = _split()
        chosen = (train_images, train_labels) if self.split == "train" else (images, labels)
        return chosen[0][: self.size], chosen[1][: self.size]

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")

    def labels(self, batch: Batch) -> Tensor:
        return batch["label"]

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The class scores [B, C]."""
        return self.outputs_of(model, self.inputs(model, batch), batch)

    def inputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The pixels [B, 8, 8]."""
        return batch["image"]

    def outputs_of(self, model: nn.Module, inputs: Tensor, batch: Batch) -> Tensor:
        scores: Tensor = model(inputs)
        return scores

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, DigitsViT)
        return model.features(batch["image"])

    def input_vectors(self, model: nn.Module, batch: Batch) -> Tensor:
        """[B, 64]: the pixels."""
        return batch["image"].flatten(1)


def _patches_of(images: Tensor) -> Tensor:
    """[B, 8, 8] -> [B, 16, 4]: the patches in reading order, and the pixels of each in reading order."""
    rows = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # [B, 4, 4, 2, 2]
    return rows.reshape(images.shape[0], PATCHES, PATCH * PATCH)


@cache
def _split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then held-out images and labels; training pixels have mean 0 and variance 1."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise GradscaleError(
            "task digits must have scikit-learn for its images, got none; run `pip install 'gradscale[tasks]'`"
        ) from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    train, held_out = order.split([len(order) - len(order) // 5, len(order) // 5])
    images = (images - images[train].mean()) / images[train].std()
    return images[train], labels[train], images[held_out], labels[held_out]


def _permuted(labels: Tensor) -> Tensor:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_PERMUTATION_SEED))
    return labels[order]


def _generator(stream: int, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed << 8) + stream)
