"""The gradients that sketches are judged on: of two trained models, and drawn to be hard.

Shapes: B examples, b of them in a tile, R rows and C columns of a parameter, r rows in a tile, O x I entries of a
matrix that maps I features to O, P = R C.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from models import Shape, losses
from torch import Tensor, nn

from gradscale.grads.capture import capture
from gradscale.grads.coverage import select_parameters, sites
from gradscale.grads.layer import LayerGrads, materialize
from gradscale.tasks.digits import Digits
from gradscale.tasks.text import BYTES, encode

TEXT = Shape(layers=4, width=128, heads=4, positions=128, vocabulary=256, batch=16)
_CHUNK = 1 << 20  # entries an example that are widened to float64 at a time


@dataclass(frozen=True)
class Whole:
    """Gradients of a matrix that are simply there: the `LayerGrads` of any tensor [B, R, C]."""

    grads: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        batch, rows, columns = self.grads.shape
        return batch, rows, columns

    @property
    def dtype(self) -> torch.dtype:
        return self.grads.dtype

    @property
    def device(self) -> torch.device:
        return self.grads.device

    def tile(self, examples: slice, rows: slice, out: Tensor, *, add: bool = False) -> None:
        part = self.grads[examples, rows]
        out.add_(part) if add else out.copy_(part)


class Subject(NamedTuple):
    """Gradients of the same B examples. Only examples of one family are compared with one another."""

    name: str
    grads: Mapping[str, LayerGrads]
    families: Mapping[str, slice]
    matrices: Mapping[str, Tensor]  # [B, O, I]: what libraries for linear layers cover
    note: str = ""

    @property
    def sizes(self) -> dict[str, int]:
        return {name: math.prod(grads.shape[1:]) for name, grads in self.grads.items()}


def exact_gram(grads: Iterable[LayerGrads]) -> Tensor:
    """[B, B] float64: the inner products of the whole gradients."""
    total = torch.zeros(())
    for part in grads:
        batch, rows, columns = part.shape
        height = max(1, _CHUNK // columns)
        for start in range(0, rows, height):
            tile = torch.empty(batch, min(height, rows - start), columns, dtype=part.dtype)
            part.tile(slice(0, batch), slice(start, start + tile.shape[1]), tile)
            dense = tile.flatten(1).double()
            total = total + dense @ dense.T
    return total


# Trained models


def of_model(name: str, model: nn.Module, loss: Callable[[nn.Module], Tensor], batch: int, note: str) -> Subject:
    """The gradients of all parameters, and the matrices of all modules that map features, but the tied head's."""
    parameters = select_parameters(model, None)
    found: dict[str, LayerGrads] = {}

    def keep(parameter: str, grads: LayerGrads) -> None:
        found[parameter] = Whole(materialize(grads).view(grads.shape))

    capture(model.eval(), sites(model, parameters), loss, batch, keep)
    matrices = {parameter: _as_linear(model, parameter, found[parameter]) for parameter in _linear(model, found)}
    return Subject(name, found, {"all": slice(0, batch)}, matrices, note)


def _linear(model: nn.Module, parameters: Iterable[str]) -> list[str]:
    kinds = ("Linear", "Conv1D")
    return [p for p in parameters if p.endswith(".weight") and type(_owner(model, p)).__name__ in kinds]


def _as_linear(model: nn.Module, parameter: str, grads: LayerGrads) -> Tensor:
    """[B, O, I]: transformers' Conv1D keeps its matrix as [I, O]."""
    matrices = materialize(grads).view(grads.shape)
    return matrices.mT if type(_owner(model, parameter)).__name__ == "Conv1D" else matrices


def _owner(model: nn.Module, parameter: str) -> nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])


def digits(examples: int, steps: int = 300) -> Subject:
    """The demonstration's transformer, trained on scikit-learn's digits."""
    task = Digits()
    model, data = task.model(None).train(), task.examples().tensors
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    shuffle = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(len(data["label"]), (64,), generator=shuffle)
        _step(optimizer, task.losses(model, {key: values[ids] for key, values in data.items()}).mean())
    chosen = {key: values[:examples] for key, values in data.items()}
    with torch.no_grad():
        right = (
            model.eval()(task.held_out().tensors["image"]).argmax(dim=1) == task.held_out().tensors["label"]
        ).float()
    entries = sum(parameter.numel() for parameter in model.parameters())
    note = f"P={entries:,}, {steps} steps, held-out accuracy {right.mean():.1%}"
    return of_model("digits transformer", model, lambda m: task.losses(m, chosen), examples, note)


def text(examples: int, steps: int = 400) -> Subject:
    """A GPT-2 trained on the bytes of Python's own standard library."""
    rows = library_bytes(TEXT.positions)
    train, held_out = rows[examples:], rows[:examples]
    model = TEXT.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    shuffle = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50, (steps - step) / 100)
        ids = train[torch.randint(len(train), (TEXT.batch,), generator=shuffle)]
        _step(optimizer, losses(model, ids).mean())
    with torch.no_grad():
        loss = losses(model.eval(), held_out).mean()
    entries = sum(parameter.numel() for parameter in model.parameters())
    note = f"P={entries:,}, {steps} steps, held-out loss {loss:.2f} nats beside ln 256 = {math.log(256):.2f}"
    return of_model("GPT-2 on text", model, lambda m: losses(m, held_out), examples, note)


