"""The ledger of live bytes: what each model state occupies on this rank, now and at its peak."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Protocol

import torch

_NBYTES = attrgetter("nbytes")
STATES = ("parameters", "gradients", "optimizer", "gather_buffers", "offload_buffers", "host_activations")


class Observer(Protocol):
    """Somebody who counts every live tensor and must not count the ledger's twice."""

    paused: bool

    def disown(self, tensor: torch.Tensor) -> None: ...
    def sample(self) -> None: ...


class Ledger:
    """Exact live bytes by state. Every buffer of the engine is allocated and freed through it.

    ``parameters``: values a rank keeps between steps (whole, or its shards). ``gradients``: reduced
    gradients, and whole ones that ``no_sync`` keeps. ``optimizer``: optimizer state, and master values where
    whole parameters are kept in another dtype. ``gather_buffers``: whatever comes and goes with a unit:
    its gathered values, its arriving gradients, what a reduce receives. ``offload_buffers``: host buffers that
    state on a disk passes through. ``host_activations``: what autograd saved that was moved to the host.

    Attributes:
        live, peak: bytes by state. ``on_host``: those of ``live`` that are in the host's memory.
        total, peak_total: of all states together.
        observer: counts what is not in the ledger.
    """

    def __init__(self) -> None:
        self.live = dict.fromkeys(STATES, 0)
        self.peak = dict.fromkeys(STATES, 0)
        self.on_host = dict.fromkeys(STATES, 0)
        self.total = self.peak_total = 0
        self.observer: Observer | None = None

    def add(self, state: str, nbytes: int, *, host: bool = False) -> None:
        """``nbytes`` more (or, negative, fewer) live bytes of ``state``, in the memory of the ``host``."""
        live = self.live
        live[state] += nbytes
        self.total += nbytes
        if host:
            self.on_host[state] += nbytes
        if nbytes > 0:
            if live[state] > self.peak[state]:
                self.peak[state] = live[state]
            if self.total > self.peak_total:
                self.peak_total = self.total
            if self.observer is not None:
                self.observer.sample()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """A block in which only tensors are made that are counted here: no observer counts them again."""
        observer = self.observer
        if observer is None:
            yield
            return
        paused, observer.paused = observer.paused, True
        try:
            yield
        finally:
            observer.paused = paused

    def empty(self, numel: int, dtype: torch.dtype, device: torch.device, state: str) -> torch.Tensor:
        """A new 1-D tensor, counted under ``state`` until :meth:`drop`."""
        with self.counted():
            tensor = torch.empty(numel, dtype=dtype, device=device)
        self.add(state, tensor.numel() * tensor.element_size(), host=tensor.is_cpu)
        return tensor

    def drop(self, tensor: torch.Tensor, state: str) -> None:
        """The caller lets go of a tensor that :meth:`empty` made."""
        self.add(state, -tensor.numel() * tensor.element_size(), host=tensor.is_cpu)

    def adopt(self, tensor: torch.Tensor, state: str) -> None:
        """Count a tensor that somebody else allocated (optimizer state)."""
        if self.observer is not None:
            self.observer.disown(tensor)
        self.add(state, tensor.numel() * tensor.element_size(), host=tensor.is_cpu)

    def adopt_all(self, tensors: Sequence[torch.Tensor], state: str) -> None:
        """:meth:`adopt` of several, which are on one device."""
        if self.observer is not None:
            for tensor in tensors:
                self.observer.disown(tensor)
        self.add(state, sum(map(_NBYTES, tensors)), host=tensors[0].is_cpu)

    def disown_all(self, tensors: Sequence[torch.Tensor], state: str) -> None:
        """Do not count them any more."""
        self.add(state, -sum(map(_NBYTES, tensors)), host=tensors[0].is_cpu)

    def reset_peak(self) -> None:
        """Forget the peaks: from here on they are what is live now."""
        self.peak, self.peak_total = dict(self.live), self.total
