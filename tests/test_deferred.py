"""Models built on the meta device: values come unit by unit, and are those of a model built in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import shardwise
from models import PRESETS, assert_same, rank, whole
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


def peak_of(make: Any, *args: Any, path: Any, monkeypatch: Any) -> int:
    """The most bytes of a model that were in memory at once while it was sharded, before it was sharded."""
    live: list[int] = []
    made: list[tuple[StorageWeakRef, int]] = []

    class Watched(deferred.Deferred):
        def materialise(self, module: nn.Module) -> None:
            super().materialise(module)
            made.extend((StorageWeakRef(t.untyped_storage()), t.nbytes) for t in module._parameters.values())
            live.append(sum(nbytes for storage, nbytes in made if not storage.expired()))

    monkeypatch.setattr("shardwise.engine.build.Deferred", Watched)
    with torch.device("meta"):
        model = make(*args)
    shardwise.fully_shard(model, strategy=f"{AWAY},nvme_path={path}")
    assert len(live) == len(list(model.modules()))
    return max(live)


def twelve() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(12)))


def test_one_unit_exists_at_a_time(tmp_path, monkeypatch):
    """While a model is sharded, what is in memory is a unit and what belongs to the root."""
    assert peak_of(twelve, path=tmp_path, monkeypatch=monkeypatch) <= 2 * 4 * (64 * 64 + 64)


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


# --- modules that set what others hold ------------------------------------------------------------------------------
class Pair(nn.Module):
    """Its two layers are drawn again, by itself."""

    def __init__(self, seed_again: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.register_buffer("steps", torch.zeros(3, dtype=torch.long))
        self.register_buffer("mask", torch.zeros(2, dtype=torch.bool))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.up, self.down):
            nn.init.xavier_uniform_(layer.weight)
        self.down.bias.data.zero_()
        self.steps.fill_(7)
        self.mask = torch.tensor([True, False], device=self.mask.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x))


class Whole(nn.Module):
    """A root that draws again, in one of several ways, what is inside it."""

    def __init__(self, how: str, own: bool) -> None:
        super().__init__()
        self.inp = nn.Linear(8, 8)
        self.pairs = nn.ModuleList(Pair() for _ in range(3))
        self.how = how
        if own:
            self.gain = nn.Parameter(torch.empty(8))
        if how != "reads" or not self.inp.weight.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.rand(1)  # random numbers that no parameter gets
        if hasattr(self, "gain"):
            nn.init.normal_(self.gain)
        layers = [m for m in self.modules() if isinstance(m, nn.Linear)]
        if self.how == "all":
            for layer in layers:
                nn.init.trunc_normal_(layer.weight, std=0.02)
        elif self.how == "through .data":
            for layer in layers[1:]:
                layer.weight.data.normal_(0.0, 0.02)
                layer.bias.data = torch.full_like(layer.bias.data, 0.25)
        elif self.how == "one":
            self.pairs[1].down.weight.data.copy_(torch.eye(8, 12))
        elif self.how == "reads":
            with torch.no_grad():
                for layer in layers:
                    layer.weight.div_(float(layer.weight.norm()))
        elif self.how == "new ones":
            for pair in self.pairs:
                pair.up.weight = nn.Parameter(torch.randn_like(pair.up.weight))
        elif self.how == "children":
            for pair in self.pairs:
                pair.reset_parameters()
                pair.steps += 1
        elif self.how == "together":
            with torch.no_grad():
                torch._foreach_mul_([layer.weight for layer in layers], 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x) * (self.gain if hasattr(self, "gain") else 1)
        for pair in self.pairs:
            x = pair(x)
        return x


class Styled(nn.Module):
    """As transformers' models: one function for all modules, which knows containers by their class, too."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(Pair() for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.fill_(0.5)
            module.bias.data.zero_()
        elif isinstance(module, Pair):
            module.steps.fill_(7)
            module.mask.fill_(True)
            module.down.weight.data.fill_(0.125)
        elif isinstance(module, Styled):
            module.pairs[0].up.bias.data.fill_(3.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for pair in self.pairs:
            x = pair(x)
        return self.norm(x)


WAYS = ["all", "through .data", "one", "reads", "new ones", "children", "together"]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return whole(model) | dict(model.named_buffers())


def set_by_others(strategies: list[str]) -> list[Any]:
    seen = []
    makers: list[Any] = [lambda how=how, own=own: Whole(how, own) for how in WAYS for own in (False, True)]
    makers.append(Styled)
    for strategy in strategies:
        for make in makers:
            torch.manual_seed(3)
            here = make()
            torch.manual_seed(3 + rank())  # rank 0's count
            with torch.device("meta"):
                there = make()
            optimizer = torch.optim.SGD(there.parameters(), lr=1.0)
            shardwise.fully_shard(there, strategy=strategy)
            assert_same(state(there), state(here))
            ours = {id(p) for p in there.parameters()}
            assert all(id(p) in ours for p in optimizer.param_groups[0]["params"])
            seen.append(state(there))
        with torch.device("meta"):
            model = nn.Transformer(8, 2, 2, 2, 16)
        seen.append(state(shardwise.fully_shard(model, strategy=strategy)))
        drawn = [v for k, v in seen[-1].items() if k.endswith("linear1.weight")]
        assert all(8**-0.5 < v.abs().max() < 0.5 for v in drawn), "by the root, not by the layers"
    return seen


@pytest.mark.parametrize("size", [1, 2])
def test_what_an_ancestor_sets_is_sent(size):
    first, *others = run(size, set_by_others, PRESETS if size == 2 else ["zero3"])
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            assert_same(mine, theirs)


class Large(nn.Module):
    """A root with a parameter of its own, that sets some of its twelve units."""

    def __init__(self, which: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(12))
        self.gain, self.which = nn.Parameter(torch.empty(1)), which

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)
        for k in self.which:
            nn.init.zeros_(self.layers[k][0].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x) * self.gain


