"""Parameters that several modules share."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from shardwise.inference.device_map import Place, place_of

_log = logging.getLogger(__name__)


def find_tied_parameters(model: nn.Module, **kwargs: Any) -> list[list[str]]:
    """The names of each parameter that has several, sorted. Works on ``meta``; other arguments are not used."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, p in model.named_parameters(remove_duplicate=False):
        names[id(p)].append(name)
    return [sorted(group) for group in names.values() if len(group) > 1]


def retie_parameters(model: nn.Module, tied_params: Iterable[Sequence[str]]) -> None:
    """Make the parameters of each group one again: the first that is not on ``meta``.

    Args:
        tied_params: groups of names, as :func:`find_tied_parameters` gives them.
    """
    for group in tied_params:
        found = [model.get_parameter(name) for name in group]
        first = next((p for p in found if p.device.type != "meta"), None)
        if first is not None:
            for name in group:
                path, _, last = name.rpartition(".")
                setattr(model.get_submodule(path), last, first)


def check_tied_parameters_in_config(model: nn.Module) -> bool:
    """Does the configuration of a model of ``transformers`` say that some of its weights are tied?

    ``False`` for any other model. It may be asked before the model ties them.
    """
    if not any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__):
        return False
    asked: Any = model
    config: Any = getattr(asked, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    words = getattr(text, "tie_word_embeddings", False) and asked.get_output_embeddings() is not None
    both = getattr(config, "is_encoder_decoder", False) and getattr(config, "tie_encoder_decoder", False)
    return bool(words or both or any(hasattr(module, "_tie_weights") for module in model.modules()))


def check_tied_parameters_on_same_device(tied_params: Iterable[Sequence[str]], device_map: Mapping[str, Place]) -> None:
    """Log a warning for each group of tied parameters that a device map puts on several devices.

    Raises:
        PlacementError: the map has no device for one of them.
    """
    for group in tied_params:
        places = {name: place_of(name, device_map) for name in group}
        if len(set(places.values())) > 1:
            _log.warning(
                "one tied parameter is on several devices, and would be several there: %s. "
                "Put its modules on one device, or ask infer_auto_device_map.",
                places,
            )
