"""``shardwise doctor``: what this machine has, and whether every strategy works on it."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from shardwise.cli.console import say
from shardwise.cli.settings import Settings
from shardwise.errors import LaunchError
from shardwise.strategy import PRESETS

_WORKS = "Everything works on this machine."


def doctor(
    nproc: Annotated[
        int | None, typer.Option("--nproc", "-n", help="Ranks. Default: one per accelerator; on the CPU 4, or 2.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Test the CPU even where there are accelerators.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="fp32 only, fewer steps: about 20 seconds.")] = False,
    patience: Annotated[float, typer.Option(help="Seconds after which a phase of the test counts as hanging.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as one JSON object.")] = False,
) -> None:
    """Look at this machine, and test every strategy on it.

    Prints versions, devices, backends and the links between ranks, trains a small model under every strategy, and
    compares losses with one process, weights between strategies and bytes sent with the formula. Ends in a verdict.
    The exit code is 0 if everything works and 1 if not.
    """
    begun = time.perf_counter()
    if nproc is not None and nproc < 1:
        raise LaunchError(f"--nproc {nproc} is not a number of ranks", fix="give 1 or more")
    if not patience > 0:
        raise LaunchError(f"--patience {patience} is not a time", fix="give more than 0 seconds")
    from shardwise.cli.doctor import machine, report

    facts: dict[str, Any] = {
        "versions": machine.versions(),
        "devices": machine.devices(),
        "backends": machine.backends(),
        "surroundings": machine.surroundings(),
    }
    if not as_json:
        report.machine(facts)
    problems = _before(facts, cpu)
    tests = []
    if facts["backends"]["gloo"]:
        for device, ranks, chosen in _plan(facts["devices"], nproc, cpu, quick):
            result = _test(device, ranks, chosen, quick, patience)
            tests.append(result)
            problems += result["problems"]
            if not as_json:
                report.test(result)
    verdict = _WORKS if not problems else f"Not everything works on this machine: {problems[0]['what']}"
    facts = {
        **facts,
        "tests": tests,
        "problems": problems,
        "ok": not problems,
        "verdict": verdict,
        "seconds": time.perf_counter() - begun,
    }
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        report.verdict(facts)
    raise typer.Exit(0 if facts["ok"] else 1)


def _before(facts: dict[str, Any], cpu: bool) -> list[dict[str, str]]:
    """What is wrong before anything is tried."""
    out = []
    if not facts["backends"]["gloo"]:
        out.append({"what": "this build of torch has no gloo", "fix": "install torch from its own index, pytorch.org"})
    if facts["devices"]["driver_devices"] and not cpu:
        count = facts["devices"]["driver_devices"]
        out.append(
            {
                "what": f"the driver shows {count} CUDA device{'s' * (count > 1)} that this torch cannot use "
                f"(CUDA: {facts['versions'].get('cuda', 'this torch is built without')})",
                "fix": "install a torch built for your driver's CUDA version, see pytorch.org",
            }
        )
    config = facts["surroundings"]["config"]
    if config["state"].startswith("broken"):
        out.append(
            {"what": f"the settings file {config['path']} is {config['state']}", "fix": "shardwise config --force"}
        )
    return out


def _plan(devices: dict[str, Any], nproc: int | None, cpu: bool, quick: bool) -> list[tuple[str, int, list[str]]]:
    """The test runs: device, number of ranks and strategies of each.

    Raises:
        LaunchError: more ranks than there are accelerators.
    """
    kind, count = devices["accelerator"], 0 if cpu else len(devices["accelerators"])
    if count and nproc is not None and nproc > count:
        raise LaunchError(
            f"--nproc {nproc} asks for more ranks than there are {kind} devices ({count})",
            fix=f"--nproc {count}, or --cpu to test {nproc} ranks on the CPU",
        )
    there = nproc or count if count else 0
    out = [(kind, there, strategies(there))] if there else []
    if not there or (there == 1 and nproc is None):
        # One rank sends nothing to anyone, so with one device the strategies are tested on the CPU as well.
        ranks = nproc or (4 if devices["cores"] >= 4 else 2)
        out.append(("cpu", ranks, strategies(ranks)))
        if ranks == 2 and nproc is None and not quick:
            out.append(("cpu", 4, ["ddp", "hsdp,shard_size=2"]))  # two groups of two
    return out


def strategies(ranks: int) -> list[str]:
    """Every preset; hsdp in two groups where there are four ranks or more, else in every shape there is."""
    sizes = [ranks // 2] if ranks >= 4 and ranks % 2 == 0 else sorted({1, ranks})
    return [name for name in PRESETS if name != "hsdp"] + [f"hsdp,shard_size={size}" for size in sizes]


def _test(device: str, ranks: int, chosen: list[str], quick: bool, patience: float) -> dict[str, Any]:
    # The agent's modules take a second to import.
    from shardwise.cli.doctor.job import Job
    from shardwise.cli.doctor.verdict import judge
    from shardwise.cli.launch import ranks_environment, thread_environment
    from shardwise.cli.ranks import Ranks, run_ranks

    with tempfile.TemporaryDirectory(prefix="shardwise-doctor-") as folder:
        live = sys.stderr.isatty()
        job = Job(
            folder=folder,
            strategies=chosen,
            precisions=["fp32"] if quick else ["fp32", "bf16"],
            steps=4 if quick else 10,
            link_bytes=(4 if quick else 32) << 20,
            link_rounds=5 if quick else 20,
            phase_s=patience,
            lines=not live,
        )
        path = Path(folder) / "job.json"
        job.write(path)
        where = f"{ranks} rank{'s' * (ranks > 1)} on {'the CPU' if device == 'cpu' else device}"
        say(f"\ndoctor: testing {where}; Ctrl-C stops it")
        settings = {**ranks_environment(Settings(cpu=device == "cpu")), **thread_environment(ranks)}
        phases = 3 + len(job.strategies) * len(job.precisions)
        failed: list[int] = []
        with _spinner(job.phase_of(0)) if live else _nothing():
            code = run_ranks(
                Ranks(
                    ["-m", "shardwise.cli.doctor.worker", str(path)],
                    ranks,
                    environment=settings,
                    # Every phase has its own clock; this one is for ranks that never got to their first.
                    limit_s=patience * min(phases, 4) + 30,
                ),
                failed,
            )
        if code > 1:  # interrupted, which has been said
            raise typer.Exit(code)
        return judge(job, ranks, device, code, failed)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _spinner(phase: Path) -> Iterator[None]:
    """On a terminal: what rank 0 is doing, in one line that goes away."""
    from rich.console import Console
    from rich.markup import escape

    done = threading.Event()
    console = Console(stderr=True)
    with console.status("starting the ranks") as status:

        def follow() -> None:
            while not done.wait(0.1):
                if phase.is_file():
                    text = phase.read_text()
                    status.update("ending the ranks" if text == "done" else escape(text))

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
