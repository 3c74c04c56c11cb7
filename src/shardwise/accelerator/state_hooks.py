"""Hooks of ``save_state`` and ``load_state``, and what they leave to us: the same on every rank."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn

from shardwise import checkpoint
from shardwise.checkpoint.coordination import CollectiveBlock
from shardwise.comm import World
from shardwise.errors import CheckpointError

Hook = Callable[..., None]


class HookFolder:
    """A folder beside the checkpoint for what hooks write, until there is a place for it inside. A collective."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent / f"{path.name}.hooks"
        with CollectiveBlock(f"save_state('{path}')"):
            if World.current().rank == 0:
                shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed here
                self.folder.mkdir(parents=True)

    def move_into(self, folder: Path) -> None:
        if World.current().rank == 0:
            for item in self.folder.iterdir():
                shutil.move(str(item), str(folder / item.name))
            self.folder.rmdir()


def run_save_hooks(
    hooks: Collection[Hook],
    models: Sequence[nn.Module],
    path: Path,
    apart: Callable[[str], AbstractContextManager[None]],
) -> tuple[list[nn.Module], Any]:
    """Call ``hook(models, weights, output_dir)``.

    Args:
        apart: around hooks: what the main process may do there without the others.

    Returns:
        The models whose entry in ``weights`` a hook has removed, and the folder with what was written. Rank 0 has the
        weights, so what it removed counts: scripts do it there only, or on every rank.

    Raises:
        CheckpointError: on every rank: a hook failed on one of them, or put other weights into the list.
    """
    if not hooks:
        return [], None
    weights = [checkpoint.full_state_dict(model, rank0_only=True) for model in models]
    folder = HookFolder(path)
    given, left = [dict(w) for w in weights], list(weights)
    with CollectiveBlock(f"hooks of save_state('{path}')", slow=True) as ranks:
        with apart("the end of the hooks of save_state"):
            for hook in hooks:
                hook(list(models), left, str(folder.folder))
        ranks.mine = json.dumps(_left_of(weights, given, left)).encode()
    kept = json.loads(ranks.gathered[0])
    return [model for i, model in enumerate(models) if i not in kept], folder


def _left_of(weights: Sequence[dict[str, Any]], given: Sequence[dict[str, Any]], left: Sequence[Any]) -> list[int]:
    kept = [i for i, w in enumerate(weights) if any(w is one for one in left)]
    same = all(
        weights[i].keys() == given[i].keys() and all(weights[i][k] is v for k, v in given[i].items()) for i in kept
    )
    if len(kept) != len(left) or not same:
        raise CheckpointError(
            "a hook of save_state changed the weights it was shown; what is saved is what the models hold",
            fix="write what you want to save into output_dir, and remove that model's entry from weights",
        )
    return kept


def run_load_hooks(hooks: Collection[Hook], models: Sequence[nn.Module], path: Path) -> list[nn.Module]:
    """Call ``hook(models, input_dir)``.

    Returns:
        The models that a hook has removed from the list.

    Raises:
        CheckpointError: on every rank: a hook failed on one of them, or the ranks removed different models.
    """
    if not hooks:
        return []
    left = list(models)
    with CollectiveBlock(f"hooks of load_state('{path}')", slow=True) as ranks:
        for hook in hooks:
            hook(left, str(path))
        ranks.mine = json.dumps([i for i, m in enumerate(models) if not any(m is one for one in left)]).encode()
    for rank, removed in enumerate(ranks.gathered):
        if removed != ranks.gathered[0]:
            raise CheckpointError(
                f"the hooks of load_state removed models {json.loads(removed)} on rank {rank}, and "
                f"{json.loads(ranks.gathered[0])} on rank 0",
                where=str(path),
                fix="remove the same models on every rank, and load each of them there",
            )
    return [models[i] for i in json.loads(ranks.gathered[0])]
