"""What the optimizers of this package share: their arguments, and what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from shardwise import device
from shardwise.errors import ConfigError, OptimizerError

_STEPPED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def no_amsgrad(name: str, amsgrad: bool) -> None:
    """Raises OptimizerError for the variant that DeepSpeed's classes refuse too."""
    if amsgrad:
        raise OptimizerError(f"{name} has no AMSGrad variant", fix="use torch.optim.Adam(..., amsgrad=True)")


def fp32_states_only(name: str, fp32_optimizer_states: bool) -> None:
    """Raises ConfigError if state was asked for in the dtype of parameters below fp32."""
    if not fp32_optimizer_states:
        raise ConfigError(
            f"{name}(fp32_optimizer_states=False) is not served: state has the dtype of the master values",
            fix="leave it out; for state in bf16 build the model in bf16",
        )


def can_fuse(params: Iterable[Any]) -> bool:
    """Has torch one kernel for the whole update of these parameters?"""
    tensors = [p for item in params for p in (item["params"] if isinstance(item, Mapping) else [item])]
    kinds = {"cpu", device.accelerator()}
    return bool(tensors) and all(
        isinstance(p, Tensor) and p.device.type in kinds and p.dtype in _STEPPED for p in tensors
    )


def listed(params: Iterable[Any]) -> list[Any]:
    """Parameters, or groups of them, to be walked several times."""
    found = list(params)
    for i, item in enumerate(found):
        if isinstance(item, Mapping) and not isinstance(item["params"], Tensor):
            found[i] = {**item, "params": list(item["params"])}
        elif isinstance(item, tuple):  # (name, parameter)
            found[i] = item[1]
    return found


class ZeroesAsTold(Optimizer):
    """An optimizer that was told once what ``zero_grad()`` does.

    Attributes:
        set_grad_none: gradients are set to ``None``; ``False``: to zeros.
    """

    set_grad_none: bool = True

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)


def after(closure: Callable[[], Any] | None) -> Any:
    """The closure's loss, if there is one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def by_dtype(
    optimizer: Optimizer, group: dict[str, Any], states: tuple[str, ...]
) -> Iterator[tuple[list[Tensor], list[Tensor], list[list[Tensor]], list[dict[str, Any]]]]:
    """(parameters, gradients, lists of states, states) of a group's parameters that have gradients.

    Of one dtype and device at a time, as vectorised operations want them. States that are not there are made, as zeros.

    Raises:
        OptimizerError: a sparse gradient.
    """
    found: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for p in group["params"]:
        if p.grad is None:
            continue
        if p.grad.is_sparse:
            raise OptimizerError(f"{type(optimizer).__name__} takes no sparse gradients", fix="use torch.optim.SGD")
        found.setdefault((p.dtype, p.device), []).append(p)
    for params in found.values():
        held = [optimizer.state[p] for p in params]
        for state, p in zip(held, params, strict=True):
            for name in states:
                if name not in state:
                    state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        yield params, [p.grad for p in params if p.grad is not None], [[s[n] for s in held] for n in states], held