def library_bytes(positions: int) -> Tensor:
    """[rows, T] int64: the standard library's own modules, file after file by name, rows in a fixed random order."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    whole = "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
    ascii_only = whole.encode("ascii", "ignore").decode()
    parts = [ascii_only[start : start + positions] for start in range(0, len(ascii_only) - positions, positions)]
    rows = torch.tensor(encode(BYTES, parts, positions))
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# Drawn to be hard: outer products whose factors are shared, smooth or single, of one matrix

SHAPES = ((256, 1024), (1024, 256), (768, 3072))


def hard(rows: int, columns: int, each: int = 6) -> Subject:
    """`each` gradients of every family, of one matrix."""
    makers = {
        "one position": _one_position,
        "two positions": lambda R, C, n, g: _one_position(R, C, n, g) + _one_position(R, C, n, g),
        "shared left factor": lambda R, C, n, g: _outer(_normal(1, R, g).expand(n, R), _normal(n, C, g)),
        "shared right factor": lambda R, C, n, g: _outer(_normal(n, R, g), _normal(1, C, g).expand(n, C)),
        "both nearly shared": lambda R, C, n, g: _outer(_near(R, n, g), _near(C, n, g)),
        "equal rows": lambda R, C, n, g: _outer(torch.ones(n, R), _normal(n, C, g)),
        "equal columns": lambda R, C, n, g: _outer(_normal(n, R, g), torch.ones(n, C)),
        "constant on rectangles": lambda R, C, n, g: _outer(_interval(R, n, g), _interval(C, n, g)),
        "sinusoids": lambda R, C, n, g: _outer(_wave(R, n, g), _wave(C, n, g)),
        "nearly constant": lambda R, C, n, g: _outer(1 + 0.1 * _wave(R, n, g), 1 + 0.1 * _wave(C, n, g)),
        "one row, the same": lambda R, C, n, g: _outer(_spike(R, 1, g).expand(n, R), _normal(n, C, g)),
        "one row each, equal": lambda R, C, n, g: _outer(_spike(R, n, g), _normal(1, C, g).expand(n, C)),
        "one column, the same": lambda R, C, n, g: _outer(_normal(n, R, g), _spike(C, 1, g).expand(n, C)),
        "one column each, equal": lambda R, C, n, g: _outer(_normal(1, R, g).expand(n, R), _spike(C, n, g)),
        "eight entries": lambda R, C, n, g: sum(_outer(_spike(R, n, g), _spike(C, n, g)) for _ in range(8)),
    }
    generator = torch.Generator().manual_seed(rows)
    grads = torch.cat([make(rows, columns, each, generator) for make in makers.values()])
    families = {name: slice(i * each, (i + 1) * each) for i, name in enumerate(makers)}
    return Subject(f"hard, {rows} x {columns}", {"weight": Whole(grads)}, families, {"weight": grads})


@dataclass(frozen=True)
class SingleEntries:
    """Gradients that are 1 in one place and 0 elsewhere."""

    places: Tensor  # [B] int64, in row-major order
    rows: int
    columns: int

    dtype = torch.float32
    device = torch.device("cpu")

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.places), self.rows, self.columns

    def tile(self, examples: slice, rows: slice, out: Tensor, *, add: bool = False) -> None:
        flat = (out if add else out.zero_()).view(len(out), -1)
        places = self.places[examples] - rows.start * self.columns
        (inside,) = ((places >= 0) & (places < flat.shape[1])).nonzero(as_tuple=True)
        flat[inside, places[inside]] += 1


def single_entries(rows: int, columns: int, each: int = 96) -> Subject:
    """In one row, in one column, at equal distances, and anywhere: a pair's error is 0, or 1 where the two meet."""
    anywhere = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(rows))[:each]
    places = {
        "in one row": 3 * columns + torch.arange(each),
        "in one column": 3 + columns * torch.arange(each),
        "4096 apart": torch.arange(min(each, rows * columns // 4096)) * 4096 % (rows * columns),
        "anywhere": anywhere,
    }
    ends = torch.tensor([len(part) for part in places.values()]).cumsum(dim=0).tolist()
    families = {name: slice(end - len(part), end) for (name, part), end in zip(places.items(), ends, strict=True)}
    grads = SingleEntries(torch.cat(list(places.values())), rows, columns)
    return Subject(f"single entries, {rows} x {columns}", {"weight": grads}, families, {})


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """[n, R, C]: of factors [n, R] and [n, C]."""
    return left[:, :, None] * right[:, None, :]


def _one_position(rows: int, columns: int, n: int, generator: torch.Generator) -> Tensor:
    return _outer(_normal(n, rows, generator), _normal(n, columns, generator))


def _normal(n: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, size, generator=generator)


def _near(size: int, n: int, generator: torch.Generator) -> Tensor:
    return _normal(1, size, generator) + 0.3 * _normal(n, size, generator)


def _spike(size: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.eye(size)[torch.randperm(size, generator=generator)[:n]]


def _interval(size: int, n: int, generator: torch.Generator) -> Tensor:
    start, stop = torch.rand(2, n, 1, generator=generator).mul_(size).sort(dim=0).values
    place = torch.arange(size)
    return ((place >= start.floor()) & (place <= stop.ceil())).float()


def _wave(size: int, n: int, generator: torch.Generator) -> Tensor:
    cycles = torch.randint(1, 9, (n, 1), generator=generator)
    phase = torch.rand(n, 1, generator=generator)
    return torch.sin(2 * math.pi * (cycles * torch.arange(size) / size + phase))
