"""``FullyShardedDataParallelPlugin``: an FSDP run, described; the sharding engine trains it."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardwise.engine.select import UnitRule, has_forward, numel
from shardwise.errors import ConfigError, StrategyError
from shardwise.strategy import Strategy

_PRESETS = {"FULL_SHARD": "zero3", "SHARD_GRAD_OP": "zero2", "NO_SHARD": "ddp", "HYBRID_SHARD": "hsdp"}
_KINDS = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")  # Accelerate numbers them
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_WRAPS = ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP")


@dataclass
class FullyShardedDataParallelPlugin:
    """FSDP's settings, as Accelerate takes them, for FSDP 1 and FSDP 2.

    Args:
        fsdp_version: 1 or 2; decides nothing here but what ``reshard_after_forward`` may be.
        sharding_strategy: ``FULL_SHARD`` (``zero3``), ``SHARD_GRAD_OP`` (``zero2``), ``NO_SHARD`` (``ddp``) or
            ``HYBRID_SHARD`` (``hsdp``): the name, Accelerate's number of it, or torch's own enumeration.
        reshard_after_forward: ``True`` (``zero3``), ``False`` (``zero2``), or as ``sharding_strategy``.
        mixed_precision_policy: ``bf16``, ``fp16`` or ``fp32``, or an object or dict with ``param_dtype`` and
            ``reduce_dtype``. Without a ``reduce_dtype`` gradients are reduced in the dtype of the master values.
        auto_wrap_policy, transformer_cls_names_to_wrap, min_num_params: which modules are units: see ``units``.
        cpu_offload: parameters, gradients and optimizer state live on the CPU.
        ignored_modules: refused.
        activation_checkpointing: units are computed again in backward.
        activation_checkpointing_offload: what is kept for that, and what else a forward saves, is on the CPU meanwhile.
            Belongs to ``activation_checkpointing``.
        use_orig_params, sync_module_states, backward_prefetch, forward_prefetch, limit_all_gathers,
            state_dict_type, state_dict_config, optim_state_dict_config: accepted. Parameters are the module's
            own, rank 0's values go to everyone, gathers run ahead of their use, and state dicts hold whole tensors.
        param_init_fn: fills modules that were built on the meta device. See :func:`shardwise.fully_shard`.
        cpu_ram_efficient_loading: no effect, with a warning: build the model on the meta device on every rank.

    Raises:
        ConfigError, StrategyError: a value that is unknown or not served.
    """

    fsdp_version: int | None = None
    sharding_strategy: Any = None
    reshard_after_forward: Any = None
    backward_prefetch: Any = None
    mixed_precision_policy: Any = None
    auto_wrap_policy: Any = None
    cpu_offload: Any = None
    ignored_modules: Any = None
    state_dict_type: Any = None
    state_dict_config: Any = None
    optim_state_dict_config: Any = None
    limit_all_gathers: bool = True
    use_orig_params: bool | None = None
    param_init_fn: Callable[[nn.Module], None] | None = None
    sync_module_states: bool | None = None
    forward_prefetch: bool | None = None
    activation_checkpointing: bool | None = None
    activation_checkpointing_offload: bool | None = None
    cpu_ram_efficient_loading: bool | None = None
    transformer_cls_names_to_wrap: list[str] | str | None = None
    min_num_params: int | None = None

    def __post_init__(self) -> None:
        self.fsdp_version = 1 if self.fsdp_version is None else int(self.fsdp_version)
        if self.fsdp_version not in (1, 2):
            raise ConfigError(f"fsdp_version={self.fsdp_version} does not exist", where=_WHERE, fix="1 or 2")
        if isinstance(self.transformer_cls_names_to_wrap, str):
            names = self.transformer_cls_names_to_wrap.split(",")
            self.transformer_cls_names_to_wrap = [name.strip() for name in names if name.strip()]
        if self.min_num_params is not None and (isinstance(self.min_num_params, bool) or self.min_num_params < 0):
            raise ConfigError(f"min_num_params={self.min_num_params} is not a number of elements", where=_WHERE)
        if self.ignored_modules:
            raise StrategyError(
                "ignored_modules is not supported: every parameter of a prepared model is trained over all ranks",
                where=_WHERE,
                fix="leave it out; frozen parameters cost no gradient, no optimizer state and no reduce",
            )
        self.activation_checkpointing = bool(self.activation_checkpointing)
        if self.activation_checkpointing_offload and not self.activation_checkpointing:
            raise ConfigError(
                "activation_checkpointing_offload without activation_checkpointing has nothing to offload",
                where=_WHERE,
                fix="set activation_checkpointing too, or use strategy='zero3,activation_offload=cpu'",
            )
        self.to_strategy()
        _ = self.units
        idle = self._idle()
        if idle:
            warnings.warn(f"{_WHERE}: these have no effect here: {'; '.join(idle)}", stacklevel=3)

    def _idle(self) -> list[str]:
        idle = []
        if self.cpu_ram_efficient_loading:
            idle.append("cpu_ram_efficient_loading (build the model on the meta device, on every rank)")
        policy = self.mixed_precision_policy
        if policy is not None and not isinstance(policy, (str, torch.dtype)):
            if _entry(policy, "buffer_dtype") not in (None, torch.float32):
                idle.append("buffer_dtype (buffers keep their dtype)")
            if _entry(policy, "output_dtype") not in (None, torch.float32):
                idle.append("output_dtype (outputs of prepared models come back in fp32)")
            root = _has(policy, "cast_root_forward_inputs")  # FSDP 1, where only the root casts by default
            if _entry(policy, "cast_root_forward_inputs" if root else "cast_forward_inputs") is False:
                idle.append("cast_forward_inputs=False (inputs are cast)")
        return idle

    def to_strategy(self) -> Strategy:
        """The strategy that these settings describe."""
        told = {
            name: _preset(name, getattr(self, name), self.fsdp_version)
            for name in ("sharding_strategy", "reshard_after_forward")
            if getattr(self, name) is not None
        }
        if len(set(told.values())) > 1:
            raise ConfigError(
                "sharding_strategy and reshard_after_forward contradict each other", where=_WHERE, fix="say it once"
            )
        param, reduce = _precision(self.mixed_precision_policy)
        home = "cpu" if _offloads(self.cpu_offload) else "device"
        return Strategy(
            next(iter(told.values()), "zero3"),
            offload_params=home,
            offload_grads=home,
            offload_optimizer=home,
            param_dtype=param,
            reduce_dtype=reduce,
            activation_checkpointing=bool(self.activation_checkpointing),
            activation_offload="cpu" if self.activation_checkpointing_offload else "device",
        )

    @property
    def units(self) -> UnitRule:
        """The rule for ``fully_shard``: which modules are gathered together.

        ``TRANSFORMER_BASED_WRAP`` with class names: modules of these classes. ``SIZE_BASED_WRAP`` with a size: the
        same modules that torch would wrap. A policy of torch's, or a callable with its arguments: what it says.
        Everything else, ``NO_WRAP`` too: ``None``, which finds repeated blocks and what else is large.
        """
        policy = self.auto_wrap_policy
        if isinstance(policy, str):
            if policy.upper() not in _WRAPS:
                raise ConfigError(f"auto_wrap_policy='{policy}' is not known", where=_WHERE, fix=f"{', '.join(_WRAPS)}")
            policy = policy.upper()
        elif policy is not None and not callable(policy):
            raise ConfigError(f"auto_wrap_policy is a name or a callable, not {type(policy).__name__}", where=_WHERE)
        name = policy if isinstance(policy, str) else _name_of(policy)
        given = policy.keywords if isinstance(policy, functools.partial) else {}
        if name in ("TRANSFORMER_BASED_WRAP", "transformer_auto_wrap_policy"):
            if given.get("transformer_layer_cls"):
                return tuple(given["transformer_layer_cls"])
            return ClassNames(self.transformer_cls_names_to_wrap) if self.transformer_cls_names_to_wrap else None
        if name in ("SIZE_BASED_WRAP", "size_based_auto_wrap_policy"):
            least = given.get("min_num_params", self.min_num_params)
            return AtLeast(int(least)) if least else None
        if policy is None or name == "NO_WRAP":
            return None
        if hasattr(policy, "_module_classes"):  # torch's ModuleWrapPolicy
            return tuple(policy._module_classes)
        if name == "lambda_auto_wrap_policy":
            return Policy(given["lambda_fn"])
        return Policy(policy)

    # --- what scripts ask Accelerate's plugin -------------------------------------------------
    def set_state_dict_type(self, state_dict_type: Any = None) -> None:
        """Accepted: state dicts hold whole tensors, checkpoints are written by all ranks, whatever this says."""
        if state_dict_type is not None:
            self.state_dict_type = state_dict_type

    def set_mixed_precision(self, mixed_precision: Any, buffer_autocast: bool = False, override: bool = False) -> None:
        """Set the precision to compute in, unless there is a policy already and ``override`` is not set."""
        if override or self.mixed_precision_policy is None:
            _precision(mixed_precision)
            self.mixed_precision_policy = mixed_precision


_WHERE = "FullyShardedDataParallelPlugin"


class ClassNames:
    """A rule for units: modules whose class has one of these names."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def __call__(self, name: str, module: nn.Module) -> bool:
        return type(module).__name__ in self.names

    def __repr__(self) -> str:
        return f"classes named {', '.join(self.names)}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClassNames) and other.names == self.names

    def __hash__(self) -> int:
        return hash(self.names)


