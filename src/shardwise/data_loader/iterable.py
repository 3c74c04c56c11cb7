"""Which items of an iterable dataset belong to this rank, and how a worker process says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from shardwise.data_loader.epochs import EpochDataset
from shardwise.data_loader.sampling import Tail, check_split, padded, share, shares, tail_of
from shardwise.data_loader.streams import RandomStream


class IterableDatasetShard(IterableDataset[Any]):
    """This rank's items of an iterable dataset: of every round of items, the rank's own run.

    Every rank reads the whole stream, which must be the same everywhere, and keeps its share. A last round that is
    not full is completed with items from the stream's beginning.

    Args:
        dataset: the stream. Told the epoch if it has a ``set_epoch``; else its ``generator``, if it has one, is
            seeded with it.
        batch_size: items per rank and round, or per round with ``split_batches``.
        drop_last: leave out a short last round.
        num_processes: how many ranks there are.
        process_index: which one this is.
        split_batches: a round is ``batch_size`` items, not ``num_processes`` times as many.
        even_batches: complete a short last round; otherwise ranks may get fewer items, or none.

    Raises:
        DataError: ``split_batches`` with a batch size that the ranks do not divide.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        drop_last: bool = False,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
        even_batches: bool = True,
    ) -> None:
        if split_batches:
            check_split(batch_size, num_processes)
        self.dataset, self.batch_size, self.drop_last = dataset, batch_size, drop_last
        self.num_processes, self.process_index = num_processes, process_index
        self.split_batches, self.even_batches = split_batches, even_batches
        self.marks = False  # say of which round an item is, where that is not plain
        self.tail: Tail | None = None  # of the last round read, if this process read it
        self.seed: int | None = None  # the dataset draws from a stream of its own, if there is a seed
        self._plan = torch.zeros(2, dtype=torch.int64)  # epoch, and items to leave out at the beginning
        self._stream: RandomStream | None = None
        self._taken = 0  # items read in this iteration

    @property
    def epoch(self) -> int:
        return int(self._plan[0])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration, in workers that are running too if :meth:`reach_workers`."""
        self._plan[0] = epoch
        if callable(getattr(self.dataset, "set_epoch", None)):
            self.dataset.set_epoch(epoch)

    def skip(self, items: int) -> None:
        """Leave out items of the whole stream at the beginning of every iteration from now on."""
        self._plan[1] = items

    def reach_workers(self) -> None:
        """Let worker processes that stay alive between epochs see :meth:`set_epoch`."""
        self._plan.share_memory_()

    @property
    def part(self) -> int:
        """Items of this rank in a round."""
        return self.batch_size // self.num_processes if self.split_batches else self.batch_size

    def __len__(self) -> int:
        n, part = self.num_processes, self.part
        whole, rest = divmod(len(self.dataset), n * part)
        size = whole * part
        if not rest or self.drop_last:
            return size
        return size + (part if self.even_batches and n > 1 else shares(rest, n, part)[self.process_index])

    def _begin(self) -> tuple[Any, Any]:
        """The dataset's iterator, and the context to read it in; what to leave out is in ``_taken``."""
        epoch = self.epoch
        generator = getattr(self.dataset, "generator", None)
        if callable(getattr(self.dataset, "set_epoch", None)):
            self.dataset.set_epoch(epoch)
        elif isinstance(generator, torch.Generator):
            generator.manual_seed(((self.seed or 0) + epoch) % (1 << 63))
        context: Any = nullcontext()
        if self.seed is not None:
            worker = get_worker_info()
            context = self._stream = self._new_stream(epoch, worker.id if worker is not None else 0)
        self._taken = int(self._plan[1])
        with context:
            return self._open(), context

    def _new_stream(self, epoch: int, worker: int) -> RandomStream:
        return RandomStream(self.seed or 0, epoch, worker)

    def _open(self) -> Iterator[Any]:
        return iter(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        self.tail = None
        n, part = self.num_processes, self.part
        length = n * part
        source, context = self._begin()
        skipped, self._taken = self._taken, 0
        with context:
            first = list(islice(source, min(length, skipped)))
            for _ in islice(source, skipped - len(first)):
                pass
        self._taken = skipped
        while True:
            with context:
                group = list(islice(source, length))
            self._taken += len(group)
            if len(first) < length:
                first += group[: length - len(first)]
            if len(group) < length:
                break
            yield from share(group, self.process_index, part)
        if not group or self.drop_last:
            return
        real = shares(len(group), n, part)
        if self.even_batches and n > 1:
            group = padded(group, first, length)
            tail = self.tail = tail_of([part] * n, real)
        else:
            tail = self.tail = Tail(tuple(real), (0,) * n)
        for item in share(group, self.process_index, part):
            yield Marked(item, tail) if self.marks else item


class StatefulDatasetShard(IterableDatasetShard):
    """A shard that can say where it is, for torchdata's ``StatefulDataLoader``.

    Uses the ``state_dict`` of the dataset's iterator, or of the dataset, or counts what was read and reads it again.
    """

    _source: Any = None
    _resume: dict[str, Any] | None = None

    def _open(self) -> Iterator[Any]:
        resume, self._resume = self._resume or {"of": "nothing"}, None
        if resume["of"] == "dataset":
            self.dataset.load_state_dict(resume["state"])
        self._source = iter(self.dataset)
        if resume["of"] == "iterator":
            self._source.load_state_dict(resume["state"])
        elif resume["of"] == "items read":
            self._taken = resume["state"]
        return self._source

    def _new_stream(self, epoch: int, worker: int) -> RandomStream:
        stream = super()._new_stream(epoch, worker)
        if self._resume is not None and self._resume["random"] is not None:
            stream.load_state_dict(self._resume["random"])
        return stream

    def state_dict(self) -> dict[str, Any] | None:
        if self._source is None:
            return self._resume
        drawn = self._stream.state_dict() if self._stream is not None else None
        for of, holder in (("iterator", self._source), ("dataset", self.dataset)):
            if hasattr(holder, "state_dict") and hasattr(holder, "load_state_dict"):
                return {"of": of, "state": holder.state_dict(), "random": drawn}
        return {"of": "items read", "state": self._taken, "random": None}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._resume, self._source = state, None


class Marked:
    """An item of a round that is not plain."""

    __slots__ = ("item", "tail")

    def __init__(self, item: Any, tail: Tail | None) -> None:
        self.item, self.tail = item, tail


class Counted:
    """A batch that knows its round. Pins itself as its batch would."""

    def __init__(self, batch: Any, tail: Tail | None) -> None:
        self.batch, self.tail = batch, tail

    def pin_memory(self, device: Any = None) -> Counted:
        from torch.utils.data._utils.pin_memory import pin_memory

        return Counted(pin_memory(self.batch, device), self.tail)


class CountingCollate:
    """A collate function that takes marks off the items and puts one on the batch."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, items: Any) -> Any:
        if isinstance(items, Marked):  # batch_size=None: items come alone
            return Counted(self.collate(items.item), items.tail)
        if isinstance(items, list) and items and isinstance(items[0], Marked):
            return Counted(self.collate([mark.item for mark in items]), items[0].tail)
        return self.collate(items)


class WorkerInit:
    """A ``worker_init_fn`` that sees the user's dataset in ``get_worker_info()``, not the shard around it."""

    def __init__(self, init: Any) -> None:
        self.init = init

    def __call__(self, worker: int) -> None:
        info = get_worker_info()
        shard = getattr(info, "dataset", None)
        if isinstance(shard, (IterableDatasetShard, EpochDataset)):
            object.__setattr__(info, "dataset", shard.dataset)  # WorkerInfo refuses ordinary assignment
        if self.init is not None:
            self.init(worker)
