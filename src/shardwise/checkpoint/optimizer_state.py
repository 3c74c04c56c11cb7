"""What an optimizer has to save, keyed by parameter names, and how it is put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardwise.checkpoint.model_state import LoadBatch, LoadBatches, Slices
from shardwise.comm import World
from shardwise.engine.attachment import unwrapped
from shardwise.engine.optimizer import attach, optimizer_shard
from shardwise.engine.optimizer_state import PER_PARAMETER, bare_state_dict, put_state
from shardwise.engine.state_dict import Held, held
from shardwise.errors import CheckpointError
from shardwise.tiers.swapped_tensor import fetch, is_swapped

NUMBERS: dict[str, tuple[type, torch.dtype]] = {
    "bool": (bool, torch.bool), "int": (int, torch.int64), "float": (float, torch.float64),
}  # fmt: skip
Kinds = dict[str, dict[str, str]]
"""By parameter and state key: ``sliced`` like the parameter; ``whole``, on the parameter's device or ``whole cpu``;
``bool``, ``int``, ``float`` or ``none``."""


_TELLING = frozenset(
    ["alpha", "beta2_decay", "betas", "etas", "lambd", "lr_decay", "momentum", "momentum_decay", "ns_steps", "rho"]
)
"""Hyperparameters that some of torch's optimizers have and others do not."""


def of_another_kind(optimizer: Optimizer, group: Mapping[str, Any], saved: Mapping[str, Any]) -> str | None:
    """What shows that a group's settings were those of an optimizer of another class, if they were.

    Settings that both have, or that only newer versions have, show nothing.
    """
    mine, theirs = (sorted(_TELLING & values.keys()) for values in (group, saved))
    if not mine or not theirs or set(mine) & set(theirs):
        return None
    return f"the settings have {', '.join(theirs)}, and those of {type(optimizer).__name__} are {', '.join(mine)}"


