"""What the interventions do for a small vision transformer whose labels are partly noise, under DeepSpeed ZeRO-1.

    python benchmarks/bench_interventions.py --noise 0.2,0.4 --seeds 0,1,2

Every training has the same images, number of epochs, batch, momentum and, with the same loss, learning rate; no method
is tuned. A seed draws the weights, the order of the images, and which labels become what. Settings, fixed before the
first training, are the methods' usual ones (SAM, ASAM, shares, groups, draws), and guesses where there are none (sigma,
weight, delta, and when clipping starts). Accuracy is on clean labels of images apart, after the last step; there is no
early stopping. Differences are of the same seed, and so of the same weights, order and noise, to plain SGD on the same
loss.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "jobs"))

import deepspeed
import torch
from deepspeed.accelerator import set_accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from train_digits import GlooOnly, stand_alone

import gradscale as gs
from gradscale.errors import GradscaleError
from gradscale.interventions.target import Function
from gradscale.tasks.digits import CLASSES, Digits

SIZE, BATCH, EPOCHS = 192, 48, 45  # of training images
STEPS = EPOCHS * SIZE // BATCH
MOMENTUM = 0.9
LEARNING_RATES = {"plain SGD": 0.1, "plain SGD, squared loss": 0.02}  # with 0.1 the squared loss does not train


@dataclass(frozen=True)
class Plain:
    """DeepSpeed's own step."""

    def step(self, engine: Any, loss_fn: Function, state: gs.StepState) -> Tensor:
        loss: Tensor = loss_fn(engine)
        engine.backward(loss)
        engine.step()
        return loss.detach()


def mean_loss(images: Tensor, labels: Tensor) -> Function:
    return lambda model: F.cross_entropy(model(images), labels)


def each_loss(images: Tensor, labels: Tensor) -> Function:
    return lambda model: F.cross_entropy(model(images), labels, reduction="none")


def outputs(images: Tensor, labels: Tensor) -> Function:
    return lambda model: (model(images), F.one_hot(labels, CLASSES).float())


class Contender(NamedTuple):
    method: Any
    setting: str
    loss_of: Callable[[Tensor, Tensor], Function]
    claim: str
    against: str = "plain SGD"


NO_NUMBER = "better; no number at hand"
PLAIN = tuple(LEARNING_RATES)
CONTENDERS: Mapping[str, Contender] = {
    "plain SGD": Contender(Plain(), "-", mean_loss, "-"),
    "dynamic clipping": Contender(
        gs.DynamicClipping(start=round(0.3 * STEPS)),
        "alpha 1, from 30% of the steps on",
        mean_loss,
        f"{NO_NUMBER} (Wang and Mao 2022)",
    ),
    "Gaussian perturbation": Contender(
        gs.GaussianPerturbation(sigma=0.03),
        "sigma 0.03, rho 0.5, 3 draws",
        mean_loss,
        f"{NO_NUMBER}; 3 draws suffice (Wang and Mao 2022)",
    ),
    "SAM": Contender(
        gs.SAM(rho=0.1),
        "rho 0.1",
        mean_loss,
        "under label noise as good as what is made for it (abstract of Foret et al. 2021)",
    ),
    "ASAM": Contender(gs.SAM(rho=1.0, adaptive=True), "rho 1", mean_loss, f"{NO_NUMBER} (Kwon et al. 2021)"),
    "winsorized": Contender(
        gs.Winsorized(share=0.1),
        "percentiles 10 and 90",
        each_loss,
        "memorizes less; no number at hand (Chatterjee and Zielinski 2022)",
    ),
    "median of means": Contender(
        gs.MedianOfMeans(groups=3),
        "3 groups",
        each_loss,
        "memorizes greatly less; no number at hand (abstract of Zielinski et al. 2020)",
    ),
    "Hessian trace": Contender(
        gs.HessianTracePenalty(weight=0.001),
        "weight 0.001, 1 probe",
        mean_loss,
        "better than mixup and label smoothing; no number at hand (abstract of Liu et al. 2022)",
    ),
    "plain SGD, squared loss": Contender(gs.LabelNoise(delta=0.0), "-", outputs, "-", "plain SGD, squared loss"),
    "label-noise SGD": Contender(
        gs.LabelNoise(delta=0.5),
        "delta 0.5",
        outputs,
        "flatter minima, nothing of accuracy (Li et al. 2022)",
        "plain SGD, squared loss",
    ),
}


