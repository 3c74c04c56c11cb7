"""What torch's two wrappers have in common, and ``DistributedDataParallel``: thin, around a module sharded in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from shardwise.comm import World
from shardwise.engine.build import no_sync, require_engine
from shardwise.engine.clip import clip_grad_norm_
from shardwise.engine.manual import engine_around
from shardwise.engine.select import UnitRule
from shardwise.engine.uneven import uneven_inputs
from shardwise.environment import strategy_from_environment
from shardwise.errors import LeftOut, StrategyError
from shardwise.fsdp.arguments import precision_of
from shardwise.fsdp.modules import shard
from shardwise.strategy import Strategy


class Wrapper(nn.Module):
    """A module around a sharded one.

    Attributes:
        held_as: the name under which it has that as a child.
    """

    held_as = "module"

    def _wrap(
        self,
        module: nn.Module,
        strategy: Strategy,
        mesh: Any = None,
        units: UnitRule = None,
        param_init_fn: Callable[[nn.Module], Any] | None = None,
        ignored: Sequence[nn.Parameter] = (),
    ) -> None:
        shard(module, strategy_from_environment(strategy), mesh, units, param_init_fn, ignored)
        self.add_module(self.held_as, module)
        self.register_load_state_dict_pre_hook(_names_inside)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return unwrap(self)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == type(self).held_as:  # not set yet
                raise
            return getattr(super().__getattr__(type(self).held_as), name)

    def no_sync(self) -> AbstractContextManager[None]:
        """Backwards inside keep their gradients on this rank. See :func:`shardwise.no_sync`."""
        return no_sync(unwrap(self))

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Clip by the global norm over all ranks and return it. See :func:`shardwise.clip_grad_norm_`."""
        return clip_grad_norm_(unwrap(self), max_norm, norm_type)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own state dict, under the original names. A collective where parameters are split."""
        return unwrap(self).state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load whole tensors, with or without torch DDP's ``module.`` before the names."""
        inner = unwrap(self)
        if state_dict and all(k.startswith("module.") for k in state_dict) and not hasattr(inner, "module"):
            state_dict = {k.removeprefix("module."): v for k, v in state_dict.items()}
        return inner.load_state_dict(state_dict, strict=strict, assign=assign)


def unwrap(module: nn.Module) -> nn.Module:
    """The module that is sharded, without wrappers of ours around it."""
    while isinstance(module, Wrapper):
        inner = module._modules[module.held_as]
        assert inner is not None
        module = inner
    return module