def _settings(saved: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """By parameter, the settings of the group that it was in."""
    return {label: group["values"] for group in saved["groups"] for label in group["params"]}


@dataclass(frozen=True)
class OptimizerEntry:
    """One parameter of an optimizer, and what this rank holds of it."""

    label: str  # in the optimizer's keys
    key: str  # the parameter's own key, "" if it is in none of the models
    param: nn.Parameter
    mine: Held | None

    @property
    def pieces(self) -> list[tuple[int, int, torch.Tensor]]:
        """``(start, stop, tensor)``; the tensors are the keys of the optimizer's state."""
        return self.mine.pieces if self.mine is not None else [(0, self.param.numel(), self.param)]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.mine.shape if self.mine is not None else self.param.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.mine.dtype if self.mine is not None else self.param.dtype


class OptimizerState:
    """What one optimizer saves or loads.

    Args:
        index: its keys begin with ``optimizer``, ``optimizer_1``, ...
        optimizer: with pieces or plain parameters.
        names: of :func:`~shardwise.checkpoint.model_state.parameter_labels`.

    Raises:
        CheckpointError: it holds a sharded parameter of none of the models.
        OptimizerError: it cannot step on slices.
    """

    def __init__(self, index: int, optimizer: Optimizer, names: Mapping[int, tuple[str, str]]) -> None:
        optimizer = unwrapped(optimizer)
        attach(optimizer)
        self.label, self.optimizer = ("optimizer" if index == 0 else f"optimizer_{index}"), optimizer
        self.groups: list[list[OptimizerEntry]] = []
        for g, group in enumerate(optimizer.param_groups):
            entries = []
            for i, p in enumerate(group["params"]):
                mine = held(p)
                if id(p) not in names and mine is not None:
                    raise CheckpointError(
                        f"holds parameter '{getattr(p, '_shardwise_name', i)}' of a model that is not in models=",
                        where=self.label,
                        fix="save and load the models together with their optimizers",
                    )
                name, key = names.get(id(p), (f"group{g}.{i}", ""))
                entries.append(OptimizerEntry(name, key, p, mine))
            self.groups.append(entries)

    @property
    def entries(self) -> Iterator[OptimizerEntry]:
        return (entry for group in self.groups for entry in group)

    # --- saving ------------------------------------------------------------------------------
    def collect(self) -> tuple[dict[str, dict[str, torch.Tensor]], Kinds]:
        """This rank's state tensors by parameter and key, aliasing the optimizer's, and the kind of each.

        Raises:
            CheckpointError: state of a kind that cannot be saved.
        """
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        kinds: Kinds = {}
        for entry in self.entries:
            states = [self.optimizer.state.get(piece) for _, _, piece in entry.pieces]
            if not states or states[0] is None:
                continue
            writes = entry.mine is not None or World.current().rank == 0 or isinstance(entry.param, DTensor)
            for key, value in states[0].items():
                kind, tensor = self._of(entry, key, value, [s[key] for s in states if s is not None])
                kinds.setdefault(entry.label, {})[key] = kind
                if tensor is not None and writes:
                    tensors.setdefault(entry.label, {})[key] = tensor
            kinds.setdefault(entry.label, {})
        return tensors, kinds

    def _of(
        self, entry: OptimizerEntry, key: str, value: Any, values: Sequence[Any]
    ) -> tuple[str, torch.Tensor | None]:
        if value is None:
            return "none", None
        for kind, (python, dtype) in NUMBERS.items():
            if type(value) is python:
                return kind, torch.tensor(value, dtype=dtype)
        if not isinstance(value, torch.Tensor) or "." in key:
            raise CheckpointError(
                f"its state '{key}' is a {type(value).__name__}, which has no place in a checkpoint",
                where=f"{self.label}, parameter '{entry.label}'",
                fix="optimizer state is saved if it consists of tensors, numbers and None",
            )
        first = entry.pieces[0][2]
        if value.shape == first.shape and key not in PER_PARAMETER:
            if entry.mine is None:
                return "sliced", value.detach()
            parts = [(a, b, v) for (a, b, _), v in zip(entry.pieces, values, strict=True)]
            if all(v.is_contiguous() for v in values):
                return "sliced", Slices(entry.shape, value.dtype, value.device, parts)
        if value.dim() and entry.mine is not None and not entry.mine.whole:
            raise CheckpointError(
                f"its state '{key}' has shape {tuple(value.shape)} for a slice of shape {tuple(first.shape)}",
                where=f"{self.label}, parameter '{entry.label}'",
                fix="shard with layout=tensor",
            )
        value = fetch(value)
        off = value.device.type == "cpu" and first.device.type != "cpu"
        return "whole cpu" if off else "whole", value.detach()

    def plain(self) -> dict[str, Any]:
        """Hyperparameters by group with the names of its parameters, and what else its state dict has."""
        groups = []
        for group, entries in zip(self.optimizer.param_groups, self.groups, strict=True):
            values = {k: v for k, v in group.items() if k != "params"}
            groups.append({"params": [s.label for s in entries], "values": values})
        named = {k: v for k, v in self.optimizer.state.items() if not isinstance(k, torch.Tensor)}
        extra = {k: v for k, v in bare_state_dict(self.optimizer).items() if k not in ("state", "param_groups")}
        return {"groups": groups, "named": named, "extra": extra}

    # --- loading -----------------------------------------------------------------------------
    def differences(self, saved: Mapping[str, Any], metadata: Metadata) -> list[str]:
        """What of this optimizer does not fit the checkpoint, one line each."""
        if strange := self._of_another_kind(saved):
            return [f"{self.label}: {strange}"]
        out = []
        known = {label: g for g, group in enumerate(saved["groups"]) for label in group["params"]}
        mine = {entry.label for entry in self.entries}
        out += [f"{self.label}: parameter '{label}' is not in the checkpoint" for label in mine - known.keys()]
        out += [f"{self.label}: parameter '{label}' is in the checkpoint only" for label in known.keys() - mine]
        for g, entries in enumerate(self.groups):
            if len({known[s.label] for s in entries if s.label in known}) > 1:
                out.append(f"{self.label}: the parameters of group {g} are in several groups of the checkpoint")
        for entry in self.entries:
            out += self._misfits(entry, saved["state"].get(entry.label, {}), metadata)
        return sorted(out)

    def _of_another_kind(self, saved: Mapping[str, Any]) -> str | None:
        groups = _settings(saved)
        for group, entries in zip(self.optimizer.param_groups, self.groups, strict=True):
            for values in (groups[s.label] for s in entries if s.label in groups):
                if strange := of_another_kind(self.optimizer, group, values):
                    return strange
        return None

    def _misfits(self, entry: OptimizerEntry, kinds: Mapping[str, str], metadata: Metadata) -> list[str]:
        out = []
        for key, kind in kinds.items():
            found: Any = metadata.state_dict_metadata.get(f"{self.label}.state.{entry.label}.{key}")
            if found is None and kind != "none":
                out.append(f"{self.label}: '{key}' of '{entry.label}' is missing")
            elif kind == "sliced" and tuple(found.size) != entry.shape:
                out.append(f"{self.label}: '{key}' of '{entry.label}' has shape {tuple(found.size)}, not {entry.shape}")
        return out

    def plan(self, saved: Mapping[str, Any], metadata: Metadata, batches: LoadBatches) -> None:
        """Say what is to be filled from the checkpoint, and what to do then.

        Parameters that the checkpoint does not have keep their state; those that had none there lose it. All keep it
        if it is the checkpoint of an optimizer of another class.
        """
        if self._of_another_kind(saved):
            return
        groups = _settings(saved)
        offloaded: dict[int, Held] = {}
        for group, entries in zip(self.optimizer.param_groups, self.groups, strict=True):
            fitting = [groups[s.label] for s in entries if s.label in groups]
            if fitting:
                batches.rest.after.append(partial(_set_values, group, fitting[0]))
            for entry in entries:
                if entry.label in groups:
                    hyper = {**group, **groups[entry.label]}
                    self._plan(entry, saved["state"].get(entry.label), hyper, metadata, batches.of(entry.mine))
                if entry.mine is not None and entry.mine.bucket.home is not None:
                    offloaded[id(entry.mine.bucket)] = entry.mine
        for mine in offloaded.values():
            state_of = optimizer_shard(self.optimizer, mine.bucket)
            batches.of(mine).after.append(partial(state_of.flush, self.optimizer.state))
        if saved["named"]:
            batches.rest.after.append(lambda: self.optimizer.state.update(saved["named"]))
        if saved["extra"]:  # only its own load_state_dict knows what to do with it
            batches.rest.after.append(
                lambda: self.optimizer.load_state_dict({**self.optimizer.state_dict(), **saved["extra"]})
            )

    def _plan(
        self,
        entry: OptimizerEntry,
        kinds: Mapping[str, str] | None,
        hyper: Mapping[str, Any],
        metadata: Metadata,
        batch: LoadBatch,
    ) -> None:
        pieces = [piece for _, _, piece in entry.pieces]
        if kinds is None:
            batch.after += [partial(self._put, entry, piece, None) for piece in pieces]
            return
        if self._misfits(entry, kinds, metadata):
            return  # with strict=False: keeps the state it has
        new: list[dict[str, Any]] = [{} for _ in pieces]
        for key, kind in kinds.items() if pieces else ():
            name = f"{self.label}.state.{entry.label}.{key}"
            found: Any = metadata.state_dict_metadata.get(name)
            if kind == "none":
                for state in new:
                    state[key] = None
            elif kind == "sliced":
                dtype = self._dtype(entry, found.properties.dtype, metadata)
                for state, piece in zip(new, pieces, strict=True):
                    state[key] = self._tensor(piece, key, dtype)
                if entry.mine is None:
                    batch.tensors[name] = new[0][key]
                else:
                    parts = [(a, b, s[key]) for (a, b, _), s in zip(entry.pieces, new, strict=True)]
                    batch.tensors[name] = Slices(entry.shape, dtype, entry.mine.device, parts)
            else:
                batch.tensors[name] = read = torch.empty(found.size, dtype=found.properties.dtype)
                for state, piece in zip(new, pieces, strict=True):
                    state[key] = None  # keeps the order of keys
                    device = _device(key, kind, hyper, piece)
                    batch.after.append(partial(_fill, state, key, read, kind, device))
        batch.after += [partial(self._put, entry, piece, state) for piece, state in zip(pieces, new, strict=True)]

    def _tensor(self, piece: torch.Tensor, key: str, dtype: torch.dtype) -> torch.Tensor:
        """The state tensor that is there in memory, or a new one: loading in place needs no second copy."""
        old = (self.optimizer.state.get(piece) or {}).get(key)
        if (
            isinstance(old, torch.Tensor)
            and not is_swapped(old)
            and old.shape == piece.shape
            and old.dtype == dtype
            and old.is_contiguous()
        ):
            return old
        return torch.empty(piece.shape, dtype=dtype, device=piece.device)  # takes memory when it is filled

    def _dtype(self, entry: OptimizerEntry, saved: torch.dtype, metadata: Metadata) -> torch.dtype:
        """State of the parameter's own dtype follows it; other state (8 bit, or fp32 beside bf16) stays as it is."""
        param: Any = metadata.state_dict_metadata.get(entry.key)
        return entry.dtype if param is not None and param.properties.dtype == saved else saved

    def _put(self, entry: OptimizerEntry, piece: torch.Tensor, state: dict[str, Any] | None) -> None:
        if entry.mine is not None:
            put_state(self.optimizer, entry.mine.bucket, piece, state)
        elif state is None:
            self.optimizer.state.pop(piece, None)
        else:
            self.optimizer.state[piece] = state


def _set_values(group: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        old = group.get(key)
        if isinstance(value, torch.Tensor) and isinstance(old, torch.Tensor):
            group[key] = value.to(old.device)
        else:
            group[key] = value


def _device(key: str, kind: str, hyper: Mapping[str, Any], piece: torch.Tensor) -> torch.device:
    """Where torch's optimizers want a per-parameter value: on the CPU, unless their kernels read it."""
    if hyper.get("capturable") or hyper.get("fused"):
        return piece.device
    return torch.device("cpu") if key in PER_PARAMETER or kind == "whole cpu" else piece.device


def _fill(state: dict[str, Any], key: str, read: torch.Tensor, kind: str, device: torch.device) -> None:
    state[key] = NUMBERS[kind][0](read.item()) if kind in NUMBERS else read.to(device, copy=True)
