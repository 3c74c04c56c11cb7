"""What a script does on its main process only, and all ranks have to do here: the main process asks them to.

Scripts for Accelerate save on the main process where every process has all there is. Here each rank has its part, or at
least its random state. So rank 0 leads: at *points* that all ranks pass, the others hear from it whether to go on, or
what to do with it first. Points lie where every rank has the same values and the same place in its data as the main
process had: behind each batch of a loader whose gradients were reduced, and in front of the door's collectives.

Gradients that are reduced are the only clock: they are counted alike on every rank, or nothing works at all. A main
process that evaluates by itself passes no point: no gradients come, and its loader is not the outermost one.
"""

from __future__ import annotations

import atexit
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

from shardwise import operations
from shardwise.comm import World
from shardwise.comm.group import Group, Transfer
from shardwise.comm.stats import Op
from shardwise.engine.engine import Engine
from shardwise.errors import CommError

if TYPE_CHECKING:
    from shardwise.stepping import Steps


class Led:
    """The points of one Accelerator.

    Args:
        steps: its models are those whose gradients count. Without a sharded one, nobody is led.
        perform: does what the main process has asked for: the name of a method, and its arguments.
        timeout: seconds that ranks wait for each other in front of a call.

    Cost: 8 bytes from rank 0 to each other rank per point; nothing on one rank.
    """

    def __init__(self, steps: Steps, perform: Callable[[str, dict[str, Any]], None], timeout: float) -> None:
        self._steps, self._perform, self._timeout = weakref.ref(steps), perform, timeout
        self._passed = 0  # gradients that had been reduced at the last point
        self._busy = False  # in something that all ranks do
        self._apart = False  # and there in a part that each does by itself
        self._dismissed = False  # that part is over on rank 0
        self._sent: list[Transfer] = []
        _all.add(self)

    def be_heard(self) -> None:
        """Wait until the others have received the last word."""
        sent, self._sent = self._sent, []
        for transfer in sent:
            transfer.wait()

    def if_due(self, where: str) -> None:
        """A point, if gradients were reduced since the last one."""
        if self._reduced() != self._passed:
            self.point(where)

    def point(self, where: str) -> None:
        """Do what the main process asks for until it says to go on.

        Args:
            where: what this rank is about to do, for the message if the main process did something that it cannot ask
                others for.
        """
        engine = self._engine()
        if engine is None:
            return
        self._passed = self._reduced()
        if engine.world.rank == 0:
            self._send(engine, b"")
            return
        self._follow(engine, where)

    @contextmanager
    def apart(self, where: str) -> Iterator[None]:
        """Around a part of what all ranks do in which each runs code of the script's, such as hooks of ``save_state``:
        there, too, the main process may save something or read a state dict alone. At the end the others wait for it.

        It is no point: whoever waits behind the last one waits on.
        """
        before, self._apart, self._dismissed = self._apart, True, False
        engine = self._engine(apart=True)
        try:
            yield
        finally:
            if engine is None:
                pass
            elif engine.world.rank == 0:
                self._send(engine, b"")
            elif not self._dismissed:
                self._follow(engine, where)
            self._apart = before

    @contextmanager
    def together(self, call: str, arguments: dict[str, Any] | None) -> Iterator[None]:
        """Around what all ranks do, whether the script calls it on all of them or on the main process only.

        Args:
            arguments: for those that are asked to; plain values. ``None``: it cannot be asked for, and a script has to
                call it on every rank.

        Raises:
            CommError: only other ranks call it, or different ones call different things.
        """
        self._ask(call, arguments, call)
        with self._doing():
            operations.meet(call, self._timeout)
            yield

    def before_state_dict(self, number: dict[str, Any]) -> None:
        """In front of a model's ``state_dict()``, to which each rank lends its values.

        Args:
            number: how other ranks are told which model it is.

        Raises:
            CommError: only other ranks call it.
        """
        self._ask("_lend_values", number, "state_dict()")

    def _ask(self, call: str, arguments: dict[str, Any] | None, said: str) -> None:
        engine = self._engine(apart=True)
        if engine is None:
            return
        if engine.world.rank == 0:
            self._send(engine, json.dumps({"call": call, "arguments": arguments}).encode())
        elif self._receive(engine) is None:
            self._dismissed = True
            raise CommError(
                f"rank {engine.world.rank} came to {said}, and rank 0 went on",
                where=said,
                fix=f"call {said} on every rank, or on the main process only",
            )

    def _follow(self, engine: Engine, where: str) -> None:
        while request := self._receive(engine):
            if request["arguments"] is None:
                operations.meet(where, self._timeout)  # which finds that rank 0 is elsewhere
            with self._doing():
                self._perform(request["call"], request["arguments"])

    def _engine(self, apart: bool = False) -> Engine | None:
        """The first that has other ranks; ``None``: nobody is led, or not now.

        Args:
            apart: something that may be asked for in a part that ranks do by themselves, too.
        """
        found = next((e for e in self._engines() if e.world.size > 1 and not e.runs_alone), None)
        busy = self._busy and not (apart and self._apart)
        return None if found is None or busy or found.world.join is not None else found

    def _engines(self) -> list[Engine]:
        steps = self._steps()
        return [] if steps is None else steps.engines()

    def _reduced(self) -> int:
        return sum(engine.reduced for engine in self._engines())

    @contextmanager
    def _doing(self) -> Iterator[None]:
        before = self._busy, self._apart
        self._busy, self._apart = True, False
        try:
            yield
        finally:
            self._busy, self._apart = before

    # --- messages --------------------------------------------------------------------------
    def _send(self, engine: Engine, text: bytes) -> None:
        """Without waiting for anybody to hear this one."""
        self.be_heard()
        group, op = _line(engine)
        parts = [torch.tensor([len(text)])] + ([torch.frombuffer(bytearray(text), dtype=torch.uint8)] if text else [])
        self._sent = [group.broadcast(part, op) for part in parts]

    def _receive(self, engine: Engine) -> dict[str, Any] | None:
        group, op = _line(engine)
        length = torch.zeros(1, dtype=torch.int64)
        group.broadcast(length, op).wait()
        if not int(length):
            return None
        text = torch.empty(int(length), dtype=torch.uint8)
        group.broadcast(text, op).wait()
        request: dict[str, Any] = json.loads(bytes(text.tolist()))
        return request


_all: weakref.WeakSet[Led] = weakref.WeakSet()


@atexit.register
def _be_heard() -> None:
    """The connections of a process that ends take with them what has not been received, and others may come later."""
    if World._current is None or World._current.faults.failed:
        return
    for led in list(_all):
        with suppress(CommError):  # who was to hear it has ended
            led.be_heard()


def _line(engine: Engine) -> tuple[Group, Op]:
    return engine.mesh.control, engine.op("word", "the main process")
