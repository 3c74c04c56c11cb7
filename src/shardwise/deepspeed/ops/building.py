"""The optimizer that a configuration names."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise.deepspeed_config.values import AUTO
from shardwise.errors import ConfigError, did_you_mean

_ONE_BIT = "gradients are not sent as signs; {} with communication_data_type bf16 halves what is sent"
_MUP = "build it in the script and give it to initialize(optimizer=...)"
_REFUSED = {
    "onebitadam": _ONE_BIT.format("Adam"),
    "zerooneadam": _ONE_BIT.format("Adam"),
    "onebitlamb": _ONE_BIT.format("Lamb"),
    "muadam": _MUP,
    "muadamw": _MUP,
    "musgd": _MUP,
}
_OURS = ("Adam", "AdamW", "Adagrad", "Lion", "Lamb", "SGD", "Muon")


def build_optimizer(
    name: str,
    params: Iterable[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    model: nn.Module | None = None,
    where: str = "optimizer",
) -> Optimizer:
    """The optimizer of a DeepSpeed configuration.

    ``Adam`` is AdamW unless ``adam_w_mode`` is false, as in DeepSpeed; ``torch_adam`` takes torch's own class with its
    defaults (AdamW of torch decays by 0.01). ``Lamb`` and ``Muon`` need whole parameters (``layout=tensor``).

    Args:
        name: ``Adam``, ``AdamW``, ``Adagrad``, ``Lion``, ``Lamb``, ``SGD`` or ``Muon`` in any case, or the name of a
            class of ``torch.optim``.
        params: parameters, or groups of them.
        kwargs: the optimizer's arguments, as in the configuration.
        model: whose parameters they are; Muon tells embeddings by it.
        where: for errors.

    Raises:
        ConfigError: an unknown name or argument, one that is left at ``"auto"``, or an optimizer that is not served.
    """
    said = {key: tuple(value) if key == "betas" else value for key, value in (kwargs or {}).items()}
    for key, value in said.items():
        if value == AUTO or (isinstance(value, tuple) and AUTO in value):
            raise ConfigError(
                f"{where}.params.{key} is 'auto', and nobody has filled it in",
                where=name,
                fix="give a value ('auto' is filled by Hugging Face's Trainer only)",
            )
    if said.pop("max_grad_norm", None):
        raise ConfigError(
            f"{where}.params.max_grad_norm: the engine clips", where=name, fix="gradient_clipping at the top"
        )
    low = name.lower()
    if low in _REFUSED:
        raise ConfigError(f"{where}.type={name!r} is not served", fix=_REFUSED[low])
    if low == "muon":
        return _muon(params, said, model)
    make, arguments = _class_of(name, said, where)
    _check(make, arguments, name, where)
    try:
        optimizer: Optimizer = make(params, **arguments)
    except (TypeError, ValueError) as error:  # a rate that is a string or negative
        raise ConfigError(f"it cannot be made of {arguments}: {error}", where=f"{where}.type {name}") from error
    return optimizer


def _class_of(name: str, said: dict[str, Any], where: str) -> tuple[Any, dict[str, Any]]:
    low = name.lower()
    if low in ("adam", "adamw"):
        decoupled = said.pop("adam_w_mode", True) or low == "adamw"
        said.pop("fp32_optimizer_states", None)  # fp32 masters have fp32 state
        if said.pop("torch_adam", False):
            return (torch.optim.AdamW if decoupled else torch.optim.Adam), said
        from shardwise.deepspeed.ops.adam import FusedAdam

        return FusedAdam, {**said, "adam_w_mode": decoupled}
    if low == "lion":
        from shardwise.deepspeed.ops.lion import FusedLion

        return FusedLion, said
    if low == "lamb":
        from shardwise.deepspeed.ops.lamb import FusedLamb

        return FusedLamb, said
    if low == "adagrad":
        from shardwise.deepspeed.ops.adagrad import DeepSpeedCPUAdagrad

        return DeepSpeedCPUAdagrad, said
    classes = {key: kind for key, kind in vars(torch.optim).items() if inspect.isclass(kind) and kind is not Optimizer}
    found = next((kind for key, kind in classes.items() if key == name or (low == "sgd" and key == "SGD")), None)
    if found is None or not issubclass(found, Optimizer):
        raise ConfigError(
            f"{where}.type={name!r} is not known",
            fix=did_you_mean(
                name, [*_OURS, *classes], otherwise="build it in the script and give it to initialize(optimizer=...)"
            ),
        )
    return found, said


def _muon(params: Iterable[Any], said: dict[str, Any], model: nn.Module | None) -> Optimizer:
    from shardwise.deepspeed.ops.muon import MuonWithAuxAdam, muon_groups

    said.pop("ns_method", None)  # two ways to the same numbers; torch's is used
    for gone in ("torch_adam", "fp32_optimizer_states", "foreach"):
        said.pop(gone, None)
    if said.pop("per_head_muon", False):
        raise ConfigError(
            "optimizer.params.per_head_muon is not served: a matrix is made orthogonal as a whole", fix="leave it out"
        )
    decoupled = said.pop("adam_w_mode", True)
    return MuonWithAuxAdam(muon_groups(params, said, model), adam_w_mode=decoupled)


def _check(make: Any, arguments: Mapping[str, Any], name: str, where: str) -> None:
    known = [
        key for key in inspect.signature(make.__init__).parameters if key not in ("params", "model_params", "self")
    ]
    for key in arguments:
        if key not in known:
            raise ConfigError(
                f"{where}.params.{key} is no argument of {name}",
                fix=did_you_mean(key, known, otherwise=f"one of {', '.join(known)}"),
            )
