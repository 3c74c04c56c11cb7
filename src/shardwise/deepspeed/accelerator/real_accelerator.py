"""The device of this process, asked through :mod:`shardwise.device`. Without an accelerator it is the CPU."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from shardwise import device as devices


class Accelerator:
    """What scripts ask of the device type that this process computes on."""

    @property
    def _kind(self) -> str:
        return devices.accelerator() or "cpu"

    @property
    def _name(self) -> str:
        return self._kind

    @property
    def _communication_backend_name(self) -> str:
        return self.communication_backend_name()

    def _here(self, device_index: Any = None) -> torch.device:
        if self._kind == "cpu":
            return devices.CPU
        if device_index is None:
            return torch.device(self._kind, int(torch.accelerator.current_device_index()))
        return devices.named(device_index if isinstance(device_index, (torch.device, str)) else int(device_index))

    # --- which ---------------------------------------------------------------------------------
    def is_synchronized_device(self) -> bool:
        """Does the host wait for everything that the device does?"""
        return not devices.runs_late(self._here())

    def device_name(self, device_index: int | None = None) -> str:
        """``type`` or ``type:number``; ``cpu`` has none."""
        return self._kind if device_index is None or self._kind == "cpu" else f"{self._kind}:{int(device_index)}"

    def device(self, device_index: int | None = None) -> Any:
        """A block in which this is the current device."""
        return nullcontext() if self._kind == "cpu" else torch.accelerator.device_index(self._here(device_index).index)

    def set_device(self, device_index: int | torch.device | str) -> None:
        """Make it the current device of this process."""
        devices.use(self._here(device_index))

    def current_device(self) -> int | str:
        """Its number, which torch takes as a device; ``cpu`` for the CPU, which has none that it takes."""
        return "cpu" if self._kind == "cpu" else int(torch.accelerator.current_device_index())

    def current_device_name(self) -> str:
        return str(self._here())

    def device_count(self) -> int:
        """How many there are; of CPUs one."""
        return devices.count() or 1

    def is_available(self) -> bool:
        return True

    def communication_backend_name(self) -> str:
        """What ``torch.distributed`` speaks between such devices."""
        return devices.backend(self._here(), 1)

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        """Is a tensor on such a device?"""
        return tensor.device.type == self._kind

    # --- time ------------------------------------------------------------------------------------
    def synchronize(self, device_index: int | None = None) -> None:
        """Wait for all that the device was asked to do."""
        devices.synchronize(self._here(device_index))

    def current_stream(self, device_index: int | None = None) -> torch.Stream:
        return devices.current_stream(self._here(device_index))

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        """A block whose work goes to a stream."""
        return nullcontext() if stream is None or self._kind == "cpu" else stream

    def range_push(self, msg: str, domain: Any = None, category: Any = None) -> None:
        """Nothing: :func:`shardwise.deepspeed.utils.instrument_w_nvtx` marks functions."""

    def range_pop(self, domain: Any = None) -> None:
        """Nothing."""

    # --- memory ------------------------------------------------------------------------------------
    def empty_cache(self) -> None:
        devices.empty_cache()

    def total_memory(self, device_index: int | None = None) -> int:
        """Bytes of the device; 0 where it does not tell."""
        found = devices.memory(self._here(device_index))
        return 0 if found is None else found[1]

    def available_memory(self, device_index: int | None = None) -> int:
        """Free bytes of the device; 0 where it does not tell."""
        found = devices.memory(self._here(device_index))
        return 0 if found is None else found[0]

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Bytes of tensors on the device; 0 for the CPU."""
        if self._kind == "cpu":
            return 0
        return int(torch.accelerator.memory_allocated(self._here(device_index)))

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """The most bytes of tensors that were on the device; 0 for the CPU."""
        return devices.peak_memory(self._here(device_index)) or 0 if self._kind != "cpu" else 0

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        if self._kind != "cpu":
            torch.accelerator.reset_peak_memory_stats(self._here(device_index))

    def memory_stats(self, device_index: int | None = None) -> dict[str, Any]:
        """What torch counts; nothing for the CPU."""
        return {} if self._kind == "cpu" else dict(torch.accelerator.memory_stats(self._here(device_index)))

    def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
        """A tensor in page-locked memory, where that helps; else as it is."""
        return tensor.pin_memory() if devices.can_pin(self._here()) else tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return devices.can_pin(self._here()) and tensor.is_pinned()

    # --- numbers -------------------------------------------------------------------------------------
    def is_bf16_supported(self) -> bool:
        return devices.computes_in_bf16(self._kind)

    def is_fp16_supported(self) -> bool:
        """Accelerators compute in it; torch's CPU kernels do, slowly."""
        return True

    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.float, torch.half, *([torch.bfloat16] if self.is_bf16_supported() else [])]

    def random(self) -> Any:
        return torch.random

    def get_rng_state(self, device_index: int | None = None) -> torch.Tensor:
        return torch.get_rng_state() if self._kind == "cpu" else devices.get_rng_state(self._kind)

    def set_rng_state(self, new_state: torch.Tensor, device_index: int | None = None) -> None:
        if self._kind == "cpu":
            torch.set_rng_state(new_state)
        else:
            devices.set_rng_state(self._kind, new_state)

    def manual_seed(self, seed: int) -> None:
        """Seed torch on all devices."""
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def initial_seed(self) -> int:
        return torch.initial_seed()


@functools.cache
def get_accelerator() -> Accelerator:
    """What this process computes on."""
    return Accelerator()


def is_current_accelerator_supported() -> bool:
    """Can it be computed on? Whatever torch can."""
    return True