class AtLeast:
    """A rule for units: the smallest modules that have at least ``elements`` beside the units inside them."""

    def __init__(self, elements: int) -> None:
        self.elements = elements

    def __call__(self, name: str, module: nn.Module) -> bool:
        return self._is_unit(module)[0]

    def _is_unit(self, module: nn.Module) -> tuple[bool, int]:
        """Is it one, and how many elements does it leave to the module around it?"""
        left = sum(p.numel() for p in module.parameters(recurse=False))
        if isinstance(module, nn.MultiheadAttention):  # uses its parts' weights itself
            left = numel(module)
        else:
            left += sum(self._is_unit(child)[1] for child in module.children())
        unit = left >= self.elements and has_forward(module)
        return unit, 0 if unit else left

    def __repr__(self) -> str:
        return f"modules of at least {self.elements} elements"


class Policy:
    """A rule for units out of a callable: torch's wrapping policies, ``(name, module)`` or ``(module)``."""

    def __init__(self, policy: Callable[..., Any]) -> None:
        self.policy = policy
        parameters = inspect.signature(policy).parameters
        self.torch = "recurse" in parameters
        self.size = next((k for k in ("nonwrapped_numel", "unwrapped_params") if k in parameters), None)
        self.alone = len([p for p in parameters.values() if p.default is p.empty]) == 1

    def __call__(self, name: str, module: nn.Module) -> bool:
        if self.torch:
            size = {self.size: numel(module)} if self.size else {}
            return has_forward(module) and bool(self.policy(module, recurse=False, **size))
        return bool(self.policy(module) if self.alone else self.policy(name, module))

    def __repr__(self) -> str:
        return f"policy {_name_of(self.policy) or self.policy!r}"


