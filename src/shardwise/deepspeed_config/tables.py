"""All tables, by the section each one is about."""

from __future__ import annotations

from shardwise.deepspeed_config import section_keys as sections
from shardwise.deepspeed_config import zero_keys as zero
from shardwise.deepspeed_config.keys import Key, Table
from shardwise.deepspeed_config.top_keys import TOP

TABLES: dict[str, Table] = {
    "": TOP,
    "zero_optimization": zero.ZERO,
    "zero_optimization.offload_optimizer": zero.OFFLOAD_OPTIMIZER,
    "zero_optimization.offload_param": zero.OFFLOAD_PARAM,
    "zero_optimization.leaf_module": zero.LEAF_MODULE,
    "fp16": sections.FP16,
    "bf16": sections.BF16,
    "bfloat16": sections.BF16,
    "data_types": sections.DATA_TYPES,
    "optimizer": sections.OPTIMIZER,
    "scheduler": sections.SCHEDULER,
    "activation_checkpointing": sections.ACTIVATIONS,
    "checkpoint": sections.CHECKPOINT,
    "flops_profiler": sections.FLOPS_PROFILER,
    "tensorboard": sections.TENSORBOARD,
    "csv_monitor": sections.CSV,
    "wandb": sections.WANDB,
    "comet": sections.COMET,
    "compile": sections.COMPILE,
    "aio": sections.AIO,
    "comms_logger": sections.COMMS_LOGGER,
    "timers": sections.TIMERS,
}


def all_keys() -> dict[str, Key]:
    """Every key that is known, by its path: ``"zero_optimization.stage"``."""
    return {
        f"{section}.{name}" if section else name: key
        for section, table in TABLES.items()
        for name, key in table.items()
    }
