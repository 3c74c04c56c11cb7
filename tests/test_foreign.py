"""Checkpoints that others wrote, with their own code: torch's FSDP1 and FSDP2, DeepSpeed, torch.save. Nothing runs."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

import processes
import shardwise
from models import Block, adamw, assert_same, batch, loss_of, make, rank, whole
from ranks import run
from shardwise import checkpoint
from shardwise.checkpoint.formats import open_source
from shardwise.checkpoint.storage_reader import StorageReader
from shardwise.errors import CheckpointError
from test_load_model import failure


def loads(path, strategy, expected, **kw):
    model = shardwise.fully_shard(make(5, **kw), strategy=strategy)
    loaded = checkpoint.load_model(model, path)
    assert not (loaded.missing_keys or loaded.unexpected_keys or loaded.mismatched_keys)
    found = whole(model)
    for key, value in expected.items():
        assert torch.equal(found[key], value.to(found[key].dtype)), key
    return loaded.kind


# --- torch.distributed.checkpoint --------------------------------------------------------------------
def fsdp2(path, how):
    """Train a step under torch's fully_shard, and save as its users do."""
    model = make(2, odd=False)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return saved_by_torch(model, path, how)


def fsdp1(path, how):
    model = FullyShardedDataParallel(
        make(2, odd=False), auto_wrap_policy=ModuleWrapPolicy({Block}), device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy.FULL_SHARD, use_orig_params=True,
    )  # fmt: skip
    FullyShardedDataParallel.set_state_dict_type(model, StateDictType.SHARDED_STATE_DICT)
    return saved_by_torch(model, path, how)


def saved_by_torch(model, path, how):
    optimizer = adamw(model.parameters())
    loss_of(model, batch(0, rank())).backward()
    optimizer.step()
    weights, state = get_state_dict(model, optimizer)
    if how == "weights":
        dcp.save(weights, checkpoint_id=path)
    elif how == "training":
        extra = {"step": 3, "words": ["a"], "rng": torch.get_rng_state()}
        dcp.save({"model": weights, "optim": state, "extra": extra}, checkpoint_id=str(path))
    else:
        dcp.save(model.state_dict(), checkpoint_id=path)
    return {name: local_parts(value) for name, value in weights.items()}


def local_parts(value):
    """What this rank holds of a ShardedTensor or DTensor: where, and the values."""
    if hasattr(value, "local_shards"):
        return [(tuple(s.metadata.shard_offsets), s.tensor.detach().clone()) for s in value.local_shards()]
    if isinstance(value, DTensor):
        _, offsets = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
        return [(tuple(offsets), value.to_local().detach().clone())]
    return [((0,) * value.dim(), value.detach().clone())]


def joined(ranks):
    model = whole(make(2, odd=False))
    for held in ranks:
        for name, parts in held.items():
            for offsets, values in parts:
                place = tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))
                model[name][place] = values
    return model


@pytest.mark.parametrize(
    ("writer", "how"), [(fsdp2, "weights"), (fsdp2, "training"), (fsdp1, "training"), (fsdp1, "own")]
)
def test_fsdp_folders(tmp_path, writer, how):
    expected = joined(run(2, writer, tmp_path / "dcp", how))
    assert not torch.equal(expected["head.weight"], make(2, odd=False).head.weight)
    assert set(run(3, loads_odd, tmp_path / "dcp", "zero3", expected)) == {"dcp"}
    run(2, loads_odd, tmp_path / "dcp", "zero2,param_dtype=bf16", expected)


def loads_odd(path, strategy, expected):
    return loads(path, strategy, expected, odd=False)


