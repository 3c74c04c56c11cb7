"""``fully_shard``, and drop-ins for torch's own wrappers: change the import, keep the script.

``DistributedDataParallel`` shards nothing by default (``ddp``), ``FullyShardedDataParallel`` everything (``zero3``).
Both are thin: ``self.module`` is the caller's module, sharded in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwise.engine import build
from shardwise.engine.build import no_sync, require_engine
from shardwise.engine.clip import clip_grad_norm_
from shardwise.engine.gathered import gathered
from shardwise.engine.select import UnitRule
from shardwise.environment import strategy_from_environment
from shardwise.errors import StrategyError
from shardwise.strategy import Strategy

M = TypeVar("M", bound=nn.Module)


def fully_shard(
    module: M,
    *,
    strategy: str | Strategy | None = None,
    mesh: DeviceMesh | None = None,
    units: UnitRule = None,
    param_init_fn: Callable[[nn.Module], Any] | None = None,
) -> M:
    """Shard a module in place, so that it trains under ``strategy`` on all ranks.

    The module, its parameter objects, their names and shapes stay; their values move into flat buffers
    (rank 0's values, for everyone). Train as before: forward, ``loss.backward()``, any optimizer built before
    or after. Gradients are the mean over ranks.

    Args:
        module: on its device, or built under ``torch.device("meta")``: what is there gets memory and values unit by
            unit, on the device of the other parameters, or on this rank's. The whole model is then never in memory.
        strategy: a preset, its string form or a :class:`Strategy`; ``zero3`` by default. What
            ``shardwise launch --strategy`` says wins over it.
        mesh: a 1-D mesh of all ranks, or a 2-D (replicate, shard) one for ``hsdp``. By default all ranks.
        units: which subtrees are gathered together: a module class or several, a class name, a predicate
            ``(name, module) -> bool``, or ``None`` for repeated blocks and what else is large. Submodules on
            which ``fully_shard`` was called before are units with their own strategy.
        param_init_fn: called with each module that has meta tensors of its own, to fill them. By default that is the
            module's ``reset_parameters()``, or ``_init_weights(module)`` of the transformers model around it.

    Returns:
        The same module.

    Raises:
        UnitError: the module is sharded already, has DTensor parameters or meta tensors that nothing gives values,
            or ``units`` matches nothing.
        StrategyError, NotAvailableYet: see :class:`Strategy`.

    Cost: sends the parameters once, from rank 0. ``shardwise.expected(module)`` says what is live and sent later.
    """
    return build.shard(module, strategy_from_environment(strategy), mesh, units, param_init_fn)


class _Wrapper(nn.Module):
    _preset = "zero3"

    def __init__(
        self,
        module: nn.Module,
        *,
        strategy: str | Strategy | None = None,
        units: UnitRule = None,
        mesh: Any = None,
        broadcast_buffers: bool = True,
        param_init_fn: Callable[[nn.Module], Any] | None = None,
        **torch_options: Any,
    ) -> None:
        super().__init__()
        if torch_options.pop("process_group", None) is not None:
            raise StrategyError(
                "process_group of some ranks is not supported", fix="leave it out: the model trains over all ranks"
            )
        unknown = set(torch_options) - _HARMLESS
        if unknown:
            raise StrategyError(
                f"{type(self).__name__} does not know {', '.join(sorted(unknown))}",
                fix="say it with strategy=..., for example strategy='zero3,param_dtype=bf16'",
            )
        chosen = strategy_from_environment(strategy if strategy is not None else self._preset)
        if not broadcast_buffers:
            chosen = chosen.replace(broadcast_buffers=False)
        build.shard(module, chosen, mesh, units, param_init_fn)
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def no_sync(self) -> AbstractContextManager[None]:
        """Backwards inside keep their gradients on this rank. See :func:`shardwise.no_sync`."""
        return no_sync(self.module)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Clip by the global norm over all ranks and return it. See :func:`shardwise.clip_grad_norm_`."""
        return clip_grad_norm_(self.module, max_norm, norm_type)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own state dict, under the original names. A collective where parameters are split."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load whole tensors, with or without torch DDP's ``module.`` before the names."""
        if state_dict and all(k.startswith("module.") for k in state_dict):
            state_dict = {k.removeprefix("module."): v for k, v in state_dict.items()}
        return self.module.load_state_dict(state_dict, strict=strict, assign=assign)


class DistributedDataParallel(_Wrapper):
    """``torch.nn.parallel.DistributedDataParallel`` over the sharding engine.

    Args:
        module: on its device already.
        strategy: ``ddp`` by default; any other works too.
        broadcast_buffers: send rank 0's buffers before each training forward.
        device_ids, output_device, find_unused_parameters, gradient_as_bucket_view, static_graph,
            bucket_cap_mb, process_group=None, ...: accepted and not needed: unused parameters are found
            without being told, and gradients are views always.

    Ranks may use different parameters in a step; the mean counts a missing gradient as zero.
    """

    _preset = "ddp"


class FullyShardedDataParallel(_Wrapper):
    """``torch.distributed.fsdp.FullyShardedDataParallel`` over the sharding engine.

    Args:
        module: on its device already.
        strategy: ``zero3`` by default.
        units: in place of ``auto_wrap_policy``: a class, several, a predicate, or ``None`` for the default.
        param_init_fn: fills modules that are on ``meta``. See :func:`shardwise.fully_shard`.
    """

    @staticmethod
    def summon_full_params(module: nn.Module, writeback: bool = True, **_: Any) -> AbstractContextManager[None]:
        """Whole values on every rank inside the block. See :func:`shardwise.gathered`."""
        inner = module.module if isinstance(module, _Wrapper) else module
        require_engine(inner)
        return gathered(inner, write=writeback)


_HARMLESS = {
    "device_ids", "output_device", "dim", "bucket_cap_mb", "find_unused_parameters",
    "check_reduction", "gradient_as_bucket_view", "static_graph", "init_sync", "skip_all_reduce_unused_params",
    "use_orig_params", "device_id", "sync_module_states", "forward_prefetch", "limit_all_gathers",
    "backward_prefetch",
}  # fmt: skip
