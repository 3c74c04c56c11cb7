"""What a DeepSpeed configuration means here: which keys say something, which only tune, which cannot be honoured.

Every key is in one of the tables below. A key in none of them is an error that names it, so nothing is dropped
silently. ``"auto"`` and ``None`` say nothing anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardwise.errors import ConfigError, did_you_mean

_DTYPES = {"fp32": "fp32", "float32": "fp32", "fp16": "fp16", "float16": "fp16", "bf16": "bf16", "bfloat16": "bf16"}
_STAGES = ("ddp", "zero1", "zero2", "zero3")

# Read, or always so here, or about what the script itself does: no word needed.
_QUIET = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "zero_optimization", "fp16", "bf16", "bfloat16", "data_types", "communication_data_type", "gradient_allreduce_op",
    "steps_per_print", "activation_checkpointing",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "managed_gradient_accumulation",
}  # fmt: skip
# Change how fast DeepSpeed does something, or what it prints.
_TUNING = {
    "aio", "wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_allgather",
    "prescale_gradients", "gradient_predivide_factor", "comms_logger", "checkpoint", "timers", "compile",
    "dataloader_drop_last", "disable_python_gc", "seq_parallel_communication_data_type", "log_level",
    "use_data_before_expert_parallelism",
}  # fmt: skip
# Change what is computed or written: refused unless they are off.
_TRACKERS = "name the tracker in log_with of the Accelerator"
_REFUSED = {
    "optimizer": "build the optimizer in the script and pass it to prepare",
    "scheduler": "build the scheduler in the script and pass it to prepare",
    "amp": "use fp16 or bf16",
    "torch_autocast": "use fp16 or bf16",
    "msamp": "use fp16 or bf16",
    "sparse_gradients": "use dense gradients",
    "tensorboard": _TRACKERS,
    "wandb": _TRACKERS,
    "comet": _TRACKERS,
    "csv_monitor": _TRACKERS,
    "flops_profiler": "use accelerator.profile() with ProfileKwargs(with_flops=True)",
    **dict.fromkeys(
        (
            "pipeline", "tensor_parallel", "autotp_size", "sequence_parallel_size", "expert_parallel",
            "hybrid_engine", "curriculum_learning", "data_efficiency", "compression_training", "sparse_attention",
            "elasticity", "autotuning", "eigenvalue", "quantize_training", "progressive_layer_drop",
            "weight_quantization", "nebula", "datastates",
        ),
        "leave it out",
    ),
}  # fmt: skip
_ZERO_READ = {"stage", "offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_param", "mics_shard_size"}
_ZERO_QUIET = {  # always so here, or only how a state dict is written
    "contiguous_gradients", "ignore_unused_parameters", "gather_16bit_weights_on_model_save", "load_from_fp32_weights",
    "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save", "elastic_checkpoint",
    "compute_grad_norm", "legacy_stage1", "parameter_alignment",
}  # fmt: skip
_ZERO_TUNING = {
    "allgather_partitions", "allgather_bucket_size", "reduce_scatter", "reduce_bucket_size", "overlap_comm",
    "sub_group_size", "round_robin_gradients", "use_multi_rank_bucket_allreduce", "cpu_offload_use_pin_memory",
    "prefetch_bucket_size", "stage3_prefetch_bucket_size", "param_persistence_threshold",
    "stage3_param_persistence_threshold", "model_persistence_threshold", "stage3_model_persistence_threshold",
    "max_live_parameters", "stage3_max_live_parameters", "max_reuse_distance", "stage3_max_reuse_distance",
    "module_granularity_threshold", "stage3_module_granularity_threshold", "use_all_reduce_for_fetch_params",
    "stage3_use_all_reduce_for_fetch_params", "allgather_sequential", "stage3_allgather_sequential",
    "memory_efficient_linear", "pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings",
    "enable_sanity_checks", "save_muon_momentum_buffer_in_memory", "leaf_module", "mics_hierarchical_params_gather",
}  # fmt: skip
_ZERO_REFUSED = {
    "zero_hpz_partition_size": "for copies of the parameters inside hosts use strategy='hsdp,shard_size=...'",
    "zero_quantized_weights": "use bf16",
    "zero_quantized_nontrainable_weights": "use bf16",
    "zero_quantized_gradients": "use communication_data_type bf16",
    "zenflow": "leave it out",
}
_OFFLOAD_READ = {"device", "nvme_path", "ratio"}
_OFFLOAD_TUNING = {
    "buffer_count", "buffer_size", "max_in_cpu", "pin_memory", "pipeline_read", "pipeline_write", "pipeline",
    "fast_init", "cpuadam_cores_perc",
}  # fmt: skip
_OFFLOAD_REFUSED = {
    "super_offload": "leave it out",
}
_ACTIVATIONS_TUNING = {
    "partition_activations", "contiguous_memory_optimization", "number_checkpoints", "synchronize_checkpoint_boundary",
    "profile",
}  # fmt: skip
_HALF_QUIET = {"enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window"}
_HALF_TUNING = {
    "hysteresis", "consecutive_hysteresis", "min_loss_scale", "immediate_grad_update", "check_grad_overflow",
    "check_overflow",
}  # fmt: skip
_HALF_REFUSED = dict.fromkeys(
    ("fp16_master_weights_and_grads", "bf16_master_weights_and_grads", "bf16_optimizer_states", "ddp_bf16"),
    "master values and optimizer state stay in the dtype of the model as it was prepared; prepare one in bf16 instead",
)


@dataclass(frozen=True)
class DsFacts:
    """What a configuration said.

    Args:
        stage: of ZeRO; ``None`` if it is not said.
        shard_size: ranks of a MiCS group, or ``None``.
        offload_optimizer, offload_params: ``device``, ``cpu`` or ``nvme``.
        nvme_path: a folder on the disk of home ``nvme``, or ``None``.
        offload_ratio: the part of the optimizer state that is offloaded.
        offload_activations: ``device`` or ``cpu``.
        param_dtype: ``fp16``, ``bf16`` or ``None``.
        reduce_dtype: the dtype of gradients on the wire, or ``None``.
        accumulation: micro-batches per step, or ``None``.
        clipping: largest norm of all gradients, or ``None``.
        scaler: arguments of ``torch.amp.GradScaler``.
        idle: keys that only tune DeepSpeed.
    """

    stage: int | None = None
    shard_size: int | None = None
    offload_optimizer: str = "device"
    offload_params: str = "device"
    offload_activations: str = "device"
    nvme_path: str | None = None
    offload_ratio: float = 1.0
    param_dtype: str | None = None
    reduce_dtype: str | None = None
    accumulation: int | None = None
    clipping: float | None = None
    scaler: dict[str, Any] = field(default_factory=dict)
    idle: tuple[str, ...] = ()

    @property
    def preset(self) -> str:
        """The row of the strategy table: ``hsdp`` for MiCS, else by stage (none is stage 0)."""
        return "hsdp" if self.shard_size is not None else _STAGES[self.stage or 0]


def load_ds_config(source: Any) -> tuple[dict[str, Any], str]:
    """A configuration as a dict of its own, and where it came from.

    Args:
        source: a mapping, the path of a JSON file, or an object that holds a mapping in ``config``.

    Raises:
        ConfigError: it is none of these, or the file is missing or damaged.
    """
    held = getattr(source, "config", source)
    if isinstance(held, Mapping):
        return _copied(held), "DeepSpeed configuration"
    if not isinstance(source, (str, Path)):
        raise ConfigError(
            f"a DeepSpeed configuration is a dict or the path of a JSON file, not {type(source).__name__}",
            fix="give one of these",
        )
    try:
        config = json.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot be read: {error.strerror}", where=str(source), fix="give the path of the DeepSpeed JSON"
        ) from None
    except ValueError as error:
        raise ConfigError(f"is not JSON: {error}", where=str(source), fix="correct the file") from None
    if not isinstance(config, dict):
        raise ConfigError("holds no JSON object", where=str(source), fix="correct the file")
    return config, str(source)


def read_ds_config(config: Mapping[str, Any], where: str = "DeepSpeed configuration") -> DsFacts:
    """What ``config`` says.

    Raises:
        ConfigError: a key that is unknown, or that asks for something which is not done here; values that
            contradict each other.
    """
    idle = _sort(config, "", _QUIET, _TUNING, _REFUSED, where)
    zero = _section(config, "zero_optimization", where)
    idle += _sort(zero, "zero_optimization.", _ZERO_READ | _ZERO_QUIET, _ZERO_TUNING, _ZERO_REFUSED, where)
    homes: dict[str, str] = {}
    paths: dict[str, str] = {}
    ratio = 1.0
    for kind in ("optimizer", "param"):
        name = f"offload_{kind}"
        part = _section(zero, name, where)
        idle += _sort(part, f"zero_optimization.{name}.", _OFFLOAD_READ, _OFFLOAD_TUNING, _OFFLOAD_REFUSED, where)
        home = part.get("device")
        if _said(zero.get("cpu_offload" if kind == "optimizer" else "cpu_offload_param")):
            home = home or "cpu"
        home = "device" if home in (None, "auto", "none") else getattr(home, "value", home)
        if home not in ("device", "cpu", "nvme"):
            raise ConfigError(
                f"zero_optimization.{name}.device={home!r} is not known", where=where, fix="none, cpu or nvme"
            )
        homes[kind] = home
        if _said(part.get("nvme_path")) and part["nvme_path"] != "none":
            paths[kind] = str(part["nvme_path"])
        found = _number(part.get("ratio"), f"zero_optimization.{name}.ratio", float, where)
        ratio = ratio if found is None or kind != "optimizer" else found
    folders = sorted({paths[kind] for kind, home in homes.items() if home == "nvme" and kind in paths})
    if len(folders) > 1:
        raise ConfigError(f"two values of nvme_path: {' and '.join(folders)}", where=where, fix="give one folder")
    stage = _number(zero.get("stage"), "zero_optimization.stage", int, where)
    if stage is not None and stage not in range(4):
        raise ConfigError(f"zero_optimization.stage={stage} does not exist", where=where, fix="0, 1, 2 or 3")
    mics = _number(zero.get("mics_shard_size"), "zero_optimization.mics_shard_size", int, where)
    mics = None if mics in (None, -1) else mics
    if mics is not None and stage != 3:
        raise ConfigError("zero_optimization.mics_shard_size belongs to stage 3", where=where, fix="set stage to 3")
    halves, scaler, tuned = _halves(config, where)
    wire = config.get("communication_data_type")
    if _said(wire) and str(wire) not in _DTYPES:
        raise ConfigError(f"communication_data_type={wire!r} is not known", where=where, fix="fp32, fp16 or bf16")
    if config.get("gradient_allreduce_op") not in (None, "auto", "mean"):
        raise ConfigError("gradient_allreduce_op: gradients are means over ranks", where=where, fix="leave it out")
    saved = _section(config, "activation_checkpointing", where)
    idle += _sort(saved, "activation_checkpointing.", {"cpu_checkpointing"}, _ACTIVATIONS_TUNING, {}, where)
    clipping = _number(config.get("gradient_clipping"), "gradient_clipping", float, where)
    return DsFacts(
        stage=stage,
        shard_size=mics,
        offload_optimizer=homes["optimizer"],
        offload_params=homes["param"],
        offload_activations="cpu" if _said(saved.get("cpu_checkpointing")) else "device",
        nvme_path=folders[0] if folders else None,
        offload_ratio=ratio,
        param_dtype=halves,
        reduce_dtype=_DTYPES[str(wire)] if _said(wire) else None,
        accumulation=_accumulation(config, where),
        clipping=clipping or None,
        scaler=scaler,
        idle=tuple(idle + tuned),
    )


def _halves(config: Mapping[str, Any], where: str) -> tuple[str | None, dict[str, Any], list[str]]:
    """The dtype to compute in, the scaler's arguments, and the keys without effect."""
    if "bf16" in config and "bfloat16" in config:
        raise ConfigError("bf16 and bfloat16 are one section", where=where, fix="keep one of them")
    on: list[str] = []
    idle: list[str] = []
    scaler: dict[str, Any] = {}
    for name, dtype in (("fp16", "fp16"), ("bf16", "bf16"), ("bfloat16", "bf16")):
        part = _section(config, name, where)
        enabled = _said(part.get("enabled"))
        refused: dict[str, str] = _HALF_REFUSED if enabled else {}
        known = _HALF_QUIET if enabled else _HALF_QUIET | _HALF_TUNING | set(_HALF_REFUSED)
        idle += _sort(part, f"{name}.", known, _HALF_TUNING, refused, where)
        if enabled:
            on.append(dtype)
        if enabled and dtype == "fp16":
            if _number(part.get("loss_scale"), "fp16.loss_scale", float, where):
                raise ConfigError(
                    "fp16.loss_scale: losses are scaled dynamically", where=where, fix="set it to 0, or leave it out"
                )
            power = _number(part.get("initial_scale_power"), "fp16.initial_scale_power", int, where)
            window = _number(part.get("loss_scale_window"), "fp16.loss_scale_window", int, where)
            scaler |= {} if power is None else {"init_scale": 2.0**power}
            scaler |= {} if window is None else {"growth_interval": window}
    if len(on) > 1:
        raise ConfigError("fp16 and bf16 are both enabled", where=where, fix="enable one of them")
    types = _section(config, "data_types", where)
    odd = [k for k, v in types.items() if _said(v) and (k, v) not in (("grad_accum_dtype", "fp32"),)]
    if odd:
        raise ConfigError(
            f"data_types.{odd[0]}={types[odd[0]]!r} is not served", where=where, fix="gradients accumulate in fp32"
        )
    return (on[0] if on else None), scaler, idle


