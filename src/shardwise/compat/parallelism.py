"""``ParallelismConfig``: how ranks are arranged, in Accelerate's words."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any

from shardwise.errors import StrategyError
from shardwise.strategy import Strategy

__all__ = ["ParallelismConfig", "own_parallelism"]

_REFUSED = {
    "tp_size": "use torch.distributed.tensor.parallel, on models that Shardwise does not shard",
    "cp_size": "split sequences in the script",
    "sp_size": "split sequences in the script",
}


@dataclass(repr=False)
class ParallelismConfig:
    """The sizes of the axes along which ranks are arranged. Those for data are served, all others are refused by name.

    Args:
        dp_replicate_size: groups of ranks that each hold the whole model; ``None`` for 1, or what the variable
            ``PARALLELISM_CONFIG_DP_REPLICATE_SIZE`` says.
        dp_shard_size: ranks over which a model is split; ``None`` likewise. Both more than 1: ``hsdp``.
        tp_size, cp_size, sp_size: 1, or ``None``.
        cp_backend, sp_backend, tp_handler, cp_handler, sp_handler: belong to these, and do nothing without them.

    Raises:
        StrategyError: another axis, or a size that is no number of ranks.
    """

    dp_replicate_size: int | None = None
    dp_shard_size: int | None = None
    tp_size: int | None = None
    cp_size: int | None = None
    cp_backend: Any = None
    sp_size: int | None = None
    sp_backend: Any = None
    tp_handler: Any = None
    cp_handler: Any = None
    sp_handler: Any = None

    device_mesh = None  # ranks are arranged by the strategy's own mesh

    def __post_init__(self) -> None:
        for name in ("dp_replicate_size", "dp_shard_size", *_REFUSED):
            if getattr(self, name) is None:
                setattr(self, name, int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1")))
        self.to_strategy()

    def to_strategy(self, size: int | None = None) -> Strategy:
        """The strategy that these sizes describe: ``ddp``, ``zero3`` or ``hsdp``.

        Args:
            size: the world size they have to multiply to; ``None``: any.

        Raises:
            StrategyError: as above, or another world size.
        """
        for name in ("dp_replicate_size", "dp_shard_size", *_REFUSED):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise StrategyError(f"{name}={value!r} is no number of ranks", where=_WHERE, fix="1 or more")
            if name in _REFUSED and value > 1:
                raise StrategyError(f"{name}={value} is not served", where=_WHERE, fix=_REFUSED[name])
        if size is not None and self.total_size not in (1, size):
            raise StrategyError(
                f"dp_replicate_size={self.dp_replicate_size} times dp_shard_size={self.dp_shard_size} ranks, "
                f"and there are {size}",
                where=_WHERE,
                fix="sizes that multiply to the number of ranks",
            )
        if self.dp_shard_enabled and self.dp_replicate_enabled:
            return Strategy("hsdp", shard_size=self.dp_shard_size)
        return Strategy("zero3" if self.dp_shard_enabled else "ddp")

    # --- what libraries ask ------------------------------------------------------------------
    @property
    def dp_replicate_enabled(self) -> bool:
        return (self.dp_replicate_size or 1) > 1

    @property
    def dp_shard_enabled(self) -> bool:
        return (self.dp_shard_size or 1) > 1

    @property
    def tp_enabled(self) -> bool:
        return (self.tp_size or 1) > 1

    @property
    def cp_enabled(self) -> bool:
        return (self.cp_size or 1) > 1

    @property
    def sp_enabled(self) -> bool:
        return (self.sp_size or 1) > 1

    @property
    def data_parallel_size(self) -> int:
        """Ranks that read different data."""
        return (self.dp_replicate_size or 1) * (self.dp_shard_size or 1)

    @property
    def non_data_parallel_size(self) -> int:
        """Ranks that read the same data: one."""
        return (self.tp_size or 1) * (self.cp_size or 1) * (self.sp_size or 1)

    @property
    def total_size(self) -> int:
        """All of them."""
        return self.data_parallel_size * self.non_data_parallel_size

    @property
    def dp_dim_names(self) -> list[str]:
        """The axes along which data is split."""
        return ["dp_replicate"] * self.dp_replicate_enabled + ["dp_shard"] * self.dp_shard_enabled

    @property
    def non_dp_dim_names(self) -> list[str]:
        """The axes along which data is the same: none."""
        return []

    @property
    def dp_shard_cp_dim_names(self) -> list[str]:
        """The axes along which a model is split."""
        return ["dp_shard"] * self.dp_shard_enabled

    @property
    def dp_cp_dim_names(self) -> list[str]:
        """The axes along which losses are averaged."""
        return self.dp_dim_names

    @property
    def fsdp_dim_names(self) -> list[str]:
        return ["dp_replicate"] * self.dp_replicate_enabled + ["dp_shard_cp"]

    def to_json(self) -> dict[str, Any]:
        """The arguments."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __repr__(self) -> str:
        return f"ParallelismConfig(dp_replicate_size={self.dp_replicate_size}, dp_shard_size={self.dp_shard_size})"


def own_parallelism(config: Any) -> ParallelismConfig | None:
    """The same of this library's class, whoever's it is.

    Raises:
        StrategyError: it is something else, or has an axis that is not served. Libraries set sizes later, too.
    """
    if config is None:
        return None
    if not hasattr(config, "dp_shard_size"):
        raise StrategyError(
            f"parallelism_config is a {type(config).__name__}", fix="give a ParallelismConfig, or strategy='zero3'"
        )
    names = [f.name for f in fields(ParallelismConfig)]
    own = ParallelismConfig(**{name: getattr(config, name, None) for name in names})
    return config if isinstance(config, ParallelismConfig) else own


_WHERE = "ParallelismConfig"
