"""What an engine says of itself while it trains: a line now and then, times, monitors, a profile of one step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from shardwise import device as devices
from shardwise.deepspeed_config import DsFacts

_PARTS = ("forward", "backward", "step")


class Meters:
    """As the configuration asks; nothing of it costs anything where it does not.

    Args:
        facts: ``steps_per_print``, ``wall_clock``, ``monitors`` and ``flops_profiler``.
        module: the model.
        device: where it computes; waited for around what is timed.
        rank: rank 0 writes.

    Attributes:
        times: milliseconds of forward, backward and step in the window before, by ``wall_clock_breakdown``.
        monitor: writes events; ``None`` where no monitor is on.

    Raises:
        MissingPackage: the client of a monitor is not installed.
    """

    def __init__(self, facts: DsFacts, module: nn.Module, device: torch.device, rank: int) -> None:
        self._facts, self._module, self._device, self._rank = facts, module, device, rank
        self._running = dict.fromkeys(_PARTS, 0.0)
        self.times: dict[str, float] = {}
        self.monitor: Any = None
        self._profiler: Any = None
        if facts.monitors:
            from shardwise.deepspeed.monitor import MonitorMaster

            self.monitor = MonitorMaster(facts.monitors)

    def timed(self, part: str) -> AbstractContextManager[None]:
        """Around a forward, a backward or a step."""
        return self._timed(part) if self._facts.wall_clock else nullcontext()

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        devices.synchronize(self._device)
        start = time.perf_counter()
        try:
            yield
        finally:
            devices.synchronize(self._device)
            self._running[part] += 1000 * (time.perf_counter() - start)

    def before_forward(self, global_steps: int) -> None:
        """Begin the profile, if this is the step for it."""
        section = self._facts.flops_profiler
        if section is None or self._profiler is not None or self._rank or global_steps != self._profile_step:
            return
        from shardwise.deepspeed.profiling.flops_profiler import FlopsProfiler

        self._profiler = FlopsProfiler(self._module, recompute_fwd_factor=section.get("recompute_fwd_factor", 0.0))
        self._profiler.start_profile()

    @property
    def _profile_step(self) -> int:
        return int((self._facts.flops_profiler or {}).get("profile_step", 1))

    def after_forward(self) -> None:
        if self._profiler is not None:
            self._profiler.stop_profile()

    def stepped(self, steps: int, samples: int, skipped: int, rates: Any, momenta: Any, scale: float | None) -> None:
        """A window has ended.

        Args:
            steps, samples, skipped: so far.
            rates, momenta: of each parameter group.
            scale: of losses, in fp16.
        """
        if self._facts.wall_clock:
            self.times, self._running = self._running, dict.fromkeys(_PARTS, 0.0)
        if self._rank == 0:
            every = self._facts.steps_per_print
            if every and steps % every == 0:
                print(f"step={steps}, skipped={skipped}, lr={rates}, mom={momenta}", flush=True)
            if self.times:
                told = " | ".join(f"{part}: {ms:.2f}" for part, ms in self.times.items())
                print(f"time (ms) | {told}", flush=True)
        if self.monitor is not None:
            events = [("Train/Samples/lr", rates[0], samples)] if rates else []
            if scale is not None:
                events.append(("Train/Samples/loss_scale", scale, samples))
            events += [(f"Train/Samples/elapsed_time_ms_{part}", ms, samples) for part, ms in self.times.items()]
            self.monitor.write_events(events)
        if self._profiler is not None and steps == self._profile_step + 1:
            section = dict(self._facts.flops_profiler or {})
            self._profiler.print_model_profile(
                profile_step=self._profile_step,
                module_depth=section.get("module_depth", -1),
                top_modules=section.get("top_modules", 1),
                detailed=section.get("detailed", True),
                output_file=section.get("output_file"),
            )
            self._profiler.end_profile()

    def close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()
            self.monitor = None
