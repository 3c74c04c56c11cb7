"""Nests of tensors: what Accelerate calls operations. Those between ranks are :mod:`shardwise.operations`' own."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from functools import update_wrapper
from typing import Any

import torch

from shardwise import operations, trees
from shardwise.compat.dataclasses import TensorInformation
from shardwise.compat.enums import DistributedType
from shardwise.device import HALF_PRECISION
from shardwise.errors import CommError, ConfigError, TensorError
from shardwise.operations import (
    CannotPadNestedTensorWarning,
    broadcast,
    broadcast_object_list,
    gather,
    pad_across_processes,
)

DistributedOperationException = CommError
"""What Accelerate calls the error of ranks that bring different shapes."""

__all__ = [
    "CannotPadNestedTensorWarning",
    "ConvertOutputsToFp32",
    "DistributedOperationException",
    "DistributedType",
    "TensorInformation",
    "broadcast",
    "broadcast_object_list",
    "concatenate",
    "convert_outputs_to_fp32",
    "convert_to_fp32",
    "copy_tensor_to_devices",
    "find_batch_size",
    "find_device",
    "gather",
    "gather_object",
    "get_data_structure",
    "get_shape",
    "honor_type",
    "ignorant_find_batch_size",
    "initialize_tensors",
    "is_namedtuple",
    "is_tensor_information",
    "is_torch_tensor",
    "listify",
    "pad_across_processes",
    "pad_input_tensors",
    "recursively_apply",
    "reduce",
    "send_to_device",
    "slice_tensors",
]


# --- between ranks -----------------------------------------------------------------------------
def gather_object(object: Any) -> list[Any]:
    """The lists of all ranks, joined in rank order. Unpickles what the other ranks of this job sent.

    Args:
        object: a list or tuple of picklable objects.

    Raises:
        TensorError: anything else. (Accelerate returns it as it is on one process, and fails or loses parts of it
            on several.)
    """
    if not isinstance(object, (list, tuple)):
        raise TensorError(
            f"gather_object joins lists and got a {type(object).__name__}", fix="put it into a list: gather_object([x])"
        )
    return [item for part in operations.gather_object(list(object)) for item in part]


def reduce(tensor: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
    """:func:`shardwise.operations.reduce`, with ``mean`` as the default."""
    return operations.reduce(tensor, reduction, scale)


def copy_tensor_to_devices(tensor: torch.Tensor | None = None) -> torch.Tensor:
    """Rank 0's tensor, on every rank and its device; the others give ``None`` and need not know its shape."""
    world = operations.joined()
    held = [tensor.detach().cpu() if tensor is not None and world.rank == 0 else None]
    found = broadcast_object_list(held)[0]
    if found is None:
        raise TensorError("copy_tensor_to_devices got no tensor", where="rank 0", fix="give rank 0's tensor")
    return found.to(tensor.device if tensor is not None else world.device)


# --- walking -----------------------------------------------------------------------------------
def is_torch_tensor(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor)


def is_tensor_information(tensor_info: Any) -> bool:
    return isinstance(tensor_info, TensorInformation)


def is_namedtuple(data: Any) -> bool:
    return trees.is_named_tuple(data)


def honor_type(obj: Any, generator: Iterable[Any]) -> Any:
    """A list, tuple or named tuple of the class of ``obj`` with these items."""
    return trees.rebuilt(obj, generator)


def recursively_apply(
    func: Callable[..., Any],
    data: Any,
    *args: Any,
    test_type: Callable[[Any], bool] = is_torch_tensor,
    error_on_other_type: bool = False,
    **kwargs: Any,
) -> Any:
    """The same nest of lists, tuples and mappings with ``func(leaf, *args, **kwargs)`` in place of leaves.

    Args:
        test_type: which leaves.
        error_on_other_type: do not leave the others as they are.

    Raises:
        TensorError: there are others and ``error_on_other_type`` is set.
    """

    def refuse(item: Any) -> Any:
        raise TensorError(
            f"{getattr(func, '__name__', func)} cannot be applied to a {type(item).__name__}: only to nested "
            f"lists, tuples and dicts of what passes {getattr(test_type, '__name__', test_type)}",
            fix="leave it out of the nest",
        )

    return trees.map_leaves(
        data, lambda item: func(item, *args, **kwargs), test_type, refuse if error_on_other_type else None
    )


def send_to_device(
    tensor: Any, device: torch.device | str | int, non_blocking: bool = False, skip_keys: str | list[str] | None = None
) -> Any:
    """The same nest on ``device``; values under ``skip_keys`` stay where they are."""
    keys = [skip_keys] if isinstance(skip_keys, str) else skip_keys or ()
    return operations.to_device(tensor, device, non_blocking, keys)


def get_data_structure(data: Any) -> Any:
    """The same nest with a :class:`TensorInformation` in place of each tensor."""
    return recursively_apply(lambda t: TensorInformation(shape=t.shape, dtype=t.dtype), data)


