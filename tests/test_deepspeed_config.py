"""DeepSpeed's configuration: every key is known, and every value that means something is read or refused."""

from __future__ import annotations

import argparse
import base64
import json
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ranks import run
from shardwise.deepspeed.config import DeepSpeedConfig, DeepSpeedConfigError, add_config_arguments
from shardwise.deepspeed_config import LossScaling, all_keys, load_ds_config, read_ds_config, resolved_batch
from shardwise.deepspeed_config.document import table_of_keys
from shardwise.deepspeed_config.keys import Kind
from shardwise.deepspeed_config.tables import TABLES
from shardwise.errors import ConfigError

FULL: dict[str, Any] = {
    "train_batch_size": 24,
    "train_micro_batch_size_per_gpu": 3,
    "gradient_accumulation_steps": 4,
    "managed_gradient_accumulation": False,
    "dataloader_drop_last": True,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    "gradient_clipping": 0.5,
    "fp16": {
        "enabled": True, "loss_scale": 0, "initial_scale_power": 10, "loss_scale_window": 7, "hysteresis": 3,
        "consecutive_hysteresis": True, "min_loss_scale": 4,
    },
    "communication_data_type": "BF16",
    "gradient_allreduce_op": "Sum",
    "prescale_gradients": True,
    "gradient_predivide_factor": 2,
    "steps_per_print": 5,
    "wall_clock_breakdown": True,
    "flops_profiler": {"enabled": True, "profile_step": 3, "detailed": False},
    "csv_monitor": {"enabled": True, "output_path": "logs"},
    "tensorboard": {"enabled": False, "job_name": "x"},
    "checkpoint": {"tag_validation": "Fail", "parallel_write": {"pipeline_stage": True}},
    "compile": {"backend": "eager"},
    "activation_checkpointing": {"cpu_checkpointing": True},
    "zero_optimization": {
        "stage": 3, "overlap_comm": True, "leaf_module": {"classes": "Block", "names": ["a"], "name_suffixes": []},
        "offload_optimizer": {"device": "nvme", "nvme_path": "/n", "ratio": 0.5, "pin_memory": False},
        "offload_param": {"device": "cpu"}, "stage3_prefetch_bucket_size": "auto",
    },
}  # fmt: skip


def test_everything_that_is_served():
    facts = read_ds_config(FULL)
    assert facts.optimizer == ("AdamW", {"lr": 0.1})
    assert facts.scheduler == ("WarmupLR", {"warmup_num_steps": "auto"})
    assert facts.loss_scale == LossScaling(None, 1024.0, 7, 3, True, 4.0) and facts.check_overflow
    assert (facts.param_dtype, facts.reduce_dtype, facts.reduce_op) == ("fp16", "bf16", "sum")
    assert (facts.prescale, facts.clipping, facts.steps_per_print, facts.wall_clock) == ((True, 2.0), 0.5, 5, True)
    assert facts.flops_profiler == {"profile_step": 3, "detailed": False}
    assert facts.monitors == {"csv_monitor": {"output_path": "logs"}}
    assert (facts.tag_validation, facts.compile) == ("fail", {"backend": "eager"})
    assert facts.leaf_modules == {"classes": ["Block"], "names": ["a"]}
    assert (facts.managed_accumulation, facts.drop_last) == (False, True)
    assert facts.strategy_arguments() == {
        "preset": "zero3", "shard_size": None, "offload_params": "cpu", "offload_optimizer": "nvme",
        "offload_ratio": 0.5, "nvme_path": "/n", "pin_memory": False, "param_dtype": "fp16", "reduce_dtype": "bf16",
        "activation_offload": "cpu",
    }  # fmt: skip
    assert facts.idle == ("checkpoint.parallel_write", "zero_optimization.overlap_comm")
    assert facts.unfilled == ("zero_optimization.stage3_prefetch_bucket_size",)


