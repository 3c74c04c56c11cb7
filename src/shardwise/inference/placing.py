"""Putting one tensor of a module on a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shardwise import device as devices
from shardwise.errors import PlacementError
from shardwise.inference.dtypes import as_dtype, is_number_with_fraction
from shardwise.inference.parameters import like, on_device
from shardwise.inference.tensors import owner_of

TiedParams = dict[int, dict[torch.device, torch.Tensor]]
"""Copies of tied parameters by the address of their values and by device."""

_PACK_THEMSELVES = ("Params4bit",)  # bitsandbytes': their shape changes when they are quantised


def set_module_tensor_to_device(
    module: nn.Module,
    tensor_name: str,
    device: torch.device | str | int,
    value: Any = None,
    dtype: torch.dtype | str | None = None,
    fp16_statistics: torch.Tensor | None = None,
    tied_params_map: TiedParams | None = None,
    non_blocking: bool = False,
    clear_cache: bool = True,
) -> None:
    """Put one parameter or buffer on a device, with other values if there are some.

    A parameter becomes a new one, of the same class and with the same attributes; without ``value`` it stays the one
    it is if it is there already.

    Args:
        tensor_name: with the path from ``module`` on.
        value: its new values, of the same shape; needed if it is on ``meta`` and is to leave it.
        dtype: of the result, unless it holds integers. By default the dtype it has now.
        fp16_statistics: becomes its attribute ``SCB``: the scales of bitsandbytes' 8-bit weights.
        tied_params_map: by the address of values, copies of them on devices. A parameter with such values becomes the
            copy; the first one is noted there.
        non_blocking: do not wait for the copy.
        clear_cache: give memory that torch keeps for later back to the accelerator.

    Raises:
        PlacementError: no such tensor, another shape, or no values for one on ``meta``.
        DeviceError: there is no such device.
    """
    owner, name = owner_of(module, tensor_name)
    place = device if isinstance(device, torch.device) and device.index is not None else devices.named(device)
    old = getattr(owner, name)
    table: dict[str, Any] = owner._buffers if name in owner._buffers else owner._parameters
    known = _known(tied_params_map, value, old)
    shared = known.get(place) if known is not None else None
    if shared is not None and shared.shape == old.shape:
        table[name] = shared
        return
    if value is None and old.device.type == "meta" and place.type != "meta":
        raise PlacementError(
            f"'{tensor_name}' is on the meta device and has no values for {place}",
            where=type(module).__name__,
            fix="give value=",
        )
    values = old.detach() if value is None else _checked(torch.as_tensor(value), old, owner, name)
    wanted = as_dtype(dtype) if dtype is not None else old.dtype
    # Values of a checkpoint take the dtype of the model. A dtype that was asked for is not meant for integers.
    converts = dtype is None or is_number_with_fraction(values.dtype)
    with torch.no_grad():
        values = values.to(wanted if converts else values.dtype, non_blocking=non_blocking)
        new = _as_it_was(old, values, place, value is None and values.dtype == old.dtype, non_blocking)
    if fp16_statistics is not None:
        new.SCB = fp16_statistics.to(place)  # type: ignore[attr-defined]
    table[name] = new
    if known is not None:
        known.setdefault(place, new)
    if clear_cache and place.type not in ("cpu", "meta"):
        devices.empty_cache()


def _as_it_was(
    old: torch.Tensor, values: torch.Tensor, place: torch.device, same: bool, non_blocking: bool
) -> torch.Tensor:
    if not isinstance(old, nn.Parameter):
        return old if same and old.device == place else values.to(place, non_blocking=non_blocking)
    if same:
        return on_device(old, place, non_blocking)
    if type(old).to is torch.Tensor.to:  # nothing happens on the way: one parameter is made, not two
        return like(old, values.detach().to(place, non_blocking=non_blocking))
    return on_device(like(old, values.detach()), place, non_blocking)


def _checked(values: torch.Tensor, old: torch.Tensor, owner: nn.Module, name: str) -> torch.Tensor:
    if values.shape != old.shape and type(old).__name__ not in _PACK_THEMSELVES:
        raise PlacementError(
            f"values of shape {tuple(values.shape)} for '{name}', which has {tuple(old.shape)}",
            where=type(owner).__name__,
            fix="check that the checkpoint is this model's",
        )
    return values


def _known(tied: TiedParams | None, *tensors: Any) -> dict[torch.device, torch.Tensor] | None:
    """The copies of tied values, if these are. On ``meta`` all addresses are 0, and tell nothing."""
    for tensor in tensors if tied else ():
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta" and tensor.data_ptr() in (tied or {}):
            return (tied or {})[tensor.data_ptr()]
    return None
