"""``shardwise config``, ``launch --config``, and files of Accelerate, through the command line."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardwise import ShardwiseError, cli
from shardwise.cli import settings_file as files
from shardwise.cli.settings import Settings
from test_launch import ECHO, SRC, command, refused, said, script

ALL = Settings(
    nproc=2, devices=None, nnodes=2, node_rank=1, rdzv_endpoint="host0:29400", rdzv_id="7", max_restarts=3,
    strategy="zero2,reduce_dtype=bf16", mixed_precision="no", gradient_accumulation_steps=4, cpu=True,
)  # fmt: skip

# What contradicts something of the above.
ONE_HOST = Settings(nproc=2, devices="0,1", max_restarts=3, min_nproc=1)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def ran(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object
) -> tuple[dict[str, Any], str]:
    """What a command that succeeds prints: the YAML on stdout, and stderr."""
    monkeypatch.setattr(sys, "argv", ["shardwise", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    text = capsys.readouterr()
    assert not end.value.code, text.err
    return yaml.safe_load(text.out), text.err


# --- our own files ------------------------------------------------------------------------------
@pytest.mark.parametrize("wanted", [ALL, replace(ONE_HOST, strategy="ddp", mixed_precision="no", cpu=False)])
def test_every_value_is_a_flag_and_comes_back(
    wanted: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: list[object] = []
    for f in fields(Settings):
        value = getattr(wanted, f.name)
        if f.name == "cpu":
            flags.append("--cpu" if value else "--no-cpu")
        elif value is not None:
            flags += [f"--{f.name.replace('_', '-')}", value]
    printed, err = ran(monkeypatch, capsys, "config", *flags, "-o", "mine.yaml")
    assert printed == wanted.said()
    assert "wrote mine.yaml" in err and "shardwise launch --config mine.yaml your_script.py" in err
    assert files.read(Path("mine.yaml")).settings == wanted
    read = files.read(Path("mine.yaml")).settings
    assert read.mixed_precision == "no"  # which a bare YAML 'no' is not


def test_the_default_file_is_used_and_said_and_flags_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = ran(monkeypatch, capsys, "config", "--nproc", 3, "--cpu", "--strategy", "zero1", "--yes")
    path = tmp_path / "shardwise" / "config.yaml"
    assert path.is_file() and "next: shardwise launch your_script.py" in err
    name = script(tmp_path, ECHO)

    code, _, err = command("launch", "--nproc", 2, "--gradient-accumulation-steps", 2, name, cwd=tmp_path)
    assert code == 0, err
    assert err == f"shardwise: settings from {path} (--no-config leaves it out)\n"
    assert [(e["WORLD_SIZE"], e["SHARDWISE_STRATEGY"], e["SHARDWISE_CPU"]) for e, _ in said(tmp_path)] == [
        ("2", "zero1", "1")
    ] * 2

    code, _, err = command("launch", "--no-config", "--cpu", "-n", 1, name, cwd=tmp_path)
    assert code == 0 and err == ""
    assert said(tmp_path)[0][0]["SHARDWISE_STRATEGY"] is None


def test_a_flag_may_contradict_the_files_fewest_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files.write(replace(ONE_HOST, nproc=4, devices=None, min_nproc=3), Path("mine.yaml"))
    for flags in (["-n", "2"], ["--max-restarts", "0"]):
        assert "no script 'nothere.py'" in refused(
            monkeypatch, capsys, "launch", "--config", "mine.yaml", *flags, "nothere.py"
        )
    err = refused(
        monkeypatch, capsys,
        "launch", "--config", "mine.yaml", "--nnodes", "2", "--rdzv-endpoint", "host0:1", "nothere.py",
    )  # fmt: skip
    assert "--min-nproc 3 on 2 hosts" in err


def test_a_file_is_not_replaced_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("old.yaml").write_text("nproc: 7\n")
    err = refused(monkeypatch, capsys, "config", "--yes", "-o", "old.yaml")
    assert "exists already" in err and "--force" in err
    assert Path("old.yaml").read_text() == "nproc: 7\n"
    printed, _ = ran(monkeypatch, capsys, "config", "--yes", "--cpu", "-o", "old.yaml", "--force")
    assert printed == {"nproc": 1, "strategy": "ddp", "mixed_precision": "no", "cpu": True}
    assert not list(tmp_path.glob(".old*"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--nproc, --strategy, --mixed-precision"),
        (["--nproc", "2", "--strategy", "ddp"], "nothing says --mixed-precision"),
        (["--yes", "--strategy", "zero7"], "one of ddp"),
        (["--yes", "--mixed-precision", "fp8"], "one of no, fp16, bf16"),
        (["--yes", "--nproc", "0"], "--nproc 0"),
        (["--yes", "--nnodes", "2"], "--rdzv-endpoint"),
        (["--yes", "--strategy", "zero3,offload_grads=nvme"], "offload_grads='nvme' is not known"),
        (["--yes", "-o", "file/under.yaml"], "cannot write file/under.yaml"),
        (["--from", "nothere.yaml"], "cannot read nothere.yaml"),
    ],
)
def test_wrong_requests_are_refused_and_write_nothing(
    args: list[str], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    Path("file").write_text("")
    err = refused(monkeypatch, capsys, "config", *args)
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "shardwise").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nprocs: 2\n", "there is no key 'nprocs'\n  fix: did you mean 'nproc'?"),
        ("num_processes: 2\n", "did you mean 'nproc'?"),
        ("stratgey: zero2\n", "did you mean 'strategy'?"),
        ("quux: 1\n", "the keys are nproc, devices"),
        ("nproc: 2\nstrategy: [zero2\n", "s.yaml, line 3: not valid YAML"),
        ("nproc: 2\nnproc: 3\n", "s.yaml, line 2: not valid YAML: 'nproc' is given twice"),
        ("nproc: two\n", "'nproc: two' is not a whole number"),
        ("nproc: true\n", "is not a whole number"),
        ("cpu: 1\n", "is not true or false"),
        ("strategy: {zero2: 1}\n", "is not text"),
        ("- nproc\n", "does not hold keys and values"),
        ("nproc: 0\n", "s.yaml: --nproc 0 is not a number of ranks"),
        ("strategy: zero5\n", "zero5"),
        ("strategy: zero3,offload_params=disk\n", "offload_params='disk' is not known"),
        ("mixed_precision: fp8\n", "one of no, fp16, bf16"),
        ("\x00\x01", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_named_with_the_place_and_the_fix(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("s.yaml").write_text(text)
    Path("x.py").write_text("")
    err = refused(monkeypatch, capsys, "launch", "--config", "s.yaml", "x.py")
    assert message in err and "s.yaml" in err and "Traceback" not in err


def test_what_is_no_text_file_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.yaml").write_bytes(b"\xff\xfe\x00nproc")
    assert "is not a text file" in refused(monkeypatch, capsys, "launch", "--config", "s.yaml", "x.py")
    assert "cannot read ." in refused(monkeypatch, capsys, "launch", "--config", ".", "x.py")


def test_a_file_may_leave_to_flags_what_only_makes_sense_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("two.yaml").write_text("nnodes: 2\nnproc: 1\ncpu: true\n")
    Path("x.py").write_text("")
    assert "--rdzv-endpoint" in refused(monkeypatch, capsys, "launch", "--config", "two.yaml", "x.py")
    Path("s.yaml").write_text("nnodes: 2\nnproc: 1\ncpu: true\nnode_rank: 1\nrdzv_endpoint: a:1\nmixed_precision: no\n")
    code, _, err = command("launch", "--config", "s.yaml", "--nnodes", 1, script(tmp_path, ECHO), cwd=tmp_path)
    assert code == 0, err
    assert said(tmp_path)[0][0]["SHARDWISE_MIXED_PRECISION"] == "no"


# --- the dialogue, on a real terminal -------------------------------------------------------------
def dialogue(folder: Path, *answers: str, args: tuple[str, ...] = ()) -> tuple[int, str]:
    """Run ``shardwise config`` on a pseudo-terminal and answer each prompt; returns exit code and what was shown."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "shardwise", "config", *args], cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "PYTHONPATH": SRC, "CUDA_VISIBLE_DEVICES": ""}, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    shown, left, answered = "", list(answers), 0
    until = time.monotonic() + 30
    try:
        while time.monotonic() < until:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    data = os.read(ours, 4096)
                except OSError:  # the other side has closed
                    break
                if not data:
                    break
                shown += data.decode()
            elif process.poll() is not None:
                break
            if left and shown[answered:].rstrip(" ").endswith(("]:", "?:", "them:")):
                answered = len(shown)
                os.write(ours, (left.pop(0) + "\n").encode())
        return process.wait(timeout=20), shown
    finally:
        process.kill()
        os.close(ours)


