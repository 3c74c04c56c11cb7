"""The loader to read instead of the one that was given: same class and settings, this rank's samples."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any, cast

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from shardwise import operations
from shardwise.comm import World
from shardwise.data_loader.already_split import OwnBatches, Plan, split_already
from shardwise.data_loader.epochs import EpochDataset
from shardwise.data_loader.iterable import CountingCollate, IterableDatasetShard, StatefulDatasetShard, WorkerInit
from shardwise.data_loader.sampling import BatchSamplerShard, Listed, Unlisted
from shardwise.data_loader.streams import Order
from shardwise.errors import DataError, MissingPackage

_SETTINGS = (
    "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
    "generator", "prefetch_factor", "persistent_workers", "pin_memory_device", "in_order",
)  # fmt: skip


@dataclass
class Source:
    """What a prepared loader reads.

    Attributes:
        base: the loader itself.
        order: what decides its order.
        shard: what takes this rank's samples (or all, where rank 0 reads for everyone).
        ranks: how many share the batches.
        batch_size: of the loader that was given; ``None`` if it has none.
        per_round: batches of the given loader that all ranks take in one step.
        per_read: batches of the given loader that one batch of ``base`` stands for.
        per_index: batches of the given loader that one batch counted by a batch sampler stands for.
        drop_last: the given loader's.
        in_step: the ranks read shares of unknown lengths, and tell each other.
        agreeing: how many ranks have one seed.
    """

    base: DataLoader[Any]
    order: Order
    shard: Any
    ranks: int
    batch_size: int | None
    per_round: int
    per_read: int
    per_index: int
    drop_last: bool
    in_step: bool = False
    agreeing: int = 1

    @classmethod
    def of(
        cls,
        loader: DataLoader[Any],
        ranks: int = 1,
        rank: int = 0,
        split: bool = False,
        even: bool = True,
        seed: int | None = None,
        agree: int | None = None,
        seedable: bool = False,
    ) -> Source:
        """Share a loader's batches among ranks. See :func:`~shardwise.data_loader.prepare_data_loader`.

        Args:
            agree: how many ranks have the same seed, if not ``ranks``.
            seedable: see :class:`~shardwise.data_loader.streams.Order`.
        """
        order = Order(loader.dataset, rank, seedable)
        if not getattr(loader, "in_order", True):
            warnings.warn("in_order=False would mix up which samples are repeats; set to True", stacklevel=4)
        parts: dict[str, Any] = {"generator": order.workers, "in_order": True}
        size = loader.batch_size
        per_round = per_read = 1 if split else ranks
        per_index = 1
        given = split_already(loader) if ranks > 1 else None
        shares = given.agree(ranks) if given is not None else ()
        together = given is not None and ranks == World.current().size
        if given is not None:
            per_round = per_read = per_index = ranks
            split = False
        if isinstance(loader.dataset, IterableDataset):
            if split and size is None:
                raise DataError(
                    "split_batches cuts batches, but this iterable dataset is read with batch_size=None",
                    fix="give the dataloader a batch size, or pass dispatch_batches=True",
                )
            kind = StatefulDatasetShard if is_stateful(loader) else IterableDatasetShard
            n, own = (ranks, rank) if given is None else (1, 0)
            shard: Any = kind(loader.dataset, size or 1, loader.drop_last and n > 1, n, own, split, even)
            parts |= _iterable_parts(loader, shard, ranks)
        else:
            if loader.batch_sampler is not None:
                batches = order.follow(loader.batch_sampler)
            else:  # batch_size=None: the dataset is asked for the sampler's items as they are
                items = order.follow(loader.sampler)
                batches = items if isinstance(loader.sampler, BatchSampler) else Listed(items)
            if given is not None:
                order.tell(given.by)
                plan = Plan.of(given, _as_batches(loader), shares)
                known = operations.gather_object(plan is not None) if together else [plan is not None]
                together = together and not all(known)
                shard = OwnBatches(batches, plan if all(known) else None, even)
            else:
                shard = batches if isinstance(batches, BatchSamplerShard) else None
                shard = shard or BatchSamplerShard(batches, ranks, rank, split, even)
            shard.stream = order.stream
            size = shard.batch_size
            parts |= _map_parts(loader, shard)
        source = cls(
            _with(loader, parts), order, shard, ranks, size, per_round, per_read, per_index, bool(loader.drop_last),
            together,
        )  # fmt: skip
        order.in_workers = source.base.dataset if isinstance(source.base.dataset, EpochDataset) else None
        source.agreeing = ranks if agree is None else agree
        source.agree(seed)
        return source

    @classmethod
    def by_hand(cls, dataset: Any, stateful: bool, settings: dict[str, Any], drop_last: bool = False) -> Source:
        """Around a new loader whose sampler yields this rank's share already."""
        source = cls.of(new_loader(dataset, stateful, settings), agree=World.current().size)
        source.drop_last = source.drop_last or drop_last
        if isinstance(source.shard, BatchSamplerShard):
            source.per_round = source.per_read = source.shard.per_round
        return source

    def agree(self, seed: int | None = None) -> None:
        """One seed on all ranks: rank 0's. A collective of 8 bytes."""
        if seed is None:
            seed = self.order.draw()
        seed %= 1 << 62
        if self.agreeing == World.current().size:  # otherwise ranks are only played, in one process
            seed = operations.from_first(seed)
        self.order.set_seed(seed)
        if isinstance(self.shard, IterableDatasetShard):
            self.shard.seed = seed


