"""Who takes part in section *peers*: ZeRO-3 with its states elsewhere, by Shardwise and by DeepSpeed.

DeepSpeed runs as its documentation recommends for offloading: with its own CPU Adam, and on a disk with pipelined reads
and writes of tiles of one block. Several engines live in one process, so each has a folder of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from contenders import LEARNING_RATE, Contender, DeepSpeedTrainer, Trainer, adamw, deepspeed_trainer
from gpt import Setting, make_model


@dataclass(frozen=True)
class OffloadSetting(Setting):
    """``dtype`` to compute in, ``clip`` the gradient's norm at (0: do not), and a ``folder`` on the disk."""

    dtype: str = "fp32"
    clip: float = 1.0
    folder: str = "."


class ClippingTrainer(Trainer):
    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> None:
        super().__init__(model, optimizer)
        self.clip = clip

    def update(self) -> None:
        import shardwise

        if self.clip:
            shardwise.clip_grad_norm_(self.model, self.clip)
        super().update()


def full_strategy(strategy: str, setting: OffloadSetting) -> str:
    """With the setting's dtype and folder."""
    low = f",param_dtype={setting.dtype},reduce_dtype={setting.dtype}" if setting.dtype != "fp32" else ""
    return f"{strategy}{low},nvme_path={setting.folder}"


def _shardwise(strategy: str) -> Callable[[Any], Trainer]:
    def build(setting: OffloadSetting) -> Trainer:
        import shardwise

        model = shardwise.fully_shard(make_model(setting.shape), strategy=full_strategy(strategy, setting))
        optimizer = adamw(model.parameters())
        shardwise.attach(optimizer)  # what updates in backward wants to know it before
        return ClippingTrainer(model, optimizer, setting.clip)

    return build


def _cpu_adam(params: Any) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(params, lr=LEARNING_RATE, weight_decay=1e-2)  # torch's own default decay


def _deepspeed(optimizer: str, params: str | None) -> Callable[[Any], DeepSpeedTrainer]:
    def build(setting: OffloadSetting) -> Trainer:
        model_block = 12 * setting.shape.width**2 + 13 * setting.shape.width
        folder = tempfile.mkdtemp(prefix="deepspeed-", dir=setting.folder) if dist.get_rank() == 0 else None
        box = [folder]
        dist.broadcast_object_list(box)
        zero: dict[str, Any] = {"offload_optimizer": {"device": optimizer, "pin_memory": False}}
        if params is not None:
            zero["offload_param"] = {"device": params, "pin_memory": False}
        if optimizer == "nvme":  # with pipelined reads and writes it stops at fewer buffers: three times four states
            zero["offload_optimizer"] |= {
                "nvme_path": box[0], "pipeline_read": True, "pipeline_write": True, "buffer_count": 12
            }  # fmt: skip
            zero["sub_group_size"] = max(1, model_block // dist.get_world_size())
        if params == "nvme":
            largest = max(model_block, setting.shape.vocab * setting.shape.width)
            zero["offload_param"] |= {
                "nvme_path": box[0], "buffer_size": largest, "buffer_count": 16, "max_in_cpu": 0
            }  # fmt: skip
        more: dict[str, Any] = {"gradient_clipping": setting.clip}
        if setting.dtype == "bf16":
            more["bf16"] = {"enabled": True}
        if "nvme" in (optimizer, params):
            more["aio"] = {"block_size": 4 << 20, "queue_depth": 8, "single_submit": False, "overlap_events": True}
        return deepspeed_trainer(setting, 3, adam=_cpu_adam, zero=zero, **more)

    return build


CPU, CPU_ALL = "optimizer on cpu", "optimizer and parameters on cpu"
NVME, NVME_ALL = "optimizer on nvme", "optimizer and parameters on nvme"
BACKWARD = "optimizer_in_backward=true"
STRATEGIES = {
    "sw-cpu": "zero3,offload_optimizer=cpu",
    "sw-cpu-all": "zero3,offload_optimizer=cpu,offload_params=cpu",
    "sw-nvme": "zero3,offload_optimizer=nvme",
    "sw-nvme-all": "zero3,offload_optimizer=nvme,offload_params=nvme",
    "sw-cpu-backward": f"zero3,offload_optimizer=cpu,{BACKWARD}",
    "sw-nvme-backward": f"zero3,offload_optimizer=nvme,{BACKWARD}",
    "sw-nvme-all-backward": f"zero3,offload_optimizer=nvme,offload_params=nvme,{BACKWARD}",
}


def _ours(key: str, label: str, stage: str) -> Contender:
    return Contender(key, label, stage, _shardwise(STRATEGIES[key]))


CONTENDERS = (
    Contender("ds-cpu", "DeepSpeed", CPU, _deepspeed("cpu", None)),
    _ours("sw-cpu", "shardwise", CPU),
    _ours("sw-cpu-backward", "shardwise, in backward", CPU),
    Contender("ds-cpu-all", "DeepSpeed", CPU_ALL, _deepspeed("cpu", "cpu")),
    _ours("sw-cpu-all", "shardwise", CPU_ALL),
    Contender("ds-nvme", "DeepSpeed", NVME, _deepspeed("nvme", None)),
    _ours("sw-nvme", "shardwise", NVME),
    _ours("sw-nvme-backward", "shardwise, in backward", NVME),
    Contender("ds-nvme-all", "DeepSpeed", NVME_ALL, _deepspeed("nvme", "nvme")),
    _ours("sw-nvme-all", "shardwise", NVME_ALL),
    _ours("sw-nvme-all-backward", "shardwise, in backward", NVME_ALL),
)


def available(strategy: str) -> str:
    """Why this version cannot do it; empty if it can."""
    import shardwise

    try:
        shardwise.Strategy.parse(strategy)
    except shardwise.ShardwiseError as error:
        return " ".join(str(error).split())
    return ""
