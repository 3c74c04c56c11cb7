"""Folders in DeepSpeed's layout, without DeepSpeed: from a plain model and its plain optimizer.

Written with ``torch.save`` from whole tensors, by what DeepSpeed's own files hold; a test compares the two where
DeepSpeed is installed.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections import OrderedDict

import torch

VERSION = "0.19.8"


@contextlib.contextmanager
def classes():
    """Modules that have what the files ask for: pickling looks for it there."""
    made = {name: types.ModuleType(name) for name in (
        "deepspeed", "deepspeed.runtime", "deepspeed.runtime.fp16", "deepspeed.runtime.fp16.loss_scaler",
        "deepspeed.runtime.zero", "deepspeed.runtime.zero.config", "deepspeed.utils", "deepspeed.utils.tensor_fragment",
    )}  # fmt: skip

    def new(module, name, base=None):
        cls = type(name, (base or _Anything,), {"__module__": module})
        setattr(made[module], name, cls)
        return cls

    found = types.SimpleNamespace(
        LossScaler=new("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
        DynamicLossScaler=new("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
        fragment_address=new("deepspeed.utils.tensor_fragment", "fragment_address"),
        Stage=new("deepspeed.runtime.zero.config", "ZeroStageEnum", _Stage),
    )
    old = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield found
    finally:
        for name, module in old.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class _Anything:
    def __init__(self, *arguments):
        """Whatever it is made with."""


class _Stage:
    def __init__(self, value):
        self.value = value

    def __reduce__(self):
        return type(self), (self.value,)


def named_groups(model, optimizer):
    names = {id(p): name for name, p in model.named_parameters()}
    return [[(names[id(p)], p) for p in group["params"] if p.numel()] for group in optimizer.param_groups]


def sub_groups(groups, ranks, limit):
    """Stage 3: each group's parameters, in runs of at least ``limit`` elements of one rank."""
    out, owners = [], []
    for g, members in enumerate(groups):
        some, size = [], 0
        for i, (name, p) in enumerate(members):
            some.append((name, p))
            size += -(-p.numel() // ranks)
            if size >= limit or i == len(members) - 1:
                out.append(some)
                owners.append(g)
                some, size = [], 0
    return out, owners


def padded(flat, multiple):
    return torch.cat([flat, flat.new_zeros(-flat.numel() % multiple)])


def split_1(tensors, ranks):
    """Stages 1 and 2: end to end, and cut into equal slices."""
    return list(padded(torch.cat([t.reshape(-1) for t in tensors]), 2 * ranks).chunk(ranks))


def split_3(tensors, ranks):
    """Stage 3: each tensor is cut, and a rank's slices stand end to end."""
    pieces = [padded(t.reshape(-1), ranks).view(ranks, -1) for t in tensors]
    return [torch.cat([piece[r] for piece in pieces]) for r in range(ranks)]


def write(root, model, optimizer, stage, ranks, *, dtype=torch.float32, universal=False, elastic=False, limit=10**9,
          scaler=None, scheduler=None, client=None, masters=None, group_step=False, tag="global_step2"):  # fmt: skip
    """What ``engine.save_checkpoint(root, tag, client)`` leaves behind.

    ``scaler``: attributes of a dynamic loss scale. ``elastic``: the old form of optimizer state. ``group_step``: the
    optimizer counts in its groups, as apex's does.
    """
    folder = root / tag
    folder.mkdir(parents=True)
    (root / ("latest_universal" if universal else "latest")).write_text(tag)
    groups = named_groups(model, optimizer)
    keys = sorted({k for s in optimizer.state.values() for k, v in s.items() if torch.is_tensor(v) and v.dim()})
    subs, owners = sub_groups(groups, ranks, limit) if stage == 3 else (groups, list(range(len(groups))))
    split = split_3 if stage == 3 else split_1
    values = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    steps = [optimizer.state[members[0][1]].get("step") for members in subs]
    if group_step:
        values = [{**v, "step": int(step)} for v, step in zip(values, steps, strict=True)]
        steps = [None] * len(steps)
    fp32 = [split([p.detach() for _, p in members], ranks) for members in subs]
    flat = [{k: split([optimizer.state[p][k] for _, p in members], ranks) for k in keys} for members in subs]
    with classes() as known:
        common = _common(known, stage, ranks, len(groups), scaler)
        low = _state(model, dtype)
        body = {
            "module": OrderedDict(low), "buffer_names": [name for name, _ in model.named_buffers()], "optimizer": None,
            "param_shapes": [OrderedDict((name, p.shape) for name, p in members) for members in subs],
            "frozen_param_shapes": None, "shared_params": _shared(model), "frozen_param_fragments": None,
            "lr_scheduler": scheduler, "data_sampler": None, "random_ltd": None, "skipped_steps": 1, "global_steps": 2,
            "global_samples": 8, "dp_world_size": ranks, "mp_world_size": 1,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
            "ds_config": {"zero_optimization": {"stage": stage}}, "ds_version": VERSION, **(client or {}),
        }  # fmt: skip
        frozen = {name: p for name, p in model.named_parameters() if not (p.requires_grad and p.numel())}
        if stage == 0:
            body |= {"optimizer": _stage_0(optimizer, groups, scaler, masters), "param_shapes": None}
        if stage >= 2:
            body["frozen_param_shapes"] = OrderedDict((name, p.shape) for name, p in frozen.items())
        for r in range(ranks if stage == 3 else 1):
            mine = {**body, **({"shared_params": {}} if r else {})}  # rank 0 alone looks for them
            if stage >= 2:
                kept = {n: (split_3([p.detach()], ranks)[r] if stage == 3 else p.detach()) for n, p in frozen.items()}
                mine["frozen_param_fragments"] = OrderedDict((n, t.to(dtype).clone()) for n, t in kept.items())
            if stage == 3:
                buffers = set(body["buffer_names"])
                mine["module"] = OrderedDict((n, v if n in buffers else v.new_empty(0)) for n, v in low.items())
            torch.save(mine, folder / f"{f'zero_pp_rank_{r}_' if stage == 3 else ''}mp_rank_00_model_states.pt")
        base_groups = [{**v, "params": [i for i, o in enumerate(owners) if o == g]} for g, v in enumerate(values)]
        if universal:
            _universal(folder, subs, steps, optimizer, keys, {**common, "param_groups": base_groups}, stage)
            return folder
        for r in range(ranks if stage else 0):
            state = {i: {**({} if steps[i] is None else {"step": steps[i]}), **{k: flat[i][k][r].clone() for k in keys}}
                     for i in range(len(subs)) if keys or steps[i] is not None}  # fmt: skip
            base = {"state": state, "param_groups": base_groups}
            if stage == 3:
                optim = {**common, "optimizer_state_dict": base, "fp32_flat_groups": [f[r].clone() for f in fp32]}
            else:
                totals = [sum(p.numel() for _, p in members) for members in subs]
                lean = [_lean(f[r], r, total) for f, total in zip(fp32, totals, strict=True)]
                paddings = [f[r].numel() - t.numel() for f, t in zip(fp32, lean, strict=True)]
                optim = {**common, "base_optimizer_state": base, "group_paddings": paddings}
                optim["single_partition_of_fp32_groups"] = lean
                if elastic:
                    sizes = [t.numel() for t in lean]
                    optim["base_optimizer_state"] = [
                        {k: v[: sizes[i]] if v.dim() else v for k, v in s.items()} for i, s in state.items()
                    ]
            name = f"{'bf16_' if dtype == torch.bfloat16 else ''}zero_pp_rank_{r}_mp_rank_00_optim_states.pt"
            torch.save({"optimizer_state_dict": optim, "ds_config": {}, "ds_version": VERSION}, folder / name)
    return folder


def _lean(part, rank, total):
    return part[: max(0, min(part.numel(), total - rank * part.numel()))]


def _state(model, dtype):
    """Tied tensors stay tied."""
    made = {}
    for value in model.state_dict().values():
        low = value.detach().to(dtype) if value.is_floating_point() else value.detach()
        made.setdefault(value.data_ptr(), low)
    return {name: made[value.data_ptr()] for name, value in model.state_dict().items()}


def _shared(model):
    first, out = {}, {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(p), name) != name:
            out[name] = first[id(p)]
    return out


def _common(known, stage, ranks, count, scaler):
    found = (known.LossScaler if scaler is None else known.DynamicLossScaler)()
    found.__dict__.update(scaler or {"cur_scale": 1.0, "dynamic": False})
    return {
        "loss_scaler": found, "dynamic_loss_scale": scaler is not None, "overflow": False, "clip_grad": 1.0,
        "zero_stage": known.Stage(stage), "partition_count": ranks if stage == 3 else [ranks] * count,
        **({"ds_version": VERSION} if stage < 3 else {}),
    }  # fmt: skip


def _stage_0(optimizer, groups, scaler, masters):
    """``masters``: ``"flat"``, ``"whole"`` or nothing, as its optimizers for fp16, for others, and for fp32 do."""
    if masters is None:
        return optimizer.state_dict()
    scale = scaler or {"cur_scale": 1.0}
    out = {"dynamic_loss_scale": scaler is not None, **{k: v for k, v in scale.items() if k != "dynamic"}}
    if masters == "whole":
        weights = [[p.detach() for _, p in members] for members in groups]
        return {**out, "optimizer_state_dict": optimizer.state_dict(), "fp32_groups": weights}
    state = {}
    for g, members in enumerate(groups):
        one = optimizer.state[members[0][1]]
        state[g] = {k: torch.cat([optimizer.state[p][k].reshape(-1) for _, p in members]) if v.dim() else v
                    for k, v in one.items()}  # fmt: skip
    said = [{**group, "params": [i]} for i, group in enumerate(optimizer.param_groups)]
    weights = [torch.cat([p.detach().reshape(-1) for _, p in members]) for members in groups]
    return {**out, "optimizer_state_dict": {"state": state, "param_groups": said}, "fp32_groups_flat": weights}


def _universal(folder, subs, steps, optimizer, keys, common, stage):
    for i, members in enumerate(subs):
        for name, p in members:
            place = folder / "zero" / name
            place.mkdir(parents=True)
            for key in ("fp32", *keys):
                value = p.detach() if key == "fp32" else optimizer.state[p][key]
                value = value.reshape(-1).clone() if stage == 3 else {"cat_dim": 0, "param": value.clone()}
                torch.save(value, place / f"{key}.pt")
            if stage < 3 and steps[i] is not None:
                torch.save(steps[i], place / "step.pt")
    inner = {"state": {i: {"step": step} for i, step in enumerate(steps)}, "param_groups": common["param_groups"]}
    more = {"optimizer_state_dict": inner} if stage == 3 else {}
    torch.save({**common, **more}, folder / "zero" / "optimizer_state.pt")
