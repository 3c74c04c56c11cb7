"""Names of ``accelerate.utils.fsdp_utils``. What saves and loads FSDP's own folders is refused where it is called."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from shardwise.compat.refused_names import refused_when_called

__all__ = [
    "get_parameters_from_modules",
    "load_fsdp_model",
    "load_fsdp_optimizer",
    "merge_fsdp_weights",
    "save_fsdp_model",
    "save_fsdp_optimizer",
]


def get_parameters_from_modules(
    modules: Iterable[nn.Module] | str | None, model: nn.Module, device: torch.device | str | int
) -> set[nn.Parameter]:
    """The parameters of some modules.

    Args:
        modules: these; or a regular expression for the whole names of modules of ``model``, which are moved to
            ``device``; or ``None`` for none.
    """
    if modules is None:
        return set()
    if isinstance(modules, str):
        pattern = re.compile(modules)
        modules = [module.to(device) for name, module in model.named_modules() if pattern.fullmatch(name)]
    return {parameter for module in modules for parameter in module.parameters()}


_HOW = "use accelerator.save_state, load_state and save_model"
save_fsdp_model: Any = refused_when_called("save_fsdp_model", _HOW)
load_fsdp_model: Any = refused_when_called("load_fsdp_model", _HOW)
save_fsdp_optimizer: Any = refused_when_called("save_fsdp_optimizer", _HOW)
load_fsdp_optimizer: Any = refused_when_called("load_fsdp_optimizer", _HOW)
merge_fsdp_weights: Any = refused_when_called("merge_fsdp_weights", "use 'shardwise checkpoint export'")
