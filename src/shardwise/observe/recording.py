"""Who is recorded, and where: the one record that this process may have under way."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from shardwise import environment, events
from shardwise.comm import World
from shardwise.comm.world import default_device
from shardwise.engine.hooks import engine_of
from shardwise.engine.uncompiled import uncompiled
from shardwise.errors import RecordError
from shardwise.observe.inputs import rows_and_tokens
from shardwise.operations import from_first


class Recording:
    """A record under way; a context manager that ends it.

    Attributes:
        folder: where its files are.
        run: the name that they begin with.
        launched: by ``shardwise launch --record``: it lasts as long as the process.
        recorder: what listens.
        limit: steps after which the process ends; ``None``: when the script does.
    """

    def __init__(self, folder: Path, device: torch.device, *, flops: bool, every: int, launched: bool) -> None:
        from shardwise.observe.record import Recorder  # what nobody asked for is not imported
        from shardwise.observe.record_file import RecordFile, file_of

        world = World.current()
        now = time.time()
        stamp = from_first(int(now) << 16 | int.from_bytes(os.urandom(2), "big"))  # the same on every rank
        self.folder, self.launched = folder, launched
        self.limit = environment.steps_from_environment()
        self.run = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(stamp >> 16))}-{stamp & 0xFFFF:04x}"
        head = {"run": self.run, "rank": world.rank, "world": world.size, "shardwise": _version()}
        file = RecordFile(file_of(folder, self.run, world.rank))
        self.recorder = Recorder(file, head, device, flops=flops, every=every)
        self._open = ExitStack()
        self._open.enter_context(events.listening(self.recorder))
        atexit.register(self.close)

    def tell(self, values: Mapping[str, Any] | None = None, *, loss: Any = None) -> None:
        """Numbers of the step under way. See :meth:`shardwise.observe.record.Recorder.tell`."""
        self.recorder.tell(values, loss=loss)

    def follow(self, module: nn.Module) -> None:
        """Count a sharded model's memory, and what it is given."""
        engine = engine_of(module)
        if engine is not None:
            self.recorder.follow(engine)
        hook = module.register_forward_pre_hook(_given, prepend=True, with_kwargs=True)
        self._open.callback(hook.remove)

    def close(self) -> None:
        """End it. Further calls do nothing."""
        global _current
        self._open.close()
        self.recorder.close()
        atexit.unregister(self.close)
        if _current is self:
            _current = None

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.launched:  # the launcher's goes on
            self.close()


_current: Recording | None = None


def record(model: nn.Module, folder: str | os.PathLike[str], *, flops: bool = True, every: int = 100) -> Recording:
    """Write down what every rank does, for ``shardwise report``::

        with shardwise.record(model, "runs/first") as recording:
            for batch in batches:
                loss = loss_of(model, batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                recording.tell(loss=loss)

    An ``Accelerator`` has ``profile_dir=`` for this, and tells losses and what is logged by itself.

    Args:
        model: a sharded model. Models that are sharded later are recorded as well.
        folder: made if it is not there. Each run has files of its own in it.
        flops: count the floating-point operations of the second step, which then takes longer. Not where code is
            compiled.
        every: a full timeline of every so-manieth step, besides the third to fifth; rarer in long runs.

    Returns:
        A context manager, with ``tell``. Under ``shardwise launch --record`` it is the launcher's, which goes on after
        the block.

    Raises:
        RecordError: a file cannot be written there, or another record is under way.

    Cost: two messages of 8 bytes at the beginning; see ``docs/report.md`` for what a step pays. A collective.
    """
    found = from_environment()
    if found is None:
        found = begin(folder, flops=flops, every=every)
    found.follow(model)
    return found


def begin(folder: str | os.PathLike[str], *, flops: bool = True, every: int = 100, launched: bool = False) -> Recording:
    """A record of all that this process does from here on. A collective. See :func:`record`."""
    global _current
    if _current is not None:
        raise RecordError(
            f"this process is recorded already, in {_current.folder}",
            fix="end that one first: leave its block, or close()",
        )
    if every < 1:
        raise RecordError(f"every={every} is not a number of steps", fix="give 1 or more")
    device = World.current().device if torch.distributed.is_initialized() else default_device()
    _current = Recording(Path(folder), device, flops=flops, every=every, launched=launched)
    return _current


def current() -> Recording | None:
    """What is under way."""
    return _current


def from_environment(module: nn.Module | None = None) -> Recording | None:
    """The launcher's record (``SHARDWISE_RECORD``), begun at the first call, which is then a collective.

    Args:
        module: a model that was sharded just now. Whatever record is under way follows it.
    """
    if World.current().fake:  # a plan is no run
        return None
    asked = os.environ.get(environment.RECORD)
    if asked and _current is None:
        begin(asked, launched=True)
    if module is not None and _current is not None:
        _current.follow(module)
    return _current if _current is not None and _current.launched else None


def folder() -> Path | None:
    """Where this process is recorded, or will be by the launcher's word."""
    if _current is not None:
        return _current.folder
    asked = os.environ.get(environment.RECORD)
    return Path(asked) if asked else None


def of_door(folder: str | os.PathLike[str] | None) -> Recording | None:
    """What an ``Accelerator`` records to: the launcher's, or its own, or none. A collective if there is one."""
    found = from_environment()
    if found is not None or folder is None or World.current().fake:
        return found
    if _current is not None and _current.folder == Path(folder):  # several in one script
        return _current
    return begin(folder)


@uncompiled
def _given(module: nn.Module, args: Any, kwargs: Any) -> None:
    """A hook that copies of the module may have as well."""
    if _current is not None and _current.recorder.awaits_batch and torch.is_grad_enabled():
        if _current.limit is not None and _current.recorder.done >= _current.limit:
            if (engine := engine_of(module)) is not None:
                _current.recorder.expect(engine)
            raise SystemExit(0)  # the next step would begin, on every rank
        _current.recorder.given(*rows_and_tokens(args, kwargs))


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("shardwise")
    except PackageNotFoundError:
        return ""
