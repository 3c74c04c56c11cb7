"""Where bytes live. Today: the device tier, with every live byte accounted for by state."""

from shardwise.tiers.buffer import Buffer
from shardwise.tiers.ledger import STATES, Ledger

__all__ = ["STATES", "Buffer", "Ledger"]
