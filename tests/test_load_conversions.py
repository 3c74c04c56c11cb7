"""What transformers does to the tensors of files when it loads them: the same bits as from_pretrained."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

import shardwise
from ranks import run
from shardwise.checkpoint.formats import open_source
from shardwise.checkpoint.storage_reader import StorageReader
from shardwise.errors import CheckpointError
from shardwise.inference.rearranging import Rearranging
from slowly import in_turn

transformers = pytest.importorskip("transformers")
mapping = pytest.importorskip("transformers.conversion_mapping")
ops = pytest.importorskip("transformers.core_model_loading")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore")

Converter, Concatenate, Chunk = ops.WeightConverter, ops.Concatenate, ops.Chunk
QKV = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"]
MLP = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
Q, UP, DOWN = QKV[0], "mlp.up_proj.weight", "mlp.down_proj.weight"

# What is in the files, what the model has, and how it comes about.
CASES = {
    "chunks": (["self_attn.qkv.weight"], QKV, [Chunk(dim=0)]),
    "chunks of columns": (["mlp.both.weight"], MLP, [Chunk(dim=1)]),
    "parts of unequal size": (["self_attn.qkv.weight"], QKV, [ops.Split(dim=0)]),
    "put together": (["mlp.down.a", "mlp.down.b"], [DOWN], [Concatenate(dim=0)]),
    "columns put together": (["mlp.down.a", "mlp.down.b"], [DOWN], [Concatenate(dim=1)]),
    "transposed": (["mlp.up.turned"], [UP], [ops.Transpose(0, 1)]),
    "transposed if need be": ([UP], [UP], [ops.Transpose(0, 1, check_dims=True)]),
    "permuted": (["self_attn.q.complex"], [Q], [ops.PermuteForRope()]),
    "chunks permuted": (
        ["self_attn.qkv.weight"], QKV, [Chunk(dim=0), ops.PermuteForRope(permute_layer_names=["q_proj", "k_proj"])],
    ),
    "interleaved": (["mlp.up.mixed"], [UP], [ops.Interleave(dim=0)]),
    "interleaved columns": (["mlp.up.mixed"], [UP], [ops.Interleave(dim=1)]),
    "interleaved chunks": (["mlp.both.weight"], MLP, [ops.Interleave(dim=0), Chunk(dim=0)]),
    "interleaved chunks of columns": (["mlp.both.weight"], MLP, [ops.Interleave(dim=1), Chunk(dim=1)]),
    "a convolution": (["mlp.up.conv"], [UP], [ops.Conv3dToLinear(in_channels=16, kernel_size=(1, 2, 2))]),
}  # fmt: skip


def tiny(case: str, *, meta: bool = False, width: int = 64):
    """A model whose files look as a case says."""
    kind = f"shardwise_{case.replace(' ', '_')}"
    config_class = type("Config", (transformers.LlamaConfig,), {"model_type": kind})
    model_class = type("Model", (transformers.LlamaForCausalLM,), {"config_class": config_class})
    source, target, operations = CASES[case]
    mapping.register_checkpoint_conversion_mapping(kind, [Converter(list(source), list(target), operations)], True)
    heads = 2 if "unequal" in case else 4
    config = config_class(
        vocab_size=100, hidden_size=width, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=heads,
    )  # fmt: skip
    torch.manual_seed(1)
    with torch.device("meta" if meta else "cpu"):
        return model_class(config).eval()


IDS = torch.arange(10).view(1, 10)


def with_buffers_of(model, empty):
    for buffer, held in model.named_buffers():
        owner, _, last = buffer.rpartition(".")
        empty.get_submodule(owner)._buffers[last] = held.clone()
    return empty


@in_turn(where=[{"": "cpu"}, {"": "disk"}], case=CASES)
def test_every_operation_is_followed(tmp_path, case, where):
    model = tiny(case, width=256 if case in ("chunks", "chunks of columns") else 64)
    model.save_pretrained(tmp_path)
    if case == "transposed if need be":  # transformers saves it as it is
        tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
        turned = {name: t.T.contiguous() if name.endswith(UP) else t for name, t in tensors.items()}
        safetensors.torch.save_file(turned, tmp_path / "model.safetensors", {"format": "pt"})
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert stored != {name: list(value.shape) for name, value in model.state_dict().items()}
    plain = type(model).from_pretrained(tmp_path, config=model.config).eval()
    empty = with_buffers_of(model, tiny(case, meta=True, width=model.config.hidden_size))
    loaded = shardwise.load(empty, where, checkpoint=tmp_path)
    state = loaded.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value) and torch.equal(value, model.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_what_is_not_only_moved_is_refused(tmp_path, monkeypatch):
    class Doubled(ops.Transpose):
        def convert(self, found, **kwargs):
            return {name: 2 * t for name, t in super().convert(found, **kwargs).items()}

    model = tiny("transposed")
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(CASES, "doubled", (*CASES["transposed"][:2], [Doubled(0, 1)]))
    with pytest.raises(CheckpointError, match="Doubled"):
        shardwise.load(tiny("doubled", meta=True), checkpoint=tmp_path)


def parts(folder: Path, case: str) -> torch.Tensor:
    model = tiny(case)
    empty = with_buffers_of(model, tiny(case, meta=True))
    loaded = shardwise.load(empty, "split", checkpoint=folder)
    with torch.no_grad():
        return loaded(IDS).logits


@pytest.mark.parametrize("case", ["transposed", "interleaved chunks of columns"])
def test_ranks_read_their_parts(tmp_path, case):
    model = tiny(case)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(IDS).logits
    assert all(torch.equal(out, expected) for out in run(2, parts, tmp_path, case))


def qwen3_vl_moe():
    text = {
        "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32, "patch_size": 4,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    return transformers.Qwen3VLMoeForConditionalGeneration(config).eval()


def test_experts_that_their_authors_saved_transposed(tmp_path):
    model = qwen3_vl_moe()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for name, value in tensors.items():
        if "experts." in name and value.ndim == 3:
            tensors[name] = value.transpose(1, 2).contiguous()
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    plain = type(model).from_pretrained(tmp_path).eval()
    loaded = shardwise.load(tmp_path, {"": "disk"})
    with torch.no_grad():
        out = loaded(input_ids=IDS).logits
        assert torch.equal(out, plain(input_ids=IDS).logits) and torch.equal(out, model(input_ids=IDS).logits)


def test_experts_that_are_shared_out_and_put_together(tmp_path):
    """An operation that makes several tensors of several."""
    names = [f"experts.{i}.{part}" for i in range(4) for part in ("gate", "up")]
    tensors = {name: torch.randn(6, 8) for name in names}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    (stored,) = open_source(tmp_path).sections.values()
    operation = ops.ErnieFuseAndSplitTextVisionExperts(stack_dim=0, concat_dim=1)

    def made(of):
        inputs = {part: [of(f"experts.{i}.{part}") for i in range(4)] for part in ("gate", "up")}
        return operation.convert(inputs, list(inputs), ["text", "vision"], None)

    block = Rearranging()
    leaves = {name: block.tensor(stored[name]) for name in names}
    with block:
        found = made(leaves.__getitem__)
    with StorageReader() as reader:
        for name, value in made(tensors.__getitem__).items():
            assert torch.equal(reader.values(block.stored(found[name])).view(value.shape), value)
