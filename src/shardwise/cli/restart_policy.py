"""Who was lost when ranks failed, and with how many ranks and which devices a run starts anew: ``--min-nproc``.

A rank is *lost* if it will hardly do better next time: its device does not answer any more, or it was ended by a
signal, as a process is that takes more memory than there is. A rank that raised is not lost: that is a bug in the
script, or the report of a survivor, and the same ranks start anew. So they do if all were lost.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

_TRY = "import torch; torch.ones(1, device=torch.accelerator.current_accelerator()).add_(1).item()"
_TRY_S = 60.0  # a device that has not answered by then does not


@dataclass(frozen=True)
class Attempt:
    """A start after a failure.

    Attributes:
        nproc: ranks.
        devices: the devices they see, as in the variable that shows them; empty if they have none.
        left_out: the devices that the start before had and this one has not.
    """

    nproc: int
    devices: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def words(self, before: Attempt) -> str:
        """What is different from the start before, to go behind "starting"."""
        ranks = f"anew with {self.nproc} rank{'s' * (self.nproc > 1)} instead of {before.nproc}"
        without = f", without device {', '.join(self.left_out)}" if self.left_out else ""
        return (ranks if self.nproc < before.nproc else "all ranks anew") + without


@dataclass(frozen=True)
class RestartPolicy:
    """How far the ranks of this host may become fewer.

    Args:
        least: ranks that every start has at least.
        multiple: the number of ranks stays a multiple of this.
        shown_by: the variable that says which devices a process sees, if there is one.
        tried: ranks run on such devices, which are tried after a failure.
    """

    least: int
    multiple: int = 1
    shown_by: str | None = None
    tried: bool = False

    def after(self, ended: Sequence[tuple[int, int]], now: Attempt) -> Attempt:
        """The start after a failure.

        Args:
            ended: local rank and exit code of those that failed by themselves, the first to fail first.
            now: the start that failed.

        Cost: where ranks run on devices, the seconds that a process takes to import torch and use one.
        """
        devices = (
            now.devices if len(now.devices) >= now.nproc else ()
        )  # otherwise ranks are not on devices of their own
        sick = []
        if self.tried and self.shown_by is not None:
            sick = [rank for rank, ok in enumerate(answering(devices[: now.nproc], self.shown_by)) if not ok]
        lost = lost_ranks(ended, now.nproc, sick)
        wanted = (now.nproc - len(lost)) // self.multiple * self.multiple
        nproc = max(wanted, self.least)
        # Where more were lost than may be missing, some of their devices are needed again: not the first to fail.
        left_out = [devices[rank] for rank in lost[: len(devices) - nproc]] if devices else []
        rest = tuple(name for name in now.devices if name not in left_out)
        return Attempt(nproc, rest, tuple(left_out))


def lost_ranks(ended: Sequence[tuple[int, int]], nproc: int, sick: Sequence[int] = ()) -> list[int]:
    """The local ranks to go on without, those to leave out first in front.

    If all ranks went the same way, no rank is the cause, and none is lost.

    Args:
        ended: local rank and exit code of those that failed by themselves, the first to fail first.
        nproc: ranks there were.
        sick: local ranks whose device does not answer.
    """
    sick = [] if len(sick) == nproc else sick
    # NCCL aborts survivors, too: an abort says something only where nothing else does, and of the first alone.
    dead = [rank for rank, code in ended if code < 0 and code != -signal.SIGABRT]
    aborted = [rank for rank, code in ended[:1] if code == -signal.SIGABRT]
    lost = list(dict.fromkeys([*sick, *dead])) or aborted
    return [] if len(lost) == nproc else lost


def answering(devices: Sequence[str], shown_by: str) -> list[bool]:
    """Whether each device computes in a new process. All are tried at the same time.

    Args:
        devices: in the words of the environment variable ``shown_by``.
    """
    tries = [
        subprocess.Popen(
            [sys.executable, "-c", _TRY], env={**os.environ, shown_by: name},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for name in devices
    ]  # fmt: skip
    until = time.monotonic() + _TRY_S
    try:
        while any(one.poll() is None for one in tries) and time.monotonic() < until:
            time.sleep(0.05)
        return [one.poll() == 0 for one in tries]
    finally:
        for one in tries:
            if one.poll() is None:
                one.kill()  # without waiting for it: inside of a dead driver it may never end
