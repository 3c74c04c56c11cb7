"""``FullyShardedDataParallelPlugin``: an FSDP run, described; the sharding engine trains it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardwise.engine.select import UnitRule
from shardwise.errors import ConfigError, StrategyError
from shardwise.fsdp.arguments import entry_of, has_entry, offloads, precision_of, preset_of
from shardwise.fsdp.policies import AtLeast, ClassNames, Policy, rule_of
from shardwise.strategy import Strategy

__all__ = ["AtLeast", "ClassNames", "FullyShardedDataParallelPlugin", "Policy"]


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
            if entry_of(policy, "buffer_dtype") not in (None, torch.float32):
                idle.append("buffer_dtype (buffers keep their dtype)")
            if entry_of(policy, "output_dtype") not in (None, torch.float32):
                idle.append("output_dtype (outputs of prepared models come back in fp32)")
            root = has_entry(policy, "cast_root_forward_inputs")  # FSDP 1, where only the root casts by default
            if entry_of(policy, "cast_root_forward_inputs" if root else "cast_forward_inputs") is False:
                idle.append("cast_forward_inputs=False (inputs are cast)")
        return idle

    def to_strategy(self) -> Strategy:
        """The strategy that these settings describe."""
        told = {
            name: preset_of(name, getattr(self, name), self.fsdp_version, where=_WHERE)
            for name in ("sharding_strategy", "reshard_after_forward")
            if getattr(self, name) is not None
        }
        if len(set(told.values())) > 1:
            raise ConfigError(
                "sharding_strategy and reshard_after_forward contradict each other", where=_WHERE, fix="say it once"
            )
        param, reduce = precision_of("mixed_precision_policy", self.mixed_precision_policy, where=_WHERE)
        home = "cpu" if offloads("cpu_offload", self.cpu_offload, where=_WHERE) else "device"
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
        return rule_of(
            self.auto_wrap_policy,
            class_names=self.transformer_cls_names_to_wrap or (),
            least=self.min_num_params,
            where=_WHERE,
        )

    # --- what scripts ask Accelerate's plugin -------------------------------------------------
    def set_state_dict_type(self, state_dict_type: Any = None) -> None:
        """Accepted: state dicts hold whole tensors, checkpoints are written by all ranks, whatever this says."""
        if state_dict_type is not None:
            self.state_dict_type = state_dict_type

    def set_mixed_precision(self, mixed_precision: Any, buffer_autocast: bool = False, override: bool = False) -> None:
        """Set the precision to compute in, unless there is a policy already and ``override`` is not set."""
        if override or self.mixed_precision_policy is None:
            precision_of("mixed_precision_policy", mixed_precision, where=_WHERE)
            self.mixed_precision_policy = mixed_precision


_WHERE = "FullyShardedDataParallelPlugin"
