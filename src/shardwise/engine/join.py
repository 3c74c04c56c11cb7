"""Ranks whose data ends earlier than that of others: they follow, until nobody has data left.

::

    rank 0:  batch · batch · batch · batch · end
    rank 1:  batch · end, follows ............ goes on with rank 0
    rank 2:  end, follows .................... goes on with rank 0

A rank that *follows* stands inside its dataloader (or at the end of the block) and does, unit by unit, what the others
ask of it: it lends its shards to their gathers, adds zeros to their reduces, steps the pieces it holds. No module
of the user's runs on it. The lowest rank that still has data *leads*: before anything that needs all ranks it sends
one small message to those who follow, and they do the same thing. The other ranks with data say nothing: they meet the
followers in the collectives, exactly as they meet the leader.

Who has data is found out in *rounds*, one small all-gather. A rank announces its batch at the first thing it does
with it that needs the others, so a batch that is skipped costs nothing and breaks nothing. Each rank comes to a round
with a level:

=============================  =================================================
it has a batch                 ``BATCH``, plus how many dataloaders are being read, one inside the other; or the
                               part of the model that it is about to run, where there are no dataloaders
a dataloader has ended         how deep that one is nested, 1 is the outermost
the block has ended            0
=============================  =================================================

Ranks on the highest level are *live*, the others follow. So ranks leave a dataloader together, whatever its lengths,
and code behind the loop finds all of them there.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from shardwise.comm import World
from shardwise.comm.stats import Op
from shardwise.engine import follower
from shardwise.engine.channel import Channel
from shardwise.engine.commands import Command
from shardwise.engine.engine import Engine
from shardwise.engine.gradmask import mask
from shardwise.engine.unit import unit_of
from shardwise.errors import CommError, OptimizerError, UnitError

BATCH = 1 << 16
_ROUND = Op("join", "the question who has data left", 6)  # see channel.py
_LIVE = Op("collective", "the ranks with data", 7)

_ROUND_BEGINS = "round"
_C = Command
_USES_GRADS = {_C.BACKWARD, _C.SCALE, _C.NORMS, _C.MULTIPLY, _C.CLAMP, _C.STEP}
_CHANGES_GRADS = {_C.BACKWARD_ENDS, _C.SCALE, _C.MULTIPLY, _C.CLAMP, "unscale", _C.STEP, _C.ABANDON}


class Loop(Protocol):
    """What a Join asks of whoever counts micro-batches and knows the open dataloaders."""

    steps: Any  # whose micro-batches these are
    parts: bool  # there are no dataloaders, and ranks may run different parts of a model

    @property
    def depth(self) -> int:
        """How many dataloaders are being read, one inside the other."""

    @property
    def at_end(self) -> bool:
        """The batch in hand is its dataloader's last."""

    def shared(self) -> Any:
        """State that must be equal on all ranks, picklable."""

    def take(self, state: Any) -> None:
        """Make :meth:`shared` of another rank this one's."""

    def rules(self) -> dict[str, Callable[..., None]]:
        """What a follower does for events that are the loop's own."""


