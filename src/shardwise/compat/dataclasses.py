"""Plain typed settings, with the names, fields and defaults of Accelerate's.

They describe; they do nothing. Where one says something about the strategy, ``apply(strategy)`` returns the strategy
that it describes, or says why there is none. The environment is never read.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from shardwise.compat.deepspeed_plugin import DeepSpeedPlugin
from shardwise.compat.enums import (
    BaseEnum,
    ComputeEnvironment,
    DDPCommunicationHookType,
    DistributedType,
    DynamoBackend,
    EnumWithContains,
    LoggerType,
    PrecisionType,
    RNGType,
)
from shardwise.compat.parallelism import ParallelismConfig
from shardwise.compat.wrappers import get_module_class_from_name
from shardwise.errors import ConfigError, StrategyError
from shardwise.strategy import Strategy

__all__ = [
    "AutocastKwargs",
    "BaseEnum",
    "ComputeEnvironment",
    "DDPCommunicationHookType",
    "DataLoaderConfiguration",
    "DeepSpeedPlugin",
    "DistributedDataParallelKwargs",
    "DistributedType",
    "DynamoBackend",
    "EnumWithContains",
    "GradScalerKwargs",
    "GradientAccumulationPlugin",
    "InitProcessGroupKwargs",
    "KwargsHandler",
    "LoggerType",
    "ParallelismConfig",
    "PrecisionType",
    "ProfileKwargs",
    "ProjectConfiguration",
    "RNGType",
    "TensorInformation",
    "TorchDynamoPlugin",
    "get_module_class_from_name",
]


class KwargsHandler:
    """Settings that become keyword arguments of something in torch."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, copied."""
        return copy.deepcopy(self.__dict__)

    def to_kwargs(self) -> dict[str, Any]:
        """The fields whose values differ from the defaults of the class."""
        default = type(self)().to_dict()
        return {key: value for key, value in self.to_dict().items() if default[key] != value}


@dataclass
class AutocastKwargs(KwargsHandler):
    """For ``torch.autocast`` in :meth:`Accelerator.autocast`.

    Args:
        enabled: ``False`` computes outside of prepared models in full precision.
        cache_enabled: keep the cast copies of weights; ``None`` is torch's default.
    """

    enabled: bool = True
    cache_enabled: bool | None = None


@dataclass
class DistributedDataParallelKwargs(KwargsHandler):
    """For scripts that tuned torch's ``DistributedDataParallel``; works with every strategy.

    Args:
        broadcast_buffers: send rank 0's buffers before each training forward.
        find_unused_parameters, static_graph, check_reduction: accepted; unused parameters are always found without
            being told, and nothing needs to be static.
        gradient_as_bucket_view: accepted; gradients are views of flat buffers always.
        bucket_cap_mb, dim: no effect, with a warning: gradients are reduced by units, on whole modules.
        comm_hook: ``FP16`` or ``BF16`` send gradients in that dtype (the strategy's ``reduce_dtype``). PowerSGD is
            refused: it changes the numbers.
        comm_wrapper: as ``comm_hook``, if that names the same dtype or nothing at all would be compressed twice.
        comm_state_option: belongs to PowerSGD.
    """

    dim: int = 0
    broadcast_buffers: bool = True
    bucket_cap_mb: int = 25
    find_unused_parameters: bool = False
    check_reduction: bool = False
    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    comm_hook: DDPCommunicationHookType = DDPCommunicationHookType.NO
    comm_wrapper: DDPCommunicationHookType = DDPCommunicationHookType.NO
    comm_state_option: dict[str, Any] = field(default_factory=dict)

    def to_dict(
        self, ignore_keys: Iterable[str] = ("comm_hook", "comm_wrapper", "comm_state_option")
    ) -> dict[str, Any]:
        """The fields that are arguments of torch's ``DistributedDataParallel``."""
        return {key: value for key, value in super().to_dict().items() if key not in ignore_keys}

    def apply(self, strategy: Strategy) -> Strategy:
        """``strategy`` with what these settings say about it.

        Raises:
            StrategyError: PowerSGD; a hook that contradicts the strategy's ``reduce_dtype``; two dtypes.
        """
        hook, wrapper = _hook(self.comm_hook), _hook(self.comm_wrapper)
        both = {h.value for h in (hook, wrapper) if h is not DDPCommunicationHookType.NO}
        if powers := sorted(both - {"fp16", "bf16"}):
            raise StrategyError(
                f"comm_hook {', '.join(powers)} approximates gradients and is left out",
                where="DistributedDataParallelKwargs",
                fix="use comm_hook BF16, or the strategy's reduce_dtype=bf16, to send half the bytes",
            )
        if len(both) > 1:
            raise StrategyError(
                "comm_hook and comm_wrapper name two dtypes for the same bytes",
                where="DistributedDataParallelKwargs",
                fix="name one of them",
            )
        idle = [
            f"{name}={getattr(self, name)}"
            for name, usual in (("bucket_cap_mb", 25), ("dim", 0))
            if getattr(self, name) != usual
        ]
        if hook is DDPCommunicationHookType.NO and wrapper is not hook:
            idle.append(f"comm_wrapper={wrapper} (without a comm_hook)")
        if idle:
            _no_effect("DistributedDataParallelKwargs", idle, "gradients are reduced by units, not by buckets")
        if hook is not DDPCommunicationHookType.NO:
            if strategy.reduce_dtype not in (None, hook.value):
                raise StrategyError(
                    f"comm_hook {hook} and reduce_dtype={strategy.reduce_dtype} contradict each other",
                    where=f"strategy '{strategy}'",
                    fix="say it once",
                )
            strategy = strategy.replace(reduce_dtype=hook.value)
        return strategy if self.broadcast_buffers else strategy.replace(broadcast_buffers=False)