def test_what_is_so_when_nothing_is_said():
    facts = read_ds_config({})
    assert (facts.optimizer, facts.scheduler, facts.clipping, facts.loss_scale) == (None, None, None, None)
    assert (facts.reduce_op, facts.tag_validation, facts.preset, facts.managed_accumulation) == (
        "mean", "warn", "ddp", True,
    )  # fmt: skip
    assert read_ds_config({"fp16": {"enabled": True}}).loss_scale == LossScaling()
    assert read_ds_config({"fp16": {"enabled": True, "loss_scale": 128}}).loss_scale.static == 128.0
    assert read_ds_config({"bf16": {"enabled": True}}).check_overflow
    assert not read_ds_config({"bf16": {"enabled": True, "check_grad_overflow": False}}).check_overflow
    assert read_ds_config({"zero_optimization": True}).stage == 1  # the oldest form
    assert read_ds_config({"zero_optimization": {"cpu_offload": True}}).offload_optimizer == "cpu"
    assert read_ds_config({"steps_per_print": float("inf"), "gradient_clipping": 0}).clipping is None
    off = {"enabled": False}
    quiet = {"data_efficiency": off, "comms_logger": off, "elasticity": off, "sequence_parallel_size": 1, "amp": off}
    assert read_ds_config({**quiet, "tensor_parallel": {"autotp_size": 1}, "fp16": {"hysteresis": 2}}).idle == ()


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"train_batch_sise": 8}, "did you mean 'train_batch_size'"),
        ({"stage": 3}, "it belongs into zero_optimization"),
        ({"zero_optimization": {"train_batch_size": 8}}, "it belongs to the top"),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, "offload_optimizer.devise.*\n.*'device'"),
        ({"fp16": {"loss_scal": 0}}, "fp16.loss_scal .*\n.*'loss_scale'"),
        ({"zero_optimization": {"offload_param": {"device": "disk"}}}, "none, cpu or nvme"),
        ({"zero_optimization": 3}, "is a section"),
        ({"zero_optimization": {"stage": True}}, "not a whole number"),
        ({"zero_optimization": {"leaf_module": {"classes": [3]}}}, "list of names"),
        ({"zero_optimization": {"mics_shard_size": 2, "stage": 1}}, "belongs to stage 3"),
        ({"optimizer": {"params": {"lr": 1}}}, "optimizer has no type"),
        ({"optimizer": {"type": "Adam", "parms": {}}}, "did you mean 'params'"),
        ({"scheduler": {"type": 3}}, "is not a name"),
        ({"gradient_clipping": -1}, "less than 0"),
        ({"gradient_clipping": True}, "is not a number"),
        ({"gradient_allreduce_op": "max"}, "mean or sum"),
        ({"gradient_predivide_factor": 0}, "divides nothing"),
        ({"communication_data_type": "fp8"}, "fp32, fp16 or bf16"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "gradients accumulate in fp32"),
        ({"data_types": {"param_dtype": "bf16"}}, "convert the model"),
        ({"bf16": {"enabled": True}, "bfloat16": {"enabled": True}}, "one section"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "both enabled"),
        ({"bf16": {"enabled": "yes"}}, "neither true nor false"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "give a model in bf16"),
        ({"fp16": {"enabled": True, "loss_scale": float("inf")}}, "not finite"),
        ({"fp16": {"enabled": True, "loss_scale_window": 0}}, "loss_scale_window=0 is less than 1"),
        ({"fp16": {"enabled": True, "min_loss_scale": 0}}, "no scale"),
        ({"fp16": {"enabled": True, "initial_scale_power": 400}}, "no finite scale"),
        ({"checkpoint": {"tag_validation": "wran"}}, "did you mean 'warn'"),
        ({"checkpoint": {"use_node_local_storage": True}}, "shared folder"),
        ({"compile": {"deepcompile": True}}, "engine.compile"),
        ({"data_efficiency": {"enabled": True}}, "choose samples in the script"),
        ({"curriculum_learning": {"enabled": True}}, "taken it out itself"),
        ({"sequence_parallel_size": 2}, "not split over ranks"),
        ({"tensor_parallel": {"autotp_size": 2}}, "stage 3 splits"),
        ({"elasticity": {"enabled": True}}, "--min-nproc"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "use bf16"),
        ({"zero_optimization": {"zero_hpz_partition_size": 4}}, "hsdp"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zenflow is not served"),
        ({"zero_optimization": {"zenflow": {}}}, "zenflow is not served"),
        ({"train_batch_size": 0}, "1 or more"),
        ({"train_batch_size": 8.5}, "whole number"),
    ],
)
def test_what_is_refused_by_name(config, text):
    with pytest.raises(ConfigError, match=text) as caught:
        read_ds_config(config, "ds.json")
    assert "ds.json" in str(caught.value)


