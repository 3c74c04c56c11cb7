"""What a model's states take under ZeRO, from the arithmetic that places them: no factors, no guesses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from shardwise.engine.select import numel, select_units
from shardwise.placement import BufferPlan, Placement, Where, place, ranks_of
from shardwise.strategy import Strategy


@dataclass(frozen=True)
class Needs:
    """Bytes.

    Attributes:
        device: of each rank's device at the peak of a step, without activations.
        host: of each host, for what is offloaded there and while the model is built.
        largest: of the largest unit's values.
    """

    device: int
    host: int
    largest: int


def needs(
    strategy: Strategy, total: int, largest: int, *, per_node: int = 1, nodes: int = 1, built_whole: bool = False
) -> Needs:
    """What ``total`` parameters take with AdamW.

    Args:
        total: parameters of the model.
        largest: of its largest unit.
        per_node, nodes: devices on a host, and hosts.
        built_whole: each rank has the whole model in host memory before it is sharded.
    """
    world = per_node * nodes
    ranks = ranks_of(strategy, world)
    plan = place(strategy, ranks, "float32", separate=True)
    device, host = _kept(plan, -(-total // world))
    unit = -(-largest // world)
    values, wire = plan.nbytes(plan.values, unit), plan.nbytes(plan.arriving, unit)
    device += 2 * values * plan.released + 2 * wire * plan.grads_split
    building = 4 * (total if built_whole else 2 * largest) * per_node
    return Needs(device, max(host * per_node, building), values)


def _kept(plan: Placement, shard: int) -> tuple[int, int]:
    """Bytes on the device and on the host that a rank keeps between steps, of buffers of ``shard`` elements a shard."""
    found = {Where.DEVICE: 0, Where.HOST: 0, Where.DISK: 0}
    kept: list[BufferPlan | None] = [plan.shard, plan.grads, plan.state, plan.state]
    kept += [] if plan.released else [plan.values]
    kept += [] if plan.aliased else [plan.master]
    for buffer in kept:
        if buffer is not None:
            found[buffer.where] += plan.nbytes(buffer, shard)
    return found[Where.DEVICE], found[Where.HOST]


def sizes_of(model: nn.Module) -> tuple[int, int]:
    """Parameters of a model, and of its largest unit. It may be on the meta device."""
    total = numel(model)
    units = [numel(module) for _, module in select_units(model)]
    return total, max([*units, total - sum(units)])


def rows(stage: int) -> Iterator[tuple[bool, bool, bool]]:
    """(optimizer offloaded, parameters offloaded, built split) of each line of a table."""
    for optimizer in (True, False):
        for params in (True, False) if stage == 3 and optimizer else (False,):
            for split in (True, False) if stage == 3 else (False,):
                yield optimizer, params, split


def strategy_for(stage: int, offload_optimizer: bool, offload_params: bool = False) -> Strategy:
    """bf16 with fp32 master values under a stage of ZeRO."""
    return Strategy(
        f"zero{stage}",
        param_dtype="bf16",
        offload_optimizer="cpu" if offload_optimizer else "device",
        offload_params="cpu" if offload_params else "device",
    )


def show(stage: int, total: int, largest: int, per_node: int, nodes: int) -> None:
    """Print what each way of offloading takes."""
    print(
        f"Memory for parameters, gradients and AdamW's states (bf16, fp32 master values), without activations, of\n"
        f"{total / 1e6:,.1f}M parameters, {largest / 1e6:,.1f}M in the largest unit, on {nodes} x {per_node} devices:\n"
        f"  {'per host':>10} | {'per device':>10} | options"
    )
    for optimizer, params, split in rows(stage):
        found = needs(
            strategy_for(stage, optimizer, params), total, largest,
            per_node=per_node, nodes=nodes, built_whole=not split,
        )  # fmt: skip
        options = [f"offload_optimizer={'cpu' if optimizer else 'none'}"]
        if stage == 3:
            options = [f"offload_param={'cpu' if params else 'none'}", *options, f"zero_init={int(split)}"]
        print(f"  {found.host / 2**30:>8.2f}GB | {found.device / 2**30:>8.2f}GB | {', '.join(options)}")