def other_shards(path):
    """Tensors that are cut along other dims than the first, and along two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    state = {k: v for k, v in whole(make(4)).items() if v.dim() == 2 and v.numel()}
    state["cube"] = torch.arange(3 * 5 * 4 * 2.0).view(3, 5, 4, 2)
    places = [(Shard(1), Replicate()), (Shard(0), Shard(1)), (Shard(1), Shard(0)), (Shard(1), Shard(1))]
    out = {}
    for i, (name, value) in enumerate(state.items()):
        place = places[i % 4] if name != "cube" else (Shard(1), Shard(2))
        out[name] = distribute_tensor(value, mesh, place)
    dcp.save(out, checkpoint_id=path)
    return state


def test_tensors_that_are_cut_in_any_way(tmp_path):
    state = run(4, other_shards, tmp_path / "dcp")[0]
    source = open_source(tmp_path / "dcp")
    found = source.sections[source.section()]
    with StorageReader() as reader:
        for name, value in state.items():
            assert any(part.count > 1 for part in found[name].segments)
            assert torch.equal(reader.values(found[name]).view(value.shape), value), name
            half = value.numel() // 3
            assert torch.equal(reader.values(found[name], half, 2 * half + 1), value.reshape(-1)[half : 2 * half + 1])
    shutil.copytree(tmp_path / "dcp", tmp_path / "cut")
    largest = max((tmp_path / "cut").glob("*.distcp"), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    assert largest.name in failure(open_source, tmp_path / "cut")
    largest.unlink()
    assert largest.name in failure(open_source, tmp_path / "cut")


def own_checkpoint(path):
    model = shardwise.fully_shard(make(3, tied=True), strategy="zero3")
    optimizer = adamw(model.parameters())
    loss_of(model, batch(0, rank())).backward()
    optimizer.step()
    checkpoint.save(path, models=[make(9), model], optimizers=[optimizer])
    return whole(model)


def loads_second(path, expected, damaged):
    model = shardwise.fully_shard(make(5, tied=True), strategy="zero1")
    loaded = checkpoint.load_model(model, path, part="model_1")
    assert loaded.kind == "shardwise"
    assert_same(whole(model), expected)
    text = failure(checkpoint.load_model, model, damaged, part="model_1")
    assert_same(whole(model), expected)
    return text


def test_own_checkpoints_are_checked_first(tmp_path):
    expected = run(2, own_checkpoint, tmp_path / "a")[0]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    file = tmp_path / "b" / "__1_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for text in run(3, loads_second, tmp_path / "a", expected, tmp_path / "b"):
        assert "__1_0.distcp" in text and "checksum" in text


# --- DeepSpeed -----------------------------------------------------------------------------------------
SCRIPT = """
import os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
import deepspeed
from deepspeed.utils import logger
logger.setLevel("ERROR")
for name in deepspeed.ops.__compatible_ops__:  # none of its extensions is needed, and none is compiled
    deepspeed.ops.__compatible_ops__[name] = False
from models import batch, loss_of, make

for name in sys.argv[2:]:
    torch.manual_seed(0)
    model = make(2, tied=True, odd=False)
    model.blocks[1].norm.weight.requires_grad_(False)
    model.register_buffer("seen", torch.arange(3))
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1]},
        {"params": [p for p in trainable if p.dim() == 1], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True, "steps_per_print": 1 << 30,
        "bf16": {"enabled": "bf16" in name},
        "zero_optimization": {"stage": int(name[0]), "sub_group_size": 1000 if "small" in name else 10**9},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)
    for step in range(2):
        engine.backward(loss_of(engine, batch(step, dist.get_rank())))
        engine.step()
    engine.save_checkpoint(f"{sys.argv[1]}/{name}", tag="global step 2", client_state={"mine": {"a": [1, 2.5]}})
"""
STAGES = ["0", "1-bf16", "2", "3", "3-bf16-small"]


@pytest.fixture(scope="module")
def zero_folders(tmp_path_factory):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    folder = tmp_path_factory.mktemp("deepspeed")
    (folder / "write.py").write_text(SCRIPT)
    ranks = processes.ranks_of_a_script(folder / "write.py", 2, folder, *STAGES)
    for process in ranks:
        code, out, err = process.finish()
        assert code == 0, out + err
    return folder


def whole_by_deepspeed(folder):
    """What DeepSpeed's own tool makes of it; of stage 0, what is in the file."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    file = folder / "global step 2" / "mp_rank_00_model_states.pt"
    module = torch.load(file, weights_only=True)["module"] if file.exists() else {}
    if "0" in folder.name:
        return dict(module)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    whole = get_fp32_state_dict_from_zero_checkpoint(folder)
    return {k: v.detach() for k, v in {**module, **whole}.items()}  # it loses frozen ones of stage 1


