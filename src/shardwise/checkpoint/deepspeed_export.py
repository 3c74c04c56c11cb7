"""Our own checkpoints, and folders of DeepSpeed, written as folders that DeepSpeed resumes from."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from shardwise.checkpoint.conversion import check
from shardwise.checkpoint.coordination import Progress
from shardwise.checkpoint.deepspeed_state import COUNTERS, ENGINE
from shardwise.checkpoint.deepspeed_training import Group, Param, Training, training_of
from shardwise.checkpoint.directory import sync_directory
from shardwise.checkpoint.model_saving import writable
from shardwise.checkpoint.storage_reader import StorageReader
from shardwise.checkpoint.stored_tensor import Stored
from shardwise.checkpoint.torch_archive import Foreign, Joined, Part, write_archive
from shardwise.errors import CheckpointError

VERSION = "0.19.8"
"""The version of DeepSpeed whose folders these are like."""
_ALIGN = 2  # flat groups end at a multiple of this times the ranks
SUB_GROUP = 1_000_000_000
"""DeepSpeed's default of ``sub_group_size``, elements of one rank."""
_SCALER = "deepspeed.runtime.fp16.loss_scaler"


@torch.no_grad()
def export_deepspeed(
    path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    stage: int = 2,
    ranks: int = 1,
    dtype: torch.dtype = torch.float32,
    tag: str | None = None,
    sub_group_size: int = SUB_GROUP,
    progress: bool = True,
) -> Path:
    """Write a checkpoint as a folder that DeepSpeed resumes from, with optimizer state. In one process.

    Args:
        path: a checkpoint of Shardwise with one model and one optimizer; or a folder that DeepSpeed wrote, under
            another stage or on another number of ranks.
        directory: what ``engine.load_checkpoint`` is to be given. Made if it is not there.
        stage: 1, 2 or 3: the ``zero_optimization.stage`` that goes on.
        ranks: how many go on.
        dtype: what the model computes in there: ``torch.float32`` or ``torch.bfloat16``. Optimizer state and masters
            are fp32.
        tag: the folder inside; ``global_step<n>`` by default.
        sub_group_size: for stage 3, as in DeepSpeed's configuration.
        progress: show bars, on a terminal.

    Returns:
        The folder inside ``directory``. ``directory/latest`` names it.

    Raises:
        CheckpointError: damaged; without an optimizer, or with state that DeepSpeed cannot hold; or it cannot be
            written. Nothing is left then.

    Cost: reads a checkpoint of Shardwise twice, to check and to write; weights are written twice, in fp32 and in
    ``dtype``. Host memory: a few blocks of 8 MiB.
    """
    if stage not in (1, 2, 3) or ranks < 1 or sub_group_size < 1:
        raise CheckpointError(f"stage={stage}, ranks={ranks}", fix="stage 1, 2 or 3, and one rank or more")
    if dtype not in (torch.float32, torch.bfloat16):
        raise CheckpointError(f"dtype={dtype} is not served", fix="torch.float32 or torch.bfloat16")
    source, problems = check(path, progress)
    if problems:
        raise CheckpointError(problems[0], where=str(source.path), fix="export another checkpoint")
    training = training_of(source, stage)
    name = tag or f"global_step{training.state['global_steps']}"
    root = Path(os.path.realpath(directory))
    if Path(name).name != name:
        raise CheckpointError(f"tag={name!r} is not a name", fix="leave it out, or give a plain name")
    if (root / name).exists():
        raise CheckpointError("something is there already", where=str(root / name), fix="choose another folder or tag")
    files = dict(_files(training, stage, ranks, dtype, sub_group_size))
    total = sum(_nbytes(nest) for nest in files.values())
    temporary = root / f"{name}.tmp-{uuid.uuid4().hex[:8]}"
    with writable(root), Progress("writing", total, progress) as bar, StorageReader() as reader:
        temporary.mkdir()
        try:
            for file, nest in files.items():
                write_archive(temporary / file, nest, reader, bar.add)
            sync_directory(temporary)
            temporary.rename(root / name)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        latest = root / f".latest.{uuid.uuid4().hex[:8]}"
        latest.write_text(name, encoding="utf-8")
        latest.replace(root / "latest")
        sync_directory(root)
    return root / name


