"""Every sample once: numbers of all ranks without the samples that a round repeats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardwise import operations
from shardwise.comm import World
from shardwise.data_loader.messages import exchange
from shardwise.data_loader.sampling import Tail
from shardwise.trees import leaves, map_tensors


def gather_for_metrics(input_data: Any, tail: Tail | None, use_gather_object: bool = False) -> Any:
    """What all ranks bring, concatenated in the order of the samples, each sample of the dataset once.

    Args:
        input_data: nested tensors with one row (or equally many rows) per sample of the batch in hand; or any
            picklable objects, lists of which are joined. What does not have rows per sample is kept whole.
        tail: :meth:`PreparedLoader.tail <shardwise.data_loader.loader.PreparedLoader.tail>` of the loader being read.
        use_gather_object: pickle even tensors, for example because the ranks have different shapes.

    Returns:
        The nest with each tensor's rows of all ranks, on this rank's device; or a list.

    Cost: a gather. In a round in which the ranks hold differently many samples, only those that hold some take part,
    and everything travels through the host.
    """
    tensors = not use_gather_object and all(isinstance(leaf, torch.Tensor) for leaf in leaves(input_data))
    size = World.current().size
    if tail is None or len(tail.rows) != size or (tail.equal and not any(tail.repeated)):
        if tensors:
            return operations.gather(input_data)
        return _flat(_runs(operations.gather_object(input_data)))
    if tail.equal and tensors:
        gathered = operations.gather(input_data)
        return map_tensors(gathered, lambda t: _only_real(list(t.tensor_split(size)), tail, torch.cat))
    live = [r for r in range(size) if tail.rows[r]]
    parts = operations.gather_object(input_data) if len(live) == size else exchange(input_data, live)
    mine = Tail(tuple(tail.rows[r] for r in live), tuple(tail.repeated[r] for r in live))
    if not tensors:
        return _only_real(_runs(parts), mine, _flat)
    joined = iter([_joined(column, mine) for column in zip(*map(leaves, parts), strict=True)])
    return map_tensors(input_data, lambda t: next(joined).to(t.device))


def _runs(parts: list[Any]) -> list[Any]:
    """Lists of all ranks as they are; other objects as lists of one."""
    lists = all(isinstance(part, (list, tuple)) for part in parts)
    return [list(part) if lists else [part] for part in parts]


def _flat(runs: list[Any]) -> list[Any]:
    return [item for run in runs for item in run]


def _joined(column: Sequence[torch.Tensor], tail: Tail) -> torch.Tensor:
    rows = [t.detach().reshape(1) if t.ndim == 0 else t.detach() for t in column]
    return _only_real(rows, tail, torch.cat)


def _only_real(parts: list[Any], tail: Tail, join: Any) -> Any:
    """Join the ranks' rows, without those of repeated samples if every rank brought k rows per sample."""
    times = {len(part) / rows for part, rows in zip(parts, tail.rows, strict=True)}
    k = times.pop()
    if times or k != int(k) or k < 1:
        return join(parts)
    real = [(n - m) * int(k) for n, m in zip(tail.rows, tail.repeated, strict=True)]
    return join([part[:n] for part, n in zip(parts, real, strict=True)])