def test_the_dialogue_asks_little_and_asks_again_after_a_wrong_answer(tmp_path: Path) -> None:
    code, shown = dialogue(tmp_path, "", "zero", "2", "zero9", "zero3", "script")
    assert code == 0, shown
    assert "'zero' is not a number" in shown
    assert "one of ddp, zero1, zero2, zero3, hsdp" in shown
    path = tmp_path / "shardwise" / "config.yaml"
    assert yaml.safe_load(path.read_text()) == {"nproc": 2, "strategy": "zero3", "cpu": True}
    assert "host:port" not in shown and "devices" not in shown  # one host without CUDA: not asked
    assert "next: shardwise launch your_script.py" in shown

    code, shown = dialogue(tmp_path, "n", args=("--yes", "--cpu"))
    assert code == 2 and "exists already" in shown  # --yes asks nothing, and replaces nothing


def test_flags_are_not_asked_and_several_hosts_need_an_endpoint(tmp_path: Path) -> None:
    code, shown = dialogue(
        tmp_path, "host0", "host0:29400", "",
        args=("--nnodes", "2", "--nproc", "2", "--strategy", "hsdp,shard_size=2", "-o", "two.yaml"),
    )  # fmt: skip
    assert code == 0, shown
    assert "How many" not in shown and "is not host:port" in shown
    assert yaml.safe_load((tmp_path / "two.yaml").read_text()) == {
        "nproc": 2, "nnodes": 2, "rdzv_endpoint": "host0:29400", "strategy": "hsdp,shard_size=2",
        "mixed_precision": "no", "cpu": True,
    }  # fmt: skip


