"""A flat tensor whose bytes can be released and refilled without changing its identity."""

from __future__ import annotations

import torch

from shardwise.tiers.ledger import Ledger


class Buffer:
    """A 1-D tensor of ``numel`` elements that is counted in a ledger while its bytes exist.

    Parameters are views into such a buffer. Releasing resizes the storage to zero and refilling
    gives it bytes again; storage object and views stay the same, so autograd's saved views are
    valid whenever the buffer is filled (the technique of FSDP's ``_free_storage``).

    A kernel that reads a view of a storage of size zero ends the process. So the bytes are freed only while nobody
    but the ``owners`` has a view of them: whoever keeps one (a cached ``weight[0].detach()``, a NumPy array) keeps
    the bytes alive too, as with any tensor.

    Attributes:
        owners: tensors that are views of the buffer as long as it lives.
    """

    __slots__ = ("ledger", "nbytes", "owners", "state", "tensor")

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device, state: str, ledger: Ledger) -> None:
        self.tensor = ledger.empty(numel, dtype, device, state)
        self.nbytes = numel * self.tensor.element_size()
        self.state, self.ledger, self.owners = state, ledger, 0

    @property
    def key(self) -> int:
        """What its views have in common: the identity of the storage."""
        return self.tensor.untyped_storage()._cdata

    @property
    def filled(self) -> bool:
        return self.nbytes == 0 or self.tensor.untyped_storage().size() != 0

    @property
    def aliased(self) -> bool:
        """Has anybody beside the owners a view of it?"""
        storage = self.tensor.untyped_storage()
        # One for the tensor itself, one for the Python object in hand.
        return torch._C._storage_Use_Count(storage._cdata) > self.owners + 2

    def fill(self) -> None:
        """Give the storage its bytes back; their values are undefined."""
        if not self.filled:
            self.tensor.untyped_storage().resize_(self.nbytes)
            self.ledger.add(self.state, self.nbytes, host=self.tensor.is_cpu)

    @property
    def resizable(self) -> bool:
        """May the storage be resized? Not any more once somebody has taken a NumPy array of a view of it."""
        return self.tensor.untyped_storage().resizable()

    def replace(self) -> None:
        """Be another tensor, and leave the old one to whoever has a view of it. Values are undefined."""
        self.fill()
        self.tensor = torch.empty_like(self.tensor)

    def release(self) -> bool:
        """Free the bytes, unless somebody has a view of them. Were they freed?"""
        if not self.nbytes or not self.filled:
            return True
        if self.aliased:
            return False
        self.tensor.untyped_storage().resize_(0)
        self.ledger.add(self.state, -self.nbytes, host=self.tensor.is_cpu)
        return True
