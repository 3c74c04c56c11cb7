"""Read a config file of Hugging Face Accelerate as settings of ours.

Every key ends in one of four ways: it becomes a setting; it becomes a note about what the script has to do now; it is
dropped with a reason, because nothing here depends on it; or it cannot be served, which is an error that says what to
use instead. A key that Accelerate does not have is an error too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from shardwise.cli.settings import Settings, unknown_key
from shardwise.deepspeed_config import DsFacts, load_ds_config, read_ds_config
from shardwise.deepspeed_config.places import PLACES, section_of
from shardwise.errors import ConfigError, LaunchError, StrategyError
from shardwise.strategy import Strategy

# FSDP's sharding strategies, by name and by number; and version 2's reshard_after_forward.
_SHARDINGS = {
    "FULL_SHARD": "zero3",
    "SHARD_GRAD_OP": "zero2",
    "NO_SHARD": "ddp",
    "HYBRID_SHARD": "hsdp",
    "HYBRID_SHARD_ZERO2": "hsdp",
}
_SHARDING_NUMBERS = dict(enumerate(_SHARDINGS, start=1))
_UNSERVED_TYPES = {
    "XLA": "TPUs",
    "TPU": "TPUs",
    "MULTI_XPU": "Intel GPUs",
    "MULTI_NPU": "Ascend devices",
    "MULTI_MLU": "Cambricon devices",
    "MULTI_SDAA": "SDAA devices",
    "MULTI_MUSA": "MUSA devices",
    "MULTI_HPU": "Gaudi devices",
    "MULTI_NEURON": "Neuron cores",
}
_TPU_ONLY = "it is for TPUs only"
_DROPPED = {
    "debug": "ranks that disagree about a collective always end with a report here",
    "same_network": "hosts meet at one endpoint, wherever they are",
    "main_training_function": _TPU_ONLY,
    "downcast_bf16": _TPU_ONLY,
    "enable_cpu_affinity": "ranks are not pinned to cores; it changes speed only",
    "mpirun_config": "mpirun is not needed: run 'shardwise launch' once on each host",
    **dict.fromkeys(
        ("tpu_name", "tpu_zone", "tpu_use_cluster", "tpu_use_sudo", "tpu_vm", "tpu_env", "command", "command_file"),
        _TPU_ONLY,
    ),
    "commands": _TPU_ONLY,
}
_UNITS = "units are found in the model: its repeated blocks; units= in the script chooses others"
_DROPPED_FSDP = {
    "fsdp_version": "there is one engine",
    "fsdp_auto_wrap_policy": _UNITS,
    "fsdp_transformer_layer_cls_to_wrap": _UNITS,
    "fsdp_min_num_params": _UNITS,
    "fsdp_backward_prefetch": "the next unit is always gathered ahead",
    "fsdp_backward_prefetch_policy": "the next unit is always gathered ahead",
    "fsdp_forward_prefetch": "the next unit is always gathered ahead",
    "fsdp_limit_all_gathers": "two units are gathered at a time",
    "fsdp_use_orig_params": "parameters always stay the model's own",
    "fsdp_sync_module_states": "rank 0's values are always sent to everyone",
    "fsdp_cpu_ram_efficient_loading": "rank 0's values are always sent to everyone; each rank builds the model first",
    "fsdp_state_dict_type": "state dicts hold whole tensors, and load under every strategy",
}
_DROPPED_DEEPSPEED = {
    "zero3_init_flag": "each rank builds the model, then keeps its shard",
    "zero3_save_16bit_model": "state_dict() always holds whole weights",
    "deepspeed_moe_layer_cls_names": "ranks may take different branches of any model",
    "deepspeed_hostfile": "run 'shardwise launch' once on each host",
    "deepspeed_multinode_launcher": "run 'shardwise launch' once on each host",
    "deepspeed_inclusion_filter": "run 'shardwise launch' once on each host; devices: names the devices of one",
    "deepspeed_exclusion_filter": "run 'shardwise launch' once on each host; devices: names the devices of one",
}
_SECTIONS = ("fsdp_config", "deepspeed_config", "parallelism_config", "megatron_lm_config", "fp8_config")


def translate(values: dict[str, Any], path: Path) -> tuple[Settings, list[str], dict[str, str]]:
    """The settings that an Accelerate config file stands for.

    Args:
        values: the file's keys and values.
        path: the file, for errors, and because a file it names is looked for beside it as well.

    Returns:
        The settings; notes about what the script has to do from now on; and dropped keys with the reason.

    Raises:
        LaunchError: a key or value that does not exist, or that asks for what Shardwise does not have.
    """
    return _Translation(values, path).run()


class _Translation:
    def __init__(self, values: dict[str, Any], path: Path) -> None:
        self.values, self.path = dict(values), path
        self.notes: list[str] = []
        self.dropped: dict[str, str] = {}
        self.hosts = 1

    def run(self) -> tuple[Settings, list[str], dict[str, str]]:
        kind = self.take("distributed_type", "NO")
        kind = str("NO" if kind is False else kind).upper()  # YAML reads a bare NO as false
        self.refuse(kind)
        sections = {name: self.section(name) for name in _SECTIONS}
        settings = self.processes(kind).over(Settings(mixed_precision=self.precision()))
        cpu = self.flag("use_cpu") or kind == "MULTI_CPU"
        devices = self.take("gpu_ids")
        settings = Settings(
            cpu=True if cpu else None,
            devices=None if cpu or devices in (None, "all") else str(devices).replace(" ", ""),
        ).over(settings)
        if kind == "FSDP":
            settings = self.fsdp(sections["fsdp_config"], sections["parallelism_config"]).over(settings)
        elif kind == "DEEPSPEED":
            settings = self.deepspeed(sections["deepspeed_config"]).over(settings)
        self.unused(kind, sections)
        self.dynamo()
        self.rest(self.values, _DROPPED, "")
        return settings, self.notes, self.dropped

    # --- what is no setting -------------------------------------------------------------------
    def refuse(self, kind: str) -> None:
        where = self.take("compute_environment", "LOCAL_MACHINE")
        if where == "AMAZON_SAGEMAKER":
            self.cannot("Amazon SageMaker jobs are not started by Shardwise", "run 'shardwise launch' inside the job")
        if where != "LOCAL_MACHINE":
            self.cannot(f"compute_environment {where} is not known", "it is LOCAL_MACHINE")
        if kind == "MEGATRON_LM":
            self.cannot(
                "Megatron-LM is not part of Shardwise",
                "distributed_type: FSDP splits the model; torch.distributed.tensor.parallel has tensor parallelism",
            )
        if kind in _UNSERVED_TYPES:
            self.cannot(
                f"distributed_type {kind} asks for {_UNSERVED_TYPES[kind]}; Shardwise runs on CUDA devices and CPUs",
                "MULTI_GPU or MULTI_CPU",
            )
        if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP", "DEEPSPEED"):
            self.cannot(f"distributed_type {kind} is not known", "one of NO, MULTI_GPU, MULTI_CPU, FSDP and DEEPSPEED")

    def unused(self, kind: str, sections: dict[str, dict[str, Any]]) -> None:
        used = {"FSDP": "fsdp_config", "DEEPSPEED": "deepspeed_config"}.get(kind)
        for name, section in sections.items():
            if not section or name == used or (name == "parallelism_config" and kind == "FSDP"):
                continue
            self.dropped[name] = (
                "mixed_precision is not fp8"
                if name == "fp8_config"
                else f"distributed_type is {kind}, which does not use it"
            )

    def dynamo(self) -> None:
        config = self.section("dynamo_config")
        backend = config.get("dynamo_backend", config.get("backend", self.take("dynamo_backend")))
        if backend and str(backend).upper() != "NO":
            self.notes.append(
                f"dynamo_config (backend {backend}): nothing is compiled for you; "
                "call block.compile() on the model's blocks before prepare()"
            )

    # --- processes and precision ----------------------------------------------------------------
    def processes(self, kind: str) -> Settings:
        hosts = self.hosts = self.number("num_machines", 1)
        rank = self.number("machine_rank", 0)
        total = self.number("num_processes", -1)
        host, port = self.take("main_process_ip"), self.take("main_process_port")
        backend = str(self.take("rdzv_backend") or "static")
        nproc = None
        if total != -1:  # Accelerate writes -1 for 'said on the command line'
            if hosts < 1 or total < 1 or total % hosts:
                self.cannot(
                    f"num_processes: {total} are not equally many on each of num_machines: {hosts}",
                    "num_processes counts the ranks of all hosts together",
                )
            nproc = total // hosts
        if kind == "NO" and (nproc or 1) > 1:
            self.notes.append(f"num_processes: {total}: this many run; Accelerate runs one when distributed_type is NO")
        if hosts == 1:
            for key, value in (("main_process_ip", host), ("main_process_port", port)):
                if value is not None:
                    self.dropped[key] = "ranks of one host find each other at a free port"
            return Settings(nproc=nproc)
        if backend not in ("static", "c10d"):
            self.cannot(f"rdzv_backend: {backend} is not served", "static or c10d")
        return Settings(
            nproc=nproc,
            nnodes=hosts,
            # With c10d the hosts agree on who is which.
            node_rank=rank if backend == "static" else None,
            rdzv_endpoint=f"{host}:{port or 29500}" if host else None,
        )

    def precision(self) -> str | None:
        value = self.take("mixed_precision")
        if self.flag("fp16") and value is None:  # files of old versions
            value = "fp16"
        if value is None or value is False or str(value).lower() == "no":
            return None  # as in Accelerate, the script's own word counts then
        name = str(value).lower()
        if name == "fp8":
            self.cannot("mixed_precision: fp8 is not served", "mixed_precision: bf16")
        return name

    # --- strategies -------------------------------------------------------------------------
    def fsdp(self, given: dict[str, Any], parallel: dict[str, Any]) -> Settings:
        config = {key if key.startswith("fsdp_") else f"fsdp_{key}": value for key, value in given.items()}
        sharding = config.pop("fsdp_sharding_strategy", None)
        reshard = config.pop("fsdp_reshard_after_forward", None)
        preset = self.sharding(sharding if sharding is not None else reshard)
        offload = _truth(config.pop("fsdp_offload_params", False))
        recompute = _truth(config.pop("fsdp_activation_checkpointing", False))
        offloaded = _truth(config.pop("fsdp_activation_checkpointing_offload", False)) and recompute
        if config.pop("fsdp_ignored_modules", None):
            self.cannot(
                "fsdp_ignored_modules is not served", "shard the other submodules with fully_shard in the script"
            )
        self.rest(config, _DROPPED_FSDP, "fsdp_config")
        size = self.parallelism(parallel)
        if size is not None:
            preset = "hsdp"
        strategy = Strategy(
            preset,
            shard_size=size,
            activation_checkpointing=recompute,
            activation_offload="cpu" if offloaded else "device",
        )
        if offload:
            strategy = strategy.replace(offload_params="cpu", offload_grads="cpu", offload_optimizer="cpu")
        return Settings(strategy=str(strategy))

    def sharding(self, value: Any) -> str:
        if value is None or isinstance(value, bool) or str(value).lower() in ("true", "false"):
            return "zero3" if value is None or _truth(value) else "zero2"
        name = str(value).upper()
        name = _SHARDING_NUMBERS.get(int(name), name) if name.isdigit() else name
        if name not in _SHARDINGS:
            self.cannot(f"FSDP has no sharding strategy {value}", f"one of {', '.join(_SHARDINGS)}, true or false")
        if name == "HYBRID_SHARD_ZERO2":
            self.notes.append("HYBRID_SHARD_ZERO2 runs as hsdp, which also releases parameters after forward")
        return _SHARDINGS[name]

    def parallelism(self, given: dict[str, Any]) -> int | None:
        """Ranks per copy of the states, where there are several copies."""
        prefix = "parallelism_config_"
        config = {key.removeprefix(prefix): value for key, value in given.items()}
        for axis, what in (("tp", "tensor"), ("cp", "context"), ("sp", "sequence")):
            if int(config.get(f"{axis}_size") or 1) > 1:
                self.cannot(
                    f"{prefix}{axis}_size: {what} parallelism is not served by the launcher",
                    "split the model itself with torch.distributed.tensor.parallel, or leave it out",
                )
        known = {"dp_replicate_size", "dp_shard_size"}
        for key, value in config.items():
            if key in known:
                continue
            if key.partition("_")[0] not in ("tp", "cp", "sp"):
                raise unknown_key(key, sorted(known), self.path, "parallelism_config")
            if key[3:] != "size" and value:
                self.dropped[f"parallelism_config.{key}"] = "there is no such axis in this file"
        replicas, shard = int(config.get("dp_replicate_size") or 1), int(config.get("dp_shard_size") or 1)
        return shard if replicas > 1 else None

    def deepspeed(self, given: dict[str, Any]) -> Settings:
        config = dict(given)
        file = config.pop("deepspeed_config_file", None)
        path = self.beside(str(file)) if file not in (None, "none") else None
        # What the section says goes into the configuration that it names, or into one of its own.
        values, where = self.deepspeed_file(path) if path else ({"zero_optimization": {"stage": 2}}, str(self.path))
        try:
            for name, place in PLACES.items():
                if name in config and name not in _DROPPED_DEEPSPEED:
                    part, key = section_of(values, place, where)
                    part[key] = _value(config.pop(name))
            facts = read_ds_config(values, where, door="accelerate")
            arguments = {**facts.strategy_arguments(), "param_dtype": None}  # the precision is said by itself
            strategy = str(Strategy(**arguments))
        except (StrategyError, ConfigError) as error:
            raise LaunchError(str(error.what), where=error.where or str(self.path), fix=str(error.fix)) from None
        self.deepspeed_notes(facts, values, path)
        self.rest(config, _DROPPED_DEEPSPEED, "deepspeed_config")
        return Settings(
            strategy=strategy, gradient_accumulation_steps=facts.accumulation, mixed_precision=facts.param_dtype
        )

    def deepspeed_file(self, path: Path) -> tuple[dict[str, Any], str]:
        """What DeepSpeed's own file says, without what a script of Accelerate builds."""
        if not path.is_file():
            self.cannot(f"cannot read {path}: there is no such file", "correct deepspeed_config_file")
        values, where = load_ds_config(path)
        for key in ("optimizer", "scheduler"):
            if values.pop(key, None):
                self.notes.append(
                    f"'{key}' of {path.name}: build it in the script, in place of accelerate's Dummy class"
                )
        return values, where

    def deepspeed_notes(self, facts: DsFacts, values: dict[str, Any], path: Path | None) -> None:
        if facts.clipping is not None:
            self.notes.append(
                f"gradient_clipping: {facts.clipping:g}: the script has to clip, with "
                f"accelerator.clip_grad_norm_(model.parameters(), {facts.clipping:g})"
            )
        if self.hosts > 1:
            self.notes.append("DeepSpeed's launcher reaches all hosts; run 'shardwise launch' once on each")
        if path is None:
            return
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
            if values.get(key, "auto") != "auto":
                self.dropped[f"{path.name}: {key}"] = "the script's DataLoader says the batch size of a rank"
        for key in facts.idle:
            self.dropped[f"{path.name}: {key}"] = "a setting of DeepSpeed's engine"
        for key in facts.scaler:
            self.dropped[f"{path.name}: fp16 ({key})"] = "a GradScalerKwargs of the script says how losses are scaled"

    def beside(self, name: str) -> Path:
        """A file that the config names: as it stands, or next to the config."""
        path = Path(name).expanduser()
        return path if path.is_file() or path.is_absolute() else self.path.parent / path

    # --- reading ----------------------------------------------------------------------------
    def take(self, key: str, default: Any = None) -> Any:
        value = self.values.pop(key, None)
        return default if value is None else value

    def flag(self, key: str) -> bool:
        return _truth(self.take(key, False))

    def number(self, key: str, default: int) -> int:
        value = self.take(key, default)
        if isinstance(value, bool) or not str(value).lstrip("-").isdigit():
            self.cannot(f"'{key}: {value}' is not a whole number", f"give {key} a whole number")
        return int(value)

    def section(self, name: str) -> dict[str, Any]:
        value = self.take(name, {})
        if not isinstance(value, dict):
            self.cannot(f"{name} does not hold keys and values", "indent them below it")
        return {key: v for key, v in value.items() if v is not None}

    def rest(self, left: dict[str, Any], reasons: dict[str, str], inside: str) -> None:
        """What is left must be known; where it asks for something it is dropped with its reason."""
        for key, value in left.items():
            if key not in reasons:
                raise unknown_key(key, sorted(reasons), self.path, inside)
            asks = value not in (None, False, "no", "", "none", [], {}, [""]) and (key, value) != (
                "main_training_function",
                "main",
            )
            if asks and reasons[key]:
                self.dropped[f"{inside}.{key}" if inside else key] = reasons[key]

    def cannot(self, what: str, fix: str) -> NoReturn:
        raise LaunchError(what, where=str(self.path), fix=fix)


def _truth(value: Any) -> bool:
    return value if isinstance(value, bool) else str(value).lower() in ("true", "yes", "1")


def _value(value: Any) -> Any:
    """A value of Accelerate's file as DeepSpeed's has it: a number, a word, or nothing."""
    text = str(value)
    if text.lower() in ("none", "auto"):
        return None if text.lower() == "none" else "auto"
    try:
        return float(text) if "." in text or "e" in text.lower() else int(text)
    except ValueError:
        return text.lower() if text.lower() in ("cpu", "nvme") else value
