"""Folders that DeepSpeed wrote under ZeRO stage 0, 1, 2 or 3: the weights in them, fp32 where there are any.

DeepSpeed's files hold objects of its own classes. They are read without DeepSpeed and without making those objects.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from shardwise.checkpoint.stored_tensor import Segment, Source, Stored
from shardwise.checkpoint.torch_format import StandIn, read_nest
from shardwise.errors import CheckpointError

_CLASSES = frozenset(
    {
        ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
        ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
        ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
        ("deepspeed.utils.tensor_fragment", "fragment_address"),
    }
)
"""What the optimizer's files contain of DeepSpeed's own. Stand-ins take their places."""
_FILE = re.compile(r"(bf16_)?(zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<mp>\d+)_(?P<what>model|optim)_states\.pt")
_FIX = "convert it with DeepSpeed's own tools (zero_to_fp32.py, ds_to_universal), and load what they write"


def is_one(path: Path, names: set[str]) -> bool:
    """Whether a folder is DeepSpeed's: one step's, or the one with several in it."""
    if any(_FILE.fullmatch(name) for name in names):
        return True
    step = _latest(path) if "latest" in names else None
    return step is not None and step.is_dir() and any(_FILE.fullmatch(p.name) for p in step.iterdir())


def _latest(path: Path) -> Path | None:
    with (path / "latest").open("rb") as file:
        tag = file.read(256).decode("utf-8", "replace").strip()
    return path / tag if tag and Path(tag).name == tag else None


def open_folder(path: Path) -> Source:
    """The weights of a folder of DeepSpeed, with the partitions of all ranks put together.

    Raises:
        CheckpointError: a file is missing or damaged; tensor, pipeline or expert parallelism.
    """
    if not any(_FILE.fullmatch(p.name) for p in path.iterdir()):
        path = _latest(path) or path
    files: dict[str, dict[int, Path]] = {"model": {}, "optim": {}}
    for file in sorted(path.iterdir()):
        if match := _FILE.fullmatch(file.name):
            if int(match["mp"]):
                raise CheckpointError("written with tensor parallelism", where=str(path), fix=_FIX)
            files[match["what"]][int(match["rank"] or 0)] = file
        elif file.name.startswith(("layer_", "expert_")):
            raise CheckpointError("written with pipeline or expert parallelism", where=str(path), fix=_FIX)
    for what, found in files.items():
        if found and sorted(found) != list(range(len(found))):
            missing = min(set(range(max(found))) - found.keys())
            raise CheckpointError(f"rank {missing}'s file of {what} states is missing", where=str(path), fix=_FIX)
    if not files["model"]:
        raise CheckpointError("there is no file of model states", where=str(path), fix="use a complete copy")
    folder = _Folder(path, list(files["model"].values()), list(files["optim"].values()))
    return Source(path, "deepspeed", {("module",): folder.weights()}, folder.facts, dict.fromkeys(folder.all, 0))


class _Folder:
    def __init__(self, path: Path, models: Sequence[Path], optims: Sequence[Path]) -> None:
        self.path, self.all = path, [*models, *optims]
        self.models = [self._mapping(read_nest(file, also=_CLASSES), file) for file in models]
        self.optims = [
            self._mapping(self._mapping(read_nest(file, also=_CLASSES), file).get("optimizer_state_dict"), file)
            for file in optims
        ]
        first = self.models[0]
        stage = self.optims[0].get("zero_stage", 0) if self.optims else 0
        self.stage = int(stage.arguments[0]) if isinstance(stage, StandIn) else int(stage)
        self.ranks = len(self.optims) or 1
        counts = self.optims[0].get("partition_count", self.ranks) if self.optims else 1
        expected = max(counts) if isinstance(counts, list) else int(counts)
        if self.ranks != expected:
            raise CheckpointError(
                f"written by {expected} ranks, and {self.ranks} of their files are there", where=str(path),
                fix="fetch the others too",
            )  # fmt: skip
        facts = {"stage": self.stage, "world size": first.get("dp_world_size"), "step": first.get("global_steps")}
        facts["version of DeepSpeed"] = first.get("ds_version")
        self.facts = {k: v for k, v in facts.items() if isinstance(v, (int, str))}

    def _mapping(self, value: Any, file: Path) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise CheckpointError("not a file that DeepSpeed's ZeRO writes", where=str(file), fix=_FIX)
        return value

    def weights(self) -> dict[str, Stored]:
        """Whole tensors by name. Masters in fp32 where the optimizer has them, else what the model computed with."""
        first = self.models[0]
        if any("autoep" in str(key).lower() or (key == "num_experts" and first[key]) for key in first):
            raise CheckpointError("written with expert parallelism", where=str(self.path), fix=_FIX)
        module = self._mapping(first.get("module"), self.all[0])
        known = {str(name): value for name, value in module.items() if isinstance(value, Stored)}
        shapes = self._shapes(first.get("param_shapes") or [])
        out: dict[str, Stored] = {}
        if self.optims and self.stage <= 2:
            out = self._flat(shapes)
        elif self.optims and self.stage == 3:
            out = self._partitioned([item for group in shapes for item in group])
            frozen = self._shapes([first.get("frozen_param_shapes") or {}])[0]
            for name, shape in frozen:
                pieces = [self._fragment(model, name) for model in self.models]
                out[name] = self._joined(name, shape, [(piece, 0, piece.numel) for piece in pieces])
        for alias, name in (first.get("shared_params") or {}).items():
            if str(name) in out:
                out[str(alias)] = out[str(name)]
        if self.stage == 3:
            buffers = {str(name) for name in first.get("buffer_names") or ()}
            known = {name: value for name, value in known.items() if name in buffers}
        order = {str(name): i for i, name in enumerate(module)}
        return dict(sorted({**known, **out}.items(), key=lambda item: order.get(item[0], len(order))))

    def _shapes(self, groups: Any) -> list[list[tuple[str, tuple[int, ...]]]]:
        return [[(str(name), tuple(map(int, shape))) for name, shape in group.items()] for group in groups]

    def _fragment(self, model: Mapping[str, Any], name: str) -> Stored:
        found = (model.get("frozen_param_fragments") or {}).get(name)
        if not isinstance(found, Stored):
            raise CheckpointError(f"the frozen parameter '{name}' is missing", where=str(self.path), fix=_FIX)
        return found

    def _flat(self, shapes: Sequence[Sequence[tuple[str, tuple[int, ...]]]]) -> dict[str, Stored]:
        """Stages 1 and 2: each group's parameters lie end to end, and ranks hold equal slices of that."""
        paddings = self.optims[0].get("param_alignment_paddings") or []
        groups = [self._groups(optim, "single_partition_of_fp32_groups") for optim in self.optims]
        out: dict[str, Stored] = {}
        for g, members in enumerate(shapes):
            if any(len(rank) <= g for rank in groups):
                raise CheckpointError("the optimizer has fewer groups than the model", where=str(self.path), fix=_FIX)
            line = [(rank[g], 0, rank[g].numel) for rank in groups]
            at = 0
            for i, (name, shape) in enumerate(members):
                out[name] = self._joined(name, shape, _cut(line, at, prod(shape)))
                at += prod(shape) + (int(paddings[g][i]) if g < len(paddings) else 0)
        return out

    def _partitioned(self, members: Sequence[tuple[str, tuple[int, ...]]]) -> dict[str, Stored]:
        """Stage 3: each parameter is padded and cut into equal slices, one per rank, which lie end to end there."""
        lines = [[(t, 0, t.numel) for t in self._groups(optim, "fp32_flat_groups")] for optim in self.optims]
        out: dict[str, Stored] = {}
        at = 0
        for name, shape in members:
            each = -(-prod(shape) // self.ranks)
            out[name] = self._joined(name, shape, [piece for line in lines for piece in _cut(line, at, each)])
            at += each
        return out

    def _groups(self, optim: Mapping[str, Any], key: str) -> list[Stored]:
        found = optim.get(key)
        if not isinstance(found, list) or not all(isinstance(t, Stored) and t.segments for t in found):
            raise CheckpointError(f"the optimizer's file has no '{key}'", where=str(self.path), fix=_FIX)
        return found

    def _joined(self, name: str, shape: tuple[int, ...], pieces: Sequence[tuple[Stored, int, int]]) -> Stored:
        """One tensor of slices ``(stored, start, length)``, one behind the other. What is too much is padding."""
        segments: list[Segment] = []
        at, numel = 0, prod(shape)
        for stored, start, length in pieces:
            length = min(length, numel - at)
            if length > 0:
                first = stored.segments[0]
                segments.append(replace(first, start=at, length=length, skip=first.skip + start))
                at += length
        if at != numel or any(stored.segments[0].layout for stored, _, _ in pieces):
            raise CheckpointError(f"parts of '{name}' are missing", where=str(self.path), fix="use a complete copy")
        dtype = pieces[0][0].dtype if pieces else next(iter(self._groups(self.optims[0], "fp32_flat_groups"))).dtype
        return Stored(dtype, shape, tuple(segments))


def _cut(line: Sequence[tuple[Stored, int, int]], at: int, length: int) -> list[tuple[Stored, int, int]]:
    """Elements ``at:at + length`` of slices that lie end to end."""
    out, begin = [], 0
    for stored, start, size in line:
        lo, hi = max(at, begin), min(at + length, begin + size)
        if lo < hi:
            out.append((stored, start + lo - begin, hi - lo))
        begin += size
    return out
