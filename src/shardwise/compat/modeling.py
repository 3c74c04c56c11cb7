"""Sizes, device maps, tied parameters and checkpointed activations of modules."""

from __future__ import annotations

from torch import nn

from shardwise.compat.imports import is_peft_available
from shardwise.compat.wrappers import extract_model_from_parallel
from shardwise.engine.activations import recompute
from shardwise.engine.select import UnitRule, select_units
from shardwise.inference.align import (
    align_module_device,
    get_state_dict_from_offload,
    get_state_dict_offloaded_model,
    has_offloaded_params,
)
from shardwise.inference.auto_map import infer_auto_device_map
from shardwise.inference.device_map import check_device_map, clean_device_map
from shardwise.inference.dispatch import load_checkpoint_in_model
from shardwise.inference.dtypes import CustomDtype, dtype_byte_size
from shardwise.inference.memory import get_balanced_memory, get_max_memory
from shardwise.inference.offloaded import load_offloaded_weights
from shardwise.inference.placing import set_module_tensor_to_device
from shardwise.inference.sizes import (
    calculate_maximum_sizes,
    compute_module_sizes,
    compute_module_total_buffer_size,
    convert_file_size_to_int,
    get_max_layer_size,
)
from shardwise.inference.tensors import get_non_persistent_buffers, id_tensor_storage, named_module_tensors
from shardwise.inference.ties import (
    check_tied_parameters_in_config,
    check_tied_parameters_on_same_device,
    find_tied_parameters,
    retie_parameters,
)
from shardwise.inference.weights_file import load_state_dict

__all__ = [
    "CustomDtype",
    "align_module_device",
    "calculate_maximum_sizes",
    "check_device_map",
    "check_tied_parameters_in_config",
    "check_tied_parameters_on_same_device",
    "checkpoint_activations",
    "clean_device_map",
    "compute_module_sizes",
    "compute_module_total_buffer_size",
    "convert_file_size_to_int",
    "dtype_byte_size",
    "find_tied_parameters",
    "get_balanced_memory",
    "get_max_layer_size",
    "get_max_memory",
    "get_non_persistent_buffers",
    "get_state_dict_from_offload",
    "get_state_dict_offloaded_model",
    "has_offloaded_params",
    "id_tensor_storage",
    "infer_auto_device_map",
    "is_peft_model",
    "load_checkpoint_in_model",
    "load_offloaded_weights",
    "load_state_dict",
    "named_module_tensors",
    "retie_parameters",
    "set_module_tensor_to_device",
]


def is_peft_model(model: nn.Module) -> bool:
    """Is it PEFT's, under its wrappers?"""
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(extract_model_from_parallel(model, keep_torch_compile=False), PeftModel)


def checkpoint_activations(model: nn.Module, units: UnitRule = None) -> list[str]:
    """Keep only the inputs of some modules for backward, and compute inside them again there.

    What ``activation_checkpointing`` in a strategy does, for modules of one's choice. Call it before the model is
    prepared.

    Args:
        units: which modules, as in :func:`shardwise.fully_shard`.

    Returns:
        Their names.
    """
    return [name for name, module in select_units(model, units) if recompute(module)]
