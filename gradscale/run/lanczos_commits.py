"""Where a gang's Lanczos run stands, in files, so that a gang of any size goes on from it.

    lanczos/step-00000000/state.json                       written last, by rank 0: the scalars, and which files count
    lanczos/step-00000000/rows-00-00012-00015-0-<hash>.safetensors  vectors 12 to 14 since restart 0, entries from 0 on

A file is named by its content, so that a process that outlives its gang cannot change what another has committed. Every
rank writes the entries of the vectors that have come since the last commit; after a restart, which changes all of
them, those of all. Once the eigenvalues are a part of the run the folder is deleted.

Shapes: p entries here, n vectors.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from gradscale.curvature.krylov import LanczosState
from gradscale.errors import GradscaleError
from gradscale.store.files import Files

_SCALARS = ("block", "pending", "step", "products", "fresh", "restarts", "scale", "noise")


@dataclass
class LanczosCommits:
    """One rank's side. `commit` is called by all ranks after every step, and decides alike for all of them.

    `seconds` is the least time between commits, by rank 0's clock.
    """

    files: Files
    step: int
    here: range
    seconds: float
    _last: float = field(default_factory=time.monotonic)
    _restarts: int = 0
    _written: int = 0  # vectors
    _pieces: list[dict[str, Any]] = field(default_factory=list)

    @property
    def folder(self) -> str:
        return f"lanczos/step-{self.step:08d}"

    def commit(self, state: LanczosState) -> None:
        """Raises: OSError on a rank that cannot write; GradscaleError on rank 0 if it does not see all files."""
        if not self._due(state.basis.device):
            return
        stale: list[dict[str, Any]] = []
        if state.restarts != self._restarts:
            stale, self._pieces, self._written, self._restarts = self._pieces, [], 0, state.restarts
        n = len(state.basis)
        if n > self._written:
            pieces = _everyones(self._write(state, self._written, n))
            if not self._pieces:
                self._check_shared(pieces)
            self._pieces += pieces
            self._written = n
        if dist.get_rank() == 0:
            self.files.write(f"{self.folder}/state.json", json.dumps(_record(state, self._pieces)).encode())
            for piece in stale:
                self.files.delete(f"{self.folder}/{piece['file']}")
        dist.barrier()

    def read(self, device: torch.device) -> LanczosState | None:
        """The state as it was committed, with the entries here; None if there is none.

        Raises: GradscaleError if a file is not what was written.
        """
        found = self._committed(device)
        if found is None:
            return None
        n = found["vectors"]
        basis = torch.empty(n, len(self.here), dtype=getattr(torch, found["dtype"]), device=device)
        for piece in found["pieces"]:
            first, last = max(piece["start"], self.here.start), min(piece["stop"], self.here.stop)
            if first < last:
                rows = self._rows(piece)[:, first - piece["start"] : last - piece["start"]]
                basis[piece["first"] : piece["last"], first - self.here.start : last - self.here.start] = rows
        self._pieces, self._written, self._restarts = found["pieces"], n, found["restarts"]
        return LanczosState(
            basis,
            torch.tensor(found["projected"], dtype=torch.float64).view(n, n),
            torch.tensor(found["components"], dtype=torch.int64),
            *(found[name] for name in _SCALARS),
        )

    def _committed(self, device: torch.device) -> dict[str, Any] | None:
        """What rank 0 finds: of ranks that looked for themselves some might go on and others begin."""
        name, found = f"{self.folder}/state.json", [None]
        if dist.get_rank() == 0 and self.files.exists(name):
            found = [json.loads(self.files.read(name).to_pybytes())]
        dist.broadcast_object_list(found, 0, device=device)
        return found[0]

    def _check_shared(self, pieces: list[dict[str, Any]]) -> None:
        if dist.get_rank() == 0:
            for piece in pieces:
                if not self.files.exists(f"{self.folder}/{piece['file']}"):
                    raise GradscaleError(
                        f"out must be a folder that all workers see, got {self.files.root}, which on the node of rank "
                        f"0 has no {piece['file']} after another rank had written it; use a shared folder or a URI "
                        "such as s3://"
                    )

    def _due(self, device: torch.device) -> bool:
        due = torch.tensor(float(time.monotonic() - self._last >= self.seconds), device=device)
        dist.broadcast(due, 0)
        if due:
            self._last = time.monotonic()
        return bool(due)

    def _write(self, state: LanczosState, first: int, last: int) -> dict[str, Any]:
        content = safetensors.torch.save({"rows": state.basis[first:last].cpu().contiguous()})
        digest = xxhash.xxh3_64_hexdigest(content)
        name = f"rows-{state.restarts:02d}-{first:05d}-{last:05d}-{self.here.start}-{digest}.safetensors"
        self.files.write(f"{self.folder}/{name}", content)
        place = {"first": first, "last": last, "start": self.here.start, "stop": self.here.stop}
        return {"file": name, **place, "xxh3_64": digest}

    def _rows(self, piece: dict[str, Any]) -> Tensor:
        name = f"{self.folder}/{piece['file']}"
        there = self.files.exists(name)
        content = self.files.read(name).to_pybytes() if there else b""
        if xxhash.xxh3_64_hexdigest(content) != piece["xxh3_64"]:
            got = "other content" if there else "no such file"
            raise GradscaleError(
                f"{name} must be as it was written, got {got}; delete the folder {self.folder} in {self.files.root} "
                "and run the same command again"
            )
        return safetensors.torch.load(content)["rows"]


def _record(state: LanczosState, pieces: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        **{name: getattr(state, name) for name in _SCALARS},
        "vectors": len(state.basis),
        "dtype": str(state.basis.dtype).removeprefix("torch."),
        "projected": state.projected.flatten().tolist(),
        "components": state.components.tolist(),
        "pieces": pieces,
    }


def _everyones(piece: dict[str, Any]) -> list[dict[str, Any]]:
    """The pieces of all ranks: each has written its own by the time that any has this list."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, piece)
    return found
