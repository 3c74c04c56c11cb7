"""What was measured of a machine, kept in a file of its own in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from shardwise.errors import PlanError

VERSION = 1
Pairs = list[tuple[float, float]]


@dataclass(frozen=True)
class Calibration:
    """Seconds, of each of ``ranks`` processes that do the same at the same time on one host.

    Attributes:
        ranks, threads: processes, and threads of each.
        products: of matrix products by dtype (``float32``, ...): floating-point operations, seconds.
        memory: of operations that read and write: bytes, seconds.
        call: of the host, per operator of a step beyond its time alone, by phase of the engine; see :func:`weight`.
        turn, begin: of the host, per turn to another unit and per transfer that it begins, by phase.
        fresh: of what computes, per byte that operations write to new memory, beyond their time alone, by phase: memory
            that was given back to the system has to be had from it again.
        excess: of what computes, per second of an operation alone, by phase: others leave less in the caches.
        node, control: of messages: bytes that each rank sends, seconds.
        step: of a message, per rank beyond the second.
        beside: speeds of operations and of a message that is under way meanwhile, over those alone.
        links: of copies and disks, by their way: bytes, seconds.
        exact: of operations that were measured as they are.
        device: what computed: ``cpu``, or an accelerator's type.
        version: of this form.
    """

    ranks: int
    threads: int
    products: dict[str, Pairs]
    memory: Pairs
    call: dict[str, float]
    turn: dict[str, float]
    begin: dict[str, float] = field(default_factory=dict)
    fresh: dict[str, float] = field(default_factory=dict)
    excess: dict[str, float] = field(default_factory=dict)
    node: Pairs = field(default_factory=list)
    control: Pairs = field(default_factory=list)
    step: float = 0.0
    beside: tuple[float, float] = (1.0, 1.0)
    links: dict[str, Pairs] = field(default_factory=dict)
    exact: dict[str, float] = field(default_factory=dict)
    device: str = "cpu"
    version: int = VERSION

    def with_exact(self, exact: dict[str, float]) -> Calibration:
        """And these operations."""
        return replace(self, exact={**self.exact, **exact})

    # --- files -----------------------------------------------------------------------------------------
    def save(self, folder: Path | None = None) -> Path:
        """Keep it, in place of what was measured before; returns the file.

        Raises:
            PlanError: the folder cannot be written.
        """
        path = path_of(self.ranks, self.threads, folder, self.device)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(f".{os.getpid()}")
            fresh.write_text(json.dumps(asdict(self), indent=1))
            fresh.replace(path)
        except OSError as error:
            raise PlanError(f"what was measured cannot be kept: {error}", fix="set XDG_CACHE_HOME") from error
        return path

    @classmethod
    def load(cls, ranks: int, threads: int, folder: Path | None = None, device: str = "cpu") -> Calibration | None:
        """What was measured of this machine; ``None``: nothing, or by another version."""
        try:
            found = json.loads(path_of(ranks, threads, folder, device).read_text())
            if found.get("version") != VERSION:
                return None
            return cls(**{**found, "beside": tuple(found["beside"])})
        except (OSError, ValueError, TypeError, KeyError, AttributeError):  # whatever is wrong with it: measure again
            return None


def cache_folder() -> Path:
    """``XDG_CACHE_HOME/shardwise``, by default ``~/.cache/shardwise``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardwise"


def path_of(ranks: int, threads: int, folder: Path | None = None, device: str = "cpu") -> Path:
    """Of the figures of this host with so many ranks and threads, and this torch. An accelerator's hold for any."""
    counts = (ranks, threads) if device == "cpu" else ()
    said = (platform.node(), platform.processor(), os.cpu_count(), torch.__version__, device, *counts)
    name = hashlib.sha256(repr(said).encode()).hexdigest()[:16]
    return (folder or cache_folder()) / f"calibration-{name}.json"


def usual_threads(ranks: int) -> int:
    """Threads of one of so many ranks on this host: as many as cores are left for it."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdigit() and int(told) else max(1, (os.cpu_count() or 1) // ranks)
