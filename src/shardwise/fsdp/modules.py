"""``fully_shard``, and what scripts do with a module afterwards, in torch's words.

A sharded module keeps its class. The methods of :class:`FSDPModule` are put on the instance, where the model has no
attributes of these names; ``FSDPModule.unshard(model)`` works always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwise.engine import build, manual
from shardwise.engine.engine import Engine
from shardwise.engine.hooks import engine_of
from shardwise.engine.select import UnitRule
from shardwise.environment import strategy_from_environment
from shardwise.errors import LeftOut, StrategyError, UnitError
from shardwise.fsdp.arguments import entry_of, parameters_of, refuse_placement, strategy_of
from shardwise.observe import out_of_memory as _  # noqa: F401  (errors say what was held)
from shardwise.observe import recording
from shardwise.strategy import Strategy
from shardwise.trees import map_tensors

M = TypeVar("M", bound=nn.Module | list[Any])
_MARK = "_shardwise_fsdp_module"
_WHERE = "fully_shard"


def fully_shard(
    module: M,
    *,
    strategy: str | Strategy | None = None,
    mesh: DeviceMesh | None = None,
    units: UnitRule = None,
    param_init_fn: Callable[[nn.Module], Any] | None = None,
    reshard_after_forward: bool | int | None = None,
    shard_placement_fn: Callable[[nn.Parameter], Any] | None = None,
    mp_policy: Any = None,
    offload_policy: Any = None,
    ignored_params: Iterable[nn.Parameter] | None = None,
    dp_mesh_dims: Any = None,
    example: Any = None,
) -> M:
    """Shard a module in place, so that it trains under ``strategy`` on all ranks.

    The module, its parameter objects, their names and shapes stay; their values move into flat buffers
    (rank 0's values, for everyone). Train as before: forward, ``loss.backward()``, any optimizer built before
    or after. Gradients are the mean over ranks.

    Args:
        module: on its device, or built under ``torch.device("meta")``: what is there gets memory and values unit by
            unit, on the device of the other parameters, or on this rank's. The whole model is then never in memory,
            unless a module sets again what many modules inside it hold. A list: each of them is sharded.
        strategy: a preset, its string form or a :class:`Strategy`; ``zero3`` by default,
            ``auto`` asks the planner. What ``shardwise launch --strategy`` says wins over it.
        mesh: a 1-D mesh of all ranks, or a 2-D (replicate, shard) one for ``hsdp``. By default all ranks.
        units: which subtrees are gathered together: a module class or several, a class name, a predicate
            ``(name, module) -> bool``, or ``None`` for repeated blocks and what else is large. Submodules on
            which ``fully_shard`` was called before are units with their own strategy.
        param_init_fn: called with each module that has meta tensors of its own, to fill them. By default that is the
            module's ``reset_parameters()``, or ``_init_weights(module)`` of the transformers model around it.
        reshard_after_forward: torch's: ``True`` is ``zero3``, ``False`` is ``zero2``, ``None`` is as the strategy says.
        mp_policy: torch's ``MixedPrecisionPolicy``: ``param_dtype``, ``reduce_dtype`` (``None``: that of the master
            values) and ``output_dtype``.
        offload_policy: torch's ``CPUOffloadPolicy``: all states live on the host.
        ignored_params: parameters that stay as they are on each rank: neither sharded, nor sent, nor reduced.
        shard_placement_fn, dp_mesh_dims: refused if they ask for something.
        example: with ``auto``, inputs of one forward: keyword arguments, positional ones, or one tensor. Only their
            shapes are looked at. Without them activations are not counted.

    Returns:
        The same module, or modules. It has the methods of :class:`FSDPModule`.

    Raises:
        UnitError: the module is sharded already, has DTensor parameters, parameters that share memory, or meta tensors
            that nothing gives values, or ``units`` matches nothing.
        StrategyError: see :class:`Strategy`.
        PlanError: with ``auto``, nothing fits.

    Cost: sends the parameters once, from rank 0. ``shardwise.expected(module)`` says what is live and sent later.
    """
    if dp_mesh_dims is not None:
        raise StrategyError(
            "dp_mesh_dims is not served", fix="give mesh= the 1-D or 2-D (replicate, shard) mesh itself"
        )
    modules = _outermost(module)
    chosen = strategy_of(
        strategy,
        reshard_after_forward=reshard_after_forward,
        mp_policy=mp_policy,
        offload_policy=offload_policy,
        mesh=mesh,
        where=_WHERE,
    )
    output_dtype = entry_of(mp_policy, "output_dtype")
    ignored = parameters_of("ignored_params", ignored_params, _WHERE)
    for one in modules:
        refuse_placement(shard_placement_fn, one.parameters(), _WHERE)
    for one in modules:
        wanted = strategy_from_environment(chosen)
        if wanted.is_auto:
            from shardwise.plan import auto  # which takes a while to import

            wanted = auto.choose(one, wanted, build.device_of(one), example)
        shard(one, wanted, mesh, units, param_init_fn, ignored)
        if output_dtype is not None:
            one.register_forward_hook(_OutputIn(output_dtype))
    return module


def shard(
    module: nn.Module,
    strategy: Strategy,
    mesh: DeviceMesh | None,
    units: UnitRule,
    param_init_fn: Callable[[nn.Module], Any] | None,
    ignored: Sequence[nn.Parameter],
) -> None:
    """Shard a module with exactly this strategy, and give it the methods of :class:`FSDPModule`."""
    build.shard(module, strategy, mesh, units, param_init_fn, ignored)
    recording.from_environment(module)
    for name in _METHODS:
        if not hasattr(module, name):
            object.__setattr__(module, name, MethodType(getattr(FSDPModule, name), module))
    object.__setattr__(module, _MARK, True)


def _outermost(given: Any) -> list[nn.Module]:
    """The modules to shard, without those that are inside another one of them."""
    modules: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    for one in modules:
        if not isinstance(one, nn.Module):
            raise UnitError(f"fully_shard got a {type(one).__name__}", fix="give a module, or a list of modules")
    if not modules:
        raise UnitError("fully_shard got an empty list", fix="give a module, or a list of modules")
    unique = list(dict.fromkeys(modules))
    return [m for m in unique if not any(m in other.modules() for other in unique if other is not m)]


class _OutputIn:
    """A forward hook: floating-point outputs come in this dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return map_tensors(output, lambda t: t.to(self.dtype) if t.is_floating_point() else t)


