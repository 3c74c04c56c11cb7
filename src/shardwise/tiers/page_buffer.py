"""Flat bytes on the CPU that come and go in whole pages, used again: what direct I/O reads into without a copy."""

from __future__ import annotations

from collections.abc import Callable

import torch

from shardwise.tiers.aligned import aligned_empty, padded
from shardwise.tiers.buffer import Buffer
from shardwise.tiers.ledger import Ledger


class PagePool:
    """Page-aligned memory of values that come and go. New pages cost more time than a fast disk takes to fill them.

    What is in nobody's use is kept for the next one it fits, as long as all there is does not exceed what was in use
    at one time.
    """

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []
        self._used = self._most = 0  # bytes in use, and the most that have been

    def take(self, nbytes: int) -> torch.Tensor:
        """``uint8`` of ``nbytes`` at least, with undefined values, whose address is a multiple of the disk's block."""
        fitting = [t for t in self._free if nbytes <= t.numel() <= 2 * nbytes]
        if fitting:
            found = min(fitting, key=torch.Tensor.numel)
            self._free = [t for t in self._free if t is not found]
        else:
            size = padded(nbytes)
            while self._free and self._used + self.nbytes + size > self._most:
                self._free.pop(0)  # the one that was given back first
            found = aligned_empty(size)
        self._used += found.numel()
        self._most = max(self._most, self._used)
        return found

    def give(self, pages: torch.Tensor) -> None:
        """Give back what :meth:`take` returned; nobody else has a view of it."""
        self.forget(pages.numel())
        self._free.append(pages)

    def forget(self, nbytes: int) -> None:
        """Pages of that size are somebody else's from here on."""
        self._used -= nbytes

    @property
    def nbytes(self) -> int:
        """What is kept, and in nobody's use."""
        return sum(t.numel() for t in self._free)


class PageBuffer(Buffer):
    """A :class:`~shardwise.tiers.buffer.Buffer` of bytes from a pool of pages. It is at another address each time.

    While it is released, ``tensor`` has the same length and no memory: views of it keep a parameter's shape.
    """

    __slots__ = ("_empty", "_pages", "_pool")

    def __init__(self, nbytes: int, state: str, ledger: Ledger, pool: PagePool) -> None:
        self._empty = torch.empty(nbytes, dtype=torch.uint8)  # takes no memory before it is written to
        self._pages: torch.Tensor | None = None
        self._pool = pool
        self.tensor, self.nbytes, self.state, self.ledger, self.owners = self._empty, nbytes, state, ledger, 0

    def hollow(self, cut: Callable[[torch.Tensor], list[torch.Tensor]]) -> list[torch.Tensor]:
        """Views of the tensor without memory, as ``cut`` makes them of one with memory. Once."""
        views = cut(self._empty)
        self._empty.untyped_storage().resize_(0)
        return views

    @property
    def filled(self) -> bool:
        return self.nbytes == 0 or self._pages is not None

    @property
    def aliased(self) -> bool:
        if self._pages is None:
            return False
        storage = self._pages.untyped_storage()
        # Two for the pages and the tensor, one for the Python object in hand.
        return torch._C._storage_Use_Count(storage._cdata) > self.owners + 3

    def fill(self) -> None:
        """Have memory; the values are undefined. Its views have to be made anew."""
        if not self.filled:
            self._pages = self._pool.take(self.nbytes)
            self.tensor = self._pages[: self.nbytes]
            self.ledger.add(self.state, self.nbytes, host=True)

    @property
    def resizable(self) -> bool:
        return True  # it is left to whoever has a view of it, and never resized

    def release(self) -> bool:
        """Let go of the memory. The owners' views have to be of :attr:`tensor` again after it.

        Who else has a view keeps the memory, and its values.
        """
        if self._pages is not None and self.nbytes:
            aliased, pages, self._pages = self.aliased, self._pages, None
            self.tensor = self._empty
            if aliased:
                self._pool.forget(pages.numel())
            else:
                self._pool.give(pages)
            self.ledger.add(self.state, -self.nbytes, host=True)
        return True
