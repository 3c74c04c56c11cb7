"""What a device is: the one module that knows which accelerators there are, and how torch is asked about them.

Everything above speaks of streams, events, memory and generators in the words of this module, and never of CUDA. It
goes through torch's own seam: ``torch.accelerator``, the module that a device type registers
(``torch.get_device_module``), ``torch.Stream`` and ``torch.Event``, and the backend that ``torch.distributed`` has for
it. So a device type that torch learns from a plug-in is served as CUDA is, ROCm's included, which goes by that name.
One thing is CUDA's alone, since torch has no general word for it: page-locking host memory that exists already.

*Runs late*: the host hands work to a stream of the device and goes on. A CPU does not, and for Apple's ``mps`` torch
has no streams to hand it to; there copies are done when they return.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from shardwise import datasheets
from shardwise.environment import local_rank, patch_environment
from shardwise.errors import DeviceError, first_line

CPU = torch.device("cpu")
HALF_PRECISION = (torch.float16, torch.bfloat16)
KINDS = ("cuda", "xpu", "mps", "npu", "mlu", "musa", "sdaa", "hpu", "mtia", "neuron")
"""Types of accelerators that scripts may name, wherever they run."""

_VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
_WITHOUT_MODULE = ("cpu", "meta")


# --- which there are --------------------------------------------------------------------------------
_kept: list[str | None] = []  # the accelerator, once torch names a device type in its place that is none


def keep_accelerator() -> None:
    """What is the accelerator stays it, though torch gets another device type now: one for tensors without values."""
    if not _kept:
        _kept.append(accelerator())


def accelerator() -> str | None:
    """The type of accelerator that this process can use (``cuda``, ``xpu``, ``mps``, ...), if there is one.

    Asks without starting it where torch can: see ``torch.accelerator.is_available``.
    """
    if _kept:
        return _kept[0]
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type


def count() -> int:
    """How many accelerators this process can use."""
    kind = accelerator()
    return 0 if kind is None else int(_module(kind).device_count())


def in_use() -> str | None:
    """The type of the accelerator, if this process uses it already: a forked child could not use it any more then."""
    kind = accelerator()
    asked = _offer(kind, "is_initialized")
    return kind if asked is None or asked() else None


def named(device: str | torch.device | int) -> torch.device:
    """A device that a person has named, with its number.

    Args:
        device: ``cpu``, a type, a type and a number, or a number of the accelerator's. Without a number: the one of
            this rank, ``LOCAL_RANK``.

    Raises:
        DeviceError: torch does not know it, or it is not there; says what is.
    """
    try:
        wanted = torch.device(accelerator() or "cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"{device!r} is not a device: {first_line(error)}", fix=f"there is {_there_is()}") from error
    if wanted.type in _WITHOUT_MODULE:
        return torch.device(wanted.type)
    number = count() if accelerator() == wanted.type else 0
    if number == 0:
        raise DeviceError(f"device {wanted} was asked for, and this process has none", fix=f"there is {_there_is()}")
    index = wanted.index if wanted.index is not None else _of_rank(number, wanted.type)
    if index >= number:
        raise DeviceError(f"device {wanted.type}:{index} was asked for", fix=f"there is {_there_is()}")
    return torch.device(wanted.type, index)


def of_rank() -> torch.device:
    """This rank's own device: the accelerator of number ``LOCAL_RANK``, or the CPU where there is no accelerator.

    Raises:
        DeviceError: there are accelerators, but fewer than ranks on this host.
    """
    kind = accelerator()
    return CPU if kind is None else torch.device(kind, _of_rank(count(), kind))


def of_this_rank(main: torch.device, ranks: int) -> list[torch.device]:
    """The devices that are this rank's alone, its main one first.

    Ranks of a host deal them out in turn: rank ``r`` of ``n`` has devices ``r``, ``r + n``, ``r + 2 n``, ... A rank
    that was given another one, or the CPU, has that one only.

    Args:
        main: the device that the rank was given.
        ranks: on this host.
    """
    own = [torch.device(main.type, index) for index in _dealt(ranks)] if main.type == accelerator() else []
    return [main, *(device for device in own if device != main)] if main in own else [main]


def numbers_of_this_rank() -> tuple[list[int], int]:
    """The numbers of the accelerators that are this rank's, by what the launcher says, and how many ranks share a host.

    All of them, where there are more ranks than accelerators.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return list(_dealt(ranks) if ranks <= count() else range(count())), ranks


