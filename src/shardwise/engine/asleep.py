"""States of a model that wait on the host while the device is needed for something else.

The tensors stay the objects that they are, with all their views: their storages are emptied and filled again. Whoever
uses them meanwhile gets one error, by the mark that values of no step have.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from shardwise import device as devices
from shardwise.engine.attachment import attachment_of
from shardwise.engine.engine import Engine
from shardwise.engine.failure import Failure, Fallible, require_valid
from shardwise.errors import UnitError
from shardwise.tiers.ledger import Ledger

KINDS = ("parameters", "masters", "optimizer")


@dataclass
class _Waiting:
    """One storage on the host: of which state, and its bytes."""

    storage: torch.UntypedStorage
    device: torch.device
    host: torch.Tensor
    state: str


class Asleep:
    """What :func:`put_to_sleep` has moved, until :meth:`wake`.

    Attributes:
        nbytes: of this rank, that left the device.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waiting: list[_Waiting] = []
        self._marked: list[Fallible] = []

    @property
    def nbytes(self) -> int:
        return sum(one.host.nbytes for one in self._waiting)

    @torch.no_grad()
    def move(self, tensor: torch.Tensor, state: str, pin: bool) -> None:
        """Take a tensor's storage to the host, unless it is there already."""
        storage, device = tensor.untyped_storage(), tensor.device
        if device.type == "cpu" or not storage.nbytes():
            return
        host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pin)
        host.copy_(_bytes(storage, device))
        devices.synchronize(device)  # nothing may still read what is about to be freed
        storage.resize_(0)
        self._waiting.append(_Waiting(storage, device, host, state))
        self._ledger.add(state, -host.nbytes)
        self._ledger.add(state, host.nbytes, host=True)

    def mark(self, holders: Sequence[Fallible], failure: Failure) -> None:
        for holder in holders:
            holder.failure = failure
            self._marked.append(holder)

    @torch.no_grad()
    def wake(self) -> None:
        """Everything is again where it was, and may be used."""
        for one in self._waiting:
            one.storage.resize_(one.host.nbytes)
            _bytes(one.storage, one.device).copy_(one.host)
            self._ledger.add(one.state, -one.host.nbytes, host=True)
            self._ledger.add(one.state, one.host.nbytes)
        self._waiting.clear()
        for holder in self._marked:
            holder.failure = None
        self._marked.clear()


def put_to_sleep(
    engine: Engine, optimizers: Sequence[Optimizer], kinds: Collection[str] = KINDS, pin: bool = True, fix: str = ""
) -> Asleep:
    """Move states of a model to the host, between two steps.

    Args:
        engine: of the model.
        optimizers: whose state goes, of this model only.
        kinds: of :data:`KINDS`: ``parameters`` (what the model computes with, and what gathers read), ``masters``
            (master values beside them), ``optimizer``. What has a home on the host or a disk stays there.
        pin: page-lock the host memory, where that can be done.
        fix: what the error says that a use meanwhile raises.

    Raises:
        UnitError: a forward or backward is under way, or there are gradients that wait for a step.

    Cost: the bytes that are moved, once over the link to the host; no communication.
    """
    engine.recover()
    units = engine.units
    records = [record for o in optimizers if (record := attachment_of(o)) is not None]
    require_valid(*units, *records)
    if engine.passes.forward or engine.passes.backward or any(s.param.grad is not None for u in units for s in u.slots):
        raise UnitError(
            "states cannot leave the device while a pass is under way or gradients wait for a step",
            where=type(engine.module).__name__,
            fix="do it behind step() and zero_grad()",
        )
    for unit in units:
        unit.finish_transfers()
        unit.rest()
    asleep = Asleep(engine.ledger)
    failure = Failure(
        f"states of {type(engine.module).__name__} were moved to the host", f"rank {engine.world.rank}", fix, UnitError
    )
    if {"masters", "parameters"} & set(kinds):
        for unit in units:
            for bucket in unit.buckets:
                bucket.grads.free_zeroed()
                for tensor, kind in _values(bucket):
                    if kind in kinds:
                        state = "optimizer" if kind == "masters" else "parameters"
                        asleep.move(tensor, state, pin and devices.can_pin(tensor.device))
    if "optimizer" in kinds:
        for optimizer in optimizers:
            for tensor in _state_of(optimizer):
                asleep.move(tensor, "optimizer", pin and devices.can_pin(tensor.device))
    if "parameters" in kinds:
        asleep.mark(units, failure)
    asleep.mark(records, failure)
    return asleep


def _values(bucket: Any) -> Iterator[tuple[torch.Tensor, str]]:
    if not bucket.placement.released:
        yield bucket.flat.tensor, "parameters"
    if bucket.shard is not None:
        yield bucket.shard, "parameters"
    reads_master = bucket.placement.released and bucket.shard is None
    yield bucket.master, "parameters" if bucket.placement.aliased or reads_master else "masters"


def _state_of(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for state in dict.values(optimizer.state):  # not through what refuses parameters
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _bytes(storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
