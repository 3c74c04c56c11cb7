"""A record, read back: see :mod:`shardwise.observe.record` for what is in the files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardwise.errors import RecordError
from shardwise.observe.record_file import FORMAT

_FIX = "name the folder that 'shardwise launch --record' or profile_dir= was given"


_NEEDED = {
    "run": ("run", "rank", "world", "time", "states", "device"),
    "step": ("step", "steps", "start", "end", "seconds", "waits", "sent", "peak", "loss", "flops", "counting", "clock"),
    "timeline": ("step", "names", "phases", "memory", "transfers", "waits"),
}


@dataclass
class RankRecord:
    """What one rank wrote: lines as they are in its file, by their kind.

    Attributes:
        path: the file.
        head: the line ``run``.
        end: the line ``end``; ``None``: the run was killed, or goes on.
        expected: the line ``expected``, if there is one.
        cut: the file ends in the middle of a line, which is left out.
    """

    path: Path
    head: dict[str, Any]
    models: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    timelines: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None
    cut: bool = False
    expected: dict[str, Any] | None = None

    @property
    def rank(self) -> int:
        return int(self.head["rank"])

    @property
    def states(self) -> list[str]:
        return list(self.head["states"])

    def measured(self) -> list[dict[str, Any]]:
        """Steps that took what they take: without the first, and without those whose operations were counted.

        All there are, where nothing is left.
        """
        plain = [s for s in self.steps if s["step"] - s["steps"] > 0 and not s["counting"]]
        return plain or self.steps


@dataclass
class RunRecord:
    """One run: its ranks, in their order."""

    folder: Path
    run: str
    world: int
    ranks: list[RankRecord]

    @property
    def missing(self) -> list[int]:
        """Ranks without a file here."""
        there = {one.rank for one in self.ranks}
        return [rank for rank in range(self.world) if rank not in there]


def read(folder: str | Path, run: str | None = None) -> RunRecord:
    """The run that was recorded in a folder.

    Args:
        folder: with the files of all ranks, or of some.
        run: which one, where there are several; the beginning of its name will do.

    Raises:
        RecordError: there is no such folder, no record in it, several, or a file that is none or is damaged. A last
            line that is cut, as a kill leaves it, is no damage.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RecordError("there is no such folder", where=str(folder), fix=_FIX)
    try:
        paths = sorted(folder.glob("*-rank*.jsonl"))
    except OSError as error:
        raise RecordError(f"it cannot be read: {error.strerror or error}", where=str(folder)) from error
    names = sorted({path.name.rpartition("-rank")[0] for path in paths})
    wanted = [name for name in names if run is None or name.startswith(run)]
    if not wanted:
        what = (
            "there is no record in it" if not names else f"no run in it begins with '{run}'; there are {_some(names)}"
        )
        raise RecordError(what, where=str(folder), fix=_FIX if not names else "--run one of them")
    if len(wanted) > 1:
        raise RecordError(
            f"it holds {len(wanted)} runs: {_some(wanted)}", where=str(folder), fix=f"--run {wanted[-1]} for the last"
        )
    ranks = [_read_rank(path) for path in paths if path.name.rpartition("-rank")[0] == wanted[0]]
    ranks.sort(key=lambda one: one.rank)
    return RunRecord(folder, wanted[0], int(ranks[0].head["world"]), ranks)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _read_rank(path: Path) -> RankRecord:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordError(f"it cannot be read: {error.strerror or error}", where=str(path)) from error
    *texts, rest = data.split(b"\n")
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        known = isinstance(line, dict) and "kind" in line
        if known and number == 1 and line.get("format", FORMAT) != FORMAT:
            raise RecordError(
                f"it is of format {line['format']}, and this version reads {FORMAT}",
                where=str(path),
                fix="read it with the version that wrote it",
            )
        if not known or any(key not in line for key in _NEEDED.get(line["kind"], ())):
            raise RecordError(
                f"line {number} is damaged", where=str(path), fix="leave this rank out: move its file away"
            )
        lines.append(line)
    if not lines or lines[0]["kind"] != "run":
        raise RecordError("it is cut before the end of its first line", where=str(path), fix="move it away")
    kinds: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        kinds.setdefault(line["kind"], []).append(line)
    return RankRecord(
        path,
        lines[0],
        kinds.get("model", []),
        kinds.get("step", []),
        kinds.get("timeline", []),
        kinds.get("end", [None])[-1],
        bool(rest),
        kinds.get("expected", [None])[-1],
    )
