"""``state_dict()`` and ``load_state_dict()`` of a sharded module: whole tensors under the original names.

Values come from the master values, so a bf16 run saves fp32. Reading a split model is a collective that
every rank must join; each rank ends with the whole model, so it is for models that fit one host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardwise.engine.attachment import unit_of
from shardwise.engine.bucket import Bucket
from shardwise.engine.unit import Unit
from shardwise.errors import UnitError
from shardwise.tiers.home import All


def install(unit: Unit) -> None:
    """Hook the unit's module so that its part of a state dict has true values."""
    module = unit.module

    def key_of(prefix: str, name: str) -> str:
        return prefix + name[len(unit.name) + 1 if unit.name else 0 :]  # the unit is renamed when a parent adopts it

    def before_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
        unit.engine.forget_failed_backward()
        unit.settle()
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
        unit.engine.forget_failed_backward()
        if all(_fits(state, key_of(prefix, name), p) for _, _, p in unit.slots for name in unit.names[id(p)][:1]):
            unit.drain()
            unit.failure = None  # all of it is replaced
        unit.settle()
        for bucket, index, p in unit.slots:
            shape = bucket.layout.slots[index].shape
            for name in unit.names[id(p)]:
                value = state.get(key_of(prefix, name))
                if isinstance(value, torch.Tensor) and tuple(value.shape) == shape:
                    if bucket.values is not None:
                        bucket.values.materialise()
                    flat = value.detach().reshape(-1)
                    for piece, (lo, hi) in zip(bucket.piece_params[index], bucket.ranges(index), strict=True):
                        piece.copy_(flat[lo:hi].view(piece.shape))
        _let_follow(unit)
        # The copies that Module.load_state_dict makes itself need somewhere to go, in the compute dtype.
        unit.gather()

    def after_load(module: nn.Module, _keys: Any) -> None:
        unit.release()

    module.register_state_dict_pre_hook(before_save)
    module.register_state_dict_post_hook(after_save)
    module.register_load_state_dict_pre_hook(before_load)
    module.register_load_state_dict_post_hook(after_load)


def _fits(state: Any, key: str, param: nn.Parameter) -> bool:
    value = state.get(key)
    return isinstance(value, torch.Tensor) and value.shape == param.shape


@dataclass(frozen=True)
class Held:
    """What this rank holds of one parameter: slices of its master values, none to all of it.

    ``pieces`` are ``(start, stop, slice)``: elements ``start:stop`` of the flattened parameter. The slices are
    contiguous, alias the master values, and are the keys of the optimizer's state. Afterwards call
    :func:`publish` if they were written to.
    """

    unit: Unit
    bucket: Bucket
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    whole: bool  # pieces are cut between parameters only (layout=tensor, or one rank)
    pieces: list[tuple[int, int, torch.Tensor]]


def held(param: nn.Parameter) -> Held | None:
    """What this rank holds of a parameter; ``None`` if it is not sharded."""
    unit = unit_of(param)
    if unit is None:
        return None
    unit.engine.forget_failed_backward()
    unit.catch_up()
    bucket, index = unit.places[id(param)]
    pieces = [(lo, hi, t) for (lo, hi), t in zip(bucket.ranges(index), bucket.piece_params[index], strict=True)]
    shape = bucket.layout.slots[index].shape
    return Held(unit, bucket, shape, bucket.master_dtype, bucket.master.device, bucket.whole_tensors, pieces)


def units_of(module: nn.Module) -> list[Unit]:
    """The units of a module's parameters, in an order that all ranks share."""
    return list({id(u): u for p in module.parameters() if (u := unit_of(p)) is not None}.values())


@torch.no_grad()
def publish(module: nn.Module) -> None:
    """After master values were written to: let the parameters' values follow. Collective."""
    for unit in units_of(module):
        _let_follow(unit)
        unit.publish(unit.buckets)


def _let_follow(unit: Unit) -> None:
    """Master values that have another home were written to: take the values over, and let them go home."""
    for bucket in unit.buckets:
        if bucket.values is not None and bucket.values.here:
            All(bucket.follow_master()).wait()
            bucket.values.settle()
