"""Models of a function that somebody wrote: ``module:function``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from shardwise.errors import PlanError, ShardwiseError, did_you_mean
from shardwise.plan.building import SmallValues, conversions


class Written:
    """A model of a function that somebody wrote."""

    def __init__(self, name: str, function: Callable[..., Any], wanted: dict[str, int]) -> None:
        self.name, self.function, self.wanted = name, function, wanted
        self.rows: int | None = None  # asked for, where the function does not take a number of rows
        self.example: Any = None  # inputs, as the last call returned them: for their shapes
        self.own_loss: Callable[[nn.Module, Any], torch.Tensor] | None = None

    def call(self) -> tuple[nn.Module, Any, Callable[[nn.Module, Any], torch.Tensor] | None]:
        with SmallValues(), conversions():
            made = self.function(**self.wanted)
        parts = tuple(made) if isinstance(made, (tuple, list)) else (made,)
        if len(parts) not in (2, 3) or not isinstance(parts[0], nn.Module):
            raise PlanError(
                f"the function returns {type(made).__name__}, and not (model, inputs) or (model, inputs, loss)",
                where=self.name,
            )
        loss = parts[2] if len(parts) == 3 else None
        if loss is not None and not callable(loss):
            raise PlanError(f"the third part of what it returns is no function: {loss!r}", where=self.name)
        return parts[0], parts[1], loss

    def model(self) -> nn.Module:
        model, self.example, self.own_loss = self.call()
        return model.train()

    def inputs(self, device: torch.device | str) -> Any:
        if self.example is None:
            _, self.example, self.own_loss = self.call()
        return inputs_like(self.example, self.rows, device)

    def loss(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        if self.own_loss is not None:
            return self.own_loss(model, inputs)
        if isinstance(inputs, Mapping):
            return loss_of(model(**inputs))
        return loss_of(model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs))

    def sized(self, batch: int, seq: int | None) -> Written:
        """The same model with another number of rows."""
        takes = "batch" in inspect.signature(self.function).parameters
        other = Written(self.name, self.function, {**self.wanted, "batch": batch} if takes else self.wanted)
        other.rows = None if takes else batch
        return other

    longest = None


def find(text: str) -> Callable[..., Any]:
    module, _, attribute = text.rpartition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        if module.endswith(".py"):
            file = Path(module).expanduser()
            if not file.is_file():
                raise PlanError(f"there is no file '{module}'", where=text)
            spec = importlib.util.spec_from_file_location(file.stem, file)
            assert spec is not None and spec.loader is not None
            loaded = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(file.stem, loaded)
            spec.loader.exec_module(loaded)
        else:
            loaded = importlib.import_module(module)
    except ShardwiseError:
        raise
    except (Exception, SystemExit) as error:
        line = " ".join(str(error).split())[:300]
        raise PlanError(f"'{module}' cannot be imported: {type(error).__name__}: {line}", where=text) from error
    function: Any = loaded
    for part in attribute.split("."):
        if not hasattr(function, part):
            names = [n for n in dir(function) if callable(getattr(function, n, None)) and not n.startswith("_")]
            raise PlanError(
                f"'{module}' has no '{attribute}'", fix=did_you_mean(part, names, f"it has: {', '.join(names[:12])}")
            )
        function = getattr(function, part)
    if not callable(function):
        raise PlanError(f"'{attribute}' of '{module}' is no function", where=text)
    return function


def inputs_like(example: Any, rows: int | None, device: torch.device | str) -> Any:
    """New zeros of the shapes of an example, with ``rows`` where that has its rows, if a number is given."""
    before = rows_of(example)

    def empty(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        shape = list(value.shape)
        if rows is not None and shape and shape[0] == before:
            shape[0] = rows
        return torch.zeros(shape, dtype=value.dtype, device=device)

    return tree_map(empty, example)


def rows_of(example: Any) -> int | None:
    """The length of the first dimension of the first tensor that has one."""
    for tensor in tree_flatten(example)[0]:
        if isinstance(tensor, torch.Tensor) and tensor.ndim:
            return int(tensor.shape[0])
    return None


def loss_of(output: Any) -> torch.Tensor:
    """What to call ``backward()`` on: the output's loss, or the mean of all floating-point numbers in it."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(found, torch.Tensor):
        return found
    trains = torch.is_grad_enabled()  # and an evaluation does not
    tensors = [t for t in tree_flatten(output)[0] if isinstance(t, torch.Tensor) and t.is_floating_point()]
    flat = [t for t in tensors if t.requires_grad or not trains]
    if not flat:
        raise PlanError("the model's output has nothing to train on: no loss, and no floating-point tensor")
    if len(flat) == 1 and flat[0].ndim == 0:
        return flat[0]
    return torch.stack([t.float().mean() for t in flat]).sum()
