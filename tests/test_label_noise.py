"""Labels of which an exact share is redrawn, and the recipe that trains and measures with them, end to end."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch

from gradscale.errors import GradscaleError
from gradscale.tasks.digits import CLASSES, Digits

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "jobs" / "label_noise.py"


@pytest.mark.parametrize(
    ("noise", "size", "expected"), [(0.0, 600, 0), (0.2, 600, 120), (0.4, 333, 133), (1.0, 50, 50)]
)
def test_exactly_the_share_is_redrawn_and_the_others_keep_their_label(noise: float, size: int, expected: int) -> None:
    task = Digits(label_noise=noise, size=size)
    given, true, redrawn = task.examples().tensors["label"], task.true_labels(), task.redrawn()
    assert (len(given), int(redrawn.sum())) == (size, expected)
    assert torch.equal(given[~redrawn], true[~redrawn])
    assert torch.equal(task.examples().tensors["image"], Digits(size=size).examples().tensors["image"])


def test_redrawn_labels_are_uniform_and_know_nothing_of_the_true_ones() -> None:
    """Over 200 seeds of 500 labels: chance agreement and every class at 1/10, within 4.5 standard errors."""
    tasks = [Digits(label_noise=1.0, size=500, noise_seed=seed) for seed in range(200)]
    given = torch.stack([task.examples().tensors["label"] for task in tasks])
    tolerance = 4.5 * math.sqrt(0.1 * 0.9 / given.numel())
    shares = torch.bincount(given.flatten(), minlength=CLASSES) / given.numel()
    assert (shares - 0.1).abs().max() < tolerance
    assert abs(float((given == tasks[0].true_labels()).double().mean()) - 0.1) < tolerance


def test_every_image_is_as_likely_to_be_redrawn() -> None:
    counts = sum(Digits(label_noise=0.2, size=100, noise_seed=seed).redrawn().double() for seed in range(400))
    assert isinstance(counts, torch.Tensor)
    assert (counts - 80).abs().max() < 4.5 * math.sqrt(400 * 0.2 * 0.8)


def test_the_noise_seed_alone_decides_which_labels_are_redrawn_and_to_what() -> None:
    one, again, other = (Digits(seed=s, label_noise=0.4, noise_seed=k) for s, k in ((0, 3), (1, 3), (0, 4)))
    assert torch.equal(one.examples().tensors["label"], again.examples().tensors["label"])
    assert not torch.equal(one.redrawn(), other.redrawn())
    everyone = [Digits(label_noise=1.0, noise_seed=k).examples().tensors["label"] for k in (3, 4)]
    assert float((everyone[0] == everyone[1]).double().mean()) < 0.2


def test_less_noise_redraws_a_part_of_what_more_noise_does_and_to_the_same_classes() -> None:
    less, more = (Digits(label_noise=noise, size=600, noise_seed=1) for noise in (0.2, 0.4))
    assert bool((more.redrawn() | ~less.redrawn()).all())
    given = [task.examples().tensors["label"][less.redrawn()] for task in (less, more)]
    assert torch.equal(*given)


def test_validation_labels_are_clean_whatever_the_noise() -> None:
    task = Digits(split="validation", label_noise=1.0)
    held_out = Digits().held_out().tensors
    assert torch.equal(task.examples().tensors["label"], held_out["label"])
    assert torch.equal(task.examples().tensors["image"], held_out["image"])
    assert not task.redrawn().any()
    assert torch.equal(
        Digits(split="validation", data="permuted-labels").examples().tensors["label"], held_out["label"]
    )


def test_a_smaller_size_is_the_first_images_of_the_split() -> None:
    for data in ("true-labels", "permuted-labels"):
        few, all_of_them = (Digits(data, size=size).examples().tensors for size in (70, None))
        assert all(torch.equal(few[name], all_of_them[name][:70]) for name in few)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "test"}, "split of task digits must be one of train, validation, got 'test'"),
        ({"size": 0}, "size of task digits must be from 1 to 1438, the images of split train, got 0"),
        ({"size": 360, "split": "validation"}, "must be from 1 to 359, the images of split validation, got 360"),
        ({"label_noise": 1.2}, r"label_noise of task digits must be a share of the labels in \[0, 1\], got 1.2"),
        ({"label_noise": math.nan}, r"label_noise of task digits must be a share of the labels in \[0, 1\], got nan"),
        (
            {"label_noise": 0.2, "data": "permuted-labels"},
            "label_noise of task digits must be 0 where data is permuted-labels, got 0.2",
        ),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(GradscaleError, match=message):
        Digits(**settings)  # type: ignore[arg-type]


def test_the_table_over_seeds_has_their_mean_and_its_standard_error() -> None:
    generator = np.random.default_rng(0)
    index = pd.MultiIndex.from_product([[0.0, 1.0], [0, 4], ["train"], ["loss", "stiffness/cos"], range(3)])
    table = index.to_frame(index=False, name=["noise", "step", "examples", "quantity", "seed"])
    table = table.assign(value=generator.normal(size=len(table)), stderr=generator.random(len(table)), n=7)
    means = recipe().means_over_seeds(table)
    assert len(means) == 8
    for row in means.itertuples():
        same = table[(table["noise"] == row.noise) & (table["step"] == row.step) & (table["quantity"] == row.quantity)]
        values = same["value"].to_numpy()
        error = math.sqrt(((values - values.mean()) ** 2).sum() / 2 / 3)
        found = (row.value, row.stderr, row.within)
        np.testing.assert_allclose(found, (values.mean(), error, same["stderr"].mean()), rtol=1e-12)
        assert row.seeds == 3


def test_other_settings_than_those_of_the_folder_are_refused(tmp_path: Path) -> None:
    check_settings = recipe().check_settings
    check_settings(tmp_path / "settings.json", {"steps": 8, "size": 60})
    check_settings(tmp_path / "settings.json", {"steps": 8, "size": 60})
    with pytest.raises(
        SystemExit, match=r"settings must be those of .*json, got steps=16 where it has 8; take another"
    ):
        check_settings(tmp_path / "settings.json", {"steps": 16, "size": 60})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_recipe_trains_measures_tabulates_and_draws_and_keeps_what_is_there(tmp_path: Path) -> None:
    run_recipe(tmp_path, "0", "1")
    means = pd.read_csv(tmp_path / "label-noise.csv")
    assert set(means["noise"]) == {0.0, 1.0}
    assert set(means["step"]) == {0, 4}
    assert set(means["examples"]) == {"train", "validation", "between"}
    for name, panels in recipe().FIGURES.items():
        assert (tmp_path / f"label-noise-{name}.png").stat().st_size < 150_000
        for panel in panels:
            drawn = means[(means["examples"] == panel.examples) & (means["quantity"] == panel.quantity)]
            steps = 2 if "redrawn" in panel.quantity else 4  # nothing is redrawn without noise
            assert len(drawn) == steps, panel
            assert drawn["value"].notna().all(), panel
    start = means[(means["step"] == 0) & (means["examples"] == "validation")].set_index("quantity")
    assert start.loc["loss", "value"].nunique() == 1  # the same weights and the same clean labels, whatever the noise

    tables = sorted(tmp_path.glob("noise-*/table.parquet"))
    before = [table.stat().st_mtime_ns for table in tables]
    (tmp_path / "label-noise.csv").unlink()
    run_recipe(tmp_path, "0", "1")
    assert len(tables) == 2
    assert [table.stat().st_mtime_ns for table in tables] == before
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "label-noise.csv"), means)


def run_recipe(out: Path, *noise: str) -> None:
    tiny = ["--seeds", "1", "--steps", "4", "--size", "60", "--workers", "1"]
    job = [sys.executable, str(RECIPE), "--out", str(out), "--noise", *noise, *tiny]
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    environment |= {"PYTHONPATH": str(ROOT), "TORCH_EXTENSIONS_DIR": str(ROOT / ".cache" / "torch_extensions")}
    ended = subprocess.run(job, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, f"the recipe must end with 0, got {ended.returncode}:\n{ended.stdout}\n{ended.stderr}"


@cache
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("label_noise", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
