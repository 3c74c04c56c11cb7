"""The optimizer that :meth:`shardwise.Accelerator.prepare` returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise import operations
from shardwise.comm import World
from shardwise.engine.clip import clip_grad_norm_
from shardwise.engine.optimizer import attach
from shardwise.engine.unit import unit_of
from shardwise.errors import OptimizerError
from shardwise.stepping import Steps

if TYPE_CHECKING:
    from shardwise.gradient_state import GradientState


class AcceleratedOptimizer(Optimizer):
    """A torch optimizer that steps at window boundaries only, and under fp16 only on finite gradients.

    Everything else (``param_groups``, ``state``, ``state_dict``, hooks, ...) is the inner optimizer's.

    Made by :meth:`shardwise.Accelerator.prepare`; or by hand, for the Accelerator that was made last.

    Args:
        optimizer: the inner one.
        device_placement: its momenta go where its parameters are.
        scaler: the Accelerator's own, if it is named at all.
        steps: its Accelerator's state; by default that of the Accelerator that was made last.

    Raises:
        OptimizerError: another scaler than the Accelerator's.
    """

    def __init__(
        self, optimizer: Optimizer, device_placement: bool = True, scaler: Any = None, *, steps: Steps | None = None
    ) -> None:
        # Optimizer.__init__ is left out on purpose: it would make groups, state and step hooks of its own.
        self.optimizer = optimizer
        self.device_placement = device_placement
        self._steps = Steps.newest() if steps is None else steps
        if scaler is not None and scaler is not self._steps.scaler:
            raise OptimizerError(
                "a loss scaler of its own, where losses are scaled by the Accelerator",
                where=f"AcceleratedOptimizer({type(optimizer).__name__})",
                fix="pass scaler=accelerator.scaler, or leave it out; GradScalerKwargs sets what it does",
            )
        if device_placement:
            _state_to_parameters(optimizer)
        if steps is None:
            attach(optimizer)
        self.steps_taken = 0  # at boundaries, and not skipped
        self.forget_step()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_steps"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _steps=Steps.newest())

    @property
    def scaler(self) -> Any:
        """The Accelerator's loss scaling, under fp16."""
        return self._steps.scaler

    @property
    def gradient_state(self) -> GradientState:
        """Where its Accelerator is in the accumulation window."""
        return self._steps.gradient_state

    def forget_step(self) -> None:
        """Nothing is known of gradients, nor of a step that was taken with them."""
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
                loss = self.optimizer.step(closure)
            else:
                steps.settle()
                self._skipped = not self._ready()
                if self._skipped:
                    return None
                loss = self.optimizer.step()
            self.steps_taken += 1
            return loss
        if closure is not None:
            raise OptimizerError("fp16 loss scaling cannot see inside a closure", fix="use bf16, or leave it out")
        self._skipped = self.unscale() or not self._ready()
        if not self._skipped:
            self.optimizer.step()
            self.steps_taken += 1
        self.stepped = True
        steps.update_scale()
        return None

    def _ready(self) -> bool:
        """Prepare the means for the step; may say, alike on all ranks, that it is not to be taken.

        Here: what a DeepSpeed configuration's ``gradient_clipping`` asked for, where the engine clips, not the loop.
        """
        if self._steps.max_norm is not None:
            clip_grad_norm_(list(self.parameters()), self._steps.max_norm)
        return True

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
            self.take_scale_out()
            if World.current().size > 1 and any(unit_of(p) is None for p in self.parameters()):
                for found in scaler._found_inf_per_device(self.optimizer).values():
                    found.fill_(operations.largest(float(found)))
        return any(bool(found) for found in scaler._found_inf_per_device(self.optimizer).values())

    def take_scale_out(self) -> None:
        """Unscale, and ask all ranks about overflows. Ranks that have run out of data do the same."""
        steps, join = self._steps, self._steps.join
        assert steps.scaler is not None
        with nullcontext() if join is None else join.event("unscale", None, steps.optimizers.index(self)):
            steps.scaler.unscale_(self.optimizer)
            self.checked = True


def _state_to_parameters(optimizer: Optimizer) -> None:
    """Momenta of a resumed run follow their parameters to the device (0-dim counters stay where they are)."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            # Not optimizer.state.get: it refuses parameters of which this rank holds pieces, and those are in place.
            state = dict.get(optimizer.state, p, {})
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.ndim > 0:
                    state[key] = value.to(p.device)
