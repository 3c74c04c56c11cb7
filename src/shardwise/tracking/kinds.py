"""The trackers there are, and whether the packages they need are installed."""

from __future__ import annotations

import importlib
from types import ModuleType

from shardwise.compat.enums import LoggerType
from shardwise.compat.imports import (
    is_aim_available,
    is_clearml_available,
    is_comet_ml_available,
    is_dvclive_available,
    is_mlflow_available,
    is_swanlab_available,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)
from shardwise.errors import MissingPackage

_CHECKS = {
    "aim": is_aim_available,
    "clearml": is_clearml_available,
    "comet_ml": is_comet_ml_available,
    "dvclive": is_dvclive_available,
    "mlflow": is_mlflow_available,
    "swanlab": is_swanlab_available,
    "tensorboard": is_tensorboard_available,
    "trackio": is_trackio_available,
    "wandb": is_wandb_available,
}


def is_available(name: str) -> bool:
    """Whether the tracker ``name`` could start here. Looks for its package without importing it."""
    return name not in _CHECKS or _CHECKS[name]()


def get_available_trackers() -> list[LoggerType]:
    """The trackers that can start here, by name; JSONL always can."""
    return [kind for kind in LoggerType if kind is not LoggerType.ALL and is_available(str(kind))]


def client(name: str, module: str = "") -> ModuleType:
    """Import a tracker's client.

    Args:
        name: the tracker's, and the client's.
        module: another module to import.

    Raises:
        MissingPackage: it is not installed.
    """
    if not is_available(name):
        raise missing(name)
    return importlib.import_module(module or name)


def missing(name: str) -> MissingPackage:
    """The error for a tracker whose client is not installed."""
    package = "'aim<4'" if name == "aim" else name
    return MissingPackage(
        f"the tracker '{name}' needs the package {name}, which is not installed",
        where=f"log_with='{name}'",
        fix=f"pip install {package}",
    )
