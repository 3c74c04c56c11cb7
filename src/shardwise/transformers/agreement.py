"""What callbacks ask for, agreed upon: one that stops a single rank stops all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.trainer_callback import CallbackHandler, TrainerControl

from shardwise import operations
from shardwise.comm import World

_ASKED = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


class AgreedCallbacks(CallbackHandler):
    """A Trainer's callbacks, after which every rank goes the same way: what one asks for, all do.

    The ranks ask each other only where a callback is not transformers' own, on whatever rank: its own ones decide by
    the number of the step and by metrics, which are equal everywhere.

    Cost: then, an exchange of 8 bytes per micro-batch.
    """

    _foreign: bool | None = None

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> Any:
        found = not all(type(one).__module__.startswith("transformers.") for one in self.callbacks)
        self._foreign = World.current().size > 1 and operations.largest(float(found)) > 0
        return self.agree(super().on_train_begin(args, state, control))

    def on_substep_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> Any:
        return self.agree(super().on_substep_end(args, state, control))

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> Any:
        return self.agree(super().on_step_end(args, state, control))

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> Any:
        return self.agree(super().on_epoch_end(args, state, control))

    def agree(self, control: TrainerControl) -> TrainerControl:
        """Whatever any rank asks for. A collective, where callbacks of others take part."""
        if self._foreign:
            mine = torch.tensor([[bool(getattr(control, name)) for name in _ASKED]], dtype=torch.uint8)
            for name, asked in zip(_ASKED, _any(operations.all_gather(mine)), strict=True):
                setattr(control, name, asked)
        return control


def _any(rows: Sequence[torch.Tensor]) -> list[bool]:
    return [bool(column) for column in torch.cat(list(rows)).any(0)]


def agreed(handler: CallbackHandler) -> CallbackHandler:
    """The handler, which agrees from now on. One of another class stays what it is."""
    if type(handler) is CallbackHandler:
        handler.__class__ = AgreedCallbacks
    return handler