def _accumulation(config: Mapping[str, Any], where: str) -> int | None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    whole, micro, steps = (_number(config.get(name), name, int, where) for name in names)
    for name, value in zip(names, (whole, micro, steps), strict=True):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} is not a number of 1 or more", where=where)
    if whole is not None and whole % ((micro or 1) * (steps or 1)):
        raise ConfigError(
            f"train_batch_size={whole} is no multiple of the micro-batch {micro or 1} times {steps or 1} steps",
            where=where,
            fix="set train_batch_size to 'auto'",
        )
    return steps


def _sort(
    part: Mapping[str, Any], prefix: str, quiet: set[str], tuning: set[str], refused: dict[str, str], where: str
) -> list[str]:
    """The keys of ``part`` that only tune; an error for the first one that is unknown or refused."""
    for key, value in part.items():
        if key in refused and _on(key, value):
            raise ConfigError(f"{prefix}{key} is not served", where=where, fix=refused[key])
        if key not in quiet and key not in tuning and key not in refused:
            raise ConfigError(
                f"{prefix}{key} is not a key of DeepSpeed that is known here",
                where=where,
                fix=did_you_mean(str(key), [*quiet, *tuning, *refused], otherwise="leave it out"),
            )
    return [f"{prefix}{key}" for key, value in part.items() if key in tuning and _said(value)]


def _said(value: Any) -> bool:
    return value not in (None, "auto", False) and value != {}


def _on(key: str, value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and bool(value.get("enabled", True))
    if key.endswith(("_size", "ratio")):
        return _said(value) and value not in (0, 1)
    return _said(value) and value != 0


def _section(config: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    part = config.get(name)
    if part in (None, "auto"):
        return {}
    if not isinstance(part, Mapping):
        raise ConfigError(f"{name} is a section, not {part!r}", where=where, fix="write it as an object")
    return part


def _number(value: Any, name: str, kind: type, where: str) -> Any:
    if value in (None, "auto"):
        return None
    value = getattr(value, "value", value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or kind(value) != value:
        raise ConfigError(f"{name}={value!r} is not {'a whole' if kind is int else 'a'} number", where=where)
    return kind(value)


def _copied(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in part.items()}
