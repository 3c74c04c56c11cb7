"""What a configuration said."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_STAGES = ("ddp", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class LossScaling:
    """How losses are scaled in fp16.

    Args:
        static: a scale that stays; ``None`` for one that follows the gradients.
        initial: the first scale.
        window: steps without an overflow after which the scale doubles.
        hysteresis: overflows before the scale is halved, of which the last one halves it.
        consecutive_hysteresis: a step without overflow makes the count of overflows whole again.
        minimum: the scale is never less.
    """

    static: float | None = None
    initial: float = 2.0**16
    window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    minimum: float = 1.0


@dataclass(frozen=True)
class DsFacts:
    """What a configuration said.

    Args:
        stage: of ZeRO; ``None`` if it is not said.
        shard_size: ranks of a MiCS group, or ``None``.
        offload_optimizer, offload_params: ``device``, ``cpu`` or ``nvme``.
        nvme_path: a folder on the disk of home ``nvme``, or ``None``.
        offload_ratio: the part of the optimizer state that is offloaded.
        pin_memory: host buffers are page-locked, where there is an accelerator.
        offload_activations: ``device`` or ``cpu``.
        leaf_modules: ``classes``, ``names`` and ``name_suffixes`` of modules that are gathered as one.
        needs_all_gradients: a step is an error where a parameter that trains got no gradient.
        param_dtype: ``fp16``, ``bf16`` or ``None``.
        reduce_dtype: the dtype of gradients on the wire, or ``None``.
        train_batch, micro_batch, accumulation: samples of a step over all ranks, samples of a rank's micro-batch,
            micro-batches per step; ``None`` for what is not said. See
            :func:`~shardwise.deepspeed_config.resolved_batch`.
        managed_accumulation: the engine counts micro-batches; ``False``: the script says which one is the last.
        drop_last: a loader that is built drops a last batch that is not full.
        optimizer, scheduler: type and arguments, or ``None``.
        clipping: largest norm of all gradients, or ``None``.
        loss_scale: how losses are scaled; ``None`` without fp16.
        check_overflow: skip a step whose gradients are not finite: in fp16 always, in bf16 unless it was told not to.
        scaler: what was said of it, as arguments of ``torch.amp.GradScaler``.
        reduce_op: gradients over ranks: ``mean`` or ``sum``.
        prescale: are gradients divided before they are summed, and by what first.
        steps_per_print: steps from one line of the engine to the next; ``None`` for none.
        wall_clock: print the times of forward, backward and step.
        flops_profiler: its section if it is on, else ``None``.
        monitors: sections of ``tensorboard``, ``wandb``, ``comet`` and ``csv_monitor`` that are on.
        tag_validation: ``ignore``, ``warn`` or ``fail``.
        compile: its section, or ``None``.
        idle: keys that have no effect.
        unfilled: keys that are ``"auto"``.
    """

    stage: int | None = None
    shard_size: int | None = None
    offload_optimizer: str = "device"
    offload_params: str = "device"
    offload_activations: str = "device"
    nvme_path: str | None = None
    offload_ratio: float = 1.0
    pin_memory: bool = True
    leaf_modules: dict[str, list[str]] = field(default_factory=dict)
    needs_all_gradients: bool = False
    param_dtype: str | None = None
    reduce_dtype: str | None = None
    train_batch: int | None = None
    micro_batch: int | None = None
    accumulation: int | None = None
    managed_accumulation: bool = True
    drop_last: bool = False
    optimizer: tuple[str, dict[str, Any]] | None = None
    scheduler: tuple[str, dict[str, Any]] | None = None
    clipping: float | None = None
    loss_scale: LossScaling | None = None
    check_overflow: bool = False
    scaler: dict[str, Any] = field(default_factory=dict)
    reduce_op: str = "mean"
    prescale: tuple[bool, float] = (False, 1.0)
    steps_per_print: int | None = None
    wall_clock: bool = False
    flops_profiler: dict[str, Any] | None = None
    monitors: dict[str, dict[str, Any]] = field(default_factory=dict)
    tag_validation: str = "warn"
    compile: dict[str, Any] | None = None
    idle: tuple[str, ...] = ()
    unfilled: tuple[str, ...] = ()

    @property
    def preset(self) -> str:
        """The row of the strategy table: ``hsdp`` for MiCS, else by stage (none is stage 0)."""
        return "hsdp" if self.shard_size is not None else _STAGES[self.stage or 0]

    def strategy_arguments(self) -> dict[str, Any]:
        """The arguments of the :class:`~shardwise.strategy.Strategy` that the configuration describes."""
        return {
            "preset": self.preset,
            "shard_size": self.shard_size,
            "offload_params": self.offload_params,
            "offload_optimizer": self.offload_optimizer,
            "offload_ratio": self.offload_ratio,
            "nvme_path": self.nvme_path,
            "pin_memory": self.pin_memory,
            "param_dtype": self.param_dtype,
            "reduce_dtype": self.reduce_dtype,
            "activation_offload": self.offload_activations,
        }
