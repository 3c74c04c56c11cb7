"""Who takes part in ``gpu.py``: one way to train the same Llama-shaped model per library and home."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from contenders import LEARNING_RATE, Trainer
from llama import SHAPES, Llama, loss_of


@dataclass(frozen=True)
class Job:
    """What every arm trains; ``rows`` x ``length`` tokens per micro-batch, ``accumulate`` of them per step."""

    shape: str = "1b"
    rows: int = 8
    length: int = 4096
    accumulate: int = 1
    steps: int = 6
    loops: int = 3
    device: str = "cuda"
    folder: str = "."

    @property
    def tokens(self) -> int:
        """Per step and rank."""
        return self.rows * self.length * self.accumulate


class LlamaTrainer(Trainer):
    """A step: ``accumulate`` micro-batches, then the optimizer."""

    def step(self, ids: list[torch.Tensor]) -> torch.Tensor:
        for micro in ids:
            loss = loss_of(self.model, micro)
            self.backward(loss / len(ids))
        self.update()
        return loss.detach()


class DeepSpeedLlamaTrainer(LlamaTrainer):
    """Its engine counts micro-batches itself, divides the loss, and steps at the boundary only."""

    def step(self, ids: list[torch.Tensor]) -> torch.Tensor:
        for micro in ids:
            loss = loss_of(self.model, micro)
            self.model.backward(loss)
            self.model.step()
        return loss.detach()


def fresh(job: Job, device: str) -> Llama:
    """The model with its first values, fp32, on a device."""
    torch.manual_seed(0)
    with torch.device(device):
        return Llama(SHAPES[job.shape])


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LEARNING_RATE, fused=True)


def _shardwise(strategy: str) -> Callable[[Job], LlamaTrainer]:
    def build(job: Job) -> LlamaTrainer:
        import shardwise

        full = f"{strategy},param_dtype=bf16,reduce_dtype=bf16,nvme_path={job.folder}"
        torch.manual_seed(0)
        with torch.device("meta"):
            model = Llama(SHAPES[job.shape])
        shardwise.fully_shard(model, strategy=full)
        optimizer = adamw(model.parameters())
        shardwise.attach(optimizer)  # what updates in backward wants to know it before
        return LlamaTrainer(model, optimizer)

    return build


def _fsdp(offload: bool) -> Callable[[Job], LlamaTrainer]:
    def build(job: Job) -> LlamaTrainer:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        size = torch.distributed.get_world_size()
        options: dict[str, Any] = {
            "mesh": init_device_mesh(job.device, (size,)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
        }
        if offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=job.device != "cpu")
        model = fresh(job, "cpu" if offload else job.device)
        for block in model.blocks:
            fully_shard(block, **options)
        fully_shard(model, **options)
        return LlamaTrainer(model, adamw(model.parameters()))

    return build


def _deepspeed(optimizer: str, params: str | None) -> Callable[[Job], LlamaTrainer]:
    def build(job: Job) -> LlamaTrainer:
        import deepspeed
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        pin = job.device != "cpu"
        folder = tempfile.mkdtemp(prefix="deepspeed-", dir=job.folder)
        zero: dict[str, Any] = {
            "stage": 3,
            "overlap_comm": True,
            "offload_optimizer": {"device": optimizer, "pin_memory": pin},
        }
        if optimizer == "nvme":
            zero["offload_optimizer"] |= {
                "nvme_path": folder, "pipeline_read": True, "pipeline_write": True, "buffer_count": 5
            }  # fmt: skip
            zero["sub_group_size"] = 100_000_000
        if params is not None:
            zero["offload_param"] = {"device": params, "pin_memory": pin}
        model = fresh(job, "cpu")
        config = {
            "train_micro_batch_size_per_gpu": job.rows,
            "gradient_accumulation_steps": job.accumulate,
            "steps_per_print": 1 << 30,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": True},
            "zero_optimization": zero,
        }
        made = DeepSpeedCPUAdam(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
        engine, wrapped, _, _ = deepspeed.initialize(model=model, optimizer=made, config=config)
        return DeepSpeedLlamaTrainer(engine, wrapped)

    return build


@dataclass(frozen=True)
class Arm:
    key: str
    label: str
    build: Callable[[Job], LlamaTrainer]


BACKWARD = "optimizer_in_backward=true"
HOMES = {
    "sw-device": "zero3",
    "sw-cpu": "zero3,offload_optimizer=cpu",
    "sw-cpu-backward": f"zero3,offload_optimizer=cpu,{BACKWARD}",
    "sw-cpu-all": "zero3,offload_optimizer=cpu,offload_params=cpu",
    "sw-cpu-all-backward": f"zero3,offload_optimizer=cpu,offload_params=cpu,{BACKWARD}",
    "sw-nvme": "zero3,offload_optimizer=nvme",
    "sw-nvme-backward": f"zero3,offload_optimizer=nvme,{BACKWARD}",
}
ARMS = (
    Arm("sw-device", "shardwise, no offload", _shardwise(HOMES["sw-device"])),
    Arm("fsdp-device", "torch fully_shard, no offload", _fsdp(offload=False)),
    Arm("sw-cpu", "shardwise, optimizer on cpu", _shardwise(HOMES["sw-cpu"])),
    Arm("sw-cpu-backward", "shardwise, optimizer on cpu, in backward", _shardwise(HOMES["sw-cpu-backward"])),
    Arm("ds-cpu", "DeepSpeed ZeRO-3, optimizer on cpu", _deepspeed("cpu", None)),
    Arm("sw-cpu-all", "shardwise, optimizer and parameters on cpu", _shardwise(HOMES["sw-cpu-all"])),
    Arm("sw-cpu-all-backward", "the same, in backward", _shardwise(HOMES["sw-cpu-all-backward"])),
    Arm("fsdp-cpu", "torch fully_shard, CPUOffloadPolicy", _fsdp(offload=True)),
    Arm("ds-cpu-all", "DeepSpeed ZeRO-3, optimizer and parameters on cpu", _deepspeed("cpu", "cpu")),
    Arm("sw-nvme", "shardwise, optimizer on nvme", _shardwise(HOMES["sw-nvme"])),
    Arm("sw-nvme-backward", "shardwise, optimizer on nvme, in backward", _shardwise(HOMES["sw-nvme-backward"])),
    Arm("ds-nvme", "DeepSpeed ZeRO-3, optimizer on nvme", _deepspeed("nvme", None)),
)
