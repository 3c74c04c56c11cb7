"""What ``doctor`` tells its ranks, and what they write down, as files: ranks are processes of their own."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# How a phase file begins when the phase did not end well: it hung, it failed, it failed because another rank did.
HANG, FAILURE, SECOND = "hang: ", "failed: ", "failed with another: "
DONE = "done"


@dataclass(frozen=True)
class Job:
    """One self test.

    Attributes:
        folder: where ``facts-R.json`` and ``phase-R`` of each rank R go.
        strategies: string forms, tested in this order.
        precisions: ``fp32``, ``bf16``.
        steps: training steps per strategy.
        link_bytes: size of a message for bandwidth.
        link_rounds: messages per measurement.
        phase_s: a phase that takes longer than this is a hang.
        lines: rank 0 prints each phase.
    """

    folder: str
    strategies: list[str]
    precisions: list[str]
    steps: int
    link_bytes: int
    link_rounds: int
    phase_s: float
    lines: bool

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Job:
        return cls(**json.loads(path.read_text()))

    def facts_of(self, rank: int) -> Path:
        return Path(self.folder) / f"facts-{rank}.json"

    def phase_of(self, rank: int) -> Path:
        return Path(self.folder) / f"phase-{rank}"


def write_whole(path: Path, text: str) -> None:
    """A reader sees the old text or the new one, never a part."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def read_facts(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
