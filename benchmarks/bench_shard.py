"""What measuring costs beside training: `run_shard` against a plain forward and backward pass, in one process.

    python benchmarks/bench_shard.py [--threads 1] [--repetitions 7]

A shard of four microbatches; the two are interleaved, and the ratio is that of each measured pass to the plain one
just before it: its median and quartiles. The models are the digits transformer and a GPT-2 of
4 layers, width 256, T=128, tied head, random weights, float32.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from bench_gradients import Timing, machine, timed
from torch import Tensor, nn

from gradscale.grads.subject import load_batch
from gradscale.measures.settings import parse_measures
from gradscale.run.fold import statistics_of
from gradscale.run.shard import Subject, bound, prepare, run_shard
from gradscale.sketches import parse_sketch
from gradscale.task import Batch, TensorExamples, load_task

ALL = "coherence,dispersion,effective_gram,gaussian_width"
READINGS = {
    "squared norms": ("", None),
    "norms + sums (coherence, dispersion)": ("coherence,dispersion", None),
    "norms + 64 Gaussian probes (width)": ("gaussian_width", None),
    "all streaming measures": (ALL, None),
    "all streaming measures + sketch K=4096": (ALL, "default:4096"),
    "stiffness, exact over all pairs": ("stiffness", None),
}


@dataclass(frozen=True)
class SmallGPT2:
    """Random tokens through a GPT-2 of 4 layers: the mean loss of each sequence."""

    positions: int = 128
    vocabulary: int = 1024

    def model(self, checkpoint: str | None) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(n_layer=4, n_embd=256, n_head=4, n_positions=self.positions, vocab_size=self.vocabulary)
        return GPT2LMHeadModel(config).eval()

    def examples(self) -> TensorExamples:
        generator = torch.Generator().manual_seed(0)
        return TensorExamples(ids=torch.randint(self.vocabulary, (64, self.positions), generator=generator))

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch["ids"], use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.mT, batch["ids"][:, 1:], reduction="none").mean(dim=1)


def plain(subject: Subject, ids: range, microbatch: int) -> None:
    """One ordinary training pass over the examples."""
    for start in range(0, len(ids), microbatch):
        subject.task.losses(subject.model, load_batch(subject, ids[start : start + microbatch])).mean().backward()
        subject.model.zero_grad(set_to_none=True)


def compare(subject: Subject, ids: range, microbatch: int, reading: str, repetitions: int) -> Timing:
    """A plain pass over `ids`, in turn with a measured one."""
    measures, sketch = READINGS[reading]
    needed = statistics_of(parse_measures(measures))
    mapped = bound(parse_sketch(sketch, seed=0) if sketch else None, subject)

    def measured() -> object:
        return run_shard(subject, ids, 0, microbatch, needed, mapped)

    plain(subject, ids, microbatch), measured()
    pairs = [(timed(lambda: plain(subject, ids, microbatch)), timed(measured)) for _ in range(repetitions)]
    return Timing([p for p, _ in pairs], [m for _, m in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=7)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    print(machine(settings.threads))
    print(f"{'model':22} {'reading':40} {'CPU ratio':17} {'wall ratio':17} {'plain CPU ms':>12} {'CPU ms':>9}")
    for name, task, batch in (("digits ViT, B=32", load_task("digits"), 32), ("GPT-2 4x256, B=16", SmallGPT2(), 16)):
        subject = prepare(task, None, None)
        for reading in READINGS:
            timing = compare(subject, range(4 * batch), batch, reading, settings.repetitions)
            before, after = timing.median_ms("cpu")
            ratios = f"{timing.ratio('cpu'):17} {timing.ratio('wall'):17}"
            print(f"{name:22} {reading:40} {ratios} {before:12.1f} {after:9.1f}", flush=True)


if __name__ == "__main__":
    main()
