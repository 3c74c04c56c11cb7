"""When gradients are whole: accumulation windows, loss weights, fp16 scaling, and who may step.

A *window* is the micro-batches between two optimizer steps; its last one is the *boundary*. Losses are not
divided in advance, because nobody knows in advance how many micro-batches (or tokens) the window will have.
The gradients are a sum until the boundary's backward, and become the mean right after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise import operations
from shardwise.comm import World
from shardwise.data import ShardedLoader
from shardwise.engine.build import engine_of
from shardwise.engine.optimizer import unit_of
from shardwise.engine.schedule import Engine
from shardwise.errors import GradientError, OptimizerError


class Steps:
    """The accumulation state of one Accelerator: shared by its optimizers, schedulers and loaders.

    Args:
        length: micro-batches per optimizer step.
        scaler: dynamic loss scaling, for fp16.
    """

    def __init__(self, length: int, scaler: torch.amp.GradScaler | None) -> None:
        self.length, self.scaler = length, scaler
        self.sync_gradients = True
        self.models: list[nn.Module] = []
        self.optimizers: list[AcceleratedOptimizer] = []
        self.loaders: list[ShardedLoader] = []  # being read, innermost last
        self.micro = 0  # micro-batches of this window so far; 0 until accumulate() was used
        self._fresh = True  # no backward yet in this window
        self._block_fresh = True  # no backward yet in this micro-batch
        self._weighted: bool | None = None
        self._weight = 0.0  # this rank's sum of weights in this window
        self._unit = 1.0  # weights are counted in this many items, see _agree_on_unit
        self._unit_known = scaler is None
        self._took_part: set[Engine] = set()  # engines with gradients of this window
        self._complete: set[Engine] = set()  # those whose gradients were reduced at the boundary
        self._applied: dict[Engine, float] = {}  # the factor their gradients carry already
        self._loose_applied = 1.0

    # --- dataloaders -----------------------------------------------------------------------
    def loader_begins(self, loader: ShardedLoader) -> None:
        self.loaders.append(loader)

    def loader_ends(self, loader: ShardedLoader) -> None:
        self.loaders = [other for other in self.loaders if other is not loader]

    @property
    def loader(self) -> ShardedLoader | None:
        return self.loaders[-1] if self.loaders else None

    # --- windows ---------------------------------------------------------------------------
    def begin_micro_batch(self) -> None:
        """Count one more; the last of ``length``, or of a dataloader, is a boundary."""
        if self.sync_gradients:
            self.micro = 0
            self._fresh, self._weighted, self._weight = True, None, 0.0
            self._took_part.clear()
            self._complete.clear()
            self._applied.clear()
            self._loose_applied = 1.0
        self.micro += 1
        self._block_fresh = True
        loader = self.loader
        self.sync_gradients = self.micro >= self.length or (loader is not None and loader.end_of_dataloader)

    def may_zero(self) -> bool:
        """May ``zero_grad()`` clear? What a finished window left, always; what this one has gathered, never."""
        if not self.sync_gradients:
            return self._fresh
        return self.micro <= 1 or not self._block_fresh

    def backward(self, loss: torch.Tensor, weight: float | None, **kwargs: Any) -> None:
        if weight is not None and (weight < 0 or not math.isfinite(weight)):
            raise GradientError(f"weight={weight} is not a number of items", fix="give 0 or more")
        if self.micro == 0:
            # Outside accumulate(), gradients add up as they always do, so the mean has to be in the loss.
            factor = 1.0 / self.length
            if weight is not None:
                total = operations.total(weight)
                factor = weight * World.current().size / total if total else 0.0
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
            self._complete |= {engine for engine in now if engine.sync}
            self._apply()

    def _run(self, loss: torch.Tensor, factor: float, kwargs: dict[str, Any], weight: float | None) -> None:
        if factor != 1.0:
            loss = loss * factor
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        if weight == 0:
            # The mean over no items is 0/0. This rank still takes part in the backward's collectives, with zeros.
            zeroing = [p.register_hook(torch.zeros_like) for p in self._parameters() if p.requires_grad]
            try:
                loss.backward(**kwargs)
            finally:
                for handle in zeroing:
                    handle.remove()
        else:
            loss.backward(**kwargs)

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
            return 1.0 / max(self.micro, 1)
        total = operations.total(self._weight)
        # The engine has divided by the ranks; a window without items has zeros, and keeps them.
        return self._unit * World.current().size / total if total else 1.0

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
        loose = {id(p): p for o in self.optimizers for p in o.parameters() if unit_of(p) is None}
        grads = [p.grad for p in loose.values() if p.grad is not None]
        if factor != 1.0 and grads:
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
        if any(o.checked for o in self.optimizers):
            self.scaler.update(scale)
        for optimizer in self.optimizers:
            optimizer.checked = optimizer.stepped = False


class AcceleratedOptimizer(Optimizer):
    """A torch optimizer that steps at window boundaries only, and under fp16 only on finite gradients.

    Everything else (``param_groups``, ``state``, ``state_dict``, hooks, ...) is the inner optimizer's.

    Args:
        optimizer: the inner one.
        steps: its Accelerator's state.
    """

    def __init__(self, optimizer: Optimizer, steps: Steps) -> None:
        # Optimizer.__init__ is left out on purpose: it would make groups, state and step hooks of its own.
        self.optimizer = optimizer
        self._steps = steps
        self._skipped = False
        self.checked = False  # gradients are unscaled, and known to be finite or not
        self.stepped = False  # since the scale last changed

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not set yet: while being unpickled
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def parameters(self) -> Iterator[nn.Parameter]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def train(self) -> None:
        """For schedule-free optimizers: the inner optimizer's ``train()``, if it has one."""
        if callable(change := getattr(self.optimizer, "train", None)):
            change()

    def eval(self) -> None:
        """For schedule-free optimizers: the inner optimizer's ``eval()``, if it has one."""
        if callable(change := getattr(self.optimizer, "eval", None)):
            change()

    @property
    def step_was_skipped(self) -> bool:
        """The last ``step()`` at a boundary met gradients that overflowed fp16 on some rank, and did nothing."""
        return self._skipped

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients that a finished window left. Those that are being accumulated stay."""
        steps = self._steps
        if not steps.may_zero():
            return
        self.optimizer.zero_grad(set_to_none=set_to_none)
        if self.checked and not self.stepped:  # unscaled, then thrown away: what was found out counts all the same
            self.stepped = True
            steps.update_scale()

    def step(self, closure: Any = None) -> Any:
        """One optimizer step at a boundary; elsewhere nothing.

        Raises:
            GradientError: the boundary's gradients were not reduced over the ranks.
            OptimizerError: a closure under fp16.
        """
        steps = self._steps
        if not steps.sync_gradients:
            return None
        if steps.scaler is None:
            if closure is not None:
                return self.optimizer.step(closure)
            steps.settle()
            return self.optimizer.step()
        if closure is not None:
            raise OptimizerError("fp16 loss scaling cannot see inside a closure", fix="use bf16, or leave it out")
        overflow = self.unscale()
        self._skipped = overflow
        if not overflow:
            self.optimizer.step()
        self.stepped = True
        steps.update_scale()
        return None

    def unscale(self) -> bool:
        """Take the loss scale out, once per step; tells whether any rank's gradients overflowed."""
        steps = self._steps
        scaler = steps.scaler
        assert scaler is not None
        steps.settle()
        if self.stepped:  # again, while another optimizer's gradients still carry the scale: keep it
            steps.renew(scaler.get_scale())
        if all(p.grad is None for p in self.parameters()):
            return False
        if not self.checked:
            scaler.unscale_(self.optimizer)
            self.checked = True
            if World.current().size > 1 and any(unit_of(p) is None for p in self.parameters()):
                for found in scaler._found_inf_per_device(self.optimizer).values():
                    found.fill_(operations.largest(float(found)))
        return any(bool(found) for found in scaler._found_inf_per_device(self.optimizer).values())


class AcceleratedScheduler:
    """A learning-rate scheduler that steps once per optimizer step that took place.

    Once, however many ranks there are: write schedules in optimizer steps.

    Args:
        scheduler: the inner one; everything but ``step`` is its own.
        optimizers: whose steps to follow.
        steps: their Accelerator's state.
        step_with_optimizer: if false, ``step()`` always steps.
    """

    def __init__(
        self, scheduler: Any, optimizers: list[AcceleratedOptimizer], steps: Steps, step_with_optimizer: bool = True
    ) -> None:
        self.scheduler, self.optimizers, self._steps = scheduler, optimizers, steps
        self.step_with_optimizer = step_with_optimizer

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step at a boundary, unless fp16 skipped the optimizer's step."""
        idle = not self._steps.sync_gradients or any(o.step_was_skipped for o in self.optimizers)
        if not (self.step_with_optimizer and idle):
            self.scheduler.step(*args, **kwargs)
