"""Saving: what the ranks do in order, and saves that go on while the training does."""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise.checkpoint import directory as directories
from shardwise.checkpoint.coordination import BackgroundGather, CollectiveBlock, Progress, all_gather_bytes
from shardwise.checkpoint.incomplete_load import refuse_incomplete
from shardwise.checkpoint.manifest import Manifest
from shardwise.checkpoint.model_state import ModelState, model_states, parameter_labels
from shardwise.checkpoint.optimizer_state import OptimizerState
from shardwise.checkpoint.storage_writer import BlockBuffers, WorkerThreads
from shardwise.checkpoint.writing import CachedPlan, OutputFiles, PendingSave, PlannedTensors, TensorCopy
from shardwise.comm import World
from shardwise.device import StreamsOfThisThread
from shardwise.engine.optimizer_state import add_reader
from shardwise.errors import CheckpointError, ShardwiseError


class AsyncSave:
    """A save that is being written in the background.

    Args:
        path: where the checkpoint will stand.
        work: copies what is left to copy and then calls what it is given; writes it all, and takes part in the ranks'
            agreement. Runs in a thread; an interpreter does not end before it.
    """

    def __init__(self, path: Path, work: Callable[[Callable[[], None]], None]) -> None:
        self.path = path
        self._work, self._streams = work, StreamsOfThisThread()
        self._copied = threading.Event()
        self._error: BaseException | None = None
        self.reported = False  # somebody knows how it ended
        self._thread = threading.Thread(target=self._run, name="shardwise-save", daemon=False)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Has it ended, well or not? Ranks may see it a moment apart."""
        return not self._thread.is_alive()

    def wait_for_copy(self) -> None:
        """Wait until this rank's optimizer state is copied, or the save has failed. No collective.

        ``optimizer.step()`` does it by itself. Call it before changing optimizer state in other ways.
        """
        self._copied.wait()

    def wait(self) -> Path:
        """Wait until the checkpoint stands.

        Returns:
            Its path.

        Raises:
            CheckpointError: it could not be written, on whatever rank; every rank that waits raises. What was there
                before is still there.
            CommError: another rank has ended.
        """
        self._thread.join()
        self.reported = True
        error = self._error
        if isinstance(error, ShardwiseError):  # one object raised in several places would collect their tracebacks
            raise type(error)(error.what, where=error.where, fix=error.fix) from error
        if error is not None:
            raise error
        return self.path

    def _run(self) -> None:
        try:
            with self, self._streams.taken():
                self._work(self._copied.set)
        finally:
            self._copied.set()

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self._error = error
        return True

    def last_words(self) -> str:
        """What to say when the interpreter ends and nobody has asked how it went."""
        if self._error is None or self.reported or not self.done:
            return ""
        return f"shardwise: checkpoint {self.path} was not written\n{self._error}"


class _Unflushed:
    """A standard stream that cannot be flushed when the interpreter ends: the exit status is then 120 (``sys.exit``).

    A save that failed and that nobody asked about is lost output of the same kind, and at that point there is no other
    way to a status that leaves everybody else's ``atexit`` functions alone.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def flush(self) -> None:
        self._stream.flush()
        if sys.is_finalizing():
            raise OSError("a checkpoint was not written")


class Background:
    """What saves keep for the next one, and the asynchronous one that is under way. Made by all ranks together.

    ``buffers`` are those of asynchronous saves: host memory as large as what this rank saves.
    """

    def __init__(self) -> None:
        self.buffers, self.plan, self.gather = BlockBuffers(limit=None), CachedPlan(), BackgroundGather()
        self.last: AsyncSave | None = None
        atexit.register(self._end)

    def _end(self) -> None:
        if self.last is not None and (words := self.last.last_words()):
            if World.current().rank == 0:
                print(words, file=sys.stderr, flush=True)
            sys.stderr = cast(TextIO, _Unflushed(sys.stderr))

    @staticmethod
    def of(world: World) -> Background:
        """This world's; made when first asked for."""
        if world.saver is None:
            world.saver = Background()
        assert isinstance(world.saver, Background)
        return world.saver

    @staticmethod
    def last_of(world: World) -> AsyncSave | None:
        """The asynchronous save that is under way, or has ended and was not settled."""
        return None if world.saver is None else Background.of(world).last


