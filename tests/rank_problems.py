"""How tests start ranks of DeepSpeed on this machine, and what such a rank does from its beginning to its end."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def environments(ranks: int = 2) -> list[dict[str, str]]:
    """One for each rank, with a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "GROUP_"))} | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "TORCH_EXTENSIONS_DIR": str(ROOT / ".cache" / "torch_extensions"),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": f"{ranks}",
    }
    return [common | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} for rank in range(ranks)]


def serve(run: Callable[[str, Path], dict[str, Any]]) -> None:
    """Leave `run(name, folder)` as FOLDER/NAME-RANK.pt for every name of the command line, FOLDER NAME..., and exit."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from deepspeed.accelerator import set_accelerator
    from train_digits import GlooOnly

    folder, names = Path(sys.argv[1]), sys.argv[2:]
    set_accelerator(GlooOnly())
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60), verbose=False)
    for name in names:
        torch.save(run(name, folder), folder / f"{name}-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
