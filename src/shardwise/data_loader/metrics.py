"""Every sample once: numbers of all ranks without the samples that a round repeats."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from shardwise import operations
from shardwise.comm import World
from shardwise.data_loader.messages import exchange
from shardwise.data_loader.sampling import Tail
from shardwise.errors import TensorError
from shardwise.trees import children, is_named_tuple, is_tensor, join, leaves, map_tensors


def gather_for_metrics(input_data: Any, tail: Tail | None, use_gather_object: bool = False) -> Any:
    """What all ranks bring, concatenated in the order of the samples, each sample of the dataset once.

    Args:
        input_data: nested tensors with one row (or equally many rows) per sample of the batch in hand; or other
            objects. A list of these holds one object per sample (or equally many); tuples, mappings and dataclasses
            of lists (and tensors) hold columns, of which each is joined for itself. Any other object is one for the
            rank. What does not have rows per sample is kept whole.
        tail: :meth:`PreparedLoader.tail <shardwise.data_loader.loader.PreparedLoader.tail>` of the loader being read.
        use_gather_object: pickle even tensors, for example because the ranks have different shapes: a tensor is then
            joined as a list of its rows.

    Returns:
        The same nest, with each tensor's rows of all ranks on this rank's device and each list's items; or a list of
        the ranks' objects.

    Raises:
        CommError: the ranks brought different nests of tensors, or tensors on one and other objects on another.
        TensorError: the same, of other nests.

    Cost: a gather. In a round in which the ranks hold differently many samples, only those that hold some take part,
    and everything travels through the host.
    """
    world = World.current()
    if tail is not None and (len(tail.rows) != world.size or not tail.cuts):
        tail = None
    if (tail is None or tail.equal) and not use_gather_object and _only_tensors(input_data):
        gathered = operations.gather(input_data)
        return gathered if tail is None else map_tensors(gathered, lambda t: _real(t.tensor_split(world.size), tail))
    live = [r for r in range(world.size) if tail is None or tail.rows[r]]
    if len(live) == world.size:
        operations.same_call("gather_for_metrics of objects")
        parts = operations.gather_object(input_data)
    else:
        parts = exchange(input_data, live)
    if tail is not None:
        tail = Tail(tuple(tail.rows[r] for r in live), tuple(tail.repeated[r] for r in live))
    device = next((leaf.device for leaf in leaves(input_data) if is_tensor(leaf)), world.device)
    if not use_gather_object and all(_only_tensors(part) for part in parts):
        return join(parts, partial(_joined, tail=tail, device=device))
    return join(
        parts,
        partial(_joined, tail=tail, device=None if use_gather_object else device),
        lambda found: not all(_columns(item) for item in found),
    )


def _only_tensors(tree: Any) -> bool:
    found = leaves(tree)
    return bool(found) and all(is_tensor(leaf) for leaf in found)


def _columns(item: Any) -> bool:
    """Is it a container of columns, rather than one of samples, or one object?"""
    inside = children(item)
    if not inside:
        return False
    columns = [isinstance(x, (list, tuple)) or (is_tensor(x) and x.ndim > 0) or _columns(x) for x in inside]
    if isinstance(item, list):  # what a collate function makes of tensors and texts
        return all(columns) and any(map(is_tensor, inside)) and any(isinstance(x, (list, tuple)) for x in inside)
    if isinstance(item, tuple) and not is_named_tuple(item):
        return all(columns)
    return any(columns)


def _joined(column: list[Any], tail: Tail | None, device: torch.device | None) -> Any:
    """One column of all ranks.

    Args:
        device: of tensors; ``None`` makes lists of their rows.
    """
    if all(map(is_tensor, column)):
        rows = [t.detach().reshape(1) if t.ndim == 0 else t.detach() for t in column]
        if device is None:
            return _real([list(part) for part in rows], tail)
        if len({(part.shape[1:], part.dtype) for part in rows}) > 1:
            raise TensorError(
                f"rows of different kinds cannot be joined: {', '.join(f'{tuple(t.shape)} {t.dtype}' for t in rows)}",
                where="gather_for_metrics",
                fix="pad them with accelerator.pad_across_processes, or pass use_gather_object=True",
            )
        return _real(rows, tail).to(device)
    if all(isinstance(part, (list, tuple)) and not is_named_tuple(part) for part in column):
        return _real([list(part) for part in column], tail)
    return column


def _real(parts: Sequence[Any], tail: Tail | None) -> Any:
    """Join the ranks' rows, without those of repeated samples if every rank brought k rows per sample."""
    if tail is None:
        return _append(parts)
    times = {len(part) / rows for part, rows in zip(parts, tail.rows, strict=True)}
    k = times.pop()
    if times or k != int(k) or k < 1:
        return _append(parts)
    real = [(n - m) * int(k) for n, m in zip(tail.rows, tail.repeated, strict=True)]
    return _append([part[:n] for part, n in zip(parts, real, strict=True)])


def _append(parts: Sequence[Any]) -> Any:
    return torch.cat(list(parts)) if is_tensor(parts[0]) else [item for part in parts for item in part]