def _dealt(ranks: int) -> range:
    local = local_rank()
    return range(local, count(), max(ranks, local + 1))


def _of_rank(number: int, kind: str) -> int:
    local, ranks = local_rank(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if max(local + 1, ranks) > number:
        raise DeviceError(
            f"this host has {max(local + 1, ranks)} ranks and {number} {kind} device{'s' * (number > 1)}",
            where=f"local rank {local}",
            fix=f"start {number}, or use the CPU ('shardwise launch --cpu', init('cpu')); several ranks share a device "
            f"only if each says so, as in init('{kind}:0')",
        )
    return local


def _there_is() -> str:
    kind = accelerator()
    return "the CPU only" if kind is None else f"the CPU and {', '.join(f'{kind}:{k}' for k in range(count()))}"


def visible_variable() -> str | None:
    """The environment variable that says which accelerators a process sees; CUDA's where there is none to ask about.

    ``None`` if the accelerator has no such variable.
    """
    return _VISIBLE.get(accelerator() or "cuda")


def hidden() -> dict[str, str]:
    """Environment variables under which a new process sees no accelerator."""
    own = visible_variable()
    return {"CUDA_VISIBLE_DEVICES": "", **({own: ""} if own is not None else {})}


def available(kind: str) -> bool:
    """Is there a device of this type? Asks without starting it, where its driver can be asked so."""
    module = getattr(torch, kind, None)
    with patch_environment(PYTORCH_NVML_BASED_CUDA_CHECK="1"):
        return module is not None and bool(module.is_available())


# --- this process's -----------------------------------------------------------------------------------
def use(device: torch.device) -> None:
    """Make it the current one of this process, where torch has such a thing."""
    select = _offer(device.type, "set_device")
    if select is not None and device.index is not None:
        select(device.index)


def backend(device: torch.device, ranks: int) -> str:
    """What ``torch.distributed`` speaks between ranks on such devices, and gloo between their hosts.

    Raises:
        DeviceError: there is nothing for several ranks.
    """
    if device.type == "cpu":
        return "gloo"
    name = dist.Backend.default_device_backend_map.get(device.type)
    if name is None or name == "gloo":  # gloo moves bytes of host memory
        if ranks > 1:
            raise DeviceError(
                f"torch.distributed has no backend for several ranks on {device.type} devices",
                fix="use one rank, or the CPU: 'shardwise launch --cpu', init('cpu')",
            )
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


# --- streams ------------------------------------------------------------------------------------------
def runs_late(device: torch.device) -> bool:
    """Does the host go on while the device computes, with streams to order its work by?"""
    return _offer(device.type, "Stream") is not None


def current_stream(device: torch.device) -> torch.Stream:
    """The stream that gets this thread's work for ``device``, which need not be the current device."""
    return torch.accelerator.current_stream(device)


def mark(device: torch.device) -> torch.Event:
    """An event behind all that the device was told so far."""
    return current_stream(device).record_event()


class StreamsOfThisThread:
    """The streams and the current device of the thread that makes it, for threads that work for it.

    A new thread has the default streams, whose work is not ordered with that of the streams that a script may have
    chosen; and the first device as its current one.
    """

    def __init__(self) -> None:
        self._streams: list[torch.Stream] = []
        kind = in_use()
        if kind is not None and runs_late(torch.device(kind)):
            now = torch.accelerator.current_device_index()
            devices = [torch.device(kind, index) for index in range(count())]
            self._streams = [current_stream(d) for d in sorted(devices, key=lambda d: d.index == now)]

    @contextmanager
    def taken(self) -> Iterator[None]:
        """A block, in another thread, with these."""
        with ExitStack() as stack:
            for stream in self._streams:  # the one of the current device last: each makes its device the current one
                stack.enter_context(stream)
            yield


def timed_mark(device: torch.device) -> torch.Event:
    """An event behind all that the device was told so far, which will tell when that was done."""
    event = torch.Event(device, enable_timing=True)
    event.record(current_stream(device))
    return event


def seconds_between(one: torch.Event, other: torch.Event) -> float:
    """From one :func:`timed_mark` to a later one. Waits on the host until both have come."""
    one.synchronize()
    other.synchronize()
    return one.elapsed_time(other) / 1e3


def synchronize(device: torch.device) -> None:
    """Wait on the host until the device has done all that it was told."""
    if device.type not in _WITHOUT_MODULE:
        torch.accelerator.synchronize(device)


# --- memory -------------------------------------------------------------------------------------------
def can_pin(device: torch.device) -> bool:
    """Do copies between pinned host memory and the device run beside its work?"""
    return runs_late(device)


def locks_pages() -> bool:
    """Can host memory that exists be page-locked? Otherwise torch's own pinned memory has to be used."""
    return accelerator() == "cuda"


def lock_pages(buffer: torch.Tensor) -> int:
    """Page-lock host memory.

    Args:
        buffer: contiguous, on the host.

    Returns:
        An error number of CUDA's; 0 if it is done.
    """
    return int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel() * buffer.element_size(), 0))