def get_shape(data: Any) -> Any:
    """The same nest with the shape of each tensor, as a list."""
    return recursively_apply(lambda t: list(t.shape), data)


def initialize_tensors(data_structure: Any) -> Any:
    """The same nest with an uninitialised tensor in place of each :class:`TensorInformation`."""
    return recursively_apply(
        lambda info: torch.empty(tuple(info.shape), dtype=info.dtype), data_structure, test_type=is_tensor_information
    )


def find_batch_size(data: Any) -> int:
    """Rows of the first tensor of a nest.

    Raises:
        ConfigError: there is none, or it has no rows.
        TensorError: the first leaf is not a tensor.
    """
    found = trees.leaves(data)
    if not found:
        raise ConfigError(f"an empty {type(data).__name__} has no batch size")
    first = found[0]
    if not isinstance(first, torch.Tensor):
        raise TensorError(f"a {type(first).__name__} has no batch size", fix="put the tensors first")
    if not first.ndim:
        raise ConfigError("a tensor without dims has no batch size")
    return first.shape[0]


def ignorant_find_batch_size(data: Any) -> int | None:
    """:func:`find_batch_size`, or ``None`` where there is no answer."""
    try:
        return find_batch_size(data)
    except (ConfigError, TensorError):
        return None


def find_device(data: Any) -> torch.device | None:
    """The device of the first tensor of a nest; ``None`` without one."""
    return next((leaf.device for leaf in trees.leaves(data) if isinstance(leaf, torch.Tensor)), None)


def slice_tensors(
    data: Any, tensor_slice: Any, process_index: int | None = None, num_processes: int | None = None
) -> Any:
    """The same nest with ``tensor[tensor_slice]`` in place of each tensor; the other arguments are not used."""
    return recursively_apply(lambda t: t[tensor_slice], data)


def concatenate(data: Any, dim: int = 0) -> Any:
    """Nests of one structure, as one nest with the tensors concatenated.

    Args:
        data: a list of nests.
        dim: along which tensors are joined.

    Raises:
        ConfigError: nothing to join.
        TensorError: leaves of several nests that are not tensors.
    """
    if not data:
        raise ConfigError("there is nothing to concatenate")

    def one(column: list[Any]) -> Any:
        if all(isinstance(item, torch.Tensor) for item in column):
            return torch.cat(column, dim=dim)
        if len(column) == 1:
            return column[0]
        raise TensorError(f"a {type(column[0]).__name__} cannot be concatenated", fix="leave it out of the nest")

    return trees.join(data, one)


def listify(data: Any) -> Any:
    """The same nest with the values of each tensor as numbers in lists."""
    return recursively_apply(lambda t: t.detach().cpu().tolist(), data)


def pad_input_tensors(tensor: Any, batch_size: int, num_processes: int, dim: int = 0) -> Any:
    """Every tensor of a nest, with its last row repeated until ``num_processes`` divides the rows.

    Args:
        batch_size: rows of each tensor.
        num_processes: parts to cut into.
        dim: where the rows are.

    Raises:
        TensorError: something in the nest is not a tensor.
        ConfigError: a tensor has another number of rows, or none.
    """
    missing = -batch_size % num_processes

    def pad(rows: torch.Tensor) -> torch.Tensor:
        if rows.ndim == 0 or rows.shape[dim] != batch_size or not batch_size:
            raise ConfigError(f"a tensor of shape {tuple(rows.shape)} has not {batch_size} rows in dim {dim}")
        if not missing:
            return rows
        last = rows.narrow(dim, batch_size - 1, 1)
        return torch.cat([rows, last.repeat_interleave(missing, dim)], dim)

    return recursively_apply(pad, tensor, error_on_other_type=True)


# --- precision ---------------------------------------------------------------------------------
def convert_to_fp32(tensor: Any) -> Any:
    """The same nest with fp16 and bf16 tensors in fp32."""
    return recursively_apply(lambda t: t.float() if t.dtype in HALF_PRECISION else t, tensor)


class ConvertOutputsToFp32:
    """A callable whose fp16 and bf16 results come back in fp32. It cannot be pickled."""

    def __init__(self, model_forward: Callable[..., Any]) -> None:
        self.model_forward = model_forward
        update_wrapper(self, model_forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return convert_to_fp32(self.model_forward(*args, **kwargs))

    def __getstate__(self) -> dict[str, Any]:
        raise pickle.PicklingError("a forward in mixed precision cannot be pickled: unwrap the model first")


def convert_outputs_to_fp32(model_forward: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator: see :class:`ConvertOutputsToFp32`. What was decorated is in ``__wrapped__``."""
    wrapper = ConvertOutputsToFp32(model_forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return wrapper(*args, **kwargs)

    forward.__wrapped__ = wrapper  # type: ignore[attr-defined]
    return forward
