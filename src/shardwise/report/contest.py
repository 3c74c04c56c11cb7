"""One script under several strategies: each a run of a few recorded steps, measured beside predicted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shardwise import environment
from shardwise.errors import RecordError
from shardwise.observe.recorded import RunRecord, read
from shardwise.report.facts import STAGES, Facts, facts_of

_GRACE_S = 10.0
_NOISE = ("Traceback", "File ", "^", "fix:", "shardwise: rank", "During handling", "The above exception")


@dataclass(frozen=True)
class Contest:
    """What is compared.

    Args:
        command: the script and its arguments.
        steps: of each run; the first, and the second where operations are counted, are no part of times.
        launcher: options for ``shardwise launch``.
        limit_s: seconds that one run may take.
    """

    command: Sequence[str]
    steps: int
    launcher: Sequence[str] = ()
    limit_s: float = 600.0


@dataclass(frozen=True)
class Predicted:
    """Numbers of one rank and step that nobody measured; ``None``: nobody said.

    Attributes:
        sent: bytes to other ranks.
        states: the most bytes of all model states together.
        step_s, peak: seconds, and the most bytes of a device, by a plan. On a CPU ``peak`` is left out: a process has
            Python and torch besides.
    """

    sent: float | None = None
    states: float | None = None
    step_s: float | None = None
    peak: float | None = None


@dataclass(frozen=True)
class Row:
    """One strategy.

    Attributes:
        failure: why there are no numbers, in a line; empty if there are.
        step_s: seconds of a step, of the slowest rank; without evaluation.
        rate, unit: per second, of all ranks: ``tokens/s`` or ``rows/s``.
        states: the most bytes of all model states together on a rank.
        peak: the most bytes of a device, by torch; of a process in the host's memory where there is no device.
        sent: bytes of a step to other ranks, of one rank.
        folder: of the record.
    """

    strategy: str
    failure: str = ""
    step_s: float | None = None
    rate: float | None = None
    unit: str = ""
    states: float | None = None
    peak: float | None = None
    sent: float | None = None
    predicted: Predicted = field(default_factory=Predicted)
    folder: str = ""


def run(contest: Contest, strategy: str, folder: Path, plan: Callable[[], Predicted] | None = None) -> Row:
    """Run the script under one strategy. A failure of it is a row.

    Args:
        folder: for the record, and for what the script prints (``output.txt``).
        plan: asked after the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "output.txt"
    command = [
        sys.executable, "-m", "shardwise", "launch", *contest.launcher, "--strategy", strategy,
        "--record", str(folder), *contest.command,
    ]  # fmt: skip
    code = _run(command, output, {environment.STEPS: str(contest.steps)}, contest.limit_s)
    planned = plan() if plan is not None else Predicted()
    try:
        record = read(folder)
        facts = facts_of(record)
    except RecordError as error:
        why = error.what if code == 0 else _why(output, code, contest.limit_s)
        return Row(strategy, why, predicted=planned, folder=str(folder))
    if code != 0:
        return Row(strategy, _why(output, code, contest.limit_s), predicted=planned, folder=str(folder))
    return _row(strategy, record, facts, planned, folder)


def _run(command: Sequence[str], output: Path, variables: Mapping[str, str], limit_s: float) -> int | None:
    """The exit code; ``None`` if it took too long and was ended."""
    with output.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **variables},
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)  # the launcher ends its ranks
                try:
                    process.wait(_GRACE_S)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def _why(output: Path, code: int | None, limit_s: float) -> str:
    if code is None:
        return f"it was not over after {limit_s:g} s (--timeout gives it longer)"
    lines = [line.strip() for line in output.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0] or line.startswith("error:")]
    told = errors or [line for line in lines if not line.startswith(_NOISE)]
    return f"exit code {code}" + (f": {told[-1][:300]}" if told else "")


def _row(strategy: str, record: RunRecord, facts: Facts, planned: Predicted, folder: Path) -> Row:
    found = {fact.name: fact.value for fact in facts.summary}
    unit = "tokens/s" if found.get("tokens/s") is not None else "rows/s"
    on_device = found.get("peak of the device")
    peak = found.get("a process in the host's memory") if on_device is None else on_device
    sent = sum(nbytes for way, nbytes in facts.sent.items() if way not in STAGES)
    told = next((one.expected for one in record.ranks if one.expected is not None), None)
    predicted = Predicted(
        told["sent"] if told else None, told["peak_total"] if told else None, planned.step_s,
        None if on_device is None else planned.peak,
    )  # fmt: skip
    return Row(
        strategy, "", found.get("a step"), found.get(unit), unit, found.get("peak of all states"), peak, sent,
        predicted, str(folder),
    )  # fmt: skip
