"""Saving: what the ranks do, in order."""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise.checkpoint import files, safe
from shardwise.checkpoint.files import FileEntry, Manifest
from shardwise.checkpoint.models import ModelState, model_states, parameter_labels
from shardwise.checkpoint.optimizers import OptimizerState
from shardwise.checkpoint.ranks import Together, from_first, share
from shardwise.checkpoint.storage import Counted, write_tensors
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

    Returns:
        The absolute path of the checkpoint.

    Raises:
        CheckpointError: on every rank; nothing has changed on disk then.
        OptimizerError: an optimizer that cannot step on slices.

    Cost: each rank writes what it holds, once over all ranks, and keeps no copy of it. Some small collectives.
    """
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
    kinds = _merged(share(facts), len(steppers))
    own_buffers = {s.label: own for s in states if (own := s.own_buffers())}
    made = ""
    with Together(doing):
        if world.rank == 0:
            made = str(files.begin(final))
    temporary = Path(from_first(made))
    try:
        with Together(doing, slow=True):
            if not temporary.is_dir():
                raise CheckpointError(
                    "rank 0 has made this directory, and this rank does not see it",
                    where=str(temporary),
                    fix="save to a file system that all hosts share",
                )
            written = _write_small(
                temporary,
                _common(states, steppers, kinds, state) if world.rank == 0 else None,
                {"rank_state": dict(rank_state or {}), "buffers": own_buffers},
            )
            if files_from is not None:
                files_from(temporary)
        tensors, aliases = _nest(states, steppers, [found for found, _ in collected], world.rank == 0)
        written.update(write_tensors(temporary, tensors, aliases))
        _publish_directory(temporary, final, written, states, steppers, info)
    except BaseException:
        if world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


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


def _write_small(temporary: Path, common: Mapping[str, Any] | None, own: Mapping[str, Any]) -> dict[str, FileEntry]:
    written: dict[str, FileEntry] = {}
    contents = {} if common is None else {"state.pt": common}
    for name, value in {**contents, f"rank_{World.current().rank}.pt": own}.items():
        with (temporary / name).open("wb") as raw:
            counted = Counted(raw)
            safe.write(value, counted)  # type: ignore[arg-type]
            raw.flush()
            os.fsync(raw.fileno())
        safe.check(value, temporary / name)
        written[name] = counted.entry
    return written


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


def _publish_directory(
    temporary: Path,
    final: Path,
    written: Mapping[str, FileEntry],
    states: Sequence[ModelState],
    steppers: Sequence[OptimizerState],
    info: Mapping[str, Any] | None,
) -> None:
    world = World.current()
    told = share(json.dumps({name: [e.size, e.crc32] for name, e in written.items()}).encode())
    with Together(f"writing checkpoint {final}", slow=True):
        if world.rank:
            return
        table = {name: FileEntry(*entry) for data in told for name, entry in json.loads(data).items()}
        present = files.listing(temporary)
        if missing := sorted(table.keys() - present):
            raise CheckpointError(
                f"rank 0 does not see '{missing[0]}', which another rank has written",
                where=str(temporary),
                fix="save to a file system that all hosts share",
            )
        for name in sorted(present - table.keys()):  # from ``files_from``
            table[name] = files.checksum(temporary / name)
        manifest = Manifest(
            world_size=world.size,
            strategies=[s.strategy for s in states],
            models=[type(s.module).__name__ for s in states],
            optimizers=[type(o.optimizer).__name__ for o in steppers],
            torch=torch.__version__,
            saved_at=time.time(),
            info=dict(info or {}),
            files=dict(sorted(table.items())),
        )
        files.commit(temporary, final, manifest)
