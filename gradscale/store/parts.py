"""What a spectrum run has finished: one small JSON file a part, written by the driver, whole or not at all.

    parts/step-00000100/choice.json              the way of products, its estimated error, the self-test
    parts/step-00000100/trace-00008-00003.json   the products of probes from 8 on over shard 3
    parts/step-00000100/eigenvalues.json, nodes-00000.json, norms.json, deflated.json, stability.json

A part exists once its file does, so that work done twice is counted once. Floats are written so that they are read back
to the bit; NaN as NaN, which Python's json reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradscale.errors import GradscaleError
from gradscale.store.files import Files

FOLDER = "parts"


@dataclass(frozen=True)
class Parts:
    files: Files

    def names(self, step: int) -> set[str]:
        """Of the parts of `step` that are there."""
        found = self.files.list(_folder(step))
        return {name.rpartition("/")[2].removesuffix(".json") for name in found if name.endswith(".json")}

    def any(self) -> bool:
        return bool(self.files.list(FOLDER))

    def write(self, step: int, name: str, content: Mapping[str, Any]) -> None:
        self.files.write(f"{_folder(step)}/{name}.json", (json.dumps(dict(content)) + "\n").encode())

    def read(self, step: int, name: str) -> dict[str, Any]:
        """Raises: GradscaleError if the file is damaged."""
        path = f"{_folder(step)}/{name}.json"
        try:
            found: dict[str, Any] = json.loads(self.files.read(path).to_pybytes())
        except ValueError as error:
            raise GradscaleError(
                f"{path} must be as it was written, got other content ({error}); delete it in {self.files.root} and "
                "run the same command again"
            ) from error
        return found


def _folder(step: int) -> str:
    return f"{FOLDER}/step-{step:08d}"
