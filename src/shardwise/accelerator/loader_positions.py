"""Which loaders are prepared, and which of them a saved position belongs to.

Loaders are known as long as somebody else holds them: an ``evaluate()`` that prepares its own every time leaves none
behind. Positions are kept in the order of preparation. A run that is resumed has not prepared yet what the saving one
prepared last, for its evaluation say, so those at the end may be missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

from torch.utils.data import IterableDataset

from shardwise.data_loader import PreparedLoader
from shardwise.errors import CheckpointError


class KnownLoaders:
    """The prepared loaders that somebody still holds, in the order in which they were prepared.

    One that was unpickled holds them itself: nobody else can.
    """

    def __init__(self) -> None:
        self._known: list[ref[PreparedLoader]] = []
        self._unpickled: list[PreparedLoader] = []

    def __getstate__(self) -> list[PreparedLoader]:
        return list(self)

    def __setstate__(self, loaders: list[PreparedLoader]) -> None:
        self._known, self._unpickled = [ref(loader) for loader in loaders], loaders

    def __iter__(self) -> Iterator[PreparedLoader]:
        return iter([loader for known in self._known if (loader := known()) is not None])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def add(self, loader: PreparedLoader) -> None:
        self._known = [known for known in self._known if known() is not None]
        if not any(loader is known for known in self):
            self._known.append(ref(loader))

    def clear(self) -> None:
        self._known.clear()
        self._unpickled.clear()


@dataclass(frozen=True)
class LoaderFacts:
    """What a checkpoint's manifest says about a loader, beside its position.

    Args:
        dataset: the name of its class.
        length: of the dataset, if it has one.
        inside: it was in the middle of an epoch.
        reading: its iterator was open.
    """

    dataset: str
    length: int | None
    inside: bool = False
    reading: bool = False

    @classmethod
    def of(cls, loader: PreparedLoader, inside: bool = False, reading: bool = False) -> LoaderFacts:
        return cls(type(loader.dataset).__name__, _length(loader.dataset), inside, reading)

    @property
    def data(self) -> tuple[str, int | None]:
        return self.dataset, self.length

    def __str__(self) -> str:
        return f"a {self.dataset}" + ("" if self.length is None else f" of {self.length} samples")


def _length(dataset: Any) -> int | None:
    if isinstance(dataset, IterableDataset):  # may say something else than it yields
        return None
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def check_fit(saved: Sequence[LoaderFacts], here: Sequence[LoaderFacts], where: str) -> list[str]:
    """Can positions be put back, the first into the first loader, and so on?

    Returns:
        Those whose position is lost because they are not prepared here.

    Raises:
        CheckpointError: one that was being read is not prepared here, or the data at one place is different.
    """
    behind = list(enumerate(saved))[len(here) :]
    reading = [(n, one) for n, one in behind if one.reading]
    pairs = list(zip(saved, here, strict=False))
    swapped = len(saved) != len(here) or sorted(map(str, saved)) == sorted(map(str, here))
    other = [n for n, (a, b) in enumerate(pairs) if a.data != b.data] if swapped else []
    if reading or other:
        n, one = reading[0] if reading else (other[0], saved[other[0]])
        found = f"; here its data is {here[n]}" if n < len(here) else ""
        raise CheckpointError(
            f"it holds {len(saved)} dataloaders, and {len(here)} are prepared here: it has dataloader {n}"
            f"{', in the middle of being read,' if one.reading else ''} with {one}{found}",
            where=where,
            fix="prepare the same dataloaders in the same order before loading",
        )
    return [f"{n} ({one})" for n, one in behind if one.inside or not here]