def _iterable_parts(loader: DataLoader[Any], shard: IterableDatasetShard, ranks: int) -> dict[str, Any]:
    parts: dict[str, Any] = {"dataset": shard}
    size = loader.batch_size
    if size is not None and shard.part != size:
        parts |= {"batch_size": shard.part, "batch_sampler": BatchSampler(loader.sampler, shard.part, loader.drop_last)}
    if not has_own_iter(loader):
        shard.marks = True
        parts["collate_fn"] = CountingCollate(loader.collate_fn)
    elif loader.num_workers and ranks > 1 and not loader.drop_last:
        raise DataError(
            f"{type(loader).__name__} has an __iter__ of its own, and worker processes read its iterable dataset: "
            "which samples of the last batch are repeats would not be known",
            fix="pass dispatch_batches=True, or drop_last=True, or num_workers=0",
        )
    if loader.num_workers:
        parts["worker_init_fn"] = WorkerInit(loader.worker_init_fn)
        if loader.persistent_workers:
            shard.reach_workers()
    return parts


def _as_batches(loader: DataLoader[Any]) -> Any:
    if loader.batch_sampler is not None:
        return loader.batch_sampler
    return loader.sampler if isinstance(loader.sampler, BatchSampler) else Listed(loader.sampler)


def _map_parts(loader: DataLoader[Any], shard: BatchSamplerShard) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    if loader.persistent_workers and callable(getattr(loader.dataset, "set_epoch", None)):
        parts = {"dataset": EpochDataset(loader.dataset), "worker_init_fn": WorkerInit(loader.worker_init_fn)}
    if loader.batch_sampler is not None:
        inner = getattr(shard, "sampler", None)
        return parts | {"batch_sampler": shard, "sampler": loader.sampler if inner is None else inner}
    return parts | {"sampler": Unlisted(shard) if isinstance(shard.batch_sampler, Listed) else shard}


def _with(loader: DataLoader[Any], parts: dict[str, Any]) -> DataLoader[Any]:
    """The same loader with other parts. A copy, so that subclasses keep their methods and attributes."""
    made = copy.copy(loader)
    vars(made).update(parts, _iterator=None, _IterableDataset_len_called=None)
    return made


def new_loader(dataset: Any, stateful: bool, settings: dict[str, Any]) -> DataLoader[Any]:
    """A loader as it is asked for with the arguments of ``DataLoader``."""
    kind: Any = stateful_class() if stateful else DataLoader
    return cast(DataLoader[Any], kind(dataset, **settings))


def refuse_mesh(mesh: Any) -> None:
    """Raise if some ranks are to get the same batches."""
    if mesh is not None:
        raise DataError(
            "torch_device_mesh is not supported: all ranks share the batches", fix="pass num_processes, process_index"
        )


def has_own_iter(loader: DataLoader[Any]) -> bool:
    """Does a subclass change what an iteration does?"""
    known = {DataLoader.__iter__}
    if is_stateful(loader):
        known.add(stateful_class().__iter__)
    return type(loader).__iter__ not in known


def is_stateful(loader: Any) -> bool:
    """Is this torchdata's ``StatefulDataLoader``? Without importing torchdata."""
    return any(c.__name__ == "StatefulDataLoader" and "torchdata" in c.__module__ for c in type(loader).__mro__)


def stateful_class() -> Any:
    """torchdata's class.

    Raises:
        MissingPackage: torchdata is not installed.
    """
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError as error:
        raise MissingPackage(
            f"use_stateful_dataloader=True needs torchdata: {error}", fix="pip install 'torchdata>=0.8'"
        ) from error
    return StatefulDataLoader


def as_stateful(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The same loader as a ``StatefulDataLoader``.

    Raises:
        MissingPackage: torchdata is not installed.
        DataError: the loader's class does something of its own.
    """
    kind = stateful_class()
    if is_stateful(loader):
        return loader
    if has_own_iter(loader):
        raise DataError(
            f"{type(loader).__name__} has an __iter__ of its own, which a StatefulDataLoader would not run",
            fix="derive it from torchdata's StatefulDataLoader, or leave use_stateful_dataloader out",
        )
    options: dict[str, Any] = {key: getattr(loader, key) for key in _SETTINGS if hasattr(loader, key)}
    if isinstance(loader.dataset, IterableDataset):
        options |= {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    elif loader.batch_sampler is not None:
        options["batch_sampler"] = loader.batch_sampler
    else:
        options |= {"sampler": loader.sampler, "batch_size": None}
    made = kind(loader.dataset, **options)
    vars(made).update(batch_size=loader.batch_size, drop_last=loader.drop_last)
    return made


def rank_and_size(ranks: int | None, rank: int | None) -> tuple[int, int]:
    world = World.current()
    return (world.size if ranks is None else ranks), (world.rank if rank is None else rank)
