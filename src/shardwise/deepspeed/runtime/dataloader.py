"""A loader that begins again when it has ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class RepeatingLoader:
    """Batches of a loader without end.

    Args:
        loader: anything that can be iterated over again. It has to have a batch.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.data_iter: Iterator[Any] = iter(loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __len__(self) -> int:
        return len(self.loader)

    def __next__(self) -> Any:
        try:
            return next(self.data_iter)
        except StopIteration:
            self.data_iter = iter(self.loader)
            return next(self.data_iter)
