"""When a device did what it was told: marks on its stream, read after the fact.

A device that runs late is told of a step long before it computes it: the host's clock says when it was told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import torch

from shardwise import device as devices
from shardwise.observe.digest import PHASE, Moment, Sums, rounded


class DeviceClock:
    """One step by the clock of a device.

    Args:
        device: runs late. It is waited for here, so that both clocks have one beginning.

    Cost: that wait, and a mark on the stream per moment.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        devices.synchronize(device)
        self._began, self._first = perf_counter(), devices.timed_mark(device)
        self._marks: dict[int, torch.Event] = {}

    def note(self, moment: Moment) -> None:
        """The device comes to this moment when it has done what it was told so far. Somebody keeps the moment."""
        self._marks[id(moment)] = devices.timed_mark(self._device)

    def read(self, moments: Sequence[Moment]) -> list[Moment]:
        """The moments at the device's times; those before its clock began at the host's.

        Waits for the device.
        """
        out: list[Moment] = []
        for moment in moments:
            mark = self._marks.get(id(moment))
            if mark is not None:
                out.append((self._began + devices.seconds_between(self._first, mark), *moment[1:]))
            elif moment[0] <= self._began:
                out.append(moment)
        return out

    def sums(self, moments: Sequence[Moment], states: int) -> Mapping[str, Any]:
        """What the line of the step says of phases and waits, by this clock."""
        sums = Sums(states)
        sums.restart(self._began)
        found = self.read(moments)
        sums.take(found)
        sums.until(max((m[0] for m in found if m[1] == PHASE), default=self._began))
        return {"seconds": rounded(sums.seconds), "waits": rounded(sums.waits), "clock": "device"}