def with_buffer(path, strategy, expected):
    model = make(5, tied=True, odd=False)
    model.register_buffer("seen", torch.zeros(3, dtype=torch.long))
    shardwise.fully_shard(model, strategy=strategy)
    loaded = checkpoint.load_model(model, path)
    assert not (loaded.missing_keys or loaded.unexpected_keys or loaded.mismatched_keys)
    assert_same(whole(model), {k: v.float() if v.is_floating_point() else v for k, v in expected.items()})
    return loaded.kind


@pytest.mark.parametrize("name", STAGES)
def test_deepspeed_folders(zero_folders, name):
    folder = zero_folders / name
    expected = whole_by_deepspeed(folder)
    if name != "0":
        assert expected["embed.weight"].dtype == torch.float32
    assert set(run(3, with_buffer, folder, "zero3", expected)) == {"deepspeed"}
    run(1, with_buffer, folder / "global step 2", "zero2", expected)
    facts = open_source(folder).facts
    assert facts["stage"] == int(name[0]) and facts["step"] == 2 and facts["world size"] == 2


def test_deepspeed_folders_that_are_not_whole(zero_folders, tmp_path):
    for name, pattern in (("3", "*rank_1_*optim*"), ("3", "*rank_0_*model*"), ("2", "*rank_0_*optim*"), ("2", "mp_*")):
        shutil.rmtree(tmp_path / "part", ignore_errors=True)
        shutil.copytree(zero_folders / name, tmp_path / "part")
        for file in (tmp_path / "part" / "global step 2").glob(pattern):
            file.unlink()
        text = failure(open_source, tmp_path / "part")
        assert "global step 2" in text and "fix:" in text
    (tmp_path / "part" / "latest").write_text("../3/global step 2")
    failure(open_source, tmp_path / "part")


# --- what is refused -------------------------------------------------------------------------------------
class Payload:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


class Subtle:
    """Asks for something harmless by a name of torch's own, to get at more."""

    def __reduce__(self):
        return getattr, (torch.Tensor, "tolist")


def planted_in_bin(path, state):
    torch.save({**state, "x": Payload(path / "ran")}, path / "pytorch_model.bin")


def planted_in_nest(path, state):
    torch.save({"model": state, "args": [Subtle()]}, path / "last.pt")


def planted_in_old_file(path, state):
    torch.save({**state, "x": Payload(path / "ran")}, path / "last.pt", _use_new_zipfile_serialization=False)


def planted_without_tensors(path, state):
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(path / "ran")))


def planted_in_dcp_index(path, state):
    dcp.save(state, checkpoint_id=path, no_dist=True)
    (path / ".metadata").write_bytes(pickle.dumps(Payload(path / "ran")))


def planted_in_dcp_chunk(path, state):
    dcp.save(state, checkpoint_id=path, no_dist=True)
    torch.save(Payload(path / "ran"), path / "bad")
    index = pickle.loads((path / ".metadata").read_bytes())
    info = next(i for key, i in index.storage_data.items() if key.fqn == "head.weight")
    file = path / info.relative_path
    info.offset, info.length = file.stat().st_size, (path / "bad").stat().st_size
    file.write_bytes(file.read_bytes() + (path / "bad").read_bytes())
    (path / ".metadata").write_bytes(pickle.dumps(index))


def planted_as_deepspeed(path, state):
    tag = path / "global_step1"
    tag.mkdir()
    (path / "latest").write_text("global_step1")
    torch.save({"module": state, "param_shapes": [], "buffer_names": []}, tag / "mp_rank_00_model_states.pt")
    optimizer = {"optimizer_state_dict": {"zero_stage": 1, "loss_scaler": Payload(path / "ran")}}
    torch.save(optimizer, tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt")


def not_tensors(path, state):
    (path / "model.safetensors").write_bytes(b"nothing of the kind")


def cut_off(path, state):
    safetensors.torch.save_file(state, path / "model.safetensors")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-5])


