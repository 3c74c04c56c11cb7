"""Saving: what the ranks do, in order."""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise.checkpoint import files, safe, series
from shardwise.checkpoint.background import AsyncSave, Background, settle_saves
from shardwise.checkpoint.blocks import BlockFile, Buffers, Crew, checksum
from shardwise.checkpoint.files import FileEntry, Manifest
from shardwise.checkpoint.models import ModelState, model_states, parameter_labels
from shardwise.checkpoint.optimizers import OptimizerState
from shardwise.checkpoint.ranks import LATER, Share, Together, from_first, share
from shardwise.checkpoint.storage import METADATA, Plans, Written, write_tensors
from shardwise.comm import World
from shardwise.errors import CheckpointError


def save(
    directory: str | os.PathLike[str],
    *,
    models: Sequence[nn.Module] = (),
    optimizers: Sequence[Optimizer] = (),
    state: Mapping[str, Any] | None = None,
    rank_state: Mapping[str, Any] | None = None,
    info: Mapping[str, Any] | None = None,
    files_from: Callable[[Path], None] | None = None,
    total_limit: int | None = None,
) -> Path:
    """Save models, optimizers and small state. Collective.

    Args:
        directory: where the checkpoint will stand. An older checkpoint there is replaced when this one is
            complete; files that others put beside it there stay.
        models: sharded or not; parameters (master values), persistent buffers and extra state are saved.
        optimizers: their state and hyperparameters are saved under the names of their parameters.
        state: small state that all ranks have in common; rank 0's is written.
        rank_state: small state of this rank.
        info: JSON for the manifest: step, epoch, ...
        files_from: called on every rank with the directory that is being written, to put further files in. Do
            not communicate in it, and let every file be written by one rank.
        total_limit: when it is complete, delete the oldest ``checkpoint_<n>`` beside it; see :func:`prune`.

    Returns:
        The absolute path of the checkpoint.

    Raises:
        CheckpointError: on every rank; nothing has changed on disk then. Also what an earlier :func:`async_save`
            ended with, if nobody has waited for it.
        OptimizerError: an optimizer that cannot step on slices.

    Cost: each rank writes what it holds, once over all ranks, through buffers of some 40 MiB. Some small collectives.
    """
    settle_saves()
    crew = Crew()
    try:
        files = _Files(Buffers(), crew, Background.of(World.current()).plans)
        save_ = _begin(directory, files, models, optimizers, state, rank_state, info, files_from, total_limit)
        save_.finish(crew, share)
    finally:
        crew.stop()
    return save_.final


def async_save(
    directory: str | os.PathLike[str],
    *,
    models: Sequence[nn.Module] = (),
    optimizers: Sequence[Optimizer] = (),
    state: Mapping[str, Any] | None = None,
    rank_state: Mapping[str, Any] | None = None,
    info: Mapping[str, Any] | None = None,
    files_from: Callable[[Path], None] | None = None,
    total_limit: int | None = None,
) -> AsyncSave:
    """:func:`save` that returns as soon as everything is copied, and is written while the training goes on.

    Arguments are those of :func:`save`. Collective, and so are the next :func:`save`, :func:`async_save` or
    :func:`load`, which wait for this one first. Until it is complete, an older checkpoint there stays what it is. The
    interpreter does not end before it is; wait for it before ``destroy_process_group``.

    Returns:
        A handle: ``wait()`` for the path or the error, ``done``.

    Raises:
        CheckpointError: on every rank: what :func:`save` finds before it writes. What goes wrong later is raised by
            ``wait()``, or else by the next save or load, on every rank.

    Cost: the copy. Host memory for all that this rank writes, kept for the next time. State on a disk is read for it.
    """
    settle_saves()
    background = Background.of(World.current())
    files = _Files(background.buffers, None, background.plans)
    save_ = _begin(directory, files, models, optimizers, state, rank_state, info, files_from, total_limit)
    background.last = AsyncSave(save_.final, partial(save_.in_background, background.share))
    return background.last


class _Files:
    """The files that this rank writes."""

    def __init__(self, buffers: Buffers, crew: Crew | None, plans: Plans) -> None:
        self.buffers, self.crew, self.plans = buffers, crew, plans
        self.folder = Path()
        self.by_name: dict[str, BlockFile] = {}

    def new(self, name: str) -> BlockFile:
        file = self.by_name[name] = BlockFile(self.folder / name, self.buffers, self.crew)
        return file


