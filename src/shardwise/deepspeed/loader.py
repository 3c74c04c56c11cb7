"""The loader that ``initialize`` makes of ``training_data``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler

from shardwise.data_loader import prepare_data_loader


class DeepSpeedDataLoader:
    """This rank's batches of a dataset. It is its own iterator: ``iter()`` begins an epoch, ``next()`` goes on.

    Args:
        dataset: map-style, whose samples the ranks share by a ``DistributedSampler``, as DeepSpeed does: shuffled, each
            epoch in the same order until the script calls ``data_sampler.set_epoch``. Or iterable, of which each rank
            takes its share.
        batch_size: samples of one batch of this rank.
        ranks, rank: who shares them.
        sampler: in place of the usual one, for a map-style dataset; it says what this rank reads.
        collate_fn, num_workers, pin_memory, drop_last: as for ``DataLoader``.

    Attributes:
        data_sampler: the sampler.
        post_process_func: changes each batch, if it is set.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        ranks: int,
        rank: int,
        sampler: Sampler[Any] | None = None,
        collate_fn: Callable[..., Any] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        drop_last: bool = False,
    ) -> None:
        self.dataset, self.batch_size, self.collate_fn = dataset, batch_size, collate_fn
        self.post_process_func: Callable[[Any], Any] | None = None
        settings: dict[str, Any] = {
            "batch_size": batch_size, "collate_fn": collate_fn, "num_workers": num_workers, "pin_memory": pin_memory,
            "drop_last": drop_last,
        }  # fmt: skip
        self.data_sampler: Any = sampler
        self.dataloader: DataLoader[Any]
        if isinstance(dataset, IterableDataset):
            self.dataloader = prepare_data_loader(DataLoader(dataset, **settings))
        else:
            if sampler is None:
                self.data_sampler = DistributedSampler(dataset, num_replicas=ranks, rank=rank)
            self.dataloader = DataLoader(dataset, sampler=self.data_sampler, **settings)
        self._batches: Iterator[Any] | None = None

    def __len__(self) -> int:
        return len(self.dataloader)

    def __iter__(self) -> DeepSpeedDataLoader:
        self._batches = iter(self.dataloader)
        return self

    def __next__(self) -> Any:
        if self._batches is None:
            self._batches = iter(self.dataloader)
        batch = next(self._batches)
        return batch if self.post_process_func is None else self.post_process_func(batch)
