"""Models built on the meta device: values come unit by unit, and are those of a model built in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import shardwise
from models import PRESETS, assert_same, whole
from ranks import run
from shardwise.engine import deferred
from shardwise.errors import UnitError
from shardwise.utils import FullyShardedDataParallelPlugin

AWAY = "zero3,offload_params=nvme,offload_optimizer=nvme"


def torchs_own(tied: bool = False) -> nn.Sequential:
    model = nn.Sequential(
        nn.Embedding(31, 16),
        *(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0) for _ in range(3)),
        nn.BatchNorm1d(5),
        nn.Linear(16, 31, bias=False),
    )
    if tied:
        model[5].weight = model[0].weight
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    ids = torch.arange(20).view(4, 5) % 31
    loss = model(ids).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def values(strategies: list[str], path: str) -> None:
    for strategy in strategies:
        torch.manual_seed(3)
        here = torchs_own()
        torch.manual_seed(3)
        with torch.device("meta"):
            there = torchs_own()
        optimizer = torch.optim.AdamW(there.parameters(), lr=0.01)  # made before: parameters stay the same objects
        before = list(there.parameters())
        shardwise.fully_shard(there, strategy=f"{strategy},nvme_path={path}")
        assert all(a is b for a, b in zip(before, there.parameters(), strict=True))
        assert_same(whole(there), whole(here))
        shardwise.fully_shard(here, strategy=strategy.partition(",")[0])
        plain = torch.optim.AdamW(here.parameters(), lr=0.01)
        assert [step(there, optimizer) for _ in range(3)] == [step(here, plain) for _ in range(3)]


@pytest.mark.parametrize("size", [1, 2])
def test_values_are_those_of_a_model_built_in_memory(size, tmp_path):
    run(size, values, [*PRESETS, AWAY] if size == 2 else [AWAY], str(tmp_path))


def test_tied_ones_stay_tied_with_the_first_ones_values():
    torch.manual_seed(3)
    here = torchs_own(tied=True)
    torch.manual_seed(3)
    with torch.device("meta"):
        there = torchs_own(tied=True)
    shardwise.fully_shard(there)
    assert there[5].weight is there[0].weight
    assert torch.equal(whole(there)["0.weight"], whole(here)["0.weight"])


def test_one_unit_exists_at_a_time(tmp_path, monkeypatch):
    """While a model is sharded, what is in memory is a unit and what belongs to the root."""
    live: list[int] = []
    made: list[tuple[StorageWeakRef, int]] = []

    class Watched(deferred.Deferred):
        def materialise(self, module: nn.Module) -> None:
            super().materialise(module)
            made.extend((StorageWeakRef(t.untyped_storage()), t.nbytes) for t in module._parameters.values())
            live.append(sum(nbytes for storage, nbytes in made if not storage.expired()))

    monkeypatch.setattr("shardwise.engine.build.Deferred", Watched)
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(12)))
    shardwise.fully_shard(model, strategy=f"{AWAY},nvme_path={tmp_path}")
    unit = 2 * 4 * (64 * 64 + 64)
    assert max(live) <= unit, (max(live), unit)
    assert len(live) == 1 + 12 * 3


class Bare(nn.Module):
    def __init__(self, buffer: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4))
        if buffer:
            self.register_buffer("mask", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.gain


class Partly(Bare):
    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)


def test_what_nobody_gives_values_is_named():
    with torch.device("meta"):
        bare, partly, good = (nn.Sequential(m) for m in (Bare(), Partly(buffer=True), Partly()))
    with pytest.raises(UnitError, match=r"'0' \(Bare\): 'gain' on(.|\n)*param_init_fn"):
        shardwise.fully_shard(bare)
    with pytest.raises(UnitError, match="'mask' on the meta device: reset_parameters leaves them unset"):
        shardwise.fully_shard(partly)
    shardwise.fully_shard(good)
    assert torch.equal(whole(good)["0.gain"], torch.ones(4))


def halves(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters(recurse=False):
            p.fill_(0.5)


def test_a_function_of_ones_own():
    with torch.device("meta"):
        models: list[Any] = [nn.Sequential(Bare()) for _ in range(3)]
    shardwise.fully_shard(models[0], param_init_fn=halves)
    models[1] = shardwise.FullyShardedDataParallel(models[1], param_init_fn=halves).module
    plugin = FullyShardedDataParallelPlugin(param_init_fn=halves)
    models[2] = shardwise.Accelerator(cpu=True, fsdp_plugin=plugin).prepare(models[2])
    for model in models:
        assert all(bool((value == 0.5).all()) for value in whole(model).values())


def test_a_prepared_model():
    torch.manual_seed(3)
    here = torchs_own()
    for evaluation in (False, True):
        torch.manual_seed(3)
        with torch.device("meta"):
            there = torchs_own()
        there = shardwise.Accelerator(cpu=True).prepare_model(there, evaluation_mode=evaluation)
        assert_same(whole(there), whole(here))


def test_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99,
        tie_word_embeddings=True, initializer_range=0.5,
    )  # fmt: skip
    here = transformers.LlamaForCausalLM(config)
    with torch.device("meta"):
        there = transformers.LlamaForCausalLM(config)
    shardwise.fully_shard(there)
    assert there.lm_head.weight is there.model.embed_tokens.weight
    buffers = dict(there.named_buffers())
    assert_same(dict(here.named_buffers()), buffers)  # rotary frequencies
    for name, value in whole(here).items():
        mine = whole(there)[name]
        torch.testing.assert_close(mine.std(), value.std(), rtol=0.2, atol=1e-6)
