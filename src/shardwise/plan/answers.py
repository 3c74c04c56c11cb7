"""The questions that people have, each with its answer: written to a console, and returned as facts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from rich.console import Console
from rich.table import Table

from shardwise.errors import PlanError, ShardwiseError, did_you_mean, first_line
from shardwise.plan.asked import PRECISIONS, Asked
from shardwise.plan.limits import longer, most_blocks, most_rows, most_tokens
from shardwise.plan.machine import Machine
from shardwise.plan.pool import each
from shardwise.plan.prediction import Prediction, Training
from shardwise.plan.search import Plan, search
from shardwise.plan.words import as_dict, breakdown, next_better, over, seconds, table, verdict
from shardwise.sizes import format_bytes, format_count
from shardwise.strategy import Strategy

Told = Callable[[int, int], None]


def _head(out: Console, asked: Asked, training: Training, machine: Machine) -> None:
    subject = training.subject
    rows = f", rows of {subject.seq:,} tokens" if subject.seq else ""
    what = f"{format_count(subject.parameters)} parameters"
    if subject.trainable != subject.parameters:
        what += f", {format_count(subject.trainable)} of them trained"
    out.print(f"[bold]{subject.name}[/bold]: {what} ({subject.source}){rows}, {asked.optimizer}, {asked.precision}")
    memory = f"{format_bytes(machine.host_memory)} of memory" if machine.host_memory else "memory not told"
    out.print(
        f"on {machine}; each node: {memory}" + (f", disks {format_bytes(machine.nvme)}/s" if machine.nvme else "")
    )
    for note in subject.notes:
        out.print(f"[yellow]note:[/yellow] {note}")
    out.print()


def _foot(out: Console, plan: Plan) -> None:
    times = "; ".join(sorted({f"{name}: {source}" for name, source in plan.rates.sources.items()}))
    counted = "Bytes and operations: counted in the engine's own step"
    told = (
        "'device' is what is needed at most, with what is not torch's. rows: of a micro-batch, x micro-batches per step"
    )
    out.print(f"\n[dim]{counted}. Times: {times}. {told}.[/dim]")


def which(asked: Asked, out: Console, told: Told, *, every: bool = False) -> dict[str, Any]:
    """Which strategy should I use?"""
    plan = _searched(asked, told, every=every)
    _head(out, asked, plan.training, plan.machine)
    out.print(table(plan))
    out.print()
    out.print(f"[bold]{verdict(plan)}[/bold]")
    better = next_better(plan)
    if better:
        out.print(better)
    _foot(out, plan)
    return {
        "fits": plan.best is not None,
        "verdict": verdict(plan),
        "next": better,
        "best": None if plan.best is None else as_dict(plan.best),
        "rows": [
            as_dict(row.found)
            if row.found is not None
            else {"strategy": str(row.strategy), "fits": False, "why": row.why}
            for row in plan.rows
        ],
    }


def _searched(
    asked: Asked, told: Told | None = None, strategies: Sequence[Strategy] | None = None, every: bool = False
) -> Plan:
    machine, training = asked.machine, asked.training()
    return search(
        training, machine, asked.rates(machine, training), precision=PRECISIONS[asked.precision], rows=asked.batch,
        batch=asked.global_batch, strategies=strategies, every=every, told=told,
    )  # fmt: skip


def _only(asked: Asked, strategy: Strategy) -> tuple[Plan, Prediction]:
    plan = _searched(asked, strategies=[strategy])
    found = plan.rows[0].found
    assert found is not None  # what it is refused for is raised
    return plan, found


def detail(asked: Asked, text: str, out: Console) -> dict[str, Any]:
    """Where one strategy's bytes and seconds go: which state is the peak, and when."""
    plan, found = _only(asked, asked.strategy(text))
    _head(out, asked, plan.training, plan.machine)
    out.print(f"[bold]{found.strategy}[/bold], micro-batches of {found.rows}, {found.accumulation} per step")
    out.print(breakdown(found))
    return as_dict(found)


