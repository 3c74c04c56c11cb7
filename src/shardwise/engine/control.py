"""What ranks tell each other at the end of a backward, so that they agree about gradients and about what comes next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from shardwise.comm.group import Group, Transfer
from shardwise.comm.stats import Op
from shardwise.engine.unit import Unit
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
        units: of the model.
        arrived: parameters (by ``id``) that got a gradient here.
        late: units (by index) with gradients that wait although the unit was reduced.
        done: units (by index), in the order in which they were done here.
        gather_log: the checksum.
        group: over which it travels; ``None``: this rank is alone.
        op: for counting and reports.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        arrived: set[int],
        late: Sequence[int],
        done: Sequence[int],
        gather_log: int,
        group: Group | None,
        op: Op,
    ) -> None:
        self.group, self.op = group, op
        self.params = [p for u in units for p in u.params]
        n, m = len(self.params), len(units)
        self.cut = (n, n + m, n + 3 * m, n + 3 * m + 4)
        row = bytearray(self.cut[3])
        for i, p in enumerate(self.params):
            row[i] = id(p) in arrived
        for i in late:
            row[n + i] = 1
        known = set(done)
        for k, i in enumerate([*done, *(i for i in range(m) if i not in known)]):
            row[n + m + 2 * k : n + m + 2 * k + 2] = i.to_bytes(2, "little")
        row[self.cut[2] :] = gather_log.to_bytes(4, "little")
        self.row = row

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
        used = {id(p) for i, p in enumerate(self.params) if any(row[i] for row in rows)}
        again = {i for i in range(m_end - n) if any(row[n + i] for row in rows)}
        logs = [row[order_end:] for row in rows]
        if len(set(logs)) > 1:
            odd = next(r for r, log in enumerate(logs) if log != logs[0])
            raise CommError(
                f"rank {odd} gathered other units than rank 0 in this step: the ranks took different branches",
                where=f"rank {0 if self.group is None else self.group.rank}",
                fix="make every rank run the same units in the same order, or use ddp, zero1 or zero2",
            )
        first = rows[leader if len(rows) > 1 else 0][m_end:order_end]
        order = [int.from_bytes(first[k : k + 2], "little") for k in range(0, len(first), 2)]
        return Agreed(used, again, order)