def test_the_accelerate_door_has_a_column_of_its_own():
    """What a script of Accelerate builds by itself is refused there, and served here."""
    for name, key in TABLES[""].items():
        if key.accelerate is None or key.accelerate.kind is not Kind.REFUSED:
            continue
        value = {"gradient_allreduce_op": "sum"}.get(name, {"enabled": True, "type": "Adam"})
        part = {k: v for k, v in value.items() if k in TABLES[name]} if isinstance(value, dict) else value
        read_ds_config({name: part})
        with pytest.raises(ConfigError, match=f"{name} is not served"):
            read_ds_config({name: part}, door="accelerate")
    with pytest.raises(ConfigError, match="losses are scaled dynamically"):
        read_ds_config({"fp16": {"enabled": True, "loss_scale": 4}}, door="accelerate")
    fp16 = {"fp16": {"enabled": True, "hysteresis": 3}}
    assert read_ds_config(fp16).idle == () and read_ds_config(fp16, door="accelerate").idle == ("fp16.hysteresis",)


def test_every_row_says_what_it_means():
    for path, key in all_keys().items():
        assert key.says and (key.fix or key.kind is not Kind.REFUSED), path
        assert key.accelerate is None or key.accelerate.kind is not Kind.REFUSED or key.accelerate.fix, path


# --- batch sizes -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((24, 3, 4), (24, 3, 4)), ((24, 3, None), (24, 3, 4)), ((24, None, 4), (24, 3, 4)), ((None, 3, 4), (24, 3, 4)),
        ((24, None, None), (24, 12, 1)), ((None, 3, None), (6, 3, 1)), (("auto", 3, "auto"), (6, 3, 1)),
        ((None, None, 4), "how long a batch is"), (("auto", "auto", None), "how long a batch is"),
        ((12, 3, 4), "are 24"), ((9, None, None), "2 ranks"), ((24, 24, None), "not a number of micro-batches"),
        ((6, None, 4), "is no multiple"),
    ],
)  # fmt: skip
def test_of_three_sizes_one_follows(sizes, expected):
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config = dict(zip(names, sizes, strict=True))
    if isinstance(expected, tuple):
        assert resolved_batch(read_ds_config(config), 2) == expected
        return
    with pytest.raises(ConfigError, match=expected):
        resolved_batch(read_ds_config(config), 2)


@pytest.mark.parametrize("path", ["fp16.enabled", "bf16.enabled", "zero_optimization.stage", "wandb.enabled"])
def test_a_switch_that_is_left_at_auto(path):
    section, key = path.split(".")
    facts = read_ds_config({"train_batch_size": 2, section: {key: "auto"}})  # whoever fills it in may still come
    with pytest.raises(ConfigError, match=f"{path} is 'auto', and nobody has filled it in"):
        resolved_batch(facts, 1)
    quiet = {"gradient_clipping": "auto", "zero_optimization": {"reduce_bucket_size": "auto"}, "fp16": "auto"}
    assert resolved_batch(read_ds_config({"train_batch_size": 2, **quiet}), 1) == (2, 2, 1)


