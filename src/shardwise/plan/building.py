"""Running a function that builds a model, without memory for the model; and what cannot be run without values."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from shardwise.errors import PlanError, ShardwiseError

SMALL = 4096
"""Elements of a tensor that keeps its values while a model is built."""
_NUMBER = torch.ops.aten._local_scalar_dense.default
_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


class SmallValues(TorchDispatchMode):
    """A block in which small tensors are real although larger ones are fake, as constructors like to compute a few
    numbers with tensors: rates of dropping paths, tables of positions.

    For use inside a ``FakeTensorMode``. A tensor made from nothing is real up to :data:`SMALL` elements; one made of
    real ones is real, and one made of any fake one is fake.

    Where torch draws initial values until all lie in a range, the first ones do.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _NUMBER and isinstance(args[0], FakeTensor) and _draws_initial_values():
            return False if args[0].dtype is torch.bool else 0.0 if args[0].dtype.is_floating_point else 0
        flat, _ = tree_flatten((args, kwargs))
        tensors = [t for t in flat if isinstance(t, torch.Tensor)]
        if any(isinstance(t, FakeTensor) or t.device.type != "cpu" for t in tensors):
            return func(*args, **kwargs)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type != "cpu":
            return func(*args, **kwargs)
        if not tensors:
            with torch.device("meta"):
                sizes = func(*args, **{**kwargs, "device": torch.device("meta")}) if "device" in _names(func) else None
            if not isinstance(sizes, torch.Tensor) or sizes.numel() > SMALL:
                return func(*args, **kwargs)
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        with unset_fake_temporarily():
            return func(*args, **kwargs)


@contextmanager
def conversions() -> Iterator[None]:
    """A block in which modules without values can be moved and cast: ``model.to(torch.bfloat16)``.

    torch changes parameters in place, which those of a ``FakeTensorMode`` do not allow: here a module gets new ones,
    one for each that there was, however many names it has.
    """
    own: Any = nn.Module._apply
    new: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # of the outermost call under way
    depth = 0

    def other(parameter: nn.Parameter, function: Any) -> nn.Parameter:
        if id(parameter) not in new:
            with torch.no_grad():
                made = function(parameter)
            same = made if made is parameter else nn.Parameter(made, requires_grad=parameter.requires_grad)
            new[id(parameter)] = parameter, same
        return new[id(parameter)][1]

    def apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        nonlocal depth
        depth += 1
        try:
            for child in self.children() if recurse else ():
                child._apply(fn)
            held: tuple[dict[str, Any], dict[str, Any]] = self._parameters, self._buffers
            held[0].update({key: other(p, fn) for key, p in held[0].items() if p is not None})
            held[1].update({key: fn(b) for key, b in held[1].items() if b is not None})
        finally:
            depth -= 1
            if depth == 0:
                new.clear()
        return self

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = own  # type: ignore[method-assign]


def _names(func: Any) -> set[str]:
    return {argument.name for argument in func._schema.arguments}


def _draws_initial_values() -> bool:
    """Whether a function of ``torch.nn.init`` is what runs."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == nn.init.__name__:
            return True
        frame = frame.f_back
    return False


def is_fake() -> bool:
    """Whether tensors made here have no memory."""
    return isinstance(torch.empty(0), FakeTensor)


@contextmanager
def told(where: str, what: str) -> Iterator[None]:
    """A block of somebody else's code that runs without values: what it raises becomes one :class:`PlanError`.

    Args:
        where: the model, for the error.
        what: is done there: ``be built``.
    """
    try:
        yield
    except ShardwiseError:
        raise
    except Exception as error:
        place = _place(error)
        if isinstance(error, _VALUES):
            raise PlanError(
                f"the model cannot {what} without values: {place} asks for them ({error.func})",
                where=where,
                fix="let shapes and branches there not follow from values; for routed experts, give each a fixed "
                "number of tokens",
            ) from error
        if isinstance(error, UnsupportedOperatorException):
            raise PlanError(
                f"the model cannot {what} without values: {place} calls an operator that has no rule for shapes "
                f"({error.func})",
                where=where,
                fix="register one with torch.library.register_fake",
            ) from error
        raise PlanError(f"the model cannot {what}: {said(error)}", where=where) from error


def said(error: BaseException) -> str:
    """An error of somebody else's code in one line: where, which, and what it says."""
    return f"{_place(error)}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _place(error: BaseException) -> str:
    """The last line of code outside torch and this library on the way to an error."""
    inside = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(inside) and frame.filename.endswith(".py"):
            return f"{Path(frame.filename).name}, line {frame.lineno}"
    return "it"
