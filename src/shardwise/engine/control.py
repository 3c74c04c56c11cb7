"""What ranks tell each other at the end of a backward, so that they agree about gradients and about what comes next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from shardwise.comm.group import Transfer
from shardwise.errors import CommError

if TYPE_CHECKING:
    from shardwise.engine.schedule import Engine


class Message:
    """The exchange that ends a backward: one small row of bytes per rank.

    Row: one byte per parameter (got a gradient), one per unit (more arrived after its reduce), the
    order in which units were done (two bytes each), and a checksum of the gathers.
    """

    def __init__(self, engine: Engine, arrived: set[int], late: list[int]) -> None:
        self.engine = engine
        self.params = [p for u in engine.units for p in u.params]
        n, m = len(self.params), len(engine.units)
        self.cut = (n, n + m, n + 3 * m, n + 3 * m + 4)
        row = bytearray(self.cut[3])
        for i, p in enumerate(self.params):
            row[i] = id(p) in arrived
        for i in late:
            row[n + i] = 1
        fired = set(engine.fired)
        order = engine.fired + [i for i in range(m) if i not in fired]
        for k, i in enumerate(order):
            row[n + m + 2 * k : n + m + 2 * k + 2] = i.to_bytes(2, "little")
        row[self.cut[2] :] = engine.gather_log.to_bytes(4, "little")
        self.row = row

    def start(self) -> Transfer | None:
        group = self.engine.mesh.control
        if group.size == 1 or self.engine.world.fake:
            return None
        width = len(self.row)
        self.all = bytearray(width * group.size)
        self.all[group.rank * width : (group.rank + 1) * width] = self.row
        self.tensor = torch.frombuffer(self.all, dtype=torch.uint8)
        return group.all_gather(self.tensor, self.engine.op("control"))

    def finish(self, transfer: Transfer | None) -> tuple[set[int], set[int], list[int]]:
        """(ids of parameters used anywhere, units to reduce again, the leader's order)."""
        engine, (n, m_end, order_end, _) = self.engine, self.cut
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
                where=f"rank {engine.world.rank}",
                fix="make every rank run the same units in the same order, or use ddp, zero1 or zero2",
            )
        join = engine.world.join  # rank 0 may have run out of data, and its units with it
        leader = 0 if join is None or len(rows) == 1 else join.leader
        first = rows[leader][m_end:order_end]
        order = [int.from_bytes(first[k : k + 2], "little") for k in range(0, len(first), 2)]
        return used, again, order
