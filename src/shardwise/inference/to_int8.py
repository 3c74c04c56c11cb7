"""``quantize_checkpoint``: a model's files once more, with its linear layers in int8."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from torch import nn

from shardwise.quantization.int8 import BLOCK


def quantize_checkpoint(
    model: str | os.PathLike[str] | nn.Module,
    out: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    block: int = BLOCK,
    skip: Collection[str] | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> Path:
    """Write a folder that :func:`shardwise.load` reads in place, about half as large as one of bf16 weights.

    The weights that :func:`shardwise.quantize` would quantise are int8 with fp32 scales, bit for bit the same; others
    are as they were. What else is in the folder is copied: tokenizer, generation settings.

    Args:
        model: a Hugging Face folder; or a module, on the meta device as a rule, whose weights are in ``checkpoint``.
        out: a new folder, or an empty one. Of a Hugging Face folder, ``config.json`` is written last: a folder
            without it is not complete.
        block, skip: as for :func:`shardwise.quantize`.
        max_shard_size: bytes per file at most (one tensor is never cut), or a text: ``500MB``, ``10GiB``.
        progress: show a bar, on a terminal.

    Returns:
        The folder.

    Raises:
        CheckpointError: no weights, damaged ones, such that are quantised already or have no place in safetensors; the
            folder is not empty, or cannot be written.
        UnitError: there is nothing to quantise, ``skip`` names what there is not, or a weight is infinite or NaN.

    Cost: reads everything once. Host memory: some blocks of 8 MiB. Call it in one process.
    """
    from shardwise.inference.quantized_files import write_in_int8  # reads checkpoints of all kinds: see ``load``

    return write_in_int8(model, out, checkpoint, block, skip, max_shard_size, progress)
