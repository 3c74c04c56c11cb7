"""Measures the machine at hand: what it computes, moves and sends, and what the engine and Python cost on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from shardwise import device as devices
from shardwise.errors import OffloadError
from shardwise.events import READ, TO_DEVICE, TO_HOST, WRITE
from shardwise.plan import probe_models, probes, ranks
from shardwise.plan.calibration import Calibration, usual_threads
from shardwise.plan.calls import Call
from shardwise.plan.machine import Machine
from shardwise.plan.rates import Rates, key
from shardwise.plan.simulate import simulate
from shardwise.plan.trace import OP, PHASE, Trace
from shardwise.tiers.probe import probe

_DISK_BYTES = 64 << 20
_COPIES = (1 << 16, 1 << 20, 1 << 24, 1 << 26)
_MAX_RANKS = 4
_BY_UNIT = ("forward", "backward", "end of backward")
Say = Callable[[str], None]


def calibrate(
    most: int | None = None, *, threads: int | None = None, disk: Path | None = None, folder: Path | None = None,
    say: Say = lambda _: None,
) -> list[Calibration]:  # fmt: skip
    """Measure with one rank, two, ... up to ``most``, and keep what was found for :meth:`Rates.here`.

    Takes about 15 seconds per number of ranks.

    Args:
        most: ranks; by default as many as there are cores, four at most.
        threads: of each rank; by default what is usual.
        disk: a folder on a disk that states may be sent to; it is written to, and left as it was.
        folder: where the figures are kept, in place of the user's cache.
        say: is told what is measured now.

    Raises:
        PlanError: a measurement failed.
    """
    most = most or max(1, min(_MAX_RANKS, os.cpu_count() or 1))
    links = _disk(disk, say) | _host_link(say)
    out = []
    for count in range(1, most + 1):
        found = measure(count, threads or usual_threads(count), say)
        found = replace(found, links={name: [(b, s * count) for b, s in pairs] for name, pairs in links.items()})
        before = Calibration.load(found.ranks, found.threads, folder)
        if before is not None:  # operations of models, which take long to measure
            found = found.with_exact({k: v for k, v in before.exact.items() if k not in found.exact})
        found.save(folder)
        out.append(found)
    return out


def measure(count: int, threads: int, say: Say = lambda _: None) -> Calibration:
    """One number of ranks, without links to devices and disks."""
    steps = probe_models.both(count)
    say(f"{count} ranks: what the engine does in a step of two small models")
    traces = [simulate(step).trace for step in steps]
    say(f"{count} ranks: operations, messages and steps")
    found = ranks.run(count, threads, _all, _calls(traces), steps)
    rank = found[0]
    first = Calibration(
        count, threads, {d: _mean([f["products"][d] for f in found]) for d in rank["products"]},
        _mean([f["memory"] for f in found]), {}, {}, _mean([f["node"] for f in found]),
        _mean([f["node"] for f in found]), 0.0, rank["beside"],
        exact={k: sum(f["exact"][k] for f in found) / count for k in rank["exact"]},
    )  # fmt: skip
    return replace(first, **_overheads(traces, [f["steps"] for f in found], first))  # type: ignore[arg-type]


def exactly(
    traces: Iterable[Trace], found: Calibration, *, folder: Path | None = None, keep: bool = True
) -> Calibration:
    """Measure the operations of some steps as they are, those that nobody has measured before.

    Takes a few seconds, and some 20 milliseconds per operation that is new.

    Args:
        traces: of steps on the CPU of this machine.
        found: what is known; its ranks and threads are those that measure.
        keep: for the next time.
    """
    missing = {name: call for name, call in _calls(traces).items() if name not in found.exact}
    if not missing:
        return found
    told = ranks.run(found.ranks, found.threads, probes.exact, missing)
    both = [name for name in missing if all(name in one for one in told)]
    found = found.with_exact({name: sum(one[name] for one in told) / len(told) for name in both})
    if keep:
        found.save(folder)
    return found


def _calls(traces: Iterable[Trace]) -> dict[str, Call]:
    return {key(op): call for trace in traces for op, call in trace.calls.items()}


def _all(rank: int, calls: dict[str, Call], steps: Sequence[object]) -> dict[str, object]:
    """What a rank measures."""
    several = torch.distributed.is_initialized()
    return {
        "products": probes.products(rank),
        "memory": probes.memory(rank),
        "exact": probes.exact(rank, calls),
        "node": probes.messages(rank) if several else [],
        "beside": probes.beside(rank) if several else (1.0, 1.0),
        "steps": [probes.steps(rank, step)[0] for step in steps],  # type: ignore[arg-type]
    }


def _mean(rows: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    return [(points[0][0], sum(p[1] for p in points) / len(points)) for points in zip(*rows, strict=True)]


# --- what is left of a step when its operations are taken away -------------------------------------------
def _overheads(
    traces: Sequence[Trace], measured: Sequence[Sequence[dict[str, float]]], found: Calibration
) -> dict[str, dict[str, float]]:
    """Per phase, of two steps: seconds per operation, and per turn to another unit.

    Args:
        measured: by rank and step, seconds by phase without waits.
    """
    rates = Rates.measured(Machine.here(found.ranks, device="cpu"), found)
    rows: dict[str, list[tuple[int, int, float]]] = {}
    for index, trace in enumerate(traces):
        mean = {p: sum(m[index].get(p, 0.0) for m in measured) / len(measured) for p in measured[0][index]}
        for phase, seconds in mean.items():
            ops = [e for e in trace.entries if e.kind == OP and e.phase == phase and e.op is not None]
            turns = sum(e.kind == PHASE and e.phase == phase for e in trace.entries)
            spent = sum(rates.operation(e.op) for e in ops if e.op is not None)
            rows.setdefault(phase, []).append((len(ops), turns, max(0.0, seconds - spent)))
    call, turn = {}, {}
    for phase, found_rows in rows.items():
        if phase not in _BY_UNIT:  # what a script and an optimizer do grows with parameters, as operations do
            found_rows = [(ops, 0, seconds) for ops, _, seconds in found_rows]
        call[phase], turn[phase] = _solved(found_rows)
    return {"call": call, "turn": turn}


def _solved(rows: Sequence[tuple[int, int, float]]) -> tuple[float, float]:
    """``x`` and ``y``, not negative, with ``a * x + b * y`` next to ``c`` in all rows ``(a, b, c)``."""
    aa, bb, ab = sum(a * a for a, _, _ in rows), sum(b * b for _, b, _ in rows), sum(a * b for a, b, _ in rows)
    ac, bc = sum(a * c for a, _, c in rows), sum(b * c for _, b, c in rows)
    determinant = aa * bb - ab * ab
    if determinant > 1e-6 * aa * bb:
        x, y = (ac * bb - bc * ab) / determinant, (bc * aa - ac * ab) / determinant
        if x >= 0 and y >= 0:
            return x, y
    one, other = (ac / aa if aa else 0.0), (bc / bb if bb else 0.0)
    error = [sum((a * x + b * y - c) ** 2 for a, b, c in rows) for x, y in ((one, 0.0), (0.0, other))]
    return (one, 0.0) if error[0] <= error[1] and aa else (0.0, other)


# --- beside the ranks ------------------------------------------------------------------------------------
def _disk(folder: Path | None, say: Say) -> dict[str, list[tuple[float, float]]]:
    if folder is None:
        return {}
    say("the disk")
    try:
        speed = probe(folder, _DISK_BYTES)
    except OffloadError as error:
        say(f"the disk was not measured: {error.what}")
        return {}
    return {READ: [(1e6, 1e6 / speed.read)], WRITE: [(1e6, 1e6 / speed.write)]}


def _host_link(say: Say) -> dict[str, list[tuple[float, float]]]:
    """Copies between pinned memory and the first accelerator, where there is one."""
    kind = devices.accelerator()
    if kind is None:
        return {}
    say("the link to the accelerator")
    device = devices.named(f"{kind}:0")
    out: dict[str, list[tuple[float, float]]] = {TO_HOST: [], TO_DEVICE: []}
    for nbytes in _COPIES:
        host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=devices.can_pin(device))
        there = torch.empty_like(host, device=device)

        def done() -> None:
            devices.synchronize(device)

        out[TO_DEVICE].append((float(nbytes), probes.link(host, there, done)))
        out[TO_HOST].append((float(nbytes), probes.link(there, host, done)))
    return out
