"""From a Trainer's arguments to its Accelerator."""

from __future__ import annotations

from typing import Any

from shardwise.compat.dataclasses import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
)
from shardwise.compat.plugins import FullyShardedDataParallelPlugin
from shardwise.environment import accumulation_from_environment
from shardwise.errors import ConfigError
from shardwise.transformers.accelerator import TrainerAccelerator


def accelerator_of(args: Any, strategy: Any, deepspeed: Any) -> TrainerAccelerator:
    """The Accelerator that a Trainer's arguments describe. A collective: joins the process group.

    Args:
        args: ``TrainingArguments``.
        strategy: in place of what ``fsdp=`` and ``deepspeed=`` describe.
        deepspeed: a plugin that describes what ``deepspeed=`` asks for, or ``None``.

    Raises:
        ConfigError, StrategyError: arguments that contradict each other, or are not served.
    """
    config = args.accelerator_config
    window = {k: v for k, v in (config.gradient_accumulation_kwargs or {}).items() if k != "num_steps"}
    seed = args.data_seed if args.data_seed is not None else args.seed
    loading = DataLoaderConfiguration(
        split_batches=config.split_batches,
        dispatch_batches=config.dispatch_batches,
        even_batches=config.even_batches,
        use_seedable_sampler=config.use_seedable_sampler,
        data_seed=seed,  # a run that is resumed has the order of the one before
        non_blocking=config.non_blocking,
    )
    fsdp = None if args.fsdp_plugin_args is None else FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    accelerator = TrainerAccelerator(
        mixed_precision=args.mixed_precision,
        dataloader_config=loading,
        fsdp_plugin=fsdp,
        deepspeed_plugin=deepspeed,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, **window),
        kwargs_handlers=[_wrapper(args), InitProcessGroupKwargs(timeout=args.ddp_timeout_delta)],
        dynamo_plugin=TorchDynamoPlugin(backend=args.torch_compile_backend, mode=args.torch_compile_mode),
        parallelism_config=getattr(args, "parallelism_config", None),
        strategy=strategy,
    )
    # The Trainer divides and clips, whatever a launcher or a file says: the file says the same.
    accelerator.gradient_accumulation_steps = 1
    accelerator._steps.max_norm = None
    return accelerator


def settle_accumulation(args: Any) -> None:
    """Let ``args.gradient_accumulation_steps`` be what counts: the launcher's, or what ``accelerator_config`` says.

    Raises:
        ConfigError: ``accelerator_config`` says something else than the arguments.
    """
    inside = (args.accelerator_config.gradient_accumulation_kwargs or {}).get("num_steps")
    if inside is not None and args.gradient_accumulation_steps not in (1, inside):
        raise ConfigError(
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}, and {inside} in accelerator_config",
            where=type(args).__name__,
            fix="say it once",
        )
    args.gradient_accumulation_steps = accumulation_from_environment(inside or args.gradient_accumulation_steps)


def _wrapper(args: Any) -> DistributedDataParallelKwargs:
    """What ``ddp_*`` say. Parameters that a step does not use are found without asking."""
    said = {
        "bucket_cap_mb": args.ddp_bucket_cap_mb,
        "broadcast_buffers": args.ddp_broadcast_buffers,
        "static_graph": args.ddp_static_graph,
    }
    return DistributedDataParallelKwargs(**{name: value for name, value in said.items() if value is not None})
