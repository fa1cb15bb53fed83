"""Ready tasks, listed by `gradscale tasks`; each is imported only when it is used."""

from __future__ import annotations

from typing import NamedTuple


class ReadyTask(NamedTuple):
    path: str  # module:attribute
    summary: str  # one line: model, data, what --data and --model take


READY: dict[str, ReadyTask] = {
    "digits": ReadyTask(
        "gradscale.tasks.digits:Digits",
        "a small ViT on scikit-learn's handwritten digits; --data true-labels (default) or permuted-labels; "
        "options label_noise, noise_seed, split, size, width, depth",
    ),
    "classification": ReadyTask(
        "gradscale.tasks.classification:Classification",
        "a transformers sequence or image classifier; --model DIR or config.json, --data Parquet or JSONL",
    ),
    "causal-lm": ReadyTask(
        "gradscale.tasks.causal_lm:CausalLM",
        "a transformers causal language model; --model DIR or config.json, --data Parquet or JSONL",
    ),
}
