"""The digits task: its split, its permuted labels, and a model that depends on nothing but its seed."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, grad, vmap

from gradscale.errors import GradscaleError
from gradscale.task import Task
from gradscale.tasks.digits import Digits, DigitsViT

IDS = range(5)


def test_is_a_task_that_workers_can_receive() -> None:
    task = Digits(data="permuted-labels", seed=3)
    assert isinstance(task, Task)
    assert pickle.loads(pickle.dumps(task)) == task


def test_a_fifth_of_the_images_is_held_out() -> None:
    task = Digits()
    train, held_out = task.examples().tensors["image"], task.held_out().tensors["image"]
    assert (len(train), len(held_out)) == (1438, 359)
    both = torch.cat([train, held_out]).flatten(1)
    assert len(both.unique(dim=0)) == 1797  # all are different, so none is on both sides
    assert torch.equal(Digits(seed=1).examples().tensors["image"], train)


def test_training_pixels_are_standardized() -> None:
    pixels = Digits().examples().tensors["image"]
    torch.testing.assert_close(pixels.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels.std(), torch.tensor(1.0))


def test_permuted_labels_are_the_training_labels_in_another_order() -> None:
    true, permuted = Digits().examples().tensors, Digits(data="permuted-labels").examples().tensors
    assert torch.equal(true["image"], permuted["image"])
    assert torch.equal(true["label"].sort().values, permuted["label"].sort().values)
    assert (true["label"] == permuted["label"]).float().mean() < 0.15
    assert torch.equal(Digits(data="permuted-labels", seed=1).examples().tensors["label"], permuted["label"])
    assert torch.equal(Digits(data="permuted-labels").held_out().tensors["label"], Digits().held_out().tensors["label"])


def test_shapes() -> None:
    task = Digits()
    batch = task.examples().batch(IDS)
    model = task.model(None)
    assert not model.training
    assert batch["image"].shape == (5, 8, 8)
    assert model(batch["image"]).shape == (5, 10)
    assert task.losses(model, batch).shape == (5,)
    assert torch.equal(task.labels(batch), batch["label"])


def test_patches_are_squares_of_neighbouring_pixels() -> None:
    seen: list[torch.Tensor] = []
    model = DigitsViT()
    model.patches.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.arange(64.0).reshape(1, 8, 8))
    assert seen[0].shape == (1, 16, 4)
    assert seen[0][0, :2].tolist() == [[0, 1, 8, 9], [2, 3, 10, 11]]
    assert seen[0][0, 4].tolist() == [16, 17, 24, 25]


def test_the_seed_alone_decides_the_initial_weights() -> None:
    torch.manual_seed(0)
    first = Digits().model(None).state_dict()
    torch.manual_seed(1)
    again, other = Digits().model(None).state_dict(), Digits(seed=1).model(None).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    task = Digits(data="permuted-labels", seed=5)
    task.model(None)
    task.examples()
    task.held_out()
    assert torch.equal(torch.get_rng_state(), before)


def test_every_parameter_belongs_to_a_leaf_module_and_has_a_gradient() -> None:
    task = Digits()
    model, batch = task.model(None), task.examples().batch(IDS)
    owners = [module for module in model.modules() if list(module.parameters(recurse=False))]
    assert all(not list(module.children()) for module in owners)
    task.losses(model, batch).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [
        name for name in without if not name.endswith("key.bias")
    ] == []  # softmax ignores a constant added to all keys


def test_an_example_alone_has_the_loss_and_gradient_it_has_in_a_batch() -> None:
    task = Digits()
    model, batch = (
        task.model(None).double(),
        {k: v.double() if k == "image" else v for k, v in task.examples().batch(IDS).items()},
    )
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, torch.Tensor], image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        scores = functional_call(model, weights, image[None])
        return torch.nn.functional.cross_entropy(scores, label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))(weights, batch["image"], batch["label"])
    task.losses(model, batch).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(each[name].sum(dim=0), parameter.grad)


def test_unknown_data_is_refused() -> None:
    with pytest.raises(
        GradscaleError, match=r"data of task digits must be one of true-labels, permuted-labels, got 'mnist'"
    ):
        Digits(data="mnist")


def test_weights_of_another_width_are_refused(tmp_path: Path) -> None:
    torch.save(DigitsViT(width=32).state_dict(), tmp_path / "other.pt")
    with pytest.raises(GradscaleError, match=r"must hold the weights of DigitsViT\(width=64, depth=3\), got"):
        Digits().model(str(tmp_path / "other.pt"))
