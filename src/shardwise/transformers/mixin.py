"""``ShardwiseMixin``: what makes a Trainer train by Shardwise."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers.trainer
from torch import nn

from shardwise.strategy import Strategy
from shardwise.transformers import names
from shardwise.transformers.saving import Saving
from shardwise.transformers.settings import accelerator_of

names.serve(transformers.trainer)


class ShardwiseMixin(Saving):
    """Comes before a subclass of ``transformers.Trainer``: ``class MyTrainer(ShardwiseMixin, SFTTrainer)``.

    The loop, its callbacks and what it writes are transformers' own. Models, optimizers and dataloaders are prepared by
    an :class:`~shardwise.Accelerator`, with the strategy out of, in this order: the launcher, ``args.strategy`` (of
    :class:`~shardwise.transformers.ShardwiseArguments`), ``args.fsdp`` or ``args.deepspeed``, the class's own
    ``strategy``, else ``ddp``.

    Attributes:
        strategy: for trainers whose arguments have none: ``class My(ShardwiseMixin, SFTTrainer): strategy = "zero3"``.
    """

    strategy: str | Strategy | None = None
    args: Any
    model: Any
    accelerator: Any

    def create_accelerator_and_postprocess(self) -> None:
        args = self.args
        asked = getattr(args, "strategy", None)
        if asked is None and args.fsdp_plugin_args is None and args.deepspeed_plugin is None:
            asked = self.strategy
        self.accelerator = accelerator_of(args, asked)
        # The Trainer knows FSDP and DeepSpeed by wrappers of theirs. A prepared model is an ordinary module.
        self.is_deepspeed_enabled = self.is_fsdp_enabled = False
        self._gather_each_sample_once()

    def _gather_each_sample_once(self) -> None:
        gather = self.accelerator.gather_for_metrics
        self.gather_function = functools.partial(gather, use_gather_object=self.args.eval_use_gather_object)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Preparing it does: under ``zero3`` a device never has the whole model."""
        if self.args.place_model_on_device:
            super()._move_model_to_device(model, device)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._gather_each_sample_once()  # subclasses and the loop itself put others in its place
        self.accelerator.repeats = self.args.eval_batch_size
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
