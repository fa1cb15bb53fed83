"""Small problems of which curvature is known independently of any library, for the cases of `curvature_cases`.

Torch alone. Oracles are central differences of gradients in float64, in which no second derivative of any operation has
a part, and closed forms.

Shapes: B examples of a batch, P parameter entries, T positions, C classes, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

F64 = torch.float64
STENCIL = ((1, 8), (-1, -8), (2, -1), (-2, 1))  # places and factors of the fourth order, over 12 h


class Problem(NamedTuple):
    """The mean over all examples of `criterion(model(X), y)`: what H is the Hessian of.

    `criterion` has an attribute `reduction`, "mean" as it comes; a shallow copy with "none" gives losses an example.
    Vectors are float, the trainable parameters' entries in the order of `model.parameters()`.
    """

    model: nn.Module
    criterion: nn.Module
    batches: tuple[tuple[Tensor, Tensor], ...]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def size(self) -> int:
        """P."""
        return sum(p.numel() for p in self.parameters)

    @property
    def rows(self) -> int:
        return sum(len(y) for _, y in self.batches)


class MeanOutput(nn.Module):
    """The outputs are the losses."""

    def __init__(self) -> None:
        super().__init__()
        self.reduction = "mean"

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        return outputs.mean() if self.reduction == "mean" else outputs


class Quadratic(nn.Module):
    """theta^T A theta / 2 of every example: H = A, whatever the weights."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.theta = nn.Parameter(torch.ones(len(matrix), dtype=matrix.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.theta @ (self.matrix @ self.theta)) / 2


class Ball(nn.Module):
    """c |theta|^2 / 2 of every example at theta = 0: H = c I, products exact, by differences too."""

    def __init__(self, size: int, c: float) -> None:
        super().__init__()
        self.c, self.theta = c, nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.c * self.theta * self.theta).sum() / 2


class Attention(nn.Module):
    """One causal block of a transformer; `fused` takes torch's kernel as it comes, the other is written out."""

    def __init__(self, width: int, heads: int, norm: Callable[[int], nn.Module], fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norm_1, self.norm_2 = norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            hidden = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            scores = (q @ k.mT / (D // self.heads) ** 0.5).masked_fill(hidden, float("-inf"))
            mixed = scores.softmax(dim=-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class TinyGPT(nn.Module):
    """Tokens [B, T] -> scores [B, C, T]."""

    def __init__(self, norm: Callable[[int], nn.Module], vocabulary: int, length: int, width: int, fused: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Parameter(0.5 * torch.randn(length, width))
        self.block, self.norm = Attention(width, 2, norm, fused), norm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.head(self.norm(self.block(self.tokens(ids) + self.positions)))
        return scores.mT


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def cut(x: Tensor, y: Tensor, sizes: Sequence[int]) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


NORMS: dict[str, Callable[[int], nn.Module]] = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}


def gpt(norm: str, fused: bool = False, sizes: Sequence[int] = (4,)) -> Problem:
    """A transformer of one block in float64, P = 450 or less, with random gains and offsets in its norms."""
    with seeded(0):
        model = TinyGPT(NORMS[norm], vocabulary=5, length=4, width=6, fused=fused).double().eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
        ids = torch.randint(5, (sum(sizes), 5))
    return Problem(model, nn.CrossEntropyLoss(), cut(ids[:, :-1], ids[:, 1:].contiguous(), sizes))


def net(*, batch_norm: bool = False, dropout: float = 0.0, sizes: Sequence[int] = (7,)) -> Problem:
    """Two layers in float64, with BatchNorm or dropout between them on request; in eval mode."""
    with seeded(1):
        extra: list[nn.Module] = [nn.BatchNorm1d(6)] if batch_norm else []
        extra += [nn.Dropout(dropout)] if dropout else []
        model = nn.Sequential(nn.Linear(4, 6), *extra, nn.Tanh(), nn.Linear(6, 3)).double().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        x, y = 2 * torch.randn(sum(sizes), 4, dtype=F64), torch.randint(3, (sum(sizes),))
    return Problem(model, nn.CrossEntropyLoss(), cut(x, y, sizes))


def quadratic(values: Sequence[float], seed: int = 0, dtype: torch.dtype = F64) -> Problem:
    """H has the eigenvalues `values` and random eigenvectors."""
    with seeded(seed):
        basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=F64))
    matrix = basis * torch.tensor(values, dtype=F64) @ basis.mT
    model = Quadratic(((matrix + matrix.mT) / 2).to(dtype)).eval()
    return Problem(model, MeanOutput(), ((torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)),))


def ball(size: int, c: float) -> Problem:
    """H = c I in float32."""
    return Problem(Ball(size, c).eval(), MeanOutput(), ((torch.ones(1, 1), torch.zeros(1, 1)),))


class Trained(NamedTuple):
    problem: Problem
    trace: float  # of H at these weights


@cache
def trained(steps: int = 60) -> Trained:
    """A transformer in float32 with GPT-2's initial weights, of deviation 0.02, after some steps of Adam.

    Its LayerNorms divide by what is small: steps that a larger model would not notice are far out of the parabola.
    """
    with seeded(3):
        model = TinyGPT(nn.LayerNorm, vocabulary=5, length=4, width=6, fused=False).eval()
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=0.0 if "bias" in name else 0.02)
        ids = torch.randint(5, (16, 5))
        x, y = ids[:, :-1], ids[:, 1:].contiguous()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.zero_grad(set_to_none=True)
    problem = Problem(model, nn.CrossEntropyLoss(), ((x, y),))
    return Trained(problem, float(whole_matrix(problem._replace(model=copy.deepcopy(model).double())).trace()))


