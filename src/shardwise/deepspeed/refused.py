"""Names of DeepSpeed that are left out, with the reason and the nearest thing."""

from __future__ import annotations

from shardwise.errors import LeftOut

_PIPELINE = "pipelines are left out: strategies shard the states instead; for stages use torch.distributed.pipelining"
_PARALLEL = "data parallelism and sharding are all there is; use torch.distributed.tensor.parallel beside it"

NAMES: dict[str, str] = {
    "train_batch": _PIPELINE,
    "eval_batch": _PIPELINE,
    "inference_batch": _PIPELINE,
    "set_dataloader": _PIPELINE,
    "set_dataiterator": _PIPELINE,
    "set_batch_fn": _PIPELINE,
    "is_first_stage": _PIPELINE,
    "is_last_stage": _PIPELINE,
    "pipe": _PIPELINE,
    "schedule": "DeepCompile's schedules are left out; engine.compile(backend) is torch.compile",
    "compiled_autograd_enabled": "compiled autograd is left out; engine.compile(backend) is torch.compile",
    "register_compile_pass": "DeepCompile's passes are left out; engine.compile(backend) is torch.compile",
    "get_compile_time": "DeepCompile is left out; engine.compile(backend) is torch.compile",
    "set_custom_curriculum_learning_schedule": "curricula are left out: choose the samples in a sampler of your own",
    "get_wall_clock_timers": "wall_clock_breakdown prints them; shardwise.record writes all that happens",
    "tp_model_init": _PARALLEL,
    "init_inference": "use shardwise.load, or transformers with device_map: models that only run are streamed",
    "InferenceEngine": "use shardwise.load",
    "DeepSpeedInferenceConfig": "use shardwise.load",
    "default_inference_config": "use shardwise.load",
    "DeepSpeedHybridEngine": "train and generate with the same model: generate() works on a sharded one",
    "DeepSpeedTransformerLayer": "use torch.nn.TransformerEncoderLayer, or a model of transformers",
    "DeepSpeedTransformerConfig": "use torch.nn.TransformerEncoderLayer, or a model of transformers",
    "replace_transformer_layer": "kernels are not put in place of layers; engine.compile() fuses them",
    "revert_transformer_layer": "kernels are not put in place of layers; engine.compile() fuses them",
    "set_autotp_mode": _PARALLEL,
    "MoE": "use a mixture of experts of transformers or your own, with set_z3_leaf_modules on the block of experts: "
    "experts are split like everything else, not spread over ranks",
}


class Absent(LeftOut, AttributeError):
    """So that ``hasattr`` says no."""


class AbsentImport(LeftOut, ImportError):
    """For ``from ... import``, which hides what an AttributeError says."""


def error(name: str, importing: bool = False) -> LeftOut:
    """What to raise where somebody asks for it."""
    kind = AbsentImport if importing else Absent
    return kind(f"'{name}' of DeepSpeed is left out", where="shardwise.deepspeed", fix=NAMES[name])
