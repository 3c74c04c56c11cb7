"""Checkpoints for a loop in Ray Train: every worker's part arrives in Ray's storage, and a new group goes on from it.

::

    from ray.train.torch import TorchTrainer
    import shardwise, shardwise.ray

    def loop(config):
        shardwise.init()                                    # in the process group that Ray has set up
        model = shardwise.fully_shard(Net(), strategy="zero3")
        optimizer = torch.optim.AdamW(model.parameters())
        found = shardwise.ray.load(models=[model], optimizers=[optimizer])
        for epoch in range(0 if found is None else found.state["epoch"] + 1, 10):
            ...
            shardwise.ray.report({"loss": loss}, models=[model], optimizers=[optimizer], state={"epoch": epoch})

    TorchTrainer(loop, scaling_config=..., run_config=RunConfig(failure_config=FailureConfig(max_failures=3))).fit()

What is in the storage is a checkpoint of :mod:`shardwise.checkpoint`: any strategy and any number of workers loads it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from shardwise import checkpoint
from shardwise.checkpoint.manifest import MANIFEST
from shardwise.comm import World
from shardwise.errors import CheckpointError, ConfigError, MissingPackage
from shardwise.operations import barrier, broadcast_object_list

OLDEST = (2, 40)
"""The oldest version of Ray whose ``ray.train`` this was written for; the newest that it was tested with is 2.60."""


def _train() -> Any:
    try:
        import ray
        import ray.train
    except ImportError as error:
        raise MissingPackage("Ray Train is not installed", fix="pip install 'ray[train]>=2.40,<3'") from error
    numbers = tuple(int(part) for part in ray.__version__.split(".")[:2])
    if not OLDEST <= numbers < (3, 0):
        raise ConfigError(
            f"Ray {ray.__version__} is not served: versions 2.40 to 2.x are",
            where="shardwise.ray",
            fix="pip install 'ray[train]>=2.40,<3'",
        )
    return ray.train


def report(
    metrics: Mapping[str, Any],
    *,
    models: Sequence[nn.Module] = (),
    optimizers: Sequence[Optimizer] = (),
    state: Mapping[str, Any] | None = None,
    rank_state: Mapping[str, Any] | None = None,
    checkpoint_dir_name: str | None = None,
    staging: str | os.PathLike[str] | None = None,
) -> None:
    """``ray.train.report`` with a checkpoint of what the workers hold. Collective.

    Args:
        metrics: this worker's.
        models, optimizers, state, rank_state: see :func:`shardwise.checkpoint.save`. Without models, figures alone are
            reported.
        checkpoint_dir_name: what Ray calls it; a time by default.
        staging: a folder in which it is written before it goes to the storage, for all workers: with several hosts one
            that they share. By default the system's folder for temporary files.

    Raises:
        CheckpointError: see :func:`shardwise.checkpoint.save`; or workers on several hosts and no ``staging``.
        ConfigError, MissingPackage: Ray is not served, or not there.

    Cost: each worker writes what it holds, and sends its share of the files to the storage.
    """
    train = _train()
    if not models:
        train.report(dict(metrics))
        return
    world = World.current()
    if staging is None and world.local_size < world.size:
        raise CheckpointError(
            "workers on several hosts write one checkpoint", where="shardwise.ray.report",
            fix="staging= a folder that all hosts share",
        )  # fmt: skip
    made = [tempfile.mkdtemp(prefix="shardwise-", dir=staging) if world.rank == 0 else ""]
    root = Path(broadcast_object_list(made)[0])
    mine = root / f"worker_{world.rank}"
    try:
        path = checkpoint.save(
            root / "checkpoint", models=models, optimizers=optimizers, state=state, rank_state=rank_state
        )
        files = sorted([*checkpoint.read_manifest(path).files, MANIFEST])
        barrier()  # all have read what is in it
        mine.mkdir()
        for name in files[world.rank :: world.size]:
            (path / name).rename(mine / name)
        options = {} if checkpoint_dir_name is None else {"checkpoint_dir_name": checkpoint_dir_name}
        train.report(dict(metrics), checkpoint=train.Checkpoint.from_directory(mine), **options)
        barrier()  # all have sent their share
    finally:
        shutil.rmtree(root if world.rank == 0 else mine, ignore_errors=True)


def load(
    *, models: Sequence[nn.Module], optimizers: Sequence[Optimizer] | None = None, strict: bool = True
) -> checkpoint.Loaded | None:
    """Load the newest checkpoint that was reported, into models and optimizers. Collective.

    After a worker died and its group was started anew, that is the last one that arrived; with
    ``TorchTrainer(resume_from_checkpoint=...)`` the one given, before there is a newer one.

    Args:
        models, optimizers, strict: see :func:`shardwise.checkpoint.load`.

    Returns:
        The small state; ``None`` if there is no checkpoint.

    Raises:
        CheckpointError: it does not fit, or is damaged.
    """
    found = _train().get_checkpoint()
    if found is None:
        return None
    with found.as_directory() as folder:
        return checkpoint.load(folder, models=models, optimizers=optimizers, strict=strict)
