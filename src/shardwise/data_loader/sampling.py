"""Which samples of a map-style dataset belong to this rank.

A batch sampler's stream is cut into *rounds*: what all ranks read in one step. The last round may be short; what
happens to it is ``drop_last`` and ``even_batches``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Protocol

from torch.utils.data import BatchSampler

from shardwise.errors import DataError


@dataclass(frozen=True)
class Tail:
    """A round that is not simply equal batches of new samples: what every rank holds of it, the same everywhere.

    Attributes:
        rows: how many samples each rank holds; 0 for a rank that has run out of batches.
        repeated: how many of them, at the end of the rank's batch, are there for the second time.
    """

    rows: tuple[int, ...]
    repeated: tuple[int, ...]

    @property
    def total(self) -> int:
        """Samples that all ranks hold."""
        return sum(self.rows)

    @property
    def real(self) -> int:
        """Samples among them that were not seen before in this epoch."""
        return self.total - sum(self.repeated)

    @property
    def cuts(self) -> bool:
        """It is another round than one of equal batches of new samples."""
        return not self.equal or any(self.repeated)

    @property
    def equal(self) -> bool:
        """All ranks hold equally many."""
        return len(set(self.rows)) == 1


def tail_of(rows: Sequence[int], real: Sequence[int] | None = None) -> Tail | None:
    """The :class:`Tail` of a round; ``None`` for several ranks with equal batches of new samples."""
    tail = Tail(tuple(rows), tuple(n - m for n, m in zip(rows, real, strict=True)) if real else (0,) * len(rows))
    return None if len(rows) > 1 and tail.equal and not any(tail.repeated) else tail


def share(items: Sequence[Any], rank: int, size: int) -> list[Any]:
    """Part ``rank`` of ``items`` cut into runs of ``size``; the last may be short or empty."""
    return list(items[rank * size : (rank + 1) * size])


def shares(count: int, ranks: int, size: int) -> list[int]:
    """How long :func:`share` is for each rank."""
    return [min(max(count - r * size, 0), size) for r in range(ranks)]


def padded(items: Sequence[Any], source: Sequence[Any], length: int) -> list[Any]:
    """``items`` made ``length`` long with those from ``source``, around and around."""
    return [*items, *islice(cycle(source), length - len(items))]


def _joined(batches: Sequence[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


def check_split(size: int | None, ranks: int) -> None:
    """Raise if batches of ``size`` cannot be cut into ``ranks`` equal parts."""
    if size is None or size % ranks:
        raise DataError(
            f"split_batches cuts batches of {size} samples over {ranks} ranks",
            fix=f"choose a batch size that {ranks} divides, or leave split_batches out",
        )


class Reader(Protocol):
    """Reads a sampler in a random state of its own."""

    def iterate(self, items: Any) -> Iterator[Any]: ...


_OF_A_SHARD = frozenset(
    ("batch_sampler", "num_processes", "process_index", "split_batches", "even_batches", "batch_size", "drop_last",
     "start", "rounds", "iterations", "stream")
)  # fmt: skip


class BatchSamplerShard(BatchSampler):
    """This rank's batches of a batch sampler. Attributes that are not described here are the batch sampler's.

    By default batch *i* goes to rank *i* mod n, so a round has n batches. With ``split_batches`` every batch is cut
    in n parts, and a round is one batch.

    Args:
        batch_sampler: yields lists of indices, the same on every rank.
        num_processes: n, how many ranks there are.
        process_index: which one this is.
        split_batches: cut each batch.
        even_batches: complete the last round with samples from the epoch's beginning, so that every rank has
            equally many batches of equal size. Without it ranks may end at different times. May be changed between
            epochs. One rank alone has nothing to even out.

    Attributes:
        start: batches of ``batch_sampler`` that the next iteration leaves out at its beginning.
        rounds: for each batch handed out and not yet asked for by the loader, its :class:`Tail` or ``None``.
        stream: the random state that ``batch_sampler`` is read in, so that it stays the script's own object and no
            wrapper around it.

    Raises:
        DataError: ``split_batches`` with a batch size that n does not divide.
    """

    def __init__(
        self,
        batch_sampler: Any,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
        even_batches: bool = True,
    ) -> None:
        self.batch_sampler, self.num_processes, self.process_index = batch_sampler, num_processes, process_index
        self.split_batches, self.even_batches = split_batches, even_batches
        self.batch_size: int | None = getattr(batch_sampler, "batch_size", None)  # type: ignore[assignment]
        self.drop_last: bool = bool(getattr(batch_sampler, "drop_last", False))
        self.start = 0
        self.rounds: deque[Tail | None] = deque()
        self.iterations = 0
        self.stream: Reader | None = None
        if split_batches:
            check_split(self.batch_size, num_processes)

    def __getattr__(self, name: str) -> Any:
        """What the user's own batch sampler has besides."""
        if name.startswith("__") or name == "batch_sampler":
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)

    def __setattr__(self, name: str, value: Any) -> None:
        theirs = name not in _OF_A_SHARD and not hasattr(type(self), name) and hasattr(self.batch_sampler, name)
        if theirs:
            setattr(self.batch_sampler, name, value)
        else:
            object.__setattr__(self, name, value)

    @property
    def sampler(self) -> Any:
        """The sampler behind the batch sampler, if it has one."""
        return getattr(self.batch_sampler, "sampler", None)

    @sampler.setter
    def sampler(self, sampler: Any) -> None:
        self.batch_sampler.sampler = sampler

    @property
    def total_length(self) -> int:
        """Batches of all ranks."""
        return len(self.batch_sampler)

    @property
    def per_round(self) -> int:
        """Batches of ``batch_sampler`` that make a round."""
        return 1 if self.split_batches else self.num_processes

    def __len__(self) -> int:
        n = len(self.batch_sampler)
        if not self.split_batches:
            if self.drop_last:
                return n // self.num_processes
            if self.even_batches:
                return -(-n // self.num_processes)
            return n // self.num_processes + (self.process_index < n % self.num_processes)
        if self.even_batches or self.drop_last or not hasattr(self.sampler, "__len__"):
            return n
        part = (self.batch_size or 0) // self.num_processes
        rest = len(self.sampler) % (self.batch_size or 1)
        return n - (0 < rest <= self.process_index * part)

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0
        self.iterations += 1
        rounds: deque[Tail | None] = deque()
        self.rounds = rounds
        for batch, tail in self._split(start) if self.split_batches else self._deal(start):
            if batch:
                rounds.append(tail)
                yield batch

    def _batches(self) -> Iterator[Any]:
        return iter(self.batch_sampler) if self.stream is None else self.stream.iterate(self.batch_sampler)

    def _deal(self, start: int) -> Iterator[tuple[list[int], Tail | None]]:
        n, rank = self.num_processes, self.process_index
        first: list[list[int]] = []
        group: list[list[int]] = []
        for index, batch in enumerate(self._batches()):
            if len(group) == n:  # there is more, so this one is not the last
                yield group[rank], tail_of([len(b) for b in group])
                group = []
            if len(first) < n:
                first.append(list(batch))
            if index >= start:
                group.append(list(batch))
        if not group:
            return
        size = self.batch_size
        short = len(group) < n or (size is not None and len(group[-1]) < size)
        if not short or not self.even_batches or n == 1:
            if not (short and self.drop_last):
                group += [[]] * (n - len(group))
                yield group[rank], tail_of([len(b) for b in group])
        elif not self.drop_last:
            if size is None:  # batches of any size: repeat whole ones
                mine = padded(group, first, n)
                real = [len(b) for b in group] + [0] * (n - len(group))
                yield mine[rank], tail_of([len(b) for b in mine], real)
            else:
                samples = _joined(group)
                tail = tail_of([size] * n, shares(len(samples), n, size))
                yield share(padded(samples, _joined(first), n * size), rank, size), tail

    def _split(self, start: int) -> Iterator[tuple[list[int], Tail | None]]:
        assert self.batch_size is not None
        n, rank = self.num_processes, self.process_index
        part = self.batch_size // n
        first: list[int] = []
        for index, batch in enumerate(self._batches()):
            samples = list(batch)
            first = first or samples
            if index < start:
                continue
            real = shares(len(samples), n, part)
            if len(samples) < self.batch_size and self.even_batches and n > 1:
                yield share(padded(samples, first, self.batch_size), rank, part), tail_of([part] * n, real)
            else:
                yield share(samples, rank, part), tail_of(real)


class SkipBatchSampler(BatchSampler):
    """A batch sampler without its first batches.

    Args:
        batch_sampler: yields lists of indices.
        skip_batches: how many to leave out in every iteration.
    """

    def __init__(self, batch_sampler: Any, skip_batches: int = 0) -> None:
        self.batch_sampler, self.skip_batches = batch_sampler, skip_batches

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "batch_sampler":
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)

    @property
    def total_length(self) -> int:
        return len(self.batch_sampler)

    def __len__(self) -> int:
        return max(len(self.batch_sampler) - self.skip_batches, 0)

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.batch_sampler), self.skip_batches, None)


class Listed:
    """A sampler whose items may be anything, seen as batches of one item each."""

    def __init__(self, items: Any) -> None:
        self.sampler = items

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[Any]]:
        return ([item] for item in self.sampler)


class Unlisted:
    """The way back from :class:`Listed`."""

    def __init__(self, shard: BatchSamplerShard) -> None:
        self.shard = shard

    def __len__(self) -> int:
        return len(self.shard)

    def __iter__(self) -> Iterator[Any]:
        return (items[0] for items in self.shard)


def get_sampler(dataloader: Any) -> Any:
    """The sampler that a dataloader's order comes from: the one inside its batch sampler, if it has one."""
    batches = dataloader.sampler if isinstance(dataloader.sampler, BatchSampler) else dataloader.batch_sampler
    while isinstance(batches, BatchSamplerShard):
        batches = batches.batch_sampler
    return getattr(batches, "sampler", None)
