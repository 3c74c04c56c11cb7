"""Freeing memory, and finding a batch that fits: on several ranks, one that fits on all of them."""

from __future__ import annotations

import functools
import gc
import inspect
import json
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from shardwise import device as devices
from shardwise.comm import World
from shardwise.errors import ArgumentError, BatchSizeError, CommError, OutOfMemory
from shardwise.observe.out_of_memory import is_out_of_memory
from shardwise.operations import joined

_WAIT_S = 600.0


def clear_device_cache(garbage_collection: bool = False) -> None:
    """Give what torch keeps for later back to the device.

    Args:
        garbage_collection: collect what nobody refers to first, which takes time.
    """
    if garbage_collection:
        gc.collect()
    devices.empty_cache()


def release_memory(*objects: Any) -> list[None]:
    """As many ``None`` as ``objects``, to overwrite the caller's own names with, after collecting garbage.

    ``model, optimizer = release_memory(model, optimizer)``: what these names held is freed by the assignment.
    """
    count = len(objects)
    del objects
    clear_device_cache(garbage_collection=True)
    return [None] * count


def should_reduce_batch_size(exception: BaseException) -> bool:
    """Did this happen because memory ran out?"""
    return is_out_of_memory(exception)


def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[], int] | None = None,
) -> Any:
    """A decorator: call ``function(batch_size, ...)``, with smaller sizes as long as memory runs out.

    On several ranks it is enough that one runs out: all of them leave the attempt and try the next size together.
    Ranks that wait for the one that ran out are woken up, since its connections close. The process group is then
    made anew, so models have to be built and prepared inside ``function``; groups and meshes that the script made
    itself are gone. Over NCCL the others are not woken up: there, all ranks have to run out, or the attempt ends
    when a collective times out.

    Args:
        function: takes the batch size first; is called with the other arguments given.
        starting_batch_size: the first size. A later call begins with the last size of this one.
        reduce_batch_size_fn: returns the next size; by default nine tenths of the last.

    Raises:
        OutOfMemory: no size is left.
        ArgumentError: the batch size was passed by the caller as well.

    Cost: on several ranks, a few messages over the rendezvous store per attempt.
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
        )
    if isinstance(starting_batch_size, bool) or not isinstance(starting_batch_size, int) or starting_batch_size < 1:
        raise BatchSizeError(
            f"starting_batch_size={starting_batch_size!r} is not a number of rows", fix="give 1 or more"
        )
    size = starting_batch_size

    @functools.wraps(function)
    def search(*args: Any, **kwargs: Any) -> Any:
        nonlocal size
        _check_arguments(function, args)
        clear_device_cache(garbage_collection=True)
        while size > 0:
            fits, result = _attempt(functools.partial(function, size, *args, **kwargs))
            if fits:
                return result
            size = int(size * 0.9) if reduce_batch_size_fn is None else reduce_batch_size_fn()
        raise OutOfMemory(
            f"no batch size fits: {getattr(function, '__name__', 'the function')} ran out of memory with every one",
            where=f"rank {World.current().rank}",
            fix="use a smaller model, a strategy that splits more (zero3), or more devices",
        )

    return search


def _check_arguments(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    parameters = list(inspect.signature(function).parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in parameters) or len(parameters) > len(args):
        return
    name = getattr(function, "__name__", "function")
    rest = ", ".join(f"{p.name}={value}" for p, value in zip(parameters[1:], args[1:], strict=False))
    raise ArgumentError(
        f"{name} got {len(args)} arguments, and the batch size before them",
        where="find_executable_batch_size",
        fix=f"leave the batch size out: {name}({rest})",
    )


def _attempt(call: Callable[[], Any]) -> tuple[bool, Any]:
    """(did it fit on every rank, this rank's result). Other exceptions pass through."""
    world = joined()
    vote = _Vote(world) if world.size > 1 and not world.fake else None
    result = None
    try:
        result = call()
        out = False
    except Exception as error:  # sorted at once: all but memory and its echo go on
        out = should_reduce_batch_size(error)
        if not out and not (vote is not None and isinstance(error, CommError) and vote.someone_is_out()):
            raise
        if vote is not None and out:
            vote.say_out(error)
        traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
        error.__traceback__ = error.__context__ = error.__cause__ = None
        failed = True
    else:
        failed = False
    clear_device_cache(garbage_collection=failed)
    if vote is None:
        return not out, result
    if failed:
        vote.leave()
    if vote.all_fit(not failed):
        return True, result
    del result
    vote.regroup()
    return False, None


def _backend_of(world: World) -> str:
    """What the process group was made with. Others compare it with "gloo", so the same in other words would not do."""
    name = str(dist.get_backend(world.default_pg))
    several = name == "undefined"  # one for each type of device
    return str(dist.get_backend_config(world.default_pg)) if several else name


class _Vote:
    """The ranks' word about one attempt, over the rendezvous store: process groups may be broken by then."""

    def __init__(self, world: World) -> None:
        self.rank, self.size, self.device = world.rank, world.size, world.device
        self.faults = world.faults
        self.backend = _backend_of(world)
        self.store = dist.distributed_c10d._get_default_store()
        # Every rank counts its own attempts, and all make them in one order.
        self.name = f"shardwise/attempt/{self.store.add(f'shardwise/attempts/{self.rank}', 1)}"

    def someone_is_out(self) -> bool:
        return bool(self.store.check([f"{self.name}/out"]))

    def say_out(self, error: BaseException) -> None:
        self.store.set(f"{self.name}/out", str(self.rank))
        self.faults.publish_failure(error)  # whoever waits for this rank need not wait for more words

    def leave(self) -> None:
        """Close this rank's connections: the others may wait in a collective that it will never join."""
        World.current().leave()
        if dist.is_initialized():
            if "nccl" in self.backend:
                dist.distributed_c10d._abort_process_group()
            else:
                dist.destroy_process_group()
        gc.collect()

    def all_fit(self, mine: bool) -> bool:
        self.store.set(f"{self.name}/{self.rank}", str(int(mine)))
        until = time.monotonic() + _WAIT_S
        keys = [f"{self.name}/{r}" for r in range(self.size)]
        while not self.store.check(keys):
            failure = self.faults._read("failure")
            if failure and not self.someone_is_out():
                cause = json.loads(failure)
                raise CommError(
                    f"rank {cause['rank']} failed {cause['at']}: {cause['error']}",
                    where=f"rank {self.rank}, after its attempt",
                    fix=f"look at rank {cause['rank']}'s own message",
                )
            if time.monotonic() > until:
                late = [r for r, key in enumerate(keys) if not self.store.check([key])]
                raise CommError(
                    f"ranks {late} did not end their attempt within {_WAIT_S:.0f} s",
                    where=f"rank {self.rank}, after its attempt",
                    fix="all ranks must call the function that find_executable_batch_size decorates",
                )
            time.sleep(0.01)
        return all(self.store.get(key) == b"1" for key in keys)

    def regroup(self) -> None:
        """Process groups that nothing is on its way in."""
        if dist.is_initialized():
            self.leave()
        fresh = dist.PrefixStore(f"{self.name}/group", self.store)
        dist.init_process_group(self.backend, store=fresh, rank=self.rank, world_size=self.size)
        World.current(self.device)