class Join:
    """Let ranks whose data has ended take part in what the others do. A context manager, entered by all ranks.

    Args:
        world: its ranks.
        engines: the models that may be used inside, in an order that all ranks share.
        optimizers: those that may step inside, in such an order.
        loop: who counts micro-batches.

    Attributes:
        live: the ranks that have data (or have all left a dataloader or the block), ascending.
        leader: the lowest of them.
        following: this rank is doing what the leader asks.

    Raises:
        CommError: ranks read different dataloaders; a collective that those who follow cannot take part in.

    Cost: one all-gather of 16 bytes per batch. Once a rank has ended: one message of 256 bytes to each follower per
    gather, reduce, step and so on. Outside of the block: one look at an attribute.
    """

    def __init__(self, world: World, engines: Sequence[Engine], optimizers: Sequence[Optimizer], loop: Loop) -> None:
        self.world, self.engines, self.optimizers, self.loop = world, list(engines), list(optimizers), loop
        self.group = engines[0].mesh.control if engines else world.control_group(600.0)
        self.live = list(range(world.size))
        self.leader, self.following = 0, False
        self._level = BATCH
        self._pending: tuple[int, bool] | None = None  # a batch that nobody knows of: its depth, is it the last
        self._depth = 0  # inside how many events
        self._last: dict[int, bool] = {}  # per depth of dataloaders: the batch in hand is the last on every rank
        self._rules: dict[Any, Callable[..., None]] = {**follower.RULES, **loop.rules()}
        self._channel = Channel(self.group)
        self._groups_sent: dict[int, bytes] = {}  # per optimizer: the settings that followers have
        self._versions: dict[int, int] = {}  # per bucket with whole gradients: what followers have
        self._author = 0  # leader of the last round in which somebody had a batch
        self._equal = True  # buffers are those of the author everywhere

    # --- the block ---------------------------------------------------------------------------
    def __enter__(self) -> Join:
        self.world.join = self
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self._pending = None
                self._round(0)
                self._equalise(self._author)
                self._channel.flush()
        finally:
            self.world.join = None

    def include(self, engines: Sequence[Engine]) -> None:
        """A block inside the block: its models take part too, and ranks are told apart by the outer one."""
        new = [e for e in engines if e not in self.engines]
        if new and self.has_followers:
            raise UnitError(
                f"rank {self._absent()} has no data left and does not enter this block",
                where=f"rank {self.world.rank}, inside join_uneven_inputs",
                fix="list all models in the outer join_uneven_inputs([...])",
            )
        self.engines += new

    # --- who has data ------------------------------------------------------------------------
    def batch(self) -> None:
        """This rank has a batch. The others hear of it when it does something with it that needs them."""
        if not self.following:
            self._outer()
            self._pending = self.loop.depth, self.loop.at_end

    def ends(self) -> None:
        """The innermost dataloader has ended here. Returns when it has on every rank; until then, follows."""
        self._outer()
        self._pending = None
        self._round(self.loop.depth)

    def _outer(self) -> None:
        """A dataloader inside another one: first, the batch of the outer one."""
        if self._pending is not None and self._pending[0] < self.loop.depth:
            self.ready()

    def ready(self) -> None:
        """If this rank's batch is new, hear what the others have."""
        if self._pending is not None and not self._depth and not self.following:
            (depth, last), self._pending = self._pending, None
            self._round(BATCH + depth, last)

    def forward(self, part: int = 0) -> None:
        """A model, or that part of it, is about to run. Outside of any dataloader, that shows that this rank has data.

        Ranks that are about to run another part than others follow them first.
        """
        if not self.loop.depth and not self.following:
            self._pending = part, self.loop.at_end

    def at_end(self, depth: int) -> bool:
        """Have all ranks their last batch of the dataloader ``depth`` deep in hand, or ended it?"""
        return self._last.get(depth, False)

    @property
    def has_followers(self) -> bool:
        """Some ranks follow."""
        return len(self.live) < self.world.size

    def _round(self, level: int, last: bool = False) -> None:
        if self.has_followers and self.world.rank == self.leader:
            self._send_changed()
            summaries = [e.summary() for e in self.engines]
            self._tell(_ROUND_BEGINS, None, (summaries, self.settings(), self.loop.shared()))
        self._agree(level, last)
        if self.world.rank not in self.live:
            self._follow()

    def _agree(self, level: int, last: bool = False) -> None:
        self._level = level
        world, rank = self.world, self.world.rank
        rows = torch.zeros(world.size, 2, dtype=torch.int64)
        rows[rank] = torch.tensor([level, last])
        with _Inside(self, "round"):
            self.group.all_gather(rows.view(-1), _ROUND).wait()
        levels, ends = rows[:, 0].tolist(), rows[:, 1].tolist()
        top = max(levels)
        live = [r for r in range(world.size) if levels[r] == top]
        odd = [r for r in range(world.size) if BATCH <= levels[r] < top]
        if odd and not self.loop.parts:
            raise CommError(
                f"rank {live[0]} reads {top - BATCH} dataloaders, one inside the other, and rank {odd[0]} "
                f"{levels[odd[0]] - BATCH}",
                where=f"rank {rank}, inside join_uneven_inputs",
                fix="make every rank read the same dataloaders in the same order",
            )
        before, self.live, author = self.live, live, self._author
        if top >= BATCH:
            self._last[top - BATCH] = all(ends[r] for r in live)
            self._author, self._equal = live[0], False
        if set(live) - set(before):
            self._meet(author)
        self.leader = live[0]
        if set(before) - set(live):
            self._groups_sent.clear()
        self._note()

    def _meet(self, author: int) -> None:
        """Ranks that followed go on with the others: from here on all do the same again."""
        for engine in self.engines:
            engine.rest()
        self._equalise(author)

    def _equalise(self, author: int) -> None:
        """The author's buffers for everyone."""
        if not self._equal:
            with _Inside(self, "buffers"):
                for engine in self.engines:
                    if engine.strategy.broadcast_buffers:
                        engine.send_buffers(author)
            self._equal = True

    # --- leading -----------------------------------------------------------------------------
    def event(self, kind: Hashable, engine: Engine | None = None, *args: Any) -> _Inside:
        """About to do what needs all ranks: tell those who follow. A context manager around doing it.

        Args:
            kind: a key of the followers' rules.
            engine: whose unit, gradients or backward.
            args: for the rule; callables are called when there is somebody to tell.
        """
        if not self._depth and not self.following:
            self.ready()
            if self.has_followers and self.world.rank == self.leader:
                if kind in _USES_GRADS:
                    self._send_changed()
                self._tell(kind, engine, tuple(a() if callable(a) else a for a in args))
        return _Inside(self, kind)

    def step(self, optimizer: Optimizer) -> None:
        """``optimizer`` is about to step."""
        if self._depth or self.following:
            return
        self.ready()
        if not self.has_followers:
            return
        index = next((k for k, known in enumerate(self.optimizers) if known is optimizer), None)
        if index is None:
            raise OptimizerError(
                f"rank {self._absent()} has no data left and does not know this {type(optimizer).__name__}, so it "
                "cannot step the pieces it holds",
                where=f"rank {self.world.rank}, inside join_uneven_inputs",
                fix="prepare the optimizer before the block: optimizer = accelerator.prepare(optimizer), or "
                "shardwise.attach(optimizer) in a loop of your own",
            )
        engines = [k for k, e in enumerate(self.engines) if follower.holds(e, optimizer)]
        masks = [(k, mask(self.engines[k].units)) for k in engines]
        self.event(Command.STEP, None, index, masks, lambda: self.settings(index).get(index))

    def told_already(self) -> _Inside:
        """Around what belongs to an event that was told before."""
        return _Inside(self, "")

    def allow(self, op: Op) -> None:
        """Called before any collective: may it be, or do those who follow know nothing of it?"""
        if self._depth or self.following:
            return
        self.ready()
        if self.has_followers:
            raise CommError(
                f"{op} needs rank {self._absent()}, which has no data left and waits for the others",
                where=f"rank {self.world.rank}, inside join_uneven_inputs",
                fix="do it behind the loop over the data: there all ranks are together again",
            )

    @property
    def _followers(self) -> list[int]:
        return [r for r in range(self.world.size) if r not in self.live]

    def _absent(self) -> int:
        return self._followers[0]

    def _tell(self, kind: Hashable, engine: Engine | None, args: tuple[Any, ...]) -> None:
        self._channel.tell((kind, None if engine is None else self._index(engine), args), self._followers)

    def _index(self, engine: Engine) -> int:
        for k, known in enumerate(self.engines):
            if known is engine:
                return k
        raise UnitError(
            f"rank {self._absent()} has no data left and cannot take part in {type(engine.module).__name__}",
            where=f"rank {self.world.rank}, inside join_uneven_inputs",
            fix="prepare the model before the block, or list it in join_uneven_inputs([...])",
        )

    def settings(self, only: int | None = None) -> dict[int, Any]:
        """Learning rates and other settings of the optimizers that followers do not have yet."""
        out = {}
        for k, optimizer in enumerate(self.optimizers):
            if only not in (None, k):
                continue
            groups = [{key: v for key, v in g.items() if key != "params"} for g in optimizer.param_groups]
            data = pickle.dumps(groups)
            if self._groups_sent.get(k) != data:
                self._groups_sent[k] = data
                out[k] = groups
        return out

    def take_settings(self, settings: dict[int, Any]) -> None:
        """Give the optimizers the :meth:`settings` of another rank."""
        follower.take_settings(self.optimizers, settings)

    def addresses(self, params: Sequence[Any]) -> Callable[[], Any]:
        """For an event: where the engines' parameters among ``params`` are; those of nobody are left out."""

        def found() -> list[tuple[int, int, int]]:
            out = []
            for p in params:
                unit = unit_of(p)
                if unit is not None:
                    slot = next(k for k, s in enumerate(unit.slots) if s.param is p)
                    out.append((self._index(unit.upward), unit.index, slot))  # type: ignore[arg-type]
            return out

        return found

    def params(self, addresses: Sequence[tuple[int, int, int]]) -> list[Any]:
        return [self.engines[e].units[u].slots[s].param for e, u, s in addresses]

    # --- gradients that were changed by hand -----------------------------------------------------
    # Where a rank keeps whole gradients, p.grad is a plain tensor and the script may do with it what it likes.
    def _note(self) -> None:
        if self.has_followers and not self.following:
            for engine in self.engines:
                for bucket in follower.whole(engine):
                    self._versions[id(bucket)] = -1 if bucket.grads.reduced is None else bucket.grads.reduced._version

    def _send_changed(self) -> None:
        for engine in self.engines:
            if engine.passes.backward:
                continue
            for place, bucket in enumerate(follower.whole(engine)):
                follower.adopt(bucket)
                grad = bucket.grads.reduced
                if grad is None or bucket.grads.raw is grad or grad._version == self._versions.get(id(bucket), -1):
                    continue
                self._versions[id(bucket)] = grad._version
                self._tell(Command.GRADS, engine, (place,))
                self._channel.send(grad.detach().to("cpu", copy=True).view(torch.uint8), self._followers)

    def take_grads(self, engine: Engine, place: int) -> None:
        """A follower's side of it."""
        bucket = follower.whole(engine)[place]
        grad = bucket.grads.open()
        data = torch.empty(grad.numel(), dtype=grad.dtype)
        self._channel.receive(data.view(torch.uint8), self.leader)
        grad.copy_(data)

    # --- following ---------------------------------------------------------------------------
    def _follow(self) -> None:
        self._channel.flush()
        self.following = True
        try:
            for engine in self.engines:
                engine.rest()
            with torch.inference_mode(False), torch.no_grad():
                while self.world.rank not in self.live:
                    kind, index, args = self._channel.hear(self.leader)
                    if kind == _ROUND_BEGINS:
                        summaries, settings, state = args
                        for k, summary in enumerate(summaries):
                            self.engines[k].take_summary(summary)
                        self.take_settings(settings)
                        self.loop.take(state)
                        self._agree(self._level)
                    elif kind is Command.GRADS:
                        self.take_grads(self.engines[index], *args)
                    elif index is not None:
                        self.engines[index].execute(kind, *args)
                    else:
                        self._rules[kind](self, *args)
        finally:
            self.following = False

    # --- numbers of the live ranks -------------------------------------------------------------
    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """One tensor from every live rank, in rank order, over the host. A follower's own, on a follower."""
        if self.following:
            return [tensor]
        mine = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
        parts = {r: torch.empty_like(mine) for r in self.live if r != self.world.rank}
        if parts and mine.numel():
            works = self.group.exchange([(mine, r) for r in parts], [(t, r) for r, t in parts.items()], _LIVE)
            self.group.wait(works, _LIVE)
        parts[self.world.rank] = mine.clone()
        return [parts[r].view(tensor.dtype).view(tensor.shape).to(tensor.device) for r in self.live]

    def total(self, value: float) -> float:
        """The sum over all ranks, those who follow too (their rule calls this with a value of their own)."""
        rows = torch.zeros(self.world.size, dtype=torch.float64)
        rows[self.world.rank] = value
        with _Inside(self, "total"):
            self.group.all_gather(rows, _ROUND).wait()
        return float(sum(rows.tolist()))


class _Inside:
    """Within an event: what it does needs no telling of its own."""

    __slots__ = ("join", "kind")

    def __init__(self, join: Join, kind: Hashable) -> None:
        self.join, self.kind = join, kind

    def __enter__(self) -> None:
        self.join._depth += 1

    def __exit__(self, *_: Any) -> None:
        join = self.join
        join._depth -= 1
        if not join._depth and self.kind in _CHANGES_GRADS:
            join._note()
