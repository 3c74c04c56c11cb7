"""Which tracker a name means, and what ``log_with`` asks for."""

from __future__ import annotations

import os
import warnings
from typing import Any

from shardwise.errors import TrackerError, did_you_mean
from shardwise.logging import get_logger
from shardwise.tracking.aim import AimTracker
from shardwise.tracking.base import GeneralTracker, check_complete, is_tracker
from shardwise.tracking.clearml import ClearMLTracker
from shardwise.tracking.comet import CometMLTracker
from shardwise.tracking.csv import CSVTracker
from shardwise.tracking.dvclive import DVCLiveTracker
from shardwise.tracking.jsonl import JSONLTracker
from shardwise.tracking.kinds import LoggerType, get_available_trackers, is_available, missing
from shardwise.tracking.mlflow import MLflowTracker
from shardwise.tracking.tensorboard import TensorBoardTracker
from shardwise.tracking.wandb import SwanLabTracker, TrackioTracker, WandBTracker

logger = get_logger(__name__)

_CLASSES: tuple[Any, ...] = (
    AimTracker, CometMLTracker, MLflowTracker, TensorBoardTracker, WandBTracker, ClearMLTracker, DVCLiveTracker,
    SwanLabTracker, TrackioTracker, JSONLTracker, CSVTracker,
)  # fmt: skip
# By name; scripts add theirs with register_tracker_class, as in Accelerate.
LOGGER_TYPE_TO_CLASS: dict[str, Any] = {kind.name: kind for kind in _CLASSES}


def register_tracker_class(tracker_class: type[GeneralTracker]) -> None:
    """Make a script's tracker known by its ``name``, for ``log_with``. Before the Accelerator is created.

    ``init_trackers`` creates it with the project's name, then the logging directory if the class requires one, then
    its ``init_kwargs``. A name that is known already is replaced, with a warning.

    Raises:
        TrackerError: no subclass of :class:`GeneralTracker`, or an incomplete one.
    """
    if not (isinstance(tracker_class, type) and issubclass(tracker_class, GeneralTracker)):
        raise TrackerError(f"{tracker_class!r} is no subclass of GeneralTracker", fix="derive the class from it")
    check_complete(tracker_class)
    name = tracker_class.name
    if not isinstance(name, str) or not name or name == "all":
        raise TrackerError(
            f"name={name!r} cannot be a tracker's name", where=tracker_class.__name__, fix="give a string of its own"
        )
    if name in LOGGER_TYPE_TO_CLASS:
        warnings.warn(f"the tracker '{name}' is replaced by {tracker_class.__name__}", stacklevel=2)
    LOGGER_TYPE_TO_CLASS[name] = tracker_class


def filter_trackers(log_with: Any, logging_dir: str | os.PathLike[str] | None = None) -> list[Any]:
    """What ``log_with`` asks for, checked.

    Args:
        log_with: a name, a :class:`LoggerType`, a tracker object, or a list of these; ``"all"`` stands for every
            tracker whose client is installed, and JSONL if there is a ``logging_dir``.
        logging_dir: where trackers that need a folder write.

    Returns:
        A :class:`LoggerType` per known name, the name of a registered class, and the objects given; each once.

    Raises:
        MissingPackage: a tracker whose client is not installed.
        TrackerError: an unknown tracker, an incomplete object, one that needs a folder and has none, or ``"all"``
            where there is nothing.
    """
    if log_with is None:
        return []
    asked = list(log_with) if isinstance(log_with, (list, tuple)) else [log_with]
    chosen: list[Any] = []
    for one in asked:
        found = _all(logging_dir) if str(one) == "all" and _is_name(one) else [_one(one)]
        chosen += [f for f in found if not any(f is c or (_is_name(f) and f == c) for c in chosen)]
    for kind in chosen:
        if _is_name(kind) and logging_dir is None and LOGGER_TYPE_TO_CLASS[str(kind)].requires_logging_directory:
            raise TrackerError(
                f"the tracker '{kind}' writes files and no folder was given",
                where=f"log_with='{kind}'",
                fix="pass Accelerator(project_dir=...), or ProjectConfiguration(logging_dir=...)",
            )
    return chosen


def check_names(kwargs: dict[str, Any] | None, argument: str, known: list[str]) -> dict[str, dict[str, Any]]:
    """Settings by tracker's name.

    Args:
        kwargs: names and dicts, or ``None``.
        argument: what the script calls it, for errors.
        known: names of its own trackers.

    Raises:
        TrackerError: something else, or a name that no tracker has. Names of trackers that are not in use are fine.
    """
    for name, inner in (kwargs or {}).items():
        names = sorted({*LOGGER_TYPE_TO_CLASS, *known})
        if str(name) not in names:
            raise TrackerError(f"no tracker is called '{name}'", where=argument, fix=_instead(str(name), names))
        if not isinstance(inner, dict):
            raise TrackerError(
                f"the settings for '{name}' are a {type(inner).__name__}, not a dict",
                where=argument,
                fix=f'for example {argument}={{"{name}": {{...}}}}',
            )
    return {str(name): inner for name, inner in (kwargs or {}).items()}


def _is_name(kind: Any) -> bool:
    return isinstance(kind, (str, LoggerType)) or hasattr(kind, "value")  # another library's LoggerType does as well


def _one(kind: Any) -> Any:
    if is_tracker(kind):
        check_complete(kind)
        return kind
    names = sorted(LOGGER_TYPE_TO_CLASS)
    if not _is_name(kind):
        given = f"the class {kind.__name__}" if isinstance(kind, type) else f"a {type(kind).__name__}"
        raise TrackerError(
            f"{given} is no tracker",
            where="log_with",
            fix=f"give a tracker object (a class must be called first), or a name: {', '.join(names)}",
        )
    name = str(getattr(kind, "value", kind))
    if name not in names:
        raise TrackerError(f"no tracker is called '{name}'", where="log_with", fix=_instead(name, [*names, "all"]))
    if not is_available(name):
        raise missing(name)
    return LoggerType(name) if name in LoggerType else name


def _all(logging_dir: Any) -> list[LoggerType]:
    found = [kind for kind in get_available_trackers() if kind is not LoggerType.JSONL or logging_dir is not None]
    if not found:
        raise TrackerError(
            "no tracker's client is installed",
            where="log_with='all'",
            fix="pip install one (tensorboard, for example), or pass project_dir to write lines of JSON",
        )
    logger.info("log_with='all' logs with %s", ", ".join(map(str, found)))
    return found


def _instead(name: str, names: list[str]) -> str:
    return did_you_mean(name, names, otherwise=f"one of {', '.join(names)}")
