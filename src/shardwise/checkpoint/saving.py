"""Saving: what the ranks do, in order."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise.checkpoint import files, partly, series
from shardwise.checkpoint.background import AsyncSave, Background, settle_saves
from shardwise.checkpoint.blocks import Buffers, Crew
from shardwise.checkpoint.files import Manifest
from shardwise.checkpoint.models import ModelState, model_states, parameter_labels
from shardwise.checkpoint.optimizers import OptimizerState
from shardwise.checkpoint.progress import Progress
from shardwise.checkpoint.ranks import Together, share
from shardwise.checkpoint.storage import Copy, Tensors
from shardwise.checkpoint.writing import Files, Save
from shardwise.comm import World
from shardwise.engine.optimizer_state import add_reader
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
    progress: bool = True,
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
        progress: show a bar on rank 0, if it has a terminal and this takes longer than a second.

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
        files = Files(Buffers(), crew, Background.of(World.current()).plans)
        save_ = _begin(directory, files, models, optimizers, state, rank_state, info, files_from, total_limit)
        with Progress("writing", save_.copy.nbytes, progress) as files.progress:
            save_.finish(crew, share, copied=lambda: None)
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
    settle_saves()
    background = Background.of(World.current())
    files = Files(background.buffers, None, background.plans)
    save_ = _begin(directory, files, models, optimizers, state, rank_state, info, files_from, total_limit)
    save_.begin_copy()
    background.last = handle = AsyncSave(save_.final, partial(save_.in_background, background.share))
    for optimizer in optimizers:
        add_reader(optimizer, handle.wait_for_copy)
    return handle


def _begin(
    directory: str | os.PathLike[str],
    out: Files,
    models: Sequence[nn.Module],
    optimizers: Sequence[Optimizer],
    state: Mapping[str, Any] | None,
    rank_state: Mapping[str, Any] | None,
    info: Mapping[str, Any] | None,
    files_from: Callable[[Path], None] | None,
    total_limit: int | None,
) -> Save:
    """Everything up to the copy. Collective."""
    world = World.current()
    with Together(f"writing checkpoint {directory}") as ranks:
        states = model_states(models)
        for s in states:
            partly.refuse(s.module)
        labels = parameter_labels(states)
        steppers = [OptimizerState(i, o, labels) for i, o in enumerate(optimizers)]
        collected = [stepper.collect() for stepper in steppers]
        tensors = Tensors(*_nest(states, steppers, [found for found, _ in collected], world.rank == 0), out.plans)
        names = [(s.label, sorted(s.parameters), sorted(s.buffers)) for s in states]
        groups = [(o.label, [s.label for s in o.slots]) for o in steppers]
        _check_json(info)
        series.check_limit(total_limit)
        ranks.mine = _Facts(
            path=os.path.realpath(directory),
            content=zlib.crc32(json.dumps([names, groups]).encode()),
            kinds=[kinds for _, kinds in collected],
            buffers=[s.buffers_crc() for s in states],
            plan=(tensors.key, out.plans.key),
        ).dumps()
    told = [_Facts(**json.loads(data)) for data in ranks.told]
    kinds = _merged(told, len(steppers))
    final = Path(told[0].path)
    doing = f"writing checkpoint {final}"
    tensors.agree([facts.plan for facts in told], doing)
    with Together(doing) as ranks:
        if world.rank == 0:
            ranks.mine = str(files.begin(final)).encode()
    out.folder = Path(ranks.told[0].decode())
    manifest = Manifest(
        world_size=world.size,
        strategies=[s.strategy for s in states],
        models=[type(s.module).__name__ for s in states],
        optimizers=[type(o.optimizer).__name__ for o in steppers],
        torch=torch.__version__,
        saved_at=time.time(),
        info=dict(info or {}),
    )
    differ = {s.label: s.buffers for k, s in enumerate(states) if len({facts.buffers[k] for facts in told}) > 1}

    def small() -> Iterator[tuple[str, Mapping[str, Any]]]:
        own = {label: {name: b.detach() for name, b in buffers.items()} for label, buffers in differ.items()}
        yield f"rank_{world.rank}.pt", {"rank_state": dict(rank_state or {}), "buffers": own}
        if world.rank == 0:
            yield "state.pt", _common(states, steppers, kinds, state)

    changes_in_step = tuple(f"{o.label}." for o in steppers)
    return Save(world, out, final, manifest, small, files_from, Copy(out.new, tensors), changes_in_step, total_limit)


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