@pytest.mark.parametrize("which", [[], [11], [3, 11]])
def test_only_units_that_are_set_again_stay(which, tmp_path, monkeypatch):
    peak = peak_of(Large, which, path=tmp_path, monkeypatch=monkeypatch)
    unit = 2 * 4 * (64 * 64 + 64)
    assert (len(which) + (11 not in which)) * unit <= peak <= (len(which) + 1) * unit + 4


def test_a_child_that_is_sharded_is_not_set_again():
    with torch.device("meta"):
        model = Whole("all", True)
    shardwise.fully_shard(model.pairs[0], strategy="ddp")
    with pytest.raises(UnitError, match=r"reset_parameters sets 'pairs.0.up.weight', which is sharded already"):
        shardwise.fully_shard(model)
    with torch.device("meta"):
        model = Whole("all", True)
    model.inp.to_empty(device="cpu")
    for p in model.inp.parameters():
        nn.init.constant_(p, 0.75)  # as if it had been loaded
    shardwise.fully_shard(model, strategy="zero3")
    assert all(bool((v == 0.75).all()) for k, v in whole(model).items() if k.startswith("inp."))
    with torch.device("meta"):
        model = Whole("all", True)
    with pytest.raises(UnitError, match=r"param_init_fn sets .* sharded already(.|\n)*recurse=False"):
        shardwise.fully_shard(model, strategy="ddp", param_init_fn=lambda m: m.apply(everything_halves))


def everything_halves(module: nn.Module) -> None:
    with torch.no_grad():
        for t in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            t.fill_(0.5)


class Counting(nn.Module):
    def __init__(self, dtype: torch.dtype, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(4, 4), how
        self.register_buffer("count", torch.zeros(3, dtype=dtype))
        self.weight = nn.Parameter(torch.ones(2))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.how == "in place":
            self.count.zero_()
        elif self.how == "through .data":
            self.count.data[:] = 1
        elif self.how == "new one":
            self.count = torch.ones_like(self.count)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def only_parameters(module: nn.Module) -> None:
    halves(module)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.int32, torch.float32])
def test_buffers_of_any_dtype_that_nobody_sets_are_named(dtype):
    def make(how: str) -> nn.Module:
        with torch.device("meta"):
            return nn.Sequential(Counting(dtype, how), nn.Linear(4, 4))

    for how in ("in place", "through .data", "new one"):
        model = shardwise.fully_shard(make(how))
        assert bool((model[0].count == float(how != "in place")).all())
    for shard in (shardwise.fully_shard, shardwise.DistributedDataParallel):
        with pytest.raises(UnitError, match="'count' on the meta device: reset_parameters leaves them unset"):
            shard(make(""))
        with pytest.raises(UnitError, match="'count' on the meta device: param_init_fn leaves them unset"):
            shard(make("in place"), param_init_fn=only_parameters)
        shard(make(""), param_init_fn=everything_halves)
    with pytest.raises(UnitError, match="'count' on the meta device: reset_parameters leaves"):
        shardwise.Accelerator(cpu=True).prepare_model(make(""), evaluation_mode=True)


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