def wait_for_saves() -> None:
    """Wait for the save that is under way, if there is one. No collective: all ranks know how it ended.

    Raises:
        CheckpointError: it failed, and nobody here was told.
    """
    last = Background.last_of(World.current())
    if last is not None and not last.reported:
        last.wait()


def settle_saves() -> None:
    """:func:`wait_for_saves` before the next save or load. A collective: if it was raised to some ranks only, so far,
    all raise now.

    Raises:
        CheckpointError: on every rank.
    """
    last = Background.last_of(World.current())
    if last is None:
        return
    Background.of(World.current()).last = None
    with CollectiveBlock(f"writing checkpoint {last.path}", slow=True):
        if not last.reported:
            last.wait()


# --- saving --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Contents:
    """What a checkpoint is to hold: the arguments of :func:`save`."""

    models: Sequence[nn.Module]
    excluded: Collection[nn.Module]
    frozen: bool
    optimizers: Sequence[Optimizer]
    state: Mapping[str, Any] | None
    rank_state: Mapping[str, Any] | None
    info: Mapping[str, Any] | None
    files_from: Callable[[Path], None] | None
    total_limit: int | None


def save(
    directory: str | os.PathLike[str],
    *,
    models: Sequence[nn.Module] = (),
    excluded: Collection[nn.Module] = (),
    frozen: bool = True,
    optimizers: Sequence[Optimizer] = (),
    state: Mapping[str, Any] | None = None,
    rank_state: Mapping[str, Any] | None = None,
    info: Mapping[str, Any] | None = None,
    files_from: Callable[[Path], None] | None = None,
    total_limit: int | None = None,
    progress: bool = True,
) -> Path:
    """Save models, optimizers and small state. Collective.

    Args:
        directory: where the checkpoint will stand. An older checkpoint there is replaced when this one is
            complete; files that others put beside it there stay.
        models: sharded or not; parameters (master values), persistent buffers and extra state are saved.
        excluded: those of ``models`` whose values somebody else saves. What optimizers have of them is saved.
        frozen: ``False``: leave parameters out that do not train. A load leaves those as they are that still do not.
        optimizers: their state and hyperparameters are saved under the names of their parameters.
        state: small state that all ranks have in common; rank 0's is written.
        rank_state: small state of this rank.
        info: JSON for the manifest: step, epoch, ...
        files_from: called on every rank with the directory that is being written, to put further files in. Do
            not communicate in it, and let every file be written by one rank.
        total_limit: when it is complete, delete the oldest ``checkpoint_<n>`` beside it; see :func:`prune`.
        progress: show a bar on rank 0, if it has a terminal and this takes longer than a second.

    Returns:
        The absolute path of the checkpoint.

    Raises:
        CheckpointError: on every rank; nothing has changed on disk then. Also what an earlier :func:`async_save`
            ended with, if nobody has waited for it.
        OptimizerError: an optimizer that cannot step on slices.

    Cost: each rank writes what it holds, once over all ranks, through buffers of some 40 MiB. Some small collectives.
    """
    given = _Contents(models, excluded, frozen, optimizers, state, rank_state, info, files_from, total_limit)
    settle_saves()
    workers = WorkerThreads()
    try:
        files = OutputFiles(BlockBuffers(), workers, Background.of(World.current()).plan)
        pending = _begin(directory, files, given)
        with Progress("writing", pending.copy.nbytes, progress) as files.progress:
            pending.finish(workers, all_gather_bytes, copied=lambda: None)
    finally:
        workers.stop()
    return pending.final


