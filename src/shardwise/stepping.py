"""When gradients are whole: accumulation windows, loss weights, fp16 scaling, and who may step.

A *window* is the micro-batches between two optimizer steps; its last one is the *boundary*. Losses are not
divided in advance, because nobody knows in advance how many micro-batches (or tokens) the window will have.
The gradients are a sum until the boundary's backward, and become the mean right after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import nn

from shardwise import events, operations
from shardwise.comm import World
from shardwise.data_loader import PreparedLoader, Tail
from shardwise.data_loader.watching import watch_all
from shardwise.engine.engine import Engine
from shardwise.engine.hooks import engine_of
from shardwise.engine.join import Join
from shardwise.engine.unit import unit_of
from shardwise.errors import DataError, GradientError

if TYPE_CHECKING:
    from shardwise.accelerator.led import Led
    from shardwise.gradient_state import GradientState
    from shardwise.optimizer import AcceleratedOptimizer


class Steps:
    """The accumulation state of one Accelerator: shared by its optimizers, schedulers and loaders.

    Args:
        length: micro-batches per optimizer step.
        scaler: dynamic loss scaling, for fp16.
        sync_with_dataloader: the end of a dataloader is a boundary, however short the window.
        sync_each_batch: gradients are reduced after every micro-batch.
    """

    _newest: ClassVar[ReferenceType[Steps] | None] = None
    _without: ClassVar[Steps | None] = None  # what is shown while there is no Accelerator

    def __init__(
        self,
        length: int,
        scaler: torch.amp.GradScaler | None,
        sync_with_dataloader: bool = True,
        sync_each_batch: bool = False,
    ) -> None:
        self.length, self.scaler, self.sync_with_dataloader = length, scaler, sync_with_dataloader
        self.sync_each_batch = sync_each_batch
        self.max_norm: float | None = None  # every optimizer step clips to it, where a DeepSpeed plugin says so
        self.models: list[nn.Module] = []
        self.optimizers: list[AcceleratedOptimizer] = []
        self.loaders: list[PreparedLoader] = []  # being read, innermost last
        self._events = count()  # what loaders do, numbered
        self._opened: WeakKeyDictionary[PreparedLoader, int] = WeakKeyDictionary()  # when its iterator was asked for
        self._gave: WeakKeyDictionary[PreparedLoader, int] = WeakKeyDictionary()  # when it gave the batch in hand
        self.schedulers: list[Any] = []
        self.led: Led | None = None
        self.restart()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"loaders": [], "_opened": None, "_gave": None, "_events": None, "led": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _opened=WeakKeyDictionary(), _gave=WeakKeyDictionary(), _events=count())

    def become_newest(self) -> None:
        """From now on, whoever names no Accelerator means this one's."""
        Steps._newest, Steps._without = ref(self), None

    @classmethod
    def newest(cls) -> Steps:
        """Those of the Accelerator that was made last; before the first one, some that all who ask share."""
        found = Steps._newest() if Steps._newest is not None else None
        if found is None:
            found = Steps._without = Steps._without or Steps(1, None)
        return found

    @classmethod
    def forget_newest(cls) -> None:
        Steps._newest = Steps._without = None

    @property
    def gradient_state(self) -> GradientState:
        """The view of it that scripts ask."""
        from shardwise.gradient_state import GradientState

        return GradientState(steps=self)

    def restart(self) -> None:
        """Begin a new window, as if nothing had been accumulated, and let go of what the present one knows."""
        self.sync_gradients = True
        self.micro = 0  # micro-batches of this window so far; 0 until accumulate() was used
        self._batches = 0  # the same, of all ranks together
        self._fresh = True  # no backward yet in this window
        self._block_fresh = True  # no backward yet in this micro-batch
        self._weighted: bool | None = None
        self._weight = 0.0  # this rank's sum of weights in this window
        self._unit = 1.0  # weights are counted in this many items, see _agree_on_unit
        self._unit_known = self.scaler is None
        self._took_part: set[Engine] = set()  # engines with gradients of this window
        self._complete: set[Engine] = set()  # those whose gradients were reduced at the boundary
        self._applied: dict[Engine, float] = {}  # the factor their gradients carry already
        self._loose_applied = 1.0
        if self.scaler is not None:
            self.scaler._per_optimizer_states.clear()  # whose gradients were unscaled
        for optimizer in self.optimizers:
            optimizer.forget_step()

    def drop_gradients(self) -> None:
        """Nobody wants the gradients there are: other values have taken the place of those they belong to."""
        for parameter in self._parameters():
            parameter.grad = None

    # --- dataloaders -----------------------------------------------------------------------
    # What a loader calls, in this order: loader_opens when an iterator is asked for, loader_begins, batch_comes(True)
    # before each batch is handed out, batch_comes(False) when there is none left, loader_ends. After a break:
    # loader_ends only.
    def loader_opens(self, loader: PreparedLoader) -> None:
        self._opened[loader] = next(self._events)

    def loader_begins(self, loader: PreparedLoader) -> None:
        self.loaders.append(loader)

    def batch_comes(self, loader: PreparedLoader, exists: bool) -> None:
        """Inside ``join_uneven_inputs``: a rank whose loader has ended stays here until all ranks' have.

        Args:
            loader: the innermost one that is being read.
            exists: there is a batch, and ``loader.end_of_dataloader`` says already whether it is the last.
        """
        if exists:
            self._gave[loader] = next(self._events)
        join = self.join
        if join is not None:
            if exists:
                join.batch()
            else:
                join.ends()

    def batch_is_done(self, loader: PreparedLoader) -> None:
        """The loader's place is what it was in the loop's body.

        A loop inside that body may be the main process's alone: it evaluates, say.
        """
        if self.led is not None and self.loaders[0] is loader:
            self.led.if_due("the next batch")

    def loader_ends(self, loader: PreparedLoader) -> None:
        self.loaders = [other for other in self.loaders if other is not loader]

    @property
    def join(self) -> Any:
        """The open join_uneven_inputs block of this Accelerator (an :class:`~shardwise.engine.join.Join`), or None."""
        join = World.current().join
        return join if isinstance(join, Join) and getattr(join.loop, "steps", None) is self else None

    @property
    def loader(self) -> PreparedLoader | None:
        return self.loaders[-1] if self.loaders else None

    def tail(self) -> Tail | None:
        """What the ranks hold of the batch in hand, see :meth:`PreparedLoader.tail`; ``None`` outside of a loader.

        Raises:
            DataError: two loaders are read in step, as ``zip`` does, and their batches in hand end differently. Which
                of them a result belongs to, nobody can tell.
        """
        innermost = self.loader
        if innermost is None:
            return None
        mine = _uneven(innermost)
        for loader in self.loaders:
            if self._in_step(loader, innermost) and (other := _uneven(loader)) != mine:
                raise DataError(
                    f"two dataloaders are read at once and end differently: of one the ranks hold {_described(other)}, "
                    f"of the other {_described(mine)}",
                    where="gather_for_metrics",
                    fix="read the loaders one after the other, or one dataset that holds both; or use "
                    "accelerator.gather, which keeps what is repeated",
                )
        return mine

    def _in_step(self, one: PreparedLoader, other: PreparedLoader) -> bool:
        """Has each given a batch since the other was opened? A loop inside a loop's body is opened after its batch."""
        gave, opened = self._gave, self._opened
        return all(a in gave and b in opened and gave[a] > opened[b] for a, b in ((one, other), (other, one)))

    # --- windows ---------------------------------------------------------------------------
    def begin_micro_batch(self, models: Sequence[nn.Module] = ()) -> None:
        """Count one more; the last of ``length``, or of a dataloader, is a boundary.

        Args:
            models: those it is for; all by default.

        Raises:
            GradientError: it leaves out a model of an earlier micro-batch of the window: its gradients would not be
                reduced at the boundary, and its optimizer might never step.
        """
        if self.led is not None:
            self.led.if_due("the next micro-batch")
        fresh, micro = self.sync_gradients, self.micro + 1
        if models and not fresh:
            self._check_same_models(models)
        if fresh:
            micro = 1
        loader, join = self.loader, self.join
        last, ranks = loader is not None and loader.end_of_dataloader, World.current().size
        if join is not None:  # the end of the data is where it has ended on every rank
            join.ready()
            last, ranks = loader is not None and join.at_end(len(self.loaders)), len(join.live)
        sync = micro >= self.length or (self.sync_with_dataloader and last)
        with nullcontext() if join is None else join.event("micro_batch", None, fresh, micro, sync, ranks):
            self.count(fresh, micro, sync, ranks)

    def _check_same_models(self, models: Sequence[nn.Module]) -> None:
        now = [engine_of(m) for m in models]
        left = [engine.module for engine in self._took_part if engine not in now]
        named = {id(p) for model in models for p in model.parameters()} if left else set()
        missing = [m for m in left if not any(id(p) in named for p in m.parameters())]  # nor a part, nor a whole of it
        if missing:
            names, others = (", ".join(dict.fromkeys(type(m).__name__ for m in some)) for some in (models, missing))
            raise GradientError(
                f"accumulate({names}) in the middle of a window, which has gradients of {others} already: they would "
                f"not be what the optimizer expects when it ends, after {self.length} micro-batches of all models",
                fix="name all models of one loop, 'with accelerator.accumulate(a, b):' around all their backwards; or "
                "give each an Accelerator of its own",
            )

    def count(self, fresh: bool, micro: int, sync: bool, ranks: int) -> None:
        """Begin micro-batch ``micro`` of a window, a ``fresh`` one or the present one, on so many ranks."""
        if fresh:
            self._fresh, self._weighted, self._weight, self._batches = True, None, 0.0, 0
            self._took_part.clear()
            self._complete.clear()
            self._applied.clear()
            self._loose_applied = 1.0
        self.micro, self.sync_gradients, self._block_fresh = micro, sync, True
        self._batches += ranks

    def may_zero(self) -> bool:
        """May ``zero_grad()`` clear? What a finished window left, always; what this one has gathered, never."""
        if not self.sync_gradients:  # said by the script, if accumulate() does not count
            return self._fresh and self.micro > 0
        return self.micro <= 1 or not self._block_fresh

    def backward(self, loss: torch.Tensor, weight: float | None, **kwargs: Any) -> None:
        if weight is not None and (weight < 0 or not math.isfinite(weight)):
            raise GradientError(f"weight={weight} is not a number of items", fix="give 0 or more")
        if self.micro == 0:
            # Outside accumulate(), gradients add up as they always do, so the mean has to be in the loss.
            join, size = self.join, World.current().size
            factor = 1.0 / self.length
            if join is not None:
                join.ready()
                factor *= size / len(join.live)  # the mean over those who have a batch
            if weight is not None:
                total = operations.total(weight)
                factor = weight * size / total if total else 0.0
            self._run(loss, factor, kwargs, weight)
            return
        if not self._fresh and (weight is not None) != self._weighted:
            raise GradientError(
                "weighted and unweighted losses meet in one optimizer step",
                fix="pass weight= to every backward() of the step, or to none",
            )
        self._weighted = weight is not None
        if weight is not None:
            self._agree_on_unit(weight)
            self._weight += weight
        self._unapply()
        self._fresh = self._block_fresh = False
        before = {engine: engine.backward_id for engine in self.engines()}
        self._run(loss, 1.0 if weight is None else weight / self._unit, kwargs, weight)
        now = {engine for engine, last in before.items() if engine.backward_id != last}
        self._took_part |= now
        if self.sync_gradients:
            # Not yet those whose last backward was under no_sync: a later loss of this micro-batch will reduce them.
            self._complete |= {engine for engine in now if engine.sync or engine.local}
            self._apply()

    def _run(self, loss: torch.Tensor, factor: float, kwargs: dict[str, Any], weight: float | None) -> None:
        if factor != 1.0:
            loss = loss * factor
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        # The mean over no items is 0/0. This rank still takes part in the backward's collectives, with zeros.
        zeroed = [p for p in self._parameters() if p.requires_grad] if weight == 0 else []
        zeroing = [p.register_hook(torch.zeros_like) for p in zeroed]
        try:
            loss.backward(**kwargs)
        except Exception as error:
            events.failing(error)
            raise
        finally:
            for handle in zeroing:
                handle.remove()

    def _agree_on_unit(self, weight: float) -> None:
        # fp16 gradients of a loss times thousands of tokens would overflow. Counting weights in units of about one
        # micro-batch's avoids it, and a power of two costs no bit. Agreed upon once: the first time there are items.
        if not self._unit_known:
            most = operations.largest(weight)
            if most > 0:
                self._unit, self._unit_known = 2.0 ** math.floor(math.log2(most)), True

    # --- from the sum to the mean ------------------------------------------------------------
    def _factor(self) -> float:
        if not self._weighted:
            return World.current().size / max(self._batches, 1)
        total = self._total_weight()
        # The engine has divided by the ranks; a window without items has zeros, and keeps them.
        return self._unit * World.current().size / total if total else 1.0

    def _total_weight(self) -> float:
        if any(engine.local for engine in self.engines()):  # LocalSGD: the mean over this rank's own
            return self._weight * World.current().size
        join = self.join
        if join is None or not join.has_followers:
            return operations.total(self._weight)
        with join.event("weigh"):  # ranks that have no data any more had some when this window began
            return join.total(self._weight)

    def _apply(self) -> None:
        factor = self._factor()
        for engine in self._complete:
            engine.scale_grads(factor)
            self._applied[engine] = factor
        self._scale_loose(factor)
        self._loose_applied = factor

    def _unapply(self) -> None:
        """Another backward in the boundary's micro-batch (a second loss) adds to the sum, not to the mean."""
        for engine, factor in self._applied.items():
            engine.scale_grads(1.0 / factor)
        self._applied.clear()
        self._scale_loose(1.0 / self._loose_applied)
        self._loose_applied = 1.0

    def settle(self) -> None:
        """Before gradients are used: all of this window's are means.

        Raises:
            GradientError: some have not been reduced yet (their last backward ran under ``no_sync``).
        """
        if self.micro and not self._fresh and (missing := [e for e in self._took_part if e not in self._applied]):
            factor = self._factor()
            for engine in missing:
                engine.scale_grads(factor)
                self._applied[engine] = factor

    def _scale_loose(self, factor: float) -> None:
        """Parameters that an optimizer holds but no engine: plain gradients of this rank."""
        if factor == 1.0:
            return
        loose = {id(p): p for o in self.optimizers for p in o.parameters() if unit_of(p) is None}
        grads = [p.grad for p in loose.values() if p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, factor)

    # --- what there is -----------------------------------------------------------------------
    def engines(self) -> list[Engine]:
        return [engine for model in self.models if (engine := engine_of(model)) is not None]

    def _parameters(self) -> Iterable[nn.Parameter]:
        found = {id(p): p for model in self.models for p in model.parameters()}
        found |= {id(p): p for o in self.optimizers for p in o.parameters()}
        return found.values()

    # --- fp16 --------------------------------------------------------------------------------
    def unscale(self, params: Iterable[nn.Parameter]) -> None:
        """Take the loss scale out of the gradients of the optimizers that hold one of ``params``."""
        wanted = {id(p) for p in params}
        for optimizer in self.optimizers:
            if any(id(p) in wanted for p in optimizer.parameters()):
                optimizer.unscale()

    def update_scale(self) -> None:
        """Adapt the scale, once no optimizer still holds gradients of the old one."""
        assert self.scaler is not None
        waiting = [o for o in self.optimizers if not o.stepped and any(p.grad is not None for p in o.parameters())]
        if not waiting:
            self.renew(None)

    def renew(self, scale: float | None) -> None:
        assert self.scaler is not None
        join = self.join
        with nullcontext() if join is None else join.event("renew", None, scale):
            if any(o.checked for o in self.optimizers):
                self.scaler.update(scale)
            for optimizer in self.optimizers:
                optimizer.checked = optimizer.stepped = False


watch_all(Steps.newest)


def _uneven(loader: PreparedLoader) -> Tail | None:
    tail = loader.tail()
    return tail if tail is not None and tail.cuts else None


def _described(tail: Tail | None) -> str:
    if tail is None:
        return "equal batches"
    return f"{list(tail.rows)} samples with {list(tail.repeated)} repeated"
