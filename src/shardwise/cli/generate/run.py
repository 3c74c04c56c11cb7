"""From a request to ranks that serve it, and what is said at the end."""

from __future__ import annotations

import os
import signal
from dataclasses import asdict, replace
from pathlib import Path

from shardwise import environment
from shardwise.cli.console import say, show_cursor
from shardwise.cli.generate import report, told
from shardwise.cli.generate.answers import Answers
from shardwise.cli.generate.job import Job
from shardwise.cli.generate.prompts import key
from shardwise.cli.launch import choose_nproc, ranks_environment, thread_environment
from shardwise.cli.settings import Settings
from shardwise.errors import LaunchError, ShardwiseError

_SETTINGS = ("folder", "dtype", "quantization", "sampling", "max_new_tokens", "seed")


class Run:
    """One run.

    Args:
        job: what is asked for.
        nproc: ranks that were asked for.
        cpu: no accelerator is to be used.
    """

    def __init__(self, job: Job, nproc: int | None, *, cpu: bool) -> None:
        self.job, self.cpu = job, cpu
        self.nproc = nproc

    def shown(self) -> int:
        """Show the answer to the one prompt. Returns the exit code."""
        split = self.job.device_map == "split"
        number = choose_nproc(self.nproc, self.cpu or None) if split or self.nproc is not None else 1
        if number > 1 and not split:
            say(f"shardwise: {number} ranks compute the same text; --device-map split divides the model among them")
        code = self._ranks(self.job, number)
        if not code:
            self._report(alike=True)
        return code

    def written(self, out: Path) -> int:
        """Write the answers to all prompts that have none yet. Returns the exit code."""
        job = self.job
        answers = Answers(out, job.prompts)
        settings = {name: value for name, value in asdict(job).items() if name in _SETTINGS}
        done = answers.begin({**settings, "folder": str(Path(job.folder).resolve())})
        left = [p for p in job.prompts if key(p.id) not in done]
        if done:
            say(f"shardwise: {out} has {len(done):,} of {len(job.prompts):,} answers already")
        if not left:
            answers.end()
            return 0
        number = choose_nproc(self.nproc, self.cpu or None)
        refused = False
        try:
            code = self._ranks(replace(job, prompts=left, out=answers.part()), number)
        except LaunchError:
            refused = True
            raise
        finally:
            missing = answers.end()
            if missing and not refused:
                say(f"shardwise: {missing:,} of {len(job.prompts):,} answers are missing; the same command goes on")
        if not code:
            self._report(alike=False)
        return code or int(missing > 0)

    def _ranks(self, job: Job, number: int) -> int:
        """Run them, in this process if there is one only. Returns the exit code.

        Raises:
            LaunchError: a rank found out that the request cannot be served.
        """
        code = self._here(job) if number == 1 else self._started(job, number)
        refusal = Path(job.scratch) / told.REFUSED
        if refusal.exists():
            raise LaunchError(refusal.read_text())
        return code

    def _here(self, job: Job) -> int:
        from shardwise.cli.generate.worker import work

        with environment.patch_environment(**({environment.CPU: "1"} if self.cpu else {})):
            try:
                work(job)
            except ShardwiseError as error:
                show_cursor()
                say(f"\nerror: {error}")
                return 1
            except KeyboardInterrupt:
                say("\nshardwise: stopped by Ctrl-C")
                return 128 + signal.SIGINT
        return 0

    def _started(self, job: Job, number: int) -> int:
        from shardwise.cli.ranks import Ranks, run_ranks

        file = Path(job.scratch) / "job.json"
        replace(job, launcher=os.getpid()).write(file)
        variables = {**ranks_environment(Settings(cpu=self.cpu or None)), **thread_environment(number)}
        command = ["-m", "shardwise.cli.generate.worker", str(file)]
        return run_ranks(
            Ranks(command, number, environment=variables, refusal=Path(job.scratch) / told.REFUSED)
        )  # fmt: skip

    def _report(self, *, alike: bool) -> None:
        say("")
        for line in report.lines(told.heard(Path(self.job.scratch)), alike=alike):
            say(line)
