"""Lightning's checkpoints as checkpoints of Shardwise: a folder that any strategy and any number of ranks loads.

Lightning puts everything into one dict. Weights and optimizer state are written from the shards; what is left (loops,
callbacks, schedulers, hyperparameters) is the ``state`` of the checkpoint. Of that, what could not be read back without
running code is in a file beside it, ``lightning.pt``, which is read as Lightning reads its own files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise import checkpoint
from shardwise.checkpoint.formats import open_source
from shardwise.checkpoint.small_state import dumps
from shardwise.checkpoint.source_state import state_of
from shardwise.checkpoint.storage_reader import StorageReader
from shardwise.comm import World
from shardwise.errors import CheckpointError, ConfigError, first_line
from shardwise.operations import broadcast_object_list

_FILE = "lightning.pt"
_STATE = "lightning"


class OnRanks(dict[str, Any]):
    """What stands in Lightning's dict for values that stay on the ranks. Nobody can read or change it there."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError(
            "weights and optimizer state go from the shards to the disk, and are not in this dict",
            where="on_save_checkpoint",
            fix="ShardwiseStrategy(..., state_dict_type='full') gathers them; or keep what you need under a key of "
            "your own",
        )

    __getitem__ = __setitem__ = __delitem__ = __iter__ = __contains__ = _refuse
    keys = values = items = get = pop = popitem = update = setdefault = clear = copy = _refuse


def local(path: str | os.PathLike[str]) -> Path:
    """A path on a file system.

    Raises:
        CheckpointError: it is somewhere else.
    """
    if "://" in str(path):
        raise CheckpointError(
            "shards are written to a file system only", where=str(path),
            fix="a path that all hosts share, or state_dict_type='full' with a CheckpointIO of Lightning's",
        )  # fmt: skip
    return Path(path)


def save(
    path: str | os.PathLike[str],
    models: Sequence[nn.Module],
    optimizers: Sequence[Optimizer],
    rest: Mapping[str, Any],
    info: Mapping[str, Any],
) -> None:
    """Write a checkpoint. Collective.

    Args:
        models, optimizers: sharded, or plain.
        rest: what Lightning has beside them; rank 0's is written.
        info: small JSON for people and tools.

    Raises:
        CheckpointError: see :func:`shardwise.checkpoint.save`.
    """
    plain, other = _divided(rest) if World.current().rank == 0 else ({}, {})

    def write(folder: Path) -> None:
        if other:
            torch.save(other, folder / _FILE)

    checkpoint.save(
        local(path), models=models, optimizers=optimizers, state={_STATE: plain}, info=info, files_from=write
    )


