"""What to say when a rank stops: which rank, in which unit, doing what, and what the others waited for.

Ranks tell each other through the rendezvous store, beside the process groups, because a process group is
exactly what has broken by then. A rank that has waited for more than a second writes down what it waits
for; a rank that dies of an exception writes down why before its connections close. Whoever's collective
then fails reads all of it and raises one report; one rank is elected to print it. Ranks that wait for each other would
learn that at the end of a timeout only, so rank 0 says it in time when all wait, and for different things. That is no
proof, for messages may be slow: nothing is ended.

A rank that is killed in the middle of a message leaves gloo's wait at the other end as it is, until the timeout: when a
connection closes, gloo tells what has not begun, but not the message under way (``Pair::signalException`` passes over
``rx_``, and over unbound buffers in ``tx_``; pytorch/gloo at 70dc360). Nothing can end that wait. So who has waited for
a while looks at the connections, and ends this process with the report if one is closed and the wait goes on.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol

import torch.distributed as dist

from shardwise.comm.stats import Op
from shardwise.errors import CommError, RankFailed, ShardwiseError, first_line
from shardwise.events import failing

_QUIET_S = 1.0  # a wait shorter than this is not worth telling the others
_STUCK_S = 30.0  # when all ranks have waited for so long, for different things, one of them says so
_GRACE_S = 3.0  # how long a failing collective waits for the other ranks' words
_EXIT_S = 20.0  # after a failure was printed, the interpreter has this long to end
_LOOK_S = 10.0  # between two looks at the connections of who waits, at most; the first ones come sooner


class Waited(Protocol):
    """Whom a rank waits for: a :class:`~shardwise.comm.group.Group`."""

    ranks: tuple[int, ...]

    def closed(self) -> list[int]:
        """Of which ranks the connections to this one are closed."""


Waiting = tuple[Op, Waited, float]
"""For what, for whom, and since when."""


def _seconds(waiting: Waiting | None) -> float:
    """For how long."""
    return 0.0 if waiting is None else time.perf_counter() - waiting[2]


class Tracker:
    """Where this rank is. Written on the hot path, so plain attributes and nothing else.

    Attributes:
        phase, unit: what it computes.
        waiting: what it waits for.
        beside: what a thread beside the training waits for.
    """

    __slots__ = ("beside", "phase", "unit", "waiting")

    def __init__(self) -> None:
        self.phase, self.unit = "", ""
        self.waiting: Waiting | None = None
        self.beside: Waiting | None = None

    def __str__(self) -> str:
        waiting = self.waiting
        at = f" (in {self.phase} of unit {self.unit})" if self.phase else ""
        if waiting is not None:
            op, group, _ = waiting
            return f"waiting {_seconds(waiting):.0f} s for {op} over ranks {list(group.ranks)}{at}"
        return f"running{at}" if at else "running outside the model"


class _Looks:
    """When to look whether those are still there for whom one thread waits: some seconds after it began, and ever
    later."""

    def __init__(self, first: float) -> None:
        self._known: Waiting | None = None
        self._first = self._next = first

    def are_due(self, waiting: Waiting | None) -> bool:
        if waiting is not self._known:
            self._known, self._next = waiting, self._first
        since = _seconds(waiting)
        if since <= self._next:
            return False
        self._next = since + min(since, _LOOK_S)
        return True


class Faults:
    """Publishes this rank's state to the others and turns broken collectives into reports."""

    _runs = 0

    def __init__(self, rank: int, size: int, tracker: Tracker, active: bool) -> None:
        self.rank, self.size, self.tracker = rank, size, tracker
        self._stopped = threading.Event()
        self.failed = False  # this rank is ending with an error
        self.speaks = True  # this rank prints the report of a broken collective, for all
        self._explains = False  # a broken collective at this moment: who waited for it knows
        self._said = False  # that the ranks wait for different things
        self._elsewhere = False  # another rank does: seen while waiting, for the case that the store ends with it
        self._store: Any = None
        self._meetings = 0
        self._thread: threading.Thread | None = None
        if size > 1 and active:
            Faults._runs += 1  # several process groups in one life must not read each other's words
            base = dist.distributed_c10d._get_default_store()
            self._prefix = f"shardwise/{Faults._runs}"
            self._store = dist.PrefixStore(self._prefix, base.clone())  # type: ignore[attr-defined]
            # A clone of its own: a store client that waits must not block another thread's.
            own = dist.PrefixStore(self._prefix, base.clone())  # type: ignore[attr-defined]
            self._thread = threading.Thread(target=self._watch, args=(own,), name="shardwise-faults", daemon=True)
            self._thread.start()
            atexit.register(self.stop)

    def meet(self, timeout: float) -> None:
        """All ranks have made their connections when this returns on rank 0, whose end may be the end of the store.

        Every rank calls it as often as the others, each time it has made process groups.

        Args:
            timeout: seconds.

        Raises:
            RuntimeError: they have not by then.
        """
        if self._store is None:
            return
        self._meetings += 1
        if self._store.add(f"connected {self._meetings}", 1) == self.size:
            self._store.set(f"all are connected {self._meetings}", "")
        if self.rank == 0:
            self._store.wait([f"all are connected {self._meetings}"], timedelta(seconds=timeout))

    def share(self, name: str, text: str) -> list[str]:
        """Every rank's text, by rank. Collective; once for each name."""
        if self._store is None:
            return [text]
        self._store.set(f"{name}/{self.rank}", text)
        return [self._store.get(f"{name}/{rank}").decode() for rank in range(self.size)]

    def stop(self) -> None:
        """End the thread: one that is inside the store while the interpreter ends would abort the process."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
            self._thread = None

    # --- telling ---------------------------------------------------------------------------
    def _watch(self, store: Any) -> None:
        told = stuck = ""
        looks, beside = _Looks(_QUIET_S), _Looks(_EXIT_S)  # the training fails by itself meanwhile, as a rule
        while not self._stopped.wait(_QUIET_S / 2):
            waiting = self.tracker.waiting
            since = _seconds(waiting)
            for one, found in ((looks, waiting), (beside, self.tracker.beside)):
                if one.are_due(found) and found is not None:
                    self._end_if_closed(found)
            if store is None or (since <= _QUIET_S and not told):
                continue
            text = str(self.tracker) if since > _QUIET_S else ""
            now = f"{waiting[0]} over ranks {list(waiting[1].ranks)}" if waiting and since > _STUCK_S else ""
            try:
                self._elsewhere = self._elsewhere or store.check(["reporter"])
                if text != told:
                    store.set(f"status/{self.rank}", text)
                if now != stuck:
                    store.set(f"stuck/{self.rank}", now)
                    self._said = False
                if now and self.rank == 0 and not self._said:
                    self._say_stuck(store)
            except RuntimeError:  # the store's host has ended; nobody is left to tell
                store = None
            told, stuck = text, now

    def _end_if_closed(self, waiting: Waiting) -> None:
        """End this process if the rank waits for one that has ended, and is not told so."""
        op, group, _ = waiting
        if not group.closed() or self._stopped.wait(_QUIET_S) or self._explains:
            return
        if waiting is not self.tracker.waiting and waiting is not self.tracker.beside:
            return
        self.say(self.explain(RuntimeError("connection closed"), op, group))
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(1)

    def _say_stuck(self, store: Any) -> None:
        """If all ranks wait, and for different things, say so."""
        keys = [f"stuck/{rank}" for rank in range(self.size)]
        if not store.check(keys):
            return
        found = [store.get(key).decode() for key in keys]
        if all(found) and len(set(found)) > 1:
            self._said = True
            lines = [f"  rank {rank}: {text}" for rank, text in enumerate(found)]
            head = f"\nshardwise: all ranks have waited for {_STUCK_S:.0f} s, for different things:"
            end = "  fix: all ranks must make the same calls; this run ends at its timeout unless it goes on"
            print("\n".join([head, *lines, end]), file=sys.stderr, flush=True)

    def publish_failure(self, error: BaseException) -> None:
        """Write down why this rank ends, before its connections close."""
        if self._store is None:
            return
        at = f"in {self.tracker.phase} of unit {self.tracker.unit}" if self.tracker.phase else "outside the model"
        text = json.dumps({"rank": self.rank, "at": at, "error": f"{type(error).__name__}: {error}"})
        try:
            if self._store.add("failures", 1) == 1:
                self._store.set("failure", text)
        except RuntimeError:
            return  # the store's host ended first; the others see a closed connection

    # --- reading ---------------------------------------------------------------------------
    def _read(self, key: str) -> str:
        if self._store.check([key]):
            return self._store.get(key).decode()
        return ""

    def explain(self, error: RuntimeError, op: Op, group: Waited) -> CommError:
        """The report for a collective that broke while this rank waited in it."""
        self._explains = True
        try:
            return self._report(error, op, group)
        finally:
            self._explains = False

    def _report(self, error: RuntimeError, op: Op, group: Waited) -> CommError:
        tracker = self.tracker
        here = f"rank {self.rank}, in {tracker.phase} of unit {tracker.unit}" if tracker.phase else f"rank {self.rank}"
        line = first_line(error)
        timed_out = "timed out" in line.lower()
        closed = [] if timed_out else group.closed()  # gloo's timeout closes all of them
        failure, statuses = None, {}
        if self._store is not None:
            try:
                # Elected before anything else: the rank that hosts the store may end while others still listen.
                self.speaks = not self._elsewhere
                self.speaks = self._store.add("reporter", 1) == 1
                self._store.set(f"status/{self.rank}", f"stopped while waiting for {op} over ranks {list(group.ranks)}")
                until = time.monotonic() + _GRACE_S
                while time.monotonic() < until:
                    failure = failure or self._read("failure")
                    statuses = {r: self._read(f"status/{r}") for r in range(self.size) if r != self.rank}
                    if failure and all(statuses[r] for r in statuses if r != json.loads(failure)["rank"]):
                        break
                    time.sleep(0.1)
            except RuntimeError:
                statuses = statuses or {}  # the store is gone with the rank that hosted it
        cause: dict[str, Any] | None = json.loads(failure) if failure else None
        if cause is not None:
            what = f"rank {cause['rank']} failed {cause['at']}: {cause['error']}"
        elif timed_out:
            what = f"{op} did not complete within its timeout: the ranks do not agree about what comes next"
        else:
            who = f"rank {closed[0]}" if len(closed) == 1 else f"a rank in {list(closed or group.ranks)}"
            what = f"{who} ended or lost its connection without a word (killed?)"
        lines = [what, f"  rank {self.rank} was waiting for {op} over ranks {list(group.ranks)}"]
        for r, status in sorted(statuses.items()):
            if cause is None or r != cause["rank"]:
                lines.append(f"  rank {r}: {status or 'not waiting in a collective, or no word from it'}")
        fix = (
            f"look at rank {cause['rank']}'s own message above; the other ranks only waited for it"
            if cause is not None
            else "all ranks must run the same units in the same order; if one is only slow, raise the timeout"
            if timed_out
            else "look at the end of the missing rank's log, and at the kernel's for out-of-memory kills"
        )
        kind = RankFailed if not timed_out or cause is not None else CommError
        return kind("\n".join(lines), where=here, fix=fix)

    def say(self, report: CommError) -> None:
        """Print a report, for all ranks that have one."""
        if self.speaks:
            print(f"\nshardwise report\n{report}", file=sys.stderr, flush=True)
        else:
            print(f"shardwise: rank {self.rank} stopped with the others", file=sys.stderr, flush=True)


def install_excepthook(current: Callable[[], Faults | None]) -> None:
    """Say on all ranks why one of them ends.

    Args:
        current: of the process group that there is when an exception is not caught.
    """
    previous = sys.excepthook
    if getattr(previous, "shardwise", False):
        return

    def hook(kind: type[BaseException], error: BaseException, tb: TracebackType | None) -> None:
        faults = current()
        failing(error)
        if faults is None or faults.size == 1:
            previous(kind, error, tb)
            return
        faults.failed = True
        if isinstance(error, CommError):
            faults.say(error)
        else:
            faults.publish_failure(error)
            if isinstance(error, ShardwiseError):
                frames = [f for f in traceback.extract_tb(tb) if os.sep + "shardwise" + os.sep not in f.filename]
                at = f"  at {frames[-1].filename}:{frames[-1].lineno}\n" if frames else ""
                print(
                    f"\nshardwise: rank {faults.rank} failed\n{at}{kind.__name__}: {error}", file=sys.stderr, flush=True
                )
            else:
                print(f"\nshardwise: rank {faults.rank} failed", file=sys.stderr, flush=True)
                previous(kind, error, tb)
        # A destructor that waits for a peer must not keep this rank alive after its last word.
        guard = threading.Timer(_EXIT_S, os._exit, (1,))
        guard.daemon = True
        guard.start()

    hook.shardwise = True  # type: ignore[attr-defined]
    sys.excepthook = hook
