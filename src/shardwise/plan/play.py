"""The clocks of a step that is played through: of what computes, of its host, and of all that is under way beside."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from shardwise.errors import InternalError
from shardwise.events import NETWORK as NETWORK_WAYS
from shardwise.events import UPDATE
from shardwise.plan.rates import CONTROL, HOST_WAYS, Rates
from shardwise.plan.trace import OP, PHASE, START, WAIT, Entry

COMPUTE, LAUNCH, NETWORK, HOST_LINK, DISK = "compute", "launch", "network", "host link", "disk"
HOST = "host"
"""What bounds a step. ``launch``: the device stands still since the host has not told it yet what to do; ``host``: it
waits for an update there."""
_KINDS = {
    "node": NETWORK, "network": NETWORK, "control": NETWORK, "to_host": HOST_LINK, "to_device": HOST_LINK,
    "disk": DISK, UPDATE: HOST,
}  # fmt: skip
_NAMED_FOREVER = (*NETWORK_WAYS, UPDATE)
_TINY = 1e-12  # a picosecond: clocks of minutes have no more digits


@dataclass
class Job:
    """A transfer, or an update beside what follows: what is left of it, and when it may begin."""

    left: float
    ready: float
    end: float | None = None


class Play:
    """The clock of what computes, that of the host, that of updates beside both, and transfers under way."""

    def __init__(self, rates: Rates) -> None:
        self.rates, self.late = rates, rates.runs_late
        self.now = 0.0  # what computes has done all that it was told
        self.host = 0.0  # the host has told it
        self.side = 0.0  # the thread that updates units has done all that it was given
        self.update: Job | None = None  # what it does at the moment
        self.queues: dict[str, deque[Job]] = {}
        self.by_name: dict[tuple[str, str], deque[Job]] = {}
        self.left_over: dict[str, deque[Job]] = {}
        self.phase = ""
        self.begin_again()

    def begin_again(self) -> None:
        """Forget the times that were spent, not what is under way."""
        self.compute = self.launch = 0.0
        self.waits: dict[str, float] = dict.fromkeys(sorted(set(_KINDS.values())), 0.0)
        self.busy: dict[str, float] = dict(self.waits)
        self.phases: dict[str, float] = {}
        # Copies and requests to a disk have a new name each time, so the next step knows what this one left as another.
        for way, name in [key for key in self.by_name if key[0] not in _NAMED_FOREVER]:
            self.left_over.setdefault(way, deque()).extend(self.by_name.pop((way, name)))

    def run(self, entries: list[Entry], strict: bool) -> None:
        for entry in entries:
            begun = self.now
            if entry.kind == PHASE:
                self._turn(entry)
            elif self.update is not None:
                self._beside(entry, self.update, strict)
            elif entry.kind == OP:
                self._operation(entry)
            elif entry.kind == START:
                self._on_host(self.rates.beginning(entry.phase))
                self._start(entry, max(self.now, self.host))
            elif entry.kind == WAIT:
                self._wait(entry, strict)
            if self.now > begun:
                self.phases[self.phase] = self.phases.get(self.phase, 0.0) + self.now - begun

    @property
    def under_way(self) -> bool:
        """Is something left to do beside what computes?"""
        return self.side > self.now or any(self.queues.values())

    # --- entries -------------------------------------------------------------------------------------
    def _turn(self, entry: Entry) -> None:
        self.phase = entry.phase
        self._on_host(self.rates.turning(entry.phase))
        if self.update is not None:
            self.update.end, self.update = self.side, None
        begun = self.by_name.get((UPDATE, entry.unit))
        if entry.phase == UPDATE and begun:
            self.update, self.side = begun[-1], max(self.side, self.now, self.host)

    def _operation(self, entry: Entry) -> None:
        op = entry.op
        assert op is not None
        seconds = self.rates.operation(op)
        self._on_host(self.rates.calling(entry.phase, op))
        if self.late and op.device == "host":
            self._catch_up()
            self.host += seconds
            self.busy[HOST] += seconds
            self.waits[HOST] += max(0.0, self.host - self.now)
            self._pass(self.host - self.now)
        else:
            self._catch_up()
            self._work(seconds)

    def _start(self, entry: Entry, ready: float) -> None:
        jobs = self.by_name.setdefault((entry.way, entry.name), deque())
        if entry.way == UPDATE:
            jobs.append(Job(0.0, ready))
            return
        where = self.rates.resource(entry.way, entry.ranks)
        seconds = self.rates.transfer(entry.way, entry.nbytes, entry.ranks)
        self.busy[_KINDS[where]] += seconds
        if self.late and entry.way == CONTROL:  # nothing of the device's holds it up, and the host may be far ahead
            jobs.append(Job(0.0, self.host, self.host + seconds))
            return
        job = Job(seconds, ready)
        jobs.append(job)
        queue = self.queues.setdefault(where, deque())
        queue.insert(next((i for i, other in enumerate(queue) if other.ready > ready), len(queue)), job)

    def _begun(self, entry: Entry, strict: bool) -> Job | None:
        """What an entry waits for."""
        jobs = self.by_name.get((entry.way, entry.name)) or self.left_over.get(entry.way)
        if jobs:
            return jobs.popleft()
        if strict and entry.way in _NAMED_FOREVER:
            raise InternalError(f"a step waits for the {entry.way} of '{entry.name}', which nobody began")
        return None

    def _wait(self, entry: Entry, strict: bool) -> None:
        job = self._begun(entry, strict)
        if job is None:
            return
        begun = self.now
        while job.end is None:
            self._pass(self._next_change())
        if not self.late or entry.way not in HOST_WAYS:
            self._pass(job.end - self.now)
        else:
            self.host = max(self.host, job.end)
        self.waits[_KINDS[self.rates.resource(entry.way, entry.ranks)]] += self.now - begun

    def _beside(self, entry: Entry, update: Job, strict: bool) -> None:
        """A part of an update: on a thread of its own. On a CPU its operations take the cores from the others."""
        if entry.kind == OP:
            assert entry.op is not None
            if self.late:
                seconds = self.rates.operation(entry.op) + self.rates.calling(entry.phase, entry.op)
                self.side += seconds
                self.busy[HOST] += seconds
            else:
                self._operation(entry)
                self.side = max(self.side, self.now)
        elif entry.kind == START:
            self._start(entry, self.side)
        elif (job := self._begun(entry, strict)) is not None:
            self.side = max(self.side, self._expected_end(job))

    def _expected_end(self, job: Job) -> float:
        """When a transfer will have ended if nothing slows it down."""
        if job.end is not None:
            return job.end
        queue = next(queue for queue in self.queues.values() if any(other is job for other in queue))
        end = self.now
        for other in queue:
            end = max(end, other.ready) + other.left
            if other is job:
                break
        return end

    # --- time ----------------------------------------------------------------------------------------
    def _on_host(self, seconds: float) -> None:
        """The host does something of its own; on a CPU it is what computes."""
        if self.late:
            self.host += seconds
        else:
            self._work(seconds)

    def _catch_up(self) -> None:
        """What computes cannot begin before the host told it."""
        if self.late and self.host > self.now:
            self.launch += self.host - self.now
            self._pass(self.host - self.now)

    def _work(self, seconds: float) -> None:
        """So many seconds of computing, which transfers under way may stretch."""
        left = seconds
        while left > _TINY:
            running = self._running()
            speed = min((self.rates.slowed(where).main for where in running), default=1.0)
            step = min(left / speed, self._until_change(running, beside=True))
            left -= step * speed
            self.compute += step
            self._advance(step, running, beside=True)

    def _pass(self, seconds: float) -> None:
        """So many seconds in which nothing is computed."""
        left = seconds
        while left > _TINY:
            running = self._running()
            step = min(left, self._until_change(running, beside=False))
            left -= step
            self._advance(step, running, beside=False)

    def _running(self) -> list[str]:
        return [where for where, jobs in self.queues.items() if jobs and jobs[0].ready <= self.now + _TINY]

    def _speed(self, where: str, beside: bool) -> float:
        return self.rates.slowed(where).transfer if beside else 1.0

    def _until_change(self, running: list[str], beside: bool) -> float:
        """Seconds until a transfer ends or may begin."""
        ends = [self.queues[where][0].left / self._speed(where, beside) for where in running]
        begins = [jobs[0].ready - self.now for where, jobs in self.queues.items() if jobs and where not in running]
        return max(min([*ends, *begins], default=float("inf")), _TINY)

    def _next_change(self) -> float:
        """Seconds until the next change, while nothing is computed; there is one."""
        return self._until_change(self._running(), beside=False)

    def _advance(self, step: float, running: list[str], beside: bool) -> None:
        self.now += step
        for where in running:
            jobs = self.queues[where]
            jobs[0].left -= step * self._speed(where, beside)
            if jobs[0].left <= _TINY:
                jobs.popleft().end = self.now