def gradient(problem: Problem) -> Tensor:
    """[P]: of the mean over all examples."""
    losses = (problem.criterion(problem.model(x), y) * len(y) / problem.rows for x, y in problem.batches)
    found = torch.autograd.grad(sum(losses, torch.zeros(())), problem.parameters)
    return torch.cat([part.reshape(-1) for part in found])


def central_differences(problem: Problem, vectors: Tensor, h: float = 1e-4) -> Tensor:
    """[k, P]: Hv of the rows v of `vectors` [k, P], of fourth order, in float64; the problem's own model stays put."""
    problem = problem._replace(model=copy.deepcopy(problem.model))
    here = nn.utils.parameters_to_vector(problem.parameters).detach().clone()
    found = torch.zeros_like(vectors)
    for row, v in zip(found, vectors, strict=True):
        step = h / v.norm()
        for place, factor in STENCIL:
            nn.utils.vector_to_parameters(here + place * step * v, problem.parameters)
            row += factor * gradient(problem) / (12 * step)
    return found


def whole_matrix(problem: Problem, h: float = 1e-4, together: int = 64) -> Tensor:
    """[P, P]: `central_differences` of all unit vectors, their gradients by `torch.func.vmap`."""
    names = [name for name, p in problem.model.named_parameters() if p.requires_grad]
    sizes, here = [p.numel() for p in problem.parameters], nn.utils.parameters_to_vector(problem.parameters).detach()

    def loss(point: Tensor) -> Tensor:
        parts = (part.view_as(p) for part, p in zip(point.split(sizes), problem.parameters, strict=True))
        values = dict(zip(names, parts, strict=True))
        ((x, y),) = problem.batches
        mean: Tensor = problem.criterion(torch.func.functional_call(problem.model, values, (x,)), y)
        return mean

    gradients = torch.func.vmap(torch.func.grad(loss))
    rows = []
    for units in torch.eye(problem.size, dtype=F64).split(together):
        parts = (factor * gradients(here + place * h * units) for place, factor in STENCIL)
        rows.append(sum(parts, torch.zeros(())) / (12 * h))
    return torch.cat(rows)


@cache
def eigenvalues_of_gpt(norm: str, count: int) -> list[float]:
    """The `count` largest in magnitude of `gpt(norm)`, from the whole matrix by central differences."""
    matrix = whole_matrix(gpt(norm))
    values = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)
    return values[values.abs().argsort(descending=True)[:count]].tolist()
