"""What a model has to save, under which names, and how it is put back."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardwise.checkpoint.slices import Slices
from shardwise.engine.hooks import engine_of
from shardwise.engine.state_dict import held, units_of
from shardwise.errors import CheckpointError


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside compiled models and data-parallel wrappers, whose names the checkpoint has."""
    while True:
        children = vars(model).get("_modules", {})
        if isinstance(children.get("_orig_mod"), nn.Module):
            model = children["_orig_mod"]
            continue
        inner = children.get("module")
        engine = engine_of(model)
        wraps = isinstance(model, nn.parallel.DistributedDataParallel) or (
            engine is not None and engine.module is not model and engine.module is inner
        )
        if not wraps:
            return model
        model = inner


@dataclass(frozen=True)
class Entry:
    """One key of a module's state dict: ``kind`` is ``parameter``, ``buffer`` or ``extra``."""

    name: str
    kind: str
    owner: nn.Module
    value: Any


def entries(module: nn.Module) -> Iterator[Entry]:
    """What ``module.state_dict()`` holds, in its order, without bringing any values here."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, p in owner._parameters.items():
            if p is not None:
                yield Entry(dot + name, "parameter", owner, p)
        for name, b in owner._buffers.items():
            if b is not None and name not in owner._non_persistent_buffers_set:
                yield Entry(dot + name, "buffer", owner, b)
        if type(owner).get_extra_state is not nn.Module.get_extra_state:
            yield Entry(f"{dot}_extra_state", "extra", owner, None)


@dataclass
class ModelState:
    """What one model saves or loads.

    Args:
        label: ``model``, ``model_1``, ...: the first part of its keys.
        module: without wrappers.
        parameters: by name; tied ones under their first name only.
        aliases: the other names of tied parameters and buffers, and the first one of each.
        buffers: persistent ones by name.
        extra: owners of extra state by name.
    """

    label: str
    module: nn.Module
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    extra: dict[str, nn.Module] = field(default_factory=dict)

    def tensors(self, everything: bool) -> dict[str, torch.Tensor]:
        """What this rank holds, by name, aliasing the model.

        Args:
            everything: also what is equal on all ranks because nothing shards it. To save, rank 0 is enough.
        """
        out: dict[str, torch.Tensor] = {}
        for name, p in self.parameters.items():
            mine = held(p)
            if mine is not None and p.numel():
                out[name] = Slices(mine.shape, mine.dtype, mine.device, mine.pieces)
            elif everything or isinstance(p, DTensor):
                out[name] = torch.empty(mine.shape, dtype=mine.dtype) if mine is not None else p.detach()
        if everything:
            out.update({name: b.detach() for name, b in self.buffers.items()})
        return out

    @property
    def strategy(self) -> str:
        units = units_of(self.module)
        return str(units[0].strategy) if units else "none"

    def buffers_crc(self) -> int:
        """Of this rank's buffers, to see whether they differ between ranks."""
        crc = 0
        for b in self.buffers.values():
            crc = zlib.crc32(_bytes(b), crc)
        return crc


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def model_states(models: Sequence[nn.Module]) -> list[ModelState]:
    """Name everything in ``models``.

    Raises:
        CheckpointError: a parameter on the meta device; one model twice.
    """
    out: list[ModelState] = []
    for i, model in enumerate(models):
        state = ModelState("model" if i == 0 else f"model_{i}", unwrapped(model))
        if any(state.module is other.module for other in out):
            raise CheckpointError(f"{type(state.module).__name__} was given twice", where=state.label)
        first: dict[int, str] = {}
        for entry in entries(state.module):
            if entry.kind == "extra":
                state.extra[entry.name] = entry.owner
                continue
            if entry.value.is_meta:
                raise CheckpointError(
                    "is on the meta device and has no values",
                    where=f"{entry.kind} '{entry.name}' of {state.label}",
                    fix="materialise the model first",
                )
            if id(entry.value) in first:
                state.aliases[entry.name] = first[id(entry.value)]
                continue
            first[id(entry.value)] = entry.name
            (state.parameters if entry.kind == "parameter" else state.buffers)[entry.name] = entry.value
        out.append(state)
    return out


def parameter_labels(states: Sequence[ModelState]) -> dict[int, tuple[str, str]]:
    """By ``id`` of a parameter: what optimizers call it in the checkpoint, and its own key."""
    out: dict[int, tuple[str, str]] = {}
    for i, state in enumerate(states):
        for name, p in state.parameters.items():
            out.setdefault(id(p), (name if i == 0 else f"{state.label}:{name}", f"{state.label}.{name}"))
    return out
