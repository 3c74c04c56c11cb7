"""``shardwise plan``: which strategy should I use?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardwise.cli.console import say
from shardwise.errors import PlanError, ShardwiseError

if TYPE_CHECKING:
    from shardwise.plan.asked import Asked

HOW_FAR = ("batch", "seq", "layers")


def plan(
    model: Annotated[
        str | None,
        typer.Argument(help="A folder with a config.json, module:function, or a name: llama-8b, gpt2, vit-l, ..."),
    ] = None,
    devices: Annotated[
        str | None, typer.Option(metavar="8xH100-80GB", help="Devices of a node. Default: this machine's.")
    ] = None,
    nodes: Annotated[int, typer.Option(help="How many of them.")] = 1,
    network: Annotated[str | None, typer.Option(metavar="50GB/s", help="Of a node to the others.")] = None,
    host_memory: Annotated[str | None, typer.Option(metavar="1TB", help="Of a node.")] = None,
    nvme: Annotated[str | None, typer.Option(metavar="3.5GB/s,4TB", help="Of a node's disks.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Rows of a micro-batch on one device. Default: as many as fit.")
    ] = None,
    global_batch: Annotated[
        int | None, typer.Option(help="Rows of a step of all devices; accumulation follows from it.")
    ] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens of a row. Default: what the model reads, up to 2048.")] = None,
    optimizer: Annotated[str, typer.Option(metavar="adamw|sgd|muon|...", help="What updates the parameters.")] = (
        "adamw"
    ),
    precision: Annotated[str, typer.Option(metavar="bf16|fp16|no", help="To compute in; masters stay fp32.")] = "bf16",
    clip: Annotated[float | None, typer.Option(help="The norm that gradients are clipped to; 0: they are not.")] = 1.0,
    lora: Annotated[str | None, typer.Option(metavar="r=16", help="Train adapters only.")] = None,
    strategy: Annotated[str | None, typer.Option(metavar="zero2,...", help="This one only, in detail.")] = None,
    why: Annotated[str | None, typer.Option(metavar="zero2,...", help="Why not this one?")] = None,
    most: Annotated[str | None, typer.Option("--max", metavar="batch|seq|layers", help="How far can I go?")] = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="The same with another option (nodes=4) or key (reduce_dtype=bf16)."),
    ] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure this machine first, and keep it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="To stdout, for other programs.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="The answer as a page.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Also what is slower than something that fits without.")] = False,
) -> None:
    """Which strategy should I use? Answered before the first hour on a GPU.

    The real engine runs a step of the model without values: bytes and operations are counted, times follow from data
    sheets or from what was measured here. Exit codes: 0 answered, 1 nothing fits, 2 a wrong request.
    """
    from shardwise.plan.asked import Asked

    try:
        if calibrate:
            from shardwise.plan.calibrate import calibrate as measure

            measure(told=say)
            if model is None:
                return
        if model is None:
            raise PlanError("no model was named", fix="shardwise plan llama-8b --devices 8xH100-80GB")
        if most is not None and most not in HOW_FAR:
            raise PlanError(f"--max {most} is not known", fix=f"one of {', '.join(HOW_FAR)}")
        if sum(given is not None for given in (strategy if most is None else None, why)) > 1:
            raise PlanError("--strategy and --why are two questions", fix="ask one")
        asked = Asked(
            model, devices, nodes, network, host_memory, nvme, batch, global_batch, seq, optimizer, precision,
            clip or None, lora,
        )  # fmt: skip
        code = _answer(asked, strategy, why, most, what_if or [], as_json, html, every)
    except ShardwiseError as error:
        say("error: " + "; ".join(line.strip() for line in str(error).splitlines()))
        raise typer.Exit(2) from error
    raise typer.Exit(code)


def _answer(
    asked: Asked, strategy: str | None, why: str | None, most: str | None, what_if: list[str], as_json: bool,
    html: Path | None, every: bool,
) -> int:  # fmt: skip
    from rich.console import Console

    from shardwise.plan import answers

    out = Console(record=html is not None, file=sys.stderr if as_json else sys.stdout, width=None, soft_wrap=False)
    facts: dict[str, Any]
    if most is not None:
        facts = answers.how_far(asked, most, strategy, out)
    elif what_if:
        facts = answers.what_if(asked, strategy, what_if, out)
    elif why is not None:
        facts = answers.why(asked, why, out, _progress())
    elif strategy is not None:
        facts = answers.detail(asked, strategy, out)
    else:
        facts = answers.which(asked, out, _progress(), every=every)
    if as_json:
        print(json.dumps(facts, indent=2))
    if html is not None:
        html.write_text(out.export_html(inline_styles=True))
    return 0 if facts.get("fits", True) else 1


def _progress() -> Any:
    """Tells how many strategies are done, on a terminal."""

    def told(done: int, of: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == of else ""
            print(f"\r{done} of {of} strategies", end=end, file=sys.stderr, flush=True)

    return told
