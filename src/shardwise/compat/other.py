"""What scripts import from ``accelerate.utils.other``: its small things are here, the rest has modules of its own."""

from __future__ import annotations

import functools
import socket
from collections.abc import Mapping
from typing import Any

from shardwise import operations
from shardwise.compat.object_files import clean_state_dict_for_safetensors, load, save
from shardwise.compat.wrappers import (
    extract_model_from_parallel,
    get_module_children_bottom_up,
    has_compiled_regions,
    is_compiled_module,
    model_has_dtensor,
)

__all__ = [
    "clean_state_dict_for_safetensors",
    "convert_bytes",
    "extract_model_from_parallel",
    "get_free_port",
    "get_module_children_bottom_up",
    "get_pretty_name",
    "has_compiled_regions",
    "is_compiled_module",
    "is_port_in_use",
    "load",
    "merge_dicts",
    "model_has_dtensor",
    "recursive_getattr",
    "save",
    "wait_for_everyone",
]


def wait_for_everyone() -> None:
    """Return when every rank is here. A collective."""
    operations.barrier()


def get_pretty_name(obj: Any) -> str:
    """The name of a class or function; of anything else, that of its class."""
    if not hasattr(obj, "__qualname__") and not hasattr(obj, "__name__"):
        obj = type(obj)
    return str(getattr(obj, "__qualname__", None) or obj.__name__)


def merge_dicts(source: Mapping[str, Any], destination: dict[str, Any]) -> dict[str, Any]:
    """``destination`` with the values of ``source`` put in, dict by dict."""
    for key, value in source.items():
        if isinstance(value, dict):
            if not isinstance(destination.get(key), dict):
                destination[key] = {}
            merge_dicts(value, destination[key])
        else:
            destination[key] = value
    return destination


def convert_bytes(size: float) -> str:
    """A number of bytes in the largest unit (of 1024) that fits: ``1.5 KB``."""
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if size < 1024.0:
            return f"{round(size, 2)} {unit}"
        size /= 1024.0
    return f"{round(size, 2)} PB"


def recursive_getattr(obj: Any, attr: str) -> Any:
    """``obj.a.b`` for ``attr="a.b"``."""
    return functools.reduce(getattr, attr.split("."), obj)


def is_port_in_use(port: int | None = None) -> bool:
    """Does somebody listen on this port of this host? 29500 by default."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        return s.connect_ex(("localhost", 29500 if port is None else port)) == 0


def get_free_port() -> int:
    """A port of this host that nobody listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])
