"""jobs/train_digits.py, for real: DeepSpeed trains the ViT and leaves checkpoints that the task reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from gradscale.checkpoints import load_state_dict
from gradscale.tasks.digits import Digits, DigitsViT

ROOT = Path(__file__).parent.parent


def test_deepspeed_checkpoints_load_and_the_first_holds_the_initial_weights(tmp_path: Path) -> None:
    printed = train(tmp_path, 10)
    assert printed.count("held-out accuracy") == 4

    tags = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert tags == ["global_step0", "global_step10", "global_step4", "global_step8"]

    initial = Digits(seed=7).model(None).state_dict()
    first, last = (load_state_dict(str(tmp_path / f"global_step{step}")) for step in (0, 10))
    DigitsViT().load_state_dict(last, strict=True)
    assert all(torch.equal(first[name], initial[name]) for name in initial)
    assert not any(torch.equal(first[name], last[name]) for name in ("patches.weight", "head.bias"))


def test_the_noise_the_size_and_the_shape_are_those_asked_for(tmp_path: Path) -> None:
    noisy = ["--label-noise", "0.4", "--size", "200", "--width", "16", "--depth", "1"]
    printed = train(tmp_path, 1, *noisy, "--config", str(ROOT / "jobs" / "ds_label_noise.json"))

    task = Digits(seed=7, width=16, depth=1, size=200, label_noise=0.4, noise_seed=7)
    last = task.model(str(tmp_path / "global_step1"))
    loss = task.losses(last, task.examples().tensors).mean()
    assert f"step     1  training loss {loss:.3f}" in printed
    clean = Digits(seed=7, width=16, depth=1, size=200)
    assert f"{clean.losses(last, clean.examples().tensors).mean():.3f}" != f"{loss:.3f}"


def train(out: Path, steps: int, *options: str) -> str:
    """What the job printed."""
    job = [
        sys.executable,
        str(ROOT / "jobs" / "train_digits.py"),
        "--out",
        str(out),
        "--steps",
        str(steps),
        "--seed",
        "7",
        *options,
    ]
    private = {"PYTHONPATH": str(ROOT), "TORCH_EXTENSIONS_DIR": str(ROOT / ".cache" / "torch_extensions")}
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launched} | private
    ended = subprocess.run(job, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, (
        f"the training must end with 0, got {ended.returncode}:\n{ended.stdout}\n{ended.stderr}"
    )
    return ended.stdout
