"""What measuring costs beside training: `run_shard` against a plain forward and backward pass, in one process.

    python benchmarks/bench_shard.py [--threads 1] [--repetitions 7]

The two are interleaved and the ratio is that of the medians. The models are the digits transformer and a GPT-2 of
4 layers, width 256, T=128, tied head, random weights, float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradscale.measures.settings import parse_measures
from gradscale.run.fold import statistics_of
from gradscale.run.shard import Subject, bound, load_batch, prepare, run_shard
from gradscale.sketches import parse_sketch
from gradscale.task import Batch, TensorExamples, load_task

READINGS = {
    "squared norms": ("", None),
    "norms + sums (coherence, dispersion)": ("coherence,dispersion", None),
    "norms + 64 Gaussian probes (width)": ("gaussian_width", None),
    "all measures": ("coherence,dispersion,gaussian_width", None),
    "all measures + dense sketch K=64": ("coherence,dispersion,gaussian_width", "gaussian:64"),
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


def plain(subject: Subject, ids: range) -> None:
    """One ordinary training pass over the examples."""
    subject.task.losses(subject.model, load_batch(subject, ids)).mean().backward()
    subject.model.zero_grad(set_to_none=True)


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def compare(subject: Subject, batch: int, measures: str, sketch: str | None, repetitions: int) -> tuple[float, float]:
    """Median seconds of a plain pass and of a measured one over `batch` examples."""
    ids = range(batch)
    needed = statistics_of(parse_measures(measures))
    mapped = bound(parse_sketch(sketch, seed=0) if sketch else None, subject)

    def measured() -> object:
        return run_shard(subject, ids, 0, batch, needed, mapped)

    plain(subject, ids), measured()
    pairs = [(seconds(lambda: plain(subject, ids)), seconds(measured)) for _ in range(repetitions)]
    return statistics.median(p for p, _ in pairs), statistics.median(m for _, m in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=7)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    print(f"torch {torch.__version__}, {settings.threads} thread(s), median of {settings.repetitions} interleaved")
    print(f"{'model':22} {'reading':40} {'plain ms':>9} {'measured ms':>12} {'ratio':>6}")
    for name, task, batch in (("digits ViT, B=32", load_task("digits"), 32), ("GPT-2 4x256, B=16", SmallGPT2(), 16)):
        subject = prepare(task, None, None)
        for reading, (measures, sketch) in READINGS.items():
            before, after = compare(subject, batch, measures, sketch, settings.repetitions)
            print(f"{name:22} {reading:40} {before * 1e3:9.1f} {after * 1e3:12.1f} {after / before:6.2f}", flush=True)


if __name__ == "__main__":
    main()
