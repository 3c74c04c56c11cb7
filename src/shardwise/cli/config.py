"""``shardwise config``: a short dialogue that writes the settings file of ``shardwise launch``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from shardwise.cli import settings_file as files
from shardwise.cli.console import say
from shardwise.cli.host import cuda_devices
from shardwise.cli.settings import Settings
from shardwise.errors import LaunchError, ShardwiseError
from shardwise.strategy import PRESETS, Strategy

_COSTS = {
    "ddp": "every rank keeps everything; sends least",
    "zero1": "splits the optimizer state; sends as much as ddp",
    "zero2": "splits gradients too; sends as much as ddp",
    "zero3": "splits parameters too; for models too large for one device",
    "hsdp": "zero3 within each host, copies across hosts",
}

_SCRIPT = "script"  # the answer that leaves a value to the script


def config(
    nproc: Annotated[int | None, typer.Option("--nproc", "-n", help="Ranks on each host.")] = None,
    devices: Annotated[str | None, typer.Option(metavar="0,1,...", help="The devices to use.")] = None,
    nnodes: Annotated[int | None, typer.Option(help="Hosts.")] = None,
    node_rank: Annotated[int | None, typer.Option(help="This host's number. Default: agreed upon.")] = None,
    rdzv_endpoint: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where the hosts meet.")] = None,
    rdzv_id: Annotated[str | None, typer.Option(help="Tells runs that meet at one endpoint apart.")] = None,
    max_restarts: Annotated[int | None, typer.Option(help="How often to start all ranks anew after a failure.")] = None,
    min_nproc: Annotated[int | None, typer.Option(help="After losing a rank, at least this many go on.")] = None,
    strategy: Annotated[str | None, typer.Option(help="ddp, zero1, zero2, zero3, hsdp, or with keys.")] = None,
    mixed_precision: Annotated[str | None, typer.Option(metavar="no|fp16|bf16", help="To compute in.")] = None,
    gradient_accumulation_steps: Annotated[int | None, typer.Option(help="Micro-batches per step.")] = None,
    cpu: Annotated[bool | None, typer.Option("--cpu/--no-cpu", help="Run on the CPU.", show_default=False)] = None,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Convert this file: Accelerate's, or one of ours.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--config-file", "-o", metavar="FILE", help="Where to write. Default: your own file.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: flags, and defaults for the rest.")] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace a file that exists.")] = False,
) -> None:
    """Write the settings file that 'shardwise launch' reads.

    Asks a few questions, fewer with flags: what a flag says is not asked. The default file is
    ~/.config/shardwise/config.yaml, which launch uses by itself; launch --config FILE uses any other.
    """
    flags = Settings(
        nproc, devices, nnodes, node_rank, rdzv_endpoint, rdzv_id, max_restarts, min_nproc,
        strategy, mixed_precision, gradient_accumulation_steps, cpu,
    )  # fmt: skip
    path = out if out is not None else files.default_path()
    terminal = sys.stdin.isatty() and sys.stderr.isatty()
    if source is not None:
        wanted = _converted(source, flags)
    elif yes:
        wanted = flags.over(_defaults(flags))
    elif terminal:
        wanted = _ask(flags)
    else:
        wanted = _without_terminal(flags)
    wanted.check()
    if path.exists() and not force:
        if not terminal or yes:
            raise LaunchError(f"{path} exists already", fix="--force replaces it, --config-file writes another")
        if not typer.confirm(f"{path} exists already. Replace it?", default=False, err=True):
            say("shardwise: nothing was written")
            raise typer.Exit(1)
    files.write(wanted, path)
    say(f"\nshardwise: wrote {path}")
    print(files.dump(wanted), end="", flush=True)
    named = "" if out is None else f"--config {path} "
    say(f"\nnext: shardwise launch {named}your_script.py")
    if (wanted.nnodes or 1) > 1:
        say("      on every host, with this file")


def _converted(source: Path, flags: Settings) -> Settings:
    found = files.read(source)
    if found.kind == "accelerate":
        say(f"shardwise: {source} is in Accelerate's format")
    for note in found.notes:
        say(f"shardwise: note: {note}")
    for key, why in found.dropped.items():
        say(f"shardwise: left out {key}: {why}")
    return flags.over(found.settings)


# --- without questions ------------------------------------------------------------------------
def _defaults(flags: Settings) -> Settings:
    """What pressing return at every question gives."""
    cpu = flags.cpu if flags.cpu is not None else not (flags.device_list() or cuda_devices())
    nproc = flags.nproc or _default_nproc(flags, cpu)
    return Settings(
        nproc=nproc,
        strategy=_default_strategy(nproc * (flags.nnodes or 1)),
        mixed_precision=_default_precision(cpu),
        cpu=cpu,
    )


def _default_nproc(flags: Settings, cpu: bool) -> int:
    return len(flags.device_list()) or (1 if cpu else max(1, cuda_devices()))


def _default_strategy(ranks: int) -> str:
    return "ddp" if ranks == 1 else "zero2"


def _default_precision(cpu: bool) -> str:
    return "no" if cpu else "bf16"  # on a CPU fp32 is the faster one as a rule


def _without_terminal(flags: Settings) -> Settings:
    missing = [
        f"--{name.replace('_', '-')}"
        for name in ("nproc", "strategy", "mixed_precision")
        if getattr(flags, name) is None
    ]
    if missing:
        raise LaunchError(
            f"there is no terminal to ask on, and nothing says {', '.join(missing)}",
            fix="give them, or --yes for the defaults",
        )
    return flags.over(Settings(cpu=_defaults(flags).cpu))


# --- the dialogue -----------------------------------------------------------------------------
def _ask(flags: Settings) -> Settings:
    """The questions that the flags and the answers so far leave open."""
    wanted = flags
    found = cuda_devices()
    if wanted.cpu is None:
        # Without devices there is nothing to choose.
        named = bool(wanted.device_list())
        cpu = not named and (
            found == 0 or _choose("Where to run?", {"cuda": f"{found} devices", "cpu": ""}, "cuda") == "cpu"
        )
        wanted = replace(wanted, cpu=cpu)
    if wanted.nnodes is None:
        wanted = replace(wanted, nnodes=_number("How many hosts?", 1, lambda n: Settings(nnodes=n)))
    if (wanted.nnodes or 1) > 1 and not wanted.rdzv_endpoint:
        question = "Where do they meet? host:port of one of them"
        endpoint = _text(question, None, lambda text: Settings(rdzv_endpoint=text).check(complete=False))
        wanted = replace(wanted, rdzv_endpoint=endpoint)
    if wanted.nproc is None:
        each = " on each host" if (wanted.nnodes or 1) > 1 else ""
        default = _default_nproc(wanted, bool(wanted.cpu))
        what = "ranks (processes)" if wanted.cpu else "ranks, one per device,"
        wanted = replace(wanted, nproc=_number(f"How many {what}{each}?", default, lambda n: Settings(nproc=n)))
    ranks = (wanted.nproc or 1) * (wanted.nnodes or 1)
    if wanted.strategy is None:
        wanted = replace(wanted, strategy=_strategy(ranks, wanted.nnodes or 1))
    if wanted.mixed_precision is None:
        notes = {
            "no": "each parameter's own dtype",
            "bf16": "",
            "fp16": "with loss scaling",
            _SCRIPT: "as the script says",
        }
        answer = _choose("Mixed precision?", notes, _default_precision(bool(wanted.cpu)))
        wanted = replace(wanted, mixed_precision=None if answer == _SCRIPT else answer)
    if wanted.nnodes == 1:
        wanted = replace(wanted, nnodes=flags.nnodes)
    return wanted


def _strategy(ranks: int, hosts: int) -> str | None:
    offered = {name: _COSTS[name] for name in PRESETS if name != "hsdp" or hosts > 1}

    def check(text: str) -> None:
        if text == _SCRIPT:
            return
        chosen = Strategy.parse(text)
        if chosen.shard_size is not None and ranks % chosen.shard_size:
            raise LaunchError(f"shard_size={chosen.shard_size} does not divide {ranks} ranks", fix="choose a divisor")

    say("Which strategy?")
    for name, cost in offered.items():
        say(f"  {name:<6} {cost}")
    say(f"  {_SCRIPT:<6} as the script says")
    answer = _text("  strategy", _default_strategy(ranks), check)
    return None if answer == _SCRIPT else answer


def _choose(question: str, options: dict[str, str], default: str) -> str:
    say(question)
    for name, note in options.items():
        say(f"  {name:<6} {note}".rstrip())

    def check(text: str) -> None:
        if text not in options:
            raise LaunchError(f"'{text}' is none of them", fix=f"one of {', '.join(options)}")

    return _text("  answer", default, check)


def _number(question: str, default: int, settings: Callable[[int], Settings]) -> int:
    def check(text: str) -> None:
        if not text.lstrip("-").isdigit():
            raise LaunchError(f"'{text}' is not a number", fix="give a whole number")
        settings(int(text)).check(complete=False)

    return int(_text(question, str(default), check))


def _text(question: str, default: str | None, check: Callable[[str], Any]) -> str:
    """Ask until the answer passes."""
    while True:
        answer = str(typer.prompt(question, default=default, err=True)).strip()
        try:
            check(answer)
        except ShardwiseError as error:
            say(f"  {error}")
        else:
            return answer
