"""The rows of a collated batch: how many samples it holds, and batches made of some of them.

A *column* is what holds one row per sample: a tensor or NumPy array by dim 0, a packed sequence by its sequences, a
list or tuple by its items.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from shardwise.errors import DataError
from shardwise.trees import children, is_named_tuple, map_leaves, steps

_FIX = (
    "let collate_fn return tensors, NumPy arrays or lists with one row per sample in dim 0, alone or in dicts, tuples "
    "and dataclasses; or pass slice_fn_for_dispatch, which cuts batches of any kind; or leave split_batches out"
)


def rows_of(batch: Any) -> int | None:
    """How many samples a batch holds, by its first tensor or array; without any, by its first list."""
    for _, column in _arrays(batch):
        if (rows := _length(column)) is not None:
            return rows
    return _list_length(batch)


def take(batch: Any, rows: Sequence[int], count: int) -> Any:
    """The same nest with ``rows`` of each of its columns. Scalars, texts and shorter lists stay as they are.

    Args:
        batch: what a collate function made of ``count`` samples.
        rows: which, in what order; one may come several times.

    Raises:
        DataError: see :func:`check`.
    """
    check(batch, count)
    return map_leaves(batch, lambda column: _pick(column, rows), lambda item: _is_column(item, count))


def check(batch: Any, count: int) -> None:
    """Raise if a batch does not hold ``count`` rows: it has another number of them, or they cannot be told.

    Raises:
        DataError: it names what has no such rows.
    """
    kind = type(batch).__name__
    found = False
    for name, item in _parts(batch, count):
        if _is_column(item, count):
            found = True
        elif problem := _problem(item, count):
            at = f"{name} in it is " if name else "it is "
            raise DataError(
                f"a batch of {count} samples that is a {kind} cannot be cut into rows: {at}{problem}", fix=_FIX
            )
    if not found:
        raise DataError(f"nothing in a batch of {count} samples that is a {kind} has {count} rows to cut", fix=_FIX)


def has_rows(batch: Any, count: int) -> bool:
    """Does :func:`check` find ``count`` rows?"""
    try:
        check(batch, count)
    except DataError:
        return False
    return True


def unknown(batch: Any) -> DataError:
    """The error for a batch of which not even the number of rows is known."""
    return DataError(f"split_batches found no rows to cut in a batch that is a {type(batch).__name__}", fix=_FIX)


# --- one column --------------------------------------------------------------------------------
def _length(item: Any) -> int | None:
    """The rows of a tensor, an array or a packed sequence; ``None`` for a scalar, and for anything else."""
    if isinstance(item, PackedSequence):
        return int(item.batch_sizes[0])
    if isinstance(item, torch.Tensor):
        return int(item.size(0)) if item.dim() else None
    return int(item.shape[0]) if isinstance(item, np.ndarray) and item.ndim else None


def _is_column(item: Any, count: int) -> bool:
    if isinstance(item, (PackedSequence, np.ndarray)):
        return _length(item) == count
    if isinstance(item, torch.Tensor):
        return _length(item) == count and not item.is_nested and item.layout in (torch.strided, torch.sparse_coo)
    return isinstance(item, (list, tuple)) and len(item) == count and not _is_columns(item, count)


def _pick(column: Any, rows: Sequence[int]) -> Any:
    if isinstance(column, PackedSequence):
        every = unpack_sequence(column)
        chosen = [every[i] for i in rows]
        descending = all(len(a) >= len(b) for a, b in pairwise(chosen))
        return pack_sequence(chosen, enforce_sorted=descending and column.sorted_indices is None)
    if isinstance(column, torch.Tensor) and column.layout is torch.sparse_coo:
        return column.index_select(0, torch.tensor(rows, device=column.device))
    if isinstance(column, (torch.Tensor, np.ndarray)):
        return column[list(rows)]
    return type(column)(column[i] for i in rows)


def _is_columns(batch: Sequence[Any], count: int) -> bool:
    """Does a list hold columns of ``count`` rows, rather than ``count`` samples?"""
    if is_named_tuple(batch):
        return True
    lengths = [_length(item) for _, item in _arrays(batch)]
    if lengths:
        # A collate function of one's own returns a tuple; a list may be the samples as they came, of any length.
        return count in lengths if isinstance(batch, tuple) else all(n == count for n in lengths)
    return any(isinstance(item, (list, tuple)) and len(item) == count for item in batch)


# --- what is in a batch ------------------------------------------------------------------------
def _walk(item: Any, enter: Callable[[Any], bool], name: str = "") -> Iterator[tuple[str, Any]]:
    """(how it is reached, item) for everything in a nest that is a leaf, or that is not to be entered."""
    inside = children(item)
    if inside is None or not enter(item):
        yield name, item
        return
    for step, child in zip(steps(item), inside, strict=True):
        yield from _walk(child, enter, name + step)


def _arrays(batch: Any) -> Iterator[tuple[str, Any]]:
    found = _walk(batch, lambda item: not isinstance(item, PackedSequence))
    return ((name, item) for name, item in found if isinstance(item, (torch.Tensor, np.ndarray, PackedSequence)))


def _parts(batch: Any, count: int) -> Iterator[tuple[str, Any]]:
    return _walk(batch, lambda item: not isinstance(item, PackedSequence) and not _is_column(item, count))


def _list_length(batch: Any) -> int | None:
    """The length of the first list that holds no other; columns of texts count as such."""
    if isinstance(batch, (list, tuple)) and not is_named_tuple(batch):
        nested = [item for item in batch if isinstance(item, (list, tuple))]
        same = len(nested) == len(batch) and len({len(item) for item in nested}) == 1
        return len(nested[0]) if isinstance(batch, tuple) and nested and same else len(batch)
    for item in children(batch) or ():
        if (length := _list_length(item)) is not None:
            return length
    return None


def _problem(item: Any, count: int) -> str:
    """Why a part that is no column cannot be the same for all rows; empty if it can."""
    name = type(item).__name__
    rows = _length(item)
    if rows is not None and rows != count:
        shape = "" if isinstance(item, PackedSequence) else f" of shape {tuple(item.shape)}"
        return f"a {name}{shape} with {rows} row{'s' * (rows != 1)}"
    if rows is not None:
        return f"a {name} that is nested or of layout {item.layout}, whose rows cannot be picked"
    return f"a {name}, whose rows are not known" if _may_have_rows(item) else ""


def _may_have_rows(leaf: Any) -> bool:
    """Is an object more than one value that holds for the whole batch?"""
    plain = (str, bytes, set, frozenset, enum.Enum, type, nn.Module, torch.Tensor, np.ndarray, np.generic)
    if leaf is None or isinstance(leaf, plain) or (callable(leaf) and not hasattr(leaf, "to")):
        return False
    return hasattr(leaf, "__len__") or callable(getattr(leaf, "to", None)) or bool(getattr(leaf, "__dict__", None))