def why(asked: Asked, text: str, out: Console, told: Told) -> dict[str, Any]:
    """Why not this one?"""
    wanted = asked.strategy(text)
    plan = _searched(asked, told)
    _head(out, asked, plan.training, plan.machine)
    _, other = _only(asked, wanted)
    best = plan.best
    if best is None:
        answer = verdict(plan)
    elif best.strategy == other.strategy:
        answer = f"{wanted} is the one to use. {verdict(plan)}"
    elif not other.fits:
        lacks = f"it needs {format_bytes(over(other))} more of the {other.lacks}"
        answer = f"{wanted} does not fit: with micro-batches of {other.rows} {lacks}. {verdict(plan)}"
    else:
        answer = _slower(best, other)
    out.print(f"[bold]{answer}[/bold]\n")
    out.print(_beside([("this one", other), *([("the best", best)] if best is not None else [])]))
    return {"answer": answer, "this": as_dict(other), "best": None if best is None else as_dict(best)}


def _slower(best: Prediction, other: Prediction) -> str:
    a, b = best.timing, other.timing
    assert a is not None and b is not None
    ratio = (a.tokens_per_s or 1 / a.seconds) / (b.tokens_per_s or 1 / b.seconds)
    share = {
        name: b.waits.get(name, 0.0) / b.seconds - a.waits.get(name, 0.0) / a.seconds for name in {*a.waits, *b.waits}
    }
    worst = max(share, key=lambda name: share[name], default="")
    because = ""
    if worst and share[worst] > 0.02:
        because = f", since it waits for the {worst} for {b.waits.get(worst, 0.0) / b.seconds:.0%} of a step"
    elif other.rows < best.rows:
        because = f", since only micro-batches of {other.rows} fit instead of {best.rows}"
    return f"{other.strategy} fits, and {best.strategy} is {ratio - 1:.0%} faster{because}."


def what_if(asked: Asked, text: str | None, changes: Sequence[str], out: Console) -> dict[str, Any]:
    """The same question with something changed: an option of the command, or a key of the strategy."""
    base = asked.strategy(text) if text is not None else None
    for change in changes:  # before anything takes its time
        _changed(asked, base or Strategy("hsdp", param_dtype="bf16"), change)
    if base is None:
        plan = _searched(asked)
        if plan.best is None:
            raise PlanError(verdict(plan), fix="name a strategy to change: --strategy")
        base = plan.best.strategy
        found = plan.best
    else:
        plan, found = _only(asked, base)
    _head(out, asked, plan.training, plan.machine)
    columns = [("as asked", found)]
    for change in changes:
        other, strategy = _changed(asked, base, change)
        columns.append((change, _only(other, strategy)[1]))
    out.print(f"[bold]{base}[/bold]")
    out.print(_beside(columns))
    first = columns[0][1]
    for name, one in columns[1:]:
        if first.timing is not None and one.timing is not None:
            time = one.timing.seconds / first.timing.seconds - 1
            speed = (one.timing.tokens_per_s or 0) / (first.timing.tokens_per_s or 1) - 1
            memory = one.needs[1] - first.needs[1]
            out.print(f"{name}: {time:+.1%} time per step, {speed:+.1%} tokens/s, "
                      f"{'+' if memory >= 0 else '-'}{format_bytes(abs(memory))} of the device")  # fmt: skip
    return {name: as_dict(one) for name, one in columns}