def _name_of(policy: Any) -> str:
    return str(getattr(getattr(policy, "func", policy), "__name__", ""))


def _preset(field: str, value: Any, version: int | None) -> str:
    if isinstance(value, str) and version == 2 and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    if isinstance(value, bool):
        if field == "sharding_strategy":
            raise ConfigError(f"sharding_strategy={value} is not a name", where=_WHERE, fix=f"{', '.join(_KINDS)}")
        return "zero3" if value else "zero2"
    text = str(getattr(value, "name", value)).upper().lstrip("_")
    if text.isdigit() and 1 <= int(text) <= len(_KINDS):
        text = _KINDS[int(text) - 1]
    if text == "HYBRID_SHARD_ZERO2":
        raise StrategyError(
            "HYBRID_SHARD_ZERO2 (parameters whole after forward, split in groups) has no row in the strategy table",
            where=_WHERE,
            fix="use HYBRID_SHARD ('hsdp'), which needs less memory, or SHARD_GRAD_OP ('zero2')",
        )
    if text not in _PRESETS:
        raise ConfigError(f"{field}={value!r} is not known", where=_WHERE, fix=f"one of {', '.join(_KINDS[:4])}")
    return _PRESETS[text]


def _precision(policy: Any) -> tuple[str | None, str | None]:
    """(dtype to compute in, dtype to reduce in)."""
    if policy is None:
        return None, None
    if isinstance(policy, (str, torch.dtype)):
        name = policy if isinstance(policy, str) else _dtype("mixed_precision_policy", policy)
        if name == "no":
            return None, None
        if name not in _DTYPES.values():
            raise ConfigError(
                f"mixed_precision_policy={policy!r} is not served", where=_WHERE, fix="'bf16', 'fp16' or 'fp32'"
            )
        return name, name
    if not any(_has(policy, key) for key in ("param_dtype", "reduce_dtype")):
        raise ConfigError(
            f"mixed_precision_policy of type {type(policy).__name__} names no param_dtype and no reduce_dtype",
            where=_WHERE,
            fix="give a name, a dict, or torch's MixedPrecision or MixedPrecisionPolicy",
        )
    param, reduce = (_dtype(key, _entry(policy, key)) for key in ("param_dtype", "reduce_dtype"))
    return param, reduce


def _has(policy: Any, key: str) -> bool:
    return key in policy if isinstance(policy, dict) else hasattr(policy, key)


def _entry(policy: Any, key: str) -> Any:
    return policy.get(key) if isinstance(policy, dict) else getattr(policy, key, None)


def _dtype(key: str, value: Any) -> str | None:
    if value is None:
        return None
    name = _DTYPES.get(value) if isinstance(value, torch.dtype) else value
    if name not in _DTYPES.values():
        raise ConfigError(f"{key}={value!r} is not served", where=_WHERE, fix="bfloat16, float16 or float32")
    return str(name)


def _offloads(value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    if hasattr(value, "offload_params"):  # torch's CPUOffload of FSDP 1
        return bool(value.offload_params)
    kinds = {kind.__name__ for kind in type(value).__mro__}
    if "OffloadPolicy" in kinds:  # torch's of FSDP 2
        return "CPUOffloadPolicy" in kinds
    raise ConfigError(f"cpu_offload={value!r} is not known", where=_WHERE, fix="True, False or torch's own objects")
