"""Run a command with a hard limit on its memory: a control group of its own (version 2 or 1), else ``RLIMIT_DATA``.

A control group counts pages that are really there, and the kernel kills what needs more. ``RLIMIT_DATA`` counts private
writable address space, touched or not; there an allocation fails with an error.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
SETTLE_S = 5.0


@dataclass(frozen=True)
class Outcome:
    """How a limited command ended.

    Attributes:
        kind: ``cgroup v2``, ``cgroup v1`` or ``RLIMIT_DATA``.
        returncode: negative for a signal.
        peak: bytes, the most that the group held at once; ``None`` without a group.
        killed: the kernel ended a process of the group for lack of memory.
        output, errors: what the command printed.
    """

    kind: str
    returncode: int
    peak: int | None
    killed: bool
    output: str
    errors: str


class Group:
    """A new control group with a limit on memory and no swap, gone when closed.

    Raises:
        OSError: this process may not make one.
    """

    def __init__(self, nbytes: int) -> None:
        name = f"shardwise-bench-{os.getpid()}"
        v1 = MOUNT / "memory"
        self.version = 1 if (v1 / "memory.limit_in_bytes").exists() else 2
        parent = v1 if self.version == 1 else _parent_v2()
        self.path = parent / name
        self.path.mkdir()
        try:
            if self.version == 1:
                self._set("memory.limit_in_bytes", nbytes)
                if (self.path / "memory.memsw.limit_in_bytes").exists():
                    self._set("memory.memsw.limit_in_bytes", nbytes)
            else:
                self._set("memory.max", nbytes)
                if (self.path / "memory.swap.max").exists():
                    self._set("memory.swap.max", 0)
        except OSError:
            self.close()
            raise

    def _set(self, name: str, value: int) -> None:
        (self.path / name).write_text(str(value))

    def enter(self) -> None:
        """Move the calling process into the group."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def peak(self) -> int:
        return int((self.path / ("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak")).read_text())

    @property
    def killed(self) -> bool:
        events = (self.path / ("memory.oom_control" if self.version == 1 else "memory.events")).read_text()
        return any(line.split()[0] == "oom_kill" and int(line.split()[1]) > 0 for line in events.splitlines())

    def close(self) -> None:
        """Remove the group, once its processes are gone."""
        end = time.monotonic() + SETTLE_S
        while True:
            try:
                self.path.rmdir()
                return
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)


def _parent_v2() -> Path:
    """The nearest group above this process's own that hands the memory controller to its children."""
    line = next(x for x in Path("/proc/self/cgroup").read_text().splitlines() if x.startswith("0::"))
    own = MOUNT / line[3:].lstrip("/")
    for path in (own, *own.parents):
        control = path / "cgroup.subtree_control"
        if control.exists() and "memory" in control.read_text().split() and os.access(path, os.W_OK):
            return path
        if path == MOUNT:
            break
    raise PermissionError("no control group here hands out a memory limit")


def run(command: Sequence[str], nbytes: int, timeout: float) -> Outcome:
    """Run ``command`` with at most ``nbytes`` of memory, and wait for it."""
    group = None
    try:
        group = Group(nbytes)
        kind = f"cgroup v{group.version}"
    except OSError:
        kind = "RLIMIT_DATA"

    def limit() -> None:
        if group is not None:
            group.enter()
        else:
            resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes))

    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limit, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        errors += f"\nnot done after {timeout:g} s"
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    finally:
        peak, killed = (None, False) if group is None else (group.peak, group.killed)
        if group is not None:
            group.close()
    return Outcome(kind, process.returncode, peak, killed, output, errors)