def _changed(asked: Asked, strategy: Strategy, change: str) -> tuple[Asked, Strategy]:
    key, sep, value = change.partition("=")
    key = key.strip().replace("-", "_")
    keys = [f.name for f in fields(Strategy)]
    options = [name for name in Asked.__dataclass_fields__ if name != "model"]
    if not sep or key not in (*keys, *options):
        fix = did_you_mean(key, [*keys, *options], "an option of this command, or a key of a strategy")
        raise PlanError(f"--what-if {change} changes nothing that is known", fix=fix)
    if key in keys:
        preset = value if key == "preset" else strategy.preset
        rest = [part for part in str(strategy).split(",")[1:] if not part.startswith(f"{key}=")]
        more = [] if key == "preset" else [f"{key}={value}"]
        return asked, Strategy.parse(",".join([preset, *rest, *more]))
    return asked.changed(key, value), strategy


def _beside(columns: Sequence[tuple[str, Prediction]]) -> Table:
    out = Table(box=None, pad_edge=False, header_style="bold")
    out.add_column("")
    for name, _ in columns:
        out.add_column(name, justify="right", overflow="fold")

    def row(name: str, value: Callable[[Prediction], str]) -> None:
        out.add_row(name, *[value(found) for _, found in columns])

    row("strategy", lambda p: str(p.strategy))
    row("devices", lambda p: str(p.world))
    row("rows x micro-batches", lambda p: f"{p.rows} x {p.accumulation}")
    row("device, at most", lambda p: format_bytes(p.needs[1]))
    row("  activations", lambda p: format_bytes(p.device.activations))
    row("host", lambda p: format_bytes(p.host.nbytes))
    row("disk", lambda p: format_bytes(p.disk))
    row("fits", lambda p: "yes" if p.fits else f"no: {p.lacks}")
    if all(p.timing is not None for _, p in columns):
        row("step", lambda p: seconds(p.timing.seconds) if p.timing else "")
        row("tokens/s", lambda p: f"{p.timing.tokens_per_s or 0:,.0f}" if p.timing else "")
        row("MFU", lambda p: f"{p.timing.mfu or 0:.1%}" if p.timing else "")
        names = sorted({name for _, p in columns if p.timing for name, v in p.timing.waits.items() if v})
        for name in names:
            row(f"  waits: {name}", lambda p, name=name: seconds(p.timing.waits.get(name, 0.0)) if p.timing else "")  # type: ignore[misc]
    return out


def how_far(asked: Asked, most: str, text: str | None, out: Console) -> dict[str, Any]:
    """How far can I go with each strategy, or with this one?"""
    machine, training = asked.machine, asked.training()
    _head(out, asked, training, machine)
    if text is not None:
        chosen = [asked.strategy(text)]
    else:
        rows = _searched(asked).rows
        chosen = [row.strategy for row in rows if row.found is not None][:6]
    if most == "seq" and training.subject.seq is None:
        raise PlanError("the rows of this model have no length", where=training.subject.name)
    result = Table(box=None, pad_edge=False, header_style="bold")
    names = {"batch": "rows of a micro-batch", "seq": "tokens of a row", "layers": "blocks"}
    for name in ("strategy", names[most], *(["parameters"] if most == "layers" else [])):
        result.add_column(name, justify="left" if name == "strategy" else "right", overflow="fold")
    facts: dict[str, Any] = {}
    for strategy, found in zip(chosen, each(lambda s: _furthest(training, machine, s, most), chosen), strict=True):
        if isinstance(found, ShardwiseError):
            if text is not None:
                raise found
            result.add_row(str(strategy), first_line(found))
            continue
        far, parameters = found
        facts[str(strategy)] = far
        more = [format_count(parameters)] if most == "layers" else []
        result.add_row(str(strategy), f"{far:,}" if far else "none fits", *more)
    out.print(result)
    return {most: facts, "fits": any(facts.values())}


def _furthest(training: Training, machine: Machine, strategy: Strategy, most: str) -> tuple[int, int]:
    """How far, and of how many parameters the model is then."""
    if most == "batch":
        return most_rows(training, machine, strategy), training.subject.parameters
    if most == "layers":
        return most_blocks(training, machine, strategy)
    far = most_tokens(lambda seq: longer(training, seq), machine, strategy, training.subject.longest)
    return far, training.subject.parameters
