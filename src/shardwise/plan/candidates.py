"""Strategies that are worth a look for a model on a machine, and what each takes at the very least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardwise.placement import Where, place, ranks_of
from shardwise.plan.machine import Machine
from shardwise.plan.optimizers import OPTIMIZERS, WHOLE_MATRICES
from shardwise.sizes import format_bytes
from shardwise.strategy import Strategy

HOMES: tuple[dict[str, str], ...] = (
    {},
    {"offload_optimizer": "cpu", "offload_grads": "cpu"},
    {"offload_params": "cpu", "offload_optimizer": "cpu", "offload_grads": "cpu"},
    {"offload_optimizer": "nvme", "offload_grads": "cpu"},
    {"offload_params": "nvme", "offload_optimizer": "nvme", "offload_grads": "cpu"},
)
"""Where model states live, from the fastest to what takes the least memory."""
ACTIVATIONS: tuple[dict[str, object], ...] = (
    {},
    {"activation_checkpointing": True},
    {"activation_checkpointing": True, "activation_offload": "cpu"},
)


def candidates(machine: Machine, optimizer: str, precision: str | None) -> list[list[Strategy]]:
    """Every combination that makes sense, in groups: what is in a later one is slower, and worth a look if nothing
    before it fits. First what stays on the device, without and with checkpointing; then with activations on the host;
    then with states on the host; then on the disk.

    Args:
        optimizer: a name; some need whole parameters.
        precision: dtype to compute in: ``bf16``, ``fp16``; ``None``: that of the parameters.
    """
    world = machine.world
    presets: list[dict[str, object]] = [{"preset": "ddp"}]
    if world > 1:
        presets += [{"preset": "zero1"}, {"preset": "zero2"}]
        sizes = {machine.per_node} if machine.nodes > 1 and machine.per_node > 1 else set()
        sizes |= {2 * machine.per_node} if machine.nodes > 3 and machine.nodes % 2 == 0 else set()
        presets += [{"preset": "hsdp", "shard_size": size} for size in sorted(sizes)]
        presets += [{"preset": "zero3"}]
    common: dict[str, object] = {"param_dtype": precision} if precision in ("bf16", "fp16") else {}
    if optimizer in WHOLE_MATRICES and world > 1:
        common["layout"] = "tensor"

    def group(homes: Sequence[dict[str, str]], activations: Sequence[dict[str, object]]) -> list[Strategy]:
        rows: list[dict[str, Any]] = [
            {**preset, **common, **home, **kept}
            for preset in presets
            for home in homes
            if _possible(home, machine)
            for kept in activations
            if not ("activation_offload" in kept and machine.is_cpu)
        ]
        return [Strategy(**row) for row in rows]

    here, checkpointed, moved = ACTIVATIONS
    groups = [
        group(HOMES[:1], (here, checkpointed)),
        group(HOMES[:1], (moved,)),
        group(HOMES[1:3], (here, checkpointed, moved)),
        group(HOMES[3:], (here, checkpointed, moved)),
    ]
    return [found for found in groups if found]


def _possible(homes: dict[str, str], machine: Machine) -> bool:
    if "nvme" in homes.values():
        return machine.nvme is not None
    return not homes or not machine.is_cpu


def least(strategy: Strategy, machine: Machine, parameters: int, trainable: int, optimizer: str) -> dict[Where, int]:
    """Bytes that model states take at the very least, by place: those that stay between two steps, and gradients where
    they are whole. From where the engine puts its buffers.

    Args:
        parameters, trainable: elements of the model.
    """
    ranks = ranks_of(strategy, machine.world)
    total = dict.fromkeys(Where, 0)
    for elements, trains in ((trainable, True), (parameters - trainable, False)):
        plan = place(strategy, ranks, "float32", trainable=trains, separate=not machine.is_cpu)
        kept = [
            None if plan.released else plan.values,
            None if plan.aliased else plan.master,
            plan.shard,
            *[plan.state] * OPTIMIZERS[optimizer][1],
            None if plan.grads_split and not plan.grads_on_host else plan.grads,
        ]
        for buffer in kept:
            if buffer is not None:
                total[buffer.where] += plan.nbytes(buffer, elements // ranks.parts)
    return total


def why_not(least: dict[Where, int], machine: Machine) -> str:
    """What model states alone are too large for, in words; nothing if it is worth a closer look."""
    each = machine.per_node
    room = {
        Where.DEVICE: machine.memory,
        Where.HOST: None if machine.host_memory is None else machine.host_memory // each,
        Where.DISK: None if machine.nvme_bytes is None else machine.nvme_bytes // each,
    }
    names = {Where.DEVICE: "a device", Where.HOST: "host memory", Where.DISK: "the disk"}
    for place_, nbytes in least.items():
        limit = room[place_]
        if limit is not None and nbytes > limit:
            has = f"there is {format_bytes(limit)} for a rank"
            return f"states alone are too large for {names[place_]}; they take {format_bytes(nbytes)}, and {has}"
    return ""
