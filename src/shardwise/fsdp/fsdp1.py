"""``FullyShardedDataParallel``: torch's first FSDP, its constructor and its functions, over the sharding engine."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from shardwise import device as devices
from shardwise.comm import World
from shardwise.engine.gathered import gathered
from shardwise.engine.hooks import engine_of
from shardwise.engine.move import move
from shardwise.engine.select import UnitRule
from shardwise.errors import LeftOut, StrategyError
from shardwise.fsdp.arguments import entry_of, offloads, parameters_of, precision_of, preset_of
from shardwise.fsdp.policies import rule_of
from shardwise.fsdp.wrappers import Wrapper, all_ranks, of_sharded, refuse_unknown, unwrap
from shardwise.strategy import Strategy

if TYPE_CHECKING:
    from torch.distributed.fsdp import StateDictSettings

_SETTINGS = "_shardwise_state_dict_settings"


class FullyShardedDataParallel(Wrapper):
    """``torch.distributed.fsdp.FullyShardedDataParallel`` over the sharding engine.

    Args:
        module: on its device already, or on ``device_id``'s from here on.
        process_group: ``None`` or that of all ranks. Groups of a hybrid strategy: ``device_mesh``.
        sharding_strategy, cpu_offload, mixed_precision: torch's own objects, as a strategy; see
            :class:`shardwise.FullyShardedDataParallelPlugin`.
        auto_wrap_policy: torch's policies say which modules are units.
        ignored_modules, ignored_states: what stays as it is on each rank: neither sharded, nor sent, nor reduced.
        param_init_fn: fills modules that are on ``meta``. See :func:`shardwise.fully_shard`.
        device_mesh: a mesh of all ranks, or a 2-D (replicate, shard) one.
        strategy: in place of the three above; ``zero3`` by default.
        units: in place of ``auto_wrap_policy``: a class, several, a predicate, or ``None`` for the default.
        backward_prefetch, sync_module_states, forward_prefetch, limit_all_gathers, use_orig_params: accepted:
            parameters are the module's own, rank 0's values go to everyone, gathers run ahead of their use.

    Names of parameters are those of the module, without components of wrappers.
    """

    held_as = "_fsdp_wrapped_module"

    def __init__(
        self,
        module: nn.Module,
        process_group: Any = None,
        sharding_strategy: Any = None,
        cpu_offload: Any = None,
        auto_wrap_policy: Any = None,
        backward_prefetch: Any = None,
        mixed_precision: Any = None,
        ignored_modules: Iterable[nn.Module] | None = None,
        param_init_fn: Callable[[nn.Module], Any] | None = None,
        device_id: int | torch.device | None = None,
        sync_module_states: bool = False,
        forward_prefetch: bool = False,
        limit_all_gathers: bool = True,
        use_orig_params: bool = False,
        ignored_states: Iterable[Any] | None = None,
        device_mesh: Any = None,
        *,
        strategy: str | Strategy | None = None,
        units: UnitRule = None,
        mesh: Any = None,
        broadcast_buffers: bool = True,
        **unknown: Any,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        refuse_unknown(where, unknown)
        all_ranks(process_group)
        told = {
            name: value
            for name, value in (
                ("sharding_strategy", sharding_strategy),
                ("cpu_offload", cpu_offload),
                ("mixed_precision", mixed_precision),
            )
            if value is not None
        }
        if strategy is not None and told:
            raise StrategyError(f"strategy and {', '.join(told)} are both given", where=where, fix="say it once")
        if units is not None and auto_wrap_policy is not None:
            raise StrategyError("units and auto_wrap_policy are both given", where=where, fix="say it once")
        chosen = Strategy.parse(strategy) if strategy is not None else _strategy_of(**told, where=where)
        if auto_wrap_policy is not None:
            rule = rule_of(auto_wrap_policy, where=where)
            units = rule if _matches(module, rule) else None
        if not broadcast_buffers:
            chosen = chosen.replace(broadcast_buffers=False)
        ignored = parameters_of("ignored_modules", ignored_modules, where)
        ignored += parameters_of("ignored_states", ignored_states, where)
        _move(module, device_id)
        self._wrap(module, chosen, mesh if mesh is not None else device_mesh, units, param_init_fn, ignored)

    @property
    def module(self) -> nn.Module:
        """The caller's module."""
        return self._fsdp_wrapped_module

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As the module's own, whatever is wrapped in it."""
        for name, p in super().named_parameters(*args, **kwargs):
            yield _without_wrappers(name), p

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """As the module's own, whatever is wrapped in it."""
        for name, b in super().named_buffers(*args, **kwargs):
            yield _without_wrappers(name), b

    def check_is_root(self) -> bool:
        """Is it not part of another sharded model?"""
        return engine_of(unwrap(self)) is not None

    def apply(self, fn: Callable[[nn.Module], None]) -> FullyShardedDataParallel:
        """Call ``fn`` with every module inside, with whole values; rank 0's changes count."""
        with gathered(unwrap(self), write=True):
            return super().apply(fn)

    def register_comm_hook(self, state: object, hook: Callable[..., Any]) -> NoReturn:
        """Refused: a reduce has no part that could be replaced."""
        raise LeftOut(
            "register_comm_hook: gradients are reduced by Shardwise's own code",
            where=type(self).__name__,
            fix="strategy='zero3,reduce_dtype=bf16' (or fp16) sends half the bytes, as bf16_compress_hook does",
        )

    # --- functions about a model that holds wrapped modules -------------------------------------------
    @staticmethod
    def fsdp_modules(module: nn.Module, root_only: bool = False) -> list[FullyShardedDataParallel]:
        """The wrappers in a model, outermost first."""
        found = [m for m in module.modules() if isinstance(m, FullyShardedDataParallel)]
        return [m for m in found if m.check_is_root()] if root_only else found

    @staticmethod
    def summon_full_params(
        module: nn.Module,
        recurse: bool = True,
        writeback: bool = True,
        rank0_only: bool = False,
        offload_to_cpu: bool = False,
        with_grads: bool = False,
    ) -> AbstractContextManager[None]:
        """Whole values on every rank inside the block. See :func:`shardwise.gathered`.

        Args:
            recurse: has no effect: values of wrapped modules inside are here too.
            writeback: take changed values over (rank 0's, for everyone) when the block ends.
            rank0_only: has no effect without ``writeback``: values are here on the other ranks too.
            offload_to_cpu: refused, but for models on the CPU.
            with_grads: show whole gradients in ``p.grad``. Changes to them are not kept.

        Raises:
            StrategyError: ``writeback`` with ``rank0_only``, as torch has it, or ``offload_to_cpu`` on a GPU.
        """
        inner = of_sharded(module)
        if rank0_only and writeback:
            raise StrategyError("summon_full_params: writeback and rank0_only exclude each other", fix="leave one out")
        if offload_to_cpu and any(p.device.type != "cpu" for p in inner.parameters()):
            raise StrategyError(
                "summon_full_params(offload_to_cpu=True) is not served: whole values are where the model computes",
                fix="copy what you need inside the block: {name: p.cpu() for name, p in model.named_parameters()}",
            )
        return gathered(inner, write=writeback, grads=with_grads)

    @staticmethod
    def set_state_dict_type(
        module: nn.Module,
        state_dict_type: Any,
        state_dict_config: Any = None,
        optim_state_dict_config: Any = None,
    ) -> StateDictSettings:
        """Say what ``state_dict()`` gives: whole tensors, on all ranks or on rank 0 only, where they are or on the CPU.

        Returns:
            The settings before.

        Raises:
            LeftOut: another type than ``FULL_STATE_DICT``.
        """
        inner = of_sharded(module)
        before = FullyShardedDataParallel.get_state_dict_type(inner)
        name = str(getattr(state_dict_type, "name", state_dict_type))
        if name != "FULL_STATE_DICT":
            raise LeftOut(
                f"state_dict_type {name}: state dicts hold whole tensors",
                fix="shardwise.checkpoint.save(path, models=[...], optimizers=[...]), where each rank writes what it "
                "holds, or StateDictType.FULL_STATE_DICT",
            )
        settings = _settings(state_dict_type, state_dict_config, optim_state_dict_config)
        if _SETTINGS not in vars(inner):
            inner.register_state_dict_post_hook(_as_configured)
        object.__setattr__(inner, _SETTINGS, settings)
        return before

    @staticmethod
    def get_state_dict_type(module: nn.Module) -> StateDictSettings:
        """What was set, or whole tensors on every rank."""
        from torch.distributed.fsdp import StateDictType

        found: StateDictSettings | None = vars(unwrap(module)).get(_SETTINGS)
        return found if found is not None else _settings(StateDictType.FULL_STATE_DICT, None, None)

    @staticmethod
    @contextmanager
    def state_dict_type(
        module: nn.Module,
        state_dict_type: Any,
        state_dict_config: Any = None,
        optim_state_dict_config: Any = None,
    ) -> Iterator[None]:
        """:meth:`set_state_dict_type` for the length of a block."""
        set_type = FullyShardedDataParallel.set_state_dict_type
        before = set_type(module, state_dict_type, state_dict_config, optim_state_dict_config)
        try:
            yield
        finally:
            set_type(module, before.state_dict_type, before.state_dict_config, before.optim_state_dict_config)

    @staticmethod
    def optim_state_dict(*_: Any, **__: Any) -> NoReturn:
        """Refused, as all of torch's functions about state dicts of optimizers."""
        raise LeftOut(
            "optim_state_dict and its relatives: an optimizer's state dict holds what this rank has",
            fix="shardwise.checkpoint.save(path, models=[model], optimizers=[optimizer]) and load(...), on any number "
            "of ranks and under any strategy",
        )

    optim_state_dict_to_load = full_optim_state_dict = sharded_optim_state_dict = optim_state_dict
    shard_full_optim_state_dict = flatten_sharded_optim_state_dict = optim_state_dict
    scatter_full_optim_state_dict = rekey_optim_state_dict = optim_state_dict


