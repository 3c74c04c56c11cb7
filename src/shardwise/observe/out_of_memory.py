"""What an error says that was raised because memory ran out: what was held then, and which strategies hold less.

The exception stays what it is, so whoever catches it does so as before: a note is added to it. Whoever sees one pass
(:func:`shardwise.events.failing`) calls :func:`explain`: the engine on the way out of a forward or of an optimizer's
step, ``Accelerator.backward``, and the report of an exception that nobody caught.
"""

from __future__ import annotations

import sys

import torch

from shardwise import device as devices
from shardwise import events
from shardwise.engine.build import engines
from shardwise.engine.engine import Engine
from shardwise.errors import ShardwiseError
from shardwise.observe.stats import formula
from shardwise.sizes import format_bytes
from shardwise.strategy import Strategy
from shardwise.tiers import STATES

_SIGNS = (
    " out of memory.",  # CUDA, HIP, XPU
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.",
    "MPS backend out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "std::bad_alloc",  # small allocations inside torch
    "could not create a primitive",  # oneDNN: no memory for its code or its scratch space
)
_MARK = "_shardwise_explained"
_PRESETS = ("ddp", "zero1", "zero2", "zero3")  # each holds no more than the one before


def is_out_of_memory(error: BaseException) -> bool:
    """Did this happen because memory ran out?"""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def explain(error: BaseException) -> None:
    """Add to an error what the sharded models of this process hold, if memory ran out. Once.

    Cost: nothing unless memory ran out.
    """
    if getattr(error, _MARK, False) or isinstance(error, ShardwiseError) or not is_out_of_memory(error):
        return
    found = [engine for engine in engines if engine.units]
    if not found:
        return
    try:
        text = "\n".join(["shardwise: what this rank held when memory ran out", *map(_of, found), *_device(found)])
        setattr(error, _MARK, True)
    except Exception:  # noqa: BLE001  (the error that is under way matters more than what is said of it)
        return
    if sys.version_info >= (3, 11):
        error.add_note(text)
    elif error.args:
        error.args = (f"{error.args[0]}\n{text}", *error.args[1:])


def _of(engine: Engine) -> str:
    """One model: live bytes by state, the formula's, and what would need less."""
    live = {state: engine.ledger.live[state] for state in STATES}
    plan = formula(engine, engine.strategy)
    planned = {"parameters": plan.parameters, "gradients": plan.gradients, "optimizer": plan.optimizer}
    parts = [
        f"{state} {format_bytes(nbytes)}" + (f" (formula: {format_bytes(planned[state])})" if state in planned else "")
        for state, nbytes in live.items()
        if nbytes or planned.get(state)
    ]
    row = engine.strategy
    lines = [
        f"  {type(engine.module).__name__} under '{row}': {format_bytes(sum(live.values()))} of model states: "
        + ", ".join(parts)
    ]
    less = _less(engine, plan.states, plan.optimizer)
    lines.append("  " + ("needs less: " + "; ".join(less) if less else "no strategy holds less on so many ranks"))
    return "\n".join(lines)


def _less(engine: Engine, states: int, optimizer: int) -> list[str]:
    """Strategies whose model states alone take less than these, the nearest first."""
    row, out = engine.strategy, []
    if row.preset in _PRESETS and engine.world.size > 1:
        for preset in _PRESETS[_PRESETS.index(row.preset) + 1 :]:
            needs = formula(engine, Strategy.parse(row.replace(preset=preset))).states
            if needs < states:
                out.append(f"{preset} ({format_bytes(needs)} between steps instead of {format_bytes(states)})")
    if row.offload_optimizer == "device" and optimizer:
        out.append(f"offload_optimizer=cpu (takes {format_bytes(optimizer)} to the host)")
    out.append("activation_checkpointing, or a smaller micro-batch with accumulation, for what is no model state")
    return out


def _device(found: list[Engine]) -> list[str]:
    device = next(b.device for engine in found for unit in engine.units for b in unit.buckets)
    if (peak := devices.peak_memory(device)) is None:
        return []
    return [f"  {device}: at most {format_bytes(peak)} were allocated in this process, other tensors included"]


events.explainers.append(explain)
