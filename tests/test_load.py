"""``shardwise.load``: models larger than memory run with weights read in place, bit for bit as in memory."""

from __future__ import annotations

import copy
import gc
import json
import tempfile
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import shardwise
from models import rank
from ranks import run
from shardwise.engine.hooks import engine_of
from shardwise.errors import CheckpointError, ConfigError, OffloadError, ReleasedParameterError, UnitError
from shardwise.inference.dispatch import (
    cpu_offload,
    disk_offload,
    dispatch_model,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
)
from shardwise.inference.meta import init_empty_weights
from shardwise.inference.offloaded import OffloadedWeightsLoader
from slowly import in_turn, slow

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}


def llama(**more):
    kw = SMALL | {"intermediate_size": 160, "num_key_value_heads": 2} | more
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**kw))


def gpt2():  # tied
    kw = {"vocab_size": 100, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**kw))


def t5():  # an encoder that is called by itself, and a table that both halves and the head share
    kw = {"vocab_size": 100, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**kw, decoder_start_token_id=0))


def mixtral():  # experts that transformers puts together, under other names
    kw = SMALL | {"intermediate_size": 96, "num_key_value_heads": 2, "num_local_experts": 4}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**kw))


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, intermediate_size=128))


def marian():  # tables of positions that it computes itself, and that no file has
    kw = {"vocab_size": 100, "d_model": 64, "max_position_embeddings": 64, "decoder_start_token_id": 0}
    for half in ("encoder", "decoder"):
        kw |= {f"{half}_layers": 2, f"{half}_attention_heads": 4, f"{half}_ffn_dim": 128}
    return transformers.MarianMTModel(transformers.MarianConfig(**kw, pad_token_id=0, eos_token_id=1))


MODELS = {f.__name__: f for f in (llama, gpt2, t5, mixtral, bert, marian)}


def make(name: str):
    torch.manual_seed(3)
    return MODELS[name]().eval()


def saved(model, folder: Path, **kw) -> Path:
    model.save_pretrained(folder, **kw)
    return folder


def ids(seed=0, rows=2, length=7) -> torch.Tensor:
    return torch.randint(5, 95, (rows, length), generator=torch.Generator().manual_seed(seed))


def said(model, tokens=None, **kw) -> torch.Tensor:
    """What a model says to some tokens."""
    tokens = ids() if tokens is None else tokens
    if not hasattr(model, "generate") or "Masked" in type(model).__name__:
        with torch.no_grad():
            return model(tokens).logits
    return model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0, **kw)


def files_of(model):
    """The reader of a loaded model's files."""
    return next(b for u in engine_of(model).units for b in u.buckets).reading.files


@in_turn(name=MODELS, where=["auto", "disk", "half"])
def test_tokens_are_those_of_the_model_in_memory(tmp_path, name, where):
    model = make(name)
    saved(model, tmp_path, max_shard_size="200KB")
    size = sum(p.nbytes for p in model.parameters())
    if where == "half":
        kw = {"max_memory": {"cpu": size * 9 // 10}, "length": 8, "batch": 1}
    else:
        kw = {"device_map": "auto" if where == "auto" else {"": "disk"}}
    loaded = shardwise.load(tmp_path, **kw)
    assert type(loaded) is type(model) and "forward" not in vars(loaded)
    assert torch.equal(said(loaded), said(model))
    if hasattr(model, "generate") and name != "bert":
        assert torch.equal(said(loaded, use_cache=False), said(model, use_cache=False))
    homes = set(loaded.shardwise_plan.homes.values())
    assert homes == {"auto": {"device"}, "disk": {"nvme"}}.get(where, homes) and (where != "half" or "nvme" in homes)
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[k], v) for k, v in expected.items())


@pytest.mark.parametrize("where", ["auto", "disk"])
def test_another_dtype_on_arrival(tmp_path, where):
    saved(make("llama"), tmp_path)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    loaded = shardwise.load(tmp_path, "auto" if where == "auto" else {"": "disk"}, dtype="bfloat16")
    assert loaded.dtype is torch.bfloat16
    assert torch.equal(said(loaded), said(plain))