# --- files -----------------------------------------------------------------------------------------------
def _files(
    training: Training, stage: int, ranks: int, dtype: torch.dtype, sub_group_size: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each file's name and contents."""
    groups = [[group.params] for group in training.groups]
    if stage == 3:
        groups = [list(_sub_groups(group.params, ranks, sub_group_size)) for group in training.groups]
    bf16 = dtype == torch.bfloat16
    config = {"bf16": {"enabled": bf16}, "zero_optimization": {"stage": stage}}
    shapes = [{p.name: torch.Size(p.master.shape) for p in sub} for subs in groups for sub in subs]
    empty = Joined(dtype, (0,), ())
    whole: dict[int, Joined] = {}
    for rank in range(ranks if stage == 3 else 1):
        module: dict[str, Joined] = {}
        for name, stored in training.module.items():
            if stage == 3 and name not in training.buffers:
                module[name] = empty
            else:
                module[name] = whole.setdefault(id(stored), _whole(stored, dtype))
        frozen = {name: _frozen(training.module[name], stage, rank, ranks, dtype) for name in training.frozen}
        body = {
            "module": module, "buffer_names": training.buffers, "optimizer": None, "param_shapes": shapes,
            "frozen_param_shapes": {name: torch.Size(training.module[name].shape) for name in training.frozen},
            "shared_params": {} if rank else training.aliases, "frozen_param_fragments": frozen, "data_sampler": None,
            "random_ltd": None, "dp_world_size": ranks, "mp_world_size": 1,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1}, "ds_config": config,
            "ds_version": VERSION,
        }  # fmt: skip
        kept = {k: v for k, v in training.state.items() if k not in body and (k not in ENGINE or k in _WRITTEN)}
        prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
        yield f"{prefix}mp_rank_00_model_states.pt", {**body, **kept}
    for rank in range(ranks):
        optim = _partition_3(training, groups, rank, ranks) if stage == 3 else _partition(training, stage, rank, ranks)
        name = f"{'bf16_' if bf16 else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        yield name, {"optimizer_state_dict": optim, "ds_config": config, "ds_version": VERSION}


_WRITTEN = {"lr_scheduler", *COUNTERS}


def _whole(stored: Stored, dtype: torch.dtype) -> Joined:
    kept = dtype if stored.dtype.is_floating_point else stored.dtype
    return Joined(kept, stored.shape, ((stored, 0, stored.numel),))


def _frozen(stored: Stored, stage: int, rank: int, ranks: int, dtype: torch.dtype) -> Joined:
    if stage < 3:
        return _whole(stored, dtype)
    parts = _slice_3((stored, 0, stored.numel), rank, ranks)
    return Joined(dtype, (_length(parts),), parts)


def _scaler() -> Foreign:
    return Foreign(_SCALER, "LossScaler", 1.0, state={"cur_scale": 1.0, "dynamic": False})


def _stage_of(stage: int) -> Foreign:
    return Foreign("deepspeed.runtime.zero.config", "ZeroStageEnum", stage)


def _states(group: Group, flat: Mapping[str, Joined]) -> dict[str, Any]:
    """Of one flat parameter."""
    return {**group.numbers, **flat} if flat or group.numbers else {}


def _base(groups: Sequence[tuple[Group, list[dict[str, Any]]]]) -> dict[str, Any]:
    """What an optimizer's ``state_dict()`` is, whose parameters are flat ones."""
    state: dict[int, Any] = {}
    said = []
    for group, flats in groups:
        numbers = list(range(len(state), len(state) + len(flats)))
        state |= dict(zip(numbers, flats, strict=True))
        said.append({**group.values, "params": numbers})
    return {"state": {i: found for i, found in state.items() if found}, "param_groups": said}


