"""Reading a file of weights as it is, each tensor on its device."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch

from shardwise import device as devices
from shardwise.errors import CheckpointError, ForeignWeights, PlacementError
from shardwise.inference.device_map import Place, place_of

_log = logging.getLogger(__name__)
_OTHERS = ("tf", "flax", "mlx", "np")


def load_state_dict(
    checkpoint_file: str | os.PathLike[str], device_map: Mapping[str, Place] | None = None
) -> dict[str, Any]:
    """The tensors of one file: safetensors, or torch's, of which nothing is unpickled but tensors and plain values.

    Args:
        device_map: where they go, by the names of modules. The host by default; for those on ``"disk"`` too, and for
            what the map does not name.

    Raises:
        ForeignWeights: a safetensors file of another framework, or one that says nothing that is known.
        CheckpointError: damaged, or it holds other things.
        DeviceError: a device that is not there.
    """
    path = os.fspath(checkpoint_file)
    if path.endswith(".safetensors"):
        return _safetensors(path, device_map)
    found = _torch(path)
    return {name: _moved(value, _place(name, device_map)) for name, value in found.items()}


def _moved(value: Any, place: torch.device) -> Any:
    return value.to(place) if isinstance(value, torch.Tensor) else value


def _place(name: str, device_map: Mapping[str, Place] | None) -> torch.device:
    if device_map is None:
        return devices.CPU
    try:
        place = place_of(name, device_map)
    except PlacementError:
        return devices.CPU
    return devices.CPU if place == "disk" else devices.named(place)


def _torch(path: str) -> dict[str, Any]:
    from shardwise.checkpoint.torch_format import DAMAGED

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except DAMAGED as error:
        line = (str(error).splitlines() or [""])[0][:200]
        raise CheckpointError(
            f"not a file of tensors, or one that holds other things ({line})", where=path, fix="save a state dict"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"holds a {type(found).__name__}", where=path, fix="save a state dict")
    return found


def _safetensors(path: str, device_map: Mapping[str, Place] | None) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            _check_format(file.metadata(), path)
            # Mapped, and then moved: the format's own reader knows some types of devices only.
            return {name: file.get_tensor(name).to(_place(name, device_map)) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"damaged ({error})", where=path, fix="use another copy of the file") from error


def _check_format(metadata: Mapping[str, str] | None, path: str) -> None:
    if metadata is None:
        _log.warning("%s does not say what framework it is for; it is read as torch's", path)
        return
    kind = metadata.get("format")
    if kind == "pt":
        return
    what = f"was saved for {kind}" if kind in _OTHERS else f"says format={kind!r}"
    raise ForeignWeights(what, where=path, fix="save it with torch, as save_pretrained does")
