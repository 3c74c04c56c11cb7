"""The rows of a collated batch: how many samples it holds, and batches made of some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from shardwise.trees import leaves


def rows_of(batch: Any) -> int | None:
    """How many samples a batch holds, by its first tensor's dim 0; of a list without tensors, its length."""
    for leaf in leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.ndim:
            return int(leaf.shape[0])
    return len(batch) if isinstance(batch, (list, tuple)) else None


def take(batch: Any, rows: Sequence[int], count: int) -> Any:
    """The same nest with ``rows`` of each tensor, and of each list of one object per sample.

    Args:
        batch: what a collate function made of ``count`` samples. Whatever has another length stays as it is.
        rows: which, in what order; one may come several times.
    """
    if isinstance(batch, torch.Tensor):
        return batch[list(rows)] if batch.ndim and batch.shape[0] == count else batch
    if isinstance(batch, Mapping):
        changed = {key: take(value, rows, count) for key, value in batch.items()}
        if isinstance(batch, dict):
            out = batch.copy()  # keeps the class, as Hugging Face's outputs need
            out.update(changed)
            return out
        return type(batch)(changed)  # type: ignore[call-arg]
    if isinstance(batch, (list, tuple)):
        if len(batch) == count and not _is_columns(batch, count):
            return type(batch)(batch[i] for i in rows)
        items = [take(item, rows, count) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def _is_columns(batch: Sequence[Any], count: int) -> bool:
    """Does a list hold columns of ``count`` rows, rather than ``count`` samples?"""
    if hasattr(batch, "_fields"):
        return True
    tensors = [leaf for leaf in leaves(batch) if isinstance(leaf, torch.Tensor)]
    if tensors:
        return all(t.ndim and t.shape[0] == count for t in tensors)
    return any(isinstance(item, (list, tuple)) and len(item) == count for item in batch)