class UnshardHandle:
    """What ``unshard(async_op=True)`` returns."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def wait(self) -> None:
        """Have the values here."""
        manual.unshard(own_units(self._module))


class _Sharded(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, nn.Module) and _MARK in vars(instance)


class FSDPModule(metaclass=_Sharded):
    """A module on which ``fully_shard`` was called: ``isinstance(model, FSDPModule)``.

    Its methods have the names and the meaning of torch's. They are about the module's own parameters, without those of
    modules inside it that were sharded by calls of their own, unless they take ``recurse``.
    """

    # --- values --------------------------------------------------------------------------------
    def unshard(self: Any, async_op: bool = False) -> UnshardHandle | None:
        """Bring the whole values here, until ``reshard()`` or until the next forward is over. A collective.

        Args:
            async_op: return at once; the values can be used after ``wait()`` of what is returned, or in a forward.
        """
        if async_op:
            manual.start_unshard(own_units(self))
            return UnshardHandle(self)
        manual.unshard(own_units(self))
        return None

    def reshard(self: Any) -> None:
        """Let the whole values go, where the strategy splits them."""
        manual.reshard(own_units(self))

    def set_reshard_after_forward(self: Any, reshard_after_forward: bool, recurse: bool = True) -> None:
        """``False``: values stay from the forward to the end of the backward. Costs their memory, saves a gather.

        Raises:
            StrategyError: ``True`` where the strategy keeps values whole.
        """
        units = _units(self, recurse)
        if _flag(reshard_after_forward) and any(not u.strategy.split_params for u in units):
            preset = next(u.strategy.preset for u in units if not u.strategy.split_params)
            raise StrategyError(
                f"'{preset}' keeps values whole after forward", fix="shard with reshard_after_forward=True ('zero3')"
            )
        manual.keep(units, for_backward=not reshard_after_forward)

    def set_reshard_after_backward(self: Any, reshard_after_backward: bool, *, recurse: bool = True) -> None:
        """``False``: values stay from forward to forward, and follow each step, until ``reshard()``."""
        manual.keep(_units(self, recurse), after_backward=not _flag(reshard_after_backward))

    # --- gradients -----------------------------------------------------------------------------
    def set_requires_gradient_sync(self: Any, requires_gradient_sync: bool, *, recurse: bool = True) -> None:
        """``False``: backwards keep their gradients on this rank, as inside :func:`shardwise.no_sync`.

        Raises:
            UnitError: of a part of a model: all of it is reduced in one order.
        """
        on = _flag(requires_gradient_sync)
        engine = _engine(self)
        if engine.module is not self or (not recurse and len(own_units(self)) < len(engine.units)):
            raise UnitError(
                "set_requires_gradient_sync of a part of a sharded model is not served",
                fix=f"call it on the whole model ({type(engine.module).__name__}), with recurse=True",
            )
        engine.sync = on

    def set_requires_all_reduce(self: Any, requires_all_reduce: bool, *, recurse: bool = True) -> None:
        """Only of ``hsdp``, where reducing is one operation over both axes: ``False`` is refused.

        Raises:
            StrategyError: ``False`` where there are two axes.
        """
        two = [u for u in _units(self, recurse) if u.mesh.shard.size > 1 and u.mesh.replicate.size > 1]
        if not _flag(requires_all_reduce) and two:
            raise StrategyError(
                "set_requires_all_reduce(False) is not served: gradients are reduced over both axes at once",
                fix="set_requires_gradient_sync(False): the same sums, with whole gradients on the rank meanwhile",
            )

    def set_gradient_divide_factor(self: Any, factor: float) -> None:
        """Gradients are the mean over the ranks: other divisors are refused.

        Raises:
            StrategyError: ``factor`` is not the number of ranks.
        """
        size = _engine(self).world.size
        if factor != size:
            raise StrategyError(
                f"a gradient divide factor of {factor} is not served: gradients are divided by the {size} ranks",
                fix=f"multiply the loss by {size} / {factor}",
            )

    set_reduce_scatter_divide_factor = set_gradient_divide_factor

    # --- hints: no number depends on them, and the schedule finds its own way --------------------------
    def set_is_last_backward(self: Any, is_last_backward: bool) -> None:
        """Accepted: each backward that reduces is complete when it ends."""
        _flag(is_last_backward)

    def set_modules_to_forward_prefetch(self: Any, modules: list[nn.Module]) -> None:
        """Accepted: gathers run ahead in the order that the last pass had."""
        _sharded_modules(modules)

    def set_modules_to_backward_prefetch(self: Any, modules: list[nn.Module]) -> None:
        """Accepted: gathers run ahead in the order that the last pass had."""
        _sharded_modules(modules)

    def set_unshard_in_backward(self: Any, unshard_in_backward: bool) -> None:
        """Accepted: values are gathered for backward all the same."""
        _flag(unshard_in_backward)

    def reset_iter_state(self: Any) -> None:
        """Accepted: a pass that failed is forgotten when the next one begins."""

    def set_post_optim_event(self: Any, event: Any) -> None:
        """Accepted: gathers wait for the step."""

    def set_force_sum_reduction_for_comms(self: Any, enable: bool) -> None:
        """Accepted: reduces are sums, and means are taken before them."""

    def set_reduce_scatter_unused_params(
        self: Any, reduce_scatter_unused_params: bool, *, recurse: bool = True
    ) -> None:
        """Accepted: a gradient that is missing on some ranks counts as zero in the mean."""

    def set_reduce_scatter_max_input_buffers(self: Any, max_input_buffers: int, *, recurse: bool = True) -> None:
        """Accepted: one unit is reduced while the next one computes."""

    def set_separate_reduce_scatter_group(self: Any, enable: bool = True, *, recurse: bool = True) -> None:
        """Accepted, without effect."""

    def set_allocate_memory_from_process_group_for_comm(self: Any, enable: bool) -> None:
        """Accepted, without effect."""

    def set_symm_mem_for_comm(self: Any, backend: str = "NCCL") -> None:
        """Accepted, without effect."""

    # --- left out ----------------------------------------------------------------------------------
    def set_custom_all_gather(self: Any, comm: Any) -> None:
        """Refused."""
        raise LeftOut("set_custom_all_gather: gathers are Shardwise's own", fix="leave it out")

    def set_custom_reduce_scatter(self: Any, comm: Any) -> None:
        """Refused."""
        raise LeftOut("set_custom_reduce_scatter: reduces are Shardwise's own", fix="leave it out")

    def set_all_reduce_hook(self: Any, hook: Any, *, stream: Any = None) -> None:
        """Refused."""
        raise LeftOut(
            "set_all_reduce_hook: a reduce has no part that could be replaced",
            fix="strategy='hsdp,reduce_dtype=bf16' sends half; change gradients in p.grad after backward",
        )


_METHODS = [name for name, value in vars(FSDPModule).items() if callable(value) and not name.startswith("_")]


def register_fsdp_forward_method(module: nn.Module, method_name: str) -> None:
    """Let a method run as a forward of its module: the module's values are gathered for it.

    For methods that compute beside ``forward``, as ``generate`` or ``encode``. Does nothing to modules that are not
    sharded and no units.

    Raises:
        UnitError: the module has no such method.
    """
    method = getattr(module, method_name, None)
    if not callable(method):
        raise UnitError(f"{type(module).__name__} has no method '{method_name}'", fix="name one that it has")
    bound = isinstance(method, MethodType) and method.__self__ is module
    function: Any = method.__func__ if bound else method

    @wraps(function)
    def as_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return manual.run_as_forward(self, MethodType(function, self) if bound else function, args, kwargs)

    # Bound, so that a copy of the module has one of its own.
    object.__setattr__(module, method_name, MethodType(as_forward, module))


def own_units(module: nn.Module) -> list[Any]:
    """The module's units, without those of modules inside it that were sharded by calls of their own."""
    return manual.units_in(module, stop=lambda inner: _MARK in vars(inner))


def _units(module: nn.Module, recurse: bool) -> list[Any]:
    return manual.units_in(module) if recurse else own_units(module)


def _engine(module: nn.Module) -> Engine:
    engine = engine_of(module) or manual.engine_around(module)
    if engine is None:
        raise UnitError(f"{type(module).__name__} is not sharded", fix="call shardwise.fully_shard on it first")
    return engine


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise StrategyError(f"{value!r} is neither True nor False")
    return value


def _sharded_modules(modules: Any) -> None:
    for module in modules:
        if not isinstance(module, FSDPModule):
            raise UnitError(
                f"{type(module).__name__} cannot be brought ahead: it is not sharded",
                fix="give modules on which fully_shard was called",
            )
