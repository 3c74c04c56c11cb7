"""``load``: a model that may be larger than any memory, ready to run, with its weights read in place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


def load(
    model: str | os.PathLike[str] | nn.Module,
    device_map: str | int | torch.device | Mapping[str, int | str | torch.device] | None = "auto",
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    dtype: torch.dtype | str | None = None,
    no_split_module_classes: Sequence[str] | str | None = None,
    batch: int = 1,
    length: int = 2048,
    ahead: int | None = None,
    micro_batches: int | None = None,
    verbose: bool = False,
    strict: bool = True,
    quantization: str | None = None,
) -> Any:
    """Load a model for running it, however large it is.

    Args:
        model: a Hugging Face folder with ``config.json`` and weights; or a module, on the meta device as a rule, whose
            weights are in ``checkpoint``.
        device_map: ``auto`` (or ``balanced``): as much as fits stays on the devices that are this rank's, each with a
            part that goes with its memory, then in host memory; the rest is read from its files each time it is used,
            ahead of that use. ``sequential``: one device is filled before the next. ``balanced_low_0``: the first one
            is left free, as far as that goes. ``split``: as ``auto`` on one device, with every unit split over all
            ranks. Or a dict from names of modules to ``"disk"``, ``"cpu"``, a device or its number, ``""`` being the
            rest; what is not on a device runs on that of the module before it. Or one of these for all of it; ``None``:
            where this rank computes.
        checkpoint: files of weights: whatever :func:`shardwise.checkpoint.load_model` reads.
        max_memory: bytes (or ``"10GiB"``) that may be used, by device number and ``"cpu"``; default: what is free now.
            If it names devices, no others are used.
        dtype: to run in; ``None``: as the files (or the configuration) say. What differs is converted on arrival.
        no_split_module_classes: what comes and goes as a whole; default: repeated blocks, and what is as large.
        batch, length: sequences at a time and tokens of each, for which room is left.
        ahead: there has to be room for so many of the largest units, read ahead of the one that is next. ``None``: for
            what is fastest, by what is measured in a fifth of a second; of a dict, and of several devices: 1.
        micro_batches: run a forward without gradients in so many pieces along the batch, so that several devices
            compute at once. ``None``: for models of transformers that are wholly on several devices, where the batch is
            large enough. Results are those of the pieces. Outputs need a row for each of the batch, or it runs whole.
        verbose: print where everything is.
        strict: files must not have more than the model, but for what its class says to be of no use. Lacking something
            is an error always.
        quantization: ``int8``: linear layers become :class:`~shardwise.QuantizedLinear` as they are read, those of
            :func:`shardwise.quantize`. Not what is read from the disk for each use: write that in int8 first, with
            :func:`shardwise.quantize_checkpoint`. What files have in int8 is read as it is, whatever is said here.

    Returns:
        The module, in eval mode, with frozen parameters. Its class, its ``forward`` and its names are what they were;
        ``generate`` and ``state_dict`` work. ``shardwise_plan`` says where its weights are.

    Raises:
        CheckpointError: no weights, damaged ones, or they do not fit the model.
        OffloadError: too little memory: says how much is missing. Weights to be quantised for each use.
        UnitError: the map names unknown modules, or leaves some out.
        DeviceError: it names a device that is not there.

    Cost: reads what stays in memory, once. Beside it, on the device: units on their way, ``ahead + 2`` of them or as
    many as the rest of the memory holds. Nothing is written, and what is on the disk is not copied there.
    """
    from shardwise.inference.loading import (
        load_from_files,  # reads checkpoints of all kinds, which takes a while to import
    )

    return load_from_files(
        model,
        device_map,
        checkpoint,
        max_memory,
        dtype,
        no_split_module_classes,
        batch,
        length,
        ahead,
        micro_batches,
        verbose,
        strict,
        quantization,
    )
