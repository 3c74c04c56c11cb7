"""What the demo found, as tables for people. ``--json`` prints the same facts for programs."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

STATES = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "gather_buffers": "gather buffers",
    "offload_buffers": "offload buffers",
    "activations": "activations",
    "total": "everything",
}
MODEL_STATES = ("parameters", "gradients", "optimizer")
_MOST_COLUMNS = 4


def show(facts: dict[str, Any]) -> None:
    """Print the report on stdout."""
    console = Console(highlight=False)
    say = console.print
    say()
    say(
        f"Trained on {facts['trained_bytes']:,} bytes in {facts['steps']:,} steps and {facts['train_seconds']:.0f} s "
        f"({facts['bytes_per_second']:,.0f} bytes/s on {facts['ranks']} rank{'s' * (facts['ranks'] > 1)}, "
        f"{escape(facts['strategy'])})."
    )
    for part in (_quality(facts), _memory(facts)):
        say()
        say(part)
    say()
    _sent(facts, say)
    if facts["disk"] is not None:
        say()
        _disk(facts["disk"], say)
    say()
    say("What it writes after [bold]def [/bold]:")
    for line in _printable(facts["sample"]).splitlines():
        say(f"    {escape(line)}", soft_wrap=True)
    say()
    say(f"Saved {escape(facts['model_file'])} (whole weights, plain names; load with safetensors)", soft_wrap=True)
    say(f"All of it took {facts['seconds']:.0f} s.")


def _quality(facts: dict[str, Any]) -> Table:
    bits = facts["bits_per_byte"]
    table = Table(title="Bits per byte on held-out files (less is better)", title_justify="left", title_style="bold")
    table.add_column("model")
    table.add_column("bits per byte", justify="right")
    table.add_row("uniform: every byte equally likely", f"{bits['uniform']:.3f}")
    table.add_row("bigram: counts of byte pairs, same training files", f"{bits['bigram']:.3f}")
    style = "bold green" if bits["model"] < bits["bigram"] else "bold"
    table.add_row(f"this GPT, {_count(facts['parameters'])} parameters", f"{bits['model']:.3f}", style=style)
    return table


def _memory(facts: dict[str, Any]) -> Table:
    ranks, ddp = facts["memory"]["ranks"], facts["memory"]["ddp"]
    table = Table(title="Memory per rank when a step needs most, MB", title_justify="left", title_style="bold")
    table.add_column("state")
    if len(ranks) <= _MOST_COLUMNS:
        columns = [(f"rank {i}", rank) for i, rank in enumerate(ranks)]
    else:
        columns = [
            ("least of ranks", min(ranks, key=lambda r: r["total"])),
            ("most of ranks", max(ranks, key=lambda r: r["total"])),
        ]
    for name, _ in columns:
        table.add_column(name, justify="right")
    table.add_column("ddp needs", justify="right", style="dim")
    for state, label in STATES.items():
        if state == "offload_buffers" and not any(rank[state] for _, rank in columns):
            continue
        if state == "gather_buffers":
            whole = [sum(rank[s] for s in MODEL_STATES) for rank in (*(r for _, r in columns), ddp)]
            table.add_row("model states", *(_mega(n) for n in whole), style="bold", end_section=True)
        table.add_row(
            label,
            *(_mega(rank[state]) for _, rank in columns),
            _mega(ddp[state]),
            style="bold" if state == "total" else None,
            end_section=state in ("optimizer", "activations"),
        )
    return table


def _sent(facts: dict[str, Any], say: Any) -> None:
    sent = facts["sent_per_step"]
    measured, expected = sent["measured"], sent["expected"]
    verdict = "exactly" if measured == expected else "instead of"
    say("[bold]Bytes sent by rank 0 per step[/bold]")
    say(f"  {measured:,.0f} for parameters and gradients, {verdict} the formula's {expected:,}")
    other = ", ".join(f"{n:,.0f} {kind}" for kind, n in sorted(sent["other"].items()))
    if other:
        say(f"  and apart from it: {other}")


def _disk(disk: dict[str, float], say: Any) -> None:
    say("[bold]Optimizer state on the disk, all ranks together[/bold]")
    say(f"  {disk['read_per_step'] / 1e6:,.1f} MB read and {disk['written_per_step'] / 1e6:,.1f} MB written per step")
    own, raw = disk["bytes_per_second"], disk["probe_bytes_per_second"]
    say(f"  {own / 1e9:.2f} GB/s while it was busy; a probe of the same disk now gets {raw / 1e9:.2f} GB/s")
    say(
        f"  busy for {disk['busy_seconds']:.2f} s; training waited for it for {disk['waited_seconds']:.2f} s, "
        f"{disk['hidden']:.0%} was hidden"
    )


def _mega(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f}"


def _count(n: int) -> str:
    return f"{n / 1e6:.1f} M" if n >= 1_000_000 else f"{n / 1e3:.0f} k"


def _printable(text: str) -> str:
    """Control characters of a sample must not reach the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text).expandtabs(4)
