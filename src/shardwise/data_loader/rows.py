"""The rows of a collated batch: how many samples it holds, and batches made of some of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardwise.trees import is_tensor, leaves, map_leaves


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

    def has_rows(item: Any) -> bool:
        if is_tensor(item):
            return item.ndim > 0 and item.shape[0] == count
        return isinstance(item, (list, tuple)) and len(item) == count and not _is_columns(item, count)

    def pick(item: Any) -> Any:
        return item[list(rows)] if is_tensor(item) else type(item)(item[i] for i in rows)

    return map_leaves(batch, pick, has_rows)


def _is_columns(batch: Sequence[Any], count: int) -> bool:
    """Does a list hold columns of ``count`` rows, rather than ``count`` samples?"""
    if hasattr(batch, "_fields"):
        return True
    tensors = [leaf for leaf in leaves(batch) if isinstance(leaf, torch.Tensor)]
    if tensors:
        return all(t.ndim and t.shape[0] == count for t in tensors)
    return any(isinstance(item, (list, tuple)) and len(item) == count for item in batch)
