"""What one rank measures of its machine, while the others do the same. Everything here runs in a rank's process."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise import device as devices
from shardwise.comm.stats import Op
from shardwise.comm.world import World
from shardwise.engine.build import shard
from shardwise.events import Listener, listening
from shardwise.plan.calls import Call, Slab, timed
from shardwise.plan.simulate import Step, one_step

_SIDES = ((32, 64, 64), (64, 128, 128), (128, 256, 256), (256, 512, 512), (512, 768, 768), (1024, 1024, 1024))
_LARGE = ((2048, 4096, 4096), (8192, 8192, 8192))  # of accelerators
_POOL = 48 << 20  # bytes of tensors that take turns
_BYTES = (1 << 8, 1 << 12, 1 << 15, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
_MESSAGES = (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 24)
_TIMES = 60  # of a message
_AT_ONCE = 10  # operations before a device is waited for
_LONG_S = 0.1
_LARGEST = 1 << 29  # bytes of an operation that is measured as it is

Pairs = list[tuple[float, float]]


def together() -> None:
    """All ranks begin at once."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


def longest(seconds: float) -> float:
    """Of all ranks."""
    found = torch.tensor(seconds, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def products(device: torch.device) -> dict[str, Pairs]:
    """Seconds of matrix products by dtype and floating-point operations.

    What takes long takes as long as it has operations: larger ones are left out then. So it is with bf16 on processors
    that have no instructions for it.
    """
    out: dict[str, Pairs] = {}
    sides = _SIDES if device.type == "cpu" else (*_SIDES, *_LARGE)
    for dtype in (torch.float32, torch.bfloat16):
        if dtype is torch.bfloat16 and not devices.computes_in_bf16(device.type):
            continue
        pairs = out[str(dtype).removeprefix("torch.")] = []
        for rows, inner, columns in sides:
            a = torch.rand(rows, inner, device=device).to(dtype)
            b = torch.rand(inner, columns, device=device).to(dtype)
            together()
            pairs.append((2.0 * rows * inner * columns, _seconds([partial(torch.mm, a, b)], device)))
            if longest(pairs[-1][1]) > _LONG_S:
                break
    return out


def memory(device: torch.device) -> Pairs:
    """Seconds of adding two tensors into a third by bytes read and written."""
    out: Pairs = []
    for nbytes in _BYTES:
        n = max(1, nbytes // 12)
        sets = [
            (torch.rand(n, device=device), torch.rand(n, device=device)) for _ in range(max(1, min(4, _POOL // nbytes)))
        ]
        together()
        out.append((12.0 * n, _seconds([partial(torch.add, a, b) for a, b in sets], device)))
    return out


def _seconds(calls: list[Callable[[], Any]], device: torch.device) -> float:
    """Of one of these. On a device that runs late some are given at once, so that the host's part is hidden."""
    if not devices.runs_late(device):
        return timed(calls)

    def some() -> None:
        for index in range(_AT_ONCE):
            calls[index % len(calls)]()
        devices.synchronize(device)

    return timed([some]) / _AT_ONCE


def exact(_rank: int, calls: dict[str, Call]) -> dict[str, float]:
    """Seconds of each of these, as far as they can be made."""
    out, slab = {}, Slab()
    for name, call in calls.items():
        together()
        seconds = slab.seconds(call) if call.nbytes <= _LARGEST else None
        if seconds is not None:
            out[name] = seconds
    return out


# --- messages -----------------------------------------------------------------------------------------
def _gather(nbytes: int) -> Callable[[], Any]:
    world = World.current()
    mesh = world.mesh(torch.device("cpu"), world.size, 60.0)
    flat = torch.zeros(world.size * max(1, nbytes // max(1, world.size - 1) // 4))
    return lambda: mesh.gather(flat, Op("gather", "a measurement", 1))


def messages(_rank: int) -> Pairs:
    """Seconds of a gather by the bytes that each rank sends."""
    out: Pairs = []
    for nbytes in _MESSAGES:
        start = _gather(nbytes)
        together()

        def once(start: Callable[[], Any] = start) -> None:
            start().wait()

        out.append((float(nbytes), timed([once], _TIMES)))
    return out


def beside(_rank: int, nbytes: int = 1 << 24) -> tuple[float, float]:
    """Speeds of operations and of a message that is under way meanwhile, as parts of those alone."""
    a, b = torch.rand(192, 192), torch.rand(192, 192)
    start = _gather(nbytes)

    def once() -> None:
        start().wait()

    found = []
    for _ in range(5):
        together()
        alone, message = timed([partial(torch.mm, a, b)]), timed([once], _TIMES)
        count = max(1, int(message / alone / 3))  # the message outlasts them
        together()
        transfer, begun = start(), perf_counter()
        for _ in range(count):
            torch.mm(a, b)
        computed = perf_counter() - begun
        transfer.wait()
        left = perf_counter() - begun - computed
        main, sent = count * alone / computed, (message - left) / computed
        found.append((min(1.0, max(0.1, main)), min(1.0, max(0.02, sent))))
    return statistics.median(f[0] for f in found), statistics.median(f[1] for f in found)


# --- what the engine and Python cost ------------------------------------------------------------------
class PhaseTimes(Listener):
    """Seconds in each phase of a step, without those in which this rank waited for others."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.waiting = 0.0
        self._at, self._since, self._from = "", perf_counter(), 0.0

    def phase(self, phase: str, unit: str) -> None:
        now = perf_counter()
        self.seconds[self._at] = self.seconds.get(self._at, 0.0) + now - self._since - self.waiting
        self._at, self._since, self.waiting = phase, now, 0.0

    def wait(self, way: str, name: str) -> None:
        self._from = perf_counter()

    def waited(self, way: str, name: str) -> None:
        self.waiting += perf_counter() - self._from


def steps(_rank: int, step: Step, count: int = 10) -> tuple[dict[str, float], float]:
    """Seconds by phase without waits, and of a whole step: the lower quartile of some real steps."""
    model = step.build()
    shard(model, step.strategy)
    optimizers = step.optimizers([p for p in model.parameters() if p.requires_grad])
    rows: list[dict[str, float]] = []
    whole: list[float] = []
    for index in range(count + 3):
        together()
        times = PhaseTimes()
        begun = perf_counter()
        with listening(times):
            one_step(step, model, optimizers)
            times.phase("", "")
        if index >= 3:  # the first ones learn the order of units, and make the optimizer's state
            rows.append(times.seconds)
            whole.append(perf_counter() - begun)
    return {name: _quartile([row.get(name, 0.0) for row in rows]) for name in rows[-1]}, _quartile(whole)


def _quartile(values: list[float]) -> float:
    return statistics.quantiles(values, n=4, method="inclusive")[0]


# --- a link to a device --------------------------------------------------------------------------------
def copy(source: Tensor, target: Tensor, device: torch.device) -> float:
    """Seconds of a copy."""
    return _seconds([partial(target.copy_, source, non_blocking=True)], device)
