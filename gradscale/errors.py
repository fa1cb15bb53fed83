"""The errors that gradscale raises on purpose.

A `GradscaleError` is something that the user can put right: its message names the thing, what was
expected, what was found and the remedy. It is deterministic, so the work that raised it is not tried
again. Every other exception inside a shard counts as a failed attempt and is retried.
"""

from __future__ import annotations


class GradscaleError(ValueError):
    """Bad input or a setting that cannot be measured; the message says what to do."""


class OutOfMemory(GradscaleError):
    """A worker ran out of memory; the message says which microbatch size to try."""


class ShardsFailed(RuntimeError):
    """Some shards raised on every attempt; the others are committed.

    The message names each shard and its last error. Running the same command again tries them anew.
    """
