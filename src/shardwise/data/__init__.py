"""Data for many ranks: each reads its own share of every global batch."""

from shardwise.data.loader import ShardedLoader
from shardwise.data.sampling import BatchShard, IterableShard, Tail

__all__ = ["BatchShard", "IterableShard", "ShardedLoader", "Tail"]
