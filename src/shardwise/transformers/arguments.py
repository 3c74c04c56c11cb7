"""``TrainingArguments`` with a strategy; devices and DeepSpeed's configuration without Accelerate and DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch

from shardwise.state import PartialState


@dataclass
class ShardwiseArguments:
    """Comes before a class of training arguments: ``class MyConfig(ShardwiseArguments, SFTConfig)``.

    Args:
        strategy: a preset or its string form, ``"zero3,param_dtype=bf16"``. In place of ``fsdp=`` and ``deepspeed=``,
            which are translated into one. The launcher's (``shardwise launch --strategy``) wins over it; ``ddp`` where
            nobody says anything.

    The process group is the launcher's or, for one process, none. One process has one device: a model is never copied
    to several by ``torch.nn.DataParallel``.
    """

    strategy: str | None = field(
        default=None,
        metadata={"help": "How training state is spread over the ranks: ddp, zero1, zero2, zero3, 'zero3,...'."},
    )

    def __post_init__(self) -> None:
        given: Any = getattr(self, "deepspeed", None)
        self.deepspeed: Any = None  # transformers would ask for the package, and start it
        super().__post_init__()  # type: ignore[misc]
        self.deepspeed = given

    @cached_property
    def _setup_devices(self) -> torch.device:
        args: Any = self
        state = PartialState(cpu=args.use_cpu, backend=args.ddp_backend, timeout=timedelta(seconds=args.ddp_timeout))
        args.distributed_state = state
        args._n_gpu = 0 if state.device.type == "cpu" else 1
        return state.device
