"""Gather, reduce and broadcast of nested tensors, outside the training step.

Everything travels as bytes on one small-message path, so every dtype works and every rank ends with equal
results: sums are taken in rank order. Ranks that bring different shapes are told so instead of hanging.
"""

from __future__ import annotations

import pickle
import zlib
from typing import Any

import torch

from shardwise.comm import World
from shardwise.comm.group import Op
from shardwise.errors import CommError
from shardwise.trees import leaves, map_tensors

_OP = Op("collective", "the accelerator", 0)  # units count their tags from 8: nothing else uses this one
_TIMEOUT = 600.0


def to_device(tree: Any, device: torch.device, non_blocking: bool = False) -> Any:
    """The same nest with every tensor, and every object with a ``to`` method of its own, on ``device``."""
    if isinstance(tree, torch.Tensor):
        return tree.to(device, non_blocking=non_blocking)
    if isinstance(tree, (list, tuple, dict)) and not hasattr(tree, "to"):
        if isinstance(tree, dict):
            out = tree.copy()
            for key, value in tree.items():
                out[key] = to_device(value, device, non_blocking)
            return out
        moved = [to_device(x, device, non_blocking) for x in tree]
        return type(tree)(*moved) if hasattr(tree, "_fields") else type(tree)(moved)
    if callable(getattr(tree, "to", None)):
        return tree.to(device)
    return map_tensors(tree, lambda t: t.to(device, non_blocking=non_blocking))


def all_gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """One tensor from every rank, in rank order. They must have one shape and dtype.

    Returns:
        As many new tensors as there are ranks; at one rank, a list with the tensor itself.

    Cost: a collective; sends the tensor's bytes to every other rank, and keeps one copy per rank.
    """
    world = World.current()
    if world.size == 1:
        return [tensor]
    mine = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    group = world.mesh(tensor.device, world.size, _TIMEOUT).whole
    if not mine.numel():
        return [tensor.detach().clone() for _ in range(world.size)]
    flat = torch.empty(world.size * mine.numel(), dtype=torch.uint8, device=tensor.device)
    flat.view(world.size, -1)[world.rank].copy_(mine)
    group.all_gather(flat, _OP).wait()
    # Each rank's bytes in storage of their own: a view of another dtype needs an aligned start.
    return [part.clone().view(tensor.dtype).view(tensor.shape) for part in flat.chunk(world.size)]


def gather(tree: Any) -> Any:
    """Every tensor of a nest, concatenated over the ranks along dim 0 (a 0-dim tensor counts as one row).

    Args:
        tree: a tensor, or tensors in tuples, lists and mappings; the same on every rank, with equal shapes.

    Returns:
        The same nest; each tensor has ``num_processes`` times the rows, in rank order, without gradient.

    Raises:
        TypeError: something in the nest is not a tensor.
        CommError: the ranks brought different nests, shapes or dtypes.
    """
    tensors = leaves(tree)
    for leaf in tensors:
        if not isinstance(leaf, torch.Tensor):
            raise TypeError(f"gather takes tensors in tuples, lists and dicts, not {type(leaf).__name__}")
    _agree(tensors)
    return map_tensors(tree, lambda t: torch.cat(all_gather(t.detach().reshape(1) if t.ndim == 0 else t.detach())))


def gather_object(item: Any) -> list[Any]:
    """Any picklable object from every rank, as a list in rank order. At one rank: ``[item]``.

    Unpickles what the other ranks of this job sent.
    """
    world = World.current()
    if world.size == 1:
        return [item]
    data = bytearray(pickle.dumps(item))
    sizes = [int(n) for n in all_gather(torch.tensor([len(data)]))]
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(data, dtype=torch.uint8)
    return [pickle.loads(part[:size].numpy().tobytes()) for part, size in zip(all_gather(padded), sizes, strict=True)]


def reduce(tree: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
    """Every tensor of a nest, summed over the ranks (in rank order, so equal on all of them).

    Args:
        reduction: ``sum``; ``mean``; ``none`` returns this rank's own.
        scale: multiplies the result.

    Raises:
        ValueError: another ``reduction``.
        CommError: the ranks brought different nests, shapes or dtypes.
    """
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"reduction={reduction!r} is not one of sum, mean, none")
    tensors = [leaf for leaf in leaves(tree) if isinstance(leaf, torch.Tensor)]
    _agree(tensors)
    size = World.current().size

    def one(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        if reduction == "none":
            return tensor * scale if scale != 1.0 else tensor
        first, *rest = all_gather(tensor)
        total = first.clone()
        for other in rest:
            total = total + other
        if reduction == "mean":
            total = total / size
        return total * scale if scale != 1.0 else total

    return map_tensors(tree, one)


def total(value: float) -> float:
    """The sum of a number over the ranks, in double precision and rank order."""
    return float(sum(float(t) for t in all_gather(torch.tensor([value], dtype=torch.float64))))


def largest(value: float) -> float:
    """The largest of a number over the ranks."""
    return max(float(t) for t in all_gather(torch.tensor([value], dtype=torch.float64)))


def from_first(value: int) -> int:
    """Rank 0's integer, on every rank."""
    return int(all_gather(torch.tensor([value], dtype=torch.int64))[0])


def barrier() -> None:
    """Return when every rank is here."""
    all_gather(torch.zeros(1))


def _agree(tensors: list[Any]) -> None:
    """Raise on every rank if the ranks brought different shapes: exchanging them would hang or mix up bytes."""
    world = World.current()
    if world.size == 1:
        return
    mine = str([(tuple(t.shape), str(t.dtype)) for t in tensors])
    sums = [int(t) for t in all_gather(torch.tensor([zlib.crc32(mine.encode())]))]
    if len(set(sums)) > 1:
        odd = next(r for r, other in enumerate(sums) if other != sums[0])
        raise CommError(
            f"rank {odd} brought other shapes or dtypes than rank 0; this rank has {mine}",
            where=f"rank {world.rank}",
            fix="pad the tensors to one shape before gathering them",
        )
