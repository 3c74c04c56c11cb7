"""``load``: a model that may be larger than any memory, ready to run, with its weights read in place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


def load(
    model: str | os.PathLike[str] | nn.Module,
    device_map: str | Mapping[str, int | str | torch.device] = "auto",
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    dtype: torch.dtype | str | None = None,
    no_split_module_classes: Sequence[str] | None = None,
    batch: int = 1,
    length: int = 2048,
    ahead: int = 1,
    verbose: bool = False,
) -> Any:
    """Load a model for running it, however large it is.

    Args:
        model: a Hugging Face folder with ``config.json`` and weights; or a module, on the meta device as a rule, whose
            weights are in ``checkpoint``.
        device_map: ``auto``: as much as fits stays on the device, then in host memory; the rest is read from its files
            each time it is used, ahead of that use. ``split``: likewise, with every unit split over all ranks.
            Or a dict from names of modules to ``"disk"``, ``"cpu"``, a device or its number, ``""`` being the rest.
        checkpoint: files of weights: whatever :func:`shardwise.checkpoint.load_model` reads.
        max_memory: bytes (or ``"10GiB"``) that may be used, by device number and ``"cpu"``; default: what is free now.
        dtype: to run in; ``None``: as the files (or the configuration) say. What differs is converted on arrival.
        no_split_module_classes: what comes and goes as a whole; default: repeated blocks, and what is as large.
        batch, length: sequences at a time and tokens of each, for which room is left.
        ahead: units that are read ahead of the next one.
        verbose: print where everything is.

    Returns:
        The module, in eval mode, with frozen parameters. Its class, its ``forward`` and its names are what they were;
        ``generate`` and ``state_dict`` work. ``shardwise_plan`` says where its weights are.

    Raises:
        CheckpointError: no weights, damaged ones, or they do not fit the model.
        OffloadError: too little memory: says how much is missing.
        UnitError: the map names unknown modules, or leaves some out.

    Cost: reads what stays in memory, once. Beside it, on the device: ``ahead + 2`` units while the model runs. Nothing
    is written, and what is on the disk is not copied there.
    """
    from shardwise.inference.loading import (
        load_from_files,  # reads checkpoints of all kinds, which takes a while to import
    )

    return load_from_files(
        model, device_map, checkpoint, max_memory, dtype, no_split_module_classes, batch, length, ahead, verbose
    )
