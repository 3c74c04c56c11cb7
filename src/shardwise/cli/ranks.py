"""Start rank processes and see them to their end: the launcher under ``launch`` and ``demo``.

The work is torch's own elastic agent (the one under ``torchrun``): rendezvous, environment, restarts. What is
different is how it ends. The first failure does not cut the other ranks short while they say what they were
waiting for, a failed run is one line per rank instead of a traceback of the launcher, and Ctrl-C is one message.
"""

from __future__ import annotations

import inspect
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous

from shardwise.cli.console import say, show_cursor
from shardwise.cli.host import cores
from shardwise.cli.restart_policy import Attempt, RestartPolicy
from shardwise.errors import LaunchError

# Survivors of a failed rank have this long to print their report. It covers the time that shardwise.comm.faults
# waits for the other ranks' words, and the end of the interpreter after it.
_GRACE_S = 8.0
_SHUTDOWN_S = 10  # after SIGTERM, before SIGKILL
_STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]


@dataclass(frozen=True)
class Ranks:
    """The processes to start on this host.

    Args:
        command: what follows ``python -u``: ``("script.py", "arg", ...)`` or ``("-m", "module", ...)``.
        nproc: ranks on this host.
        nnodes: hosts, each of which runs a launcher with the same ``nproc``.
        node_rank: this host's number; ``None`` lets the rendezvous number the hosts.
        endpoint: ``host:port`` where the hosts meet; empty for a free port of this host.
        run_id: tells several runs at one endpoint apart.
        max_restarts: how often all ranks are started anew after a failure.
        restart_policy: how far they may become fewer then; ``None`` if there are as many each time. One host only.
        devices: what the ranks see, in the words of the variable that says so; ``restart_policy`` leaves some out.
        environment: variables for the ranks, on top of this process's. ``OMP_NUM_THREADS`` in it is this host's cores
            divided among the ranks, and divided anew when they become fewer.
        limit_s: all ranks are ended if they run for longer; ``None`` for no limit.
        refusal: a file in which a rank says why it did not begin. Where it is there, nobody is said to have failed.
    """

    command: Sequence[str]
    nproc: int
    nnodes: int = 1
    node_rank: int | None = None
    endpoint: str = ""
    run_id: str = ""
    max_restarts: int = 0
    restart_policy: RestartPolicy | None = None
    devices: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    limit_s: float | None = None
    refusal: Path | None = None


def run_ranks(ranks: Ranks, failed: list[int] | None = None) -> int:
    """Run the ranks to their end.

    Args:
        ranks: the processes to start.
        failed: takes the ranks that failed, the first to fail first.

    Returns:
        0 if all ranks succeeded, 1 if one failed, 128 + n if this process was told to stop by signal n
        (130 for Ctrl-C). What happened has been said on stderr.

    Raises:
        LaunchError: the hosts did not find each other.
    """
    os.environ.update(ranks.environment)
    _quiet_torch()
    agent = _agent(ranks)
    with _interruptible(agent):
        try:
            result = agent.run()
        except (SignalException, KeyboardInterrupt) as error:
            number = agent.told_to_stop or int(getattr(error, "sigval", signal.SIGINT))
            agent.kill()
            show_cursor()
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            say(f"\nshardwise: stopped by {name}; all {agent.start.nproc} ranks have ended")
            return 128 + number
        except (RendezvousError, TimeoutError, ConnectionError) as error:
            raise LaunchError(
                f"the launchers of {ranks.nnodes} hosts did not meet at {ranks.endpoint}: {error}",
                fix="start one launcher per host with the same --nnodes, --rdzv-endpoint and --rdzv-id",
            ) from error
        finally:
            agent.leave()
    if not result.is_failed():
        return 0
    show_cursor()
    if ranks.refusal is not None and ranks.refusal.exists():
        return 1
    if failed is not None:
        failed += [rank for rank, _ in agent.failures(result)]
    for line in agent.summary(result):
        say(line)
    return 1


