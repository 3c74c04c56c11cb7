"""What a checkpoint has beside tensors, of those kinds that have it: groups of the optimizer, small state, buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwise.checkpoint.deepspeed_contents import contents_of
from shardwise.checkpoint.deepspeed_format import buffers_of
from shardwise.checkpoint.own_state import common_of
from shardwise.checkpoint.stored_tensor import Source


def state_of(source: Source) -> tuple[dict[str, Any], Mapping[str, Any]] | None:
    """The contents of our own ``state.pt``, or what stands for it in a folder of DeepSpeed, and what the run said of
    itself; ``None``: its kind has neither. Any rank may call it alone.

    ``buffers`` has, by model, the names of buffers; checkpoints of older versions do not.

    Raises:
        CheckpointError: it is damaged.
    """
    if source.kind == "deepspeed":
        found = contents_of(source.path, [])
        return {**found.common, "buffers": {"model": buffers_of(source.path)}}, found.manifest.info
    if source.kind == "shardwise":
        manifest = source.facts["manifest"]
        return common_of(source.path, manifest), manifest.info
    return None


def frozen_names(source: Source) -> set[str]:
    """Parameters of the first model that no optimizer has. Empty where that cannot be told."""
    found = state_of(source)
    if found is None or not found[0]["optimizers"]:
        return set()
    common = found[0]
    tensors = source.sections[("model",)]
    trained = {name for o in common["optimizers"] for group in o["groups"] for name in group["params"]}
    if not trained & tensors.keys():  # stage 0 has no names for them
        return set()
    ids = {id(tensors[name]) for name in trained & tensors.keys()}
    buffers = set(common.get("buffers", {}).get("model", ()))
    return {
        name for name, t in tensors.items() if id(t) not in ids and name not in buffers and t.dtype.is_floating_point
    }