def torch_cut_off(path, state):
    torch.save(state, path / "pytorch_model.bin")
    data = (path / "pytorch_model.bin").read_bytes()
    (path / "pytorch_model.bin").write_bytes(data[: len(data) // 2])


def shards_missing(path, state):
    model = make(2)
    model.load_state_dict(state)
    checkpoint.save_model(model, path, max_shard_size="5KB")
    next(path.glob("model-00002-*")).unlink()


def index_to_elsewhere(path, state):
    safetensors.torch.save_file(state, path.parent / "secret.safetensors")
    index = {"weight_map": dict.fromkeys(state, "../secret.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def header_beyond(path, state):
    header = json.dumps(
        {"head.weight": {"dtype": "F32", "shape": [31, 13], "data_offsets": [1 << 40, (1 << 40) + 1612]}}
    )
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())


def tensor_beyond_its_storage(path, state):
    torch.save({"head.weight": torch.zeros(403)[:4]}, path / "a.pt")
    with zipfile.ZipFile(path / "a.pt") as old, zipfile.ZipFile(path / "b.pt", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, data.replace(b"K\x04\x85", b"M\xff\xff\x85") if name.endswith("data.pkl") else data)
    (path / "a.pt").unlink()


def empty(path, state):
    (path / "readme.txt").write_text("x")


_REFUSED = "refused: it asks for posix.mkdir"
HARM = [
    (planted_in_bin, _REFUSED), (planted_in_nest, "getattr"),
    (planted_in_old_file, "last.pt"), (planted_without_tensors, "pytorch_model.bin"),
    (planted_in_dcp_index, _REFUSED), (planted_in_dcp_chunk, _REFUSED),
    (planted_as_deepspeed, _REFUSED), (not_tensors, "model.safetensors"),
    (cut_off, "cut off"), (torch_cut_off, "pytorch_model.bin"), (shards_missing, "model-00002-of"),
    (index_to_elsewhere, "secret.safetensors"), (header_beyond, "cut off"),
    (tensor_beyond_its_storage, "beyond its storage"), (empty, "not a complete checkpoint"),
]  # fmt: skip


def refuses(folder, names):
    model = shardwise.fully_shard(make(5), strategy="zero3")
    before = whole(model)
    texts = []
    for name in names:
        texts.append(failure(checkpoint.load_model, model, folder / name))
        assert_same(whole(model), before)
    return texts


def test_bad_files_are_refused_on_every_rank_and_run_nothing(tmp_path):
    state = whole(make(2))
    for harm, _ in HARM:
        (tmp_path / harm.__name__).mkdir()
        harm(tmp_path / harm.__name__, state)
    names = [harm.__name__ for harm, _ in HARM]
    for texts in run(2, refuses, tmp_path, names):
        for (harm, word), text in zip(HARM, texts, strict=True):
            assert word in text and "fix:" in text, f"{harm.__name__}: {text}"
    assert not list(Path(tmp_path).rglob("ran"))
    text = failure(open_source, tmp_path / "nowhere")
    assert "no such checkpoint" in text
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.load_model(make(1), tmp_path / "nowhere")


def test_damaged_bytes_raise_and_do_nothing_else(tmp_path):
    state = {k: v for k, v in whole(make(2)).items() if k.startswith("blocks.0")}
    torch.save({"model": state, "words": [1, {"a"}]}, tmp_path / "a.pt")
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    dcp.save({"model": state, "step": 3}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    draw, refused = random.Random(0), 0
    for file in (tmp_path / "a.pt", tmp_path / "a.safetensors", tmp_path / "dcp" / ".metadata"):
        good = file.read_bytes()
        first = good.find(b"\x80\x02", 0) if file.suffix == ".pt" else 0  # where the pickle begins
        for _ in range(150):
            data = bytearray(good)
            data[first + draw.randrange(min(1500, len(data) - first))] = draw.randrange(256)
            file.write_bytes(data)
            try:
                source = open_source(file if file.parent == tmp_path else file.parent)
                with StorageReader() as reader:
                    for stored in source.everything().values():
                        reader.values(stored)
            except CheckpointError:
                refused += 1
        file.write_bytes(good)
    assert refused > 100
