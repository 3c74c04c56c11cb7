"""What ranks tell each other at the end of a backward, so that they agree about gradients and about what comes next."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import compress
from typing import NamedTuple

import torch

from shardwise.comm.group import Group, Transfer
from shardwise.comm.stats import Op
from shardwise.errors import CommError


class Agreed(NamedTuple):
    """What all ranks know after the exchange.

    Attributes:
        used: parameters (by ``id``) that got a gradient on some rank.
        again: units (by index) to which more arrived after their reduce, on some rank.
        order: all units (by index), in the order the leader's were done in.
    """

    used: set[int]
    again: set[int]
    order: list[int]


class Exchange:
    """The exchange that ends a backward: one small row of bytes per rank.

    Row: one byte per parameter (got a gradient), one per unit (more arrived after its reduce), the
    order in which units were done (two bytes each), and a checksum of the gathers.

    Args:
        params: of the model, by ``id``.
        units: how many it has.
        arrived: parameters (by ``id``) that got a gradient here.
        late: units (by index) with gradients that wait although the unit was reduced.
        done: units (by index), in the order in which they were done here.
        gather_log: the checksum.
        group: over which it travels; ``None``: this rank is alone.
        op: for counting and reports.
    """

    def __init__(
        self,
        params: Sequence[int],
        units: int,
        arrived: set[int],
        late: Iterable[int],
        done: Iterable[int],
        gather_log: int,
        group: Group | None,
        op: Op,
    ) -> None:
        self.group, self.op = group, op
        self.params = params
        n, m = len(params), units
        self.cut = (n, n + m, n + 3 * m, n + 3 * m + 4)
        again = bytearray(m)
        for i in late:
            again[i] = 1
        known = dict.fromkeys(done)
        order = struct.pack(f"<{m}H", *known, *(i for i in range(m) if i not in known))
        self.row = bytes(map(arrived.__contains__, params)) + again + order + gather_log.to_bytes(4, "little")

    def start(self) -> Transfer | None:
        """Send this rank's row."""
        group = self.group
        if group is None or group.size == 1:
            return None
        width = len(self.row)
        self.all = bytearray(width * group.size)
        self.all[group.rank * width : (group.rank + 1) * width] = self.row
        return group.all_gather(torch.frombuffer(self.all, dtype=torch.uint8), self.op)

    def finish(self, transfer: Transfer | None, leader: int = 0) -> Agreed:
        """Wait for the others' rows.

        Args:
            leader: the rank whose order of units counts: rank 0, unless that has run out of data.

        Raises:
            CommError: the ranks gathered different units.
        """
        n, m_end, order_end, _ = self.cut
        rows = [bytes(self.row)]
        if transfer is not None:
            transfer.wait()
            width = len(self.row)
            rows = [bytes(self.all[k : k + width]) for k in range(0, len(self.all), width)]
        all_ = b"\1" * n
        used = set(self.params)
        if not any(row.startswith(all_) for row in rows):
            used = {p for row in rows for p in compress(self.params, row)}
        again = {i for row in rows for i, late in enumerate(row[n:m_end]) if late}
        logs = [row[order_end:] for row in rows]
        if len(set(logs)) > 1:
            odd = next(r for r, log in enumerate(logs) if log != logs[0])
            raise CommError(
                f"rank {odd} gathered other units than rank 0 in this step: the ranks took different branches",
                where=f"rank {0 if self.group is None else self.group.rank}",
                fix="make every rank run the same units in the same order, or use ddp, zero1 or zero2",
            )
        first = rows[leader if len(rows) > 1 else 0][m_end:order_end]
        order = list(struct.unpack(f"<{m_end - n}H", first))
        return Agreed(used, again, order)