def async_save(
    directory: str | os.PathLike[str],
    *,
    models: Sequence[nn.Module] = (),
    excluded: Collection[nn.Module] = (),
    frozen: bool = True,
    optimizers: Sequence[Optimizer] = (),
    state: Mapping[str, Any] | None = None,
    rank_state: Mapping[str, Any] | None = None,
    info: Mapping[str, Any] | None = None,
    files_from: Callable[[Path], None] | None = None,
    total_limit: int | None = None,
) -> AsyncSave:
    """:func:`save` that returns when it has copied what may change at once, and is written while the training goes on.

    Optimizer state in host memory is copied afterwards, beside the next forward and backward: nothing but an update
    changes it, and ``step()`` of these optimizers waits for the copy. Change it in other ways only behind the handle's
    ``wait_for_copy()``; otherwise the save fails and says so.

    Arguments are those of :func:`save`. Collective, and so are the next :func:`save`, :func:`async_save` or
    :func:`load`, which wait for this one first. Until it is complete, an older checkpoint there stays what it is. The
    interpreter does not end before it is; wait for it before ``destroy_process_group``.

    Returns:
        A handle: ``wait()`` for the path or the error, ``done``, ``wait_for_copy()``.

    Raises:
        CheckpointError: on every rank: what :func:`save` finds before it writes. What goes wrong later is raised by
            ``wait()``, or else by the next save or load, on every rank.

    Cost: the copy of values, and of state that is not in host memory; state on a disk is read for it. Host memory for
    all that this rank writes, kept for the next time.
    """
    given = _Contents(models, excluded, frozen, optimizers, state, rank_state, info, files_from, total_limit)
    settle_saves()
    background = Background.of(World.current())
    files = OutputFiles(background.buffers, None, background.plan)
    pending = _begin(directory, files, given)
    pending.begin_copy()
    background.last = handle = AsyncSave(pending.final, partial(pending.in_background, background.gather))
    for optimizer in optimizers:
        add_reader(optimizer, handle.wait_for_copy)
    return handle


def _begin(directory: str | os.PathLike[str], out: OutputFiles, given: _Contents) -> PendingSave:
    """Everything up to the copy. Collective."""
    world = World.current()
    with CollectiveBlock(f"writing checkpoint {directory}") as ranks:
        states = model_states(given.models, given.excluded)
        for s in states:
            if not s.excluded:
                refuse_incomplete(s.module)
            if not given.frozen:
                s.leave_out_frozen()
        labels = parameter_labels(states)
        steppers = [OptimizerState(i, o, labels) for i, o in enumerate(given.optimizers)]
        collected = [stepper.collect() for stepper in steppers]
        tensors = PlannedTensors(*_nest(states, steppers, [found for found, _ in collected], world.rank == 0), out.plan)
        names = [(s.label, s.excluded, sorted(s.parameters.keys() - s.left_out), sorted(s.buffers)) for s in states]
        groups = [(o.label, [s.label for s in o.entries]) for o in steppers]
        _check_json(given.info)
        directories.check_limit(given.total_limit)
        ranks.mine = _Facts(
            path=os.path.realpath(directory),
            content=zlib.crc32(json.dumps([names, groups]).encode()),
            kinds=[kinds for _, kinds in collected],
            buffers=[s.buffers_crc() for s in states],
            plan=(tensors.key, out.plan.key),
        ).dumps()
    told = [_Facts(**json.loads(data)) for data in ranks.gathered]
    kinds = _merged(told, len(steppers))
    final = Path(told[0].path)
    doing = f"writing checkpoint {final}"
    tensors.agree([facts.plan for facts in told], doing)
    with CollectiveBlock(doing) as ranks:
        if world.rank == 0:
            ranks.mine = str(directories.make_temporary(final)).encode()
    out.folder = Path(ranks.gathered[0].decode())
    manifest = Manifest(
        world_size=world.size,
        strategies=[s.strategy for s in states],
        models=[type(s.module).__name__ for s in states],
        optimizers=[type(o.optimizer).__name__ for o in steppers],
        torch=torch.__version__,
        saved_at=time.time(),
        info=dict(given.info or {}),
    )
    differ = {s.label: s.buffers for k, s in enumerate(states) if len({facts.buffers[k] for facts in told}) > 1}

    def small() -> Iterator[tuple[str, Mapping[str, Any]]]:
        own = {label: {name: b.detach() for name, b in buffers.items()} for label, buffers in differ.items()}
        yield f"rank_{world.rank}.pt", {"rank_state": dict(given.rank_state or {}), "buffers": own}
        if world.rank == 0:
            yield "state.pt", _common(states, steppers, kinds, given.state)

    changes_in_step = tuple(f"{o.label}." for o in steppers)
    return PendingSave(
        world, out, final, manifest, small, given.files_from, TensorCopy(out.new, tensors), changes_in_step,
        given.total_limit,
    )  # fmt: skip