def _hook(value: Any) -> DDPCommunicationHookType:
    """A member of ours from one of ours, of Accelerate's, or its value."""
    value = getattr(value, "value", value)
    if value not in DDPCommunicationHookType:
        raise ConfigError(
            f"{value!r} is not a communication hook", fix=f"one of {', '.join(DDPCommunicationHookType.list())}"
        )
    return DDPCommunicationHookType(value)


def _no_effect(where: str, what: list[str], why: str) -> None:
    warnings.warn(f"{where}: {', '.join(what)} has no effect: {why}", stacklevel=3)


@dataclass
class GradScalerKwargs(KwargsHandler):
    """For ``torch.amp.GradScaler`` under ``mixed_precision="fp16"``; the fields are its arguments."""

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    enabled: bool = True


_BACKENDS = (None, "nccl", "gloo", "cpu:gloo,cuda:nccl")


@dataclass
class InitProcessGroupKwargs(KwargsHandler):
    """How the ranks meet.

    Args:
        backend: the device decides (gloo for the CPU, NCCL for CUDA, ...); other backends are refused.
        init_method: ``None`` or ``env://``: the launcher's variables.
        timeout: how long a collective may wait; the strategy's ``timeout``. ``None`` is 600 seconds for ``nccl`` and
            1800 for others, as in torch.
    """

    backend: str | None = "nccl"
    init_method: str | None = None
    timeout: timedelta | None = None

    def __post_init__(self) -> None:
        if self.timeout is None:
            self.timeout = timedelta(seconds=600 if self.backend == "nccl" else 1800)

    def apply(self, strategy: Strategy) -> Strategy:
        """``strategy`` with the timeout, if one was given here.

        Raises:
            ConfigError: another backend or init_method.
        """
        if self.backend not in _BACKENDS:
            raise ConfigError(
                f"backend={self.backend!r} is not served", where="InitProcessGroupKwargs", fix="leave it out"
            )
        if self.init_method not in (None, "env://"):
            raise ConfigError(
                f"init_method={self.init_method!r} is not served: the ranks meet where the launcher says",
                where="InitProcessGroupKwargs",
                fix="leave it out, or make the process group before the Accelerator; it is then used as it is",
            )
        if "timeout" not in self.to_kwargs():
            return strategy
        assert self.timeout is not None
        return strategy.replace(timeout=self.timeout.total_seconds())


@dataclass
class ProfileKwargs(KwargsHandler):
    """For ``torch.profiler.profile`` in :meth:`Accelerator.profile`; the fields are its arguments, except for two.

    Args:
        activities: names out of ``cpu``, ``cuda``, ``xpu``, ``mtia``, ``hpu``; ``None`` takes all there are.
        schedule_option: arguments of ``torch.profiler.schedule``.
        output_trace_dir: where ``Accelerator.profile`` writes one Chrome trace per rank.
    """

    activities: list[str] | None = None
    schedule_option: dict[str, int] | None = None
    on_trace_ready: Callable[..., Any] | None = None
    record_shapes: bool = False
    profile_memory: bool = False
    with_stack: bool = False
    with_flops: bool = False
    with_modules: bool = False
    output_trace_dir: str | None = None

    def build(self) -> torch.profiler.profile:
        """The profiler with these settings.

        Raises:
            ConfigError: an activity that this torch does not know.
        """
        kinds = torch.profiler.ProfilerActivity
        known = {
            name: getattr(kinds, name.upper())
            for name in ("cpu", "cuda", "xpu", "mtia", "hpu")
            if hasattr(kinds, name.upper())
        }
        if odd := [a for a in self.activities or () if a not in known]:
            raise ConfigError(
                f"activities {', '.join(map(repr, odd))} cannot be profiled", fix=f"some of {', '.join(known)}"
            )
        return torch.profiler.profile(
            activities=None if self.activities is None else [known[a] for a in self.activities],
            schedule=None if self.schedule_option is None else torch.profiler.schedule(**self.schedule_option),
            on_trace_ready=self.on_trace_ready,
            record_shapes=self.record_shapes,
            profile_memory=self.profile_memory,
            with_stack=self.with_stack,
            with_flops=self.with_flops,
            with_modules=self.with_modules,
        )


