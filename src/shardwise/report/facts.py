"""Numbers of a recorded run, each with where it is from."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from shardwise.errors import RecordError
from shardwise.events import READ, TO_DEVICE, TO_HOST, UPDATE, WRITE
from shardwise.observe.recorded import RankRecord, RunRecord

STAGES = (TO_HOST, TO_DEVICE, READ, WRITE, UPDATE)
"""Ways that are no messages between ranks."""
MEASURED, COUNTED, DATASHEET = "measured", "counted", "datasheet"
_EVEN = 0.03  # ranks whose work differs by less are equally fast


@dataclass(frozen=True)
class Fact:
    """One number. ``value`` is ``None`` if it is not known; then ``source`` says why."""

    name: str
    value: float | None
    unit: str
    source: str


@dataclass(frozen=True)
class RankFacts:
    """Means of one rank over the steps that count, per step.

    Attributes:
        step_s: seconds of a step, without evaluation.
        busy_s: of these, the seconds in which it waited for no other rank.
        waits: seconds by way.
        phases: seconds by phase, waits included.
        peak: the most bytes by state in the whole run, and of all states together.
    """

    rank: int
    step_s: float
    busy_s: float
    waits: dict[str, float]
    phases: dict[str, float]
    peak: dict[str, int]
    peak_total: int


@dataclass(frozen=True)
class Prediction:
    """What a plan says beside what was measured: bytes, or seconds for ``a step``."""

    name: str
    predicted: float
    measured: float | None

    @property
    def difference(self) -> float | None:
        """Of the prediction from what was measured, as a part of that."""
        return (self.predicted - self.measured) / self.measured if self.measured else None


@dataclass(frozen=True)
class Facts:
    """All of them."""

    run: RunRecord
    summary: list[Fact]
    ranks: list[RankFacts]
    slowest: list[str]
    sent: dict[str, float]
    predictions: list[Prediction]
    notes: list[str]


def facts_of(run: RunRecord) -> Facts:
    """What the record of a run comes to.

    Raises:
        RecordError: no rank finished a step; a ``plan.json`` beside the record that is no plan.
    """
    stepped = [one for one in run.ranks if one.steps]
    if not stepped:
        raise RecordError(
            "no step is in this record: the run ended, or was killed, before its first optimizer step was over",
            where=f"{run.folder}, run {run.run}", fix="record at least one step; of five, three are in full",
        )  # fmt: skip
    ranks = [_rank_facts(one) for one in stepped]
    sent: dict[str, float] = {}
    steps = stepped[0].measured()
    for step in steps:
        for way, nbytes in step["sent"].items():
            sent[way] = sent.get(way, 0.0) + nbytes / sum(s["steps"] for s in steps)
    return Facts(
        run, _summary(stepped, ranks), ranks, _slowest(stepped, ranks), sent, _predictions(run, ranks),
        _notes(run, stepped),
    )  # fmt: skip


def seconds_of(step: dict[str, Any]) -> float:
    """Of one step of a line, without evaluation."""
    return float(step["end"] - step["start"] - step["seconds"].get("evaluation", 0.0)) / int(step["steps"])


def number(value: Any) -> float | None:
    """A loss or a logged value: a number, or what stands for one that JSON lacks."""
    return None if value is None else float(value)


def _rank_facts(one: RankRecord) -> RankFacts:
    lines = one.measured()
    count = sum(line["steps"] for line in lines)
    told = [line for line in lines if line["clock"] == "device"] or lines  # of a device that runs late, what it did
    parts = sum(line["steps"] for line in told)
    waits, phases = _totals(told, "waits", parts), _totals(told, "seconds", parts)
    phases.pop("evaluation", None)
    step_s = sum(seconds_of(line) * line["steps"] for line in lines) / count
    network = sum(s for way, s in waits.items() if way not in STAGES)
    end = one.end
    peaks = [end["peak"]] if end else [line["peak"][:-1] for line in one.steps]
    total = end["peak_total"] if end else max(line["peak"][-1] for line in one.steps)
    peak = {state: max(row[i] for row in peaks) for i, state in enumerate(one.states)}
    return RankFacts(one.rank, step_s, step_s - network, waits, phases, peak, total)


def _totals(lines: Sequence[dict[str, Any]], key: str, count: int) -> dict[str, float]:
    out: dict[str, float] = {}
    for line in lines:
        for name, value in line[key].items():
            out[name] = out.get(name, 0.0) + value / count
    return out


def _summary(stepped: Sequence[RankRecord], ranks: Sequence[RankFacts]) -> list[Fact]:
    first = stepped[0]
    step_s = max(one.step_s for one in ranks)
    losses = [number(line["loss"]) for line in first.steps if line["loss"] is not None]
    last = [number(one.steps[-1]["loss"]) for one in stepped if one.steps[-1]["loss"] is not None]
    tokens, rows = _per_step(stepped, "tokens"), _per_step(stepped, "rows")
    mine = _per_step(stepped[:1], "flops")
    peak_flops = first.head["device"]["peak_flops"]
    reach = mine / step_s if mine else None
    out = [
        Fact("steps", max(one.steps[-1]["step"] for one in stepped), "", COUNTED),
        Fact("a step", step_s, "s", MEASURED),
        Fact(
            "loss at the end", statistics.fmean(x for x in last if x is not None) if losses and last else None, "",
            MEASURED if losses else "nobody told it: recording.tell(loss=...), or accelerator.backward(loss)",
        ),
        Fact(
            "tokens/s", tokens / step_s if tokens else None, "tokens/s",
            f"{COUNTED} / {MEASURED}" if tokens else "no input looks like ids of tokens",
        ),
        Fact("rows/s", rows / step_s if rows else None, "rows/s", f"{COUNTED} / {MEASURED}" if rows else "not known"),
        Fact(
            "TFLOPS of a rank", reach / 1e12 if reach else None, "",
            f"{COUNTED} / {MEASURED}" if reach else "not counted: the run was compiled, or has fewer than two steps",
        ),
        Fact(
            "MFU", reach / peak_flops if reach and peak_flops else None, "",
            f"{COUNTED} / {MEASURED} / {DATASHEET}" if reach and peak_flops
            else f"no peak rate is known for '{first.head['device']['name']}'",
        ),
        Fact("peak of all states", max(one.peak_total for one in ranks), "bytes", COUNTED),
    ]  # fmt: skip
    allocated = [n for one in stepped if (n := one.steps[-1]["allocated"]) is not None]
    if allocated:
        out.append(Fact("peak of the device", max(allocated), "bytes", MEASURED))
    resident = [n for one in stepped for line in one.steps if (n := line["resident"]) is not None]
    if resident:
        out.append(Fact("a process in the host's memory", max(resident), "bytes", MEASURED))
    evaluation = sum(line["seconds"].get("evaluation", 0.0) for line in first.steps)
    if evaluation:
        out.append(Fact("evaluation, in all", evaluation, "s", MEASURED))
    return out


def _per_step(stepped: Iterable[RankRecord], key: str) -> float | None:
    """Of all these ranks together, as a mean over the steps that count."""
    total = 0.0
    for one in stepped:
        lines = [line for line in one.measured() if line[key] is not None]
        if not lines:
            return None
        total += sum(line[key] for line in lines) / sum(line["steps"] for line in lines)
    return total


def _slowest(stepped: Sequence[RankRecord], ranks: Sequence[RankFacts]) -> list[str]:
    """Which rank the others wait for, and what it waits for itself, in sentences."""
    slow = max(ranks, key=lambda one: one.busy_s)
    quick = min(ranks, key=lambda one: one.busy_s)
    out = []
    if len(ranks) == 1:
        out.append("There is one rank: nobody waits for another.")
    elif slow.busy_s - quick.busy_s < _EVEN * slow.step_s:
        out.append(
            f"The ranks are equally fast: rank {slow.rank} works {slow.busy_s:.4g} s of a step, and the quickest, rank "
            f"{quick.rank}, {quick.busy_s:.4g} s."
        )
    else:
        more = {phase: s - quick.phases.get(phase, 0.0) for phase, s in slow.phases.items()}
        for phase, s in _waits_by_phase(next(one for one in stepped if one.rank == slow.rank)).items():
            more[phase] = more.get(phase, 0.0) - s
        for phase, s in _waits_by_phase(next(one for one in stepped if one.rank == quick.rank)).items():
            more[phase] = more.get(phase, 0.0) + s
        where = max(more, key=lambda phase: more[phase])
        named = (
            "outside of the engine (data, and what the script does itself)" if where == "outside" else f"in '{where}'"
        )
        out.append(
            f"Rank {slow.rank} is the slowest: it works {slow.busy_s:.4g} s of a step, rank {quick.rank} only "
            f"{quick.busy_s:.4g} s and then waits for it. Most of the difference is {named}."
        )
    if slow.waits:
        way = max(slow.waits, key=lambda name: slow.waits[name])
        name, share = _most_waited(next(one for one in stepped if one.rank == slow.rank), way)
        out.append(
            f"Rank {slow.rank} itself waits most for '{way}': {slow.waits[way]:.4g} s of a step"
            + (f", {share:.0%} of it for {name}." if name else ".")
        )
    else:
        out.append(f"Rank {slow.rank} itself waits for nothing.")
    return out


def _waits_by_phase(one: RankRecord) -> dict[str, float]:
    """Seconds per step that a rank waited for others, by phase, as its timelines show; empty without one."""
    out: dict[str, float] = {}
    for line in one.timelines:
        names, phases = line["names"], line["phases"]
        k = 0
        for since, until, way, _, beside in sorted(line["waits"]):
            while k + 1 < len(phases) and phases[k + 1][0] <= since:
                k += 1
            if not beside and phases and names[way] not in STAGES:
                phase = names[phases[k][1]]
                out[phase] = out.get(phase, 0.0) + (until - since) / 1e6 / len(one.timelines)
    return out


def _most_waited(one: RankRecord, way: str) -> tuple[str, float]:
    """The name that a rank waited for longest, of all of a way, and its share; empty if no timeline tells."""
    by_name: dict[str, float] = {}
    for line in one.timelines:
        for since, until, its, name, beside in line["waits"]:
            if not beside and line["names"][its] == way:
                by_name[line["names"][name]] = by_name.get(line["names"][name], 0.0) + until - since
    total = sum(by_name.values())
    if not total or way in STAGES:  # whose names are those of requests
        return "", 0.0
    name = max(by_name, key=lambda n: by_name[n])
    return name, by_name[name] / total


def _predictions(run: RunRecord, ranks: Sequence[RankFacts]) -> list[Prediction]:
    path = run.folder / "plan.json"
    if not path.exists():
        return []
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        found = plan.get("best", plan)  # of a search, or of one strategy
        peak = {str(state): float(nbytes) for state, nbytes in found["device"]["states"].items()}
        step_s = None if found["timing"] is None else float(found["timing"]["seconds"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"it is no plan: {type(error).__name__}: {error}",
            where=str(path),
            fix="move it away, or let 'shardwise plan ... --json' write it",
        ) from error
    known = ranks[0].peak.keys()
    out = [
        Prediction(state, nbytes, max(one.peak[state] for one in ranks) if state in known else None)
        for state, nbytes in peak.items()
    ]
    if step_s is not None:
        out.append(Prediction("a step", step_s, max(one.step_s for one in ranks)))
    return out


def _notes(run: RunRecord, stepped: Sequence[RankRecord]) -> list[str]:
    out = []
    if run.missing:
        out.append(f"Ranks {_list(run.missing)} of {run.world} have no file here; sums are of the others only.")
    if none := [one.rank for one in run.ranks if not one.steps]:
        out.append(f"Ranks {_list(none)} finished no step.")
    if cut := [one.rank for one in run.ranks if one.end is None]:
        out.append(f"The records of ranks {_list(cut)} have no end: killed, or still running.")
    if any(line["counting"] for one in stepped for line in one.steps):
        out.append(
            "Floating-point operations were counted in step 2; it and the first are left out of times and rates."
        )
    longest = max(one.steps[-1]["steps"] for one in stepped)
    if longest > 1:
        out.append(f"It is a long run: later points stand for up to {longest} steps.")
    return out


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
