"""``state_dict()`` and ``load_state_dict()`` of a sharded module: whole tensors under the original names.

Values come from the master values, so a bf16 run saves fp32. Reading a split model is a collective that
every rank must join; each rank ends with the whole model, so it is for models that fit one host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shardwise.engine.unit import Unit
from shardwise.errors import UnitError


def install(unit: Unit) -> None:
    """Hook the unit's module so that its part of a state dict has true values."""
    module = unit.module

    def key_of(prefix: str, name: str) -> str:
        return prefix + name[len(unit.name) + 1 if unit.name else 0 :]  # the unit is renamed when a parent adopts it

    def before_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if unit.gathering is not None:
            unit.gather()
        unit.reading_state = True

    @torch.no_grad()
    def after_save(module: nn.Module, state: dict[str, Any], prefix: str, _meta: Any) -> None:
        unit.reading_state = False
        for bucket in unit.buckets:
            if bucket.aliased:
                continue  # the parameters themselves are the master values
            full = bucket.full_values()
            for slot, p in zip(bucket.layout.slots, bucket.params, strict=True):
                value = full[slot.offset : slot.stop].view(slot.shape).clone()  # of its own, for whoever saves it
                for name in unit.names[id(p)]:
                    key = key_of(prefix, name)
                    if key in state:
                        state[key] = value

    @torch.no_grad()
    def before_load(module: nn.Module, state: Any, prefix: str, meta: Any, *_rest: Any) -> None:
        if meta.get("assign_to_params_buffers"):
            raise UnitError(
                "load_state_dict(assign=True) would replace parameters that live in a flat buffer",
                where=f"unit {unit.label}",
                fix="call it without assign, or load before sharding",
            )
        if unit.gathering is not None:
            unit.gather()
        for bucket, index, p in unit.slots:
            shape = bucket.layout.slots[index].shape
            for name in unit.names[id(p)]:
                value = state.get(key_of(prefix, name))
                if isinstance(value, torch.Tensor) and tuple(value.shape) == shape:
                    flat = value.detach().reshape(-1)
                    for piece, (lo, hi) in zip(bucket.piece_params[index], bucket.ranges(index), strict=True):
                        piece.copy_(flat[lo:hi].view(piece.shape))
        # The copies that Module.load_state_dict makes itself need somewhere to go, in the compute dtype.
        unit.gather()

    def after_load(module: nn.Module, _keys: Any) -> None:
        unit.release()

    module.register_state_dict_pre_hook(before_save)
    module.register_state_dict_post_hook(after_save)
    module.register_load_state_dict_pre_hook(before_load)
    module.register_load_state_dict_post_hook(after_load)
