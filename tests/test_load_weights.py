"""Promise: `load_weights` fills the model with exactly what the checkpoint holds, or says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import gradscale as gs
from gradscale.errors import GradscaleError

pytestmark = pytest.mark.filterwarnings("error")

WEIGHTS = {"0.weight": torch.arange(6.0).reshape(2, 3), "0.bias": torch.tensor([1.0, -1.0])}


def made_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2))


def test_copies_into_the_dtype_of_the_model(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    model = made_model().double()
    gs.load_weights(model, str(tmp_path / "w.safetensors"))
    assert all(torch.equal(tensor, WEIGHTS[name].double()) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.bias": None}, r"exactly the model's weights, got one that lacks 0\.bias; build the model that was"),
        ({"extra": torch.ones(1)}, "got one that has besides extra; build"),
        ({"0.bias": torch.ones(3)}, r"got one that has in shape \(3,\) 0\.bias; build"),
    ],
)
def test_other_weights(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    saved = {name: tensor for name, tensor in (WEIGHTS | change).items() if tensor is not None}
    torch.save(saved, tmp_path / "w.pt")
    with pytest.raises(GradscaleError, match=message):
        gs.load_weights(made_model(), str(tmp_path / "w.pt"))


def test_tied_weights_need_one_name_and_one_value(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(2, 3), nn.Linear(3, 2, bias=False))
    model[1].weight = model[0].weight
    weight = torch.arange(6.0).reshape(2, 3)
    for name, saved in (("one", {"1.weight": weight}), ("two", {"0.weight": weight, "1.weight": weight + 1})):
        torch.save(saved, tmp_path / f"{name}.pt")
    gs.load_weights(model, str(tmp_path / "one.pt"))
    assert torch.equal(model[0].weight, weight)
    with pytest.raises(GradscaleError, match=r"in two values, tied in the model, 0\.weight, 1\.weight; build"):
        gs.load_weights(model, str(tmp_path / "two.pt"))
