"""A plan in words: which strategy, why, what would have to change, and tables of figures with their sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shardwise.plan.memory import Peak
from shardwise.plan.prediction import Prediction
from shardwise.plan.search import Plan, Row
from shardwise.sizes import format_bytes
from shardwise.strategy import Strategy

if TYPE_CHECKING:
    from rich.table import Table

SOURCES = "counted: bytes and operations, of the engine's own step; {times}"


def seconds(value: float) -> str:
    """``1.24 s``, ``35 ms``."""
    if value >= 1:
        return f"{value:,.2f} s"
    return f"{value * 1e3:,.0f} ms" if value >= 0.01 else f"{value * 1e3:,.2f} ms"


def table(plan: Plan) -> Table:
    """All strategies, the best first. Keys that all of them have are in its title; columns without a figure are out."""
    from rich.table import Table  # for who reads tables, not for every rank that asks for the words

    common = common_keys([row.strategy for row in plan.rows])
    title = f"all with {','.join(common)}" if common else None
    out = Table(box=None, pad_edge=False, header_style="bold", title=title, title_style="", title_justify="left")
    lines = [cells(row, common) for row in plan.rows]
    names = ("strategy", "rows", "device", "host", "disk", "step", "tokens/s", "MFU", "bound by", "")
    shown = [k for k in range(len(names)) if any(line[k] for line in lines)]
    for k in shown:
        words = names[k] in ("strategy", "bound by", "")
        out.add_column(
            names[k], justify="left" if words else "right", no_wrap=not words, overflow="fold",
            min_width={"strategy": 18, "": 10}.get(names[k]),
        )  # fmt: skip
    for k, (row, line) in enumerate(zip(plan.rows, lines, strict=True)):
        style = "green" if k == 0 and row.fits else None if row.fits else "dim"
        out.add_row(*[line[column] for column in shown], style=style)
    return out


def common_keys(strategies: Sequence[Strategy]) -> list[str]:
    """Keys that all of several strategies have, with their values, as they are written."""
    parts = [str(strategy).split(",")[1:] for strategy in strategies]
    return [part for part in parts[0] if all(part in other for other in parts)] if len(parts) > 1 else []


def cells(row: Row, common: Sequence[str] = ()) -> list[str]:
    """One strategy's figures.

    Args:
        common: keys that are left out of its name.
    """
    found = row.found
    name = ", ".join(part for part in str(row.strategy).split(",") if part not in common)
    if found is None:
        states = format_bytes(row.states) if row.states else ""
        return [name, "", states, *[""] * 6, row.why.partition(";")[0]]
    timing = found.timing
    rows = str(found.rows) if found.accumulation == 1 else f"{found.rows} x {found.accumulation}"
    verdict = "fits" if found.fits else f"{format_bytes(over(found))} too much for the {found.lacks}"
    return [
        name,
        rows,
        format_bytes(found.needs[1]),
        format_bytes(found.host.nbytes) if found.host.nbytes > 1e6 else "",
        format_bytes(found.disk) if found.disk else "",
        seconds(timing.seconds) if timing else "",
        f"{timing.tokens_per_s:,.0f}" if timing and timing.tokens_per_s else "",
        f"{timing.mfu:.0%}" if timing and timing.mfu is not None else "",
        timing.bound if timing else "",
        verdict,
    ]


def over(found: Prediction) -> int:
    """Bytes that there are too few."""
    if found.lacks == "host":
        return found.host.nbytes - (found.host_capacity or 0)
    if found.lacks == "disk":
        return found.disk - (found.disk_capacity or 0)
    return max(0, found.needs[1] - found.capacity)


def verdict(plan: Plan) -> str:
    """Which one, and why, in two sentences; or that nothing fits, and what comes nearest."""
    best = plan.best
    if best is None:
        nearest = min((r.found for r in plan.rows if r.found is not None), key=over, default=None)
        if nearest is None:
            return "Nothing fits: the model states alone are too large for this machine."
        more = format_bytes(over(nearest))
        return f"Nothing fits. Nearest is {nearest.strategy}, which needs {more} more of the {nearest.lacks}."
    timing = best.timing
    share = best.needs[1] / best.capacity
    first = f"Use {best.strategy} with micro-batches of {best.rows}"
    if timing is None:
        return f"{first}. It needs {format_bytes(best.needs[1])}, {share:.0%} of a device."
    first += f": of those that fit it is the fastest, {seconds(timing.seconds)} a step, bound by {timing.bound}."
    waits = {name: value for name, value in timing.waits.items() if value > 0.02 * timing.seconds}
    stands = ", ".join(f"{value / timing.seconds:.0%} for the {name}" for name, value in waits.items())
    second = f"It needs {format_bytes(best.needs[1])}, {share:.0%} of a device, at its peak in the {best.device}"
    return f"{first} {second}; it stands still {stands}." if stands else f"{first} {second}, and it hardly ever waits."


def next_better(plan: Plan) -> str:
    """What would have to change for a faster one to fit."""
    best = plan.best
    rows = [r for r in plan.rows if r.found is not None and not r.fits and r.found.timing is not None]
    faster = [r for r in rows if best is None or (best.timing is not None and r.speed > 1.01 * plan.rows[0].speed)]
    if not faster:
        return ""
    near = min(faster, key=lambda r: over(r.found) if r.found is not None else 0)
    found = near.found
    assert found is not None
    gain = "" if best is None else f" would be {near.speed / plan.rows[0].speed - 1:.0%} faster, and"
    lacks = f"needs {format_bytes(over(found))} more of the {found.lacks}"
    sizes = f"{format_bytes(found.needs[1])} of {format_bytes(found.capacity)}"
    return f"{near.strategy} with micro-batches of {found.rows}{gain} {lacks} ({sizes})."


def breakdown(found: Prediction) -> Table:
    """Where a strategy's bytes and seconds go."""
    from rich.table import Table

    out = Table(box=None, pad_edge=False, show_header=False)
    out.add_column(overflow="fold")
    out.add_column(justify="right")
    out.add_column(style="dim", overflow="fold")
    peak = found.device
    out.add_row("[bold]peak of the device[/bold]", format_bytes(peak.nbytes), f"counted; at the {peak}")
    for state, nbytes in sorted(peak.states.items(), key=lambda item: -item[1]):
        out.add_row(f"  {state.replace('_', ' ')}", format_bytes(nbytes), "")
    low, high, source = found.outside
    out.add_row("  outside of torch", _band(low, high), source)
    low, high, source = found.reserved
    out.add_row("  reserved, unused", _band(low, high), source)
    low, high = found.needs
    verdict = "fits" if found.fits else f"does not fit: {found.lacks}"
    out.add_row(
        "[bold]needs[/bold]", _band(low, high), f"of {format_bytes(found.capacity)}: {verdict}, by the upper end"
    )
    _host(out, found)
    timing = found.timing
    if timing is not None:
        out.add_row("[bold]a step[/bold]", seconds(timing.seconds), f"bound by {timing.bound}")
        out.add_row("  computes", seconds(timing.compute), _source(timing.sources, "compute"))
        if timing.launch:
            out.add_row("  the host calls", seconds(timing.launch), _source(timing.sources, "call"))
        for name, value in timing.waits.items():
            busy = timing.busy.get(name, 0.0)
            if value or busy:
                hidden = f"; under way {seconds(busy)}, {max(0.0, 1 - value / busy):.0%} hidden" if busy else ""
                out.add_row(f"  waits for the {name}", seconds(value), _source(timing.sources, name) + hidden)
        if timing.tokens_per_s:
            out.add_row("[bold]tokens/s[/bold]", f"{timing.tokens_per_s:,.0f}", f"of {found.world} ranks")
        if timing.mfu is not None:
            out.add_row("[bold]MFU[/bold]", f"{timing.mfu:.1%}", "without what is computed again")
    return out


