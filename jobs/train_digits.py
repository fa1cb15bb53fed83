"""Train the digits ViT under DeepSpeed and keep checkpoints at log-spaced steps, the initial weights included.

    python jobs/train_digits.py --out runs/checkpoints-real
    python jobs/train_digits.py --out runs/checkpoints-random --labels permuted
    python jobs/train_digits.py --out runs/checkpoints-noise --label-noise 0.4 --size 600
    deepspeed --num_accelerators 2 jobs/train_digits.py --out runs/checkpoints-real
    torchrun --nproc_per_node 2 jobs/train_digits.py --out runs/checkpoints-real

Each checkpoint is a DeepSpeed folder OUT/global_step<N>; `gradscale measure --task digits --checkpoint OUT`
reads them, given the same --width and --depth. The settings of the optimizer, the batch size over all ranks and ZeRO
are in ds_digits.json, or in another file that --config names.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from gradscale.task import TensorExamples
from gradscale.tasks.digits import Digits

CONFIG = Path(__file__).with_name("ds_digits.json")


class GlooOnly(CPU_Accelerator):  # type: ignore[misc]
    """The CPU accelerator with gloo's collectives alone.

    The usual one also has a shared-memory op, which a C++ compiler builds for most of a minute at the first use.
    """

    def create_op_builder(self, op_name: str) -> object:
        return None if op_name == "ShareMemCommBuilder" else super().create_op_builder(op_name)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the digits ViT under DeepSpeed and keep its checkpoints.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--labels", choices=["true", "permuted"], default="true")
    parser.add_argument("--label-noise", type=float, default=0.0, help="share of the training labels that are redrawn")
    parser.add_argument("--size", type=int, help="train on so many images only")
    parser.add_argument("--width", type=int, default=64, help="of the ViT")
    parser.add_argument("--depth", type=int, default=3, help="blocks of the ViT")
    parser.add_argument("--config", type=Path, default=CONFIG, help="DeepSpeed's settings")
    parser.add_argument("--steps", type=int, default=384, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and redrawn labels")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args()


def stand_alone() -> None:
    """Make this process rank 0 of 1, unless a launcher has already said otherwise."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def checkpoint_steps(last: int) -> set[int]:
    """0, then the powers of two from 4 on, and the last step: 0, 4, 8, ..., 256, 384."""
    return {0, last} | {2**k for k in range(2, 64) if 2**k < last}


def batches(examples: TensorExamples, per_rank: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of every batch, for ever; all ranks shuffle alike, so no image comes twice in an epoch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shuffle = torch.Generator().manual_seed(seed)
    images, labels = examples.tensors["image"], examples.tensors["label"]
    while True:
        for ids in torch.randperm(len(examples), generator=shuffle).split(per_rank * world):
            if len(ids) == per_rank * world:
                mine = ids[rank::world]
                yield images[mine], labels[mine]


@torch.no_grad()
def report(model: nn.Module, task: Digits, step: int) -> None:
    train, held_out = task.examples().tensors, task.held_out().tensors
    model.eval()
    loss = task.losses(model, train).mean()
    right = (model(held_out["image"]).argmax(dim=1) == held_out["label"]).float().mean()
    model.train()
    if dist.get_rank() == 0:
        print(f"step {step:5d}  training loss {loss:.3f}  held-out accuracy {right:.1%}", flush=True)


def train(options: argparse.Namespace) -> None:
    task = Digits(
        data=f"{options.labels}-labels",
        seed=options.seed,
        width=options.width,
        depth=options.depth,
        size=options.size,
        label_noise=options.label_noise,
        noise_seed=options.seed,
    )
    model = task.model(None).train()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=str(options.config))
    data = batches(task.examples(), engine.train_micro_batch_size_per_gpu(), options.seed)
    kept = checkpoint_steps(options.steps)
    for step in range(options.steps + 1):
        if step in kept:
            engine.save_checkpoint(str(options.out), tag=f"global_step{step}")
            report(engine.module, task, step)
        if step < options.steps:
            images, labels = next(data)
            engine.backward(F.cross_entropy(engine(images), labels))
            engine.step()


if __name__ == "__main__":
    options = arguments()
    stand_alone()
    set_accelerator(GlooOnly())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    train(options)
    dist.barrier()
    dist.destroy_process_group()
    # Gloo's worker threads can outlive the interpreter and abort it after all is done: leave without its teardown.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
