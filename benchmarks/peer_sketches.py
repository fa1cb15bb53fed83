"""The projections of other libraries, written out from their sources, and held to the library where it is installed.

Both project the two factors of every linear layer's gradient G [O, I] and keep L G R^T [p, p] of each, one after
another: p^2 numbers a module.

- bergson 2.5.1, `projection_target="per_module"` (collector/collector.py, `create_projection_matrix`, `jl`): L and R
  hold signs / sqrt(p), its default, or normals / sqrt(p).
- LogIX's LoGra, as in its lora/modules.py: A [r, I] and C [O, r] of nn.Linear's own initialization, uniform with
  variances 1 / (3 I) and 1 / (3 r), and the gradient of the matrix between them, C^T G A^T. It is not unbiased:
  |C^T G A^T|^2 is |G|^2 r / (9 I) in expectation, different from layer to layer.

Shapes: B examples, O x I entries of a matrix, p or r the rank, M modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Draw = Callable[[int, int, torch.Generator], Tensor]  # p, size -> [p, size]


def signs(p: int, size: int, generator: torch.Generator) -> Tensor:
    return (torch.randint(2, (p, size), generator=generator) * 2 - 1) / math.sqrt(p)


def normals(p: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(p, size, generator=generator) / math.sqrt(p)


def two_sided(matrices: Mapping[str, Tensor], p: int, draw: Draw, seed: int) -> Tensor:
    """[B, M p^2]: bergson's, of gradients [B, O, I] of each module."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for grads in matrices.values():
        left, right = (draw(p, size, generator) for size in grads.shape[1:])
        parts.append(_between(left, grads, right))
    return torch.cat(parts, dim=1)


def logra(matrices: Mapping[str, Tensor], rank: int, seed: int) -> Tensor:
    """[B, M r^2] or less, where a side is shorter than the rank: LogIX's."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for grads in matrices.values():
        out_features, in_features = grads.shape[1:]
        r = min(rank, in_features, out_features)
        down = _uniform(r, in_features, in_features, generator)
        up = _uniform(out_features, r, r, generator)
        parts.append(_between(up.T, grads, down))
    return torch.cat(parts, dim=1)


def rank_for(dim: int, modules: int) -> int:
    """p with M p^2 as near to `dim` as it can be without being more."""
    return math.isqrt(dim // modules)


def _between(left: Tensor, grads: Tensor, right: Tensor) -> Tensor:
    """[B, p^2] float64."""
    return (left @ grads @ right.T).flatten(1).double()


def _uniform(rows: int, columns: int, fan_in: int, generator: torch.Generator) -> Tensor:
    """kaiming_uniform_ with a = sqrt(5): between -1 / sqrt(fan_in) and 1 / sqrt(fan_in)."""
    return (2 * torch.rand(rows, columns, generator=generator) - 1) / math.sqrt(fan_in)


# Checks


def check_means(seeds: int = 4000) -> dict[str, float]:
    """The mean of |Sx|^2 / |x|^2 over seeds, over what is stated, by scheme: 1 within a few hundredths."""
    x = {"a": torch.randn(1, 12, 7, generator=torch.Generator().manual_seed(1))}
    length = float(x["a"].square().sum())
    schemes: dict[str, tuple[Callable[[int], Tensor], float]] = {
        "two-sided signs": (lambda seed: two_sided(x, 3, signs, seed), 1.0),
        "two-sided normals": (lambda seed: two_sided(x, 3, normals, seed), 1.0),
        "LoGra": (lambda seed: logra(x, 3, seed), 3 / (9 * 7)),
    }
    return {
        name: sum(float(images(seed).square().sum()) for seed in range(seeds)) / seeds / length / stated
        for name, (images, stated) in schemes.items()
    }


def difference_from_bergson(p: int = 5, positions: int = 3) -> float:
    """The largest difference between what bergson collects and L G R^T with its own L and R, relative to the largest.

    Its L and R are also held to be signs / sqrt(p). Raises: ImportError if it is not installed.
    """
    from bergson.collector.collector import HookCollectorBase, create_module_projection_matrix
    from bergson.gradients import GradientProcessor

    class Collect(HookCollectorBase):
        def setup(self) -> None: ...

        def backward_hook(self, module: nn.Module, g: Tensor) -> None:
            self.mod_grads[module._name] = self._compute_gradient(module, g)

        def process_batch(self, indices: list[int], **kwargs: object) -> None: ...

        def teardown(self) -> None: ...

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 6))
    x = torch.randn(2, positions, 9, requires_grad=True)
    processor = GradientProcessor(projection_dim=p, projection_type="rademacher")
    with (collector := Collect(model=model, processor=processor)):
        model(x).square().sum().backward()
    worst = 0.0
    for name, found in collector.mod_grads.items():
        weight = model.get_submodule(name).weight
        sides = zip(("left", "right"), weight.shape, strict=True)
        cpu = torch.device("cpu")
        left, right = (
            create_module_projection_matrix(name, role, p, n, torch.float32, cpu, "rademacher", "jl", None)
            for role, n in sides
        )
        assert bool(((left.abs() * math.sqrt(p) - 1).abs() < 1e-6).all())
        grads = torch.stack([torch.autograd.grad(model(one).square().sum(), weight)[0] for one in x])
        expected = _between(left, grads, right)
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst
