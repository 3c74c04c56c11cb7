"""One epoch of a dataloader: from which batch on, on which device, with a sign before the last batch.

:class:`PreparedLoader` is that for all ways of reading. Its subclasses say where this rank's batches come from:
:class:`~shardwise.data_loader.shard.DataLoaderShard` reads them itself,
:class:`~shardwise.data_loader.dispatch.DataLoaderDispatcher` gets them from rank 0.

*Batches* are counted as the loader that was given would yield them; what all ranks read in one step is a *round*.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

import torch
from torch.utils.data import DataLoader

from shardwise import operations
from shardwise.data_loader.build import Source, is_stateful
from shardwise.data_loader.iterable import Counted, IterableDatasetShard
from shardwise.data_loader.rows import rows_of
from shardwise.data_loader.sampling import BatchSamplerShard, Tail, get_sampler, tail_of
from shardwise.data_loader.state_mixin import DataLoaderStateMixin
from shardwise.data_loader.watching import Watcher, watcher_of_all
from shardwise.errors import DataError
from shardwise.rng import synchronize_rng_states


class PreparedLoader(DataLoaderStateMixin, DataLoader[Any]):
    """A dataloader that yields this rank's batches. Made by :func:`~shardwise.data_loader.prepare_data_loader`.

    Attributes that are not described here are those of the loader that was given, of whose class it is an instance,
    too.

    Attributes:
        base_dataloader: the loader that is read: the given one's class and settings, with this rank's sampler.
        end_of_dataloader: the batch in hand is this rank's last of the epoch.
        iteration: the number of the epoch being read, or of the next one.
        skip_batches: rounds to leave out at the beginning of every epoch.
        skip_given: batches of the given loader to leave out, besides.
    """

    def __init__(self, source: Source, device: torch.device | None, non_blocking: bool, rng_types: Any) -> None:
        # DataLoader's own __init__ is left out: all that it would set is the base loader's.
        self.base_dataloader = source.base
        self.device, self.rng_types = device, rng_types
        self.watcher: Watcher | None = None
        self.end_of_dataloader = False
        self.skip_batches = 0
        self.skip_given = 0
        self._non_blocking = non_blocking or source.base.pin_memory
        self._source, self._order, self._shard = source, source.order, source.shard
        self._tail: Tail | None = None
        self._run: object = None
        self._epoch = self._batches = 0  # batches of the epoch that were handed out, over all ranks
        self._pending = self._finished = False
        self._snapshot: Any = None  # a StatefulDataLoader's own state, at the batch in hand

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "base_dataloader":
            raise AttributeError(name)
        return getattr(self.base_dataloader, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # isinstance() looks at type() first
        return type(self.base_dataloader)

    def __dir__(self) -> list[str]:
        return sorted({*dir(type(self)), *vars(self), *dir(self.base_dataloader)})

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"watcher": None, "_snapshot": None, "_run": None}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, (type(self),), self.__getstate__()

    def __len__(self) -> int:
        return len(self.base_dataloader)

    @property
    def gradient_state(self) -> Any:
        """Of the Accelerator that counts its batches."""
        return getattr(self._watched_by(), "gradient_state", None)

    @property
    def use_stateful_dataloader(self) -> bool:
        """Reads through torchdata's ``StatefulDataLoader``."""
        return is_stateful(self.base_dataloader)

    @property
    def _drop_last(self) -> bool:  # type: ignore[override]
        return self._source.drop_last

    @property
    def dataset(self) -> Any:  # type: ignore[override]
        """The dataset that was given."""
        return self._order.dataset

    @property
    def even_batches(self) -> bool:
        """Every rank gets equally many, equally large batches. May be changed between epochs."""
        return self._shard.even_batches

    @even_batches.setter
    def even_batches(self, value: bool) -> None:
        self._shard.even_batches = value

    @property
    def per_round(self) -> int:
        """Batches of the given loader that all ranks read together in one step."""
        return self._source.per_round

    @property
    def total_batch_size(self) -> int:
        """Samples that all ranks read together in one step."""
        return (self._source.batch_size or 1) * self.per_round

    @property
    def total_dataset_length(self) -> int:
        """Samples in the dataset, of all ranks."""
        return len(self.dataset)

    @property
    def remainder(self) -> int:
        """Samples of the last round that are not repeated, if it is known and not full; else -1."""
        if (tail := self.tail()) is not None and tail.real < tail.total:
            return tail.real
        if self._run is None or self.drop_last or not hasattr(self.dataset, "__len__"):
            return -1
        return len(self.dataset) % self.total_batch_size or -1

    def get_sampler(self) -> Any:
        """The sampler that the order comes from, if there is one."""
        return get_sampler(self)

    def set_sampler(self, sampler: Any) -> None:
        """Take the order from another sampler from the next iteration on. A collective of 8 bytes.

        Raises:
            DataError: an iterable dataset has none.
        """
        shard = self._shard
        if not isinstance(shard, BatchSamplerShard):
            raise DataError("an iterable dataset is read without a sampler", fix="shuffle in the dataset itself")
        shard.sampler = self._order.follow(sampler)
        shard.stream = self._order.stream
        if self.base_dataloader.batch_sampler is not None:
            vars(self.base_dataloader)["sampler"] = shard.sampler
        self._source.agree()

    def tail(self) -> Tail | None:
        """What the ranks hold of the round in hand; ``None`` if it is simply equal batches of new samples."""
        return self._tail

    def reset(self) -> None:
        self.end_of_dataloader, self._tail = False, None

    def begin(self) -> None:
        """Not needed: an iteration says so itself."""
        self.reset()
        self.gradient_state._add_dataloader(self)

    # --- position --------------------------------------------------------------------------
    @property
    def iteration(self) -> int:
        return self._epoch

    @iteration.setter
    def iteration(self, epoch: int) -> None:
        self.set_epoch(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration, and tell dataset and samplers that have a ``set_epoch`` too.

        Not needed in a plain loop: every iteration begins the next epoch by itself. The number of the epoch that a
        loaded position lies in keeps the position; any other number drops it.
        """
        if not (self._pending and epoch == self._epoch):
            self._epoch, self._batches = epoch, 0
            self._pending = self._finished = False
            self._run = None
        self._order.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position: equal on all ranks, small, of numbers only (and of what a ``StatefulDataLoader`` adds).

        It is behind the batch in hand. Behind the last one, it is the beginning of the next epoch.
        """
        state: dict[str, Any] = {
            "epoch": self._epoch + 1 if self._finished else self._epoch,
            "batches": 0 if self._finished else self._batches,
            "batch_size": self._source.batch_size,
            "seed": self._order.seed,
        }
        if self._snapshot is not None and not self._finished:
            state["stateful"] = {"ranks": self._source.ranks, "per_round": self.per_round, "state": self._snapshot}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position: the next iteration goes on behind it, in the order that it had.

        The number of ranks may have changed, and ``split_batches``, and the batch size: then it goes on at the last
        batch border before. Nothing is read for the samples before if the dataset is map-style.

        Raises:
            DataError: this is no position.
        """
        try:
            epoch, batches, size, seed = (state[key] for key in ("epoch", "batches", "batch_size", "seed"))
        except (KeyError, TypeError) as error:
            raise DataError(
                f"this is not a dataloader's position: {error} is missing", fix="pass what state_dict() returned"
            ) from error
        mine = self._source.batch_size
        if size and mine and size != mine:
            batches = batches * size // mine
        self._order.set_seed(seed)
        if isinstance(self._shard, IterableDatasetShard):
            self._shard.seed = seed
        self._epoch, self._batches = epoch, batches
        self._pending, self._finished, self._run = True, False, None
        self._snapshot = None
        stateful = state.get("stateful")
        here = {"ranks": self._source.ranks, "per_round": self.per_round}
        if stateful is not None and size == mine and self._stateful and here.items() <= stateful.items():
            self._snapshot = stateful["state"]

    @property
    def _stateful(self) -> bool:
        """Is this rank's reading described by a StatefulDataLoader's own state? Map-style orders need none."""
        return is_stateful(self.base_dataloader) and isinstance(self._shard, IterableDatasetShard)

    # --- reading ---------------------------------------------------------------------------
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self._iterate(None)

    def from_batch(self, rounds: int) -> Iterator[Any]:
        """The epoch that a plain iteration would read now, without its first ``rounds`` batches on this rank."""
        return self._iterate(self.skip_given + rounds * self.per_round)

    def _watched_by(self) -> Watcher | None:
        return self.watcher if self.watcher is not None else watcher_of_all()

    def _iterate(self, start: int | None) -> Iterator[Any]:
        watcher = self._watched_by()
        opens = getattr(watcher, "loader_opens", None)
        if opens is not None:
            opens(self)
        return self._batches_from(start, watcher)

    def _batches_from(self, start: int | None, watcher: Watcher | None) -> Iterator[Any]:
        snapshot = self._snapshot if self._pending and start is None else None
        if start is None:
            start = self._batches if self._pending else self.skip_given + self.skip_batches * self.per_round
        if not self._pending and (self._finished or self._batches):
            self._epoch += 1
        self._pending = self._finished = False
        self._batches, self._tail, self._snapshot = start, None, None
        run = self._run = object()
        self.end_of_dataloader = False
        self._order.begin(self._epoch, start)
        if isinstance(self._shard, IterableDatasetShard):
            self._shard.set_epoch(self._epoch)
        self._synchronize()
        batch_comes, batch_is_done = (getattr(watcher, name, None) for name in ("batch_comes", "batch_is_done"))
        if watcher is not None:
            watcher.loader_begins(self)
        try:
            with closing(self._rounds(start, snapshot)) as source:  # also when the loop is left early
                coming = next(source, None)
                while coming is not None:
                    batch, tail = coming
                    reached = self._capture()
                    if self.device is not None:
                        batch = operations.to_device(batch, self.device, non_blocking=self._non_blocking)
                    coming = next(source, None)
                    self.end_of_dataloader, self._tail = coming is None, tail
                    if self._run is run:  # nobody chose another epoch meanwhile
                        self._finished, self._snapshot = coming is None, reached
                        self._batches += self.per_round
                    if batch_comes is not None:
                        batch_comes(self, True)
                    yield batch
                    if batch_is_done is not None:
                        batch_is_done(self)
            if self._run is run:
                self._finished = True
            if batch_comes is not None:
                batch_comes(self, False)
        finally:
            if watcher is not None:
                watcher.loader_ends(self)

    def _capture(self) -> Any:
        return self.base_dataloader.state_dict() if self._stateful else None  # type: ignore[attr-defined]

    def _synchronize(self) -> None:
        """The random states that the user wants to be equal: orders are equal without it."""
        kinds = [kind for kind in self.rng_types or () if getattr(kind, "value", kind) != "generator"]
        if kinds:
            synchronize_rng_states(kinds)

    def _rounds(self, start: int, snapshot: Any) -> Generator[tuple[Any, Tail | None], None, None]:
        """This rank's batch of every round behind the first ``start`` batches."""
        raise NotImplementedError

    def _read(self, start: int, snapshot: Any) -> Generator[tuple[Any, Tail | None], None, None]:
        """The base loader's own batches behind ``start`` batches of the given loader."""
        base, shard, drop = self.base_dataloader, self._shard, 0
        if isinstance(shard, BatchSamplerShard):
            shard.start = start // self._source.per_index
        elif snapshot is not None:
            shard.skip(0)
            base.load_state_dict(snapshot)  # type: ignore[attr-defined]
        elif base.num_workers:
            drop = start // self._source.per_read
        else:
            shard.skip(start // self._source.per_index * (self._source.batch_size or 1))
        before = getattr(shard, "iterations", -1)
        for number, item in enumerate(base):
            own = getattr(shard, "iterations", 0) == before  # a subclass that reads something of its own
            if own and shard.num_processes > 1:
                raise DataError(
                    f"{type(base).__name__}.__iter__ does not read its sampler, so every rank would get all batches",
                    fix="pass dispatch_batches=True: rank 0 reads the loader, whatever it does, and sends batches",
                )
            if number < (start // self._source.per_read if own else drop):
                continue
            if own:
                yield item, tail_of([rows_of(item) or 1])
            elif isinstance(shard, IterableDatasetShard):
                yield (item.batch, item.tail) if isinstance(item, Counted) else (item, shard.tail)
            else:
                yield item, shard.rounds.popleft() if shard.rounds else None


def _unpickled(kind: type[PreparedLoader]) -> PreparedLoader:
    return kind.__new__(kind)