# --- stages 1 and 2 --------------------------------------------------------------------------------------
def _partition(training: Training, stage: int, rank: int, ranks: int) -> dict[str, Any]:
    masters, paddings, mappings, base = [], [], [], []
    for group in training.groups:
        total = sum(p.numel for p in group.params)
        each = -(-total // (_ALIGN * ranks)) * _ALIGN
        lo, hi = rank * each, (rank + 1) * each
        lean = max(0, min(hi, total) - lo)
        masters.append(_flat(group, None, lo, lo + lean))
        paddings.append(each - lean)
        base.append((group, [_states(group, {key: _flat(group, key, lo, hi) for key in group.keys})]))
        fragments, at = {}, 0
        for p in group.params:
            start, stop = max(at, lo), min(at + p.numel, hi)
            if start < stop:
                address = {"numel": stop - start, "start": start - lo}
                made = ("deepspeed.utils.tensor_fragment", "fragment_address", stop - start, start - lo)
                fragments[p.name] = Foreign(*made, state=address)
            at += p.numel
        mappings.append(fragments)
    return {
        "loss_scaler": _scaler(), "dynamic_loss_scale": False, "overflow": False,
        "base_optimizer_state": _base(base), "single_partition_of_fp32_groups": masters,
        "zero_stage": _stage_of(stage), "group_paddings": paddings,
        "param_alignment_paddings": [[0] * len(group.params) for group in training.groups],
        "partition_count": [ranks] * len(training.groups), "ds_version": VERSION, "param_slice_mappings": mappings,
    }  # fmt: skip


def _flat(group: Group, key: str | None, lo: int, hi: int) -> Joined:
    """Elements ``lo:hi`` of a group's parameters end to end, and zeros behind them."""
    parts: list[Part] = []
    at = 0
    for p in group.params:
        start, stop = max(at, lo), min(at + p.numel, hi)
        if start < stop:
            parts.append((p.line(key)[0], start - at, stop - start))
        at += p.numel
    if hi > max(at, lo):
        parts.append((None, 0, hi - max(at, lo)))
    return Joined(torch.float32, (hi - lo,), tuple(parts))


# --- stage 3 ---------------------------------------------------------------------------------------------
def _sub_groups(params: Sequence[Param], ranks: int, limit: int) -> Iterator[list[Param]]:
    """Parameters that are updated together: by what one rank has of them."""
    each = [-(-p.numel // ranks) for p in params]
    if limit >= sum(each):
        yield list(params)
        return
    some: list[Param] = []
    size = 0
    for p, part in zip(params, each, strict=True):
        some.append(p)
        size += part
        if size >= limit:
            yield some
            some, size = [], 0
    if some:
        yield some


def _partition_3(training: Training, groups: Sequence[Sequence[list[Param]]], rank: int, ranks: int) -> Any:
    masters: list[Joined] = []
    base: list[tuple[Group, list[dict[str, Any]]]] = []
    for group, subs in zip(training.groups, groups, strict=True):
        flats = []
        for sub in subs:
            masters.append(_flat_3(sub, None, rank, ranks))
            flats.append(_states(group, {key: _flat_3(sub, key, rank, ranks) for key in group.keys}))
        base.append((group, flats))
    return {
        "zero_stage": _stage_of(3), "loss_scaler": _scaler(), "dynamic_loss_scale": False, "overflow": False,
        "partition_count": ranks, "optimizer_state_dict": _base(base), "fp32_flat_groups": masters,
    }  # fmt: skip


def _flat_3(params: Sequence[Param], key: str | None, rank: int, ranks: int) -> Joined:
    parts = tuple(part for p in params for part in _slice_3(p.line(key), rank, ranks))
    return Joined(torch.float32, (_length(parts),), parts)


def _slice_3(part: Part, rank: int, ranks: int) -> tuple[Part, ...]:
    """A rank's slice of one tensor, filled up with zeros."""
    stored, _, numel = part
    each = -(-numel // ranks)
    lo, hi = min(rank * each, numel), min((rank + 1) * each, numel)
    found: tuple[Part, ...] = ((stored, lo, hi - lo),) if hi > lo else ()
    return (*found, (None, 0, each - (hi - lo))) if hi - lo < each else found


def _length(parts: Sequence[Part]) -> int:
    return sum(length for _, _, length in parts)


def _nbytes(nest: Any, seen: set[int] | None = None) -> int:
    """Of the tensors to be written."""
    seen = set() if seen is None else seen
    if isinstance(nest, Joined):
        new = id(nest) not in seen
        seen.add(id(nest))
        return prod(nest.shape) * nest.dtype.itemsize * new
    if isinstance(nest, Mapping):
        return sum(_nbytes(value, seen) for value in nest.values())
    return sum(_nbytes(value, seen) for value in nest) if isinstance(nest, (list, tuple)) else 0
