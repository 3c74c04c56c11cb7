"""Gather, reduce and broadcast of nested tensors, outside the training step.

Everything travels as bytes on one small-message path, so every dtype works and every rank ends with equal
results: sums are taken in rank order. Ranks that bring different shapes are told so instead of hanging.
"""

from __future__ import annotations

import os
import pickle
import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from shardwise.comm import World, init
from shardwise.comm.objects import exchange, to_bytes
from shardwise.comm.stats import Op
from shardwise.errors import CommError, ConfigError, RankFailed, TensorError
from shardwise.trees import is_tensor, map_leaves, named_leaves, with_leaves

_OP = Op("collective", "the accelerator", 0)  # units count their tags from 8: nothing else uses this one
_MEETING = 15  # the last of the first unit's eight tags: units use six of theirs
_NAME = 32  # bytes of a call's name
_TIMEOUT = 600.0


def joined() -> World:
    """The present world. A script that the launcher started joins the other ranks here if it has not yet: what is
    asked of all ranks must not be answered by one alone."""
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return init()
    return World.current()


def rank_and_size() -> tuple[int, int]:
    """This rank and the world size, without joining a process group: what the launcher said, until there is one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")) if size > 1 else 0), size


def to_device(
    tree: Any, device: torch.device | str | int, non_blocking: bool = False, skip_keys: Sequence[str] = ()
) -> Any:
    """The same nest with every tensor, and every object with a ``to`` method of its own, on ``device``.

    Args:
        skip_keys: keys of mappings whose values stay where they are.
    """

    def move(item: Any) -> Any:
        return item.to(device, non_blocking=non_blocking) if is_tensor(item) else item.to(device)

    return map_leaves(
        tree, move, lambda item: is_tensor(item) or callable(getattr(item, "to", None)), skip_keys=skip_keys
    )


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
    return _each(
        "gather", tensor, lambda t: torch.cat(all_gather(t.detach().reshape(1) if t.ndim == 0 else t.detach()))
    )


def gather_object(item: Any) -> list[Any]:
    """Any picklable object from every rank, as a list in rank order. At one rank: ``[item]``.

    Unpickles what the other ranks of this job sent.
    """
    if joined().size == 1:
        return [item]
    return [pickle.loads(to_bytes(row)) for row in exchange(pickle.dumps(item), all_gather)]


def reduce(tree: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
    """Every tensor of a nest, reduced over the ranks (in rank order, so equal on all of them).

    What comes out is what ``torch.stack`` of the ranks' tensors and ``sum(0)``, ``mean(0)`` or ``amax(0)`` give:
    nothing wraps around or overflows on the way.

    ==========  =====================  ===========================  ==========
    dtype       ``sum``                ``mean``                     ``max``
    ==========  =====================  ===========================  ==========
    bool        int64: how many        torch's default dtype: share  bool: any
    integers    int64                  torch's default dtype        the same
    fp16, bf16  the same; added in fp32 and rounded once            the same
    others      the same               the same                     the same
    ==========  =====================  ===========================  ==========

    Args:
        reduction: ``sum``; ``mean``; ``max``, element by element; ``none`` returns this rank's own.
        scale: multiplies the result, before it is rounded.

    Raises:
        ConfigError: another ``reduction``.
        TensorError: something in the nest is not a tensor; ``max`` of complex numbers.
        CommError: the ranks brought different nests, shapes or dtypes.
    """
    if reduction not in ("sum", "mean", "max", "none"):
        raise ConfigError(f"reduction={reduction!r} is not known", fix="one of sum, mean, max, none")

    def one(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        if reduction == "none":
            return tensor * scale if scale != 1.0 else tensor
        if reduction == "max" and tensor.is_complex():
            raise TensorError(
                f"{tensor.dtype} has no order", where="reduce to the max", fix="reduce its absolute values"
            )
        first, *rest = parts = all_gather(tensor)
        total = first.to(_wide(tensor.dtype), copy=True)
        for other in rest:
            if reduction == "max":
                total = torch.maximum(total, other.to(total.dtype))
            else:
                total += other.to(total.dtype)
        if reduction == "mean":
            total = total / len(parts)
        if scale != 1.0:
            total = total * scale
        keeps = tensor.dtype.is_floating_point or tensor.is_complex() or (reduction == "max" and scale == 1.0)
        return total.to(tensor.dtype) if keeps else total

    return _each(f"reduce to the {reduction}", tree, one)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a few of them can be added."""
    if dtype.is_complex:
        return torch.complex64 if dtype == torch.complex32 else dtype
    if dtype.is_floating_point:
        return torch.float32 if dtype.itemsize < 4 else dtype
    return torch.int64


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
    world = joined()
    _rank_exists(from_process, world)

    def one(t: torch.Tensor) -> torch.Tensor:
        if world.size == 1:
            return t
        raw = t.detach().contiguous().reshape(-1).view(torch.uint8)
        group = world.mesh(t.device, world.size, _TIMEOUT).whole
        group.broadcast(raw, _OP, from_process).wait()
        if world.rank != from_process and not t.is_contiguous():
            t.detach().copy_(raw.view(t.dtype).view(t.shape))
        return t

    return _each(f"broadcast from rank {from_process}", tensor, one)


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


