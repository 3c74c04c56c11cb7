"""Gather, reduce and broadcast of nested tensors, outside the training step.

Everything travels as bytes on one small-message path, so every dtype works and every rank ends with equal
results: sums are taken in rank order. Ranks that bring different shapes are told so instead of hanging.
"""

from __future__ import annotations

import os
import pickle
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from shardwise.comm import World, init
from shardwise.comm.stats import Op
from shardwise.errors import CommError, ConfigError, TensorError
from shardwise.trees import leaves, map_tensors

_OP = Op("collective", "the accelerator", 0)  # units count their tags from 8: nothing else uses this one
_TIMEOUT = 600.0


def joined() -> World:
    """The present world. A script that the launcher started joins the other ranks here if it has not yet: what is
    asked of all ranks must not be answered by one alone."""
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return init()
    return World.current()


def to_device(
    tree: Any, device: torch.device | str | int, non_blocking: bool = False, skip_keys: Sequence[str] = ()
) -> Any:
    """The same nest with every tensor, and every object with a ``to`` method of its own, on ``device``.

    Args:
        skip_keys: keys of mappings whose values stay where they are.
    """
    if isinstance(tree, torch.Tensor):
        return tree.to(device, non_blocking=non_blocking)
    if isinstance(tree, (list, tuple, Mapping)) and not hasattr(tree, "to"):
        if isinstance(tree, Mapping):
            moved = {k: v if k in skip_keys else to_device(v, device, non_blocking, skip_keys) for k, v in tree.items()}
            if not isinstance(tree, dict):
                return type(tree)(moved)  # type: ignore[call-arg]
            out = tree.copy()  # keeps the class, as Hugging Face's outputs need
            for key, value in moved.items():
                out[key] = value
            return out
        items = [to_device(x, device, non_blocking, skip_keys) for x in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if callable(getattr(tree, "to", None)):
        return tree.to(device)
    return map_tensors(tree, lambda t: t.to(device, non_blocking=non_blocking))


def all_gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """One tensor from every rank, in rank order. They must have one shape and dtype.

    Inside ``join_uneven_inputs``, ranks whose data has ended bring nothing: the list is as much shorter.

    Returns:
        As many new tensors as there are ranks; at one rank, a list with the tensor itself.

    Cost: a collective; sends the tensor's bytes to every other rank, and keeps one copy per rank.
    """
    world = joined()
    if world.size == 1:
        return [tensor]
    if world.join is not None:  # inside join_uneven_inputs: of the ranks that have data
        world.join.ready()
        if world.join.has_followers:
            return world.join.gather(tensor)
    mine = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    group = world.mesh(tensor.device, world.size, _TIMEOUT).whole
    if not mine.numel():
        return [tensor.detach().clone() for _ in range(world.size)]
    flat = torch.empty(world.size * mine.numel(), dtype=torch.uint8, device=tensor.device)
    flat.view(world.size, -1)[world.rank].copy_(mine)
    group.all_gather(flat, _OP).wait()
    # Each rank's bytes in storage of their own: a view of another dtype needs an aligned start.
    return [part.clone().view(tensor.dtype).view(tensor.shape) for part in flat.chunk(world.size)]


def gather(tensor: Any) -> Any:
    """Every tensor of a nest, concatenated over the ranks along dim 0 (a 0-dim tensor counts as one row).

    Args:
        tensor: a tensor, or tensors in tuples, lists and mappings; the same on every rank, with equal shapes.

    Returns:
        The same nest; each tensor has ``num_processes`` times the rows, in rank order, without gradient.

    Raises:
        TensorError: something in the nest is not a tensor.
        CommError: the ranks brought different nests, shapes or dtypes.
    """
    tensors = leaves(tensor)
    _only_tensors("gather", tensors)
    _agree(tensors)
    return map_tensors(tensor, lambda t: torch.cat(all_gather(t.detach().reshape(1) if t.ndim == 0 else t.detach())))


def gather_object(item: Any) -> list[Any]:
    """Any picklable object from every rank, as a list in rank order. At one rank: ``[item]``.

    Unpickles what the other ranks of this job sent.
    """
    world = joined()
    if world.size == 1:
        return [item]
    data = bytearray(pickle.dumps(item))
    sizes = [int(n) for n in all_gather(torch.tensor([len(data)]))]
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(data, dtype=torch.uint8)
    return [pickle.loads(part[:size].numpy().tobytes()) for part, size in zip(all_gather(padded), sizes, strict=True)]


def reduce(tree: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
    """Every tensor of a nest, reduced over the ranks (in rank order, so equal on all of them).

    Args:
        reduction: ``sum``; ``mean``; ``max``, element by element; ``none`` returns this rank's own.
        scale: multiplies the result.

    Raises:
        ConfigError: another ``reduction``.
        TensorError: something in the nest is not a tensor.
        CommError: the ranks brought different nests, shapes or dtypes.
    """
    if reduction not in ("sum", "mean", "max", "none"):
        raise ConfigError(f"reduction={reduction!r} is not known", fix="one of sum, mean, max, none")
    tensors = leaves(tree)
    _only_tensors("reduce", tensors)
    _agree(tensors)

    def one(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        if reduction == "none":
            return tensor * scale if scale != 1.0 else tensor
        first, *rest = parts = all_gather(tensor)
        total = first.clone()
        for other in rest:
            total = torch.maximum(total, other) if reduction == "max" else total + other
        if reduction == "mean":
            total = total / len(parts)
        return total * scale if scale != 1.0 else total

    return map_tensors(tree, one)


def broadcast(tensor: Any, from_process: int = 0) -> Any:
    """One rank's values, on every rank, written into the tensors that are there.

    Args:
        tensor: a tensor, or tensors in tuples, lists and mappings; the same on every rank, with equal shapes.
        from_process: the rank whose values are taken.

    Returns:
        The same nest with the same tensors.

    Raises:
        TensorError: something in the nest is not a tensor.
        ConfigError: there is no such rank.
        CommError: the ranks brought different nests, shapes or dtypes.

    Cost: a collective per tensor; ``from_process`` sends the tensor's bytes to every other rank.
    """
    tensors = leaves(tensor)
    _only_tensors("broadcast", tensors)
    world = joined()
    _rank_exists(from_process, world)
    _agree(tensors)
    if world.size == 1:
        return tensor

    def one(t: torch.Tensor) -> torch.Tensor:
        raw = t.detach().contiguous().reshape(-1).view(torch.uint8)
        group = world.mesh(t.device, world.size, _TIMEOUT).whole
        group.broadcast(raw, _OP, from_process).wait()
        if world.rank != from_process and not t.is_contiguous():
            t.detach().copy_(raw.view(t.dtype).view(t.shape))
        return t

    return map_tensors(tensor, one)


def broadcast_object_list(object_list: list[Any], from_process: int = 0) -> list[Any]:
    """Replace the entries of a list by one rank's entries, in place. Unpickles what that rank sent.

    Args:
        object_list: picklable objects; equally many on every rank.
        from_process: the rank whose objects are taken.

    Raises:
        TensorError: it is not a list.
        ConfigError: there is no such rank.
        CommError: the ranks brought lists of different lengths.
    """
    if not isinstance(object_list, list):
        raise TensorError(
            f"broadcast_object_list changes a list in place and got a {type(object_list).__name__}", fix="pass a list"
        )
    world = joined()
    _rank_exists(from_process, world)
    if world.size == 1:
        return object_list
    data = pickle.dumps(object_list) if world.rank == from_process else b""
    facts = [tuple(t.tolist()) for t in all_gather(torch.tensor([len(data), len(object_list)]))]
    if len({count for _, count in facts}) > 1:
        raise CommError(
            f"the ranks brought lists of {', '.join(str(count) for _, count in facts)} objects",
            where=f"rank {world.rank}",
            fix="bring equally many, for example [None] * n on the receiving ranks",
        )
    raw = torch.empty(facts[from_process][0], dtype=torch.uint8)
    if world.rank == from_process:
        raw.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    broadcast(raw, from_process)
    if world.rank != from_process:
        object_list[:] = pickle.loads(raw.numpy().tobytes())
    return object_list


def pad_across_processes(tensor: Any, dim: int = 0, pad_index: float = 0, pad_first: bool = False) -> Any:
    """Every tensor of a nest, made as long in ``dim`` as the longest one of all ranks, so that it can be gathered.

    Args:
        tensor: a tensor, or tensors in tuples, lists and mappings; the same on every rank but for their lengths.
        dim: where to pad; tensors that do not have it stay as they are.
        pad_index: the value to pad with.
        pad_first: pad before what is there instead of after it.

    Raises:
        TensorError: something in the nest is not a tensor.
        CommError: the ranks brought different nests or numbers of dims.

    Cost: exchanges the shapes of all tensors once.
    """
    tensors = leaves(tensor)
    _only_tensors("pad_across_processes", tensors)
    shapes = [[tuple(t.shape) if not t.is_nested else None for t in tensors]]
    every = [shape for part in gather_object(shapes) for shape in part]
    ranks = [[None if s is None else len(s) for s in shape] for shape in every]
    if any(other != ranks[0] for other in ranks):
        odd = next(r for r, other in enumerate(ranks) if other != ranks[0])
        raise CommError(
            f"rank {odd} brought other tensors than rank 0: {every[odd]} and {every[0]}",
            where=f"rank {joined().rank}",
            fix="bring the same nest with the same numbers of dims on every rank",
        )
    sizes = iter([max((shape[i][dim] for shape in every), default=0) if _has_dim(t, dim) else 0
                  for i, t in enumerate(tensors)])  # fmt: skip

    def one(t: torch.Tensor) -> torch.Tensor:
        longest = next(sizes)
        if t.is_nested:
            warnings.warn("pad_across_processes leaves nested tensors as they are", stacklevel=2)
        if not _has_dim(t, dim) or longest == t.shape[dim]:
            return t
        shape = list(t.shape)
        shape[dim] = longest - shape[dim]
        filling = t.new_full(shape, pad_index)
        return torch.cat([filling, t] if pad_first else [t, filling], dim)

    return map_tensors(tensor, one)


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


def _has_dim(tensor: torch.Tensor, dim: int) -> bool:
    return not tensor.is_nested and -tensor.ndim <= dim < tensor.ndim


def _only_tensors(what: str, found: list[Any]) -> None:
    for leaf in found:
        if not isinstance(leaf, torch.Tensor):
            raise TensorError(
                f"{what} takes tensors in tuples, lists and dicts, and found a {type(leaf).__name__}",
                fix="leave it out, make it a tensor, or send objects with gather_object or broadcast_object_list",
            )


def _rank_exists(rank: int, world: World) -> None:
    if not 0 <= rank < world.size:
        raise ConfigError(f"from_process={rank} is no rank", fix=f"0 to {world.size - 1}")
    if world.join is not None:
        world.join.allow(_OP)


def _agree(tensors: list[Any]) -> None:
    """Raise on every rank if the ranks brought different shapes: exchanging them would hang or mix up bytes."""
    world = joined()
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
