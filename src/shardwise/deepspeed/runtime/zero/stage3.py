"""Estimates for stage 3, as DeepSpeed calls them. See :mod:`shardwise.deepspeed.zero.estimates`."""

from __future__ import annotations

from torch import nn

from shardwise.deepspeed.zero.estimates import needs, show, sizes_of, strategy_for
from shardwise.deepspeed.zero.gathering import unwrap_model_for_generation

__all__ = [
    "estimate_zero3_model_states_mem_needs",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
    "unwrap_model_for_generation",
]


def estimate_zero3_model_states_mem_needs(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    cpu_offload_params: bool = True,
    zero_init: bool = True,
    additional_buffer_factor: float = 1.0,
) -> tuple[int, int, int]:
    """Bytes per host, per device, and of the largest layer's values, without activations.

    Args:
        total_params, largest_layer_params: parameters of the model, and of what is gathered at once.
        num_gpus_per_node, num_nodes: devices on a host, and hosts.
        cpu_offload, cpu_offload_params: are optimizer state, and parameters with it, on the host?
        zero_init: is the model built under ``zero.Init``?
        additional_buffer_factor: multiplies what the host needs; here buffers are counted, so by default it is 1.
    """
    found = needs(
        strategy_for(3, cpu_offload, cpu_offload and cpu_offload_params), total_params, largest_layer_params,
        per_node=num_gpus_per_node, nodes=num_nodes, built_whole=not zero_init,
    )  # fmt: skip
    return int(found.host * additional_buffer_factor), found.device, found.largest


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.0
) -> None:
    """Print what a model's states take under every way of offloading; it may be on the meta device."""
    show(3, *sizes_of(model), num_gpus_per_node, num_nodes)


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.0,
) -> None:
    """The same by numbers of parameters."""
    show(3, total_params, largest_layer_params, num_gpus_per_node, num_nodes)
