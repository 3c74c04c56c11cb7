"""What scripts log, as plain Python values that clients understand."""

from __future__ import annotations

import enum
import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from shardwise.errors import TrackerError
from shardwise.logging import get_logger

logger = get_logger(__name__)


def plain(values: Any, tracker: str) -> dict[str, Any]:
    """Values for one call of ``log``: one-element tensors and arrays become numbers, all else stays.

    Args:
        values: a mapping from names to numbers, texts, mappings of these, or what the client knows (its images).
        tracker: its name, for errors.

    Raises:
        TrackerError: not a mapping, or a name that is not a string.
    """
    if not isinstance(values, Mapping):
        raise TrackerError(
            f"log takes a dict of names and values, not {type(values).__name__}",
            where=f"tracker '{tracker}'",
            fix='for example accelerator.log({"loss": loss}, step=step)',
        )
    for key in values:
        if not isinstance(key, str):
            raise TrackerError(
                f"the name {key!r} is a {type(key).__name__}, not a string",
                where=f"tracker '{tracker}'",
                fix=f"log it as {str(key)!r}",
            )
    return {key: plain(v, tracker) if isinstance(v, Mapping) else number(v) for key, v in values.items()}


def number(value: Any) -> Any:
    """The number in a tensor or array of one element, or in a numpy scalar; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.detach().item() if value.numel() == 1 else value
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.size == 1):
        return value.item()
    return value


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one, with names joined by ``/``."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result.update({f"{key}/{inner}": v for inner, v in flat(value).items()})
        else:
            result[key] = value
    return result


def is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def whole_step(step: Any, tracker: str) -> int | None:
    """A step as an int; ``None`` stays.

    Raises:
        TrackerError: something that is not a whole number.
    """
    step = number(step)
    if step is None or (isinstance(step, float) and step.is_integer()):
        return None if step is None else int(step)
    try:
        return operator.index(step)
    except TypeError:
        raise TrackerError(
            f"step={step!r} is not a whole number", where=f"tracker '{tracker}'", fix="give an int, or nothing"
        ) from None


def settings(values: Any, tracker: str) -> dict[str, Any]:
    """A configuration as nested plain values: what JSON has no form for becomes its text.

    Raises:
        TrackerError: not a mapping.
    """
    if not isinstance(values, Mapping):
        raise TrackerError(
            f"the configuration is a {type(values).__name__}, not a dict",
            where=f"tracker '{tracker}'",
            fix="pass config=vars(args) for an argparse.Namespace, dataclasses.asdict(config) for a dataclass",
        )
    result: dict[str, Any] = _setting(values)
    return result


def _setting(value: Any) -> Any:
    value = number(value)
    if isinstance(value, enum.Enum):
        return _setting(value.value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _setting(inner) for key, inner in value.items()}
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_setting(inner) for inner in value]
    return str(value)


def strict(value: Any) -> Any:
    """Numbers that JSON lacks, as the strings ``NaN``, ``Infinity`` and ``-Infinity``: ``float()`` reads them back."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {key: strict(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(inner) for inner in value]
    return value


def pictures(images: Any) -> Any:
    """Images as a sequence: a list as it is, one image or a stacked array or tensor along its first dim."""
    if isinstance(images, torch.Tensor):
        images = images.detach().cpu().numpy()
    return images if isinstance(images, (list, tuple, np.ndarray)) else [images]


def left_out(tracker: str, key: str, value: Any, takes: str) -> None:
    """Warn, once per name, that a value of a kind the client has no form for is not logged."""
    kind = f"a {type(value).__name__}"
    if isinstance(value, (torch.Tensor, np.ndarray)):
        kind += " of several elements (log its mean, for example)"
    logger.warning_once("the tracker '%s' leaves out '%s': it takes %s, not %s", tracker, key, takes, kind)
