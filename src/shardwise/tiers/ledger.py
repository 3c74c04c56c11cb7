"""The ledger of live bytes: what each model state occupies on this rank, now and at its peak."""

from __future__ import annotations

STATES = ("parameters", "gradients", "optimizer", "gather_buffers")


class Ledger:
    """Exact live bytes by state. The engine writes down every buffer it allocates and frees.

    ``parameters``: values a rank keeps between steps (whole or its shards). ``gradients``: reduced
    and not yet reduced gradients a rank keeps. ``optimizer``: optimizer state, and master values
    where parameters are kept in another dtype. ``gather_buffers``: whole units that come and go.
    """

    def __init__(self) -> None:
        self.live = dict.fromkeys(STATES, 0)
        self.peak = dict.fromkeys(STATES, 0)
        self.peak_total = 0
        self.at_peak = dict(self.live)

    @property
    def total(self) -> int:
        return sum(self.live.values())

    def add(self, state: str, nbytes: int) -> None:
        """``nbytes`` more (or, negative, fewer) live bytes of ``state``."""
        live = self.live
        live[state] += nbytes
        if nbytes > 0:
            if live[state] > self.peak[state]:
                self.peak[state] = live[state]
            total = self.total
            if total > self.peak_total:
                self.peak_total = total
                self.at_peak = dict(live)

    def reset_peak(self) -> None:
        """Forget the peaks: from here on they are what is live now."""
        self.peak, self.at_peak, self.peak_total = dict(self.live), dict(self.live), self.total