def _begin(
    directory: str | os.PathLike[str],
    out: _Files,
    models: Sequence[nn.Module],
    optimizers: Sequence[Optimizer],
    state: Mapping[str, Any] | None,
    rank_state: Mapping[str, Any] | None,
    info: Mapping[str, Any] | None,
    files_from: Callable[[Path], None] | None,
    total_limit: int | None,
) -> _Save:
    """Everything up to and with the copy of all that is saved. Afterwards nothing is read from the caller's things."""
    world = World.current()
    final = Path(from_first(os.path.realpath(directory)))
    doing = f"writing checkpoint {final}"
    with Together(doing):
        states = model_states(models)
        labels = parameter_labels(states)
        steppers = [OptimizerState(i, o, labels) for i, o in enumerate(optimizers)]
        collected = [stepper.collect() for stepper in steppers]
        names = [(s.label, sorted(s.parameters), sorted(s.buffers)) for s in states]
        groups = [(o.label, [s.label for s in o.slots]) for o in steppers]
        content = zlib.crc32(json.dumps([names, groups]).encode())
        facts = json.dumps([content, [kinds for _, kinds in collected]]).encode()
        _check_json(info)
        series.check_limit(total_limit)
    kinds = _merged(share(facts), len(steppers))
    own_buffers = {s.label: own for s in states if s.buffers and (own := s.own_buffers())}
    made = ""
    with Together(doing):
        if world.rank == 0:
            made = str(files.begin(final))
    out.folder = Path(from_first(made))
    manifest = Manifest(
        world_size=world.size,
        strategies=[s.strategy for s in states],
        models=[type(s.module).__name__ for s in states],
        optimizers=[type(o.optimizer).__name__ for o in steppers],
        torch=torch.__version__,
        saved_at=time.time(),
        info=dict(info or {}),
    )
    with _removed_if_it_fails(world, out):
        with Together(doing, slow=True):
            if not out.folder.is_dir():
                raise CheckpointError(
                    "rank 0 has made this directory, and this rank does not see it",
                    where=str(out.folder),
                    fix="save to a file system that all hosts share",
                )
            small: dict[str, Mapping[str, Any]] = {
                f"rank_{world.rank}.pt": {"rank_state": dict(rank_state or {}), "buffers": own_buffers}
            }
            if world.rank == 0:
                small["state.pt"] = _common(states, steppers, kinds, state)
            for name, value in small.items():
                file = out.new(name)
                file.write(safe.dumps(value))
                file.end()
            if files_from is not None:
                files_from(out.folder)
        tensors, aliases = _nest(states, steppers, [found for found, _ in collected], world.rank == 0)
        written = write_tensors(out.new, tensors, aliases, doing, out.plans)
    return _Save(world, out, final, manifest, written, total_limit)


@dataclass(frozen=True)
class _Save:
    """A checkpoint whose contents are copied, and are being written or will be.

    Args:
        files: this rank's.
        manifest: without the files.
    """

    world: World
    files: _Files
    final: Path
    manifest: Manifest
    tensors: Written
    total_limit: int | None

    def in_background(self, share: Share) -> None:
        crew = Crew()
        try:
            for file in self.files.by_name.values():
                file.give_to(crew)
            self.finish(crew, share)
        finally:
            crew.stop()

    def finish(self, crew: Crew, share: Share) -> None:
        """Have everything on the disk, on all ranks, and let the directory take its name. Collective."""
        doing = f"writing checkpoint {self.final}"
        with _removed_if_it_fails(self.world, self.files):
            if index := self.tensors.index(share):
                file = self.files.new(METADATA)
                file.write(index)
                file.end()
                file.give_to(crew)
            written: dict[str, FileEntry] = {}
            with Together(doing, slow=True, by=share):
                crew.end()
                written = {name: file.close() for name, file in self.files.by_name.items()}
            told = share(json.dumps({name: [e.size, e.crc32] for name, e in written.items()}).encode(), LATER)
            with Together(doing, slow=True, by=share):
                if self.world.rank == 0:
                    self._publish({n: FileEntry(*entry) for data in told for n, entry in json.loads(data).items()})

    def _publish(self, table: dict[str, FileEntry]) -> None:
        folder = self.files.folder
        present = files.listing(folder)
        if missing := sorted(table.keys() - present):
            raise CheckpointError(
                f"rank 0 does not see '{missing[0]}', which another rank has written",
                where=str(folder),
                fix="save to a file system that all hosts share",
            )
        for name in sorted(present - table.keys()):  # from ``files_from``
            table[name] = checksum(folder / name)
        files.commit(folder, self.final, replace(self.manifest, files=dict(sorted(table.items()))))
        if self.total_limit is not None:
            series.delete_oldest(self.final.parent, self.total_limit)


@contextmanager
def _removed_if_it_fails(world: World, out: _Files) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if out.crew is not None:
            out.crew.stop()
        for file in out.by_name.values():
            file.abandon()
        if world.rank == 0:
            shutil.rmtree(out.folder, ignore_errors=True)
        raise


def _check_json(info: Mapping[str, Any] | None) -> None:
    try:
        json.dumps(dict(info or {}))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"info= is not JSON: {error}", fix="give numbers, strings, lists and dicts") from error


def _merged(facts: Sequence[bytes], count: int) -> list[dict[str, dict[str, str]]]:
    """Every rank knows the kinds of the state it holds; together they know all."""
    told = [json.loads(data) for data in facts]
    if odd := [rank for rank, (content, _) in enumerate(told) if content != told[0][0]]:
        raise CheckpointError(
            "gave models or optimizers with other parameters than rank 0",
            where=f"rank {odd[0]}",
            fix="every rank saves the same models and optimizers in the same order",
        )
    out: list[dict[str, dict[str, str]]] = [{} for _ in range(count)]
    for _, collected in told:
        for merged, kinds in zip(out, collected, strict=True):
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
        "extra": {s.label: {k: owner.get_extra_state() for k, owner in s.extra.items()} for s in states},
        "optimizers": [{**o.plain(), "state": k} for o, k in zip(steppers, kinds, strict=True)],
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
    aliases = {(s.label, alias): (s.label, name) for s in states for alias, name in s.aliases.items()}
    return nest, aliases
