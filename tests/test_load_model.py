"""load_model: weights that others wrote, straight into shards. Each rank reads what it holds only, and runs nothing."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import shardwise
from models import PRESETS, adamw, assert_same, batch, loss_of, make, rank, whole
from ranks import run
from shardwise import checkpoint
from shardwise.checkpoint.manifest import BLOCK
from shardwise.checkpoint.storage_reader import StorageReader
from shardwise.checkpoint.stored_tensor import Stored, box_segments
from shardwise.errors import CheckpointError

STRATEGIES = [
    *PRESETS, "hsdp,shard_size=1", "zero2,param_dtype=bf16", "zero3,param_dtype=bf16", "zero3,layout=tensor",
    "zero2,offload_optimizer=nvme", "zero2,offload_optimizer=cpu,param_dtype=bf16", "zero3,offload_params=cpu",
    "zero3,offload_params=nvme", "zero3,offload_params=nvme,offload_optimizer=nvme,param_dtype=bf16",
    "ddp,offload_params=nvme,param_dtype=bf16",
]  # fmt: skip


def failure(function, *args, **kw) -> str:
    with pytest.raises(CheckpointError) as caught:
        function(*args, **kw)
    return str(caught.value)


def plain(seed=3, **kw):
    """What the files hold, and its state dict."""
    model = make(seed, **kw)
    model.register_buffer("seen", torch.arange(5))
    return model, whole(model)


# --- Hugging Face folders ---------------------------------------------------------------------------
def as_one_file(folder, state, model):
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def as_shards(folder, state, model):
    checkpoint.save_model(model, folder, max_shard_size="5KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def as_bin(folder, state, model):
    torch.save(state, folder / "pytorch_model.bin")


def as_bins(folder, state, model):
    checkpoint.save_model(model, folder, max_shard_size="5KB", safe_serialization=False)
    assert len(list(folder.glob("*.bin"))) > 2


def as_old_torch(folder, state, model):
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def as_transposed(folder, state, model):
    """Views of a larger tensor, and some whose elements are in another order."""
    wide = {k: torch.stack([v, v])[1] for k, v in state.items()}
    torch.save({k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in wide.items()}, folder / "weights.pt")


def loads(folder, strategy, expected):
    model = make(5)
    model.register_buffer("seen", torch.zeros(5, dtype=torch.long))
    shardwise.fully_shard(model, strategy=strategy)
    loaded = checkpoint.load_model(model, folder)
    assert not (loaded.missing_keys or loaded.unexpected_keys or loaded.mismatched_keys)
    assert_same(whole(model), expected)
    other = make(3)
    other.register_buffer("seen", torch.arange(5))
    shardwise.fully_shard(other, strategy=strategy)
    losses = []
    for one in (model, other):  # what gathers read followed, and training goes on from there
        opt = adamw(one.parameters())
        loss = loss_of(one, batch(0, rank()))
        loss.backward()
        opt.step()
        losses.append((loss.item(), loss_of(one, batch(1, rank())).item()))
    assert losses[0] == losses[1]
    return loaded.bytes_read


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_hugging_face_folder_into_every_strategy(tmp_path, strategy):
    model, state = plain()
    as_shards(tmp_path, state, model)
    size = sum(t.nbytes for t in state.values())
    read = run(2, loads, tmp_path, strategy, state)
    if any(name in strategy for name in ("ddp", "zero1", "zero2", "hsdp")):
        assert all(0 < n <= size for n in read)
    else:
        assert sum(read) <= size + state["seen"].nbytes


@pytest.mark.parametrize("write", [as_one_file, as_bin, as_bins, as_old_torch, as_transposed])
def test_every_kind_of_file(tmp_path, write):
    model, state = plain()
    write(tmp_path, state, model)
    run(2, loads, tmp_path, "zero3", state)


def alone(path, **kw):
    model = make(5)
    model.register_buffer("seen", torch.zeros(5, dtype=torch.long))
    loaded = checkpoint.load_model(model, path, **kw)
    return model, loaded


def test_one_process_without_sharding_and_one_file(tmp_path):
    model, state = plain()
    as_one_file(tmp_path, state, model)
    assert_same(whole(alone(tmp_path / "model.safetensors")[0]), state)
    again = make(5).to(torch.bfloat16)
    again.down = None
    checkpoint.load_model(again, tmp_path, strict=False)
    assert torch.equal(again.head.weight, state["head.weight"].bfloat16())


# --- names -------------------------------------------------------------------------------------------
class Whole(nn.Module):
    """A language model around a base model, as transformers builds them."""

    def __init__(self, seed, tied):
        super().__init__()
        self.model = make(seed)
        self.score = nn.Linear(31, 4)
        if tied:
            self.model.head.weight = self.model.embed.weight

    def forward(self, ids):
        return self.score(self.model(ids))


def test_prefixes_of_base_models_and_wrappers(tmp_path):
    base, state = plain()
    del base.seen
    state.pop("seen")
    outer = Whole(7, tied=False)
    torch.save(state, tmp_path / "base.pt")
    torch.save(outer.state_dict(), tmp_path / "whole.pt")
    torch.save({f"module._orig_mod.{k}": v for k, v in state.items()}, tmp_path / "wrapped.pt")
    heads = {**{f"{k}": v for k, v in state.items()}, "score.weight": torch.ones(4, 31), "score.bias": torch.ones(4)}
    torch.save(heads, tmp_path / "mixed.pt")

    loaded = checkpoint.load_model(outer, tmp_path / "base.pt", strict=False)
    assert sorted(loaded.missing_keys) == ["score.bias", "score.weight"] and not loaded.unexpected_keys
    assert_same(whole(outer.model), state)
    assert "score.weight' is not in it" in failure(checkpoint.load_model, outer, tmp_path / "base.pt")

    checkpoint.load_model(outer, tmp_path / "mixed.pt")
    assert outer.score.bias.tolist() == [1] * 4

    inner = make(5)
    checkpoint.load_model(inner, tmp_path / "wrapped.pt")
    assert_same(whole(inner), state)
    loaded = checkpoint.load_model(inner, tmp_path / "whole.pt", strict=False)
    assert sorted(loaded.unexpected_keys) == ["score.bias", "score.weight"] and not loaded.missing_keys
    assert_same(whole(inner), whole(Whole(7, tied=False).model))


def tied_ones(folder):
    tied, untied = make(1, tied=True), make(2)
    for model in (tied, untied):
        shardwise.fully_shard(model, strategy="zero3")
    checkpoint.save_model(tied, folder / "tied")
    expected = whole(tied)
    assert "head.weight" not in safetensors.torch.load_file(folder / "tied" / "model.safetensors")

    checkpoint.load_model(untied, folder / "tied")  # its metadata names the other name
    assert_same(whole(untied), expected)
    again = shardwise.fully_shard(make(4, tied=True), strategy="zero2")
    checkpoint.load_model(again, folder / "tied")
    assert_same(whole(again), expected)
    checkpoint.save_model(untied, folder / "untied")
    checkpoint.load_model(again, folder / "untied")  # two tensors, but equal
    checkpoint.load_model(again, folder / "under the other name.pt")
    assert_same(whole(again), expected)
    before = whole(again)
    text = failure(checkpoint.load_model, again, folder / "differ.pt")
    loaded = checkpoint.load_model(again, folder / "differ.pt", strict=False)
    assert loaded.mismatched_keys == ["embed.weight"]
    assert_same(whole(again), before)
    return text


def test_tied_weights(tmp_path):
    state = whole(make(1, tied=True))
    torch.save({k: v for k, v in state.items() if k != "embed.weight"}, tmp_path / "under the other name.pt")
    differ = state["head.weight"].clone()
    differ[30, 12] += 1  # the last rank's part
    torch.save({**state, "head.weight": differ}, tmp_path / "differ.pt")
    for text in run(2, tied_ones, tmp_path):
        assert "'embed.weight' are tied in the model, and there they are different" in text


def misfits(path):
    model = shardwise.fully_shard(make(5), strategy="zero3")
    before = whole(model)
    text = failure(checkpoint.load_model, model, path)
    assert_same(whole(model), before)
    loaded = checkpoint.load_model(model, path, strict=False)
    after = whole(model)
    kept = {"norm.weight", "norm.bias", "head.weight", "blocks.0.gain"}
    assert_same({k: after[k] for k in kept}, {k: before[k] for k in kept})
    return text, loaded, {k: v.numpy() for k, v in after.items() if k not in kept}


def test_what_does_not_fit_is_listed_and_may_be_left_out(tmp_path):
    _, state = plain()
    expected = dict(state)
    del state["norm.weight"], state["norm.bias"]
    state["head.weight"] = state["head.weight"][:, :5].contiguous()
    state["blocks.0.gain"] = torch.ones((), dtype=torch.int8)
    torch.save(state, tmp_path / "other.pt")
    for text, loaded, values in run(2, misfits, tmp_path / "other.pt"):
        for line in (
            "'norm.weight' is not in it", "'head.weight' has shape (31, 5) there, not (31, 13)", "strict=False",
            "'blocks.0.gain' is int8 there, not float32", "'seen' is in it only",
        ):  # fmt: skip
            assert line in text, text
        assert loaded.missing_keys == ["norm.weight", "norm.bias"] and loaded.unexpected_keys == ["seen"]
        assert sorted(loaded.mismatched_keys) == ["blocks.0.gain", "head.weight"]
        assert all((v == expected[k].numpy()).all() for k, v in values.items())


def test_which_part_of_a_training_state(tmp_path):
    model, state = plain()
    ema = {k: v + 1 for k, v in state.items()}
    optimizer = adamw(model.parameters())
    loss_of(model, batch(0, 0)).backward()
    optimizer.step()
    everything = {"epoch": 3, "args": {"lr": 0.1, "names": ["a"]}, "optimizer": optimizer.state_dict()}
    torch.save({**everything, "ema": ema, "model": state}, tmp_path / "usual.pt")
    torch.save({**everything, "ema": ema, "teacher": {"net": state}}, tmp_path / "unusual.pt")
    assert_same(whole(alone(tmp_path / "usual.pt")[0]), state)
    assert_same(whole(alone(tmp_path / "usual.pt", part="ema")[0]), ema)
    assert_same(whole(alone(tmp_path / "unusual.pt", part="teacher.net")[0]), state)
    assert "there are ema, teacher" in failure(alone, tmp_path / "unusual.pt")
    assert "there is no part 'x'" in failure(alone, tmp_path / "usual.pt", part="x")


def test_transformers_models(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=16)
    saved = transformers.GPT2LMHeadModel(config)
    saved.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    assert (tmp_path / "a" / "model.safetensors.index.json").exists()
    model = transformers.GPT2LMHeadModel(config)
    shardwise.fully_shard(model, strategy="zero3,param_dtype=bf16")
    checkpoint.load_model(model, tmp_path / "a")
    assert_same(whole(model), whole(saved))
    saved.transformer.save_pretrained(tmp_path / "base")
    model = transformers.GPT2LMHeadModel(config)
    checkpoint.load_model(model, tmp_path / "base")
    assert_same(whole(model), whole(saved))


def on_meta(folder):
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    shardwise.fully_shard(model, strategy="zero3")
    checkpoint.load_model(model, folder)
    with torch.no_grad():
        return model.eval()(torch.arange(12).view(1, 12)).logits


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_a_transformers_model_that_is_built_on_the_meta_device(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "GPT2":
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=16)
    else:
        config = transformers.LlamaConfig(
            num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=32, vocab_size=50
        )
    saved = transformers.AutoModelForCausalLM.from_config(config).eval()
    saved.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = saved(torch.arange(12).view(1, 12)).logits
    for logits in run(2, on_meta, tmp_path):
        assert torch.allclose(logits, expected, atol=1e-6)


def elsewhere(folder):
    model = shardwise.fully_shard(make(5), strategy="zero2")
    before = whole(model)
    texts = [failure(checkpoint.load_model, model, folder / f"{what}{rank()}") for what in ("other", "missing")]
    assert_same(whole(model), before)
    return texts


def test_ranks_that_see_different_files(tmp_path):
    for r in range(2):
        (tmp_path / f"other{r}").mkdir()
        as_one_file(tmp_path / f"other{r}", whole(make(0).to(torch.bfloat16 if r else torch.float32)), None)
    (tmp_path / "missing0").mkdir()
    as_one_file(tmp_path / "missing0", whole(make(0)), None)
    for other, missing in run(2, elsewhere, tmp_path):
        assert "rank 0 sees other files" in other
        assert "rank 1" in missing or "missing1" in missing


# --- memory and bytes ---------------------------------------------------------------------------------
class Deep(nn.Module):
    def __init__(self, seed, width, depth):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def large_blocks_apart() -> None:
    """Have glibc map blocks from 64 KiB on by themselves, so that memory that is freed is gone.

    How much its heap keeps otherwise depends on everything that ran before; so this comes first in a fresh process.
    """
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD


def peak_of(function) -> int:
    """Bytes by which this process grew at most."""

    def line(name):
        return next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if name in x) * 1024

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = line("VmRSS")
    function()
    return line("VmHWM") - before


def io_of(function) -> int:
    def chars():
        return int(Path("/proc/self/io").read_text().split()[1])

    before = chars()
    function()
    return chars() - before


def measured(path, strategy, width, depth):
    large_blocks_apart()
    model = shardwise.fully_shard(Deep(1, width, depth), strategy=strategy)
    checkpoint.load_model(model, path)  # imports, and what is allocated once
    grown, loaded = [], []
    read = io_of(lambda: grown.append(peak_of(lambda: loaded.append(checkpoint.load_model(model, path)))))
    with torch.no_grad(), shardwise.gathered(model):
        total = sum(p.double().sum().item() for p in model.parameters())
    return grown[0], read, loaded[0].bytes_read, total


@pytest.mark.parametrize(
    ("strategy", "dtype", "width", "depth"),
    [
        ("zero3", torch.float32, 1024, 16),
        ("zero3", torch.bfloat16, 1024, 16),
        ("zero3,offload_params=nvme", torch.float32, 512, 64),
    ],
)
def test_host_memory_is_one_block_and_each_rank_reads_what_it_holds(tmp_path, strategy, dtype, width, depth):
    state = {k: v.to(dtype) for k, v in Deep(2, width, depth).state_dict().items()}  # 64 MiB of parameters in fp32
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    size = sum(v.nbytes for v in state.values())
    total = sum(v.double().sum().item() for v in state.values())
    unit = 4 * width * width // 2 if "nvme" in strategy else 0
    for grown, read, counted, summed in run(2, measured, tmp_path, strategy, width, depth, fresh=True):
        assert grown <= BLOCK + 2 * unit + (1 << 20), grown
        assert counted == size // 2
        if "nvme" not in strategy:
            assert counted <= read <= counted + (1 << 16)
        assert summed == pytest.approx(total)


# --- ranges --------------------------------------------------------------------------------------------
@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(1, 4)), max_size=4),
    st.randoms(use_true_random=False),
)
def test_any_range_of_any_box(tmp_path_factory, dims, draw):
    shape = [n for n, _, _ in dims]
    offsets = [min(o, n - 1) for n, o, _ in dims]
    sizes = [min(s, n - o) for (n, _, s), o in zip(dims, offsets, strict=True)]
    place = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
    values = torch.arange(float(torch.Size(shape).numel())).view(shape)
    file = tmp_path_factory.getbasetemp() / "box"
    file.write_bytes(b"xyz" + values[place].contiguous().numpy().tobytes())
    stored = Stored(torch.float32, tuple(shape), tuple(box_segments(shape, offsets, sizes, file, 3)))
    expected = torch.full(shape, -1.0)
    expected[place] = values[place]
    lo = draw.randint(0, values.numel())
    hi = draw.randint(lo, values.numel())
    out = torch.full((hi - lo,), -1.0, dtype=draw.choice([torch.float32, torch.float64]))
    with StorageReader() as reader:
        reader.read_tensor(stored, lo, hi, out)
    assert torch.equal(out, expected.view(-1)[lo:hi].to(out.dtype))
    assert stored.complete == (sizes == shape)