class CannotPadNestedTensorWarning(UserWarning):
    """A nested tensor is not made longer."""


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
    places = _agreed(
        f"pad_across_processes in dim {dim}", tensor, lambda t: "nested" if t.is_nested else f"{t.ndim} dims"
    )
    mine = torch.tensor([t.shape[dim] if _has_dim(t, dim) else 0 for _, t in places])
    longest = torch.stack(all_gather(mine)).amax(0).tolist()

    def padded(t: torch.Tensor, length: int) -> torch.Tensor:
        if t.is_nested:
            warnings.warn(
                "pad_across_processes leaves nested tensors as they are", CannotPadNestedTensorWarning, stacklevel=3
            )
        if not _has_dim(t, dim) or length == t.shape[dim]:
            return t
        shape = list(t.shape)
        shape[dim] = length - shape[dim]
        filling = t.new_full(shape, pad_index)
        return torch.cat([filling, t] if pad_first else [t, filling], dim)

    return _put(tensor, [(i, padded(t, length)) for (i, t), length in zip(places, longest, strict=True)])


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


def meet(call: str, timeout: float = _TIMEOUT) -> None:
    """Return when every rank has come to the same call.

    Collectives inside a call say little to somebody who calls it on one rank only; this one names it. It goes through
    a group that there is since models were sharded, if that is the strategy's ``timeout``.

    Raises:
        CommError: a rank does not come within the timeout, has ended, or came to another call.
    """
    world = joined()
    if world.size == 1:
        return
    rows = torch.zeros(world.size, _NAME, dtype=torch.uint8)
    name = call.encode()[:_NAME]
    rows[world.rank, : len(name)] = torch.frombuffer(bytearray(name), dtype=torch.uint8)
    fix = f"call {call} on every rank, not only on the main process; each rank has something to save or to load"
    try:
        world.control_group(timeout).all_gather(rows.view(-1), Op("call", call, _MEETING)).wait()
    except RankFailed:
        raise
    except CommError as error:
        raise CommError(error.what, where=error.where, fix=f"{fix}; if one is only slow, raise the timeout") from error
    names = [to_bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]
    for rank, other in enumerate(names):
        if other != names[0]:
            raise CommError(f"rank 0 came to {names[0]}, rank {rank} to {other}", where=call, fix=fix)


def _has_dim(tensor: torch.Tensor, dim: int) -> bool:
    return not tensor.is_nested and -tensor.ndim <= dim < tensor.ndim


