"""The part of an engine that answers: sizes of batches, rates, precision, stage, scale."""

from __future__ import annotations

from typing import Any

from shardwise.deepspeed.engine_base import EngineBase
from shardwise.errors import ConfigError


class Answers(EngineBase):
    # --- batches -------------------------------------------------------------------------------
    def train_batch_size(self) -> int:
        """Samples of one optimizer step, of all ranks."""
        return self._train_batch

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples of one micro-batch of one rank."""
        return self._micro_batch

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per optimizer step."""
        return self._steps.length

    def get_batch_info(self) -> tuple[int, int, int]:
        """The three numbers above."""
        return self._train_batch, self._micro_batch, self._steps.length

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change how many micro-batches a step takes. Micro-batches stay as long as they are.

        Raises:
            ConfigError: it is no multiple of a micro-batch on every rank; or a window has begun, whose gradients are to
                be divided by the number there is.
        """
        once = self._micro_batch * self.world_size
        if not isinstance(train_batch_size, int) or train_batch_size < 1 or train_batch_size % once:
            raise ConfigError(
                f"a batch of {train_batch_size!r} is not a number of micro-batches of {self._micro_batch} on each of "
                f"{self.world_size} ranks",
                where="set_train_batch_size",
                fix=f"give a multiple of {once}",
            )
        if train_batch_size == self._train_batch:
            return
        self._check_at_rest("set_train_batch_size")
        self._train_batch, self._steps.length = train_batch_size, train_batch_size // once
        self._begin_micro_batch()

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change how long micro-batches are. A step takes as many as before.

        Loaders that were made already keep their size.

        Raises:
            ConfigError: less than one sample.
        """
        if not isinstance(micro_batch_size, int) or micro_batch_size < 1:
            raise ConfigError(f"a micro-batch of {micro_batch_size!r} samples", where="set_train_micro_batch_size")
        self._micro_batch = micro_batch_size
        self._train_batch = micro_batch_size * self._steps.length * self.world_size

    def _check_at_rest(self, call: str) -> None:
        if not self._steps.is_empty:
            raise ConfigError(
                "gradients of a window are there, whose length would change", where=call, fix="call it after a step"
            )

    def _begin_micro_batch(self) -> None:
        raise NotImplementedError

    # --- what the optimizer is set to ----------------------------------------------------------
    def _of_groups(self, key: str) -> list[Any]:
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [group.get(key, 0.0) for group in groups]

    def get_lr(self) -> list[Any]:
        """The learning rate of each parameter group."""
        return self._of_groups("lr")

    def set_lr(self, lr: float | list[float]) -> None:
        """Change the learning rate of all groups, or of each. A schedule changes it again."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        rates = lr if isinstance(lr, (list, tuple)) else [lr] * len(groups)
        if len(rates) != len(groups):
            raise ConfigError(f"{len(rates)} learning rates for {len(groups)} parameter groups", where="set_lr")
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    def get_type(self) -> list[Any]:
        """What scripts have written under ``type`` into each parameter group; 0 where nothing."""
        return self._of_groups("type")

    def get_mom(self) -> list[Any]:
        """The momentum of each parameter group: ``momentum`` of SGD and RMSprop, ``betas`` of others."""
        return self._of_groups("momentum" if self.optimizer_name() in ("SGD", "RMSprop") else "betas")

    def optimizer_name(self) -> str | None:
        """The class that was passed in, or the configuration's type."""
        if self.client_optimizer is not None and self.optimizer is not None:
            return type(self.optimizer.optimizer).__name__
        return None if self.facts.optimizer is None else self.facts.optimizer[0]

    def optimizer_params(self) -> dict[str, Any] | None:
        return None if self.facts.optimizer is None else self.facts.optimizer[1]

    def scheduler_name(self) -> str | None:
        return None if self.facts.scheduler is None else self.facts.scheduler[0]

    def scheduler_params(self) -> dict[str, Any] | None:
        return None if self.facts.scheduler is None else self.facts.scheduler[1]

    def gradient_clipping(self) -> float:
        """The largest norm of all gradients; 0 where nothing is clipped."""
        return self._steps.max_norm or 0.0

    def get_global_grad_norm(self) -> float | None:
        """The norm of all gradients at the last step, before clipping, without the loss scale; equal on all ranks.

        ``None`` before the first step, after one that overflowed, and under stage 0 without clipping.
        """
        norm = None if self.optimizer is None else self.optimizer.norm
        return None if norm is None else float(norm)

    # --- precision -----------------------------------------------------------------------------
    def fp16_enabled(self) -> bool:
        return self.strategy.param_dtype == "fp16"

    def bfloat16_enabled(self) -> bool:
        return self.strategy.param_dtype == "bf16"

    def fp16_auto_cast(self) -> bool:
        """Inputs are cast: always so here."""
        return self.fp16_enabled()

    def loss_scale(self) -> float:
        """What losses are multiplied by now; 1 but for fp16. ``cur_scale`` is the same."""
        return 1.0 if self.optimizer is None else self.optimizer.loss_scale

    @property
    def cur_scale(self) -> float:
        return self.loss_scale()

    def dynamic_loss_scale(self) -> bool:
        return self.optimizer is not None and self.optimizer.dynamic_loss_scale

    def was_step_applied(self) -> bool:
        """The last :meth:`step` changed the parameters."""
        return self._step_applied

    _step_applied = False

    # --- ZeRO ----------------------------------------------------------------------------------
    def zero_optimization(self) -> bool:
        return self.zero_optimization_stage() > 0

    def zero_optimization_stage(self) -> int:
        return self.facts.stage or 0

    def zero_optimization_partition_gradients(self) -> bool:
        return self.strategy.split_grads

    def zero_optimization_partition_weights(self) -> bool:
        return self.strategy.split_params

    def zero_cpu_offload(self) -> bool:
        """The optimizer state has its home on the host, or on a disk."""
        return self.strategy.offload_optimizer != "device"

    zero_use_cpu_optimizer = zero_cpu_offload

    # --- the rest of the configuration -----------------------------------------------------------
    def managed_gradient_accumulation(self) -> bool:
        """The engine counts micro-batches; otherwise every :meth:`step` is the end of a window."""
        return self.facts.managed_accumulation

    def steps_per_print(self) -> int | None:
        return self.facts.steps_per_print

    def dataloader_drop_last(self) -> bool:
        return self.facts.drop_last

    def wall_clock_breakdown(self) -> bool:
        return self.facts.wall_clock

    @property
    def dp_world_size(self) -> int:
        return self.world_size

    @property
    def mp_world_size(self) -> int:
        return 1
