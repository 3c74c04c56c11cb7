"""Who takes part: one way to train the same model per library and ZeRO stage.

Each library runs as its documentation recommends, and where a setting trades memory for nothing here, with the
better value: DDP is entered with and without ``gradient_as_bucket_view``, ZeroRedundancyOptimizer keeps
its parameters as bucket views, DeepSpeed's buckets are as large as a block instead of 2 GB.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gpt import BLOCKS, Setting, loss_of, make_model

LEARNING_RATE = 3e-4


class Trainer:
    """One contender's model and optimizer.

    A *turn* is one training step, begun at the optimizer: update with the gradients of the turn before,
    then forward and backward. Whatever a library starts in ``step()`` and finishes under the next forward
    is thus paid for in its own turn, and nothing is under way when the next contender's turn begins.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.turns = 0

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def turn(self, ids: torch.Tensor) -> float:
        if self.turns:
            self.update()
        self.turns += 1
        loss = loss_of(self.model, ids)
        self.backward(loss)
        return loss.item()


class DeepSpeedTrainer(Trainer):
    def update(self) -> None:
        self.model.step()

    def backward(self, loss: torch.Tensor) -> None:
        self.model.backward(loss)


@dataclass(frozen=True)
class Contender:
    """A library at a ZeRO stage.

    Attributes:
        key: short name for ``--contenders``.
        label: name in tables and plots.
        stage: the preset of Shardwise's that splits the same states.
        build: makes the trainer; collective.
    """

    key: str
    label: str
    stage: str
    build: Callable[[Setting], Trainer]

    @property
    def library(self) -> str:
        return {"sw": "Shardwise", "ds": "DeepSpeed"}.get(self.key.split("-")[0], "PyTorch")

    @property
    def imports(self) -> list[str]:
        """Modules that its library imports late."""
        own = {"Shardwise": ["shardwise.fsdp"], "PyTorch": ["torch.distributed.fsdp"]}.get(self.library, ["deepspeed"])
        return ["torch._dynamo", "torch.distributed.optim", *own]


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LEARNING_RATE, fused=True)


def _plain(setting: Setting) -> Trainer:
    model = make_model(setting.shape)
    return Trainer(model, adamw(model.parameters()))


def _ddp(views: bool) -> Callable[[Setting], Trainer]:
    def build(setting: Setting) -> Trainer:
        model = nn.parallel.DistributedDataParallel(make_model(setting.shape), gradient_as_bucket_view=views)
        return Trainer(model, adamw(model.parameters()))

    return build


def _zero_redundancy(setting: Setting) -> Trainer:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(make_model(setting.shape), gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, lr=LEARNING_RATE, fused=True
    )
    return Trainer(model, optimizer)


def _fsdp1(strategy: str) -> Callable[[Setting], Trainer]:
    def build(setting: Setting) -> Trainer:
        from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        model = FullyShardedDataParallel(
            make_model(setting.shape),
            auto_wrap_policy=ModuleWrapPolicy(BLOCKS),
            sharding_strategy=ShardingStrategy[strategy],
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
        return Trainer(model, adamw(model.parameters()))

    return build


def _fsdp2(reshard: bool, hybrid: bool = False) -> Callable[[Setting], Trainer]:
    def build(setting: Setting) -> Trainer:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        size = dist.get_world_size()
        mesh = (
            init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("replicate", "shard"))
            if hybrid
            else init_device_mesh("cpu", (size,))
        )
        model = make_model(setting.shape)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
        return Trainer(model, adamw(model.parameters()))

    return build