class _Agent(LocalElasticAgent):
    """torch's agent, with patience: survivors of a failure may finish their last words.

    And a start after a failure may have fewer ranks.

    Attributes:
        told_to_stop: the signal; 0 for none.
    """

    _ended: dict[int, float]  # pid: when it was first seen ended, this round
    _started = 0.0
    limit_s: float | None = None
    out_of_time = False
    told_to_stop = 0
    _starting = False

    def __init__(self, spec: WorkerSpec, ranks: Ranks) -> None:
        patience: dict[str, Any] = {"shutdown_timeout": _SHUTDOWN_S}
        known = inspect.signature(LocalElasticAgent.__init__).parameters  # torch 2.11 has its own, of 30 seconds
        super().__init__(
            spec, DefaultLogsSpecs(log_dir=os.devnull), **{k: v for k, v in patience.items() if k in known}
        )
        self.start = Attempt(ranks.nproc, tuple(ranks.devices))
        self.limit_s = ranks.limit_s
        self._restart_policy = ranks.restart_policy
        self._divides_cores = "OMP_NUM_THREADS" in ranks.environment

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, int]:
        self._ended = {}
        self._started = time.monotonic()
        self._starting = True
        try:
            return super()._start_workers(worker_group)
        finally:
            self._starting = False

    def stop(self, number: int) -> None:
        """A signal has come. Where ranks are being started, it waits until all of them are known: who is not known
        cannot be ended.

        Raises:
            SignalException: which ends the run.
        """
        again, self.told_to_stop = bool(self.told_to_stop), self.told_to_stop or number
        if again and not self._starting:
            self.kill()
        elif not self._starting:
            self._stop_now()

    def _stop_now(self) -> None:
        """Not by SIGINT: each rank would print a KeyboardInterrupt traceback, and a rank that waits inside a
        collective would not see it before the collective returns."""
        number = signal.Signals(self.told_to_stop)
        raise SignalException("told to stop", signal.SIGTERM if number == signal.SIGINT else number)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self.told_to_stop:
            self._stop_now()
        if self.limit_s is not None and not self.out_of_time and time.monotonic() - self._started > self.limit_s:
            self.out_of_time = True
            self.kill()
        pids = [worker.id for worker in worker_group.workers]
        ended = {pid: status for pid in pids if (status := _peek(pid)) is not None}
        now = time.monotonic()
        for pid in ended:
            self._ended.setdefault(pid, now)
        failures = [self._ended[pid] for pid, status in ended.items() if status != 0]
        if failures and len(ended) < len(pids) and now - min(failures) < _GRACE_S:
            return RunResult(state=WorkerState.HEALTHY)
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED and self._remaining_restarts > 0:
            for line in self.summary(result):
                say(line)
            left = self._remaining_restarts
            say(f"shardwise: starting {self._next_start(result)} ({left} restart{'s' * (left > 1)} left)")
        return result

    def _next_start(self, result: RunResult) -> str:
        """Decide what the start after this failure has, and say it in a few words."""
        if self._restart_policy is None:
            return "all ranks anew"
        before = self.start
        by_themselves = [(f.local_rank, f.exitcode) for _, f in self.failures(result) if f.pid in self._ended]
        self.start = self._restart_policy.after(by_themselves, before)
        # torch's agent reads these each time it starts ranks; it goes on counting restarts.
        self._worker_group.spec.local_world_size = self.start.nproc
        if self.start.left_out and self._restart_policy.shown_by is not None:
            os.environ[self._restart_policy.shown_by] = ",".join(self.start.devices)
        if self._divides_cores and self.start.nproc < before.nproc:
            os.environ["OMP_NUM_THREADS"] = str(max(1, cores() // self.start.nproc))
        return self.start.words(before)

    def failures(self, result: RunResult) -> list[tuple[int, ProcessFailure]]:
        """The failed ranks, in the order in which they were seen ended.

        Of those seen together the ones that a signal ended come first: a rank that is killed takes others with it,
        which hear of it within milliseconds and end with an exit code.
        """

        def order(failed: tuple[int, ProcessFailure]) -> tuple[float, bool, int]:
            rank, failure = failed
            return self._ended.get(failure.pid, float("inf")), failure.exitcode >= 0, rank

        return sorted(result.failures.items(), key=order)

    def summary(self, result: RunResult) -> list[str]:
        """One line per failed rank, the first failure first."""
        lines = []
        for rank, failure in self.failures(result):
            if failure.exitcode >= 0:
                end = f"ended with exit code {failure.exitcode}"
            elif failure.pid not in self._ended:
                end = "did not end by itself after that and was stopped by the launcher"
            else:
                end = f"was ended by {failure.signal_name()}"
                if self.out_of_time:
                    end = f"did not end within {self.limit_s:.0f} s and was stopped by the launcher"
                elif failure.exitcode == -signal.SIGKILL:
                    end += " (often the kernel, out of memory)"
            lines.append(f"shardwise: rank {rank} {end}")
        if lines:
            lines[0] = f"\n{lines[0]}" + (", the first to fail" if len(lines) > 1 else "")
        return lines

    def kill(self) -> None:
        """End what is left at once."""
        for worker in self._worker_group.workers:
            if isinstance(worker.id, int) and _peek(worker.id) is None:
                with _gone_is_fine():
                    os.killpg(worker.id, signal.SIGKILL)

    def leave(self) -> None:
        self._worker_group.spec.rdzv_handler.shutdown()


def _agent(ranks: Ranks) -> _Agent:
    run_id = ranks.run_id or (uuid.uuid4().hex if ranks.nnodes == 1 else "shardwise")
    alone = ranks.nnodes == 1
    # A host's place in a c10d rendezvous is decided there; a given one needs the static rendezvous.
    static = not alone and ranks.node_rank is not None
    parameters = RendezvousParameters(
        backend="static" if static else "c10d",
        endpoint=ranks.endpoint or "127.0.0.1:0",
        run_id=run_id,
        min_nodes=ranks.nnodes,
        max_nodes=ranks.nnodes,
        # Otherwise the host's own name is looked up, which not every machine can resolve.
        local_addr="127.0.0.1" if alone else None,
        **({"rank": ranks.node_rank} if static else {}),
        timeout=900,
    )
    host, _, port = ranks.endpoint.rpartition(":")
    spec = WorkerSpec(
        role="default",
        local_world_size=ranks.nproc,
        entrypoint=sys.executable,
        # The agent substitutes ${local_rank} and the like; a doubled dollar keeps the user's own as it is.
        args=("-u", *(arg.replace("$", "$$") for arg in ranks.command)),
        rdzv_handler=rendezvous.get_rendezvous_handler(parameters),
        max_restarts=ranks.max_restarts,
        monitor_interval=0.1,
        local_addr=parameters.local_addr,
        master_addr=host if static else None,
        master_port=int(port) if static else None,
    )
    # torch's handlers would end a start half way, and forget the ranks that there are. Nobody sends this one.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGRTMAX"
    return _Agent(spec, ranks)


@contextmanager
def _interruptible(agent: _Agent) -> Iterator[None]:
    """Ctrl-C and its like end the ranks by SIGTERM, a second one by SIGKILL."""

    def handler(number: int, frame: FrameType | None) -> None:
        agent.stop(number)

    before = {number: signal.signal(number, handler) for number in _STOPPING}
    try:
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known if known is not None else signal.SIG_DFL)  # not set from Python


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except ProcessLookupError:
        return


def _peek(pid: int) -> int | None:
    """A child's wait status if it has ended, without reaping it (the agent does that), else ``None``."""
    if not hasattr(os, "waitid"):  # some systems; there the agent ends survivors at once
        return None
    try:
        info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    return None if info is None else int(info.si_status)


def _quiet_torch() -> None:
    """The agent logs each signal and exit code; the summary says that once. ``LOGLEVEL`` brings the log back."""
    if "LOGLEVEL" in os.environ:
        return
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