@dataclass
class TensorInformation:
    """Shape and dtype of a tensor that is elsewhere."""

    shape: torch.Size
    dtype: torch.dtype


@dataclass
class DataLoaderConfiguration:
    """How :meth:`Accelerator.prepare` treats dataloaders.

    Args:
        split_batches: cut each batch over the ranks instead of giving each rank whole batches.
        dispatch_batches: rank 0 reads all batches and sends each rank its own; ``None`` does so for iterable datasets.
        even_batches: repeat samples so that all ranks have equally many, equally large batches.
        use_seedable_sampler: accepted; shuffles follow from a seed and the epoch always.
        data_seed: the seed of the shuffles; ``None`` draws one.
        non_blocking: copy batches to the device without waiting; needs pinned memory.
        use_stateful_dataloader: read through ``torchdata``'s ``StatefulDataLoader``.
    """

    split_batches: bool = False
    dispatch_batches: bool | None = None
    even_batches: bool = True
    use_seedable_sampler: bool = False
    data_seed: int | None = None
    non_blocking: bool = False
    use_stateful_dataloader: bool = False


@dataclass
class ProjectConfiguration:
    """Where a project keeps its files.

    Args:
        project_dir: folder of the project.
        logging_dir: folder of what trackers write; ``project_dir`` by default.
        automatic_checkpoint_naming: ``save_state`` writes ``checkpoints/checkpoint_0``, ``_1`` and so on.
        total_limit: how many of these are kept; ``None`` keeps all.
        iteration: the number of the next one.
        save_on_each_node: write on every host instead of on the main one.
    """

    project_dir: str | None = None
    logging_dir: str | None = None
    automatic_checkpoint_naming: bool = False
    total_limit: int | None = None
    iteration: int = 0
    save_on_each_node: bool = False

    def __post_init__(self) -> None:
        self.set_directories(self.project_dir)

    def set_directories(self, project_dir: str | None = None) -> None:
        """Set ``project_dir``, and ``logging_dir`` with it where that was not given."""
        self.project_dir = project_dir
        if self.logging_dir is None:
            self.logging_dir = project_dir


@dataclass
class GradientAccumulationPlugin(KwargsHandler):
    """How micro-batches become steps.

    Args:
        num_steps: micro-batches per optimizer step.
        adjust_scheduler: accepted for its name; prepared schedulers step with the optimizer.
        sync_with_dataloader: the end of a prepared dataloader ends a window.
        sync_each_batch: reduce gradients after every micro-batch: less memory, more bytes.
    """

    num_steps: int | None = None
    adjust_scheduler: bool = True
    sync_with_dataloader: bool = True
    sync_each_batch: bool = False

    def __post_init__(self) -> None:
        if self.num_steps is not None and self.num_steps < 1:
            raise ConfigError(
                f"num_steps={self.num_steps} is not a number of batches",
                where="GradientAccumulationPlugin",
                fix="give 1 or more",
            )


@dataclass
class TorchDynamoPlugin(KwargsHandler):
    """For ``torch.compile`` of prepared models.

    Args:
        backend: a :class:`DynamoBackend` or its name; ``NO`` compiles nothing.
        mode, fullgraph, dynamic, options, disable: arguments of ``torch.compile``.
        use_regional_compilation: compile each repeated block for itself, which units want anyway.
    """

    backend: DynamoBackend | str = DynamoBackend.NO
    mode: str | None = None
    fullgraph: bool = False
    dynamic: bool | None = None
    options: Any = None
    disable: bool = False
    use_regional_compilation: bool = False

    def __post_init__(self) -> None:
        name = str(getattr(self.backend, "value", self.backend or "NO")).upper()
        if name not in DynamoBackend:
            raise ConfigError(
                f"backend={self.backend!r} is not known to torch.compile",
                where="TorchDynamoPlugin",
                fix=f"one of {', '.join(DynamoBackend.list()).lower()}",
            )
        self.backend = DynamoBackend(name)

    def to_dict(self) -> dict[str, Any]:
        """All fields; the backend in torch's spelling."""
        return {**super().to_dict(), "backend": str(self.backend).lower()}

    def to_kwargs(self) -> dict[str, Any]:
        """Arguments of ``torch.compile``."""
        return {key: value for key, value in super().to_kwargs().items() if key != "use_regional_compilation"}
