"""What a run does, written down as it goes: one file per rank, for ``shardwise report`` and ``shardwise compare``.

A :class:`Recorder` hears what the engine does (:mod:`shardwise.events`) and notes when. A *step* goes from the end of
one optimizer step to the end of the next, several optimizers that step one after the other being one; the first begins
with its forward. It costs a microsecond or two per event; what that comes to is in ``docs/report.md``.
The file is described in :mod:`shardwise.observe.record_file`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from functools import partial
from math import prod
from time import perf_counter
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

from shardwise import device as devices
from shardwise import host
from shardwise.engine.build import engines
from shardwise.engine.engine import Engine
from shardwise.events import Listener
from shardwise.observe.device_clock import DeviceClock
from shardwise.observe.digest import (
    EVALUATION,
    OUTSIDE,
    PHASE,
    START,
    WAIT,
    WAITED,
    InFull,
    Moment,
    Sums,
    cut,
    known_sum,
    rounded,
    scaled,
    timeline,
)
from shardwise.observe.record_file import FORMAT, RecordFile
from shardwise.observe.stats import formula
from shardwise.tiers import STATES, Ledger

if TYPE_CHECKING:
    from shardwise.observe.flops import FlopCount

_AFTER = {EVALUATION: EVALUATION, "forward": "loss"}  # what a script does until the next pass, by the last one
_COUNTED = 2  # the step whose operations are counted
_EVERY = 100
_MOMENTS = 50_000  # of one step in its timeline; and that are held before they are summed up


class Recorder(Listener):
    """Writes down what this rank does, while it listens.

    Args:
        file: where to.
        head: facts for the first line.
        device: that the rank computes on.
        flops: count the operations of the second step, which then takes longer.
        every: a timeline of every so-manieth step, besides the third to fifth.
    """

    def __init__(
        self, file: RecordFile, head: Mapping[str, Any], device: torch.device, *, flops: bool = True,
        every: int = _EVERY,
    ) -> None:  # fmt: skip
        self._file, self._device, self._late = file, device, devices.runs_late(device)
        self._wanted, self._in_full = flops, InFull(every)
        self._zero, began = perf_counter(), time.time()
        self._moments: list[Moment] = []
        self._sums = Sums(len(STATES))
        self._at = OUTSIDE  # phase
        self._pass = ""  # forward, evaluation, backward, step; empty between them
        self._step, self._begun, self._end = 1, 0.0, 0.0
        self._stepped = False  # its optimizer step is over
        self._micro_batches = 0
        self._rows: list[int | None] = []
        self._tokens: list[int | None] = []
        self._losses: list[Any] = []
        self._values: dict[str, Any] = {}
        self._given: tuple[int | None, int | None] | None = None  # to the forward that begins
        self._others: WeakSet[Engine] = WeakSet(engines)  # models of before, which nobody named
        self._known: WeakSet[Engine] = WeakSet()
        self._ledgers: list[Ledger] = []
        self._most = [0] * (len(STATES) + 1)
        self._count: FlopCount | None = None
        self._counting = False
        self._counted: tuple[int, int] | None = None  # operations, and tokens or rows they were for
        self._summed = 0  # moments of this step that are in the sums and not held any more
        self._full = False  # this step has one
        self._clock: DeviceClock | None = None  # of this step, where the device has one of its own
        self._own = 0.0
        self._closed = False
        facts = {"type": device.type, "name": devices.name(device), "peak_flops": devices.peak_flops(device)}
        first = {
            "kind": "run", "format": FORMAT, **head, "time": began, "states": list(STATES), "device": facts,
            "threads": torch.get_num_threads(), "torch": str(torch.__version__),
        }  # fmt: skip
        file.begin(first)

    # --- what the engine tells -----------------------------------------------------------------
    def phase(self, phase: str, unit: str) -> None:
        now = perf_counter()
        if phase == "forward":
            if not self._pass:
                now = self._pass_begins(now)
            elif self._pass == "step":  # a closure: the step goes on until nothing follows
                self._pass, self._stepped, self._end = "forward", True, now
                self._take_batch()
            if self._pass != "forward":
                phase = EVALUATION if self._pass == EVALUATION else "recompute"
        elif not phase:
            if self._pass == "step" or (self._stepped and self._pass != EVALUATION):
                self._stepped, self._end = True, now
            phase = _AFTER.get(self._pass, OUTSIDE)
            self._pass = ""
        elif phase == "step":
            self._pass = "step"
            self._stop_counting()
        elif phase == "backward":
            self._pass = "backward"
        self._at = phase
        ledgers = self._ledgers
        live = tuple(ledgers[0].live.values()) if len(ledgers) == 1 else self._all_live()
        self._note((now, PHASE, phase, unit, live, threading.get_ident()))

    def start(self, way: str, name: str, nbytes: int, ranks: tuple[int, ...] = ()) -> None:
        self._note((perf_counter(), START, way, name, nbytes, threading.get_ident()))

    def wait(self, way: str, name: str) -> None:
        self._note((perf_counter(), WAIT, way, name, None, threading.get_ident()))

    def waited(self, way: str, name: str) -> None:
        self._note((perf_counter(), WAITED, way, name, None, threading.get_ident()))

    def _note(self, moment: Moment) -> None:
        self._moments.append(moment)
        if self._clock is not None:
            self._clock.note(moment)

    # --- what scripts and doors tell -------------------------------------------------------------
    def tell(self, values: Mapping[str, Any] | None = None, *, loss: Any = None) -> None:
        """Numbers that belong to the step under way, or to the one that has just ended.

        Args:
            values: names and numbers, or tensors of one element; anything else is passed over.
            loss: of one micro-batch of this rank. Several are averaged.

        Tensors are read when the line is written, half a second later at most: nothing is waited for here.
        """
        for name, value in (values or {}).items():
            if _is_number(value):
                self._values[str(name)] = value.detach() if isinstance(value, torch.Tensor) else value
        if _is_number(loss):
            self._losses.append(loss.detach() if isinstance(loss, torch.Tensor) else loss)

    @property
    def awaits_batch(self) -> bool:
        """Is no pass under way? What a model is called with now is a batch."""
        return not self._pass

    @property
    def done(self) -> int:
        """Steps that are over."""
        return self._step - 1 + self._stepped

    def expect(self, engine: Engine) -> None:
        """Write down what the formulas say of a model that has made steps."""
        found = formula(engine, engine.strategy)
        line = {"kind": "expected", "sent": found.sent_per_step, "peak_total": found.peak}
        self._file.add(partial(dict, line))

    def given(self, rows: int | None, tokens: int | None) -> None:
        """A model is about to be given a batch, ``None`` where nobody can tell. Only while one is awaited."""
        self._given = rows, tokens

    def follow(self, engine: Engine) -> None:
        """A model that was there before, and counts."""
        self._others.discard(engine)

    def close(self) -> None:
        """The last step, and the end. Further calls do nothing."""
        if self._closed:
            return
        self._stop_counting()
        self._closed = True
        if self._stepped:
            self._end_step()
        ledgers = self._ledgers
        exact = [*(sum(one.peak[state] for one in ledgers) for state in STATES), sum(one.peak_total for one in ledgers)]
        most = [max(pair) for pair in zip(exact, self._most, strict=True)]  # who reset the ledger's has seen more
        last = {
            "kind": "end", "time": round(perf_counter() - self._zero, 6), "peak": most[:-1], "peak_total": most[-1],
            "recorder_s": round(self._own, 6),
        }  # fmt: skip
        self._file.close(last)

    # --- steps -------------------------------------------------------------------------------------
    def _pass_begins(self, now: float) -> float:
        """A model's forward begins, outside of any pass. Returns the time that counts for it."""
        if not torch.is_grad_enabled():
            self._pass = EVALUATION
            if len(self._moments) > _MOMENTS:
                self._sum_up()
            return now
        self._pass = "forward"
        if self._stepped:
            self._end_step()
            self._own += perf_counter() - now
            now = perf_counter()
        if len(engines) != len(self._ledgers) + len(self._others):
            self._look()
        if not self._begun:
            self._begun = now
            self._sums.restart(now)
            self._moments.clear()
        if len(self._moments) > _MOMENTS:
            self._sum_up()
        self._take_batch()
        if self._wanted and self._step == _COUNTED and self._count is None:
            self._start_counting()
        return now

    def _take_batch(self) -> None:
        self._micro_batches += 1
        if self._given is not None:
            self._rows.append(self._given[0])
            self._tokens.append(self._given[1])
            self._given = None

    def _look(self) -> None:
        """The models that there are now."""
        mine = [engine for engine in engines - self._others if not engine.world.fake]  # a plan's are no run's
        self._ledgers = [engine.ledger for engine in mine]
        for engine in mine:
            if engine in self._known:
                continue
            self._known.add(engine)
            parameters = list(engine.module.parameters())
            line = {
                "kind": "model", "name": type(engine.module).__name__, "strategy": str(engine.strategy),
                "parameters": sum(prod(p.shape) for p in parameters),
                "trainable": sum(prod(p.shape) for p in parameters if p.requires_grad),
                "units": [unit.name for unit in engine.units],
            }  # fmt: skip
            self._file.add(partial(dict, line))

    def _start_counting(self) -> None:
        from shardwise.observe.flops import FlopCount, something_is_compiled

        if not something_is_compiled():
            self._count, self._counting = FlopCount(), True
            self._count.__enter__()

    def _stop_counting(self) -> None:
        if self._count is not None and self._counting:
            self._counting = False
            self._count.__exit__(None, None, None)
            self._counted = self._count.total, known_sum(self._tokens) or known_sum(self._rows) or 0

    def _sum_up(self) -> None:
        """Rather than hold ever more: a step without end, of a script that only evaluates, has no timeline."""
        moments, self._moments = self._moments, []
        self._sums.take(moments)
        self._summed += len(moments)

    def _end_step(self) -> None:
        """The step whose optimizer step is over is written down, and the next one begins where that ended."""
        moments, rest = cut(self._moments, self._end)
        self._moments = rest
        sums, step = self._sums, self._step
        sums.take(moments)
        sums.until(self._end)
        tokens, rows = known_sum(self._tokens), known_sum(self._rows)
        losses, values = self._losses, self._values
        line = {
            "kind": "step", "step": step, "steps": 1, "start": round(self._begun - self._zero, 6),
            "end": round(self._end - self._zero, 6), "seconds": rounded(sums.seconds), "waits": rounded(sums.waits),
            "sent": sums.sent, "micro_batches": self._micro_batches, "rows": rows, "tokens": tokens, "loss": losses,
            "values": values, "live": list(sums.live), "peak": sums.peak,
            "allocated": devices.peak_memory(self._device), "resident": host.resident(),
            "flops": scaled(self._counted, tokens, rows), "counting": step == _COUNTED and self._count is not None,
            "clock": "host", "later": dict,
        }  # fmt: skip
        clock, self._clock = self._clock, None
        if self._full and not self._summed:
            read = partial(list, moments) if clock is None else partial(clock.read, moments)
            self._file.add(lambda: timeline(step, read(), self._zero, _MOMENTS))
            if clock is not None:
                line["later"] = partial(clock.sums, moments, len(STATES))
        self._file.add_step(line)
        self._most = [max(pair) for pair in zip(sums.peak, self._most, strict=True)]
        sums.restart(self._end)
        self._step, self._begun = step + 1, self._end
        self._stepped, self._micro_batches, self._summed = False, 0, 0
        self._rows, self._tokens, self._losses, self._values = [], [], [], {}
        self._look()
        self._full = self._in_full.chosen(step + 1)
        if self._full and self._late and not self._closed:
            self._clock = DeviceClock(self._device)

    def _all_live(self) -> tuple[int, ...]:
        return tuple(sum(ledger.live[state] for ledger in self._ledgers) for state in STATES)


def _is_number(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, torch.Tensor) else isinstance(value, (int, float))
