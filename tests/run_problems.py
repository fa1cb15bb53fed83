"""Tasks for tests of whole runs: every one can be pickled, and made from the options of the command line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from gradscale.errors import GradscaleError
from gradscale.task import TensorExamples
from gradscale.tasks.digits import Digits
from gradscale.tasks.tables import ParquetExamples


@dataclass(frozen=True)
class Given:
    """Loss <w, g_i> at any w: the examples' gradients are the given rows."""

    gradients: tuple[tuple[float, ...], ...]

    def model(self, checkpoint: str | None) -> nn.Module:
        return nn.Linear(len(self.gradients[0]), 1, bias=False).double().eval()

    def examples(self) -> TensorExamples:
        return TensorExamples(g=torch.tensor(self.gradients, dtype=torch.float64))

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["g"])[:, 0]


@dataclass(frozen=True)
class Regression:
    """Regression on random rows in three classes; the loss of row `nan` is NaN, and row `without` is left out."""

    rows: int = 24
    nan: int = -1
    without: int = -1

    def model(self, checkpoint: str | None) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double().eval()

    def examples(self) -> TensorExamples:
        x = torch.randn(64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        rows = torch.tensor([row for row in range(self.rows) if row != self.without], dtype=torch.int64)
        return TensorExamples(x=x[rows], row=rows)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        losses = (model(batch["x"])[:, 0] - batch["x"].sum(dim=1)).square() / 2
        return losses * torch.where(batch["row"] == self.nan, torch.nan, 1.0)

    def labels(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["row"] % 3


@dataclass(frozen=True)
class FewDigits:
    """The first training digits and a narrow vision transformer, from the files that `save_digits` wrote."""

    folder: str

    def model(self, checkpoint: str | None) -> nn.Module:
        return Digits(width=16, depth=1).model(checkpoint)

    def examples(self) -> TensorExamples:
        return TensorExamples(**safetensors.torch.load_file(f"{self.folder}/digits.safetensors"))

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return Digits().losses(model, batch)

    def labels(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["label"]


def save_digits(folder: Path, rows: int) -> dict[int, str]:
    """Write the data of `FewDigits` (importing scikit-learn takes seconds) and two checkpoints; their paths by step."""
    digits = {name: tensor.clone() for name, tensor in Digits().examples().batch(range(rows)).items()}
    safetensors.torch.save_file({**digits, "row": torch.arange(rows)}, folder / "digits.safetensors")
    paths = {step: folder / f"step{step}.safetensors" for step in (10, 20)}
    for seed, path in enumerate(paths.values()):
        safetensors.torch.save_file(Digits(width=16, depth=1, seed=seed).model(None).state_dict(), path)
    return {step: str(path) for step, path in paths.items()}


@dataclass(frozen=True)
class Troubled:
    """A problem in which something goes wrong whenever the row `row` is measured, the first `times` times.

    Every attempt leaves a file in `folder`; once there is one named `mended`, all is well. `trouble` is raise, refuse,
    kill, pause (a moment for every microbatch), or a kind of running out of memory.
    """

    folder: str
    trouble: str
    row: int = 15
    times: int = 1
    digits: str = ""  # their folder; regression without

    @property
    def inner(self) -> Regression | FewDigits:
        return FewDigits(self.digits) if self.digits else Regression()

    def model(self, checkpoint: str | None) -> nn.Module:
        return self.inner.model(checkpoint)

    def examples(self) -> TensorExamples:
        return self.inner.examples()

    def labels(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.inner.labels(batch)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if self.trouble == "pause":
            time.sleep(0.15)
        elif bool((batch["row"] == self.row).any()) and self.attempt() < self.times:
            self.go_wrong()
        return self.inner.losses(model, batch)

    def attempt(self) -> int:
        """How many attempts there have been before this one; `times` once all is mended."""
        if (Path(self.folder) / "mended").exists():
            return self.times
        for number in count():
            with contextlib.suppress(FileExistsError):
                (Path(self.folder) / f"attempt-{number}").touch(exist_ok=False)
                return number
        raise AssertionError

    def go_wrong(self) -> None:
        match self.trouble:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "refuse":
                raise GradscaleError(f"row {self.row} must be something else, got itself")
            case "memory":
                raise MemoryError
            case "torch memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            case "cpu memory":
                torch.empty(1 << 60, dtype=torch.uint8)
            case _:
                raise ArithmeticError(f"row {self.row} went wrong")


@dataclass(frozen=True)
class Broken:
    """Regression with a fault: `batchnorm` in training mode, `reduced` or `mixing` losses, `empty` data."""

    fault: str

    def model(self, checkpoint: str | None) -> nn.Module:
        model = Regression().model(checkpoint)
        if self.fault == "batchnorm":
            return nn.Sequential(nn.BatchNorm1d(5).double(), model).train()
        return model

    def examples(self) -> TensorExamples:
        return Regression(rows=0 if self.fault == "empty" else 24).examples()

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        losses = model(batch["x"])[:, 0].square()
        match self.fault:
            case "reduced":
                return losses.mean()
            case "mixing":
                return losses * losses.mean()
            case _:
                return losses


@dataclass(frozen=True)
class FromParquet:
    """Regression of the column `y` on the lists in the column `x` of Parquet files."""

    path: str

    def model(self, checkpoint: str | None) -> nn.Module:
        return nn.Linear(3, 1).eval()

    def examples(self) -> ParquetExamples:
        return ParquetExamples(self.path, columns=["x", "y"])

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return (model(batch["x"].float())[:, 0] - batch["y"].float()).square()


class WithLock:
    """A task that cannot be pickled."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def model(self, checkpoint: str | None) -> nn.Module:
        return nn.Linear(5, 1).double().eval()

    def examples(self) -> TensorExamples:
        return Regression().examples()

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["x"])[:, 0]


@dataclass(frozen=True)
class Falling(Regression):
    """Regression during which a process is killed, once, when there is a commit of Lanczos in the run `out`.

    With `pause`, none is, and every microbatch takes a moment.
    """

    out: str = ""
    pause: float = 0.0

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        time.sleep(self.pause)
        state, fallen = Path(self.out) / "lanczos" / "step-00000000" / "state.json", Path(f"{self.out}-fallen")
        if not self.pause and state.exists() and json.loads(state.read_text())["step"] >= 3:
            with contextlib.suppress(FileExistsError):
                fallen.touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        return super().losses(model, batch)
