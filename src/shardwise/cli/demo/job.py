"""What the ``demo`` command tells its ranks, passed as a file: ranks are processes of their own."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """One demo run.

    Attributes:
        size: a name in :data:`shardwise.cli.demo.model.SIZES`.
        strategy: the string form of a strategy.
        steps, seconds: train until the first of these is used up; ``None`` for no limit.
        seed: of the initial values, of each rank's text and of the sample.
        data: folder with ``train.npy`` and ``heldout.npy``.
        out: folder for ``model.safetensors``.
        facts: the file that rank 0 writes what it measured to.
        prompt, sample_bytes: what to continue, and for how long.
    """

    size: str
    strategy: str
    steps: int | None
    seconds: float | None
    seed: int
    data: str
    out: str
    facts: str
    prompt: str = "def "
    sample_bytes: int = 200

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Job:
        return cls(**json.loads(path.read_text()))
