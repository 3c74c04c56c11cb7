"""Values that are not those of any step: an update failed, or a load ended half way.

Whatever holds them is marked, and every use raises one error, until a load is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from shardwise.errors import ShardwiseError, UpdateFailed


@dataclass(frozen=True)
class Failure:
    """Why. Text only: an exception would keep its frames, and what they hold, in memory.

    Args:
        what, where, fix: of the error.
        kind: its class.
        look: called before it is raised: it may turn out that nothing has changed, and take the mark away.
    """

    what: str
    where: str
    fix: str
    kind: type[ShardwiseError] = UpdateFailed
    look: Callable[[], object] | None = None

    @classmethod
    def of_update(
        cls,
        optimizer: str,
        where: str,
        error: BaseException | None = None,
        look: Callable[[], object] | None = None,
    ) -> Failure:
        """The update of an optimizer, by the name of its class. Without ``error``: it has not ended."""
        if error is None:
            cause = "ended in an exception"
        else:
            text = error.what if isinstance(error, ShardwiseError) else str(error)
            first = text.splitlines()[0] if text else ""
            cause = f"failed ({type(error).__name__}{': ' if first else ''}{first})"
        return cls(
            f"an update by {optimizer} {cause}, so the values are those of no step",
            where,
            "load a checkpoint into the model and its optimizer: "
            "shardwise.checkpoint.load(path, models=[model], optimizers=[optimizer])",
            look=look,
        )

    def error(self) -> ShardwiseError:
        return self.kind(self.what, where=self.where, fix=self.fix)


class Fallible(Protocol):
    """What can be marked: a unit, or what is remembered of an optimizer."""

    failure: Failure | None


def require_valid(*holders: Fallible) -> None:
    """Raise if one of them is marked.

    Raises:
        UpdateFailed: an update failed.
        CheckpointError: a load ended half way.
    """
    for holder in holders:
        if holder.failure is not None and holder.failure.look is not None:
            holder.failure.look()
        if holder.failure is not None:
            raise holder.failure.error()


class Recovery:
    """A load that is to replace everything its holders have.

    Attributes:
        complete: it did. Otherwise marks come back.
    """

    def __init__(self) -> None:
        self.complete = False


@contextmanager
def recovering(holders: Iterable[Fallible]) -> Iterator[Recovery]:
    """Marks are off inside the block, and come back after it unless the load was ``complete``."""
    before = [(holder, holder.failure) for holder in holders if holder.failure is not None]
    for holder, _ in before:
        holder.failure = None
    recovery = Recovery()
    try:
        yield recovery
    finally:
        for holder, failure in before:
            if not recovery.complete and holder.failure is None:
                holder.failure = failure