def _names_inside(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A model with wrappers in it is loaded: names in a state dict do not have theirs."""
    assert isinstance(module, Wrapper)
    inside = f"{prefix}{module.held_as}."
    for key in [k for k in state if k.startswith(prefix) and not k.startswith(inside)]:
        state[inside + key.removeprefix(prefix)] = state.pop(key)


def all_ranks(process_group: Any, argument: str = "process_group") -> None:
    """Raise unless a process group is that of all ranks."""
    if process_group is None:
        return
    world = World.current()
    known = isinstance(process_group, dist.ProcessGroup)
    if not known or dist.get_process_group_ranks(process_group) != list(range(world.size)):
        raise StrategyError(
            f"{argument} of some ranks is not supported", fix="leave it out: the model trains over all ranks"
        )


def refuse_unknown(where: str, options: Mapping[str, Any]) -> None:
    """Raise for options that torch does not have."""
    if options:
        raise StrategyError(
            f"{where} does not know {', '.join(sorted(options))}",
            fix="say it with strategy=..., for example strategy='zero3,param_dtype=bf16'",
        )


class DistributedDataParallel(Wrapper):
    """``torch.nn.parallel.DistributedDataParallel`` over the sharding engine.

    Args:
        module: on its device already.
        strategy: ``ddp`` by default; any other works too.
        units, param_init_fn: see :func:`shardwise.fully_shard`.
        broadcast_buffers, forward_sync_buffers: send rank 0's buffers before each training forward.
        process_group: ``None`` or that of all ranks.
        mixed_precision: torch's own object, for ``param_dtype`` and ``reduce_dtype``.
        device_mesh: a mesh of all ranks.
        device_ids, output_device, dim, init_sync, bucket_cap_mb, find_unused_parameters, check_reduction,
            gradient_as_bucket_view, static_graph, skip_all_reduce_unused_params, bucket_cap_mb_list,
            batched_grad_copy: accepted and not needed: the model is where it is, unused parameters are found without
            being told, and gradients are views always.

    Ranks may use different parameters in a step; the mean counts a missing gradient as zero.
    """

    def __init__(
        self,
        module: nn.Module,
        device_ids: Sequence[Any] | None = None,
        output_device: Any = None,
        dim: int = 0,
        broadcast_buffers: bool | None = None,
        init_sync: bool = True,
        process_group: Any = None,
        bucket_cap_mb: float | None = None,
        find_unused_parameters: bool = False,
        check_reduction: bool = False,
        gradient_as_bucket_view: bool = False,
        static_graph: bool = False,
        delay_all_reduce_named_params: Any = None,
        param_to_hook_all_reduce: Any = None,
        mixed_precision: Any = None,
        device_mesh: Any = None,
        skip_all_reduce_unused_params: bool = False,
        bucket_cap_mb_list: Any = None,
        batched_grad_copy: bool = False,
        forward_sync_buffers: bool | None = None,
        *,
        strategy: str | Strategy | None = None,
        units: UnitRule = None,
        mesh: Any = None,
        param_init_fn: Callable[[nn.Module], Any] | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        refuse_unknown(where, unknown)
        all_ranks(process_group)
        if isinstance(device_ids, (str, Strategy)):
            raise StrategyError(
                f"device_ids is a list of devices, not {device_ids!r}", where=where, fix=f"strategy='{device_ids}'"
            )
        if delay_all_reduce_named_params is not None or param_to_hook_all_reduce is not None:
            raise StrategyError("delay_all_reduce_named_params is not served", where=where, fix="leave it out")
        chosen = Strategy.parse(strategy if strategy is not None else "ddp")
        param, reduce = precision_of("mixed_precision", mixed_precision, where=where)
        if param is not None or reduce is not None:
            chosen = chosen.replace(param_dtype=param, reduce_dtype=reduce)
        if broadcast_buffers is False or forward_sync_buffers is False:
            chosen = chosen.replace(broadcast_buffers=False)
        self._wrap(module, chosen, mesh if mesh is not None else device_mesh, units, param_init_fn)

    @contextmanager
    def join(
        self,
        divide_by_initial_world_size: bool = True,
        enable: bool = True,
        throw_on_early_termination: bool = False,
    ) -> Iterator[None]:
        """Ranks may run out of data at different times: those without lend what they hold until all have ended.

        The optimizers of the model step on all ranks to the end. They must be known when the block begins: one that
        has not stepped before is made known with ``shardwise.attach(optimizer)``.

        Args:
            divide_by_initial_world_size: gradients are divided by the number of ranks; ``False`` is refused.
            enable: ``False``: the block does nothing.
            throw_on_early_termination: refused.

        Raises:
            StrategyError: see above.
        """
        if not enable:
            yield
            return
        if not divide_by_initial_world_size or throw_on_early_termination:
            raise StrategyError(
                "join(divide_by_initial_world_size=False) and join(throw_on_early_termination=True) are not served",
                fix="leave them out; Accelerator.join_uneven_inputs takes the mean over the ranks that have a batch",
            )
        with uneven_inputs([require_engine(unwrap(self))]):
            yield

    def join_hook(self, **_: Any) -> NoReturn:
        """Refused: torch's ``Join`` would have ranks without data shadow collectives that are not torch's."""
        raise LeftOut("join_hook: torch's Join does not know these collectives", fix="with model.join(): ...")

    def register_comm_hook(self, state: object, hook: Callable[..., Any]) -> NoReturn:
        """Refused: a reduce has no part that could be replaced."""
        raise LeftOut(
            "register_comm_hook: gradients are reduced by Shardwise's own code",
            where=type(self).__name__,
            fix="strategy='ddp,reduce_dtype=bf16' (or fp16) sends half the bytes, as bf16_compress_hook does",
        )

    def will_sync_module_buffers(self) -> bool:
        """Are rank 0's buffers sent before each training forward?"""
        engine = require_engine(unwrap(self))
        return engine.strategy.broadcast_buffers and engine.sync and next(self.buffers(), None) is not None


def of_sharded(module: nn.Module) -> nn.Module:
    """The sharded module behind a wrapper, for functions that take either.

    Raises:
        UnitError: it is not sharded, nor is anything in it.
    """
    inner = unwrap(module)
    if engine_around(inner) is None:
        require_engine(inner)
    return inner
