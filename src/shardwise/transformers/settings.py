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


def accelerator_of(args: Any, strategy: Any) -> TrainerAccelerator:
    """The Accelerator that a Trainer's arguments describe. A collective: joins the process group.

    Args:
        args: ``TrainingArguments``. ``gradient_accumulation_steps`` becomes what counts: the launcher's, or what
            ``accelerator_config`` says.
        strategy: in place of what ``fsdp=`` and ``deepspeed=`` describe.

    Raises:
        ConfigError, StrategyError: arguments that contradict each other, or are not served.
    """
    config = args.accelerator_config
    window = dict(config.gradient_accumulation_kwargs or {})
    steps = window.pop("num_steps", None)
    if steps is not None and args.gradient_accumulation_steps not in (1, steps):
        raise ConfigError(
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}, and {steps} in accelerator_config",
            where="TrainingArguments",
            fix="say it once",
        )
    args.gradient_accumulation_steps = accumulation_from_environment(steps or args.gradient_accumulation_steps)
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
        deepspeed_plugin=args.deepspeed_plugin,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, **window),
        kwargs_handlers=[_wrapper(args), InitProcessGroupKwargs(timeout=args.ddp_timeout_delta)],
        dynamo_plugin=TorchDynamoPlugin(backend=args.torch_compile_backend, mode=args.torch_compile_mode),
        strategy=strategy,
    )
    accelerator.gradient_accumulation_steps = 1  # the Trainer divides, whatever a launcher or a file says
    return accelerator


def _wrapper(args: Any) -> DistributedDataParallelKwargs:
    """What ``ddp_*`` say. Parameters that a step does not use are found without asking."""
    said = {
        "bucket_cap_mb": args.ddp_bucket_cap_mb,
        "broadcast_buffers": args.ddp_broadcast_buffers,
        "static_graph": args.ddp_static_graph,
    }
    return DistributedDataParallelKwargs(**{name: value for name, value in said.items() if value is not None})