def unlock_pages(pointer: int) -> None:
    """Undo :func:`lock_pages`."""
    torch.cuda.cudart().cudaHostUnregister(pointer)


def memory(device: torch.device) -> tuple[int, int] | None:
    """Free bytes and all bytes of a device, if it tells."""
    told = _offer(device.type, "mem_get_info")
    return None if told is None else told(device)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that this process had of a device, as torch counts them, if it does."""
    told = _offer(device.type, "max_memory_allocated")
    return None if told is None else int(told(device))


def empty_cache() -> None:
    """Give what torch keeps for later back to the accelerator, if this process uses one."""
    kind = in_use()
    if kind is not None:
        _module(kind).empty_cache()


# --- random numbers -----------------------------------------------------------------------------------
def get_rng_state(kind: str) -> torch.Tensor:
    """The state of the generator of the current device of a type, ``uint8`` on the host."""
    return _module(kind).get_rng_state()


def set_rng_state(kind: str, state: torch.Tensor) -> None:
    """Put the generator of the current device of a type into a state."""
    _module(kind).set_rng_state(state)


@contextmanager
def fork_rng() -> Iterator[None]:
    """A block after which torch's generators, of all devices in use, are as they were."""
    kind = in_use()
    devices = range(count()) if kind is not None else ()
    with torch.random.fork_rng(devices, device_type=kind or "cuda"):  # torch's own default, of which there are none
        yield


# --- capabilities -------------------------------------------------------------------------------------
def computes_in_bf16(kind: str | None = None) -> bool:
    """Does a device type compute in bf16? CPUs do.

    Args:
        kind: by default the accelerator's.
    """
    kind = accelerator() if kind is None else kind
    asked = _offer(kind, "is_bf16_supported")
    return True if asked is None else bool(asked())


def peak_flops(device: torch.device) -> float | None:
    """Floating-point operations per second of 16-bit matrix products, if its maker's figure is known."""
    sheet = datasheets.of_device(name(device))
    return None if sheet is None else sheet.flops["fp16"]


def name(device: torch.device) -> str:
    """What the maker calls it; the type where torch does not tell."""
    told = _offer(device.type, "get_device_name")
    return device.type if told is None else str(told(device))


def facts(device: torch.device) -> dict[str, Any]:
    """Name, bytes, free bytes, capability, bf16, and the numbers of the devices it reaches directly, as far as told."""
    out: dict[str, Any] = {"name": name(device), "bf16": computes_in_bf16(device.type), "capability": None, "peers": []}
    told = memory(device)
    if told is not None:
        out["free_bytes"], out["bytes"] = told
    properties = _offer(device.type, "get_device_properties")
    if properties is not None and hasattr(found := properties(device.index), "major"):
        out["capability"] = f"{found.major}.{found.minor}"
    reaches = _offer(device.type, "can_device_access_peer")
    if reaches is not None:
        out["peers"] = [k for k in range(count()) if k != device.index and reaches(device.index, k)]
    return out


def versions() -> dict[str, str]:
    """Versions of what torch was built with for accelerators, by name; empty for a build without."""
    out = {}
    for key, built in (("cuda", torch.version.cuda), ("rocm", torch.version.hip), ("xpu", torch.version.xpu)):
        if built:
            out[key] = str(built)
    if accelerator() == "cuda" and dist.is_nccl_available():
        out["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return out


def _module(kind: str) -> Any:
    return torch.get_device_module(kind)


def _offer(kind: str | None, what: str) -> Callable[..., Any] | None:
    """What the module of a device type has under a name; none of them has everything."""
    return None if kind is None or kind in _WITHOUT_MODULE else getattr(_module(kind), what, None)
