"""Making loaders ready for many ranks, and going into the middle of an epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from shardwise.data_loader.already_split import split_already
from shardwise.data_loader.build import Source, as_stateful, is_stateful, new_loader, rank_and_size, refuse_mesh
from shardwise.data_loader.dispatch import DataLoaderDispatcher
from shardwise.data_loader.loader import PreparedLoader
from shardwise.data_loader.sampling import SkipBatchSampler
from shardwise.data_loader.shard import DataLoaderShard
from shardwise.data_loader.watching import Watcher
from shardwise.errors import DataError


def prepare_data_loader(
    dataloader: Any,
    device: torch.device | None = None,
    num_processes: int | None = None,
    process_index: int | None = None,
    split_batches: bool = False,
    put_on_device: bool = False,
    rng_types: Sequence[Any] | None = None,
    dispatch_batches: bool | None = None,
    even_batches: bool = True,
    slice_fn_for_dispatch: Callable[..., Any] | None = None,
    use_seedable_sampler: bool = False,
    data_seed: int | None = None,
    non_blocking: bool = False,
    use_stateful_dataloader: bool = False,
    torch_device_mesh: Any = None,
    *,
    watcher: Watcher | None = None,
) -> Any:
    """This rank's share of a dataloader's batches, read by itself or by rank 0 for all.

    The loader keeps its class, settings and attributes; a subclass's own ``__iter__`` runs, over this rank's sampler.
    Shuffled orders are equal on all ranks, whatever their random states: a seed is agreed upon here, and epoch *e*
    follows from it and *e*. What a ``DistributedSampler`` (at any depth) or ``split_dataset_by_node`` has
    split is not split again.

    Args:
        dataloader: a ``DataLoader``; a prepared one is returned as it is.
        device: where batches go, with ``put_on_device``.
        num_processes: how many ranks share the batches; by default those that run.
        process_index: which one this is.
        split_batches: cut each batch over the ranks instead of giving each rank whole batches.
        put_on_device: move batches to ``device``.
        rng_types: random states made equal before each epoch, ``torch`` or ``cuda`` for example. Orders are equal
            without it.
        dispatch_batches: rank 0 reads, and sends every rank its batch. By default for iterable datasets, if
            ``put_on_device``.
        even_batches: repeat samples at the end so that every rank has equally many, equally large batches. Without it
            ranks may run out of batches at different times.
        slice_fn_for_dispatch: cuts dispatched batches: ``slice_fn(batch, slice, process_index=, num_processes=)``.
        use_seedable_sampler: shuffles are seedable in any case; this takes torch's initial seed for the seed, where
            otherwise one is drawn, and shows a :class:`SeedableRandomSampler`.
        data_seed: the seed of the orders.
        non_blocking: copies to the device do not wait; always so from pinned memory.
        use_stateful_dataloader: read through torchdata's ``StatefulDataLoader``.
        watcher: told when an iteration begins and ends.

    Raises:
        DataError: the batches cannot be shared this way.
        MissingPackage: torchdata is needed and not installed.

    Cost: a collective of 8 bytes (16 when dispatching). Each iteration reads one batch ahead.
    """
    skipped = 0
    if isinstance(dataloader, SkipDataLoader) and not isinstance(dataloader.base_dataloader, PreparedLoader):
        dataloader, skipped = dataloader.base_dataloader, dataloader.skip_batches
    if isinstance(dataloader, (PreparedLoader, SkipDataLoader)):
        return dataloader
    if not isinstance(dataloader, DataLoader):
        raise DataError(
            f"a {type(dataloader).__name__} is not a torch DataLoader",
            fix="wrap the dataset in torch.utils.data.DataLoader; other iterables are used as they are, unprepared",
        )
    refuse_mesh(torch_device_mesh)
    ranks, rank = rank_and_size(num_processes, process_index)
    split = split_already(dataloader) if ranks > 1 else None
    if dispatch_batches is None:
        dispatch_batches = put_on_device and isinstance(dataloader.dataset, IterableDataset) and split is None
    loader = as_stateful(dataloader) if use_stateful_dataloader else dataloader
    if data_seed is None and use_seedable_sampler:
        data_seed = torch.random.initial_seed()
    target = device if put_on_device else None
    if dispatch_batches:
        if split is not None:
            raise DataError(
                f"dispatch_batches lets rank 0 read for all ranks, but its {type(split.by).__name__} yields only "
                "rank 0's part",
                fix="leave out what splits the samples over ranks (a DistributedSampler, split_dataset_by_node), or "
                "pass dispatch_batches=False",
            )
        prepared: PreparedLoader = DataLoaderDispatcher(
            Source.of(loader, seed=data_seed, agree=ranks, seedable=use_seedable_sampler),
            split_batches,
            slice_fn=slice_fn_for_dispatch,
            device=target,
            rng_types=rng_types,
            even_batches=even_batches,
            num_processes=ranks,
            process_index=rank,
            _non_blocking=non_blocking,
        )
    else:
        source = Source.of(loader, ranks, rank, split_batches, even_batches, data_seed, seedable=use_seedable_sampler)
        prepared = DataLoaderShard(source, target, rng_types, _non_blocking=non_blocking)
    prepared.watcher, prepared.skip_given = watcher, skipped
    return prepared


class SkipDataLoader(DataLoader[Any]):
    """A view of a dataloader whose iterations leave out the first batches. It shares everything with the loader.

    A prepared loader's view reads the epoch that the loader would read next, and the loader goes on with the one
    after it. A position that was loaded before is replaced: nothing is skipped twice.

    Args:
        dataset: a dataloader, prepared or not; or a dataset, of which one is made with ``kwargs``.
        skip_batches: how many batches of this rank to leave out.
        use_stateful_dataloader: the new one is torchdata's ``StatefulDataLoader``.
        kwargs: those of ``DataLoader``.

    Raises:
        DataError: a dataloader together with settings for one.
        MissingPackage: torchdata is needed, and not installed.
    """

    def __init__(
        self, dataset: Any, skip_batches: int = 0, use_stateful_dataloader: bool = False, **kwargs: Any
    ) -> None:
        loader = dataset
        if not isinstance(loader, DataLoader):
            loader = new_loader(dataset, use_stateful_dataloader, kwargs)
        elif kwargs or use_stateful_dataloader:
            raise DataError(
                f"a dataloader is there already, and {', '.join(kwargs) or 'use_stateful_dataloader'} would be for a "
                "new one",
                where="SkipDataLoader",
                fix="pass the dataset, or leave the settings out",
            )
        self.base_dataloader, self.skip_batches = loader, skip_batches

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # isinstance() looks at type() first
        return type(self.base_dataloader)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return SkipDataLoader, (self.base_dataloader, self.skip_batches)

    @property
    def use_stateful_dataloader(self) -> bool:
        return is_stateful(self.base_dataloader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "base_dataloader":
            raise AttributeError(name)
        return getattr(self.base_dataloader, name)

    def __len__(self) -> int:
        return max(len(self.base_dataloader) - self.skip_batches, 0)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if isinstance(self.base_dataloader, PreparedLoader):
            return self.base_dataloader.from_batch(self.skip_batches)
        return islice(iter(self.base_dataloader), self.skip_batches, None)


def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
    """A dataloader that begins after ``num_batches`` batches of an epoch, in the order that the epoch has.

    For a prepared loader, a :class:`SkipDataLoader` of it. For another ``DataLoader``, one of the same class that
    leaves them out in every iteration. Nothing is read for them if the dataset is map-style.

    Raises:
        DataError: not a dataloader, or a negative number.
    """
    if num_batches < 0:
        raise DataError(f"{num_batches} batches cannot be skipped", fix="give 0 or more")
    if isinstance(dataloader, SkipDataLoader):
        return skip_first_batches(dataloader.base_dataloader, dataloader.skip_batches + num_batches)
    if not isinstance(dataloader, DataLoader):
        raise DataError(f"a {type(dataloader).__name__} is not a torch DataLoader", fix="pass a dataloader")
    if isinstance(dataloader, PreparedLoader) or isinstance(dataloader.dataset, IterableDataset):
        return SkipDataLoader(dataloader, num_batches)
    made = copy.copy(dataloader)
    if dataloader.batch_sampler is not None:
        changed: dict[str, Any] = {"batch_sampler": SkipBatchSampler(dataloader.batch_sampler, num_batches)}
    elif isinstance(dataloader.sampler, BatchSampler):
        changed = {"sampler": SkipBatchSampler(dataloader.sampler, num_batches)}
    else:
        return SkipDataLoader(dataloader, num_batches)
    vars(made).update(changed, _iterator=None)
    return made
