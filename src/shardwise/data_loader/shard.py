"""The loader of which every rank reads its own batches."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch

from shardwise.comm import World
from shardwise.data_loader.already_split import in_step, untold
from shardwise.data_loader.build import Source, refuse_mesh
from shardwise.data_loader.loader import PreparedLoader
from shardwise.data_loader.sampling import Tail


class DataLoaderShard(PreparedLoader):
    """A dataloader of which every rank reads its own batches.

    Made by :func:`~shardwise.data_loader.prepare_data_loader`; or by hand, around samplers that yield this rank's
    share already.

    Args:
        dataset: map-style or iterable.
        device: where batches go, or ``None`` to leave them.
        rng_types: random states made equal on all ranks before each epoch: ``torch``, ``cuda``, ... Orders are equal
            without it.
        synchronized_generator: not needed here, accepted as elsewhere.
        skip_batches: batches of this rank to leave out at the beginning of every epoch.
        use_stateful_dataloader: read through torchdata's ``StatefulDataLoader``.
        iteration: the number of the first epoch.
        kwargs: those of ``DataLoader``.

    Raises:
        DataError: ``torch_device_mesh``, which is not supported.
        MissingPackage: torchdata is needed, and not installed.
    """

    def __init__(
        self,
        dataset: Any,
        device: torch.device | None = None,
        rng_types: Any = None,
        synchronized_generator: Any = None,
        skip_batches: int = 0,
        use_stateful_dataloader: bool = False,
        _drop_last: bool = False,
        _non_blocking: bool = False,
        torch_device_mesh: Any = None,
        iteration: int = 0,
        **kwargs: Any,
    ) -> None:
        refuse_mesh(torch_device_mesh)
        source = dataset
        if not isinstance(source, Source):
            source = Source.by_hand(dataset, use_stateful_dataloader, kwargs, _drop_last)
        super().__init__(source, device, _non_blocking, rng_types)
        self.synchronized_generator, self.skip_batches, self._epoch = synchronized_generator, skip_batches, iteration

    def _rounds(self, start: int, snapshot: Any) -> Generator[tuple[Any, Tail | None], None, None]:
        own, source = self._read(start, snapshot), self._source
        if not source.in_step:
            return own
        if World.current().join is not None:  # ranks may run out one by one there: that is what it is for
            return untold(own)
        return in_step(own, source.batch_size, self.even_batches, source.drop_last)