class _Facts(NamedTuple):
    """What the ranks tell each other before a save.

    Args:
        path: of the checkpoint; rank 0's is taken.
        content: a checksum of the names of everything.
        kinds: of the state that each optimizer has here.
        buffers: a checksum of each model's.
        plan: of what this rank holds, and of what all held at the save before.
    """

    path: str
    content: int
    kinds: list[dict[str, dict[str, str]]]
    buffers: list[int]
    plan: tuple[str, str]

    def dumps(self) -> bytes:
        return json.dumps(self._asdict()).encode()


def _check_json(info: Mapping[str, Any] | None) -> None:
    try:
        json.dumps(dict(info or {}))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"info= is not JSON: {error}", fix="give numbers, strings, lists and dicts") from error


def _merged(told: Sequence[_Facts], count: int) -> list[dict[str, dict[str, str]]]:
    """Every rank knows the kinds of the state it holds; together they know all."""
    if odd := [rank for rank, facts in enumerate(told) if facts.content != told[0].content]:
        raise CheckpointError(
            "gave models or optimizers with other parameters than rank 0",
            where=f"rank {odd[0]}",
            fix="every rank saves the same models and optimizers in the same order",
        )
    out: list[dict[str, dict[str, str]]] = [{} for _ in range(count)]
    for facts in told:
        for merged, kinds in zip(out, facts.kinds, strict=True):
            for label, keys in kinds.items():
                merged.setdefault(label, {}).update(keys)
    return out


def _common(
    states: Sequence[ModelState],
    steppers: Sequence[OptimizerState],
    kinds: Sequence[Mapping[str, Mapping[str, str]]],
    state: Mapping[str, Any] | None,
) -> dict[str, Any]:
    return {
        "state": dict(state or {}),
        "extra": {
            s.label: {k: owner.get_extra_state() for k, owner in s.extra.items()} for s in states if not s.excluded
        },
        "optimizers": [{**o.plain(), "state": k} for o, k in zip(steppers, kinds, strict=True)],
        "buffers": {s.label: list(s.buffers) for s in states if not s.excluded},
        "left_out": {s.label: sorted(s.left_out) for s in states if s.left_out},
    }


def _nest(
    states: Sequence[ModelState],
    steppers: Sequence[OptimizerState],
    collected: Sequence[dict[str, dict[str, torch.Tensor]]],
    first: bool,
) -> tuple[dict[str, Any], dict[tuple[str, str], tuple[str, str]]]:
    """The nest of dicts whose joined keys are the names in the checkpoint, and the names of tied tensors."""
    nest: dict[str, Any] = {s.label: s.tensors(everything=first) for s in states}
    for stepper, found in zip(steppers, collected, strict=True):
        nest[stepper.label] = {"state": found}
    kept = [s for s in states if not s.excluded]
    aliases = {
        (s.label, alias): (s.label, name) for s in kept for alias, name in s.aliases.items() if name not in s.left_out
    }
    return nest, aliases