def _rank_exists(rank: int, world: World) -> None:
    if not 0 <= rank < world.size:
        raise ConfigError(f"from_process={rank} is no rank", fix=f"0 to {world.size - 1}")
    if world.join is not None:
        world.join.allow(_OP)


def _shape(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _agreed(call: str, tree: Any, equal: Callable[[torch.Tensor], str] = _shape) -> list[tuple[int, torch.Tensor]]:
    """(number, tensor) for the tensors of a nest, in an order that is the same on all ranks.

    That order is the one of their places' names, since dicts may be filled in any.

    Args:
        call: what the ranks do, for errors.
        equal: what has to be equal on all ranks, beside the names. Exchanging tensors of different shapes would hang,
            or mix up bytes.

    Raises:
        TensorError: something in the nest is not a tensor. On every rank.
        CommError: the ranks brought different nests, or make different calls. On every rank.
    """
    named = named_leaves(tree)
    _agree(call, {name: equal(leaf) if is_tensor(leaf) else f"a {type(leaf).__name__}" for name, leaf in named})
    for name, leaf in named:
        if not is_tensor(leaf):
            raise TensorError(
                f"{call.split()[0]} takes tensors in tuples, lists and dicts, and found a {type(leaf).__name__}",
                where=name,
                fix="leave it out, make it a tensor, or send objects with gather_object or broadcast_object_list",
            )
    return sorted(((i, leaf) for i, (_, leaf) in enumerate(named)), key=lambda pair: named[pair[0]][0])


def _each(call: str, tree: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The same nest with ``change(tensor)``, a collective, in place of each tensor."""
    return _put(tree, [(i, change(tensor)) for i, tensor in _agreed(call, tree)])


def _put(tree: Any, results: list[tuple[int, Any]]) -> Any:
    return with_leaves(tree, [result for _, result in sorted(results, key=lambda pair: pair[0])])


def same_call(call: str) -> None:
    """Raise on every rank if another one makes another call of this module now. A collective of 8 bytes.

    Raises:
        CommError: it does.
    """
    _agree(call, {})


def _agree(call: str, facts: dict[str, str]) -> None:
    """Raise on every rank if they are not equal on all of them.

    Cost: a collective of 8 bytes; where the ranks differ, another one of what they brought.
    """
    world = joined()
    if world.size == 1:
        return
    text = "\n".join([call, *(f"{name} {fact}" for name, fact in sorted(facts.items()))])
    sums = [int(t) for t in all_gather(torch.tensor([zlib.crc32(text.encode())]))]
    if len(set(sums)) == 1:
        return
    present = range(world.size) if world.join is None or not world.join.has_followers else world.join.live
    brought = list(zip(present, gather_object((call, facts)), strict=True))
    (first, (first_call, first_facts)), *others = brought
    rank, (other_call, other_facts) = next(other for other in others if other[1] != brought[0][1])
    if other_call != first_call:
        what = f"rank {rank} calls {other_call} while rank {first} calls {first_call}"
        fix = "make the same calls in the same order on every rank"
    else:
        other = "other shapes or dtypes" if other_facts.keys() == first_facts.keys() else "another nest"
        what = f"rank {rank} brought {other} than rank {first}: " + "; ".join(
            _difference(name, rank, other_facts.get(name), first, first_facts.get(name))
            for name in sorted(first_facts.keys() | other_facts.keys())
            if first_facts.get(name) != other_facts.get(name)
        )
        fix = (
            "bring the same nest on every rank; pad_across_processes makes shapes equal, gather_object needs none equal"
        )
    raise CommError(what, where=f"rank {world.rank}, {call}", fix=fix)


def _difference(name: str, rank: int, fact: str | None, first: int, first_fact: str | None) -> str:
    place = name or "the tensor"
    if fact is None or first_fact is None:
        has, lacks = (rank, first) if first_fact is None else (first, rank)
        return f"{place} is {fact or first_fact} on rank {has} and missing on rank {lacks}"
    return f"{place} is {fact} on rank {rank} and {first_fact} on rank {first}"
