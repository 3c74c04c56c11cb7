"""Whole fp32 weights from a checkpoint: of folders that DeepSpeed wrote, and of our own, under any stage.

Nothing in a folder is unpickled, and nothing is needed of the run that wrote it. One process.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardwise.checkpoint.conversion import export
from shardwise.checkpoint.deepspeed_format import step_folder
from shardwise.checkpoint.directory import resolve_latest
from shardwise.checkpoint.formats import open_source
from shardwise.checkpoint.manifest import MANIFEST
from shardwise.checkpoint.model_loading import load_model
from shardwise.checkpoint.source_state import frozen_names
from shardwise.checkpoint.storage_reader import StorageReader
from shardwise.checkpoint.stored_tensor import Source, Stored
from shardwise.errors import CheckpointError

Folder = str | os.PathLike[str]
_DTYPES = {"float32": torch.float32, "fp32": torch.float32, "float16": torch.float16, "fp16": torch.float16,
           "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}  # fmt: skip


class LazyTensor:
    """A tensor that is still in its file.

    Args:
        stored: where.
        dtype: that it will have.
    """

    def __init__(self, stored: Stored, dtype: torch.dtype) -> None:
        self._stored = stored
        self.dtype, self.shape = dtype, torch.Size(stored.shape)

    def numel(self) -> int:
        return self._stored.numel

    def contiguous(self) -> torch.Tensor:
        """Read it, on the CPU; anew each time.

        Raises:
            CheckpointError: its file is not what it was.
        """
        out = torch.empty(self.shape, dtype=self.dtype)
        with StorageReader() as reader:
            reader.read_tensor(self._stored, 0, self._stored.numel, out)
        return out


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: Folder,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Any]:
    """The model's state dict: fp32, whole, on the CPU. Tied tensors are one under all of their names.

    Args:
        checkpoint_dir: the folder with the file ``latest`` in it, or one step's.
        tag: the folder in there; by default the one that ``latest`` names.
        exclude_frozen_parameters: leave out what no optimizer has.
        lazy_mode: :class:`LazyTensor` objects; ``.contiguous()`` reads one.

    Raises:
        CheckpointError: a file is missing or damaged, or it is no such folder.

    Cost: host memory for the whole model; with ``lazy_mode`` for nothing.
    """
    source = _opened(checkpoint_dir, tag)
    left_out = frozen_names(source) if exclude_frozen_parameters else set()
    known: dict[int, Any] = {}
    out: dict[str, Any] = {}
    for name, stored in source.sections[source.section()].items():
        if name in left_out:
            continue
        if id(stored) not in known:
            lazy = LazyTensor(stored, torch.float32 if stored.dtype.is_floating_point else stored.dtype)
            known[id(stored)] = lazy if lazy_mode else lazy.contiguous()
        out[name] = known[id(stored)]
    return out


def convert_zero_checkpoint_to_state_dict(
    checkpoint_dir: Folder,
    output_dir: Folder,
    dtype: torch.dtype | str = torch.float32,
    max_shard_size: int | str = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write the model's weights as transformers reads them.

    Args:
        checkpoint_dir, tag, exclude_frozen_parameters: see :func:`get_fp32_state_dict_from_zero_checkpoint`.
        output_dir: made if it is not there.
        dtype: of floating-point tensors.
        max_shard_size: bytes per file at most, or a text: ``5GB``.
        safe_serialization: ``model.safetensors`` instead of ``pytorch_model.bin``.

    Raises:
        CheckpointError: it cannot be read or written.

    Cost: host memory for a few blocks of 8 MiB, whatever the size.
    """
    source = _opened(checkpoint_dir, tag)
    wanted = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if wanted not in _DTYPES.values():
        raise CheckpointError(f"dtype={dtype!r}", fix="float32, float16 or bfloat16")
    export(
        source.path, output_dir, max_shard_size=max_shard_size, dtype=wanted, safe_serialization=safe_serialization,
        without=frozen_names(source) if exclude_frozen_parameters else (), progress=False,
    )  # fmt: skip


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: Folder,
    output_dir: Folder,
    max_shard_size: int | str = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """:func:`convert_zero_checkpoint_to_state_dict` in fp32."""
    convert_zero_checkpoint_to_state_dict(
        checkpoint_dir, output_dir, torch.float32, max_shard_size, safe_serialization, tag, exclude_frozen_parameters
    )


def load_state_dict_from_zero_checkpoint(model: nn.Module, checkpoint_dir: Folder, tag: str | None = None) -> nn.Module:
    """Load the weights into a model. Sharded ones are filled in place, by all ranks together.

    Args:
        model: any; what the folder does not have keeps its values. One that is not sharded goes to the CPU first.
        checkpoint_dir, tag: see :func:`get_fp32_state_dict_from_zero_checkpoint`.

    Returns:
        The model.

    Raises:
        CheckpointError: it cannot be read, or none of the model's names is in it.
    """
    from shardwise.engine.state_dict import units_of

    if not units_of(model):
        model = model.cpu()
    load_model(model, _step(checkpoint_dir, tag), strict=False, progress=False)
    return model


def _step(checkpoint_dir: Folder, tag: str | None) -> Path:
    root = Path(os.path.realpath(checkpoint_dir))
    if tag is not None:
        return root / str(tag)
    if (root / MANIFEST).is_file():
        return root
    return step_folder(root) or resolve_latest(root / "latest")


def _opened(checkpoint_dir: Folder, tag: str | None) -> Source:
    source = open_source(_step(checkpoint_dir, tag))
    if source.kind not in ("deepspeed", "shardwise"):
        raise CheckpointError(
            "not a folder of DeepSpeed, nor a checkpoint of Shardwise", where=str(source.path),
            fix="give the folder that save_checkpoint was given",
        )  # fmt: skip
    return source
