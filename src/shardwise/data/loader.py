"""A dataloader's batches for this rank, on its device, with a sign before the last one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from shardwise import operations
from shardwise.data.sampling import BatchShard, IterableShard, Tail
from shardwise.errors import DataError

_SETTINGS = (
    "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
    "generator", "prefetch_factor", "persistent_workers", "pin_memory_device", "in_order",
)  # fmt: skip


class Watcher(Protocol):
    """Who wants to know which loader is being read: the innermost one counts."""

    def loader_begins(self, loader: ShardedLoader) -> None: ...

    def loader_ends(self, loader: ShardedLoader) -> None: ...


class ShardedLoader(DataLoader[Any]):
    """A ``DataLoader`` over the same dataset and settings as another one, that yields this rank's share.

    Shuffled orders are equal on all ranks, whatever their random states: a seed is drawn once, from the sampler's
    generator or torch's, and rank 0's is used; epoch *e* is shuffled from that seed and *e*. A sampler of your own
    takes part if it has a ``generator`` attribute; otherwise it must give the same order everywhere.
    A ``DistributedSampler`` is left alone: it has split the samples already.

    Args:
        loader: the one to follow. Rebuilt from its settings, so overridden ``__iter__`` methods are not kept.
        device: where batches go, or ``None`` to leave them.
        ranks, rank: how many ranks there are, and which one this is.
        watcher: told when an iteration begins and ends.
        split_batches, even_batches: see :class:`~shardwise.data.sampling.BatchShard`.

    Attributes:
        end_of_dataloader: the batch in hand is the epoch's last.

    Raises:
        DataError: see :class:`~shardwise.data.sampling.BatchShard`.

    Cost: a collective of 8 bytes, when made. Reads one batch ahead.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        device: torch.device | None,
        ranks: int,
        rank: int,
        watcher: Watcher | None = None,
        split_batches: bool = False,
        even_batches: bool = True,
    ) -> None:
        self.target_device, self.watcher = device, watcher
        self.end_of_dataloader = False
        self._epoch = 0
        self._shuffler: torch.Generator | None = None
        self._seed = 0
        self._ranks = ranks
        self._shard: BatchShard | IterableShard | None = None
        self._parts: list[Any] = [loader.dataset, loader.sampler, loader.batch_sampler]
        options: dict[str, Any] = {key: getattr(loader, key) for key in _SETTINGS if hasattr(loader, key)}
        if isinstance(loader.dataset, IterableDataset):
            self._total_batch_size = (loader.batch_size or 1) * (1 if split_batches else ranks)
            size = loader.batch_size
            if split_batches:
                if size is None or size % ranks:
                    raise DataError(
                        f"split_batches cuts batches of {size} samples over {ranks} ranks",
                        fix=f"choose a batch size that {ranks} divides, or leave split_batches out",
                    )
                size //= ranks
            self._shard = IterableShard(loader.dataset, ranks, rank, size or 1, loader.drop_last, even_batches)
            super().__init__(self._shard, batch_size=size, drop_last=loader.drop_last, **options)
        elif isinstance(loader.sampler, DistributedSampler):
            self._total_batch_size = (loader.batch_size or 1) * ranks
            options |= {"batch_sampler": loader.batch_sampler} if loader.batch_sampler else {"sampler": loader.sampler}
            super().__init__(loader.dataset, **options)
        elif loader.batch_sampler is None:  # batch_size=None: the dataset is asked for the sampler's items as they are
            items = self._seeded(loader.sampler)
            whole = isinstance(items, BatchSampler)
            batches = items if whole else _Listed(items)
            shard = self._shard = BatchShard(batches, ranks, rank, split_batches, even_batches)
            self._total_batch_size = (shard.batch_size or 1) * (1 if split_batches else ranks)
            super().__init__(loader.dataset, batch_size=None, sampler=shard if whole else _Unlisted(shard), **options)
        else:
            batches = self._seeded_batches(loader.batch_sampler)
            self._shard = BatchShard(batches, ranks, rank, split_batches, even_batches)
            self._total_batch_size = (self._shard.batch_size or 1) * (1 if split_batches else ranks)
            super().__init__(loader.dataset, batch_sampler=self._shard, **options)

    # --- equal orders ----------------------------------------------------------------------
    def _seeded(self, sampler: Any) -> Any:
        """The same sampler, shuffling with a generator that all ranks seed equally; the original is not touched."""
        if isinstance(sampler, BatchSampler):
            return self._seeded_batches(sampler)
        if not hasattr(sampler, "generator"):
            return sampler
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=sampler.generator))
        self._seed = operations.from_first(seed)
        self._shuffler = torch.Generator()
        sampler = copy.copy(sampler)
        sampler.generator = self._shuffler
        self._parts.append(sampler)
        return sampler

    def _seeded_batches(self, batches: Any) -> Any:
        inner = getattr(batches, "sampler", None)
        if inner is None:
            return self._seeded(batches) if hasattr(batches, "generator") else batches
        seeded = self._seeded(inner)
        if seeded is inner:
            return batches
        batches = copy.copy(batches)
        batches.sampler = seeded
        self._parts.append(batches)
        return batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration, and tell dataset and samplers that have a ``set_epoch`` too.

        Not needed in a plain loop: every iteration begins the next epoch by itself.
        """
        self._epoch = epoch
        told: set[int] = set()
        for part in self._parts:
            if id(part) not in told and callable(getattr(part, "set_epoch", None)):
                told.add(id(part))
                part.set_epoch(epoch)

    # --- reading ---------------------------------------------------------------------------
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.set_epoch(self._epoch)
        if self._shuffler is not None:
            self._shuffler.manual_seed((self._seed + self._epoch) % (1 << 63))
        self._epoch += 1
        self.end_of_dataloader = False
        if self.watcher is not None:
            self.watcher.loader_begins(self)
        try:
            source = super().__iter__()
            missing = object()
            batch = next(source, missing)
            while batch is not missing:
                if self.target_device is not None:
                    batch = operations.to_device(batch, self.target_device, non_blocking=self.pin_memory)
                following = next(source, missing)
                self.end_of_dataloader = following is missing
                yield batch
                batch = following
        finally:
            if self.watcher is not None:
                self.watcher.loader_ends(self)

    @property
    def total_batch_size(self) -> int:
        """Samples that all ranks read together in one step."""
        return self._total_batch_size

    @property
    def total_dataset_length(self) -> int:
        """Samples in the dataset, of all ranks."""
        return len(self._parts[0])

    def tail(self) -> Tail | None:
        """How many samples of the last global batch are real; ``None`` before the last batch, or if unknown."""
        if not self.end_of_dataloader or self._shard is None:
            return None
        if isinstance(self._shard, IterableShard) and self.num_workers > 0:
            if self._ranks > 1 and self._shard.even_batches and not self._shard.drop_last:
                warnings.warn(
                    "an iterable dataset read by worker processes does not say how many samples its last batch "
                    "repeats, so gather_for_metrics kept them; use num_workers=0, drop_last=True or even_batches=False",
                    stacklevel=3,
                )
            return None
        return self._shard.tail


class _Listed:
    """A sampler whose items may be anything, seen as batches of one item each."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[list[Any]]:
        return ([item] for item in self.items)


class _Unlisted:
    """The way back from :class:`_Listed`."""

    def __init__(self, shard: BatchShard) -> None:
        self.shard = shard

    def __len__(self) -> int:
        return len(self.shard)

    def __iter__(self) -> Iterator[Any]:
        return (items[0] for items in self.shard)
