"""What every move of bytes has in common, between ranks (``comm``), to a device, or to a disk."""

from __future__ import annotations

from typing import Protocol


class Transfer(Protocol):
    """Bytes on their way. ``wait()`` returns when they have arrived, and may be called any number of times."""

    def wait(self) -> None: ...