def deepspeed_trainer(
    setting: Setting,
    stage: int,
    *,
    adam: Callable[[Any], torch.optim.Optimizer] = adamw,
    zero: dict[str, Any] | None = None,
    **more: Any,
) -> Trainer:
    """DeepSpeed at a ZeRO stage over gloo.

    Args:
        adam: makes the optimizer.
        zero: more keys of the section ``zero_optimization``.
        more: more keys of the configuration.
    """
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model = make_model(setting.shape)
    block = sum(p.numel() for p in model.blocks[0].parameters())
    config = {
        "train_micro_batch_size_per_gpu": setting.rows,
        "steps_per_print": 1 << 30,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": block,
            "allgather_bucket_size": block,
            # Stage 3 by default keeps a billion gathered elements alive, which is this whole model.
            "stage3_prefetch_bucket_size": block,
            "stage3_max_live_parameters": 2 * block,
            "stage3_max_reuse_distance": block,
            **(zero or {}),
        },
        **more,
    }
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=adam(model.parameters()), config=config)
    return DeepSpeedTrainer(engine, optimizer)


def _deepspeed(stage: int) -> Callable[[Setting], Trainer]:
    def build(setting: Setting) -> Trainer:
        return deepspeed_trainer(setting, stage)

    return build


def _shardwise(strategy: str) -> Callable[[Setting], Trainer]:
    def build(setting: Setting) -> Trainer:
        import shardwise

        model = shardwise.fully_shard(make_model(setting.shape), strategy=strategy)
        return Trainer(model, adamw(model.parameters()))

    return build


CONTENDERS = (
    Contender("plain", "plain torch, one rank", "none", _plain),
    Contender("ddp", "torch DDP", "ddp", _ddp(views=False)),
    Contender("ddp-views", "torch DDP, bucket views", "ddp", _ddp(views=True)),
    Contender("sw-ddp", "shardwise ddp", "ddp", _shardwise("ddp")),
    Contender("zero-opt", "torch ZeroRedundancyOptimizer", "zero1", _zero_redundancy),
    Contender("ds-1", "DeepSpeed ZeRO-1", "zero1", _deepspeed(1)),
    Contender("sw-zero1", "shardwise zero1", "zero1", _shardwise("zero1")),
    Contender("fsdp1-2", "torch FSDP1, shard grad op", "zero2", _fsdp1("SHARD_GRAD_OP")),
    Contender("fsdp2-2", "torch fully_shard, no reshard", "zero2", _fsdp2(reshard=False)),
    Contender("ds-2", "DeepSpeed ZeRO-2", "zero2", _deepspeed(2)),
    Contender("sw-zero2", "shardwise zero2", "zero2", _shardwise("zero2")),
    Contender("fsdp1", "torch FSDP1", "zero3", _fsdp1("FULL_SHARD")),
    Contender("fsdp2", "torch fully_shard", "zero3", _fsdp2(reshard=True)),
    Contender("ds-3", "DeepSpeed ZeRO-3", "zero3", _deepspeed(3)),
    Contender("sw-zero3", "shardwise zero3", "zero3", _shardwise("zero3")),
    Contender("fsdp2-hybrid", "torch fully_shard, hybrid", "hsdp", _fsdp2(reshard=True, hybrid=True)),
    Contender("sw-hsdp", "shardwise hsdp, shard_size=2", "hsdp", _shardwise("hsdp,shard_size=2")),
)


def choose(keys: list[str] | None, nproc: int) -> tuple[list[Contender], list[str]]:
    """Contenders that can run here, and a note on each one that was asked for and cannot."""
    unknown = set(keys or ()) - {c.key for c in CONTENDERS}
    if unknown:
        known = ", ".join(c.key for c in CONTENDERS)
        raise SystemExit(f"no such contender: {', '.join(sorted(unknown))}; there are {known}")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    have_deepspeed = importlib.util.find_spec("deepspeed") is not None
    chosen, notes = [], []
    for c in CONTENDERS:
        if keys is not None and c.key not in keys:
            continue
        if c.stage == "none" and nproc > 1:
            if keys is not None:
                notes.append(f"{c.label} skipped: it is for one rank")
        elif c.stage == "hsdp" and (nproc < 4 or nproc % 2):
            if keys is not None:
                notes.append(f"{c.label} skipped: it needs an even number of at least 4 ranks")
        elif c.library == "DeepSpeed" and not have_deepspeed:
            notes.append(f"{c.label} skipped: deepspeed is not installed")
        else:
            chosen.append(c)
    return chosen, notes
