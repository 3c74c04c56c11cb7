"""The hook that brings a module's tensors to where it computes, and the inputs with them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shardwise import device as devices
from shardwise import operations, trees
from shardwise.engine.uncompiled import uncompiled
from shardwise.inference.hooks import ModelHook, hooks_of
from shardwise.inference.placing import TiedParams, set_module_tensor_to_device
from shardwise.inference.tensors import get_non_persistent_buffers, named_module_tensors, owner_of

_log = logging.getLogger(__name__)
Device = torch.device | str | int


class AlignDevicesHook(ModelHook):
    """Before ``forward``, inputs and tensors are brought to one device.

    Args:
        execution_device: this one. Without it nothing is moved.
        offload: the tensors are on ``meta`` between calls, and come from ``weights_map`` for each one.
        io_same_device: the output goes where the first input was.
        weights_map: their values by name; by default copies of what the module has now, on the host.
        offload_buffers: buffers too, but for those that state dicts leave out.
        place_submodules: the tensors of the submodules too.
        skip_keys: keys of inputs and outputs whose values stay where they are.
        tied_params_map: as for :func:`set_module_tensor_to_device`: tied parameters are on a device once.
    """

    def __init__(
        self,
        execution_device: Device | None = None,
        offload: bool = False,
        io_same_device: bool = False,
        weights_map: Mapping[str, torch.Tensor] | None = None,
        offload_buffers: bool = False,
        place_submodules: bool = False,
        skip_keys: str | Sequence[str] | None = None,
        tied_params_map: TiedParams | None = None,
    ) -> None:
        self.execution_device = execution_device
        self.offload = offload
        self.io_same_device = io_same_device
        self.weights_map = weights_map
        self.offload_buffers = offload_buffers
        self.place_submodules = place_submodules
        self.skip_keys = skip_keys
        self.tied_params_map = tied_params_map
        self.input_device: torch.device | None = None
        self.original_devices: dict[str, torch.device] = {}
        self._brought: list[tuple[dict[torch.device, torch.Tensor], torch.device]] = []

    def __repr__(self) -> str:
        told = ("execution_device", "offload", "io_same_device", "offload_buffers", "place_submodules", "skip_keys")
        return f"AlignDevicesHook({', '.join(f'{name}={getattr(self, name)!r}' for name in told)})"

    def init_hook(self, module: nn.Module) -> nn.Module:
        tensors = dict(named_module_tensors(module, recurse=self.place_submodules))
        staying = tensors
        if self.offload:
            self.original_devices = {name: tensor.device for name, tensor in tensors.items()}
            moving = dict(named_module_tensors(module, self.offload_buffers, self.place_submodules))
            if self.weights_map is None:
                self.weights_map = {name: tensor.to(devices.CPU) for name, tensor in moving.items()}
            for name in self._offloaded(module):
                self._set(module, name, "meta")
            passing = get_non_persistent_buffers(module, self.place_submodules, fqns=True)
            buffers = (name for name, _ in module.named_buffers(recurse=self.place_submodules))
            staying = {name: tensors[name] for name in buffers if not self.offload_buffers or name in passing}
        if self.execution_device is not None:
            for name in staying:
                self._set(module, name, self.execution_device, tied=self.tied_params_map)
        return module

    @uncompiled
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.io_same_device:
            tensors = (leaf for leaf in trees.leaves([args, kwargs]) if trees.is_tensor(leaf))
            self.input_device = next((tensor.device for tensor in tensors), None)
        if self.offload and self.execution_device is not None:
            self._bring(module, self.execution_device)
        sent: tuple[tuple[Any, ...], dict[str, Any]] = self._sent((args, kwargs), self.execution_device)
        return sent

    @uncompiled
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if self.offload:
            for name in self._offloaded(module):
                self._set(module, name, "meta")
            for copies, place in self._brought:
                copies.pop(place, None)
            self._brought = []
        return self._sent(output, self.input_device) if self.io_same_device else output

    def detach_hook(self, module: nn.Module) -> nn.Module:
        values = self.weights_map if self.weights_map is not None else {}
        for name, place in self.original_devices.items() if self.offload else ():
            if place.type == "meta":
                continue
            value = values.get(name)
            if isinstance(value, nn.Parameter) and value.device == place:  # the one it was: ties hold again
                owner, last = owner_of(module, name)
                owner._parameters[last] = value
            else:
                self._set(module, name, place, value)
        return module

    def _offloaded(self, module: nn.Module) -> list[str]:
        tensors = named_module_tensors(module, self.offload_buffers, self.place_submodules, remove_non_persistent=True)
        return [name for name, _ in tensors]

    def _bring(self, module: nn.Module, device: Device) -> None:
        place = devices.named(device)
        weights = {} if self.weights_map is None else self.weights_map
        tied = self.tied_params_map if place.type != "meta" else None
        for name in self._offloaded(module):
            value = weights[name]
            copies = (tied or {}).get(value.data_ptr()) if value.device.type != "meta" else None
            if copies is not None and place not in copies:
                self._brought.append((copies, place))  # it goes when this module's call ends, not earlier
            self._set(module, name, place, value, tied)

    def _set(
        self, module: nn.Module, name: str, device: Device, value: Any = None, tied: TiedParams | None = None
    ) -> None:
        # 8-bit weights have their scales beside them, under a name of their own.
        scales = name.replace("weight", "SCB")
        eight_bits = isinstance(value, torch.Tensor) and value.dtype == torch.int8 and scales != name
        statistics = self.weights_map.get(scales) if eight_bits and self.weights_map is not None else None
        set_module_tensor_to_device(
            module, name, device, value, fp16_statistics=statistics, tied_params_map=tied, clear_cache=False
        )

    def _sent(self, tree: Any, device: Device | None) -> Any:
        if device is None:
            return tree
        keys = [self.skip_keys] if isinstance(self.skip_keys, str) else self.skip_keys or ()
        return operations.to_device(tree, devices.named(device), skip_keys=keys)


def _offloading(module: nn.Module) -> AlignDevicesHook | None:
    found = (hook for hook in hooks_of(module) if isinstance(hook, AlignDevicesHook) and hook.offload)
    return next(found, None)


def has_offloaded_params(module: nn.Module) -> bool:
    """Are the module's own parameters elsewhere between its calls, through an :class:`AlignDevicesHook`?"""
    return _offloading(module) is not None


