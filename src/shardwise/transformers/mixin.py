"""``ShardwiseMixin``: what makes a Trainer train by Shardwise."""

from __future__ import annotations

import functools
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformers.trainer
from torch import nn
from transformers.trainer_pt_utils import find_batch_size

from shardwise import operations
from shardwise.compat.memory import should_reduce_batch_size
from shardwise.engine.hooks import engine_of
from shardwise.strategy import Strategy
from shardwise.transformers import checks, names
from shardwise.transformers.agreement import AgreedCallbacks, agreed
from shardwise.transformers.deepspeed_file import DeepSpeedFile
from shardwise.transformers.saving import Saving
from shardwise.transformers.settings import accelerator_of, settle_accumulation
from shardwise.transformers.subclasses import evaluated_by, generates_together

checks.check_version()
names.serve(transformers.trainer)


class ShardwiseMixin(Saving):
    """Comes before a subclass of ``transformers.Trainer``: ``class MyTrainer(ShardwiseMixin, SFTTrainer)``.

    The loop, its callbacks and what it writes are transformers' own. Models, optimizers and dataloaders are prepared by
    an :class:`~shardwise.Accelerator`, with the strategy out of, in this order: the launcher, ``args.strategy`` (of
    :class:`~shardwise.transformers.ShardwiseArguments`), ``args.fsdp`` or ``args.deepspeed``, the class's own
    ``strategy``, else ``ddp``.

    Attributes:
        strategy: for trainers whose arguments have none: ``class My(ShardwiseMixin, SFTTrainer): strategy = "zero3"``.

    Raises:
        ShardwiseError: when it is made, for arguments or a model that are not served.
    """

    strategy: str | Strategy | None = None
    args: Any
    model: Any
    accelerator: Any
    callback_handler: Any
    control: Any

    def create_accelerator_and_postprocess(self) -> None:
        args = self.args
        checks.check_arguments(args)
        checks.check_model(self.model)
        settle_accumulation(args)
        if args._n_gpu > 1:
            args._n_gpu = 1  # one process has one device
        self._file = DeepSpeedFile(args) if args.deepspeed else None
        plugin = self._file.plugin() if self._file is not None else args.deepspeed_plugin
        asked = getattr(args, "strategy", None)
        if asked is None and args.fsdp_plugin_args is None and plugin is None:
            asked = self.strategy
        self.accelerator = accelerator_of(args, asked, plugin)
        if self.accelerator.strategy.split_params:
            checks.check_full_eval(args, self.accelerator.mixed_precision)
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

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)  # type: ignore[misc]
        if not self.accelerator.even_batches:
            length = float(len(loader)) if transformers.trainer.has_length(loader) else -1.0
            checks.check_lengths(type(loader.dataset).__name__, [float(n) for n in _of_all(length)])
        return loader

    # --- training ------------------------------------------------------------------------------
    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._inner_training_loop(batch_size, *args, **kwargs)  # type: ignore[misc]
        except Exception as error:
            ranks = self.accelerator.num_processes
            if self.args.auto_find_batch_size and ranks > 1 and should_reduce_batch_size(error):
                warnings.warn(
                    f"rank {self.accelerator.process_index} ran out of memory with batches of {batch_size}: smaller "
                    "ones are tried if all ranks did; otherwise the others' next collective ends the run",
                    stacklevel=2,
                )
            raise

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        checks.check_full_eval(self.args, self.accelerator.mixed_precision)
        self.callback_handler = agreed(self.callback_handler)
        prepared = super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]
        generates_together(self.model)
        return prepared

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, or what the section ``optimizer`` of DeepSpeed's file describes."""
        if self.optimizer is None and self._file is not None:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = self._file.optimizer(trained, self.model)
        return super().create_optimizer(*args, **kwargs)  # type: ignore[misc]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """transformers' own, or what the section ``scheduler`` of DeepSpeed's file describes."""
        if self.lr_scheduler is None and self._file is not None:
            found = self._file.scheduler(optimizer or self.optimizer, num_training_steps)
            self.lr_scheduler, self._created_lr_scheduler = found, found is not None
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        some = control.should_log or control.should_evaluate or control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
        if some and isinstance(self.callback_handler, AgreedCallbacks):
            self.control = self.callback_handler.agree(self.control)

    # --- evaluation ----------------------------------------------------------------------------
    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._gather_each_sample_once()  # subclasses and the loop itself put others in its place
        self.accelerator.repeats = self.args.eval_batch_size
        generates_together(self.model)
        told = self.args
        asked = told.fp16_full_eval, told.bf16_full_eval
        if engine_of(self.model) is not None or self.accelerator.strategy.split_params:
            told.fp16_full_eval = told.bf16_full_eval = False  # it computes in that precision already
        try:
            with evaluated_by(getattr(self, "evaluator", None), self.model):
                return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        finally:
            told.fp16_full_eval, told.bf16_full_eval = asked

    def autocast_smart_context_manager(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        """A model that is evaluated before it is prepared for training has no hooks that choose its precision."""
        return nullcontext() if engine_of(self.model) is not None else self.accelerator.autocast()

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """A batch's loss is the mean over its own tokens, as in one process.

        Over those of all ranks, a rank's share would be none of its samples', which are counted one by one, without
        those that are repeated at the end.
        """
        self.accelerator.rows = find_batch_size(inputs)
        across, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:
            return super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.args.average_tokens_across_devices = across


def _of_all(value: float) -> list[torch.Tensor]:
    return operations.all_gather(torch.tensor([value], dtype=torch.float64))
