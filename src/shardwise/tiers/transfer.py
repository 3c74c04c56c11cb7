"""What every move of bytes has in common, between ranks (``comm``), to a device, or to a disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Transfer(Protocol):
    """Bytes on their way. ``wait()`` returns when they have arrived, and may be called any number of times."""

    def wait(self) -> None: ...


class TransferGroup:
    """Several transfers as one."""

    def __init__(self, transfers: Sequence[Transfer]) -> None:
        self.transfers = transfers

    def wait(self) -> None:
        for transfer in self.transfers:
            transfer.wait()
