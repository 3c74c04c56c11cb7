"""Which samples of a global batch belong to this rank.

Both shards cut a stream into *global batches* and hand each rank its part. The last global batch may be short;
what happens to it is ``drop_last`` and ``even_batches``, the same for map-style and iterable datasets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from torch.utils.data import IterableDataset, Sampler

from shardwise.errors import DataError


@dataclass(frozen=True)
class Tail:
    """The last global batch of an epoch: ``real`` samples of the dataset among ``total`` that the ranks saw."""

    real: int
    total: int


def _share(items: Sequence[Any], rank: int, size: int) -> list[Any]:
    return list(items[rank * size : (rank + 1) * size])


def _padded(items: Sequence[Any], source: Sequence[Any], length: int) -> list[Any]:
    """``items`` made ``length`` long with samples from the beginning of the epoch, around and around."""
    return [*items, *islice(cycle(source), length - len(items))]


def _joined(batches: Sequence[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


class BatchShard(Sampler[list[int]]):
    """This rank's batches of a batch sampler.

    By default batch *i* goes to rank *i* mod n, so the global batch is n times as large. With
    ``split_batches`` every batch is cut in n parts, and the global batch stays as large as it was.

    Args:
        batches: yields lists of indices, the same on every rank.
        ranks, rank: how many ranks there are, and which one this is.
        split_batches: cut each batch.
        even_batches: complete the last global batch with samples from the epoch's beginning, so that every
            rank has equally many batches of equal size. Without it ranks may end at different times.

    Raises:
        DataError: ``split_batches`` with a batch size that n does not divide.
    """

    def __init__(
        self, batches: Any, ranks: int, rank: int, split_batches: bool = False, even_batches: bool = True
    ) -> None:
        self.batches, self.ranks, self.rank = batches, ranks, rank
        self.split_batches, self.even_batches = split_batches, even_batches
        self.batch_size: int | None = getattr(batches, "batch_size", None)
        self.drop_last: bool = getattr(batches, "drop_last", False)
        self.tail: Tail | None = None  # of the epoch under way, known once its last batch was asked for
        if split_batches and (self.batch_size is None or self.batch_size % ranks):
            raise DataError(
                f"split_batches cuts batches of {self.batch_size} samples over {ranks} ranks",
                fix=f"choose a batch size that {ranks} divides, or leave split_batches out",
            )

    def __len__(self) -> int:
        n = len(self.batches)
        if self.split_batches:
            return n
        if self.drop_last:
            return n // self.ranks
        if self.even_batches:
            return -(-n // self.ranks)
        return n // self.ranks + (self.rank < n % self.ranks)

    def __iter__(self) -> Iterator[list[int]]:
        self.tail = None
        return self._split() if self.split_batches else self._deal()

    def _deal(self) -> Iterator[list[int]]:
        first: list[list[int]] = []
        group: list[list[int]] = []
        for batch in self.batches:
            if len(group) == self.ranks:  # there is more, so this one is not the last
                first = first or group
                yield group[self.rank]
                group = []
            group.append(list(batch))
        if not group:
            return
        first = first or group
        real = sum(len(b) for b in group)
        size = self.batch_size
        short = len(group) < self.ranks or (size is not None and len(group[-1]) < size)
        if not short or not self.even_batches:
            if not (short and self.drop_last):
                self.tail = Tail(real, real)
                if self.rank < len(group):
                    yield group[self.rank]
        elif not self.drop_last:
            if size is None:  # batches of any size: repeat whole ones
                mine = _padded(group, first, self.ranks)
                self.tail = Tail(real, sum(len(b) for b in mine))
                yield mine[self.rank]
            else:
                self.tail = Tail(real, self.ranks * size)
                samples = _padded(_joined(group), _joined(first), self.ranks * size)
                yield _share(samples, self.rank, size)

    def _split(self) -> Iterator[list[int]]:
        assert self.batch_size is not None
        part = self.batch_size // self.ranks
        first: list[int] = []
        last: list[int] = []
        for batch in self.batches:
            if last:
                yield _share(last, self.rank, part)
            last = list(batch)
            first = first or last
        if not last:
            return
        self.tail = Tail(len(last), self.batch_size if self.even_batches else len(last))
        samples = _padded(last, first, self.batch_size) if self.even_batches else last
        if mine := _share(samples, self.rank, part):
            yield mine


class IterableShard(IterableDataset[Any]):
    """This rank's samples of an iterable dataset: of every n times ``batch_size`` items, the rank's own run.

    Every rank reads the whole stream, which must be the same everywhere, and keeps its share.

    Args:
        dataset: the stream.
        ranks, rank: how many ranks there are, and which one this is.
        batch_size: items per rank and batch.
        drop_last: leave out a short last global batch.
        even_batches: complete it with items from the stream's beginning.
    """

    def __init__(
        self, dataset: Any, ranks: int, rank: int, batch_size: int, drop_last: bool = False, even_batches: bool = True
    ) -> None:
        self.dataset, self.ranks, self.rank, self.batch_size = dataset, ranks, rank, batch_size
        self.drop_last, self.even_batches = drop_last, even_batches
        self.tail: Tail | None = None

    def __len__(self) -> int:
        whole, rest = divmod(len(self.dataset), self.ranks * self.batch_size)
        size = whole * self.batch_size
        if not rest or self.drop_last:
            return size
        if self.even_batches:
            return size + self.batch_size
        return size + min(max(rest - self.rank * self.batch_size, 0), self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        self.tail = None
        length = self.ranks * self.batch_size
        first: list[Any] = []
        buffer: list[Any] = []
        for item in self.dataset:
            if len(buffer) == length:  # there is more, so this one is not the last
                first = first or buffer
                yield from _share(buffer, self.rank, self.batch_size)
                buffer = []
            buffer.append(item)
        if not buffer or (len(buffer) < length and self.drop_last):
            return
        real = len(buffer)
        if real < length and self.even_batches:
            buffer = _padded(buffer, first or buffer, length)
        self.tail = Tail(real, len(buffer))
        yield from _share(buffer, self.rank, self.batch_size)
