"""Per-example gradients of a small ViT while it learns digits of which a share has random labels.

    python jobs/label_noise.py --out runs/label-noise
    python jobs/label_noise.py --out runs/small --noise 0 1 --seeds 1 --steps 64

For every seed and every share of redrawn labels: train under DeepSpeed (jobs/train_digits.py), measure every checkpoint
on the training images, with the labels that they are trained on, and on held-out images with their true labels, and
pair the two. Then the table, seeds.parquet, its means over the seeds, label-noise.csv, and label-noise-*.png.

What is complete already is not done again: a run that was stopped goes on, and more seeds or shares are added to it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import gradscale as gs
from gradscale.measures.settings import parse_measures
from gradscale.run.cluster import Resources, ray_session
from gradscale.tasks.digits import Digits

JOBS = Path(__file__).resolve().parent
WIDTH, DEPTH = 32, 2  # of the ViT: 18,218 parameters
MEASURES = {
    "train": "coherence:min_norm=1,dispersion,stiffness:by_class,geometric_complexity:num_probes=4,gaussian_width,"
    "tangent_kernel:num_probes=4:alignment",
    "validation": "coherence:min_norm=1,dispersion,stiffness:by_class,geometric_complexity:num_probes=4,gaussian_width",
}
SHARD_SIZE, MICROBATCH = 100, 50
KEYS = ["noise", "step", "examples", "quantity"]


class Panel(NamedTuple):
    title: str
    examples: str  # train, validation, or between the two
    quantity: str
    scale: str = "linear"


FIGURES: dict[str, tuple[Panel, ...]] = {
    "learning": (
        Panel("loss, training (nats)", "train", "loss", "log"),
        Panel("accuracy, training, on the given labels", "train", "accuracy/given"),
        Panel("accuracy on redrawn labels, as redrawn", "train", "accuracy/redrawn_as_given"),
        Panel("loss, validation (nats)", "validation", "loss", "log"),
        Panel("accuracy, validation", "validation", "accuracy/given"),
        Panel("accuracy on redrawn labels, as they were", "train", "accuracy/redrawn_as_true"),
    ),
    "alignment": (
        Panel("m-coherence, training (examples)", "train", "coherence/m_coherence", "log"),
        Panel("coherence, unbiased, training", "train", "coherence/alpha_unbiased"),
        Panel("coherence, unbiased, validation", "validation", "coherence/alpha_unbiased"),
        Panel("cos within classes, training-training", "train", "stiffness/cos_within"),
        Panel("cos within classes, training-validation", "between", "stiffness/cos_within"),
        Panel("cos between classes, training-validation", "between", "stiffness/cos_between"),
    ),
    "size": (
        Panel("tr Σ, training", "train", "dispersion/trace_covariance", "log"),
        Panel("tr Σ, validation", "validation", "dispersion/trace_covariance", "log"),
        Panel("Gaussian width, training", "train", "gaussian_width/width", "log"),
        Panel("geometric complexity, training", "train", "geometric_complexity/gc", "log"),
        Panel("tr K / n, training", "train", "tangent_kernel/trace", "log"),
        Panel("alignment of K with the given labels", "train", "tangent_kernel/alignment"),
    ),
}


class Training(NamedTuple):
    noise: float
    seed: int
    steps: int
    size: int
    folder: Path

    def task(self, split: str) -> Digits:
        size = self.size if split == "train" else None
        return Digits("true-labels", self.seed, WIDTH, DEPTH, split, size, self.noise, noise_seed=self.seed)


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    check_settings(given.out / "settings.json", {"steps": given.steps, "size": given.size, "measures": MEASURES})
    trainings = [
        Training(noise, seed, given.steps, given.size, given.out / f"noise-{noise:g}-seed-{seed}")
        for seed in range(given.seeds)
        for noise in given.noise
    ]
    for training in trainings:
        if not (training.folder / "table.parquet").exists():
            print(f"label noise {training.noise:g}, seed {training.seed}", flush=True)
            train(training)
            table_of(training, measure(training, given.workers)).to_parquet(training.folder / "table.parquet")
    table = pd.concat([pd.read_parquet(training.folder / "table.parquet") for training in trainings], ignore_index=True)
    table.to_parquet(given.out / "seeds.parquet")
    means = means_over_seeds(table)
    means.to_csv(given.out / "label-noise.csv", index=False, float_format="%.5g")
    for name, panels in FIGURES.items():
        draw(means, panels).savefig(given.out / f"label-noise-{name}.png", dpi=85)
    print(f"{given.out}: {len(means)} means over {given.seeds} seeds in label-noise.csv, and {len(FIGURES)} figures")
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of everything; one that exists goes on")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.2, 0.4, 1.0], help="shares of redrawn labels")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of every share")
    parser.add_argument("--steps", type=int, default=1024, help="of the optimizer")
    parser.add_argument("--size", type=int, default=400, help="training images")
    parser.add_argument("--workers", type=int, default=1, help="Ray actors that measure")
    return parser.parse_args(arguments)


def check_settings(path: Path, settings: dict[str, object]) -> None:
    """Write the settings to `path`, or check that they are those of what is there already.

    Raises: SystemExit with the differences.
    """
    if path.exists():
        old = json.loads(path.read_text())
        changed = [f"{name}={value} where it has {old[name]}" for name, value in settings.items() if value != old[name]]
        if changed:
            raise SystemExit(f"settings must be those of {path}, got {'; '.join(changed)}; take another --out")
    path.write_text(json.dumps(settings, indent=2))


def train(training: Training) -> None:
    """Raises: SystemExit with the log if the training fails."""
    out, steps = training.folder / "checkpoints", str(training.steps)
    latest = out / "latest"  # DeepSpeed writes it once a checkpoint is complete
    if latest.is_file() and latest.read_text().strip() == f"global_step{steps}":
        return
    settings = {"out": out, "steps": steps, "seed": training.seed, "size": training.size, "width": WIDTH}
    settings |= {"depth": DEPTH, "label-noise": training.noise, "config": JOBS / "ds_label_noise.json"}
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    job = [sys.executable, str(JOBS / "train_digits.py"), *options]
    ended = subprocess.run(job, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"the training must end with 0, got {ended.returncode}:\n{ended.stdout}\n{ended.stderr}")


def measure(training: Training, workers: int) -> dict[str, gs.Run]:
    """The runs of both splits."""
    measured = partial(gs.measure, workers=workers, microbatch=MICROBATCH, shard_size=SHARD_SIZE)
    checkpoints = [str(training.folder / "checkpoints")]
    with ray_session(None, workers, Resources(1, 0)):
        return {
            split: measured(training.task(split), str(training.folder / split), parse_measures(measures), checkpoints)
            for split, measures in MEASURES.items()
        }


def table_of(training: Training, runs: dict[str, gs.Run]) -> pd.DataFrame:
    """A row for every step, set of examples and quantity: value, stderr over examples or probes, and n."""
    found = []
    for split, run in runs.items():
        estimates = run.estimates()
        kept = estimates[estimates["scope"] == "all"]
        quantities = kept["measure"] + "/" + kept["name"]
        found.append(kept[["step", "value", "stderr", "n"]].assign(examples=split, quantity=quantities))
        found.append(pd.DataFrame(scores(training.task(split), run)).assign(examples=split))
    both = ((step, gs.stiffness_between(runs["train"], runs["validation"], step).between) for step in run.steps)
    pairs = [
        {"step": step, "quantity": f"stiffness/{name}", "value": e.value, "stderr": e.stderr, "n": e.n}
        for step, estimates in both
        for (name, scope), e in estimates.items()
        if scope == "all"
    ]
    found.append(pd.DataFrame(pairs).assign(examples="between"))
    table = pd.concat([part.astype({"stderr": float}) for part in found], ignore_index=True)
    return table.assign(noise=training.noise, seed=training.seed)


@torch.no_grad()
def scores(task: Digits, run: gs.Run) -> Iterator[dict[str, object]]:
    """The loss, and the accuracy on the given and the true labels; apart on the images whose label was redrawn."""
    batch, true, redrawn = task.examples().tensors, task.true_labels(), task.redrawn()
    for step in run.steps:
        model = task.model(run.plan["checkpoints"][str(step)]["path"])
        losses, chosen = task.losses(model, batch), model(batch["image"]).argmax(dim=1)
        values = {"loss": losses, "accuracy/given": chosen == batch["label"], "accuracy/true": chosen == true}
        values |= {"accuracy/redrawn_as_given": (chosen == batch["label"])[redrawn]}
        values |= {"accuracy/redrawn_as_true": (chosen == true)[redrawn]}
        for quantity, each in ((quantity, each.double()) for quantity, each in values.items() if len(each)):
            measured = {"value": float(each.mean()), "stderr": float(each.std()) / len(each) ** 0.5, "n": len(each)}
            yield {"step": step, "quantity": quantity, **measured}


def means_over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """The mean over seeds and its standard error, which is NaN of one seed; `within` is a seed's own error, in mean."""
    grouped = table.groupby(KEYS)
    means: pd.DataFrame = grouped["value"].agg(value="mean", stderr="sem", seeds="count").reset_index()
    return means.assign(within=grouped["stderr"].mean().to_numpy())


def draw(means: pd.DataFrame, panels: Sequence[Panel]) -> Figure:
    figure = Figure(figsize=(11, 6), layout="constrained")
    noises = sorted(means["noise"].unique())
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(noises)))
    for axes, panel in zip(figure.subplots(2, 3).flat, panels, strict=True):
        here = means[(means["examples"] == panel.examples) & (means["quantity"] == panel.quantity)]
        for noise, colour in zip(noises, colours, strict=True):
            curve = here[here["noise"] == noise].sort_values("step")
            points = curve["step"], curve["value"], curve["stderr"].fillna(0)
            axes.errorbar(*points, color=colour, label=f"{noise:.0%}", marker="o", ms=3, lw=1.2, capsize=2)
        dress(axes, panel)
    figure.legend(*axes.get_legend_handles_labels(), title="labels redrawn", loc="outside right upper", frameon=False)
    return figure


def dress(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=9)
    axes.set_xscale("symlog", linthresh=4)
    ticks = [0, *(4**k for k in range(1, 6))]
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks], fontsize=8)
    axes.set_yscale(panel.scale)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
