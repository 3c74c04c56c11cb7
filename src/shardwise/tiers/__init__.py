"""Where bytes live, and how they move: device buffers with every live byte accounted for by state, aligned host
buffers (``aligned``), and extents on a disk (``disk``), which are imported from their modules where they are used."""

from shardwise.tiers.buffer import Buffer
from shardwise.tiers.ledger import STATES, Ledger

__all__ = ["STATES", "Buffer", "Ledger"]
