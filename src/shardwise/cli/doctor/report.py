"""The doctor's findings for people. ``--json`` prints the same for programs."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_MOST_LINKS = 8


def machine(facts: dict[str, Any]) -> None:
    """Versions, devices, backends and surroundings, before the test begins."""
    console = Console(highlight=False)
    found = facts["devices"]
    rows: list[tuple[str, str]] = [
        ("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())),
        ("CPU", f"{found['cores']} cores" + _memory(found)),
    ]
    for index, device in enumerate(found["accelerators"]):
        peers = f", reaches {', '.join(map(str, device['peers']))} directly" if device["peers"] else ""
        bf16 = "" if device["bf16"] else ", no bf16"
        capability = f", capability {device['capability']}" if device["capability"] else ""
        rows.append((f"{found['accelerator']}:{index}", f"{device['name']}{capability}{_memory(device)}{bf16}{peers}"))
    if not found["accelerators"]:
        hint = (
            f": the driver shows {found['driver_devices']}, but this torch cannot use them"
            if found["driver_devices"]
            else ""
        )
        rows.append(("accelerator", f"none{hint}"))
    rows.append(("backends", ", ".join(f"{name} {'yes' if has else 'no'}" for name, has in facts["backends"].items())))
    config = facts["surroundings"]["config"]
    rows.append(("settings", f"{config['path']}: {config['state']}"))
    if facts["surroundings"]["environment"]:
        rows.append(("variables", " ".join(f"{k}={v}" for k, v in facts["surroundings"]["environment"].items())))
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")  # a path that is cut is of no use
    for name, text in rows:
        table.add_row(f"[bold]{name}[/bold]", escape(text))
    console.print(table)


def test(result: dict[str, Any]) -> None:
    """One run of the self test: links, then a row per strategy."""
    console = Console(highlight=False)
    on = "the CPU" if result["device"] == "cpu" else result["device"]
    where = f"{result['ranks']} rank{'s' * (result['ranks'] > 1)} on {on}"
    if result["links"]:
        table = _table(f"Links between {where}", "ranks", ">latency, µs", ">bandwidth, GB/s")
        slowest = sorted(result["links"], key=lambda link: link["bytes_per_s"])
        for link in result["links"] if len(slowest) <= _MOST_LINKS else slowest[:_MOST_LINKS]:
            pair = f"{link['ranks'][0]} and {link['ranks'][1]}"
            table.add_row(pair, f"{link['latency_us']:,.0f}", f"{link['bytes_per_s'] / 1e9:.2f}")
        if len(slowest) > _MOST_LINKS:
            table.caption = f"the slowest of {len(slowest)} pairs"
        console.print()
        console.print(table)
    table = _table(f"Every strategy, {where}", "strategy", "precision", ">bytes sent per step", ">seconds", "result")
    for check in result["checks"]:
        verdict = "[green]as promised[/green]" if check["ok"] else f"[bold red]{escape(check['what'])}[/bold red]"
        sent, seconds = check.get("sent"), check.get("seconds")
        table.add_row(
            escape(check["strategy"]),
            check["precision"],
            "" if sent is None else f"{sent:,}",
            "" if seconds is None else f"{seconds:.1f}",
            verdict,
        )
    console.print()
    console.print(table)


def verdict(facts: dict[str, Any]) -> None:
    """The last lines: does it work here, and if not, what to do."""
    console = Console(highlight=False)
    console.print()
    for problem in facts["problems"]:
        console.print(f"[bold red]problem:[/bold red] {escape(problem['what'])}", soft_wrap=True)
        console.print(f"  do: {escape(problem['fix'])}", soft_wrap=True)
    style = "bold green" if facts["ok"] else "bold red"
    console.print(f"[{style}]{escape(facts['verdict'])}[/{style}] ({facts['seconds']:.0f} s)", soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


def _memory(found: dict[str, Any]) -> str:
    if not found.get("bytes"):
        return ""
    return f", {found['bytes'] / 1e9:,.1f} GB of memory, {found['free_bytes'] / 1e9:,.1f} GB of it free"
