"""A device without memory and without kernels: tensors on it are fake, so that a model can be where it will train."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils import backend_registration

from shardwise.device import keep_accelerator
from shardwise.errors import PlanError

NAME = "planned"
_SETUP = "_setup_privateuseone_for_python_backend"


@functools.cache
def use_planned_device() -> torch.device:
    """Give torch a device type ``planned``, and return its first device. Later calls return the same.

    torch has room for one device type that is not its own in a process.

    Raises:
        PlanError: this torch cannot, or the room is taken.
    """
    setup = getattr(backend_registration, _SETUP, None)
    fix = "plan for a CPU, or in a process of its own: shardwise plan"
    if setup is None:
        raise PlanError(
            f"torch {torch.__version__} cannot have a device type written in Python, which plans for accelerators need",
            fix="install torch 2.10 or later",
        )
    taken = torch._C._get_privateuse1_backend_name()
    if taken not in ("privateuseone", NAME):
        raise PlanError(f"this process uses the device type '{taken}', and torch has room for one such type", fix=fix)
    if taken != NAME:
        keep_accelerator()
        try:
            setup(NAME, backend_module=_Module())
        except RuntimeError as error:
            raise PlanError(f"torch refused the device type '{NAME}': {error}", fix=fix) from error
    return torch.device(NAME, 0)


_planning: list[None] = []  # an entry for each block under way


@contextmanager
def planning() -> Iterator[None]:
    """A block in which the planned device is available."""
    _planning.append(None)
    try:
        yield
    finally:
        _planning.pop()


class _Stream:
    """Of a device that does nothing: all that it was told is done."""

    def synchronize(self) -> None:
        """It is."""

    def wait_stream(self, other: Any) -> None:
        """It has."""


_STREAM = _Stream()


class _Module:
    """What torch asks the module of a device type."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        # To a model that is being planned it is. To all else that this process does afterwards, such as a loader that
        # pins memory for whatever accelerator there is, it must not be: it has neither memory nor kernels.
        return bool(_planning)

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        """There is one."""

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """It draws no numbers."""

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.empty(16, dtype=torch.uint8, device="cpu")

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        """It draws no numbers."""

    # torch's checkpoints and others ask these of the type that torch says is there, whatever they are to save. No class
    # of streams: nothing runs late.
    def current_stream(self, device: Any = None) -> _Stream:
        return _STREAM

    def stream(self, stream: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def synchronize(self, device: Any = None) -> None:
        """Nothing is under way."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def move(model: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace a model's parameters, buffers and plain tensors by empty ones on ``device``, in place.

    Inside a ``FakeTensorMode`` nothing is allocated; ``Module.to`` cannot do this there. What was one tensor under
    several names is one tensor again; layouts and ``requires_grad`` stay.

    Args:
        dtype: of floating-point parameters and buffers; their own if none is given.

    Returns:
        The same model.
    """
    device = torch.device(device)
    new: dict[int, torch.Tensor] = {}
    old: list[torch.Tensor] = []  # an id means something while the object lives

    def other(tensor: torch.Tensor, moved: bool) -> torch.Tensor:
        if id(tensor) not in new:
            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            home = device if moved or tensor.device.type == "meta" else tensor.device
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=wanted, device=home)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                vars(empty).update({key: value for key, value in vars(tensor).items() if key not in vars(empty)})
            new[id(tensor)] = empty
            old.append(tensor)
        return new[id(tensor)]

    for module in model.modules():
        held: tuple[dict[str, Any], dict[str, Any]] = module._parameters, module._buffers
        for own in held:
            own.update({name: other(tensor, True) for name, tensor in own.items() if tensor is not None})
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor):  # Module.to leaves these where they are
                vars(module)[name] = other(value, id(value) in new)
    return model


def _from_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    device = kwargs.get("device")
    if device is None or torch.device(device).type != NAME:
        return func(*args, **kwargs)
    made = func(*args, **{**kwargs, "device": "cpu", "requires_grad": False})
    return _like(made, torch.device(device)).requires_grad_(kwargs.get("requires_grad", False))


def _moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if getattr(args[0], "constant", None) is not None:
        # A few numbers that torch remembers beside a fake tensor: it would have the device compute with them.
        return func(_like(args[0], args[0].device), *args[1:], **kwargs)
    return func(*args, **kwargs)


def _indexed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args[0].device.type == NAME:
        return func(args[0], _index(args[1], args[0].device), *args[2:], **kwargs)
    return func(*args, **kwargs)


Instead = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""What is called with a function of torch and its arguments, in place of it."""

# Some build a tensor on the host and copy it, below the mode that makes tensors fake.
PLANNED_TENSORS: dict[Any, Instead] = {
    **dict.fromkeys((torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor), _from_values),
    **dict.fromkeys((torch.Tensor.to, torch.Tensor.type_as), _moved),
    **dict.fromkeys((torch.Tensor.__getitem__, torch.Tensor.__setitem__), _indexed),
}
"""So that tensors on the planned device can be made from Python values, as ``torch.tensor`` does."""


def _like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def _index(index: Any, device: torch.device) -> Any:
    """An index whose lists of numbers are tensors, as torch would make them."""
    if isinstance(index, tuple):
        return tuple(_index(part, device) for part in index)
    if isinstance(index, list) and index and all(type(i) is int for i in index):
        return torch.empty(len(index), dtype=torch.long, device=device)
    return index