def _divided(rest: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is plain data, and what is not."""
    plain: dict[str, Any] = {}
    other: dict[str, Any] = {}
    for key, value in rest.items():
        try:
            dumps({key: value})
        except CheckpointError:
            other[key] = value
        else:
            plain[key] = value
    return plain, other


def load(
    path: str | os.PathLike[str],
    models: Sequence[nn.Module],
    optimizers: Sequence[Optimizer] | None,
    *,
    strict: bool,
    weights_only: bool | None,
) -> dict[str, Any]:
    """Load into models and optimizers, whoever saved. Collective.

    Args:
        optimizers: ``None``: leave theirs out.
        weights_only: what ``torch.load`` is told about ``lightning.pt``, if there is one.

    Returns:
        What was given as ``rest``.

    Raises:
        CheckpointError: see :func:`shardwise.checkpoint.load`.
    """
    loaded = checkpoint.load(path, models=models, optimizers=optimizers, strict=strict)
    folder = checkpoint.find(path)
    return _rest(folder, loaded.state, weights_only)


def load_whole_optimizers(optimizers: Sequence[Optimizer], states: Sequence[Mapping[str, Any]]) -> None:
    """Load what plain optimizers had; each rank takes its part. Nothing, if there is no state at all.

    Raises:
        CheckpointError: other optimizers.
    """
    if states and len(states) != len(optimizers):
        raise CheckpointError(
            f"the file has {len(states)} optimizers, and the module {len(optimizers)}",
            fix="configure_optimizers as it was when it was saved",
        )
    for optimizer, state in zip(optimizers, states, strict=False):
        checkpoint.load_full_optimizer_state(optimizer, state)


def _rest(folder: Path, state: Any, weights_only: bool | None) -> dict[str, Any]:
    """Lightning's part of a checkpoint that Lightning or somebody else saved."""
    found = dict(state[_STATE]) if isinstance(state, Mapping) and _STATE in state else {}
    file = folder / _FILE
    if file.is_file():
        try:
            found |= torch.load(file, map_location="cpu", weights_only=True if weights_only is None else weights_only)
        except Exception as error:
            raise CheckpointError(
                f"cannot be read without running code: {first_line(error)}",
                where=str(file),
                fix="torch.serialization.add_safe_globals([...]) with the classes it names, if you trust the file",
            ) from error
    return found


def export(path: str | os.PathLike[str], file: str | os.PathLike[str], *, weights_only: bool | None = None) -> Path:
    """Write a checkpoint's weights and hyperparameters as a file of Lightning's, for ``load_from_checkpoint``.

    Needs no ranks: call it in one process. Optimizer state stays in the checkpoint, which trainings go on from.

    Args:
        path: what a Trainer saved under this strategy, or ``folder/latest``.
        file: is replaced if it is there.
        weights_only: what ``torch.load`` is told about hyperparameters that are not plain data.

    Returns:
        The file's path.

    Raises:
        CheckpointError: damaged, or not a checkpoint of a Trainer.

    Cost: the whole model's host memory.
    """
    source = open_source(path)
    found = state_of(source)
    rest = {} if found is None else _rest(source.path, found[0]["state"], weights_only)
    if "pytorch-lightning_version" not in rest:
        raise CheckpointError(
            "not a checkpoint of a Trainer",
            where=str(source.path),
            fix="shardwise.checkpoint.export writes its weights",
        )
    weights: dict[str, torch.Tensor] = {}
    copies: dict[int, torch.Tensor] = {}  # tied ones are one tensor
    entries = checkpoint.read_manifest(source.path).files
    with StorageReader({source.path / name: entry for name, entry in entries.items()}) as reader:
        for name, stored in source.sections[("model",)].items():
            if id(stored) not in copies:
                values = torch.empty(stored.numel, dtype=stored.dtype)
                reader.read_tensor(stored, 0, stored.numel, values)
                copies[id(stored)] = values.view(stored.shape)
            weights[name] = copies[id(stored)]
    target = Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    torch.save({**rest, "state_dict": weights}, temporary)
    temporary.replace(target)
    return target


def kind_of(path: str | os.PathLike[str]) -> str:
    """What rank 0 sees at a path, for every rank: ``file``, ``folder`` or ``""``. Collective."""
    at = Path(path)
    found = [("file" if at.is_file() else "folder" if at.is_dir() else "") if World.current().rank == 0 else ""]
    return str(broadcast_object_list(found)[0])


def in_saved_order(path: str | os.PathLike[str], key: str, given: Mapping[str, Any]) -> list[Any]:
    """What was given by name, in the order in which a checkpoint has it: there it has numbers.

    Args:
        key: ``models`` or ``optimizers``.

    Raises:
        CheckpointError: other names than it has.
    """
    names = checkpoint.read_manifest(checkpoint.find(path)).info.get(key)
    if not isinstance(names, list) or not given:  # not one of Fabric's; or left out
        return list(given.values())
    if set(names) != set(given):
        raise CheckpointError(
            f"it has the {key} {', '.join(names) or '(none)'}, and {', '.join(given)} were given",
            where=str(path),
            fix="give them under the names they were saved with; optimizers may be left out, all of them",
        )
    return [given[name] for name in names]
