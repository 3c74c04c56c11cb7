"""What an engine tells while it trains: values of a step to monitors, times of its parts, one step's arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import nn

from shardwise import device as devices
from shardwise.deepspeed.monitor.monitor import MonitorMaster
from shardwise.deepspeed_config import DsFacts

_PARTS = ("forward", "backward", "step")


class Reports:
    """Told of each forward, backward and step of one engine. What is asked for is told by rank 0.

    Args:
        facts: what is asked for: ``monitors``, ``wall_clock``, ``flops_profiler``.
        module: whose forwards are counted.
        device: where it computes; times are taken when it is done with a part.
        leads: this is rank 0.
        say: writes a line.

    Raises:
        MissingPackage, TrackerError: a monitor that cannot be opened.

    Cost: with monitors, the loss of each step is waited for; with times, every part is.
    """

    def __init__(
        self, facts: DsFacts, module: nn.Module, device: torch.device, leads: bool, say: Callable[[str], None]
    ) -> None:
        self.monitor = MonitorMaster(facts.monitors)
        self._module, self._device, self._say = module, device, say
        self._timed = facts.wall_clock and leads
        self._every = facts.steps_per_print or 1
        self._watched = self.monitor.enabled and leads
        self._flops = dict(facts.flops_profiler or {}) if leads else {}
        self._measures = facts.flops_profiler is not None and leads
        self._profiler: Any = None
        self._seconds = dict.fromkeys(_PARTS, 0.0)
        self._began = 0.0
        self._losses: list[torch.Tensor] = []

    @property
    def idle(self) -> bool:
        """Nothing is asked for."""
        return not (self._timed or self._watched or self._measures)

    def forward_begins(self, steps: int) -> None:
        """A forward of the step after ``steps`` of them."""
        if self._measures and self._profiler is None and steps == int(self._flops.get("profile_step", 1)):
            from shardwise.deepspeed.profiling.flops_profiler import FlopsProfiler

            self._profiler = FlopsProfiler(self._module)
            self._profiler.start_profile()
        self._began = self._now()

    def forward_ends(self) -> None:
        """The same forward is over."""
        if self._timed:
            self._seconds["forward"] += self._now() - self._began

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A backward or a step, to be timed."""
        began = self._now()
        yield
        if self._timed:
            self._seconds[name] += self._now() - began

    def loss(self, part: torch.Tensor) -> None:
        """A micro-batch's part of the step's loss."""
        if self._watched:
            self._losses.append(part.detach())

    def step_ends(self, steps: int, samples: int, lr: float, scale: float | None) -> None:
        """Tell.

        Args:
            steps, samples: how many the engine has taken, this one included.
            lr: of the first group.
            scale: of losses, in fp16.
        """
        if self._watched:
            events: list[tuple[str, Any, int]] = [("Train/Samples/lr", lr, samples)]
            if self._losses:
                events.append(("Train/Samples/train_loss", float(torch.stack(self._losses).float().sum()), samples))
            if scale is not None:
                events.append(("Train/Samples/loss_scale", scale, samples))
            if self._timed:
                events += [
                    (f"Train/Samples/elapsed_time_ms_{name}", 1e3 * seconds, samples)
                    for name, seconds in self._seconds.items()
                ]
            self.monitor.write_events(events)
        if self._timed and steps % self._every == 0:
            times = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in self._seconds.items())
            self._say(f"step={steps}, time of its parts: {times}")
        self._seconds = dict.fromkeys(_PARTS, 0.0)
        self._losses.clear()
        if self._profiler is not None:
            self._profiler.stop_profile()
            names = ("profile_step", "module_depth", "top_modules", "detailed", "output_file")
            self._profiler.print_model_profile(**{name: self._flops[name] for name in names if name in self._flops})
            self._profiler.end_profile()
            self._profiler, self._measures = None, False

    def close(self) -> None:
        """Write what is left."""
        if self._profiler is not None:
            self._profiler.end_profile()
            self._profiler = None
        self.monitor.close()

    def _now(self) -> float:
        if not self._timed:
            return 0.0
        devices.synchronize(self._device)
        return perf_counter()
