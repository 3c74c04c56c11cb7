"""Tensors in files, one each: a folder of ``.dat`` files with ``index.json``, as Accelerate writes it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardwise.errors import ConfigError, OffloadError
from shardwise.inference.dtypes import as_dtype
from shardwise.inference.placing import set_module_tensor_to_device

_INDEX = "index.json"
Folder = str | os.PathLike[str]
Index = dict[str, dict[str, Any]]
"""``{"dtype": "bfloat16", "shape": [2, 3]}`` by the name of the tensor."""


def offload_weight(
    weight: torch.Tensor, weight_name: str, offload_folder: Folder, index: Index | None = None
) -> Index | None:
    """Write the bytes of a tensor to ``<weight_name>.dat``, in any dtype.

    Args:
        index: gets its dtype and shape.

    Returns:
        ``index``.
    """
    weight = weight.detach().cpu().contiguous()
    raw = weight.reshape(-1).view(torch.uint8).numpy()
    (Path(offload_folder) / f"{weight_name}.dat").write_bytes(raw.data)
    if index is not None:
        index[weight_name] = {"dtype": str(weight.dtype).removeprefix("torch."), "shape": list(weight.shape)}
    return index


def load_offloaded_weight(weight_file: Folder, weight_info: Mapping[str, Any]) -> torch.Tensor:
    """Read a file of :func:`offload_weight`, into new memory of the host.

    Args:
        weight_info: its ``dtype`` and ``shape``, from the index.

    Raises:
        OffloadError: the file is longer or shorter than that.
    """
    dtype, shape = as_dtype(weight_info["dtype"]), tuple(weight_info["shape"])
    new = torch.empty(shape, dtype=dtype)
    raw = new.reshape(-1).view(torch.uint8).numpy()
    size = os.path.getsize(weight_file)
    if size != raw.nbytes:
        raise OffloadError(
            f"{size} bytes, where {raw.nbytes} are needed for {list(shape)} of {dtype}",
            where=str(weight_file),
            fix="write the folder again",
        )
    with open(weight_file, "rb", buffering=0) as file:
        view, at = raw.data, 0
        while at < size and (count := file.readinto(view[at:])):
            at += count
    return new


def save_offload_index(index: Index | None, offload_folder: Folder) -> None:
    """Add to the folder's ``index.json``; an empty ``index`` changes nothing."""
    if not index:
        return
    path = Path(offload_folder) / _INDEX
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    new = path.with_name(f"{_INDEX}.new")  # whoever reads meanwhile finds a whole one
    new.write_text(json.dumps(known | index, indent=2), encoding="utf-8")
    new.replace(path)


def offload_state_dict(save_dir: Folder, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Write every tensor to a file of its own, and the index. The folder is made."""
    os.makedirs(save_dir, exist_ok=True)
    index: Index = {}
    for name, tensor in state_dict.items():
        offload_weight(tensor, name, save_dir, index)
    save_offload_index(index, save_dir)


def load_offloaded_weights(model: nn.Module, index: Index | None, offload_folder: Folder) -> None:
    """Give a model's tensors the values of a folder, on the host.

    Args:
        index: which; entries ``SCB`` are the scales of 8-bit weights, and go where these do.
    """
    index = index or {}
    folder = Path(offload_folder)
    for name, info in index.items():
        if "SCB" in name:
            continue
        scales = name.replace("weight", "SCB")
        statistics = None
        if scales != name and scales in index:
            statistics = load_offloaded_weight(folder / f"{scales}.dat", index[scales])
        value = load_offloaded_weight(folder / f"{name}.dat", info)
        set_module_tensor_to_device(model, name, "cpu", value=value, fp16_statistics=statistics)


class PrefixedDataset(Mapping[str, Any]):
    """The part of a mapping whose keys begin with ``prefix``, under the rest of these keys.

    Attributes:
        dataset: the whole mapping.
    """

    def __init__(self, dataset: Mapping[str, Any], prefix: str) -> None:
        self.dataset, self.prefix = dataset, prefix

    def __getitem__(self, key: str) -> Any:
        return self.dataset[f"{self.prefix}{key}"]

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self.prefix) for key in self.dataset if key.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class OffloadedWeightsLoader(Mapping[str, torch.Tensor]):
    """Tensors by name, some in memory, the others read when they are asked for.

    Args:
        state_dict: those in memory; they come before those of the folder.
        save_folder: a folder of :func:`offload_state_dict`.
        index: what is where: entries of the folder's index (which is the default), or
            ``{"safetensors_file": ..., "weight_name": ..., "dtype": ...}``, the last two if they differ.
        device: where tensors from safetensors files go; the host by default.

    Raises:
        ConfigError: none of the three.
    """

    def __init__(
        self,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        save_folder: Folder | None = None,
        index: Mapping[str, Mapping[str, Any]] | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        if state_dict is None and save_folder is None and index is None:
            raise ConfigError("there is nothing to load from", fix="give state_dict, save_folder or index")
        if index is None and save_folder is not None:
            index = json.loads((Path(save_folder) / _INDEX).read_text(encoding="utf-8"))
        self.state_dict = {} if state_dict is None else state_dict
        self.save_folder, self.device = save_folder, device
        self.index = {} if index is None else index
        self.all_keys = list(dict.fromkeys([*self.state_dict, *self.index]))

    def __getitem__(self, key: str) -> torch.Tensor:
        if key in self.state_dict:
            return self.state_dict[key]
        info = self.index[key]
        file = info.get("safetensors_file")
        if file is None:
            if self.save_folder is None:
                raise ConfigError(f"'{key}' is in a folder that was not given", fix="give save_folder")
            return load_offloaded_weight(Path(self.save_folder) / f"{key}.dat", info)
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(info.get("weight_name", key))
        if "dtype" in info:
            tensor = tensor.to(as_dtype(info["dtype"]))
        return tensor if self.device is None else tensor.to(self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.all_keys)

    def __len__(self) -> int:
        return len(self.all_keys)


def extract_submodules_state_dict(state_dict: Mapping[str, Any], submodule_names: Sequence[str]) -> dict[str, Any]:
    """The entries of some modules, or of tensors of these names: ``h.1`` does not bring ``h.10``."""
    return {
        key: value
        for name in submodule_names
        for key, value in state_dict.items()
        if key == name or key.startswith(f"{name}.")
    }
