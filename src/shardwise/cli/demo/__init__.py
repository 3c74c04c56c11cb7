"""``shardwise demo``: train a byte-level GPT on the standard library's source, sharded, and show what it took."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from shardwise.cli.console import say
from shardwise.cli.settings import Settings
from shardwise.errors import LaunchError
from shardwise.strategy import Strategy

_DEFAULT_SECONDS = 90.0
_HELDOUT_BYTES = 1 << 16


def demo(
    nproc: Annotated[int | None, typer.Option("--nproc", "-n", help="Ranks. Default: 2.")] = None,
    strategy: Annotated[str, typer.Option(help="ddp, zero1, zero2, zero3, hsdp, or with keys: zero3,...")] = "zero3",
    size: Annotated[str, typer.Option(help="Model: tiny, small, 10m, 25m, 100m, 300m or 1b.")] = "10m",
    steps: Annotated[int | None, typer.Option(help="Train this many steps.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Train for this long, if --steps does not end first. Default: 90 s.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the trained model.")] = Path("shardwise-demo"),
    seed: Annotated[int, typer.Option(help="Of initial values, text and sample.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use the CPU even where there are accelerators.")] = False,
) -> None:
    """Train a small GPT on this Python's own source, and show what sharding saved.

    Reads the standard library's files, keeps about a tenth of them apart, trains on the rest under the chosen
    strategy, and ends with quality, memory, bytes sent, a sample and a saved model. About two minutes.
    """
    begun = time.perf_counter()
    # Imported here, not above, so that 'shardwise --help' does not wait for them.
    from shardwise.cli.demo import corpus
    from shardwise.cli.demo.model import SIZES
    from shardwise.cli.launch import choose_nproc, ranks_environment, thread_environment

    chosen = Strategy.parse(strategy)
    if size not in SIZES:
        raise LaunchError(f"--size {size} is not known", fix=f"one of {', '.join(SIZES)}")
    if steps is not None and steps < 1:
        raise LaunchError(f"--steps {steps} is not a number of steps", fix="give 1 or more")
    if minutes is not None and not minutes > 0:
        raise LaunchError(f"--minutes {minutes} is not a time", fix="give more than 0")
    number = choose_nproc(nproc, cpu or None, default=2)
    chosen = _fit_device(chosen, cpu)
    _check_shards(chosen, number)
    _check_writable(out)
    seconds = minutes * 60 if minutes is not None else None if steps is not None else _DEFAULT_SECONDS

    shape = SIZES[size]
    text = corpus.load()
    rows = corpus.windows(text.heldout, shape.context, _HELDOUT_BYTES, multiple=number)
    baselines = {"bigram": corpus.bigram_bits(text.train, rows), "uniform": corpus.UNIFORM_BITS}
    budget = " or ".join(
        [*([f"{steps:,} steps"] if steps else []), *([f"about {seconds:.0f} s"] if seconds is not None else [])]
    )
    say(
        f"shardwise demo: a byte-level GPT of {shape.parameters / 1e6:.1f} M parameters learns the Python standard "
        f"library's source\n"
        f"  text      {len(text.train) / 1e6:.1f} MB in {text.train_files} files; "
        f"{len(text.heldout) / 1e6:.1f} MB in {text.heldout_files} other files are held out\n"
        f"  ranks     {number}, strategy {chosen}\n"
        f"  training  {budget}; Ctrl-C stops it"
    )
    with tempfile.TemporaryDirectory(prefix="shardwise-demo-") as scratch:
        facts_file = Path(scratch) / "facts.json"
        job_file = _prepare(Path(scratch), facts_file, text, rows, size, chosen, steps, seconds, seed, out)
        from shardwise.cli.ranks import Ranks, run_ranks

        command = ["-m", "shardwise.cli.demo.worker", str(job_file)]
        settings = {**ranks_environment(Settings(strategy=str(chosen), cpu=cpu)), **thread_environment(number)}
        code = run_ranks(Ranks(command, number, environment=settings))
        if code:
            raise typer.Exit(code)
        measured = json.loads(facts_file.read_text())
    facts: dict[str, Any] = {
        **measured,
        "size": size,
        "ranks": number,
        "data": {
            "train_bytes": len(text.train),
            "train_files": text.train_files,
            "heldout_bytes": len(text.heldout),
            "heldout_files": text.heldout_files,
            "measured_bytes": int(rows[:, 1:].size),
        },
        "bits_per_byte": {"model": measured["bits_per_byte"], **baselines},
        "seconds": time.perf_counter() - begun,
    }
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        from shardwise.cli.demo.report import show

        show(facts)


def _prepare(
    scratch: Path,
    facts: Path,
    text: Any,
    rows: Any,
    size: str,
    strategy: Strategy,
    steps: int | None,
    seconds: float | None,
    seed: int,
    out: Path,
) -> Path:
    """Write what the ranks read."""
    import numpy as np

    from shardwise.cli.demo.job import Job

    np.save(scratch / "train.npy", text.train)
    np.save(scratch / "heldout.npy", rows)
    job = Job(size, str(strategy), steps, seconds, seed, data=str(scratch), out=str(out), facts=str(facts))
    job.write(scratch / "job.json")
    return scratch / "job.json"


def _fit_device(strategy: Strategy, cpu: bool) -> Strategy:
    """In bf16 on an accelerator that has it, unless the user chose a dtype. On a CPU fp32 is the faster one."""
    from shardwise import device

    if cpu or device.accelerator() is None or not device.computes_in_bf16() or strategy.param_dtype is not None:
        return strategy
    return strategy.replace(param_dtype="bf16")


def _check_shards(strategy: Strategy, nproc: int) -> None:
    """What the ranks would refuse, said before they start."""
    if strategy.shard_size is not None and nproc % strategy.shard_size:
        raise LaunchError(
            f"shard_size={strategy.shard_size} does not divide {nproc} ranks",
            fix="choose a divisor, or another --nproc",
        )


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise LaunchError(
            f"cannot write to {out}: {error.strerror or error}", fix="choose another folder with --out"
        ) from error
