"""Parameters that a module uses and another one owns."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shardwise.errors import ArgumentError

_EXTERNAL = "_external_params"


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Say that ``module.forward`` uses a parameter of another module.

    Nothing depends on it here: whoever reads a parameter inside a forward or a backward of the model has its values.
    It is noted, so that :func:`unregister_external_parameter` and scripts that look find it.

    Raises:
        ArgumentError: something else than a module and a parameter.
    """
    _require(module, parameter)
    found: dict[int, nn.Parameter] = vars(module).setdefault(_EXTERNAL, {})
    found[id(parameter)] = parameter


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Undo :func:`register_external_parameter`.

    Raises:
        ArgumentError: it was not registered.
    """
    _require(module, parameter)
    if vars(module).get(_EXTERNAL, {}).pop(id(parameter), None) is None:
        raise ArgumentError(
            f"the parameter is not registered with this {type(module).__name__}",
            fix="call register_external_parameter first",
        )


def _require(module: Any, parameter: Any) -> None:
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"a {type(module).__name__} is no module", fix="give a torch.nn.Module and a parameter")
    if not isinstance(parameter, torch.Tensor):
        raise ArgumentError(f"a {type(parameter).__name__} is no parameter", fix="give a torch.nn.Parameter")
