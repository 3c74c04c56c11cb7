"""Small messages from the rank that leads to those that follow it. See :mod:`shardwise.engine.join`."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch

from shardwise.comm.group import Group
from shardwise.comm.stats import Op

# Units count their tags from 8; dataloaders and operations use those below 5.
_OP = Op("join", "what the ranks with data do next", 5)
_ROW = 256  # bytes of a message; a longer one sends the rest after it
_IN_FLIGHT = 32  # messages that followers have not read yet


class Channel:
    """Ordered messages between ranks of a group.

    Cost: 256 bytes per message and receiver, rarely more. Sending does not wait for the receivers.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self._sent: deque[tuple[list[object], torch.Tensor]] = deque()

    def tell(self, item: Any, ranks: Iterable[int]) -> None:
        """Send a picklable object."""
        data = pickle.dumps(item)
        size = max(_ROW, 8 + len(data))
        message = torch.zeros(size, dtype=torch.uint8)
        message[:8].view(torch.int64)[0] = len(data)
        message[8 : 8 + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        ranks = list(ranks)
        self.send(message[:_ROW], ranks)
        if size > _ROW:
            self.send(message[_ROW:], ranks)

    def send(self, tensor: torch.Tensor, ranks: Iterable[int]) -> None:
        """Send a contiguous CPU tensor, whose size and dtype the receivers know."""
        self._sent.append((self.group.exchange([(tensor, r) for r in ranks], [], _OP), tensor))
        self.flush(_IN_FLIGHT)

    def flush(self, keep: int = 0) -> None:
        """Wait until all but the last ``keep`` have been received."""
        while len(self._sent) > keep:
            works, _ = self._sent.popleft()
            self.group.wait(works, _OP)

    def hear(self, rank: int) -> Any:
        """The next object that ``rank`` tells."""
        message = torch.empty(_ROW, dtype=torch.uint8)
        self.receive(message, rank)
        size = int(message[:8].view(torch.int64)[0])
        if 8 + size > _ROW:
            rest = torch.empty(8 + size - _ROW, dtype=torch.uint8)
            self.receive(rest, rank)
            message = torch.cat([message, rest])
        return pickle.loads(message[8 : 8 + size].numpy().tobytes())

    def receive(self, tensor: torch.Tensor, rank: int) -> None:
        """Fill a tensor with what ``rank`` sends."""
        self.group.wait(self.group.exchange([], [(tensor, rank)], _OP), _OP)