# --- Accelerate's files ---------------------------------------------------------------------------
def accelerate_file(path: Path, **values: Any) -> Path:
    """A file as Accelerate's own classes write it."""
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    base = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "mixed_precision": "no",
        "use_cpu": False, "debug": False, "num_processes": 1,
    }  # fmt: skip
    config = config_args.ClusterConfig(**{**base, **values})
    (config.to_json_file if path.suffix == ".json" else config.to_yaml_file)(str(path))
    return path


FSDP = {
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_transformer_layer_cls_to_wrap": "BertLayer",
    "fsdp_backward_prefetch": "BACKWARD_PRE", "fsdp_cpu_ram_efficient_loading": True, "fsdp_forward_prefetch": False,
    "fsdp_offload_params": False, "fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_sync_module_states": True,
    "fsdp_use_orig_params": True, "fsdp_activation_checkpointing": False,
}  # fmt: skip


def fsdp(**more: Any) -> dict[str, Any]:
    return {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {**FSDP, **more}}


def deepspeed(**config: Any) -> dict[str, Any]:
    return {"distributed_type": "DEEPSPEED", "num_processes": 2, "deepspeed_config": config}


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Settings(nproc=1)),
        ({"distributed_type": "MULTI_GPU", "num_processes": 4, "mixed_precision": "bf16", "gpu_ids": "0,1,2,3"},
         Settings(nproc=4, mixed_precision="bf16", devices="0,1,2,3")),
        ({"distributed_type": "MULTI_GPU", "num_processes": 4, "gpu_ids": "all"}, Settings(nproc=4)),
        ({"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True}, Settings(nproc=2, cpu=True)),
        ({"use_cpu": True, "mixed_precision": "fp16"}, Settings(nproc=1, cpu=True, mixed_precision="fp16")),
        ({"num_processes": -1}, Settings()),
        ({"distributed_type": "MULTI_GPU", "num_processes": 8, "num_machines": 2, "machine_rank": 1,
          "main_process_ip": "10.0.0.1", "main_process_port": 29511},
         Settings(nproc=4, nnodes=2, node_rank=1, rdzv_endpoint="10.0.0.1:29511")),
        ({"distributed_type": "MULTI_GPU", "num_processes": 8, "num_machines": 2, "machine_rank": 0,
          "main_process_ip": "host0", "rdzv_backend": "c10d"},
         Settings(nproc=4, nnodes=2, rdzv_endpoint="host0:29500")),
        (fsdp(fsdp_sharding_strategy="FULL_SHARD"), Settings(nproc=2, strategy="zero3")),
        (fsdp(fsdp_sharding_strategy="SHARD_GRAD_OP"), Settings(nproc=2, strategy="zero2")),
        (fsdp(fsdp_sharding_strategy=3), Settings(nproc=2, strategy="ddp")),
        (fsdp(fsdp_offload_params=True),
         Settings(nproc=2, strategy="zero3,offload_params=cpu,offload_grads=cpu,offload_optimizer=cpu")),
        (deepspeed(zero_stage=3, offload_param_device="nvme", offload_param_nvme_path="/n"),
         Settings(nproc=2, strategy="zero3,offload_params=nvme,nvme_path=/n")),
        (fsdp(fsdp_activation_checkpointing=True, fsdp_activation_checkpointing_offload=True),
         Settings(nproc=2, strategy="zero3,activation_checkpointing=true,activation_offload=cpu")),
        (fsdp(fsdp_sharding_strategy="HYBRID_SHARD"), Settings(nproc=2, strategy="hsdp")),
        (fsdp(fsdp_version=2, fsdp_reshard_after_forward=True), Settings(nproc=2, strategy="zero3")),
        (fsdp(fsdp_version=2, fsdp_reshard_after_forward=False), Settings(nproc=2, strategy="zero2")),
        (fsdp(fsdp_reshard_after_forward="SHARD_GRAD_OP"), Settings(nproc=2, strategy="zero2")),
        ({**fsdp(fsdp_version=2), "num_processes": 4,
          "parallelism_config": {"parallelism_config_dp_replicate_size": 2, "parallelism_config_dp_shard_size": 2,
                                 "parallelism_config_tp_size": 1, "parallelism_config_cp_size": 1}},
         Settings(nproc=4, strategy="hsdp,shard_size=2")),
        (deepspeed(zero_stage=3, zero3_init_flag=True, zero3_save_16bit_model=True, gradient_accumulation_steps=4,
                   offload_optimizer_device="none", offload_param_device="none"),
         Settings(nproc=2, strategy="zero3", gradient_accumulation_steps=4)),
        (deepspeed(zero_stage=1), Settings(nproc=2, strategy="zero1")),
        (deepspeed(zero_stage=0), Settings(nproc=2, strategy="ddp")),
        (deepspeed(), Settings(nproc=2, strategy="zero2")),
    ],
)  # fmt: skip
def test_accelerates_files_say_the_same_here(values: dict[str, Any], expected: Settings, suffix: str) -> None:
    found = files.read(accelerate_file(Path(f"a{suffix}"), **values))
    assert found.kind == "accelerate"
    assert found.settings == expected