# --- where it comes from -----------------------------------------------------------------------------------
def test_a_dict_a_file_base64_or_what_holds_one(tmp_path):
    config = {"train_batch_size": 2, "zero_optimization": {"stage": 2}}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    encoded = base64.urlsafe_b64encode(json.dumps(config).encode()).decode()
    for source in (config, path, str(path), encoded, SimpleNamespace(config=config), DeepSpeedConfig(config)):
        found, _ = load_ds_config(source)
        assert found == config and found is not config
    for text, what in (('{"a": 1, "a": 2}', "there twice"), ("[1]", "no JSON object"), ("{", "is not JSON")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=what):
            load_ds_config(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_ds_config("no_such_file")


def test_a_file_with_comments(tmp_path, monkeypatch):
    path = tmp_path / "ds.json"
    path.write_text("{\n  # a step\n  train_batch_size: 2\n}")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "hjson", None)
        with pytest.raises(ConfigError, match=r"is not JSON(.|\n)*pip install hjson"):
            load_ds_config(path)
    pytest.importorskip("hjson")
    assert load_ds_config(path)[0] == {"train_batch_size": 2}
    path.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_ds_config(path)


def two_ranks() -> tuple[int, int, int, int]:
    found = DeepSpeedConfig({"train_batch_size": 8, "gradient_accumulation_steps": 2})
    sizes = found.train_batch_size, found.train_micro_batch_size_per_gpu, found.gradient_accumulation_steps
    return *sizes, found.world_size


def test_deepspeed_config():
    found = DeepSpeedConfig(FULL, mpu=SimpleNamespace(get_data_parallel_world_size=lambda: 2))
    assert (found.world_size, found.train_batch_size, found.zero_optimization_stage, found.zero_enabled) == (
        2,
        24,
        3,
        True,
    )
    assert (found.optimizer_name, found.scheduler_params) == ("AdamW", {"warmup_num_steps": "auto"})
    assert found.float16_config.enabled and found.float16_config.hysteresis == 3 and not found.bfloat16_config.enabled
    assert found.zero_config.offload_optimizer.device == "nvme" and "24 = 3 * 4" in repr(found)
    with pytest.raises(DeepSpeedConfigError, match="are 12"):
        DeepSpeedConfig(FULL)
    assert run(2, two_ranks) == [(8, 2, 2, 2)] * 2


def test_arguments_of_scripts():
    parser = argparse.ArgumentParser()
    parser.add_argument("--deepspeed_config", default="mine.json")
    assert add_config_arguments(parser) is parser
    args = parser.parse_args(["--deepspeed"])
    assert args.deepspeed and args.deepspeed_config == "mine.json" and not args.deepscale
    args = add_config_arguments(argparse.ArgumentParser()).parse_args(["--deepspeed_config", "ds.json"])
    assert args.deepspeed_config == "ds.json" and not args.deepspeed and args.deepscale_config is None


# --- beside real DeepSpeed ---------------------------------------------------------------------------------
class Asked(dict[str, Any]):
    """A configuration that notes which keys it was asked for."""

    def __init__(self, values: dict[str, Any], prefix: str, seen: set[str]) -> None:
        super().__init__({k: Asked(v, f"{prefix}{k}.", seen) if isinstance(v, dict) else v for k, v in values.items()})
        self.prefix, self.seen = prefix, seen

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Asked, (dict(self), self.prefix, self.seen)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(f"{self.prefix}{key}")
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.seen.add(f"{self.prefix}{key}")
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.seen.add(f"{self.prefix}{key}")
        return super().__getitem__(key)

    def keys(self) -> Any:
        return self


def fields(model: Any, prefix: str) -> Iterator[str]:
    """Every key of a pydantic model, and of those inside it."""
    from pydantic import BaseModel

    for name, field in model.model_fields.items():
        for key in {name, field.alias or name}:
            yield f"{prefix}{key}"
        for kind in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from fields(kind, f"{prefix}{name}.")


