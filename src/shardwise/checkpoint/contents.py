"""What a load finds in a checkpoint, whoever wrote it, in the terms of our own ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata

from shardwise.checkpoint.manifest import Manifest
from shardwise.checkpoint.model_state import Slices
from shardwise.checkpoint.storage_reader import StorageReader
from shardwise.checkpoint.stored_tensor import Stored
from shardwise.tiers.swapped_tensor import fetch


class Plan(Protocol):
    """Fills tensors in place, some at a time."""

    @property
    def nbytes(self) -> int:
        """Of all tensors, in the files."""

    def read(self, names: Collection[str]) -> None:
        """Let tensors have their values.

        Raises:
            CheckpointError: a file is missing or damaged. Some tensors may have changed.
        """

    def forget(self, names: Collection[str]) -> None:
        """Hold tensors no longer."""


@dataclass
class Contents:
    """A checkpoint as :func:`~shardwise.checkpoint.load` takes it.

    Args:
        path: where it is.
        manifest: facts about it.
        metadata: names, shapes and dtypes of its tensors: ``model.<name>``, ``optimizer.state.<name>.<key>``.
        common: ``state``, ``extra`` and ``optimizers``, as our own ``state.pt`` has them.
        own: this rank's ``rank_state`` and ``buffers``; ``None`` if there are none.
        plan: given tensors to fill, by name, and whom to tell how many bytes were read, makes the plan.
        left_out: what was there and cannot be delivered, in words.
    """

    path: Path
    manifest: Manifest
    metadata: Metadata
    common: dict[str, Any]
    own: dict[str, Any] | None
    plan: Callable[[dict[str, torch.Tensor], Callable[[int], None]], Plan]
    left_out: tuple[str, ...] = ()


class StoredPlan:
    """A :class:`Plan` for tensors that are anywhere in files.

    Args:
        stored: by name.
        tensors: to fill, by name, all of them in ``stored`` with the same shape.
        seen: told the number of bytes after each read.

    Cost: reads the bytes of what is filled, straight into it where dtypes are equal and it is on the CPU, else through
    one block of 8 MiB.
    """

    def __init__(
        self, stored: Mapping[str, Stored], tensors: dict[str, torch.Tensor], seen: Callable[[int], None]
    ) -> None:
        self._stored, self._tensors = stored, tensors
        self._reader = StorageReader(seen=seen)

    @property
    def nbytes(self) -> int:
        return sum(self._numel(t) * self._stored[name].dtype.itemsize for name, t in self._tensors.items())

    @staticmethod
    def _numel(tensor: torch.Tensor) -> int:
        return sum(b - a for a, b, _ in tensor.pieces) if isinstance(tensor, Slices) else tensor.numel()

    def read(self, names: Collection[str]) -> None:
        with self._reader as reader:
            for name in names:
                stored, tensor = self._stored[name], self._tensors[name]
                if isinstance(tensor, Slices):
                    for start, stop, piece in tensor.pieces:
                        reader.read_tensor(stored, start, stop, fetch(piece))
                elif tensor.is_contiguous():
                    reader.read_tensor(stored, 0, stored.numel, tensor)
                else:
                    tensor.copy_(reader.values(stored).view(stored.shape))

    def forget(self, names: Collection[str]) -> None:
        for name in names:
            del self._tensors[name]


def metadata_of(stored: Mapping[str, Stored]) -> Metadata:
    """An index of tensors that were not stored by ``torch.distributed.checkpoint``.

    ``planner_data`` has, by name, what tied names have in common.
    """
    entries = {
        name: TensorStorageMetadata(TensorProperties(dtype=t.dtype), torch.Size(t.shape), [])
        for name, t in stored.items()
    }
    return Metadata(dict(entries), {name: id(t) for name, t in stored.items()})
