"""Loaders whose samples were split over the ranks before they came to us: read as they are, never split again."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from shardwise import operations
from shardwise.comm import World
from shardwise.data_loader.messages import exchange
from shardwise.data_loader.rows import take
from shardwise.data_loader.sampling import BatchSamplerShard, Listed, SkipBatchSampler, Tail, tail_of
from shardwise.errors import DataError

_INNER_SAMPLERS = ("sampler", "batch_sampler", "base_sampler", "_sampler")
_MARKS = ("_distributed", "distributed")


@dataclass(frozen=True)
class Split:
    """Who has split a loader's samples.

    Attributes:
        by: the ``DistributedSampler``, or the iterable dataset that says it is one rank's share.
        replicas: over how many; ``None`` if it does not say (a sampler of a user's own class, which chooses itself).
        rank: whose share this one is; ``None`` likewise.
    """

    by: Any
    replicas: int | None
    rank: int | None

    def agree(self, ranks: int) -> tuple[int, ...]:
        """Whose share each rank reads. A collective of a few bytes.

        Raises:
            DataError: on every rank, if the shares are not those of ``ranks`` ranks, each once.
        """
        found = [(self.replicas, r) for r in range(ranks)]
        if ranks == World.current().size:  # otherwise ranks are only played, in one process
            found = operations.gather_object((self.replicas, self.rank))
        found = [(ranks, r) if share == (None, None) else share for r, share in enumerate(found)]
        if sorted(found) != [(ranks, r) for r in range(ranks)]:
            shares = ", ".join(f"{rank} of {replicas}" for replicas, rank in found)
            raise DataError(
                f"a {type(self.by).__name__} has split the samples, but the {ranks} ranks would read shares {shares}",
                fix="split by the number of processes and this process's index, or leave the splitting to prepare",
            )
        return tuple(rank for _, rank in found)


def split_already(loader: DataLoader[Any]) -> Split | None:
    """Who has split a loader's samples over ranks: a ``DistributedSampler`` at any depth, or its iterable dataset."""
    if isinstance(loader.dataset, IterableDataset):
        for part in _reachable([loader.dataset], ("dataset",)):
            for name in _MARKS:
                mark = getattr(part, name, None)
                rank, replicas = getattr(mark, "rank", None), getattr(mark, "world_size", None)
                if isinstance(rank, int) and isinstance(replicas, int):
                    return Split(part, replicas, rank) if replicas > 1 else None
        return None
    for part in _reachable([loader.batch_sampler, loader.sampler], _INNER_SAMPLERS):
        if isinstance(part, DistributedSampler):
            # Subclasses are found that never call the base's __init__: they yield this rank's share, and say no more.
            replicas, rank = getattr(part, "num_replicas", None), getattr(part, "rank", None)
            if not isinstance(replicas, int) or not isinstance(rank, int):
                replicas = rank = None
            return Split(part, replicas, rank) if replicas != 1 else None
    return None


def _reachable(parts: list[Any], names: tuple[str, ...]) -> Iterator[Any]:
    seen: set[int] = set()
    while parts:
        part = parts.pop(0)
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        parts += [getattr(part, name, None) for name in names]


@dataclass(frozen=True)
class Plan:
    """What every rank reads of a ``DistributedSampler`` whose shares are equally long, through batches in its order.

    Attributes:
        count: samples per rank.
        real: for each rank, how many of them are not there for the second time. The repeats come last.
        size: of a batch.
        drop_last: a short last batch is left out.
        skipped: batches left out at the beginning.
    """

    count: int
    real: tuple[int, ...]
    size: int
    drop_last: bool
    skipped: int

    def tail(self, batch: int) -> Tail | None:
        done = (batch + self.skipped) * self.size
        rows = min(self.count - done, self.size)
        return tail_of([rows] * len(self.real), [min(max(real - done, 0), rows) for real in self.real])

    @classmethod
    def of(cls, split: Split, batches: Any, shares: tuple[int, ...]) -> Plan | None:
        """The plan of a loader's batches; ``None`` if lengths or sizes say that they are made otherwise."""
        sampler, skipped = split.by, 0
        while isinstance(batches, SkipBatchSampler):
            batches, skipped = batches.batch_sampler, skipped + batches.skip_batches
        parts = list(_reachable([batches], _INNER_SAMPLERS))
        size = 1 if isinstance(batches, Listed) else _first(parts, "batch_size")
        drop_last = bool(_first(parts, "drop_last")) if not isinstance(batches, Listed) else False
        n, total, dataset = split.replicas, getattr(sampler, "total_size", None), getattr(sampler, "dataset", None)
        if n is None or not isinstance(total, int) or not isinstance(size, int) or size < 1 or total % n:
            return None
        count = total // n
        samples = [part for part in parts if _length(part) is not None]
        whole = count // size if drop_last else -(-count // size)
        if {_length(part) for part in samples} - {whole, count} or _length(batches) != whole:
            return None
        length = _length(dataset)
        if length is None or _length(sampler) != count:
            return None
        real = tuple(len(range(rank, min(length, total), n)) for rank in shares)
        return cls(count, real, size, drop_last, skipped)


def _first(parts: list[Any], name: str) -> Any:
    return next((found for part in parts if (found := getattr(part, name, None)) is not None), None)


def _length(part: Any) -> int | None:
    try:
        return len(part)
    except TypeError:
        return None


class OwnBatches(BatchSamplerShard):
    """Batches that are this rank's already, each with what all ranks hold of its round.

    Args:
        batch_sampler: yields this rank's lists of indices.
        plan: what every rank reads, if it is known.
        even_batches: see :func:`in_step`, which is told.
    """

    def __init__(self, batch_sampler: Any, plan: Plan | None, even_batches: bool) -> None:
        super().__init__(batch_sampler, even_batches=even_batches)
        self.plan = plan

    def _deal(self, start: int) -> Iterator[tuple[list[int], Tail | None]]:
        for index, batch in enumerate(self._batches()):
            if index >= start:
                own = list(batch)
                yield own, tail_of([len(own)]) if self.plan is None else self.plan.tail(index)


def untold(source: Generator[tuple[Any, Tail | None], None, None]) -> Generator[tuple[Any, None], None, None]:
    """This rank's own batches, with nothing said about the others'."""
    with closing(source):
        for batch, _ in source:
            yield batch, None


def in_step(
    source: Generator[tuple[Any, Tail | None], None, None], size: int | None, even: bool, drop_last: bool
) -> Generator[tuple[Any, Tail | None], None, None]:
    """The rounds of loaders that the ranks read for themselves, of which nobody knows how long the others' are.

    With ``even`` a short batch is filled up with its own samples, and a rank that has run out gets its last batch
    again, so that all ranks have equally many, equally large batches. Without it they end when they end.

    Args:
        source: this rank's batches; a tail counts the samples of one that is not of ``size``.
        size: samples in a batch; ``None`` for single items.
        drop_last: end with the rank that ends first.

    Raises:
        DataError: on every rank, if one has no batch at all that it could repeat.

    Cost: a message of a few bytes per rank and round, between hosts.
    """
    world = World.current()
    live = list(range(world.size))
    last: tuple[Any, int] | None = None
    with closing(source):
        while True:
            found = next(source, None)
            batch, tail = found if found is not None else (None, None)
            own = 0 if found is None else tail.rows[0] if tail is not None else size or 1
            told = dict(zip(live, exchange(own, live), strict=True))
            real = [told.get(r, 0) for r in range(world.size)]
            if not any(real) or (even and drop_last and not all(real)):
                return
            rows = real
            if even:
                rows = [max(size or 1, *real)] * world.size
                if last is None and not all(real):
                    raise DataError(
                        f"the samples were split before, and rank {real.index(0)} has got none",
                        where=f"rank {world.rank}",
                        fix="use fewer ranks, pass even_batches=False, or leave the splitting to prepare",
                    )
                if own == 0:
                    assert last is not None
                    batch, own = last
                if own < rows[0]:
                    batch, own = take(batch, [k % own for k in range(rows[0])], own), rows[0]
                elif own > rows[0]:
                    batch, own = take(batch, range(rows[0]), own), rows[0]
                last = batch, own
            elif own == 0:
                return
            live = live if even else [r for r in live if real[r]]
            yield batch, tail_of(rows, real)