def test_every_key_of_deepspeed_is_in_our_tables(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime import config as theirs
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    seen: set[str] = set()
    sections = {
        "flops_profiler": {}, "activation_checkpointing": {}, "data_types": {}, "aio": {}, "checkpoint": {},
        "optimizer": {"type": "Adam", "params": {}}, "scheduler": {"type": "WarmupLR", "params": {}},
        "comms_logger": {}, "timers": {"throughput": {}},
    }  # fmt: skip
    theirs.DeepSpeedConfig(Asked({"train_batch_size": 1, **sections}, "", seen))
    for model, section in (
        (DeepSpeedZeroConfig, "zero_optimization."), (DeepSpeedFP16Config, "fp16."), (DeepSpeedBF16Config, "bf16."),
        (DeepSpeedMonitorConfig, ""), (CompileConfig, "compile."), (CommsLoggerConfig, "comms_logger."),
    ):  # fmt: skip
        seen |= set(fields(model, section))
    seen |= set(theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    seen |= {f"zero_optimization.{key}" for key in theirs._REMOVED_ZERO_CONFIG_KEYS}
    known = all_keys()
    inner = {path for path in known if path not in TABLES}  # what is inside of these is not ours to know
    inside = {path for path in seen if any(path.startswith(f"{key}.") for key in inner)}
    assert len(seen) > 150 and "aio.block_size" in seen and "zero_optimization.stage3_max_live_parameters" in seen
    assert seen - inside - set(known) == set()


def test_deepspeed_agrees_about_batches_and_scales(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig as Theirs

    for sizes in ((8, 2, 4), (8, 2, None), (8, None, 4), (None, 2, 4), (8, None, None), (None, 2, None)):
        names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        config = {k: v for k, v in zip(names, sizes, strict=True) if v is not None}
        a, b = Theirs(dict(config)), DeepSpeedConfig(config)
        assert [getattr(a, name) for name in names] == [getattr(b, name) for name in names]
    config = {"train_batch_size": 1, "fp16": {"enabled": True}}
    usual = Theirs(dict(config)).float16_config
    ours = read_ds_config(config).loss_scale
    assert ours is not None
    assert (2**usual.initial_scale_power, usual.loss_scale_window, usual.hysteresis, usual.min_loss_scale) == (
        ours.initial, ours.window, ours.hysteresis, ours.minimum,
    )  # fmt: skip


# --- documents ---------------------------------------------------------------------------------------------
def test_the_document_has_the_table():
    text = (Path(__file__).parents[1] / "docs" / "from_deepspeed.md").read_text()
    _, _, rest = text.partition("<!-- keys: python -m shardwise.deepspeed_config.document -->\n")
    assert rest.partition("\n<!-- end of keys -->")[0] == table_of_keys(), "print the table anew"


def test_a_section_as_an_object():
    from shardwise.deepspeed.runtime.zero.config import DeepSpeedZeroConfig, DeepSpeedZeroOffloadOptimizerConfig

    config = DeepSpeedZeroConfig(
        stage=3,
        cpu_offload_param=True,
        offload_optimizer={"device": "cpu", "ratio": 0.3},
        stage3_max_reuse_distance=5,
        stage3_gather_fp16_weights_on_model_save=True,
        leaf_module={"classes": "a.B"},
    )
    assert isinstance(config.offload_optimizer, DeepSpeedZeroOffloadOptimizerConfig)
    assert (config.stage.name, config.offload_optimizer.ratio, config.offload_param.device.value) == (
        "weights",
        0.3,
        "cpu",
    )
    assert (config.max_reuse_distance, config.gather_16bit_weights_on_model_save) == (5, True)
    assert (config.leaf_module.classes, config.leaf_module.names, config.overlap_comm) == (["a.B"], [], None)
    facts = read_ds_config({"zero_optimization": config.model_dump()})
    assert (facts.stage, facts.offload_params, facts.offload_ratio) == (3, "cpu", 0.3)
    assert DeepSpeedZeroConfig().offload_param is None
    with pytest.raises(AttributeError, match="no attribute 'stge'"):
        _ = config.stge
    for wrong in ({"stge": 3}, {"offload_param": {"devise": "cpu"}}, {"stage": 4}, {"zenflow": {}}):
        with pytest.raises(ConfigError, match="DeepSpeedZero"):
            DeepSpeedZeroConfig(**wrong)
