"""``shardwise plan``: which strategy should I use?"""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stdout
from html import escape
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

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notes are for those who train
    try:
        _one_question(strategy, why, most, what_if, batch, seq, calibrate and devices is not None)
        if html is not None and (html.is_dir() or not html.absolute().parent.is_dir()):
            raise PlanError(f"--html {html} cannot be written", fix="name a file in a folder that is there")
        if calibrate:
            from shardwise.plan.calibrate import calibrate as measure

            measure(told=say)
            if model is None:
                return
        if not model:
            raise PlanError("no model was named", fix="shardwise plan llama-8b --devices 8xH100-80GB")
        asked = Asked(
            model, devices, nodes, network, host_memory, nvme, batch, global_batch, seq, optimizer, precision,
            clip or None, lora,
        )  # fmt: skip
        code = _answer(asked, strategy, why, most, what_if or [], as_json, html, every)
    except ShardwiseError as error:
        say("error: " + "; ".join(line.strip() for line in str(error).splitlines() if line.strip()))
        raise typer.Exit(2) from error
    except OSError as error:
        say(f"error: {error}")
        raise typer.Exit(2) from error
    raise typer.Exit(code)


def _one_question(
    strategy: str | None, why: str | None, most: str | None, what_if: list[str] | None, batch: int | None,
    seq: int | None, elsewhere: bool,
) -> None:  # fmt: skip
    """Refuse what contradicts itself."""
    if most is not None and most not in HOW_FAR:
        raise PlanError(f"--max {most} is not known", fix=f"one of {', '.join(HOW_FAR)}")
    asked = [name for name, given in (("--why", why is not None), ("--max", most is not None),
                                      ("--what-if", bool(what_if))) if given]  # fmt: skip
    if why is not None and strategy is not None:
        asked.insert(0, "--strategy")
    if len(asked) > 1:
        raise PlanError(f"{' and '.join(asked)} are two questions", fix="ask one")
    if (most == "batch" and batch is not None) or (most == "seq" and seq is not None):
        raise PlanError(f"--max {most} looks for what --{most} says", fix="leave one out")
    if elsewhere:
        raise PlanError("--calibrate measures this machine, and --devices names another", fix="leave one out")


def _answer(
    asked: Asked, strategy: str | None, why: str | None, most: str | None, what_if: list[str], as_json: bool,
    html: Path | None, every: bool,
) -> int:  # fmt: skip
    from rich.console import Console

    from shardwise.plan import answers

    real, text = Console(), io.StringIO()  # all of an answer is written, or none
    out = Console(
        record=html is not None, file=text, width=real.width, force_terminal=real.is_terminal,
        color_system="auto" if real.is_terminal else None, soft_wrap=False,
    )  # fmt: skip
    facts: dict[str, Any]
    with redirect_stdout(sys.stderr):  # what a model's own code prints is no part of the answer
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
    if html is not None:
        name = escape(asked.model).replace("{", "{{").replace("}", "}}")
        html.write_text(out.export_html(code_format=_PAGE.replace("NAME", name)), encoding="utf-8")
    print(json.dumps(facts, indent=2) if as_json else text.getvalue().rstrip("\n"))
    return 0 if facts.get("fits", True) else 1


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="UTF-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>shardwise plan NAME</title>
<style>{stylesheet}
:root {{ color-scheme: light dark }}
body {{ color: light-dark(#1a1a1a, #e8e8e8); background: light-dark(#fff, #16181c); margin: 1rem }}
pre {{ overflow-x: auto; font: 0.85rem/1.45 ui-monospace, Menlo, Consolas, monospace }}
pre span {{ color: inherit; background: none }}
</style></head>
<body><h1>shardwise plan NAME</h1><pre><code>{code}</code></pre></body></html>
"""


def _progress() -> Any:
    """Tells how many strategies are done, on a terminal."""

    def told(done: int, of: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == of else ""
            print(f"\r{done} of {of} strategies", end=end, file=sys.stderr, flush=True)

    return told
