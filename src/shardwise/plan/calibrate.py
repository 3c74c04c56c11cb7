"""Measures the machine at hand: what it computes, moves and sends, and what the engine and Python cost on it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from shardwise import device as devices
from shardwise.errors import OffloadError
from shardwise.events import READ, TO_DEVICE, TO_HOST, WRITE
from shardwise.plan import probe_models, probes, ranks
from shardwise.plan.calibration import Calibration, Pairs, usual_threads
from shardwise.plan.calls import Call
from shardwise.plan.machine import Machine
from shardwise.plan.rates import Rates, key, made, weight
from shardwise.plan.simulate import Step, simulate
from shardwise.plan.trace import PHASE, RECOMPUTE, START, Trace
from shardwise.tiers.probe import probe

_DISK_BYTES = 64 << 20
_COPIES = (1 << 16, 1 << 20, 1 << 24, 1 << 26)
_MAX_RANKS = 4
Say = Callable[[str], None]


def calibrate(
    most: int | None = None, *, threads: int | None = None, disk: Path | None = None, folder: Path | None = None,
    told: Say = lambda _: None, steps: Callable[[int], list[Step]] = probe_models.steps,
) -> list[Calibration]:  # fmt: skip
    """Measure with one rank, two, ... up to ``most``, and keep what was found for :func:`rates_here`.

    Takes about 20 seconds per number of ranks.

    Args:
        most: ranks; by default as many as there are cores, four at most.
        threads: of each rank; by default what is usual.
        disk: a folder on a disk that states may be sent to; it is written to, and left as it was.
        folder: where the figures are kept, in place of the user's cache.
        told: is told what is measured now.
        steps: for a number of ranks, those that tell what the engine and Python cost.

    Raises:
        PlanError: a measurement failed.
    """
    most = most or max(1, min(_MAX_RANKS, os.cpu_count() or 1))
    links = _disk(disk, told)
    out = _accelerator(links, folder, told)
    for count in range(1, most + 1):
        found = measure(count, threads or usual_threads(count), steps(count), told)
        found = replace(found, links={name: [(b, s * count) for b, s in pairs] for name, pairs in links.items()})
        before = Calibration.load(found.ranks, found.threads, folder)
        if before is not None:  # operations of models, which take long to measure
            found = found.with_exact({k: v for k, v in before.exact.items() if k not in found.exact})
        found.save(folder)
        out.append(found)
    return out


def rates_here(
    machine: Machine, threads: int | None = None, traces: Callable[[], Iterable[Trace]] | None = None
) -> Rates | None:
    """Rates of the machine at hand as :func:`calibrate` measured them; ``None``: it did not.

    Args:
        traces: steps whose operations are to be measured as they are, on a CPU: see :func:`exactly`.
        machine: of :meth:`Machine.here`, with as many devices as are to be used.
        threads: of a rank on a CPU; by default what is usual.
    """
    threads = threads or usual_threads(machine.per_node)
    found = Calibration.load(machine.per_node, threads, device=machine.kind)
    if found is not None and traces is not None and machine.is_cpu:
        found = exactly(traces(), found)
    return None if found is None else Rates.measured(machine, found)


def measure(count: int, threads: int, steps: Sequence[Step], say: Say = lambda _: None) -> Calibration:
    """One number of ranks, without links to devices and disks."""
    say(f"{count} ranks: what the engine does in steps of two small models")
    traces = [simulate(step).trace for step in steps]
    say(f"{count} ranks: operations, messages and steps")
    found = ranks.run(count, threads, _all, _calls(traces), steps)
    rank = found[0]
    messages = _mean([f["node"] for f in found])
    first = Calibration(
        ranks=count, threads=threads, products={d: _mean([f["products"][d] for f in found]) for d in rank["products"]},
        memory=_mean([f["memory"] for f in found]), call={}, turn={}, node=messages, control=messages,
        beside=rank["beside"], exact={k: sum(f["exact"][k] for f in found) / count for k in rank["exact"]},
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
        "products": probes.products(devices.CPU),
        "memory": probes.memory(devices.CPU),
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
    """Per phase: seconds per operation, per turn to another unit, per transfer that begins, per new byte, and
    per second of operations alone.

    Args:
        measured: by rank and step, seconds by phase without waits.
    """
    rates = Rates.measured(Machine.here(found.ranks, device="cpu"), found)
    call: dict[str, float] = {}
    turn: dict[str, float] = {}
    begin: dict[str, float] = {}
    fresh: dict[str, float] = {}
    excess: dict[str, float] = {}
    counts = [_counts(trace, rates) for trace in traces]
    for phase in measured[0][0]:
        rows, left, whole = [], [], []
        for index, counted in enumerate(counts):
            mean = sum(m[index].get(phase, 0.0) for m in measured) / len(measured)
            of = counted.get(phase, [0.0] * 6)
            rows.append([*of[:4], of[4] if phase != "step" else 0.0, of[5]])  # an update has memory for a moment only
            left.append(mean - of[5])
            whole.append(mean)
        call[phase], again, turn[phase], begin[phase], fresh[phase], excess[phase] = _solved(rows, left, whole)
        if phase == "backward":
            call[RECOMPUTE], fresh[RECOMPUTE], excess[RECOMPUTE] = again, fresh[phase], excess[phase]
    return {"call": call, "turn": turn, "begin": begin, "fresh": fresh, "excess": excess}


def _counts(trace: Trace, rates: Rates) -> dict[str, list[float]]:
    """By phase: operations, those that are done again, turns, transfers, bytes that are new, seconds of operations."""
    out: dict[str, list[float]] = {}
    now = ""
    for entry in trace.entries:
        now = entry.phase if entry.kind == PHASE else now
        of = out.setdefault(now, [0.0] * 6)
        if entry.op is not None:
            of[entry.phase == RECOMPUTE] += weight(entry.op)
            of[4] += made(entry.op)
            of[5] += rates.operation(entry.op)
        of[2] += entry.kind == PHASE
        of[3] += entry.kind == START
    return out


def _solved(rows: Sequence[Sequence[float]], left: Sequence[float], whole: Sequence[float]) -> list[float]:
    """The non-negative ``x`` for which ``rows @ x`` is next to ``left``, in parts of ``whole``: all are tried."""
    share = torch.tensor([1 / max(value, 1e-6) for value in whole], dtype=torch.float64)
    a = torch.tensor(rows, dtype=torch.float64) * share[:, None]
    b = torch.tensor(left, dtype=torch.float64) * share
    columns = [k for k in range(a.shape[1]) if bool(a[:, k].any())]
    best, found = float((b * b).sum()), [0.0] * a.shape[1]
    for count in range(1, len(columns) + 1):
        for chosen in itertools.combinations(columns, count):
            part = a[:, list(chosen)]
            x = torch.linalg.lstsq(part, b[:, None], driver="gelsd").solution[:, 0]
            error = float(((part @ x - b) ** 2).sum())
            if bool((x >= 0).all()) and error < best * (1 - 1e-6):
                best = error
                found = [float(x[chosen.index(k)]) if k in chosen else 0.0 for k in range(a.shape[1])]
    return found


# --- beside the ranks ------------------------------------------------------------------------------------
def _disk(folder: Path | None, say: Say) -> dict[str, Pairs]:
    if folder is None:
        return {}
    say("the disk")
    try:
        speed = probe(folder, _DISK_BYTES)
    except OffloadError as error:
        say(f"the disk was not measured: {error.what}")
        return {}
    return {READ: [(1e6, 1e6 / speed.read)], WRITE: [(1e6, 1e6 / speed.write)]}


def _accelerator(disk: dict[str, Pairs], folder: Path | None, say: Say) -> list[Calibration]:
    """The first accelerator, if there is one, and its link to the host. What lies between several is not measured."""
    kind = devices.accelerator()
    if kind is None:
        return []
    device = devices.named(f"{kind}:0")
    say(f"{devices.name(device)}")
    links = disk | _host_link(device)
    found = Calibration(
        ranks=1, threads=1, products=probes.products(device), memory=probes.memory(device), call={}, turn={},
        links=links, device=kind,
    )  # fmt: skip
    found.save(folder)
    return [found]


def _host_link(device: torch.device) -> dict[str, Pairs]:
    """Copies between pinned memory and an accelerator."""
    out: dict[str, Pairs] = {TO_HOST: [], TO_DEVICE: []}
    for nbytes in _COPIES:
        host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=devices.can_pin(device))
        there = torch.empty_like(host, device=device)
        out[TO_DEVICE].append((float(nbytes), probes.copy(host, there, device)))
        out[TO_HOST].append((float(nbytes), probes.copy(there, host, device)))
    return out