def _strategy_of(
    *, sharding_strategy: Any = None, cpu_offload: Any = None, mixed_precision: Any = None, where: str
) -> Strategy:
    preset = "zero3" if sharding_strategy is None else preset_of("sharding_strategy", sharding_strategy, 1, where=where)
    param, reduce = precision_of("mixed_precision", mixed_precision, where=where)
    if entry_of(mixed_precision, "buffer_dtype") not in (None, torch.float32):
        warnings.warn(f"{where}: buffer_dtype has no effect here: buffers keep their dtype", stacklevel=3)
    home = "cpu" if offloads("cpu_offload", cpu_offload, where=where) else "device"
    return Strategy(
        preset,
        offload_params=home,
        offload_grads=home,
        offload_optimizer=home,
        param_dtype=param,
        reduce_dtype=reduce,
    )


def _settings(kind: Any, state_dict_config: Any, optim_state_dict_config: Any) -> StateDictSettings:
    from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, StateDictSettings

    return StateDictSettings(
        kind,
        FullStateDictConfig() if state_dict_config is None else state_dict_config,
        FullOptimStateDictConfig() if optim_state_dict_config is None else optim_state_dict_config,
    )


def _as_configured(module: nn.Module, state: dict[str, Any], prefix: str, meta: Any) -> None:
    """A hook behind ``state_dict()``. All ranks have taken part; what is not wanted goes."""
    settings: Any = vars(module).get(_SETTINGS)
    if settings is None:
        return
    mine = [key for key in state if key.startswith(prefix)]
    away = getattr(settings.state_dict_config, "rank0_only", False) and World.current().rank != 0
    for key in mine:
        if away:
            del state[key]
        elif getattr(settings.state_dict_config, "offload_to_cpu", False) and isinstance(state[key], torch.Tensor):
            state[key] = state[key].cpu()


def _matches(module: nn.Module, rule: UnitRule) -> bool:
    """Does a wrapping policy choose anything? Torch takes one that does not."""
    inner = [(name, m) for name, m in module.named_modules() if m is not module]
    if isinstance(rule, tuple):
        return any(isinstance(m, rule) for _, m in inner)
    return callable(rule) and any(rule(name, m) for name, m in inner)


def _move(module: nn.Module, device_id: int | torch.device | None) -> None:
    """Where torch would take a module that is on the CPU."""
    if device_id is None:
        return
    move(module, devices.named(device_id))


def _without_wrappers(name: str) -> str:
    return name.replace(f"{FullyShardedDataParallel.held_as}.", "")
