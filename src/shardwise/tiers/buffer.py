"""A flat tensor whose bytes can be released and refilled without changing its identity."""

from __future__ import annotations

import torch

from shardwise.tiers.ledger import Ledger


class Buffer:
    """A 1-D tensor of ``numel`` elements that is counted in a ledger while its bytes exist.

    Parameters are views into such a buffer. Releasing resizes the storage to zero and refilling
    gives it bytes again; storage object and views stay the same, so autograd's saved views are
    valid whenever the buffer is filled (the technique of FSDP's ``_free_storage``).
    """

    __slots__ = ("ledger", "nbytes", "state", "tensor")

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device, state: str, ledger: Ledger) -> None:
        self.tensor = ledger.empty(numel, dtype, device, state)
        self.nbytes = numel * self.tensor.element_size()
        self.state, self.ledger = state, ledger

    @property
    def filled(self) -> bool:
        return self.nbytes == 0 or self.tensor.untyped_storage().size() != 0

    def fill(self) -> None:
        """Give the storage its bytes back; their values are undefined."""
        if not self.filled:
            self.tensor.untyped_storage().resize_(self.nbytes)
            self.ledger.add(self.state, self.nbytes)

    def release(self) -> None:
        """Free the bytes."""
        if self.nbytes and self.filled:
            self.tensor.untyped_storage().resize_(0)
            self.ledger.add(self.state, -self.nbytes)
