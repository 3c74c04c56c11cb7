"""Rank 0 reads, every rank gets its batch."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Generator, Iterator
from itertools import accumulate, islice, pairwise
from typing import Any

import torch

from shardwise import operations
from shardwise.comm import World
from shardwise.data_loader.build import Source, refuse_mesh
from shardwise.data_loader.loader import PreparedLoader
from shardwise.data_loader.messages import END, FAILED, Channel
from shardwise.data_loader.rows import has_rows, rows_of, take, unknown
from shardwise.data_loader.sampling import BatchSamplerShard, Tail, shares, tail_of
from shardwise.errors import CommError, DataError


class DataLoaderDispatcher(PreparedLoader):
    """A dataloader that rank 0 reads for all ranks.

    Rank 0 reads one batch per rank, or with ``split_batches`` one batch in all, and sends every rank its own. Batches
    are never joined, so their shapes may differ; they may hold whatever can be pickled. Samplers, datasets and
    collate functions run on rank 0 only. What fails there is raised there, and a :class:`DataError` on the others.

    With ``even_batches`` a batch of less than ``batch_size`` samples is filled up with its own samples, around and
    around, and ranks for which no batch is left get those of the last round again: the mean over the ranks is then
    nearly the mean over the samples that are left. Without it they end earlier. A short batch whose rows are not known
    is not filled up.

    Args:
        dataset: map-style or iterable.
        split_batches: cut each batch over the ranks.
        skip_batches: rounds to leave out at the beginning of every epoch.
        use_stateful_dataloader: read through torchdata's ``StatefulDataLoader``.
        slice_fn: cuts batches, for ``split_batches``: ``slice_fn(batch, slice, process_index=, num_processes=)``.
        iteration: the number of the first epoch.
        device: where batches go; those of a loader made by hand go to this rank's device.
        kwargs: those of ``DataLoader``.

    Raises:
        DataError: ``torch_device_mesh``, or other ranks than those that run.
        MissingPackage: torchdata is needed, and not installed.

    Cost: per rank and batch one message of the batch's bytes and 40 more.
    """

    def __init__(
        self,
        dataset: Any,
        split_batches: bool = False,
        skip_batches: int = 0,
        use_stateful_dataloader: bool = False,
        _drop_last: bool = False,
        _non_blocking: bool = False,
        slice_fn: Callable[..., Any] | None = None,
        torch_device_mesh: Any = None,
        iteration: int = 0,
        *,
        device: torch.device | None = None,
        rng_types: Any = None,
        even_batches: bool = True,
        num_processes: int | None = None,
        process_index: int | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_mesh(torch_device_mesh)
        world = World.current()
        self.num_processes = world.size if num_processes is None else num_processes
        self.process_index = world.rank if process_index is None else process_index
        if self.num_processes != world.size:
            raise DataError(
                f"dispatch_batches over {self.num_processes} ranks, where {world.size} run",
                fix="start as many processes, or pass dispatch_batches=False",
            )
        if slice_fn is not None and not split_batches:
            warnings.warn("slice_fn_for_dispatch cuts batches only with split_batches=True", stacklevel=3)
        source = dataset
        if not isinstance(source, Source):
            source = Source.by_hand(dataset, use_stateful_dataloader, kwargs, _drop_last)
            device = world.device if device is None else device
        source.ranks = self.num_processes
        source.per_round = 1 if split_batches else self.num_processes
        super().__init__(source, device, _non_blocking, rng_types)
        self.skip_batches, self.split_batches, self.slice_fn = skip_batches, split_batches, slice_fn
        self._even, self._epoch = even_batches, iteration
        self._in_rows = True  # the batches of this epoch hold one row per sample, as far as was seen
        self._channel = Channel(operations.from_first(random.SystemRandom().getrandbits(62)))

    def __len__(self) -> int:
        n, length = self.num_processes, len(self.base_dataloader)
        if self.split_batches:
            samples, size = self._shard.sampler if self._maps else self.dataset, self._source.batch_size
            if self._even or self._source.drop_last or size is None or not hasattr(samples, "__len__"):
                return length
            return length - (0 < len(samples) % size <= self.process_index)
        if self._source.drop_last:
            return length // n
        return -(-length // n) if self._even else length // n + (self.process_index < length % n)

    @property
    def even_batches(self) -> bool:
        return self._even

    @even_batches.setter
    def even_batches(self, value: bool) -> None:
        self._even = value

    @property
    def _maps(self) -> bool:
        return isinstance(self._shard, BatchSamplerShard)

    @property
    def _stateful(self) -> bool:
        return self.process_index == 0 and super()._stateful

    # --- reading ---------------------------------------------------------------------------
    def _rounds(self, start: int, snapshot: Any) -> Generator[tuple[Any, Tail | None], None, None]:
        self._channel.begin()
        return self._lead(start, snapshot) if self.process_index == 0 else self._follow()

    def _lead(self, start: int, snapshot: Any) -> Generator[tuple[Any, Tail | None], None, None]:
        source = self._read(start, snapshot)
        channel = self._channel
        self._in_rows = True
        live = list(range(1, self.num_processes))
        try:
            while True:
                try:
                    batches, tail = self._split(source) if self.split_batches else self._deal(source)
                    if batches and len(live) < self.num_processes - 1:
                        raise DataError(
                            "a batch in the middle of the epoch has fewer samples than there are ranks",
                            fix="pass even_batches=True, or larger batches",
                        )
                    channel.send([(r, (batches[r], tail)) for r in live if r < len(batches)])
                except CommError:
                    raise
                except BaseException as error:
                    channel.send([(r, f"{type(error).__name__}: {error}") for r in live], FAILED)
                    raise
                channel.send([(r, None) for r in live if r >= len(batches)], END)
                channel.number += 1
                live = [r for r in live if r < len(batches)]
                if not batches:
                    return
                yield batches[0], tail
        finally:
            channel.flush()  # a rank that ends with bytes on their way would leave the others without them

    def _deal(self, source: Iterator[tuple[Any, Tail | None]]) -> tuple[list[Any], Tail | None]:
        """The ranks' batches of the next round; fewer than there are ranks if some have reached their end."""
        n, size = self.num_processes, self._source.batch_size
        group, rows = [], []
        for batch, tail in islice(source, n):
            group.append(batch)
            rows.append(tail.rows[0] if tail is not None else size or 1)
        if not group or (len(group) < n and self._source.drop_last):
            return [], None
        if n == 1:
            return group, tail_of(rows)
        real = rows + [0] * (n - len(rows))
        if self._even:
            for i, (batch, count) in enumerate(zip(group, rows, strict=True)):
                # Of one sample, dim 0 may have one row for another reason: a batch of more tells.
                if self._in_rows and count > 1:
                    self._in_rows = has_rows(batch, count)
                if size is not None and count < size and self._in_rows and has_rows(batch, count):
                    group[i], rows[i] = take(batch, [k % count for k in range(size)], count), size
            m = len(group)
            group += [group[i % m] for i in range(m, n)]
            rows += [rows[i % m] for i in range(m, n)]
        else:
            rows = real
        return group, tail_of(rows, real)

    def _split(self, source: Iterator[tuple[Any, Tail | None]]) -> tuple[list[Any], Tail | None]:
        """The ranks' parts of the next batch."""
        n, size = self.num_processes, self._source.batch_size
        even = self._even and n > 1
        found = next(source, None)
        if found is None:
            return [], None
        batch, tail = found
        read = tail.rows[0] if tail is not None else size or 1
        # One index without a batch size may stand for a whole batch, made by the dataset.
        count = rows_of(batch) if size is None and read == 1 else read
        if n == 1 and self.slice_fn is None:
            return [batch], tail_of([count or 1])
        if count is None or count < 1:
            raise unknown(batch)
        part = -(-(size if even and size is not None else count) // n)
        real = shares(count, n, part)
        rows = real
        again = even and count < n * part
        if again and (self.slice_fn is None or has_rows(batch, count)):
            batch = take(batch, [k % count for k in range(n * part)], count)
            count, rows = n * part, [part] * n
        if not even:  # as even as it goes
            rows = real = [count // n + (r < count % n) for r in range(n)]
        ends = list(accumulate(rows, initial=0))
        cuts = [slice(a, b) for a, b in pairwise(ends) if b > a]
        if again:  # only slice_fn can cut it: the ranks that are left without rows get those of others
            m = len(cuts)
            cuts += [cuts[r % m] for r in range(m, n)]
            rows = [c.stop - c.start for c in cuts]
        if self.slice_fn is None:
            return [take(batch, range(c.start, c.stop), count) for c in cuts], tail_of(rows, real)
        parts = [self.slice_fn(batch, c, process_index=r, num_processes=n) for r, c in enumerate(cuts)]
        return parts, tail_of(rows, real)

    def _follow(self) -> Generator[tuple[Any, Tail | None], None, None]:
        while True:
            kind, item = self._channel.receive()
            if kind == END:
                return
            if kind == FAILED:
                raise DataError(
                    f"rank 0 could not read the next batch: {item}",
                    where=f"rank {self.process_index}",
                    fix="see the error of rank 0, which reads this dataloader for all ranks",
                )
            yield item