@contextmanager
def align_module_device(module: nn.Module, execution_device: Device | None = None) -> Iterator[None]:
    """A block in which the module's own parameters are on one device. Afterwards they are where they were.

    What is written to them in the block is kept, but for parameters that are offloaded: these are read anew.

    Args:
        execution_device: by default the one of an offloaded module's hook; other modules stay where they are.

    Raises:
        PlacementError: they are on ``meta``, and no hook brings them.
    """
    hook = _offloading(module)
    if hook is not None:
        before = hook.execution_device
        hook.execution_device = before if execution_device is None else execution_device
        try:
            hook.pre_forward(module)
            yield
        finally:
            hook.post_forward(module, None)
            hook.execution_device = before
        return
    owned = {name: p for name, p in module._parameters.items() if p is not None}
    moved = {}
    try:
        if execution_device is not None:
            for name in owned:
                set_module_tensor_to_device(module, name, execution_device)
                moved[name] = module._parameters[name]
        yield
    finally:
        for name, here in moved.items():
            now = module._parameters[name]
            if now is here and here is not owned[name] and here is not None:
                if here.device.type != "meta":
                    owned[name].data.copy_(here.data)
                module._parameters[name] = owned[name]  # the same object: ties and optimizers know it
            elif now is not None and now is not here:
                set_module_tensor_to_device(module, name, owned[name].device)


def get_state_dict_offloaded_model(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole state dict of a model some of whose tensors are offloaded, on the host: module by module.

    Tensors that nothing brings, and stay on ``meta``, are left out.
    """
    found: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if has_offloaded_params(module):
            with align_module_device(module, devices.CPU):
                found |= {f"{prefix}.{n}" if prefix else n: tensor for n, tensor in module.state_dict().items()}
    here = {name: found.get(name, tensor) for name, tensor in model.state_dict().items()} | found
    missing = [name for name, tensor in here.items() if tensor.device.type == "meta"]
    if missing:
        _log.warning("these tensors are on the meta device, and are left out: %s", ", ".join(missing))
    return {name: tensor.to(devices.CPU) for name, tensor in here.items() if name not in missing}


def get_state_dict_from_offload(
    module: nn.Module, module_name: str, state_dict: dict[str, Any], device_to_put_offload: Device = "cpu"
) -> dict[str, Any]:
    """Put the values of a module that is offloaded into a state dict that has its names.

    Args:
        module_name: of one of its tensors, in the state dict.
        state_dict: changed in place.
        device_to_put_offload: where the values go.

    Returns:
        ``state_dict``.
    """
    prefix = module_name.rpartition(".")[0]
    with align_module_device(module, device_to_put_offload if has_offloaded_params(module) else None):
        for name, value in module.state_dict().items():
            whole = f"{prefix}.{name}" if prefix else name
            if whole in state_dict:
                state_dict[whole] = value
    return state_dict
