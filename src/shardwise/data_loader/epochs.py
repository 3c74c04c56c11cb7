"""The epoch of a map-style dataset, in worker processes that stay alive between epochs."""

from __future__ import annotations

from typing import Any

import torch


class EpochDataset:
    """A dataset whose copy in a worker process is told the epoch too, before it is asked for a sample of it.

    Everything else is the dataset's own.

    Args:
        dataset: map-style, with a ``set_epoch``.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._told: int | None = None

    def begin(self, epoch: int) -> None:
        """In the main process, before workers are asked for samples of this epoch."""
        self._epoch[0] = epoch

    def _current(self) -> Any:
        epoch = int(self._epoch[0])
        if epoch != self._told:
            self._told = epoch
            self.dataset.set_epoch(epoch)
        return self.dataset

    def __getattr__(self, name: str) -> Any:
        if name == "__getitems__":
            return getattr(self._current(), name)
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._current()[index]