def test_accelerates_basic_config_is_read(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from accelerate.utils import write_basic_config

    assert write_basic_config(mixed_precision="bf16", save_location=str(tmp_path / "default_config.yaml"))
    found = files.read(tmp_path / "default_config.yaml")  # JSON in a .yaml file
    assert found.kind == "accelerate"
    assert found.settings.mixed_precision == "bf16" and found.settings.nproc and not found.notes


def test_no_key_that_accelerate_knows_is_unknown_here(tmp_path: Path) -> None:
    """Every field of its config classes, and every flag of its launcher that its config can hold."""
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    from accelerate.commands.launch import launch_command_parser

    flags = [action.dest for action in launch_command_parser()._actions]
    for kind, section, prefix in (
        ("FSDP", "fsdp_config", "fsdp_"),
        ("FSDP", "parallelism_config", "parallelism_config_"),
        ("NO", "fp8_config", "fp8_"),
        ("NO", "megatron_lm_config", "megatron_lm_"),
        ("NO", "dynamo_config", "dynamo_"),
    ):
        names = [name for name in flags if name.startswith(prefix)]
        assert names
        for name in names:
            value = {"fsdp_offload_params": False, "fsdp_ignored_modules": None}.get(name, 1)
            files.read(accelerate_file(Path("a.yaml"), distributed_type=kind, **{section: {name: value}}))
    for name in ("zero_stage", "zero3_init_flag", *(n for n in flags if n.startswith(("deepspeed_", "gradient_")))):
        value = {"zero_stage": 1, "deepspeed_config_file": "none"}.get(name, 1)
        files.read(accelerate_file(Path("a.yaml"), **deepspeed(**{name: value})))
    for field in fields(config_args.ClusterConfig):
        if field.name != "compute_environment":
            Path("a.yaml").write_text(f"compute_environment: LOCAL_MACHINE\n{field.name}: null\n")
        files.read(Path("a.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("compute_environment: AMAZON_SAGEMAKER\ndistributed_type: 'NO'\nec2_instance_type: x\n", "SageMaker"),
        ("distributed_type: MEGATRON_LM\nmegatron_lm_config: {megatron_lm_tp_degree: 2}\n", "Megatron-LM is not part"),
        ("distributed_type: XLA\n", "asks for TPUs"),
        ("distributed_type: MULTI_XPU\n", "Intel GPUs"),
        ("distributed_type: MULTI_QPU\n", "MULTI_QPU is not known"),
        ("distributed_type: 'NO'\nmixed_precision: fp8\nfp8_config: {backend: TE}\n", "mixed_precision: bf16"),
        ("distributed_type: MULTI_GPU\nnum_processes: 3\nnum_machines: 2\nmain_process_ip: a\n", "equally many"),
        ("distributed_type: MULTI_GPU\nnum_processes: two\n", "is not a whole number"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_sharding_strategy: HALF}\n", "no sharding strategy HALF"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_ofload_params: 1}\n", "'fsdp_ofload_params' in fsdp_config"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_ignored_modules: 'a.*'}\n", "fsdp_ignored_modules"),
        ("distributed_type: FSDP\nfsdp_config: [1]\n", "does not hold keys"),
        ("distributed_type: FSDP\nparallelism_config: {parallelism_config_tp_size: 2}\n", "tensor parallelism"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 4}\n", "stage=4 does not exist"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {offload_param_device: disk}\n", "'disk' is not known"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {offload_param_device: nvme, offload_param_nvme_path: /a, "
         "offload_optimizer_device: nvme, offload_optimizer_nvme_path: /b}\n", "two values of nvme_path"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: no.json}\n", "cannot read no.json"),
        ("distributed_type: 'NO'\nnum_procs: 2\n", "no key 'num_procs'"),
        ("distributed_type: MULTI_GPU\nnum_machines: 2\nnum_processes: 2\nmain_process_ip: a\nrdzv_backend: etcd\n",
         "rdzv_backend: etcd"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_says_what_to_use_instead(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.yaml").write_text(text)
    Path("x.py").write_text("")
    err = refused(monkeypatch, capsys, "launch", "--config", "a.yaml", "x.py")
    assert message in err and "a.yaml" in err and "fix:" in err


def test_conversion_says_what_it_left_out_and_what_the_script_has_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    accelerate_file(
        Path("a.yaml"), **{**deepspeed(zero_stage=2, gradient_clipping=0.5, zero3_init_flag=True),
                           "dynamo_config": {"dynamo_backend": "INDUCTOR"}, "enable_cpu_affinity": True},
    )  # fmt: skip
    printed, err = ran(monkeypatch, capsys, "config", "--from", "a.yaml", "-o", "b.yaml", "--mixed-precision", "bf16")
    assert printed == {"nproc": 2, "strategy": "zero2", "mixed_precision": "bf16"}
    assert "note: gradient_clipping: 0.5: the script has to clip" in err
    assert "note: dynamo_config (backend INDUCTOR)" in err
    assert "left out deepspeed_config.zero3_init_flag: " in err and "left out enable_cpu_affinity: " in err
    assert files.read(Path("b.yaml")).settings == Settings(nproc=2, strategy="zero2", mixed_precision="bf16")


def test_launch_takes_an_accelerate_file(tmp_path: Path) -> None:
    path = accelerate_file(tmp_path / "a.yaml", **{**fsdp(fsdp_activation_checkpointing=True), "use_cpu": True})
    code, _, err = command("launch", "--config", "a.yaml", script(tmp_path, ECHO), cwd=tmp_path)
    assert code == 0, err
    lines = err.splitlines()
    assert lines[0] == f"shardwise: settings from {path.name}, Accelerate's format"
    assert "of its keys change nothing here; 'shardwise config --from a.yaml' says why" in lines[1] and len(lines) == 2
    expected = ("2", "zero3,activation_checkpointing=true")
    assert [(e["WORLD_SIZE"], e["SHARDWISE_STRATEGY"]) for e, _ in said(tmp_path)] == [expected] * 2


def test_a_deepspeed_json_beside_the_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    ds = {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}, "overlap_comm": True},
        "bf16": {"enabled": True}, "fp16": {"enabled": "auto"}, "gradient_accumulation_steps": 2,
        "gradient_clipping": "auto", "train_batch_size": 8, "optimizer": {"type": "AdamW"},
        "activation_checkpointing": {"cpu_checkpointing": True, "profile": True},
    }  # fmt: skip
    (tmp_path / "conf" / "ds.json").write_text(json.dumps(ds))
    found = files.read(accelerate_file(tmp_path / "conf" / "a.yaml", **deepspeed(deepspeed_config_file="ds.json")))
    strategy = "zero3,activation_offload=cpu"
    assert found.settings == Settings(nproc=2, strategy=strategy, mixed_precision="bf16", gradient_accumulation_steps=2)
    assert [note for note in found.notes if "'optimizer' of ds.json" in note]
    assert {
        "ds.json: zero_optimization.overlap_comm",
        "ds.json: activation_checkpointing.profile",
        "ds.json: train_batch_size",
    } <= found.dropped.keys()
    (tmp_path / "conf" / "ds.json").write_text("{")
    with pytest.raises(ShardwiseError, match="is not JSON"):
        files.read(tmp_path / "conf" / "a.yaml")
    for zero, what in (({"zero_quantized_weights": True}, "quantized"), ({"stege": 3}, "stege.*\n.*stage")):
        ds["zero_optimization"] = zero
        (tmp_path / "conf" / "ds.json").write_text(json.dumps(ds))
        with pytest.raises(ShardwiseError, match=what):  # as the Accelerate door answers
            files.read(tmp_path / "conf" / "a.yaml")
    ds |= {"zero_optimization": {"stage": 3, "mics_shard_size": 2}, "communication_data_type": "fp16"}
    (tmp_path / "conf" / "ds.json").write_text(json.dumps(ds))
    wanted = files.read(tmp_path / "conf" / "a.yaml").settings.strategy
    assert wanted == "hsdp,shard_size=2,reduce_dtype=fp16,activation_offload=cpu"
