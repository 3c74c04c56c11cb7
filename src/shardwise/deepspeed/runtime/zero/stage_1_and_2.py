"""Estimates for stage 2, as DeepSpeed calls them. See :mod:`shardwise.deepspeed.zero.estimates`."""

from __future__ import annotations

from torch import nn

from shardwise.deepspeed.zero.estimates import needs, show, sizes_of, strategy_for

__all__ = [
    "estimate_zero2_model_states_mem_needs",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
]


def estimate_zero2_model_states_mem_needs(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    additional_buffer_factor: float = 1.0,
) -> tuple[int, int]:
    """Bytes per host and per device, without activations, and without the two units that are on their way to a reduce.

    Args:
        additional_buffer_factor: multiplies what the host needs; here buffers are counted, so by default it is 1.
    """
    found = needs(
        strategy_for(2, cpu_offload), total_params, 0, per_node=num_gpus_per_node, nodes=num_nodes, built_whole=True
    )
    return int(found.host * additional_buffer_factor), found.device


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.0
) -> None:
    """Print what a model's states take with and without offloading; it may be on the meta device."""
    show(2, *sizes_of(model), num_gpus_per_node, num_nodes)


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.0
) -> None:
    """The same by a number of parameters."""
    show(2, total_params, 0, num_gpus_per_node, num_nodes)