def _host(out: Table, found: Prediction) -> None:
    if found.host_capacity is not None or found.host.nbytes > 1e6:
        of = f"of {format_bytes(found.host_capacity)} per rank; " if found.host_capacity is not None else ""
        out.add_row(
            "[bold]peak of the host[/bold]", format_bytes(found.host.nbytes), f"{of}counted; at the {found.host}"
        )
        for state, nbytes in sorted(found.host.states.items(), key=lambda item: -item[1]):
            if nbytes > 1e6:
                out.add_row(f"  {state.replace('_', ' ')}", format_bytes(nbytes), "")
    if found.disk:
        of = f"of {format_bytes(found.disk_capacity)} per rank; " if found.disk_capacity is not None else ""
        out.add_row("[bold]disk[/bold]", format_bytes(found.disk), f"{of}counted")
    if found.evaluation is not None:
        at = f"of the device, counted; at the {found.evaluation}; as many rows as a micro-batch"
        out.add_row("[bold]evaluation[/bold]", format_bytes(found.evaluation.nbytes), at)
    out.add_row("an asynchronous save", format_bytes(found.save), "more on the host while it writes; counted")


def _band(low: int, high: int) -> str:
    return format_bytes(low) if low == high else f"{format_bytes(low)} to {format_bytes(high)}"


def _source(sources: dict[str, str], name: str) -> str:
    return sources.get(name, sources.get(name.replace(" ", "_"), ""))


def as_dict(found: Prediction) -> dict[str, Any]:
    """A prediction for a file."""
    timing = found.timing
    return {
        "strategy": str(found.strategy),
        "rows": found.rows,
        "accumulation": found.accumulation,
        "world": found.world,
        "fits": found.fits,
        "lacks": found.lacks or None,
        "device": _peak(found.device),
        "evaluation": None if found.evaluation is None else _peak(found.evaluation),
        "host": _peak(found.host),
        "disk": found.disk,
        "save": found.save,
        "between": dict(found.between),
        "needs": list(found.needs),
        "outside": list(found.outside),
        "reserved": list(found.reserved),
        "capacity": found.capacity,
        "host_capacity": found.host_capacity,
        "disk_capacity": found.disk_capacity,
        "timing": None
        if timing is None
        else {
            "seconds": timing.seconds,
            "compute": timing.compute,
            "launch": timing.launch,
            "waits": timing.waits,
            "busy": timing.busy,
            "bound": timing.bound,
            "tokens_per_s": timing.tokens_per_s,
            "mfu": timing.mfu,
            "sources": timing.sources,
        },
    }


def _peak(peak: Peak) -> dict[str, Any]:
    return {"bytes": peak.nbytes, "states": dict(peak.states), "phase": peak.phase, "unit": peak.place}
