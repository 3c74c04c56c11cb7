"""Data for many ranks: each gets its own share of every round, once, in an order that can be taken up again."""

from shardwise.data_loader.dispatch import DataLoaderDispatcher
from shardwise.data_loader.iterable import IterableDatasetShard
from shardwise.data_loader.loader import PreparedLoader
from shardwise.data_loader.metrics import gather_for_metrics
from shardwise.data_loader.prepare import SkipDataLoader, prepare_data_loader, skip_first_batches
from shardwise.data_loader.sampling import BatchSamplerShard, SkipBatchSampler, Tail, get_sampler
from shardwise.data_loader.shard import DataLoaderShard
from shardwise.data_loader.state_mixin import DataLoaderStateMixin
from shardwise.data_loader.streams import SeedableRandomSampler

__all__ = [
    "BatchSamplerShard", "DataLoaderDispatcher", "DataLoaderShard", "DataLoaderStateMixin", "IterableDatasetShard",
    "PreparedLoader", "SeedableRandomSampler", "SkipBatchSampler", "SkipDataLoader", "Tail", "gather_for_metrics",
    "get_sampler", "prepare_data_loader", "skip_first_batches",
]  # fmt: skip
