"""What a loader of any make tells its Accelerator while it is read."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from shardwise.comm import World
from shardwise.data_loader.sampling import Tail, shares, tail_of


class DataLoaderStateMixin:
    """A loader that says when it is being read, and which batch is its last.

    Prepared loaders are that. So may be a script's own class, which then has a ``gradient_state`` (a
    :class:`~shardwise.state.GradientState`), calls :meth:`begin` before the first batch and :meth:`end` after the last,
    and sets ``end_of_dataloader`` before it yields the last one.

    Attributes:
        end_of_dataloader: the batch in hand is the last.
        remainder: samples of the last round that are not repeated; -1 if none is repeated, or nobody knows.
    """

    end_of_dataloader: bool = False
    remainder: Any = -1
    gradient_state: Any
    _drop_last: bool = False

    def reset(self) -> None:
        self.end_of_dataloader, self.remainder = False, -1

    def begin(self) -> None:
        """It is being read from now on."""
        self.reset()
        own: Any = self
        with suppress(AttributeError, TypeError):  # of loaders that do not say how long they are
            if not self._drop_last:
                length = getattr(own.dataset, "total_dataset_length", None)
                self.remainder = (len(own.dataset) if length is None else length) % own.total_batch_size
        self.gradient_state._add_dataloader(self)

    def end(self) -> None:
        """It is not any more. Needed after a loop that was left early, too."""
        self.gradient_state._remove_dataloader(self)

    def tail(self) -> Tail | None:
        """What the ranks hold of the batch in hand; ``None`` for equal batches of new samples."""
        if not self.end_of_dataloader or self.remainder < 1:
            return None
        ranks, own = World.current().size, getattr(self, "total_batch_size", None)
        if not isinstance(own, int) or own % ranks:
            return None
        return tail_of([own // ranks] * ranks, shares(self.remainder, ranks, own // ranks))
