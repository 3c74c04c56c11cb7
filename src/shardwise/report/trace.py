"""Timelines of a recorded run as a trace that Perfetto and ``chrome://tracing`` read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shardwise.errors import RecordError
from shardwise.observe.recorded import RankRecord, RunRecord
from shardwise.report.facts import STAGES

_PHASES, _WAITS, _BESIDE = range(3)  # tracks


def write_trace(run: RunRecord, path: Path) -> None:
    """Write ``{"traceEvents": [...]}``: a process per rank, with tracks for phases and waits, transfers as spans that
    may overlap, and bytes by state as counters.

    A transfer ends where somebody has waited for it: it may have been over before.

    Raises:
        RecordError: the record has no timeline, or the file cannot be written.
    """
    if not any(one.timelines for one in run.ranks):
        raise RecordError(
            "no step of this record is in full", where=str(run.folder), fix="record three steps or more: 3 to 5 are"
        )
    zero = min(one.head["time"] for one in run.ranks)
    events: list[dict[str, Any]] = []
    for one in run.ranks:
        events += _of_rank(one, round((one.head["time"] - zero) * 1e6))
    try:
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
    except OSError as error:
        raise RecordError(f"it cannot be written: {error.strerror or error}", where=str(path)) from error


def _of_rank(one: RankRecord, shift: int) -> list[dict[str, Any]]:
    rank = one.rank
    out: list[dict[str, Any]] = [_meta("process_name", rank, 0, f"rank {rank}")]
    for track, name in ((_PHASES, "phases"), (_WAITS, "waits"), (_BESIDE, "waits of threads beside")):
        out.append(_meta("thread_name", rank, track, name))
    number = 0
    for line in one.timelines:
        names = line["names"]
        for k, (at, phase, unit) in enumerate(line["phases"]):
            if k + 1 < len(line["phases"]):
                name = f"{names[phase]} {names[unit]}".strip()
                out.append(_span(rank, _PHASES, name, shift + at, line["phases"][k + 1][0] - at, line["step"]))
        for since, until, way, what, beside in line["waits"]:
            track = _BESIDE if beside else _WAITS
            out.append(_span(rank, track, f"{names[way]} {names[what]}", shift + since, until - since, line["step"]))
        for began, ended, way, what, nbytes in line["transfers"]:
            if ended is None:
                continue
            number += 1
            category = "stages" if names[way] in STAGES else "messages"
            both = {"cat": category, "id": f"{rank}.{number}", "pid": rank, "tid": 0, "name": names[way]}
            out.append({**both, "ph": "b", "ts": shift + began, "args": {"what": names[what], "bytes": nbytes}})
            out.append({**both, "ph": "e", "ts": shift + ended})
        for at, *live in line["memory"]:
            values = dict(zip(one.states, live, strict=True))
            out.append({"ph": "C", "pid": rank, "tid": 0, "ts": shift + at, "name": "bytes by state", "args": values})
    return out


def _meta(what: str, rank: int, track: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": rank, "tid": track, "args": {"name": name}}


def _span(rank: int, track: int, name: str, at: int, length: int, step: int) -> dict[str, Any]:
    return {"ph": "X", "pid": rank, "tid": track, "name": name, "ts": at, "dur": length, "args": {"step": step}}