class Images(NamedTuple):
    train: tuple[Tensor, Tensor]  # with noisy labels
    wrong: Tensor  # [n] bool: of those, the ones whose label is not the true one
    test: tuple[Tensor, Tensor]  # with clean labels


@cache
def images_of(noise: float, seed: int) -> Images:
    task = Digits(size=SIZE, label_noise=noise, noise_seed=seed)
    train, test = task.examples().tensors, task.held_out().tensors
    wrong = train["label"] != task.true_labels()
    return Images((train["image"], train["label"]), wrong, (test["image"], test["label"]))


def started(learning_rate: float, seed: int) -> Any:
    model = Digits(seed=seed, width=32, depth=2).model(None).train()
    config = {
        "train_batch_size": BATCH,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": 1000000,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=MOMENTUM)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def batches(train: tuple[Tensor, Tensor], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for ids in torch.randperm(SIZE, generator=shuffle).split(BATCH):
            yield train[0][ids], train[1][ids]


class Outcome(NamedTuple):
    test: float  # accuracies in percent
    fitted: float  # of the wrong training labels
    seconds: float  # of CPU


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * float((model(images).argmax(dim=1) == labels).double().mean())


def trained(name: str, noise: float, seed: int) -> Outcome:
    """One that diverges is judged by the weights that it got to."""
    contender = CONTENDERS[name]
    data, state = images_of(noise, seed), gs.StepState()
    engine = started(LEARNING_RATES[contender.against], seed)
    begin = time.process_time()
    try:
        for images, labels in batches(data.train, seed):
            contender.method.step(engine, contender.loss_of(images, labels), state)
    except GradscaleError as problem:
        print(problem, file=sys.stderr)
    seconds = time.process_time() - begin
    model = engine.module.eval()
    wrong = data.train[0][data.wrong], data.train[1][data.wrong]
    found = Outcome(*(accuracy(model, *each) for each in (data.test, wrong)), seconds)
    print(f"{noise} seed {seed} {name}: {found}", file=sys.stderr, flush=True)
    return found


def with_error(values: Sequence[float]) -> str:
    """The mean and its standard error."""
    error = f" ± {stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{error}"


def table(noise: float, seeds: Sequence[int], names: Sequence[str]) -> str:
    by_seed = [{name: trained(name, noise, seed) for name in names} for seed in seeds]
    runs = {name: [found[name] for found in by_seed] for name in names}
    head = (
        "method",
        "setting",
        "test accuracy",
        "to plain SGD",
        "wrong labels fitted",
        "CPU time",
        "the source claims",
    )
    rows: list[Sequence[str]] = [head, ("---",) * len(head)]
    for name, found in runs.items():
        contender, plain = CONTENDERS[name], runs[CONTENDERS[name].against]
        apart = [own.test - other.test for own, other in zip(found, plain, strict=True)]
        cost = sum(own.seconds for own in found) / sum(other.seconds for other in plain)
        rows.append(
            (
                name,
                contender.setting,
                with_error([own.test for own in found]),
                "-" if name in PLAIN else with_error(apart),
                with_error([own.fitted for own in found]),
                f"{cost:.1f}",
                contender.claim,
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", default="0.2,0.4", help="shares of the training labels that are redrawn")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="parts of the names, with commas; plain SGD is always there")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    stand_alone()
    set_accelerator(GlooOnly())
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo", verbose=False)
    parts = [part.strip() for part in options.only.split(",")]
    names = [name for name in CONTENDERS if name in PLAIN or any(part in name for part in parts)]
    for noise in (float(each) for each in options.noise.split(",")):
        rows = table(noise, [int(seed) for seed in options.seeds.split(",")], names)
        print(f"\n{noise:.0%} of the labels redrawn, {SIZE} images, {STEPS} steps\n\n{rows}", flush=True)


if __name__ == "__main__":
    main()
