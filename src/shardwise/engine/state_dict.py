"""``state_dict()`` and ``load_state_dict()`` of a sharded module: whole tensors under the names that torch gives them.

OffloadedValues come from the master values, so a bf16 run saves fp32. Reading a split model is a collective that
every rank must join; each rank ends with the whole model, so it is for models that fit one host.

Names are torch's business: wrappers and hooks rename keys as they like. A tensor of the state dict is known by its
storage, which is a flat buffer; a tensor to load by the module that asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardwise.device import HALF_PRECISION
from shardwise.engine.binding import binding_of, owned_by
from shardwise.engine.bucket import Bucket
from shardwise.engine.residency import Pin
from shardwise.engine.unit import Unit, unit_of
from shardwise.errors import UnitError
from shardwise.tiers.transfer import TransferGroup


def install(unit: Unit) -> None:
    """Hook the unit's module so that its part of a state dict has true values, and every module that holds its
    parameters so that what is loaded there reaches the master values."""
    unit.module.register_state_dict_pre_hook(_before_save)
    unit.module.register_state_dict_post_hook(_after_save)
    unit.module.register_load_state_dict_pre_hook(_begin_load)  # before those of what is in it
    for slot in unit.slots:
        for module, name in slot.holders:
            owned = owned_by(module)
            if not owned:
                module.register_load_state_dict_pre_hook(_before_load)
            owned[name] = slot
    unit.module.register_load_state_dict_post_hook(_after_load)


def _unit(module: nn.Module) -> Unit:
    bound = binding_of(module)
    assert bound is not None
    return bound.unit


def _before_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    unit = _unit(module)
    unit.upward.check()
    unit.reconcile()
    unit.finish_transfers()
    unit.take_handles(True)


def needs_other_ranks(root: nn.Module) -> bool:
    """Is ``root.state_dict()`` a collective?"""
    return any(_is_spread(bucket) for unit in units_of(root) for bucket in unit.buckets)


def _is_spread(bucket: Bucket) -> bool:
    return not bucket.placement.aliased and bucket.mesh.shard.size > 1


@torch.no_grad()
def lend_values(module: nn.Module) -> None:
    """Take part in ``module.state_dict()`` of another rank, which gets the values. A unit at a time is in memory."""
    for child in module._modules.values():
        if child is not None:
            lend_values(child)
    bound = binding_of(module)
    if bound is not None and bound.unit.module is module:
        _before_save(module, "", False)
        bound.unit.take_handles(False)
        for bucket in bound.unit.buckets:
            if _is_spread(bucket):
                bound.unit.full_values(bucket)


@torch.no_grad()
def _after_save(module: nn.Module, state: dict[str, Any], prefix: str, _meta: Any) -> None:
    unit = _unit(module)
    unit.take_handles(False)
    for bucket in unit.buckets:
        wide = unit.saved_in_fp32 and bucket.master_dtype in HALF_PRECISION
        if bucket.placement.aliased and not wide:
            continue  # the parameters themselves are the master values
        key = bucket.flat.key
        with torch._C.DisableTorchFunctionSubclass():
            found = {
                name: value
                for name, value in state.items()
                if isinstance(value, torch.Tensor)
                and value.layout is torch.strided
                and value.untyped_storage()._cdata == key
            }
        if bucket.placement.aliased:
            state.update({name: value.float() for name, value in found.items()})
            continue
        full = unit.full_values(bucket)
        if not bucket.placement.released and not bucket.read_only and unit.here:
            full = bucket.as_written(full)
        if wide:
            full = full.float()
        made: dict[object, torch.Tensor] = {}  # tied names have one tensor
        for name, value in found.items():
            with torch._C.DisableTorchFunctionSubclass():
                view = value.size(), value.stride(), int(value.storage_offset())
            if view not in made:
                # Of its own, for whoever saves it. Bytes of files are in each parameter's own dtype.
                made[view] = (full.view(value.dtype) if bucket.read_only else full).as_strided(*view).clone()
            state[name] = made[view]


def _begin_load(module: nn.Module, state: Any, prefix: str, meta: Any, *_rest: Any) -> None:
    unit = _unit(module)
    _refuse_what_is_read(module, state, prefix)
    if _is_read(unit):  # what a script has added to it since, such as an adapter, can be loaded
        return
    if meta.get("assign_to_params_buffers"):
        raise UnitError(
            "load_state_dict(assign=True) would replace parameters that live in a flat buffer",
            where=f"unit {unit.label}",
            fix="call it without assign, or load before sharding",
        )
    unit.upward.recover()
    unit.drain()
    unit.begin_load()
    unit.reconcile()
    unit.finish_transfers()
    # The copies that Module.load_state_dict makes itself need somewhere to go, in the compute dtype.
    unit.gather()
    unit.residence.pin(Pin.STATE_DICT)


def _is_read(unit: Unit) -> bool:
    """Are its values weights of files, which nobody writes?"""
    return any(bucket.read_only for bucket in unit.buckets)


def _refuse_what_is_read(module: nn.Module, state: Any, prefix: str) -> None:
    """Before anything is loaded into the module, or into one inside it."""
    for path, part in module.named_modules(prefix=prefix.removesuffix(".")):
        for name, slot in owned_by(part).items():
            whole = f"{path}.{name}" if path else name
            if slot.bucket.read_only and whole in state:
                raise UnitError(
                    f"the values of '{whole}' are weights of files, which a state dict cannot be loaded into",
                    where=f"unit {slot.unit.label}",
                    fix="load the model again from the other files",
                )


@torch.no_grad()
def _before_load(module: nn.Module, state: Any, prefix: str, *_rest: Any) -> None:
    for name, slot in owned_by(module).items():
        value = state.get(prefix + name)
        bucket: Bucket = slot.bucket
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != bucket.layout.slots[slot.index].shape:
            continue
        if bucket.values is not None:
            bucket.values.materialise()
        flat = value.detach().reshape(-1)
        for piece, (lo, hi) in zip(bucket.piece_params[slot.index], bucket.ranges(slot.index), strict=True):
            piece.copy_(flat[lo:hi].view(piece.shape))
        slot.unit.loaded(slot)


@torch.no_grad()
def _after_load(module: nn.Module, _keys: Any) -> None:
    unit = _unit(module)
    if _is_read(unit):
        return
    let_follow(unit)
    for bucket in unit.buckets:
        bucket.note()  # torch's own copies into values are not the script's
    if unit.residence.pinned(Pin.STATE_DICT):
        unit.residence.unpin(Pin.STATE_DICT)
    unit.release()
    if not unit.released:
        unit.publish(unit.buckets)  # also if it is not complete: other ranks may not have failed, and gather
    unit.end_load()


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
    unit.reconcile()
    bucket, index = unit.places[id(param)]
    if bucket.read_only:
        raise UnitError(
            f"the values of '{bucket.names[index]}' are weights of files, and not this run's",
            where=f"unit {unit.label}",
            fix="copy those files, or use shardwise.fully_shard on a model that is to be loaded into or saved",
        )
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
        let_follow(unit)
        unit.publish(unit.buckets)


def let_follow(unit: Unit) -> None:
    """Master values that have another home were written to: take the values over, and let them go home."""
    for bucket in unit.buckets:
        if bucket.values is not None and bucket.values.resident:
            TransferGroup(bucket.follow_master()).wait()
            bucket.values.write_back()
