"""What the ``generate`` command tells its ranks, passed as a file: several ranks are processes of their own."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shardwise.cli.generate.prompts import Prompt


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        folder: of the model.
        device_map, max_memory, dtype: as :func:`shardwise.load` takes them; keys are strings.
        sampling: further arguments of ``model.generate``.
        max_new_tokens: at most so many for each prompt.
        seed: of the draws.
        batch: prompts at a time.
        length: tokens of one text for which room is left; ``None``: those of the longest prompt, and the new ones.
        prompts: what is to be continued.
        out: prefix of the files that answers are written to, one per rank; ``None``: the one answer is shown.
        scratch: folder for what the ranks tell the command: see :mod:`shardwise.cli.generate.told`.
        quantization: as :func:`shardwise.load` takes it.
        launcher: process that waits for the ranks; 0: this one.
    """

    folder: str
    device_map: str | dict[str, Any]
    max_memory: dict[int | str, int | str] | None
    dtype: str | None
    sampling: dict[str, Any]
    max_new_tokens: int
    seed: int
    batch: int
    length: int | None
    prompts: list[Prompt] = field(repr=False)
    out: str | None
    scratch: str
    quantization: str | None = None
    launcher: int = 0

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Job:
        found = json.loads(path.read_text())
        return cls(**{**found, "prompts": [Prompt(**p) for p in found["prompts"]]})
