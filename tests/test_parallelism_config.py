"""``ParallelismConfig``: the axes for data become a strategy; all others are refused by name."""

from __future__ import annotations

import pytest

from ranks import run
from shardwise import Accelerator
from shardwise.errors import StrategyError
from shardwise.utils import FullyShardedDataParallelPlugin, ParallelismConfig


def sized(sizes: dict[str, int]) -> str:
    accelerator = Accelerator(cpu=True, parallelism_config=ParallelismConfig(**sizes))
    assert accelerator.parallelism_config is accelerator.state.parallelism_config is not None
    return str(accelerator.strategy)


@pytest.mark.parametrize(
    ("sizes", "strategy"),
    [({"dp_shard_size": 2}, "zero3"), ({"dp_replicate_size": 2}, "ddp"), ({}, "ddp"), ({"tp_size": 1}, "ddp")],
)
def test_sizes_on_two_ranks(sizes: dict[str, int], strategy: str) -> None:
    assert run(2, sized, sizes) == [strategy] * 2


def test_both_axes_for_data_are_a_mesh() -> None:
    config = ParallelismConfig(dp_replicate_size=2, dp_shard_size=4)
    assert str(config.to_strategy()) == "hsdp,shard_size=4"
    assert (config.total_size, config.data_parallel_size, config.non_data_parallel_size) == (8, 8, 1)
    assert config.dp_dim_names == ["dp_replicate", "dp_shard"] and config.fsdp_dim_names[-1] == "dp_shard_cp"
    assert not (config.tp_enabled or config.cp_enabled or config.sp_enabled)


@pytest.mark.parametrize("axis", ["tp_size", "cp_size", "sp_size"])
def test_another_axis_is_refused_by_name(axis: str) -> None:
    with pytest.raises(StrategyError, match=f"{axis}=2 is not served"):
        ParallelismConfig(**{axis: 2})
    config = ParallelismConfig(dp_shard_size=1)
    setattr(config, axis, 2)  # as libraries do that fill it in
    with pytest.raises(StrategyError, match=f"{axis}=2 is not served"):
        Accelerator(cpu=True, parallelism_config=config)


def test_what_contradicts_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StrategyError, match="dp_shard_size=0 is no number of ranks"):
        ParallelismConfig(dp_shard_size=0)
    with pytest.raises(StrategyError, match="parallelism_config is a dict"):
        Accelerator(cpu=True, parallelism_config={"dp_shard_size": 2})
    split = ParallelismConfig(dp_shard_size=2)
    with pytest.raises(StrategyError, match="and there are 1"):
        Accelerator(cpu=True, parallelism_config=split)
    with pytest.raises(StrategyError, match="say the same thing twice"):
        Accelerator(cpu=True, parallelism_config=split, strategy="zero3")
    with pytest.raises(StrategyError, match="fsdp_plugin says zero3, parallelism_config ddp"):
        Accelerator(
            cpu=True,
            parallelism_config=ParallelismConfig(dp_replicate_size=2),
            fsdp_plugin=FullyShardedDataParallelPlugin(),
        )
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "4")  # as Accelerate's launcher says it
    assert ParallelismConfig().dp_shard_size == 4


def both(preset: str) -> str:
    plugin = FullyShardedDataParallelPlugin(sharding_strategy=preset)
    arranged = ParallelismConfig(dp_shard_size=2)
    return str(Accelerator(cpu=True, fsdp_plugin=plugin, parallelism_config=arranged).strategy)


def test_beside_a_plugin_the_plugin_says_what_is_split() -> None:
    assert run(2, both, "FULL_SHARD") == ["zero3"] * 2
    assert run(2, both, "SHARD_GRAD_OP") == ["zero2"] * 2
