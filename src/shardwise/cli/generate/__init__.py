"""``shardwise generate``: continue texts with a model that may be larger than any memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from shardwise.cli.console import say
from shardwise.errors import ConfigError, ShardwiseError


def generate(
    folder: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="What save_pretrained wrote.")],
    prompt: Annotated[str | None, typer.Argument(help="The text to continue.")] = None,
    ids: Annotated[str | None, typer.Option(metavar='"1 2 3"', help="Tokens instead of a text; prints tokens.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help='One {"id": ..., "prompt": ...} or {"id": ..., "ids": ...} a line.'),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Answers to --prompts. Started again, a run goes on.")
    ] = None,
    device_map: Annotated[
        str, typer.Option(metavar="auto|split|disk|cpu|JSON", help="Where weights are; split: over all ranks.")
    ] = "auto",
    max_memory: Annotated[
        str | None, typer.Option(metavar="cpu=8GiB,0=20GiB", help="What each rank may use. Default: what is free.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="To run in: bf16, fp16, fp32, ... Default: the model's.")] = None,
    quantization: Annotated[
        str | None, typer.Option(metavar="int8", help="Hold weights in int8, unless they are read from the disk.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many for each prompt.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="Draw tokens, the wilder the higher.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest with this probability in all.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest. Default: as the model says.")] = False,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    nproc: Annotated[
        int | None,
        typer.Option("--nproc", "-n", help="Ranks. Default: one per accelerator with --prompts or split, else 1."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Prompts at a time on each rank.")] = 1,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a text that room is left for. Default: the longest, continued.")
    ] = None,
) -> None:
    """Continue a text, or a file of them, with a model of transformers, however large it is.

    What does not fit into memory is read from its files each time it is used. The text goes to stdout as it comes; what
    it took, to stderr. With --prompts, ranks share the lines out; a run that was killed goes on where it was.

    The exit code is 0 if all is done, 1 if it failed on the way, 2 for a wrong request and 130 after Ctrl-C.
    """
    # What is imported here is not needed for 'shardwise --help'.
    from shardwise.cli.generate import request
    from shardwise.cli.generate.job import Job
    from shardwise.cli.generate.prompts import Prompt, parse_ids, read_prompts
    from shardwise.cli.generate.run import Run

    try:
        if sum(given is not None for given in (prompt, ids, prompts)) != 1:
            raise ConfigError("give one of PROMPT, --ids and --prompts", fix='shardwise generate MODEL_DIR "Once upon"')
        if (prompts is None) != (out is None):
            raise ConfigError("--prompts and --out go together", fix="--prompts FILE.jsonl --out OTHER.jsonl")
        if prompts is None and batch != 1:
            raise ConfigError(f"--batch {batch}, but there is one prompt", fix="--batch is for --prompts")
        request.check_counts(max_new_tokens=max_new_tokens, batch=batch, length=length, nproc=nproc)
        sampling = request.sampling_of(temperature, top_p, greedy)
        places = request.parse_map(device_map)
        memory = request.parse_memory(max_memory, places)
        kind = request.parse_dtype(dtype)
        request.check_quantization(quantization)
        request.check_folder(folder)
        if prompts is not None:
            wanted = read_prompts(prompts)
        elif ids is not None:
            wanted = [Prompt("", None, parse_ids(ids), "--ids", 0)]
        else:
            wanted = [Prompt("", prompt, None, "PROMPT", 0)]
        if any(p.ids is None for p in wanted):
            request.check_tokenizer(folder)
        with tempfile.TemporaryDirectory(prefix="shardwise-generate-") as scratch:
            job = Job(
                str(folder), places, memory, kind, sampling, max_new_tokens, seed, batch, length, wanted, None, scratch,
                quantization,
            )  # fmt: skip
            run = Run(job, nproc, cpu=device_map == "cpu")
            code = run.shown() if out is None else run.written(out)
    except ShardwiseError as error:
        say("error: " + "; ".join(line.strip() for line in str(error).splitlines()))
        raise typer.Exit(2) from error
    raise typer.Exit(code)
