"""What a training needs to go on, out of a checkpoint: weights, groups of the optimizer, and small state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shardwise.checkpoint.deepspeed_state import COUNTERS
from shardwise.checkpoint.optimizer_state import NUMBERS
from shardwise.checkpoint.source_state import state_of
from shardwise.checkpoint.storage_reader import StorageReader
from shardwise.checkpoint.stored_tensor import Source, Stored
from shardwise.checkpoint.torch_archive import Part
from shardwise.errors import CheckpointError


@dataclass
class Param:
    """A parameter that the optimizer has."""

    name: str
    master: Stored
    state: dict[str, Stored]  # of its shape

    @property
    def numel(self) -> int:
        return self.master.numel

    def line(self, key: str | None) -> Part:
        """Its fp32 weights, or what the optimizer has under a key: zeros if it has nothing."""
        return (self.master if key is None else self.state.get(key)), 0, self.numel


@dataclass
class Group:
    """A group of the optimizer.

    Args:
        values: hyperparameters.
        numbers: state that is one number for the whole group: ``step``.
        keys: of the state that parameters have.
    """

    params: list[Param]
    values: dict[str, Any]
    numbers: dict[str, Any]
    keys: list[str]


@dataclass
class Training:
    """All that a folder is made of.

    Args:
        module: every name of the model, and what is under it.
        groups: of the optimizer.
        frozen, buffers: names of what the optimizer does not have.
        aliases: other names of tied parameters, and the first one.
        state: small state.
    """

    module: dict[str, Stored]
    groups: list[Group]
    frozen: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


def training_of(source: Source, stage: int) -> Training:
    """Of a checkpoint of Shardwise, or a folder of DeepSpeed.

    Args:
        stage: that goes on: under 3, buffers and frozen parameters have to be told apart.

    Raises:
        CheckpointError: it has no optimizer or several, or state that DeepSpeed cannot hold.
    """
    found = state_of(source)
    if found is None:
        raise CheckpointError(
            "only checkpoints of Shardwise and of DeepSpeed have what a training needs to go on",
            where=str(source.path), fix="export the weights: without --format",
        )  # fmt: skip
    common, info = found
    optimizers = common["optimizers"]
    if len(optimizers) != 1 or ("model",) not in source.sections or ("model_1",) in source.sections:
        raise CheckpointError(
            f"holds {len(optimizers)} optimizers; DeepSpeed's folders have one, and one model",
            where=str(source.path), fix="save the model with its optimizer; the weights alone: export without --format",
        )  # fmt: skip
    module = source.sections[("model",)]
    groups = [_group(source, optimizers[0], group, module) for group in optimizers[0]["groups"]]
    out = Training(module, groups, state=_state(common["state"], info))
    first = {id(p.master): p.name for group in groups for p in group.params}
    trained = set(first.values())
    buffers = common.get("buffers", {}).get("model")
    for name, stored in module.items():
        known = first.setdefault(id(stored), name)
        if known != name:
            out.aliases[name] = known
        elif name in trained:
            continue
        elif name in (buffers or ()) or not stored.dtype.is_floating_point:
            out.buffers.append(name)
        elif buffers is None and stage == 3:
            raise CheckpointError(
                f"there is no telling whether '{name}' is a buffer or a frozen parameter: an older version saved it",
                where=str(source.path), fix="load and save it once more, or export --stage 2",
            )  # fmt: skip
        else:
            out.frozen.append(name)
    return out


def _group(
    source: Source, optimizer: Mapping[str, Any], group: Mapping[str, Any], module: Mapping[str, Stored]
) -> Group:
    params: list[Param] = []
    keys: dict[str, None] = {}
    numbers: dict[str, Any] = {}
    with StorageReader() as reader:
        for name in group["params"]:
            if name not in module:
                raise CheckpointError(
                    f"the optimizer has '{name}', and the model does not", where=str(source.path),
                    fix="DeepSpeed's optimizers have parameters of one model only",
                )  # fmt: skip
            if not module[name].numel:
                continue  # DeepSpeed counts it among the frozen ones
            stored = source.sections.get(("optimizer", "state", name), {})
            state: dict[str, Stored] = {}
            for key, kind in optimizer["state"].get(name, {}).items():
                if kind == "none":
                    continue
                if kind == "sliced":
                    state[key], keys[key] = stored[key], None
                    continue
                value = stored[key].values if key in stored and stored[key].values is not None else None
                value = reader.values(stored[key]) if value is None else value
                if value.numel() != 1:
                    raise _cannot(source, f"'{key}' of '{name}' has shape {stored[key].shape}")
                number = NUMBERS[kind][0](value.item()) if kind in NUMBERS else value.reshape(()).clone()
                if float(numbers.setdefault(key, number)) != float(number):
                    raise _cannot(source, f"'{key}' of '{name}' is {float(number):g}, and of others in its group not")
            params.append(Param(name, module[name], state))
    values = {k: v for k, v in group["values"].items() if k not in ("foreach", "fused", "capturable")}
    if "betas" in values:
        values.setdefault("bias_correction", True)  # DeepSpeed's own kinds of Adam look for it
    return Group(params, values, numbers, list(keys))


def _cannot(source: Source, what: str) -> CheckpointError:
    return CheckpointError(
        f"{what}: DeepSpeed has one for all of a group", where=str(source.path),
        fix="export the weights: without --format",
    )  # fmt: skip


def _state(state: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    out = {key: state.get(key, 0) for key in COUNTERS}
    if not out["global_steps"]:
        step = state.get("step", info.get("step", 0))
        out["global_steps"] = step if isinstance(step, int) else 0
    schedulers = state.get("schedulers") or [None]
    out["lr_scheduler"] = state["scheduler"] if "scheduler" in state else schedulers[0]
    client = state.get("client_state")
    return {**(client if isinstance(client, Mapping) else {}), **out}
