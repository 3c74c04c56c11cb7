"""What ranks have to be given alike: otherwise they wait for messages of each other that never come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from shardwise.deepspeed_config import DsFacts
from shardwise.errors import ConfigError

_PER_RANK = ("nvme_path", "pin_memory")  # may be each host's own


def what_must_agree(
    model: nn.Module, optimizer: Optimizer | None, scheduler: Any, facts: DsFacts, batch: tuple[int, int, int]
) -> dict[str, str]:
    """Of this rank, by the names that a message has for them. No values of parameters."""
    groups = [] if optimizer is None else optimizer.param_groups
    strategy = {name: value for name, value in facts.strategy_arguments().items() if name not in _PER_RANK}
    return {
        "the model": f"a {type(model).__name__} of {sum(p.numel() for p in model.parameters())} parameters in "
        f"{sum(1 for _ in model.parameters())} tensors",
        "the batch sizes": " = ".join([str(batch[0]), " * ".join(map(str, batch[1:])) + " * ranks"]),
        "zero_optimization and precision": ", ".join(f"{name}={value}" for name, value in strategy.items()),
        "gradient_clipping": str(facts.clipping),
        "managed_gradient_accumulation": str(facts.managed_accumulation),
        "the loss scale": str(facts.loss_scale),
        "the check for overflows": str(facts.check_overflow),
        "the sum of gradients": f"{facts.reduce_op}, {facts.prescale}",
        "the optimizer": f"{type(optimizer).__name__} with groups of {[len(group['params']) for group in groups]}",
        "the scheduler": type(scheduler).__name__,
    }


def check_agreement(said: Sequence[dict[str, str]]) -> None:
    """Raise if they differ.

    Args:
        said: :func:`what_must_agree` of every rank, in rank order.

    Raises:
        ConfigError: on every rank alike.
    """
    for rank, its in enumerate(said):
        for name, value in its.items():
            if value != said[0][name]:
                raise ConfigError(
                    f"ranks were given different things: {name} of rank 0 is {said[0][name]}, of rank {rank} {value}",
                    where="initialize",
                    fix="give every rank the same model, optimizer and configuration",
                )
