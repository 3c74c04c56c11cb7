"""Small state in files that are read without running anything: ``torch.save``, read with ``weights_only=True``.

Whatever such a file cannot hold is refused when it is saved, not when it is loaded.
"""

from __future__ import annotations

import importlib
import io
import pickle
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardwise import device as devices
from shardwise.checkpoint.torch_format import archivable
from shardwise.errors import CheckpointError, first_line
from shardwise.trees import map_tensors

_CANNOT = (pickle.PickleError, AttributeError, TypeError, ValueError, RuntimeError, EOFError, KeyError)
"""What ``torch.save`` and a weights-only ``torch.load`` raise about a value or a file they cannot take."""


def _numpy_types() -> list[Any]:
    """NumPy's own constructors of arrays and numbers; its names for them differ between versions."""
    core: Any = importlib.import_module("numpy._core.multiarray" if hasattr(np, "_core") else "numpy.core.multiarray")
    dtypes = {type(np.dtype(t)) for t in "?bhilqBHILQefdFD"}
    named: list[Any] = [np.ndarray, np.dtype, *dtypes]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        named += [(core._reconstruct, f"{module}._reconstruct"), (core.scalar, f"{module}.scalar")]
    return named


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """A view would be saved with all of the storage it looks at."""
    if tensor.layout != torch.strided or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return tensor
    own = tensor.numel() * tensor.element_size()
    return tensor.detach().clone() if tensor.untyped_storage().nbytes() > own else tensor


def dumps(value: Mapping[str, Any]) -> memoryview:
    """A mapping as the contents of a file that :func:`loads` can read.

    Raises:
        CheckpointError: something in it could not be read back; names the entry.
    """
    data = io.BytesIO()
    try:
        compact = map_tensors(dict(value), _compact)
        torch.save(compact, data)
        if doubtful := list(_doubtful(compact)):
            _round_trip(doubtful)
    except _CANNOT as error:
        raise _refusal(value, error) from error
    return data.getbuffer()


def _doubtful(value: Any) -> Iterator[Any]:
    """The parts of a nest that have to be read back to know that they can be. Reading takes long; a save waits."""
    kind = type(value)
    if kind is dict:
        for key, part in value.items():
            yield from _doubtful(key)
            yield from _doubtful(part)
    elif kind is list or kind is tuple:
        for part in value:
            yield from _doubtful(part)
    elif kind is torch.Tensor:
        simple = value.layout == torch.strided and value.device.type != "meta" and archivable(value.dtype)
        if not simple or value.is_conj() or value.is_neg() or value.__dict__:
            yield value
    elif not (
        kind in (bool, float, type(None))
        or (kind is int and -(2**63) <= value < 2**63)
        or (kind is str and value.isascii())
    ):
        yield value


def loads(data: bytes, path: Path) -> dict[str, Any]:
    """What :func:`dumps` was given, tensors on the CPU. Nothing in it is run.

    Args:
        data: contents of a file.
        path: of the file, for errors.

    Raises:
        CheckpointError: it is damaged, or holds more than data; names the file.
    """
    try:
        with torch.serialization.safe_globals(_numpy_types()):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except _CANNOT as error:
        raise CheckpointError(
            f"refused: the file holds something other than plain data ({why_refused(error)})",
            where=str(path),
            fix="nothing was loaded; use another checkpoint, and find out who changed this one",
        ) from error


def _refusal(value: Mapping[str, Any], error: BaseException) -> CheckpointError:
    path, culprit, why = _culprit(dict(value), "", why_refused(error))
    kind = f"{type(culprit).__module__}.{type(culprit).__qualname__}".removeprefix("builtins.")
    return CheckpointError(
        f"a {kind} cannot be saved, because it could not be read back without running code ({why})",
        where=path or "state",
        fix="let state_dict() return tensors, numbers, strings, NumPy arrays, and lists, tuples and dicts of them",
    )


def _culprit(value: Any, path: str, why: str) -> tuple[str, Any, str]:
    """The smallest part of a nest that cannot make the round trip."""
    children: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        children = [(f"{path}[{k!r}]" if path else str(k), v) for k, v in value.items()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        children = [(f"{path}[{i}]", v) for i, v in enumerate(value)]
    for name, child in children:
        try:
            _round_trip(child)
        except _CANNOT as error:
            return _culprit(child, name, why_refused(error))
    return path, value, why


def _round_trip(value: Any) -> None:
    data = io.BytesIO()
    torch.save(value, data)
    data.seek(0)
    with torch.serialization.safe_globals(_numpy_types()):
        torch.load(data, map_location="cpu", weights_only=True)


def why_refused(error: BaseException) -> str:
    """Of what torch says when it does not read a file without running code: what is in the way."""
    unsupported = (line.strip() for line in str(error).splitlines() if "nsupported" in line or "not an allowed" in line)
    return next(unsupported, first_line(error))[:200]


# --- random generators ---------------------------------------------------------------------------
def rng_state() -> dict[str, Any]:
    """The states of Python's ``random``, NumPy's global generator, torch's CPU one, and the current device's
    if an accelerator is in use."""
    numpy_state = np.random.get_state(legacy=False)
    inner = numpy_state["state"]
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": {
            **{k: v for k, v in numpy_state.items() if k != "state"},
            "state": {k: torch.from_numpy(v.astype(np.int64)) if k == "key" else v for k, v in inner.items()},
        },
        "torch": torch.get_rng_state(),
    }
    kind = devices.in_use()
    if kind is not None:  # asking would start it: hundreds of MB, for a run on the CPU
        state[kind] = devices.get_rng_state(kind)
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the generators into the states that :func:`rng_state` gave.

    The state of a device's generator has no use where devices are of another type or not in use, and is left out
    there; without one in ``state`` the device's generator stays as it is.
    """
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    inner = {k: v.numpy().astype(np.uint32) if k == "key" else v for k, v in state["numpy"]["state"].items()}
    np.random.set_state({**state["numpy"], "state": inner})
    torch.set_rng_state(state["torch"])
    kind = devices.in_use()
    if kind in state:
        devices.set_rng_state(kind, state[kind])