def test_a_dict_says_where_each_part_is(tmp_path):
    model = make("llama")
    saved(model, tmp_path)
    loaded = shardwise.load(
        tmp_path,
        {
            "model.embed_tokens": "cpu",
            "model.layers": "disk",
            "model.layers.1": "cpu",
            "model.layers.2.mlp": "cpu",
            "": "cpu",
        },
    )
    homes = loaded.shardwise_plan.homes
    assert [homes[f"model.layers.{i}"] for i in range(4)] == ["nvme", "device", "nvme", "nvme"]
    assert homes["model.layers.2.mlp"] == "device"
    assert torch.equal(said(loaded), said(model))


class Odd(nn.Module):
    """A scalar and a table outside of any block, tied parameters, buffers of both kinds, an empty parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 96)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(96, 96), nn.BatchNorm1d(96)) for _ in range(5))
        self.head = nn.Linear(96, 50, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("shift", torch.arange(96.0))
        self.register_buffer("passing", torch.full((96,), 0.25), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.table(x).mean(1) + self.shift * self.passing
        for block in self.blocks:
            x = x + block(x) * self.scale
        return self.head(x)


def test_any_module_on_the_meta_device(tmp_path):
    torch.manual_seed(0)
    model = Odd().eval()
    with torch.no_grad():
        model.blocks[2][1].running_mean.normal_()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    safetensors.torch.save_model(model, tmp_path / "weights.safetensors")
    for file in ("weights.pt", "weights.safetensors"):
        with torch.device("meta"):
            other = Odd()
        with pytest.raises(UnitError, match="passing"):
            shardwise.load(other, {"": "disk"}, checkpoint=tmp_path / file)
        other.passing = torch.full((96,), 0.25)  # on meta nobody can know
        loaded = shardwise.load(other, {"": "disk"}, checkpoint=tmp_path / file)
        assert loaded is other and loaded.head.weight is loaded.table.weight
        with torch.no_grad():
            assert torch.equal(loaded(ids() % 50), model(ids() % 50))


# --- memory and bytes ---------------------------------------------------------------------------------
def wide(depth=12):
    return llama(hidden_size=256, intermediate_size=704, num_hidden_layers=depth).eval()


def test_weights_stream_within_the_plan_and_are_read_once_a_forward(tmp_path):
    torch.manual_seed(0)
    model = wide()
    saved(model, tmp_path)
    size = sum(p.nbytes for p in model.parameters())
    tokens = ids(rows=1)
    loaded = shardwise.load(tmp_path, max_memory={"cpu": size // 3}, batch=1, length=16)
    plan, engine = loaded.shardwise_plan, engine_of(loaded)
    assert plan.device <= size // 3 and 0 < plan.total("device") < plan.total("nvme")
    with torch.no_grad():
        for _ in range(2):
            loaded(tokens)
        files_of(loaded).reset_stats()
        with shardwise.memory_meter(loaded) as meter:
            loaded(tokens)
    assert meter.peak_total <= plan.device
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    units = [u.gather_bytes for u in engine.units if u.offloaded]
    assert plan.total("nvme") <= sum(units) <= 1.01 * plan.total("nvme")  # whole blocks of the disk
    # Five forwards, each of which brings what the next one begins with.
    assert abs(files_of(loaded).stats.bytes_read - 5 * sum(units)) <= 2 * max(units)


def parts(folder: Path) -> tuple[torch.Tensor, int, int, int]:
    loaded = shardwise.load(folder, "split", max_memory={"cpu": 12 << 20}, batch=1, length=16)
    mine = ids(seed=rank(), rows=1, length=4 + rank())
    out = said(loaded, mine)
    plan = loaded.shardwise_plan
    files_of(loaded).reset_stats()
    with torch.no_grad():
        for _ in range(8):
            loaded(mine)
    return out, files_of(loaded).stats.bytes_read, plan.total("nvme"), plan.total("device")


@pytest.mark.parametrize("size", [2, slow(3)])
def test_ranks_share_one_model_each_with_its_own_prompt(tmp_path, size):
    torch.manual_seed(0)
    model = wide(6)
    saved(model, tmp_path)
    total = sum(p.nbytes for p in model.parameters())
    for r, (out, read, on_disk, here) in enumerate(run(size, parts, tmp_path)):
        assert torch.equal(out, said(model, ids(seed=r, rows=1, length=4 + r)))
        assert here + on_disk == pytest.approx(total / size, rel=0.01)
        # An equal part of each unit, eight times, and what was brought for a ninth.
        assert abs(read - 8 * on_disk) <= on_disk


def of_any_length(folder: Path) -> list[torch.Tensor]:
    loaded = shardwise.load(folder, "split", max_memory={"cpu": 4 << 20}, batch=1, length=16)
    out = []
    for turn in range(2):
        with shardwise.together(loaded):
            for k in range(rank() + turn):
                tokens = ids(seed=10 * k + rank(), rows=1, length=3 + k)
                out.append(loaded.generate(tokens, max_new_tokens=2 + 5 * rank(), do_sample=False, pad_token_id=0))
    out.append(said(loaded))  # all together again
    return out


@in_turn(name=["llama", "t5"], size=[2, 3])
def test_ranks_write_texts_of_different_lengths(tmp_path, name, size):
    model = make(name)
    saved(model, tmp_path)
    for r, out in enumerate(run(size, of_any_length, tmp_path)):
        expected = [
            model.generate(ids(seed=10 * k + r, rows=1, length=3 + k), max_new_tokens=2 + 5 * r, do_sample=False,
                           pad_token_id=0)
            for turn in range(2) for k in range(r + turn)
        ]  # fmt: skip
        assert len(out) == len(expected) + 1
        assert all(torch.equal(a, b) for a, b in zip(out, [*expected, said(model)], strict=True))


def on_the_device(folder: Path, where: str) -> torch.Tensor:
    kw = {"device_map": {"": "disk"}} if where == "disk" else {"max_memory": {0: 700_000, "cpu": 200_000}, "length": 16}
    loaded = shardwise.load(folder, **({"device_map": "auto"} | kw), batch=1)
    homes = set(loaded.shardwise_plan.homes.values())
    assert homes == ({"nvme"} if where == "disk" else {"device", "cpu", "nvme"}), loaded.shardwise_plan
    tokens = ids().to("sim:0")
    with torch.no_grad():
        for _ in range(3):
            out = loaded(tokens).logits
    return out.cpu()


@pytest.mark.usefixtures("simulated_device")
@pytest.mark.parametrize("where", ["disk", "all three"])
def test_an_accelerator_host_memory_and_the_disk(tmp_path, where):
    model = make("llama")
    saved(model, tmp_path)
    with torch.no_grad():
        expected = model(ids()).logits
    (out,) = run(1, on_the_device, tmp_path, where, device="sim")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


# --- what users do ------------------------------------------------------------------------------------
@pytest.fixture
def streamed(tmp_path):
    model = make("llama")
    saved(model, tmp_path)
    return model, shardwise.load(tmp_path, {"": "disk"})


def test_a_copy_is_a_second_model(streamed):
    model, loaded = streamed
    twin = copy.deepcopy(loaded)
    del loaded
    assert torch.equal(said(twin), said(model))


def test_gradients_of_inputs(streamed):
    model, loaded = streamed
    x = torch.randn(1, 3, 64)
    grads = []
    for m in (model, loaded):
        mine = x.clone().requires_grad_()
        m(inputs_embeds=mine).logits.square().sum().backward()
        grads.append(mine.grad)
    assert torch.equal(*grads)


def test_values_that_somebody_keeps_stay_what_they_are(streamed):
    model, loaded = streamed
    kept = []
    layer = loaded.model.layers[1].mlp.up_proj
    handle = layer.register_forward_hook(lambda m, a, out: kept.append(m.weight.detach()[0]))
    said(loaded)
    handle.remove()
    said(loaded)
    assert all(torch.equal(row, model.model.layers[1].mlp.up_proj.weight[0]) for row in kept)


def test_what_cannot_be_done_says_so(streamed, tmp_path):
    model, loaded = streamed
    weight = loaded.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ReleasedParameterError, match="dtype="):
        loaded.to(torch.bfloat16)
    with pytest.raises(ReleasedParameterError, match="gathered"):
        weight.sum()
    with shardwise.gathered(loaded.model.layers[0]):
        assert torch.equal(weight, model.model.layers[0].mlp.up_proj.weight)
    with (
        pytest.raises(UnitError, match="lost"),
        torch.no_grad(),
        shardwise.gathered(loaded.model.layers[0], write=True),
    ):
        weight.zero_()
    with pytest.raises(UnitError, match="state dict"):
        loaded.load_state_dict(model.state_dict())
    with pytest.raises(UnitError, match="weights of files"):
        shardwise.checkpoint.save(tmp_path / "c", models=[loaded])
    with pytest.raises(UnitError, match="already"):
        shardwise.fully_shard(loaded)
    assert torch.equal(said(loaded), said(model))


def test_save_pretrained_writes_the_model(streamed, tmp_path):
    model, loaded = streamed
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(said(again), said(model))


# --- bad input ----------------------------------------------------------------------------------------
def spoiled(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    if how == "no weights":
        file.unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "no architecture":
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    elif how == "cut off":
        file.write_bytes(file.read_bytes()[:-5000])
    elif how == "missing":
        del tensors[name]
        safetensors.torch.save_file(tensors, file)
    elif how == "shape":
        tensors[name] = tensors[name][:-1].contiguous()
        safetensors.torch.save_file(tensors, file)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("no weights", "without its weights"),
        ("no config", "config"),
        ("no architecture", "architectures"),
        ("cut off", "cut|shorter|bytes"),
        ("missing", "layers.1.mlp.up_proj.weight"),
        ("shape", "layers.1.mlp.up_proj"),
    ],
)
def test_bad_folders(tmp_path, how, says):
    saved(make("llama"), tmp_path)
    spoiled(tmp_path, how)
    with pytest.raises(CheckpointError, match=says):
        shardwise.load(tmp_path)


@pytest.mark.parametrize(
    ("kw", "says"),
    [
        ({"device_map": "everywhere"}, "auto"),
        ({"device_map": {"model.layer": "disk", "": "cpu"}}, "model.layer"),
        ({"device_map": {"model.layers": "disk"}}, "no place"),
        ({"max_memory": {"cpu": "100KB"}}, "at least"),
        ({"max_memory": {"cpu": "much"}}, "size"),
        ({"batch": 0}, "positive"),
    ],
)
def test_bad_requests(tmp_path, kw, says):
    saved(make("llama"), tmp_path)
    with pytest.raises((UnitError, OffloadError), match=says):
        shardwise.load(tmp_path, **kw)


@pytest.mark.parametrize(
    ("dtype", "error"), [("float33", ConfigError), ("int3", CheckpointError), ("int8", CheckpointError)]
)
def test_dtypes_that_nothing_runs_in(tmp_path, dtype, error):
    saved(make("llama"), tmp_path)
    with pytest.raises(error, match=dtype):
        shardwise.load(tmp_path, dtype=dtype)


def test_a_file_that_is_cut_short_later_is_named(tmp_path):
    model = make("llama")
    saved(model, tmp_path)
    loaded = shardwise.load(tmp_path, {"": "disk"})
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as out:
        out.truncate(file.stat().st_size // 2)
    with pytest.raises(OffloadError, match=r"model\.safetensors"):
        said(loaded)


def test_nothing_of_a_dropped_model_stays():
    with tempfile.TemporaryDirectory() as folder:
        saved(make("llama"), Path(folder))
        gc.collect()
        before = threading.active_count()
        loaded = shardwise.load(folder, {"": "disk"})
        said(loaded)
        assert threading.active_count() > before
        del loaded
        gc.collect()
        assert threading.active_count() == before


# --- Accelerate's words -------------------------------------------------------------------------------
def test_models_with_values_are_dispatched(tmp_path):
    expected = said(make("t5"))
    for n, device_map in enumerate([{"": "cpu"}, {"": "disk"}, {"encoder": "cpu", "": "disk"}]):
        model = dispatch_model(make("t5"), device_map, offload_dir=tmp_path / str(n))
        assert torch.equal(said(model), expected)
        assert torch.equal(said(copy.deepcopy(model)), expected)
    model = disk_offload(make("t5"), tmp_path / "all")
    assert torch.equal(said(model), expected)
    assert torch.equal(said(cpu_offload(make("t5"))), expected)


def test_what_is_dispatched_is_not_kept_twice():
    model = wide(6)
    storages = [StorageWeakRef(p.untyped_storage()) for p in model.parameters()]
    cpu_offload(model)
    gc.collect()
    assert all(ref.expired() for ref in storages)


def test_a_checkpoint_is_loaded_and_dispatched(tmp_path):
    model = make("gpt2")
    saved(model, tmp_path)
    with init_empty_weights():
        empty = gpt2()
    empty.tie_weights()
    loaded = load_checkpoint_and_dispatch(empty, tmp_path, device_map={"": "disk"}, no_split_module_classes="GPT2Block")
    assert torch.equal(said(loaded), said(model))


def test_dispatching_says_what_is_missing(tmp_path):
    with pytest.raises(OffloadError, match="offload_dir"):
        dispatch_model(make("llama"), {"": "disk"})
    with init_empty_weights():
        empty = llama()
    with pytest.raises(UnitError, match="no values"):
        dispatch_model(empty, {"": "disk"}, offload_dir=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OffloadError, match="cannot be made"):
        disk_offload(make("llama"), tmp_path / "file" / "in")


def test_writes_in_a_forward_are_refused_and_not_used(streamed):
    model, loaded = streamed
    layer = loaded.model.layers[1].mlp.up_proj

    def spoil(module, args, output):
        module.weight.zero_()

    handle = layer.register_forward_hook(spoil)
    with pytest.raises(UnitError, match="lost"), torch.no_grad():
        loaded(ids())
    handle.remove()
    assert torch.equal(said(loaded), said(model))


def test_compiled_models_and_blocks(streamed):
    model, loaded = streamed
    with torch.no_grad():
        expected = model(ids()).logits
        for layer in loaded.model.layers:
            layer.compile(backend="eager")
        assert torch.equal(loaded(ids()).logits, expected)
        assert torch.equal(torch.compile(loaded, backend="eager")(ids()).logits, expected)


def test_pages_are_used_again(tmp_path):
    saved(make("llama"), tmp_path)
    loaded = shardwise.load(tmp_path, {"": "disk"})
    seen = set()
    for layer in loaded.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda m, a, out: seen.add(m.weight.untyped_storage().data_ptr()))
    said(loaded)
    assert len(seen) <= 2 * 3  # the one that runs, the next one, and one more


def test_a_checkpoint_is_loaded_into_a_model(tmp_path):
    model = make("t5")
    saved(model, tmp_path / "model")
    for device_map in (None, {"": "cpu"}):
        with init_empty_weights():
            empty = t5()
        empty.tie_weights()
        load_checkpoint_in_model(empty.eval(), tmp_path / "model", device_map)
        assert empty.lm_head.weight is empty.shared.weight and torch.equal(said(empty), said(model))
    experts = make("mixtral")  # whose names and shapes are others in the files
    saved(experts, tmp_path / "experts")
    with init_empty_weights():
        empty = mixtral()
    load_checkpoint_in_model(empty.eval(), tmp_path / "experts", strict=True)
    assert torch.equal(said(empty), said(experts))
    with init_empty_weights():
        empty = t5()
    empty.tie_weights()
    load_checkpoint_in_model(empty, tmp_path / "model", {"encoder": "disk", "": "cpu"}, tmp_path / "away")
    assert empty.encoder.block[0].layer[0].SelfAttention.q.weight.is_meta
    assert not empty.decoder.block[0].layer[0].SelfAttention.q.weight.is_meta
    away = OffloadedWeightsLoader(save_folder=tmp_path / "away")
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    assert torch.equal(away[name], model.state_dict()[name])
    with pytest.raises(OffloadError, match="folder"):
        load_checkpoint_in_model(t5(), tmp_path / "model", {"": "disk"})


def one_cannot(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        shardwise.load(folder if rank() == 0 else folder / "nowhere", "split")
    return str(caught.value)


def test_all_ranks_have_a_model_that_they_split_or_none(tmp_path):
    saved(make("llama"), tmp_path)
    first, second = run(2, one_cannot, tmp_path)
    assert "nowhere" in second and "rank 1" in first
