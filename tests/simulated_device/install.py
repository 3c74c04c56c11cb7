"""Load the simulated device and give it the face of a device module (``torch.sim``) and a backend (``simccl``)."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import traceback
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from simulated_device.build import build


def install() -> types.ModuleType:
    """The device module ``torch.sim``. From the first call on, this process has an accelerator."""
    if not hasattr(torch, "sim"):
        path = build()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        library = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(library)
        torch.utils.rename_privateuse1_backend("sim")
        torch._register_device_module("sim", _device_module(library))
        torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
        _register_backend(library)
    return torch.sim


class Properties(NamedTuple):
    """What there is to say about a device."""

    name: str
    total_memory: int
    multi_processor_count: int = 1


def _device_module(library: Any) -> types.ModuleType:
    def index_of(device: Any) -> int:
        if device is None:
            return torch._C._accelerator_getDeviceIndex()
        if isinstance(device, int):
            return device
        index = torch.device(device).index
        return torch._C._accelerator_getDeviceIndex() if index is None else index

    class Stream(torch.Stream):
        """A stream of a simulated device; the current one by default."""

        def __new__(cls, device: Any = None, priority: int = 0, **kw: Any) -> Any:
            if not kw:
                kw["device"] = torch.device("sim", index_of(device))
            return super().__new__(cls, priority=priority, **kw)

    class Event(torch.Event):
        """An event of a simulated device."""

        def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Any:
            return super().__new__(cls, device="sim", enable_timing=enable_timing)

    class device:
        """Make a device the current one, inside."""

        def __init__(self, device: Any) -> None:
            self.index = index_of(device)

        def __enter__(self) -> None:
            self._before = torch._C._accelerator_exchangeDevice(self.index)

        def __exit__(self, *_: object) -> None:
            torch._C._accelerator_setDeviceIndex(self._before)

    @contextlib.contextmanager
    def stream(stream: torch.Stream | None) -> Iterator[None]:
        if stream is None:
            yield
        else:
            with stream:
                yield

    def default_stream(device: Any = None) -> torch.Stream:
        kind = int(torch._C._autograd.DeviceType.PrivateUse1)
        return torch.Stream(stream_id=0, device_index=index_of(device), device_type=kind)

    generators = tuple(library.default_generator(index) for index in range(library.device_count))

    def manual_seed_all(seed: int) -> None:
        for generator in generators:
            generator.manual_seed(seed)

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        return torch._C._accelerator_getMemoryInfo(index_of(device))

    def get_device_properties(device: Any = None) -> Properties:
        return Properties("simulated device", mem_get_info(device)[1])

    def races() -> list[str]:
        torch.accelerator.synchronize(0)
        torch.accelerator.synchronize(1)
        return library.races()

    def configure(check: str = "raise", patience_ms: int = 40, trace: bool = False) -> None:
        library.configure(library.Mode.__members__[check.upper()], patience_ms)
        library.set_locate(_where if trace else None)

    module = types.ModuleType("torch.sim")
    memory = torch.accelerator.memory
    module.__dict__.update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: library.device_count,
        current_device=torch._C._accelerator_getDeviceIndex,
        set_device=lambda d: torch._C._accelerator_setDeviceIndex(index_of(d)),
        device=device,
        Stream=Stream,
        Event=Event,
        stream=stream,
        current_stream=lambda d=None: torch._C._accelerator_getStream(index_of(d)),
        default_stream=default_stream,
        synchronize=lambda d=None: torch._C._accelerator_synchronizeDevice(index_of(d)),
        empty_cache=memory.empty_cache,
        memory_allocated=lambda d=None: memory.memory_allocated(index_of(d)),
        max_memory_allocated=lambda d=None: memory.max_memory_allocated(index_of(d)),
        memory_reserved=lambda d=None: memory.memory_reserved(index_of(d)),
        max_memory_reserved=lambda d=None: memory.max_memory_reserved(index_of(d)),
        memory_stats=lambda d=None: memory.memory_stats(index_of(d)),
        reset_peak_memory_stats=lambda d=None: memory.reset_peak_memory_stats(index_of(d)),
        mem_get_info=mem_get_info,
        default_generators=generators,
        get_rng_state=lambda d="sim": generators[index_of(d)].get_state(),
        set_rng_state=lambda state, d="sim": generators[index_of(d)].set_state(state),
        manual_seed=lambda seed: generators[index_of(None)].manual_seed(seed),
        manual_seed_all=manual_seed_all,
        _is_in_bad_fork=lambda: False,
        is_bf16_supported=lambda *_: True,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        get_device_name=lambda d=None: get_device_properties(d).name,
        get_device_properties=get_device_properties,
        # Of the simulation, and of no other device module:
        races=races,
        forget_races=library.forget_races,
        configure=configure,
        set_memory_limit=lambda nbytes, d=None: library.set_memory_limit(index_of(d), nbytes),
    )
    return module


def _where() -> str:
    """The innermost frames of this thread that are not torch's; of autograd's threads, that it is one."""
    of_torch = os.path.dirname(torch.__file__)
    frames = [f for f in traceback.extract_stack(sys._getframe(1)) if not f.filename.startswith(of_torch)]
    named = " < ".join(f"{os.path.basename(f.filename)}:{f.lineno}" for f in reversed(frames[-4:]))
    return named or "a thread of torch's"


def _register_backend(library: Any) -> None:
    def create(options: Any, _: Any) -> Any:
        transport = dist.ProcessGroupGloo(
            dist.PrefixStore("simccl", options.store), options.group_rank, options.group_size, timeout=options.timeout
        )
        members = list(options.global_ranks_in_group) or list(range(options.group_size))
        return library.make_simccl(transport, options.group_rank, options.group_size, members)

    dist.Backend.register_backend("simccl", create, extended_api=True, devices=["sim"])
